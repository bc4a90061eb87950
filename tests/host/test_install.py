"""The pack as an ordinary folder in `custom_nodes/` of a real ComfyUI, beside packs of others; linked, and copied under a name with hyphens."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from reward_lab.labtools.base import NOT_COPIED, make_base
from reward_lab.labtools.client import PromptFailed
from reward_lab.labtools.comfy_server import Server, start_server

pytestmark = pytest.mark.host

NODE_IDS = {
    "RewardLabWanModels",
    "RewardLabLoadLoRAs",
    "RewardLabSampleWan22",
    "RewardLabRewardModel",
    "RewardLabScoreVideo",
    "RewardLabPrompts",
    "RewardLabMemoryPlan",
    "RewardLabTrainLoRA",
    "RewardLabRunResult",
    "RewardLabTestLabCell",
    "RewardLabTestLabGrid",
}

# A pack in the host's newer form; `OTHER_PACK` of conftest.py is one in the older form.
NEW_STYLE_PACK = """
from comfy_api.latest import ComfyExtension, io


class NewStyleEcho(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NewStyleEcho", category="test", inputs=[io.String.Input("text", default="")], outputs=[io.String.Output()], is_output_node=True
        )

    @classmethod
    def execute(cls, text):
        return io.NodeOutput(text, ui={"text": [text]})


class NewStylePack(ComfyExtension):
    async def get_node_list(self):
        return [NewStyleEcho]


async def comfy_entrypoint():
    return NewStylePack()
"""

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


@pytest.fixture(scope="module")
def copied(comfyui: Path, repo: Path, server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a copy of the pack, as an archive unpacks it, and two packs of others; without models."""
    base = make_base(tmp_path_factory.mktemp("copied") / "base", with_models=False)
    nodes = base / "custom_nodes"
    (nodes / "reward_lab").unlink()
    shutil.copytree(repo, nodes / "reward-lab", ignore=shutil.ignore_patterns(*NOT_COPIED, "pocket", "tests", "lab.py"))
    shutil.copytree(server.base / "custom_nodes" / "other_pack", nodes / "a-pack-before")
    (nodes / "z-pack-after").mkdir()
    (nodes / "z-pack-after" / "__init__.py").write_text(NEW_STYLE_PACK, encoding="utf-8")
    running = start_server(Path(sys.executable), comfyui, base)
    yield running
    running.stop()


def test_a_copy_with_hyphens_in_its_name_works_beside_other_packs(copied: Server) -> None:
    client = copied.client()
    nodes = client.get("/object_info")
    assert set(nodes) >= NODE_IDS | {"OtherPackEcho", "NewStyleEcho"}
    log = copied.log.read_text(encoding="utf-8", errors="replace")
    assert "IMPORT FAILED" not in log and "Cannot import" not in log and "Error while calling comfy_entrypoint" not in log
    assert "/extensions/reward-lab/extension.js" in client.get("/extensions")
    for node_id in NODE_IDS:
        assert client.fetch(f"/extensions/reward-lab/docs/{node_id}.md").strip(), node_id
    assert client.get("/api/workflow_templates").get("reward-lab"), "the host finds no example workflows"
    assert client.get("/reward_lab/runs") == []
    outputs = client.run({str(i): {"class_type": name, "inputs": {"text": name}} for i, name in enumerate(("OtherPackEcho", "NewStyleEcho"))})
    assert [outputs[key]["text"] for key in ("0", "1")] == [["OtherPackEcho"], ["NewStyleEcho"]]


def test_without_models_a_prompt_is_refused_and_names_the_missing_file(copied: Server) -> None:
    models = {"high_noise_model": "absent.safetensors", "low_noise_model": "absent.safetensors", "text_encoder": "t5.safetensors", "vae": "vae.safetensors"}
    prompt = {
        "1": {"class_type": "RewardLabWanModels", "inputs": {**models, "weight_dtype": "default"}},
        "2": {"class_type": "RewardLabLoadLoRAs", "inputs": {"model_high": ["1", 0], "model_low": ["1", 1], "rows": '[{"file": "x.safetensors", "high": 1}]'}},
        "3": {"class_type": "PreviewAny", "inputs": {"source": ["2", 2]}},
    }
    with pytest.raises(PromptFailed, match=r"absent\.safetensors") as caught:
        copied.client().run(prompt)
    assert "is not among the loras files" in str(caught.value)


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
