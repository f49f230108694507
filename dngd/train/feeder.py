"""Batches on a device, one ahead: the next one is copied while the device computes with the current one.

Copies go to a stream of their own. A copy reads the slot that a sampler laid the batch out in, without the host waiting
for it, so that the slot is kept until the copy has ended; the stream that computes waits for the copy on the device.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor

from dngd.sampling import BatchCoordinates, MiniBatch
from dngd.train.batch import BatchBuilder, BatchPipeline, DeviceBatch
from dngd.train.metrics import StepClock


class CopyEvent(Protocol):
    """A point in a stream of copies; torch.cuda.Event is one."""

    def query(self) -> bool:
        """Whether all copies before it have ended."""

    def synchronize(self) -> None:
        """Wait until they have."""


class CopyStream(Protocol):
    """Where copies run beside the computation."""

    def enqueuing(self) -> contextlib.AbstractContextManager[None]:
        """Send the work that is started in this context to the stream of copies."""

    def move(self, tensor: Tensor) -> Tensor:
        """Start the copy of a host tensor, which must not change or go before it has ended; return the copy to be."""

    def mark(self) -> CopyEvent:
        """Return the point that the stream ends at now."""

    def hand_over(self, event: CopyEvent, tensors: Iterable[Tensor]) -> None:
        """Let the computing stream wait for an event before it goes on, and use these tensors from then on."""


class CudaCopyStream:
    """A CUDA stream of a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # What was put on the device so far, cached rows for instance, is there before the stream uses it.
        self._stream.wait_stream(torch.cuda.current_stream(device))

    @contextlib.contextmanager
    def enqueuing(self) -> Iterator[None]:
        with torch.cuda.stream(self._stream):
            yield

    def move(self, tensor: Tensor) -> Tensor:
        # From memory that is not page-locked the host would wait for the copy. torch frees its own only after it.
        source = tensor if tensor.numel() == 0 or tensor.is_pinned() else tensor.pin_memory()
        return source.to(self._device, non_blocking=True)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event

    def hand_over(self, event: CopyEvent, tensors: Iterable[Tensor]) -> None:
        assert isinstance(event, torch.cuda.Event)
        computing = torch.cuda.current_stream(self._device)
        computing.wait_event(event)
        for tensor in tensors:
            # Made on the stream of copies: when it goes, its memory is free only once the computation is done with it.
            tensor.record_stream(computing)


@dataclass(frozen=True)
class _Ahead:
    """A batch whose copy has been started."""

    coordinates: BatchCoordinates
    batch: DeviceBatch
    copied: CopyEvent


class DeviceFeeder:
    """A pipeline's batches on a device; a BatchSource. One batch is copied ahead, if it has been drawn by then.

    builder: for the device. clock: gets the time waited for samplers, and that spent on operators and on starting
    copies. An error that the pipeline raises in place of a batch ahead comes when that batch is asked for.
    """

    def __init__(self, pipeline: BatchPipeline, builder: BatchBuilder, clock: StepClock, copies: CopyStream) -> None:
        self._pipeline = pipeline
        self._builder = builder
        self._clock = clock
        self._copies = copies
        self._ahead: _Ahead | None = None
        self._failure: Exception | None = None
        self._in_flight: deque[tuple[CopyEvent, MiniBatch]] = deque()

    def batch(self, epoch: int, step: int, shard: int) -> DeviceBatch:
        """Return the next batch, which must be the one asked for; the current stream waits for its copy."""
        self._release()
        if self._failure is not None:
            raise self._failure
        if self._ahead is None:
            with self._clock.phase("sample_wait"):
                mini_batch = next(self._pipeline)
            self._ahead = self._start(mini_batch)
        ahead, self._ahead = self._ahead, None
        asked = BatchCoordinates(epoch, step, shard)
        assert ahead.coordinates == asked, f"{ahead.coordinates} is not {asked}"
        self._copies.hand_over(ahead.copied, ahead.batch.device_tensors())
        return ahead.batch

    def look_ahead(self) -> None:
        """Start copying the batch after the one handed out last, if it has been drawn; never waits for a sampler."""
        self._release()
        if self._ahead is not None or self._failure is not None or not self._pipeline.has_next:
            return
        try:
            self._ahead = self._start(next(self._pipeline))
        except Exception as error:
            self._failure = error

    def close(self) -> None:
        """Wait for copies that have been started, and let go of all batches; idempotent."""
        self._ahead = None
        while self._in_flight:
            event, _ = self._in_flight[0]
            event.synchronize()
            self._in_flight.popleft()

    def __enter__(self) -> DeviceFeeder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self, mini_batch: MiniBatch) -> _Ahead:
        with self._clock.phase("copy"), self._copies.enqueuing():
            try:
                batch = self._builder.batch(mini_batch, self._copies.move)
            finally:
                # Also where some copies were started before something failed.
                copied = self._copies.mark()
                self._in_flight.append((copied, mini_batch))
        return _Ahead(mini_batch.coordinates, batch, copied)

    def _release(self) -> None:
        """Let go of the batches whose copies have ended."""
        while self._in_flight and self._in_flight[0][0].query():
            self._in_flight.popleft()
