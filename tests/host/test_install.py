"""The pack as an ordinary folder in `custom_nodes/` of a real ComfyUI, beside a pack of somebody else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.host

NODE_IDS = {
    "RewardLabWanModels",
    "RewardLabLoadLoRAs",
    "RewardLabSampleWan22",
    "RewardLabRewardModel",
    "RewardLabScoreVideo",
    "RewardLabPrompts",
    "RewardLabTrainLoRA",
    "RewardLabRunResult",
    "RewardLabTestLabCell",
    "RewardLabTestLabGrid",
}

# Loads the pack's __init__ as the host does, under a name that is its path, and tells what that did to the process and to the disk.
IMPORT_PROBE = """
import importlib.util, json, os, socket, sys, threading
sys.dont_write_bytecode = True
events = []
def hook(event, arguments):
    if event == "open" and isinstance(arguments[1], str) and any(letter in arguments[1] for letter in "wax+"):
        events.append(f"writes {arguments[0]}")
    elif event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.mkdir", "os.remove", "os.rename", "os.symlink"):
        events.append(event)
before, threads, path, environ = set(sys.modules), threading.active_count(), list(sys.path), dict(os.environ)
sys.addaudithook(hook)
spec = importlib.util.spec_from_file_location(sys.argv[1].replace(".", "_x_"), os.path.join(sys.argv[1], "__init__.py"))
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module
spec.loader.exec_module(module)
print(json.dumps({
    "events": events,
    "modules": sorted(name for name in set(sys.modules) - before if name not in (spec.name, "__future__")),
    "threads": threading.active_count() - threads,
    "path": sys.path == path,
    "environ": dict(os.environ) == environ,
    "names": sorted(name for name in vars(module) if not name.startswith("_")),
}))
"""


def test_every_node_is_there_and_the_other_packs_too(client) -> None:
    nodes = client.get("/object_info")
    assert set(nodes) >= NODE_IDS
    assert "OtherPackEcho" in nodes
    assert nodes["RewardLabLoadLoRAs"]["category"].startswith("Reward Lab")


def test_the_host_reports_no_failure_for_the_pack(server) -> None:
    log = server.log.read_text(encoding="utf-8", errors="replace")
    assert "IMPORT FAILED" not in log
    assert "Cannot import" not in log
    assert "Error while calling comfy_entrypoint" not in log


def test_the_other_pack_still_works(client) -> None:
    outputs = client.run({"1": {"class_type": "OtherPackEcho", "inputs": {"text": "hello"}}})
    assert outputs["1"]["text"] == ["hello"]


def test_page_files_templates_and_texts_are_served(client) -> None:
    assert b"registerExtension" in client.fetch("/extensions/reward_lab/extension.js")
    assert "/extensions/reward_lab/extension.js" in client.get("/extensions")
    assert client.get("/api/workflow_templates").get("reward_lab"), "the host finds no example workflows"
    assert "RewardLabLoadLoRAs" in client.get("/api/i18n")["en"]["nodeDefs"]


def test_node_help_is_served_for_every_node(client) -> None:
    for node_id in NODE_IDS:
        assert client.fetch(f"/extensions/reward_lab/docs/{node_id}.md").strip(), node_id


def test_importing_the_pack_only_defines_names(repo: Path) -> None:
    done = subprocess.run([sys.executable, "-I", "-c", IMPORT_PROBE, str(repo)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == {"events": [], "modules": [], "threads": 0, "path": True, "environ": True, "names": ["WEB_DIRECTORY", "annotations", "comfy_entrypoint"]}


def test_requirements_never_touch_the_users_torch(repo: Path) -> None:
    lines = [line.split("#")[0].strip().lower() for line in (repo / "requirements.txt").read_text(encoding="utf-8").splitlines()]
    named = {line.split("=")[0].split(">")[0].split("<")[0].split("[")[0].strip() for line in lines if line}
    assert not named & {"torch", "torchvision", "torchaudio", "xformers", "triton", "numpy<2"}
    assert not any(line.startswith("-") for line in lines), "no index or option may be forced on the user"
