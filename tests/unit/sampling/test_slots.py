"""Shared memory between a sampler process and the trainer: nothing is overwritten while it is in use."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Iterator
from itertools import islice

import pytest
import torch

from dngd.sampling.minibatch import MiniBatch
from dngd.sampling.pipeline import SamplerPipeline
from dngd.sampling.slots import SlotPool, SlotWriter, spec_of
from tests.helpers.mutants import mutant
from tests.unit.sampling.graphs import digest, make_pipeline, take

ARRAYS = [torch.arange(7), torch.randn(3, 5), torch.empty(0, 4, dtype=torch.float64), torch.arange(2)]


def fill(writer: SlotWriter, slot: int, arrays: list[torch.Tensor]) -> list[tuple[str, list[int]]]:
    specs = [spec_of(array) for array in arrays]
    for place, array in zip(writer.lay_out(slot, specs), arrays, strict=True):
        place.copy_(array)
    return specs


def test_arrays_come_through_and_a_slot_grows() -> None:
    pool = SlotPool(1)
    writer = SlotWriter(pool.fds)
    for scale in (1, 1000, 3):
        arrays = [torch.cat([array] * scale) for array in ARRAYS]
        slot = pool.acquire()
        assert slot == 0
        got = pool.read(slot, fill(writer, slot, arrays))
        for one, other in zip(arrays, got, strict=True):
            assert (one.dtype, one.shape) == (other.dtype, other.shape)
            assert torch.equal(one, other)
        assert all(array.data_ptr() % 64 == 0 for array in got if array.numel())
        del got, other
    pool.close()


def test_a_slot_is_free_once_nothing_refers_to_it() -> None:
    pool = SlotPool(2)
    writer = SlotWriter(pool.fds)
    first, second = pool.acquire(), pool.acquire()
    assert {first, second} == {0, 1}
    assert pool.acquire() is None
    assert first is not None
    got = pool.read(first, fill(writer, first, ARRAYS))
    view = got[1][1:].t()
    del got
    gc.collect()
    assert pool.acquire() is None, "a view of one of its arrays keeps a slot"
    assert torch.equal(view, ARRAYS[1][1:].t())
    del view
    gc.collect()
    assert pool.acquire() == first


def test_arrays_outlive_the_pool() -> None:
    pool = SlotPool(1)
    slot = pool.acquire()
    assert slot is not None
    got = pool.read(slot, fill(SlotWriter(pool.fds), slot, ARRAYS))
    pool.close()
    assert torch.equal(got[0], ARRAYS[0])


def test_each_mapping_is_told_once() -> None:
    told: list[int] = []
    pool = SlotPool(1, on_mapped=lambda memory: told.append(memory.numel()))
    writer = SlotWriter(pool.fds)
    for _ in range(3):
        slot = pool.acquire()
        assert slot is not None
        pool.read(slot, fill(writer, slot, ARRAYS))
    assert len(told) == 1


# --- through a real sampler process


NUM_BATCHES = 16


@pytest.fixture(scope="module")
def held_digest() -> str:
    """All batches are held, so that all but the first few come over the socket."""
    with make_pipeline(1) as batches:
        return digest(take(batches, NUM_BATCHES))


def law_batches_in_slots_are_those_of_the_socket(held_digest: str) -> None:
    """Each batch is read only when four more have been drawn; the slots of those before are in use again by then."""
    window: deque[MiniBatch] = deque()

    def late(batches: SamplerPipeline) -> Iterator[MiniBatch]:
        for batch in islice(batches, NUM_BATCHES):
            window.append(batch)
            if len(window) > 4:
                yield window.popleft()
        while window:
            yield window.popleft()

    with make_pipeline(1) as batches:
        assert digest(late(batches)) == held_digest


def test_batches_in_slots_are_those_of_the_socket(held_digest: str) -> None:
    law_batches_in_slots_are_those_of_the_socket(held_digest)


def test_mutant_that_frees_slots_too_early_is_caught(held_digest: str) -> None:
    def at_once(pool: SlotPool, base: object, slot: int) -> None:
        pool._free.append(slot)

    with mutant(SlotPool, "_free_with", at_once), pytest.raises(AssertionError):
        law_batches_in_slots_are_those_of_the_socket(held_digest)


def test_a_child_takes_the_rows_that_this_process_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dngd.sampling.pipeline.inline_sampling_is_canonical", lambda: True)
    changes = dict(aggregation="gcn", train_nodes=torch.arange(40), fanouts=(-1, -1))
    inline = make_pipeline(0, **changes)
    with make_pipeline(1, **changes) as child:
        for one, other in zip(take(inline, 3), take(child, 3), strict=True):
            assert one.first_rows is not None
            assert other.first_rows is not None
            assert torch.equal(one.first_rows, other.first_rows)


def test_rows_come_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dngd.sampling.pipeline.inline_sampling_is_canonical", lambda: True)
    assert take(make_pipeline(0, aggregation=None), 1)[0].first_rows is None
