"""Downloads of the official LoRA files, against a hub of our own on this machine."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytest.importorskip("comfy.sd", reason="needs ComfyUI on the path")

from reward_lab.host import lora_download  # noqa: E402
from reward_lab.host.lora_download import download  # noqa: E402
from reward_lab.host.official_loras import OFFICIAL, REPOSITORY, find_official, official_named  # noqa: E402

pytestmark = pytest.mark.host

LORA = OFFICIAL[0]


@dataclass
class Hub:
    """What the fake hub serves, and what it was asked."""

    content: bytes
    sha256: str | None
    url: str = ""
    serves_ranges: bool = True
    status: int = 200
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    """The two requests of the hub's protocol that the download makes: paths-info, and the file itself."""

    def log_message(self, *_args) -> None:
        """Keep the tests' output clean."""

    def do_POST(self) -> None:
        hub: Hub = self.server.hub
        asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
        hub.asked.append(("POST", self.path, asked))
        entry = {"type": "file", "path": LORA.name, "size": len(hub.content), "oid": "0" * 40}
        if hub.sha256:
            entry["lfs"] = {"oid": hub.sha256, "size": len(hub.content), "pointerSize": 134}
        is_known = self.path == f"/api/models/{REPOSITORY}/paths-info/main"
        self._answer(200, json.dumps([entry] if is_known and hub.content else []).encode(), "application/json")

    def do_GET(self) -> None:
        hub: Hub = self.server.hub
        wanted = self.headers.get("Range")
        hub.asked.append(("GET", self.path, wanted))
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted and hub.serves_ranges else 0
        if hub.status != 200:
            self._answer(hub.status, b"gone", "text/plain")
        else:
            self._answer(206 if start else 200, hub.content[start:], "application/octet-stream")

    def _answer(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hub(shared_fixtures: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that serves one of the tiny LoRAs under the name of the real one."""
    content = (shared_fixtures / "videoxfun_lora" / LORA.name).read_bytes()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub = Hub(content=content, sha256=hashlib.sha256(content).hexdigest(), url=f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", server.hub.url)
    monkeypatch.setattr(lora_download, "SPARE_BYTES", 0)
    yield server.hub
    server.shutdown()
    server.server_close()
    thread.join()


def gets(hub: Hub) -> list[str | None]:
    """The ranges that were asked for."""
    return [wanted for method, _, wanted in hub.asked if method == "GET"]


def test_a_whole_download_is_checked_and_named_last(hub: Hub, tmp_path: Path) -> None:
    done = download(LORA, tmp_path / "models" / "loras")
    assert done.path.read_bytes() == hub.content and done.sha256 == hub.sha256 and not done.was_there
    assert [path.name for path in done.path.parent.iterdir()] == [LORA.name]
    assert gets(hub) == [None] and hub.asked[-1][1] == f"/{REPOSITORY}/resolve/main/{LORA.name}"
    # The tiny file is not as large as the real one must be, and that is told.
    assert any("were expected" in warning for warning in done.warnings)
    again = download(LORA, done.path.parent)
    assert again.was_there and len(gets(hub)) == 1


def test_a_broken_download_is_gone_on_with(hub: Hub, tmp_path: Path) -> None:
    part = tmp_path / f"{LORA.name}.{hub.sha256[:12]}.part"
    part.write_bytes(hub.content[:1000])
    assert download(LORA, tmp_path).path.read_bytes() == hub.content
    assert gets(hub) == ["bytes=1000-"] and not part.exists()


def test_the_rest_of_an_older_version_is_not_used(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / f"{LORA.name}.{'a' * 12}.part").write_bytes(b"old")
    assert download(LORA, tmp_path).path.read_bytes() == hub.content
    assert gets(hub) == [None]


def test_a_file_that_is_not_the_hubs_is_thrown_away(hub: Hub, tmp_path: Path) -> None:
    hub.sha256 = "f" * 64
    with pytest.raises(ValueError, match="arrived damaged: its sha256 is"):
        download(LORA, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_part_that_was_damaged_is_found_out(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / f"{LORA.name}.{hub.sha256[:12]}.part").write_bytes(b"x" * 1000)
    with pytest.raises(ValueError, match="arrived damaged"):
        download(LORA, tmp_path)
    assert download(LORA, tmp_path).path.read_bytes() == hub.content


def test_another_file_of_that_name_is_left_alone(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / LORA.name).write_bytes(b"mine")
    with pytest.raises(ValueError, match="is there already, but it has 4 bytes"):
        download(LORA, tmp_path)
    assert (tmp_path / LORA.name).read_bytes() == b"mine" and gets(hub) == []


def test_without_a_hash_only_the_size_is_checked_and_that_is_said(hub: Hub, tmp_path: Path) -> None:
    hub.sha256 = None
    done = download(LORA, tmp_path)
    assert done.sha256 is None and "no hash" in done.warnings[0]


def test_offline_tells_where_to_put_the_file_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="cannot be reached") as caught:
        download(LORA, tmp_path)
    assert str(tmp_path / LORA.name) in str(caught.value) and f"https://huggingface.co/{REPOSITORY}/resolve/main/{LORA.name}" in str(caught.value)


def test_a_file_that_the_hub_lacks_or_refuses(hub: Hub, tmp_path: Path) -> None:
    hub.status = 404
    with pytest.raises(ValueError, match="broke off after 0 of"):
        download(LORA, tmp_path)
    hub.content = b""
    with pytest.raises(ValueError, match="has no file"):
        download(LORA, tmp_path)


def test_a_full_disk_is_told_before_the_download(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_download, "SPARE_BYTES", 1 << 60)
    with pytest.raises(ValueError, match="Free some space"):
        download(LORA, tmp_path)
    assert gets(hub) == []


def test_registry() -> None:
    assert {(lora.expert, lora.reward) for lora in OFFICIAL} == {(expert, reward) for expert in ("high", "low") for reward in ("HPSv2.1", "MPS")}
    for lora in OFFICIAL:
        # Both of the authors' pages have two rewards swapped; the file name is right.
        assert f"-{lora.expert}-noise-{lora.reward.replace('HPSv', 'HPS')}." in lora.name and lora.sha256 is None
        assert find_official(f"folder/{lora.name.upper()}") is lora is official_named(lora.name.removeprefix("Wan2.2-Fun-A14B-InP-"))
    assert find_official("Wan2.1-Fun-14B-InP-MPS.safetensors") is None
    assert [lora.name for lora in OFFICIAL if "HPS" in lora.advice] == ["Wan2.2-Fun-A14B-InP-low-noise-MPS.safetensors"]
    with pytest.raises(ValueError, match="no official reward LoRA"):
        official_named("HPS")
