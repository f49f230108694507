"""Batches ahead on a device: in order, whole, and no slot used again before its copy has ended.

The CPU plays the device. The played stream copies when it is told to, from bare addresses: like the hardware, it keeps
nothing alive.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Callable, Iterable, Iterator

import pytest
import torch
from torch import Tensor

from dngd.errors import TrainingError
from dngd.graph import GraphStore
from dngd.sampling import MiniBatch, SamplerPipeline
from dngd.train.batch import DeviceBatch, PropagationBuilder, SampledBatches
from dngd.train.feeder import DeviceFeeder
from dngd.train.metrics import StepClock
from tests.helpers.mutants import assert_caught

CPU = torch.device("cpu")


class PlayedEvent:
    """All copies that were enqueued before it."""

    def __init__(self, copies: list[Callable[[], None]]) -> None:
        self._copies = copies
        self.done = False

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        for copy in self._copies:
            copy()
        self.done = True


class PlayedStream:
    """A stream whose copies from shared memory run when their event is waited for; others at once."""

    def __init__(self, shared: list[tuple[int, int]]) -> None:
        self._shared = shared
        self._enqueuing = False
        self._copies: list[Callable[[], None]] = []
        self.events: list[PlayedEvent] = []
        self.handed_over: list[tuple[PlayedEvent, list[Tensor]]] = []
        self.num_deferred = 0

    @contextlib.contextmanager
    def enqueuing(self) -> Iterator[None]:
        self._enqueuing = True
        yield
        self._enqueuing = False

    def move(self, tensor: Tensor) -> Tensor:
        assert self._enqueuing, "a copy in the stream that computes"
        copied = torch.full_like(tensor, -7)
        address, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
        if not any(begin <= address < end for begin, end in self._shared):
            return copied.copy_(tensor)
        self.num_deferred += 1
        self._copies.append(lambda: ctypes.memmove(copied.data_ptr(), address, size) and None)
        return copied

    def mark(self) -> PlayedEvent:
        self.events.append(PlayedEvent(self._copies))
        self._copies = []
        return self.events[-1]

    def hand_over(self, event: object, tensors: Iterable[Tensor]) -> None:
        assert isinstance(event, PlayedEvent)
        self.handed_over.append((event, list(tensors)))


def sampler(store: GraphStore, shared: list[tuple[int, int]] | None = None) -> SamplerPipeline:
    def on_mapped(memory: Tensor) -> None:
        assert shared is not None
        shared.append((memory.data_ptr(), memory.data_ptr() + memory.numel()))

    return SamplerPipeline(
        store,
        store.split("masks").train,
        (4, 3),
        run_seed=5,
        num_shards=2,
        batch_size=16,
        shards=[0, 1],
        num_samplers=1,
        prefetch=1,
        aggregation="gcn",
        on_mapped=None if shared is None else on_mapped,
    )


def coordinates(count: int) -> list[tuple[int, int, int]]:
    return [(0, step, shard) for step in range(count // 2) for shard in (0, 1)]


def contents(batch: DeviceBatch) -> list[Tensor]:
    return [batch.seeds.clone(), *(tensor.clone() for tensor in batch.device_tensors())]


def until_drawn(pipeline: SamplerPipeline) -> None:
    deadline = time.monotonic() + 60
    while not pipeline.has_next:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def law_each_batch_arrives_whole(store: GraphStore, expected: list[list[Tensor]]) -> None:
    """Copies run as late as can be: the next batch has been taken, and a slot filled again, before they do."""
    shared: list[tuple[int, int]] = []
    with sampler(store, shared) as pipeline:
        stream = PlayedStream(shared)
        builder = PropagationBuilder(store, "gcn", CPU)
        with DeviceFeeder(pipeline, builder, StepClock(), stream) as feeder:
            for number, where in enumerate(coordinates(len(expected))):
                batch = feeder.batch(*where)
                event, tensors = stream.handed_over[number]
                assert event is stream.events[number], "batches are handed over in the order of their copies"
                assert {id(t) for t in tensors} == {id(t) for t in batch.device_tensors()}
                until_drawn(pipeline)
                feeder.look_ahead()
                assert len(stream.events) == number + 2, "the next batch is on its way"
                until_drawn(pipeline)
                event.synchronize()
                for mine, theirs in zip(contents(batch), expected[number], strict=True):
                    assert torch.equal(mine, theirs), f"batch {number} was overwritten before it was copied"
            assert stream.num_deferred > 0
            assert feeder._in_flight
        assert all(event.done for event in stream.events), "closing waits for every copy"
        assert not feeder._in_flight
        feeder.close()


class Script:
    """A pipeline that hands out batches, or raises, as it was written. taken: how many were asked for."""

    def __init__(self, entries: list[MiniBatch | Exception], drawn: bool = True) -> None:
        self._entries = entries
        self.drawn = drawn
        self.taken = 0

    @property
    def has_next(self) -> bool:
        return self.drawn

    def __next__(self) -> MiniBatch:
        entry = self._entries[self.taken]
        self.taken += 1
        if isinstance(entry, Exception):
            raise entry
        return entry


@pytest.fixture(scope="module")
def batches(store: GraphStore) -> list[MiniBatch]:
    with sampler(store) as pipeline:
        return [next(pipeline) for _ in range(8)]


def test_each_batch_arrives_whole_and_a_mutant_that_lets_go_of_slots_early_is_caught(
    store: GraphStore, batches: list[MiniBatch]
) -> None:
    # What a loop on the CPU is given, which nothing is ahead of.
    source = SampledBatches(Script(list(batches)), PropagationBuilder(store, "gcn", CPU), StepClock())
    expected = []
    for where in coordinates(len(batches)):
        expected.append(contents(source.batch(*where)))
        source.look_ahead()

    def at_once(feeder: DeviceFeeder) -> None:
        feeder._in_flight.clear()

    assert_caught(lambda: law_each_batch_arrives_whole(store, expected), DeviceFeeder, "_release", at_once)


def fed(store: GraphStore, script: Script) -> tuple[DeviceFeeder, PlayedStream]:
    stream = PlayedStream([])
    return DeviceFeeder(script, PropagationBuilder(store, "gcn", CPU), StepClock(), stream), stream


def test_an_error_comes_in_place_of_its_batch(store: GraphStore, batches: list[MiniBatch]) -> None:
    failure = TrainingError("sampler process 0 was killed")
    script = Script([*batches[:2], failure])
    feeder, _ = fed(store, script)
    feeder.batch(0, 0, 0)
    feeder.look_ahead()
    feeder.batch(0, 0, 1)
    feeder.look_ahead()
    assert script.taken == 3, "the error is known already"
    feeder.look_ahead()
    for _ in range(2):
        with pytest.raises(TrainingError) as caught:
            feeder.batch(0, 1, 0)
        assert caught.value is failure
    assert script.taken == 3, "a pipeline that failed is not asked again"
    feeder.close()


def test_looking_ahead_waits_for_no_sampler_and_takes_one_batch(store: GraphStore, batches: list[MiniBatch]) -> None:
    script = Script(list(batches), drawn=False)
    feeder, stream = fed(store, script)
    feeder.batch(0, 0, 0)
    feeder.look_ahead()
    assert script.taken == 1
    script.drawn = True
    feeder.look_ahead()
    feeder.look_ahead()
    assert script.taken == 2
    assert len(stream.events) == 2
    feeder.batch(0, 0, 1)
    assert script.taken == 2
    feeder.batch(0, 1, 0)
    assert script.taken == 3


def test_a_batch_that_was_not_asked_for_is_refused(store: GraphStore, batches: list[MiniBatch]) -> None:
    feeder, _ = fed(store, Script(list(batches)))
    with pytest.raises(AssertionError, match="epoch 0, step 0, shard 0 is not epoch 0, step 0, shard 1"):
        feeder.batch(0, 0, 1)


def test_copies_that_were_started_before_a_failure_are_waited_for(
    store: GraphStore, batches: list[MiniBatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory on the device in the midst of a batch: its slot is kept until the started copies have ended."""
    feeder, stream = fed(store, Script(list(batches)))
    feeder.batch(0, 0, 0)
    move, moved = stream.move, 0

    def full(tensor: Tensor) -> Tensor:
        nonlocal moved
        moved += 1
        if moved == 3:
            raise RuntimeError("CUDA out of memory")
        return move(tensor)

    monkeypatch.setattr(stream, "move", full)
    feeder.look_ahead()
    assert [batch for _, batch in feeder._in_flight] == batches[:2]
    with pytest.raises(RuntimeError, match="out of memory"):
        feeder.batch(0, 0, 1)
    feeder.close()
    assert all(event.done for event in stream.events)
