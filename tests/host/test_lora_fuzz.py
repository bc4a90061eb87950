"""Five hundred damaged or made-up LoRA files: each is refused with a reason or loaded with a report, quickly, and nothing stays behind."""

from __future__ import annotations

import gc
import json
import random
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("comfy.sd", reason="needs ComfyUI on the path")

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from reward_lab.host import lora_file  # noqa: E402
from reward_lab.host.lora_base import base_from_file  # noqa: E402
from reward_lab.host.lora_keys import wan_layers  # noqa: E402
from reward_lab.host.lora_report import inspect  # noqa: E402

pytestmark = pytest.mark.host

FILES, LIMIT_S = 500, 2.0
DTYPES = ("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "I16", "U16", "F16", "BF16", "I32", "F32", "I64", "F64", "C64", "F4", "nonsense", None, 7)


def split(data: bytes) -> tuple[dict, bytes]:
    """Header and numbers of a safetensors file."""
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def join(header: object, body: bytes, size: int | None = None) -> bytes:
    """A safetensors file, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + body


def repacked(header: dict, body: bytes) -> bytes:
    """A file whose numbers lie one after the other again: readers refuse holes and overlaps."""
    packed, parts, end = {}, [], 0
    for key, entry in header.items():
        if key != "__metadata__":
            start, stop = entry["data_offsets"]
            parts.append(body[start:stop])
            entry = {**entry, "data_offsets": [end, end + stop - start]}
            end += stop - start
        packed[key] = entry
    return join(packed, b"".join(parts))


def truncated(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data))]


def flipped(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.randrange(1, 30)):
        changed[chance.randrange(len(changed))] = chance.randrange(256)
    return bytes(changed)


def flipped_header(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    changed[8 + chance.randrange(2000)] = chance.randrange(32, 127)
    return bytes(changed)


def wrong_header_size(data: bytes, chance: random.Random) -> bytes:
    return struct.pack("<Q", chance.choice([0, 1, 2, len(data), 1 << 27, 1 << 40, (1 << 64) - 1])) + data[8:]


def wrong_dtype(data: bytes, chance: random.Random) -> bytes:
    header, body = split(data)
    for key in chance.sample(sorted(set(header) - {"__metadata__"}), chance.choice([1, 5, 90])):
        header[key]["dtype"] = chance.choice(DTYPES)
    return join(header, body)


def wrong_shape(data: bytes, chance: random.Random) -> bytes:
    header, body = split(data)
    key = chance.choice(sorted(set(header) - {"__metadata__"}))
    header[key]["shape"] = chance.choice(
        [[-8, -96], [8], [96, 8], [], [1 << 62, 4], [10**400], "8x96", None, [8.5, 96], [True, 768], [[8, 96]], [0, 96], {"0": 8}]
    )
    return join(header, body)


def wrong_offsets(data: bytes, chance: random.Random) -> bytes:
    header, body = split(data)
    key = chance.choice(sorted(set(header) - {"__metadata__"}))
    header[key]["data_offsets"] = chance.choice([[0, 0], [5, 1], [-1, 10], [0, 1 << 60], [0], "0-1", None, [0, 1536]])
    return join(header, body)


def swapped_shapes(data: bytes, chance: random.Random) -> bytes:
    header, body = split(data)
    keys = sorted(set(header) - {"__metadata__"})
    first, second = chance.sample(keys, 2)
    header[first], header[second] = header[second], header[first]
    return join(header, body)


def not_numbers(data: bytes, chance: random.Random) -> bytes:
    header, body = split(data)
    start, end = header[chance.choice(sorted(set(header) - {"__metadata__"}))]["data_offsets"]
    changed = bytearray(body)
    # bf16 NaN, infinity and minus infinity.
    place = start + 2 * chance.randrange((end - start) // 2)
    changed[place : place + 2] = chance.choice([b"\xc0\x7f", b"\x80\x7f", b"\x80\xff"])
    return join(header, bytes(changed))


def duplicate_keys(data: bytes, chance: random.Random) -> bytes:
    header, body = split(data)
    key = chance.choice(sorted(set(header) - {"__metadata__"}))
    text = json.dumps(header)
    return join((text[:-1] + f", {json.dumps(key)}: {json.dumps(header[key])}}}").encode(), body)


def same_layer_twice(data: bytes, chance: random.Random) -> bytes:
    header, body = split(data)
    for key in chance.sample(sorted(set(header) - {"__metadata__"}), 3):
        header[key.replace("lora_unet__", "lycoris_")] = header[key]
    return repacked(header, body)


def renamed(data: bytes, chance: random.Random) -> bytes:
    header, body = split(data)
    for key in chance.sample(sorted(set(header) - {"__metadata__"}), chance.choice([1, 10, 90])):
        entry = header.pop(key)
        header[chance.choice([key[::-1], key[:-1], "", "\x00", "é" * 50, "lora_te1_" + key, key.replace("blocks_0", "blocks_99"), "x" * 10_000])] = entry
    return join(header, body)


def dropped(data: bytes, chance: random.Random) -> bytes:
    header, body = split(data)
    for key in chance.sample(sorted(set(header) - {"__metadata__"}), chance.choice([1, 20, 89])):
        del header[key]
    return repacked(header, body)


def odd_metadata(data: bytes, chance: random.Random) -> bytes:
    header, body = split(data)
    header["__metadata__"] = chance.choice(
        [
            {"a": 1},
            [],
            "x",
            {"lora_adapter_metadata": "[1]"},
            {"lora_adapter_metadata": '{"lora_alpha": 1e999}'},
            {"expert": "both"},
            {"x": "y" * 100_000},
            None,
            {"a": None},
        ]
    )
    return join(header, body)


def other_json(data: bytes, chance: random.Random) -> bytes:
    return join(chance.choice([b"[]", b"null", b"7", b"{}", b'{"a": 1}', b"[" * 50_000, b"\xff\xfe{}", b'{"a": {}}', b" " * 50, b'{"a": NaN}']), split(data)[1])


def many_keys(data: bytes, chance: random.Random) -> bytes:
    count = chance.choice([11_000, 50_000])
    entry = {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}
    return join({f"blocks.{number}.x.alpha": entry for number in range(count)}, b"\0\0\0\0")


MUTATIONS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    truncated, flipped, flipped_header, wrong_header_size, wrong_dtype, wrong_shape, wrong_offsets, swapped_shapes, not_numbers, duplicate_keys,
    same_layer_twice, renamed, dropped, odd_metadata, other_json,
)  # fmt: skip


def check(path: Path, base, cause: str) -> tuple[str, float]:
    """Inspect one file and hold what every file is held to; returns the verdict and the seconds of CPU that it took."""
    # CPU time: what a loaded machine adds in waiting says nothing about the code.
    start = time.process_time()
    report = inspect(path, base)
    seconds = time.process_time() - start
    assert report.verdict in ("ok", "refused"), cause
    assert (report.reason != "") == (report.verdict == "refused"), cause
    assert len(report.reason) < 3000 and report.text() and json.dumps(report.to_dict(), allow_nan=False), cause
    if report.verdict == "ok":
        assert report.keys_applied > 0 and report.keys_applied + sum(report.left_out.values()) == report.keys_total, cause
    return report.verdict, seconds


def living_tensor_bytes() -> int:
    """Bytes behind all tensors of this process; a view and what it looks at count once."""
    gc.collect()
    # type() and not isinstance(): that would touch lazy objects of other libraries.
    storages = [entry.untyped_storage() for entry in gc.get_objects() if type(entry) is torch.Tensor]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def scanned(path: Path, base) -> str:
    """What a merge into a file says, which reads the numbers one by one."""
    try:
        fitted = lora_file.fit(lora_file.scan_lora(path), base.shapes)
    except ValueError:
        return "refused"
    assert all(tensor.is_meta for patch in fitted.patches.values() for tensor in getattr(patch, "weights", ()) if isinstance(tensor, torch.Tensor))
    return "ok"


def test_five_hundred_files(shared_fixtures: Path, tmp_path: Path) -> None:
    folder = shared_fixtures / "videoxfun_lora"
    data = (folder / "Wan2.2-Fun-A14B-InP-high-noise-HPS2.1.safetensors").read_bytes()
    base = base_from_file(folder / "base_high.safetensors")
    path = tmp_path / "fuzz.safetensors"
    path.write_bytes(data)
    assert check(path, base, "whole")[0] == "ok"
    verdicts: dict[str, set[str]] = {}
    slowest = (0.0, "")
    before = living_tensor_bytes()
    for number in range(FILES):
        chance = random.Random(number)
        mutation = many_keys if number % 125 == 124 else MUTATIONS[number % len(MUTATIONS)]
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(mutation(data, chance))
        verdict, seconds = check(path, base, f"{mutation.__name__}, seed {number}")
        assert scanned(path, base) == verdict, f"{mutation.__name__}, seed {number}"
        verdicts.setdefault(mutation.__name__, set()).add(verdict)
        slowest = max(slowest, (seconds, f"{mutation.__name__}, seed {number}"))
        path.unlink()
    assert slowest[0] < LIMIT_S, slowest
    # Only the small cache of files that were read may hold tensors: four files of 106 kB.
    assert living_tensor_bytes() - before <= lora_file.CACHED_FILES * len(data)
    assert len(lora_file._cache) <= lora_file.CACHED_FILES
    for name in ("truncated", "wrong_header_size", "not_numbers", "duplicate_keys", "other_json", "many_keys"):
        assert verdicts[name] == {"refused"}, name
    # The mutations that leave a usable file must show that not everything is refused blindly.
    assert "ok" in verdicts["dropped"] and verdicts["same_layer_twice"] == {"ok"}


def test_a_million_keys_and_a_huge_header_are_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "million.safetensors"
    entry = b'{"dtype":"F32","shape":[],"data_offsets":[0,4]}'
    header = b"{" + b",".join(b'"blocks.%d.x.alpha":%s' % (number, entry) for number in range(10**6)) + b"}"
    path.write_bytes(join(header, b"\0\0\0\0"))
    verdict, seconds = check(path, None, "million")
    assert verdict == "refused" and seconds < LIMIT_S
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 90_000_000))
        file.truncate(95_000_000)
    verdict, seconds = check(path, None, "huge header")
    assert verdict == "refused" and seconds < LIMIT_S


def test_the_largest_file_that_is_read(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = {}
    for layer in [layer for layer in wan_layers() if not layer.endswith(("norm3", "modulation", "norm_q", "norm_k", "img"))][: lora_file.MAX_KEYS // 3 - 1]:
        tensors |= {f"transformer.{layer}.{part}": torch.ones(1, 1) for part in ("lora_A.weight", "lora_B.weight", "alpha")}
    tensors |= {f"filler.{number}": torch.ones(1) for number in range(lora_file.MAX_KEYS - len(tensors))}
    save_file(tensors, tmp_path / "largest.safetensors")
    verdict, seconds = check(tmp_path / "largest.safetensors", None, "largest")
    assert verdict == "ok" and seconds < LIMIT_S


def test_fp8_and_double_files_are_read(shared_fixtures: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = load_file(shared_fixtures / "videoxfun_lora" / "Wan2.2-Fun-A14B-InP-high-noise-HPS2.1.safetensors")
    for dtype in (torch.float8_e4m3fn, torch.float16, torch.float64):
        save_file({key: value.to(dtype) for key, value in tensors.items()}, tmp_path / "typed.safetensors")
        report = inspect(tmp_path / "typed.safetensors")
        assert (report.verdict, report.modules_applied, report.alphas) == ("ok", 30, (4.0,))
