"""Memory that samplers share is page-locked while it is mapped, by a driver that these tests play."""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dngd.sampling.slots import SlotPool, SlotWriter, spec_of
from dngd.train import page_lock
from dngd.train.page_lock import CudaHostRegistration, PageLockedMemory


class Driver:
    """Refuses what is already registered, and anything once it is told to."""

    def __init__(self, error: int = 0) -> None:
        self.error = error
        self.registered: dict[int, int] = {}
        self.calls: list[tuple[str, int]] = []

    def register(self, address: int, size: int) -> int:
        self.calls.append(("register", address))
        overlaps = any(address < end and begin < address + size for begin, end in self.registered.items())
        if self.error or overlaps:
            return self.error or 712
        self.registered[address] = address + size
        return 0

    def unregister(self, address: int) -> int:
        self.calls.append(("unregister", address))
        return 0 if self.registered.pop(address, None) else 713

    def describe(self, error: int) -> str:
        return f"error {error}"


def is_mapped(address: int) -> bool:
    """Whether the address lies in a slot's memory."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "memfd:dngd-slot" in line:
            begin, end = (int(part, 16) for part in line.split()[0].split("-"))
            if begin <= address < end:
                return True
    return False


def fill_and_read(pool: SlotPool, writer: SlotWriter, scale: int) -> None:
    slot = pool.acquire()
    assert slot is not None
    array = torch.arange(scale)
    [place] = writer.lay_out(slot, [spec_of(array)])
    place.copy_(array)
    [read] = pool.read(slot, [spec_of(array)])
    assert torch.equal(read, array)


def test_each_mapping_is_registered_as_long_as_it_is_there() -> None:
    """A mapping that a larger one replaced stays too: its address must not hold other memory while it is registered."""
    driver = Driver()
    with PageLockedMemory(driver) as locked:
        pool = SlotPool(1, on_mapped=locked.add)
        writer = SlotWriter(pool.fds)
        for scale in (10, 5000, 5000, 100_000):
            fill_and_read(pool, writer, scale)
        addresses = list(driver.registered)
        assert len(addresses) == 3
        assert locked.num_bytes == sum(end - begin for begin, end in driver.registered.items())
        pool.close()
        del pool
        gc.collect()
        assert all(is_mapped(address) for address in addresses)
    assert driver.registered == {}
    assert [name for name, _ in driver.calls] == ["register"] * 3 + ["unregister"] * 3
    gc.collect()
    assert not any(is_mapped(address) for address in addresses)
    locked.close()
    assert len(driver.calls) == 6


def test_a_refusal_is_said_once_and_all_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    driver = Driver(error=2)
    with caplog.at_level(logging.WARNING), PageLockedMemory(driver) as locked:
        pool = SlotPool(2, on_mapped=locked.add)
        writer = SlotWriter(pool.fds)
        for scale in (10, 5000, 100_000):
            fill_and_read(pool, writer, scale)
        pool.close()
    [said] = [record.getMessage() for record in caplog.records if "page-lock" in record.getMessage()]
    assert said.startswith(
        "the GPU's driver did not page-lock 4096 bytes that samplers share with the trainer (error 2)"
    )
    assert driver.calls == [("register", driver.calls[0][1])], "neither asked again nor asked to undo it"


def test_cudas_error_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """What CUDA keeps of a refused call would be raised by the next kernel, whoever launches it."""
    pending: list[int] = []
    results = iter([0, 801, 0, 713])

    def call(*arguments: int) -> int:
        result = next(results)
        pending.extend([result] if result else [])
        return result

    def launch(*shape: int, device: torch.device) -> None:
        if pending:
            raise RuntimeError(f"CUDA error {pending.pop()}")

    monkeypatch.setattr(page_lock, "_runtime", lambda: SimpleNamespace(cudaHostRegister=call, cudaHostUnregister=call))
    monkeypatch.setattr(page_lock.torch, "zeros", launch)
    driver = CudaHostRegistration(torch.device("cuda", 0))
    assert [driver.register(4096, 1), driver.register(4096, 1)] == [0, 801]
    assert pending == []
    assert [driver.unregister(4096), driver.unregister(4096)] == [0, 713]
    assert pending == []
    assert "801" in driver.describe(801)
