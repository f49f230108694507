"""A worker's sign of life: a thread that tells where the training thread is, every second or so.

A process that is stopped or gone falls silent; one that hangs goes on telling, of the same phase. What is made of
either is the watcher's business (dngd.launch.channel).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

import psutil

from dngd.train.metrics import StepClock

PERIOD_SECONDS = 1.0
RANKS_PER_PERIOD = 200
"""More ranks than this beat more slowly: one process hears them all."""


@dataclass(frozen=True)
class Beat:
    """Where a worker is. started: of the process, seconds since 1970; with it a pid names one process for good.

    phase_seconds: how long it has been in the phase. step: the number of steps that are done.
    """

    attempt: int
    rank: int
    pid: int
    started: float
    node_id: str
    node_name: str
    phase: str
    step: int
    phase_seconds: float


class Heartbeat:
    """Sends a Beat at once, every second or so, and when `now` is called, while the context is open.

    send must not raise for a listener that is gone, nor block for long.
    """

    def __init__(
        self,
        clock: StepClock,
        send: Callable[[Beat], None],
        *,
        attempt: int,
        rank: int,
        world_size: int,
        node_id: str,
        node_name: str,
    ) -> None:
        self._clock = clock
        self._send = send
        self._attempt = attempt
        self._rank = rank
        self._node = (node_id, node_name)
        self._period = PERIOD_SECONDS * max(1.0, world_size / RANKS_PER_PERIOD)
        self._started = psutil.Process().create_time()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dngd-heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(timeout=10)

    def now(self) -> Beat:
        """Return what a beat of this moment says."""
        activity = self._clock.activity
        return Beat(
            self._attempt,
            self._rank,
            os.getpid(),
            self._started,
            *self._node,
            activity.phase,
            activity.step,
            time.monotonic() - activity.since,
        )

    def _run(self) -> None:
        self._send(self.now())
        while not self._stop.wait(self._period):
            self._send(self.now())
