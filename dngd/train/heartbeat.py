"""A worker's sign of life: a thread that tells where the training thread is, every second or so; and a flight record.

A process that is stopped or gone falls silent; one that hangs goes on telling, of the same phase. What is made of
either is the watcher's business (dngd.launch). The flight record is a file of a few bytes in shared memory's way: the
phase is in it from the moment that it begins, and stays there when the process is killed.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil

from dngd.train.metrics import Activity, StepClock

RECORD_BYTES = 128
LEFT_OVER_SECONDS = 3600.0
PERIOD_SECONDS = 1.0
RANKS_PER_PERIOD = 200
"""More ranks than this beat more slowly: one process hears them all."""


@dataclass(frozen=True)
class Beat:
    """Where a worker is. started: of the process, seconds since 1970; with it a pid names one process for good.

    phase_seconds: how long it has been in the phase. step: the number of steps that are done. record: path of its
    flight record on its node.
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
    record: str


class FlightRecord:
    """A process's latest phase and step in a file of this machine, which outlives the process, killed or not."""

    def __init__(self) -> None:
        _remove_left_overs()
        descriptor, self.path = tempfile.mkstemp(prefix=f"dngd-{os.getpid()}-", suffix=".phase")
        try:
            os.ftruncate(descriptor, RECORD_BYTES)
            self._map = mmap.mmap(descriptor, RECORD_BYTES)
        finally:
            os.close(descriptor)

    def write(self, activity: Activity) -> None:
        """Keep what the process is at; a copy of a few bytes in memory."""
        self._map[:] = f"{activity.step} {activity.phase}".encode()[:RECORD_BYTES].ljust(RECORD_BYTES)

    def remove(self) -> None:
        """Remove the file: the process has ended well, and nobody will ask."""
        with contextlib.suppress(OSError):
            os.unlink(self.path)

    @staticmethod
    def take(path: str) -> tuple[str, int] | None:
        """Return the phase and step in a file, and remove it; None if there is none."""
        try:
            step, phase = Path(path).read_bytes().decode().strip("\0 ").split(maxsplit=1)
            os.unlink(path)
        except (OSError, ValueError):
            return None
        return phase, int(step)


def _remove_left_overs() -> None:
    """Remove the records of processes that are gone, and that nobody asked for within an hour."""
    for path in Path(tempfile.gettempdir()).glob("dngd-*-*.phase"):
        number = path.name.split("-")[1]
        with contextlib.suppress(OSError):
            old = time.time() - path.stat().st_mtime > LEFT_OVER_SECONDS
            if old and number.isdigit() and not psutil.pid_exists(int(number)):
                path.unlink()


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
        self._record = FlightRecord()
        clock.on_activity = self._record.write
        self._record.write(clock.activity)
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
        self._clock.on_activity = None
        self._record.remove()

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
            self._record.path,
        )

    def _run(self) -> None:
        self._send(self.now())
        while not self._stop.wait(self._period):
            self._send(self.now())
