"""Pinned memory: what the driver is told, and when memory of kept activations is used again. The driver is a recorder here; its own part needs a card."""

from __future__ import annotations

import gc

import pytest
import torch

from reward_lab.lora_train.offload import pinned
from reward_lab.lora_train.offload import transfers as module
from reward_lab.lora_train.offload.keeper import Kept
from reward_lab.lora_train.offload.transfers import Transfers

PAGE = pinned._PAGE


class Driver:
    """The two calls of the CUDA runtime; refuses what would go over its limit."""

    def __init__(self, limit=1 << 40):
        self.registered, self.limit = {}, limit

    def cudaHostRegister(self, address, size, flags):
        assert address % PAGE == 0 and size % PAGE == 0 and flags == 0
        if sum(self.registered.values()) + size > self.limit:
            return 2
        self.registered[address] = size
        return 0

    def cudaHostUnregister(self, address):
        del self.registered[address]
        return 0


@pytest.fixture
def driver(monkeypatch):
    found = Driver()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: found)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(module, "_SMALL_BYTES", 0)
    return found


@pytest.mark.parametrize(("shape", "dtype"), [((3, 5), torch.bfloat16), ((PAGE,), torch.float32), ((0,), torch.float32), ((1, 7, 33), torch.uint8)])
def test_pages_are_registered_exactly_and_given_back_with_the_last_view(driver, shape, dtype):
    tensor = pinned.pinned_empty(shape, dtype)
    assert tensor.shape == shape and tensor.dtype == dtype and tensor.is_contiguous()
    needed = tensor.numel() * tensor.element_size()
    assert sum(driver.registered.values()) == max(PAGE, -(-needed // PAGE) * PAGE)
    if tensor.numel():
        tensor.fill_(3)
        part = tensor.view(-1)[1:]
        del tensor
        gc.collect()
        assert driver.registered and bool((part == 3).all())
        del part
    else:
        del tensor
    gc.collect()
    assert not driver.registered


def as_on_a_card(transfers):
    """A Transfers that believes it can pin; its copies stay synchronous."""
    transfers.can_pin = True
    return transfers


def test_refusal_falls_back_to_pageable_memory_once_and_aloud(driver, caplog):
    driver.limit = 2 * PAGE
    transfers = as_on_a_card(Transfers(torch.device("cpu")))
    first, second = transfers.pinned(torch.ones(10)), transfers.pinned(torch.ones(PAGE))
    assert torch.equal(first, torch.ones(10)) and torch.equal(second, torch.ones(PAGE))
    assert len(driver.registered) == 1 and not transfers.can_pin
    assert transfers.host_like(torch.ones(4)).shape == (4,)
    assert caplog.text.count("refuses pinned memory") == 1
    del first, second
    gc.collect()
    assert not driver.registered


def test_memory_of_kept_activations_is_used_again(driver):
    transfers = as_on_a_card(Transfers(torch.device("cpu")))
    for _ in range(3):
        values = (torch.randn(2, 8), torch.randn(2, 8), torch.randn(5))
        kept = [Kept(values, transfers, True) for _ in range(2)]
        for one in kept:
            assert all(torch.equal(found, value) for found, value in zip(one.take(), values, strict=True))
    assert len(driver.registered) == 6
    transfers.stop()
    del kept, one
    gc.collect()
    assert not driver.registered
