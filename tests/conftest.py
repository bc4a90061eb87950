"""What all tests share: the pack under the name `reward_lab`, the host's code on the path, fixtures from outside, a real server.

Environment: COMFYUI_PATH (a ComfyUI folder; `lab.py test` sets it), REWARD_LAB_FIXTURES (peers' outputs; else ../shared/fixtures),
REWARD_LAB_CHROMIUM (a browser), REWARD_LAB_REQUIRE_BROWSER=1 or CI (a missing browser or missing pocket models fail, and do not skip).
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OTHER_PACK = """
class OtherPackEcho:
    RETURN_TYPES = ("STRING",)
    FUNCTION = "run"
    CATEGORY = "test"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"text": ("STRING", {"default": ""})}}

    def run(self, text):
        return {"ui": {"text": [text]}, "result": (text,)}


NODE_CLASS_MAPPINGS = {"OtherPackEcho": OtherPackEcho}
"""


def _register_pack() -> None:
    # By path: the root must not be on sys.path, where `nodes` and `tests` would hide the host's modules.
    spec = importlib.util.spec_from_file_location("reward_lab_alias", ROOT / "labtools" / "alias.py")
    alias = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(alias)
    alias.register(ROOT)


_register_pack()

from reward_lab.labtools.base import make_base, pocket_files  # noqa: E402
from reward_lab.labtools.client import Client  # noqa: E402
from reward_lab.labtools.comfy_server import Server, has_gpu, start_server  # noqa: E402
from reward_lab.labtools.errors import LabError  # noqa: E402

COMFYUI = Path(os.environ["COMFYUI_PATH"]).resolve() if os.environ.get("COMFYUI_PATH") else None
HOST_BASE = Path(tempfile.mkdtemp(prefix="reward-lab-tests-"))


def _make_host_importable() -> None:
    sys.path.insert(0, str(COMFYUI))
    import comfy.cli_args

    comfy.cli_args.args.cpu = not has_gpu()
    # In-process tests must not write into the user's own ComfyUI.
    comfy.cli_args.args.base_directory = str(HOST_BASE)


if COMFYUI:
    _make_host_importable()


def pytest_unconfigure() -> None:
    """Remove the base directory of the in-process host."""
    shutil.rmtree(HOST_BASE, ignore_errors=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs a card where there is none: it cannot run there, and a skip on every machine would hide one that matters."""
    if any(item.get_closest_marker("gpu") for item in items) and (sys.platform == "darwin" or not has_gpu()):
        left_out = [item for item in items if item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


def skip_or_fail(message: str) -> None:
    """Skip on a developer's machine; fail where everything is meant to run, so that nothing is passed over in silence."""
    if os.environ.get("CI") or os.environ.get("REWARD_LAB_REQUIRE_BROWSER") == "1":
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="session")
def repo() -> Path:
    """The pack's root folder."""
    return ROOT


@pytest.fixture(scope="session")
def shared_fixtures() -> Path:
    """Peers' recorded outputs, which lie outside the repository."""
    folder = Path(os.environ.get("REWARD_LAB_FIXTURES") or ROOT.parent / "shared" / "fixtures")
    if not folder.is_dir():
        pytest.skip(f"no fixtures at {folder}; set REWARD_LAB_FIXTURES to their folder")
    return folder


@pytest.fixture(scope="session")
def comfyui() -> Path:
    """ComfyUI's folder; its modules can be imported (device: CPU where no GPU is found)."""
    if not COMFYUI:
        pytest.skip("COMFYUI_PATH is not set; `python lab.py test` sets it")
    return COMFYUI


@pytest.fixture(scope="session")
def pocket_models() -> list[dict]:
    """The entries of pocket/MANIFEST.json, after a check of every file."""
    try:
        return pocket_files()
    except LabError as error:
        skip_or_fail(str(error))


@pytest.fixture(scope="session")
def server(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real ComfyUI server with the pack, the pocket models as far as they exist, and one pack of somebody else."""
    base = make_base(tmp_path_factory.mktemp("comfyui") / "base", with_models=(ROOT / "pocket" / "MANIFEST.json").is_file())
    other = base / "custom_nodes" / "other_pack"
    other.mkdir()
    (other / "__init__.py").write_text(OTHER_PACK, encoding="utf-8")
    running = start_server(Path(sys.executable), comfyui, base)
    yield running
    running.stop()


@pytest.fixture(scope="session")
def pocket_server(server: Server, pocket_models: list[dict]) -> Server:
    """The server, for tests that cannot do without the pocket models."""
    return server


@pytest.fixture
def client(server: Server) -> Client:
    """A client of the server's API with an id of its own."""
    return server.client()


@pytest.fixture(scope="session")
def chromium_path() -> str:
    """A Chromium or Chrome to drive."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    found = os.environ.get("REWARD_LAB_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if not found:
        skip_or_fail("no Chromium found. Install it (Debian and Ubuntu: sudo apt install chromium), or set REWARD_LAB_CHROMIUM to its path")
    return found


def assert_gradient(gradient_CHW, expected: dict) -> None:
    """Compare a gradient with recorded points, norm and size, at the tolerances of the fixtures' README."""
    for channel, row, column, value in expected["points"]:
        assert gradient_CHW[channel, row, column].item() == pytest.approx(value, abs=1e-4 * expected["abs_max"])
    assert gradient_CHW.norm().item() == pytest.approx(expected["l2_norm"], rel=1e-4)
    assert gradient_CHW.abs().max().item() == pytest.approx(expected["abs_max"], rel=1e-4)


@pytest.fixture
def gradient_check():
    """The function `assert_gradient`."""
    return assert_gradient
