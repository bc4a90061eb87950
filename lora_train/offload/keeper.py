"""Activations that wait for the backward pass, on the device or on the host."""

from __future__ import annotations

import torch

from .transfers import Transfers


class Kept:
    """Tensors of one block; taken once."""

    def __init__(self, tensors: tuple[torch.Tensor, ...], transfers: Transfers, is_on_host: bool) -> None:
        self._transfers = transfers
        self._is_on_host = is_on_host
        self._stored = [transfers.to_host(tensor.contiguous()) if is_on_host else (tensor, None) for tensor in tensors]
        self._fetched: list[tuple[torch.Tensor, object]] | None = None
        self.nbytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def prefetch(self) -> None:
        """Start bringing them to the device."""
        if self._is_on_host and self._stored is not None and self._fetched is None:
            self._fetched = [self._transfers.fetch(host, mark) for host, mark in self._stored]

    def take(self) -> tuple[torch.Tensor, ...]:
        """The tensors on the device; nothing is kept here any more.

        Raises:
            RuntimeError: taken before: a second backward through the same pass.
        """
        if self._stored is None:
            raise RuntimeError("a second backward through the same pass: its kept activations were freed by the first one; run the forward again")
        if not self._is_on_host:
            stored, self._stored = self._stored, None
            return tuple(tensor for tensor, _ in stored)
        self.prefetch()
        fetched, stored, self._stored, self._fetched = self._fetched, self._stored, None, None
        for (_, mark), (host, _) in zip(fetched, stored, strict=True):
            self._transfers.wait(mark)
            self._transfers.spare(host, mark)
        return tuple(tensor for tensor, _ in fetched)
