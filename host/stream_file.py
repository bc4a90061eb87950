"""Writes a large safetensors file piece by piece, so that it can be interrupted and taken up again.

While it is written it has another name, and beside it lies a journal of what is safely on the disk. Only a whole file gets its name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from ..lora_train.safetensors_file import TensorSpec, header_bytes

SYNC_BYTES = 1 << 28  # this much work at most is done twice after a crash


class StreamFile:
    """A safetensors file that is being written, tensor after tensor in the order of its specs.

    Attributes:
        path: The name that it gets when it is whole.
        partial: Its name until then.
        done: How many tensors are written; the next one to write is `specs[done]`.
    """

    def __init__(self, path: Path, specs: Sequence[TensorSpec], metadata: dict[str, str], recipe: str) -> None:
        """Open it, after the last tensor that an interrupted run of the same recipe wrote.

        Args:
            path: The file.
            specs: All its tensors.
            metadata: Of the file.
            recipe: What makes its content; a partial file of another recipe is thrown away.
        """
        self.path, self.specs = path, tuple(specs)
        self.partial, self._journal = partial_path(path), journal_path(path)
        head = header_bytes(self.specs, metadata)
        self._recipe, self._unsynced = recipe, 0
        self.done = _tensors_on_disk(path, recipe, len(self.specs))
        self._size = len(head) + sum(spec.size_bytes for spec in self.specs[: self.done])
        if self.done and self.partial.stat().st_size < self._size:
            self.done, self._size = 0, len(head)
        self._file = self.partial.open("r+b" if self.done else "wb")
        if self.done:
            self._file.truncate(self._size)
            self._file.seek(self._size)
        else:
            self._journal.unlink(missing_ok=True)
            self._file.write(head)

    @property
    def spec(self) -> TensorSpec:
        """The tensor whose turn it is."""
        return self.specs[self.done]

    def write(self, pieces: Iterable[torch.Tensor]) -> None:
        """Write the tensor whose turn it is, in pieces of its type and in the order of its numbers."""
        size = 0
        for piece in pieces:
            data = piece.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
            self._file.write(memoryview(data))
            size += data.nbytes
        self._written(size)

    def copy(self, source: Path, begin: int, *, piece_bytes: int = 1 << 24) -> None:
        """Copy the tensor whose turn it is, byte by byte, from a place in another file."""
        left = self.spec.size_bytes
        with source.open("rb") as file:
            file.seek(begin)
            while left:
                piece = file.read(min(piece_bytes, left))
                if not piece:
                    raise ValueError(f"{source.name} became shorter while it was read. Leave it alone, and start again.")
                self._file.write(piece)
                left -= len(piece)
        self._written(self.spec.size_bytes)

    def finish(self) -> None:
        """Give the file its name."""
        if self.done != len(self.specs):
            raise RuntimeError(f"{self.path.name} has {self.done} of {len(self.specs)} tensors")
        self._sync()
        self._file.close()
        self.partial.replace(self.path)
        self._journal.unlink(missing_ok=True)

    def pause(self) -> None:
        """Close the file as far as it is, to be taken up later."""
        if not self._file.closed:
            self._sync()
            self._file.close()

    def _written(self, size: int) -> None:
        if size != self.spec.size_bytes:
            raise RuntimeError(f"{self.spec.key}: {size} bytes were written, {self.spec.size_bytes} were announced")
        self.done += 1
        self._unsynced += size
        if self._unsynced >= SYNC_BYTES:
            self._sync()

    def _sync(self) -> None:
        """Bring everything to the disk, and only then say so in the journal."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._unsynced = 0
        new = self._journal.with_name(self._journal.name + ".new")
        new.write_text(json.dumps({"recipe": self._recipe, "tensors": self.done}), encoding="utf-8")
        new.replace(self._journal)


def partial_path(path: Path) -> Path:
    """Return the name of a file while it is written."""
    return path.with_name(path.name + ".partial")


def journal_path(path: Path) -> Path:
    """Return the journal's name."""
    return path.with_name(path.name + ".partial.json")


def _tensors_on_disk(path: Path, recipe: str, count: int) -> int:
    """Return how many tensors an interrupted run of the same recipe left; 0 when there was none."""
    if not partial_path(path).is_file():
        return 0
    try:
        journal = json.loads(journal_path(path).read_text(encoding="utf-8"))
        done = journal["tensors"] if journal["recipe"] == recipe else 0
    except (OSError, ValueError, KeyError, TypeError):
        return 0
    return done if isinstance(done, int) and 0 <= done <= count else 0
