"""A world of ranks as threads of one process: fast enough for property tests of collectives' bookkeeping.

Real processes are what tests/multiprocess runs; here a communicator sums Python-side, in rank order.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

TIMEOUT_SECONDS = 30


class _Done:
    def wait(self) -> None:
        return None


class _Meeting:
    """What the ranks of a world share."""

    def __init__(self, world_size: int) -> None:
        self.barrier = threading.Barrier(world_size, timeout=TIMEOUT_SECONDS)
        self.slots: list[Any] = [None] * world_size
        self.labels: list[str] = [""] * world_size


class ThreadCommunicator:
    """See dngd.comm.Communicator. Ranks that call different collectives fail."""

    def __init__(self, rank: int, meeting: _Meeting) -> None:
        self.rank = rank
        self.world_size = len(meeting.slots)
        self.bytes_sent: Counter[str] = Counter()
        self._meeting = meeting

    def _exchange(self, label: str, value: Any) -> list[Any]:
        self._meeting.slots[self.rank], self._meeting.labels[self.rank] = value, label
        self._meeting.barrier.wait()
        values, labels = list(self._meeting.slots), set(self._meeting.labels)
        assert len(labels) == 1, f"ranks called different collectives: {labels}"
        self._meeting.barrier.wait()
        return values

    def all_reduce(self, flat: Tensor, kind: str, group: str = "main") -> _Done:
        values = self._exchange(f"all-reduce {kind} {flat.numel()}", flat.clone())
        total = values[0].clone()
        for value in values[1:]:
            total += value
        flat.copy_(total)
        self.bytes_sent[kind] += flat.numel() * flat.element_size()
        return _Done()

    def broadcast(self, flat: Tensor, source: int, kind: str, group: str = "main") -> _Done:
        values = self._exchange(f"broadcast {kind} {source} {flat.numel()}", flat.clone())
        flat.copy_(values[source])
        if self.rank == source:
            self.bytes_sent[kind] += flat.numel() * flat.element_size()
        return _Done()

    def exchange(self, flat: Tensor, kind: str, group: str = "main") -> tuple[Tensor, _Done]:
        values = self._exchange(f"exchange {kind} {flat.numel()}", flat.clone())
        received = torch.cat([value.chunk(self.world_size)[self.rank] for value in values])
        self.bytes_sent[kind] += flat.numel() * flat.element_size()
        return received, _Done()

    def all_gather(self, chunk: Tensor, kind: str, group: str = "main") -> tuple[Tensor, _Done]:
        return torch.cat(self._exchange(f"all-gather {kind} {chunk.numel()}", chunk.clone())), _Done()

    def gather_bytes(self, payload: bytes) -> list[bytes] | None:
        values = self._exchange("gather", payload)
        return values if self.rank == 0 else None

    def broadcast_bytes(self, payload: bytes | None) -> bytes:
        received: bytes = self._exchange("broadcast bytes", payload)[0]
        return received

    def barrier(self) -> None:
        self._exchange("barrier", None)


def run_threads(world_size: int, work: Callable[[ThreadCommunicator], Any]) -> list[Any]:
    """Return what `work(communicator)` returns on each rank; the first exception of any rank is raised."""
    meeting = _Meeting(world_size)
    results: list[Any] = [None] * world_size
    errors: list[BaseException] = []

    def rank(index: int) -> None:
        try:
            results[index] = work(ThreadCommunicator(index, meeting))
        except BaseException as error:
            errors.append(error)
            meeting.barrier.abort()

    threads = [threading.Thread(target=rank, args=(i,), daemon=True) for i in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_SECONDS)
        assert not thread.is_alive(), "a rank is stuck"
    real = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)]
    if errors:
        raise (real or errors)[0]
    return results
