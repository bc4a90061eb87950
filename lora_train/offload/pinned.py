"""Pinned host memory of exactly the size that is asked for.

torch's own allocator of pinned memory rounds every request up to a power of two (ATen/core/CachingHostAllocator.h, torch 2.11): 28 GB of a 14B model's
weights would take 43, 62 GB of kept activations 86. Here pages come from the system and are registered with the driver, page by page and no more.
Nothing watches copies that are under way when a tensor is dropped, but the pages themselves: they wait for the device before they go.
"""

from __future__ import annotations

import math
import mmap

import torch

_PAGE = mmap.PAGESIZE


class _Pages(mmap.mmap):
    """Anonymous pages that are registered with the driver as long as they exist."""

    address = 0

    def __del__(self) -> None:
        # Python is ending where torch's functions are gone; the driver frees everything then.
        if self.address and torch is not None and torch.cuda is not None:
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaHostUnregister(self.address)
            self.address = 0


def pinned_empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised host tensor in pinned memory.

    Raises:
        RuntimeError: the system refuses (too little memory, a container's limit).
    """
    count = math.prod(shape)
    size = max(1, -(-count * dtype.itemsize // _PAGE)) * _PAGE
    try:
        pages = _Pages(-1, size)
    except OSError as error:
        raise RuntimeError(f"{size} bytes of host memory: {error}") from error
    raw = torch.frombuffer(pages, dtype=torch.uint8)
    # Written by all threads at once here, the pages exist when the driver asks for them, which it does with one thread.
    raw.zero_()
    status = int(torch.cuda.cudart().cudaHostRegister(raw.data_ptr(), size, 0))
    if status != 0:
        _clear_error()
        raise RuntimeError(f"{size} bytes of pinned memory: CUDA error {status}")
    pages.address = raw.data_ptr()
    return raw[: count * dtype.itemsize].view(dtype).view(shape)


def _clear_error() -> None:
    """The driver reports a refusal once more at the next launch, whatever that is."""
    try:
        torch.empty(1, device="cuda").zero_()
    except RuntimeError:
        return
