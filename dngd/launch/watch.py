"""The driver's side of a run on Ray: relays its progress, kills workers that stall, ends a wait without end."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dngd.config import TrainConfig
from dngd.train.progress import Reporter, deliver

RELAY_SECONDS = 0.2
LOOK_SECONDS = 1.0
ANSWER_SECONDS = 10.0
KILL_SECONDS = 60.0
NOTICE_SECONDS = 20.0
"""A recovery that takes longer than this is told of while it goes on."""


class Watch:
    """A thread that looks after a run while the context is open; what is left to relay is relayed when it closes.

    channel: the actor of RunChannel. A worker that is silent, or keeps the others waiting, for
    ray.stall_timeout_seconds is killed, whereupon Ray starts the workers again. Where none runs within
    ray.recovery_timeout_seconds of the start or of a failure, the run is given up.
    """

    def __init__(self, channel: Any, config: TrainConfig, reporter: Reporter) -> None:
        self._channel = channel
        self._config = config
        self._reporter = reporter
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dngd-watch", daemon=True)
        self._killing: set[tuple[int, int]] = set()
        self._noticed = False

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(timeout=30)
        self._quietly(self._relay)

    def _run(self) -> None:
        looked = time.monotonic()
        while not self._stop.wait(RELAY_SECONDS):
            self._quietly(self._relay)
            if time.monotonic() - looked >= LOOK_SECONDS:
                looked = time.monotonic()
                self._quietly(self._kill_stalled)
                self._quietly(self._bound_waiting)

    def _quietly(self, work: Callable[[], None]) -> None:
        try:
            work()
        except ray.exceptions.RayError:
            return  # progress is lost, not the run; the next look comes soon

    def _relay(self) -> None:
        for item in ray.get(self._channel.drain.remote(), timeout=ANSWER_SECONDS):
            deliver(self._reporter, item)

    def _kill_stalled(self) -> None:
        limit = self._config.ray.stall_timeout_seconds
        for stall in ray.get(self._channel.stalls.remote(limit), timeout=ANSWER_SECONDS):
            key = (stall["attempt"], stall["rank"])
            if key not in self._killing:
                self._killing.add(key)
                # In a thread: a node that is gone does not answer, and progress is to go on.
                threading.Thread(target=self._quietly, args=(lambda s=stall: self._kill(s),), daemon=True).start()

    def _kill(self, stall: dict[str, Any]) -> None:
        was_there = False
        try:
            was_there = kill_on_node(stall["node_id"], stall["pid"], stall["started"])
        finally:
            told = self._channel.killed.remote(stall["rank"], stall["attempt"], stall["diagnosis"], was_there)
            ray.get(told, timeout=ANSWER_SECONDS)
        if was_there:
            self._reporter.message(f"{stall['diagnosis']}: killed, to be started again")

    def _bound_waiting(self) -> None:
        seconds, controller = ray.get(self._channel.waiting.remote(), timeout=ANSWER_SECONDS)
        limit = self._config.ray.recovery_timeout_seconds
        if seconds <= NOTICE_SECONDS:
            self._noticed = False
        elif not self._noticed:
            self._noticed = True
            self._reporter.message(f"waiting up to {limit:.0f} s for the cluster to run {_wanted(self._config)}")
        if seconds <= limit:
            return
        text = (
            f"the cluster did not run {_wanted(self._config)} within {limit:.0f} s; go on with --resume when it has "
            "nodes, allow fewer with --min-workers, or wait longer with --set ray.recovery_timeout_seconds=N"
        )
        ray.get(self._channel.give_up.remote(text), timeout=ANSWER_SECONDS)
        if controller is not None:
            ray.kill(controller)
        else:
            os.kill(os.getpid(), signal.SIGINT)  # on which Ray aborts the controller
        self._stop.wait(limit)


def kill_on_node(node_id: str, pid: int, started: float) -> bool:
    """Kill a process of a node, which may be stopped, by a task there; return whether it was there.

    Raises a RayError if the node does not answer within a minute.
    """
    strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
    task = ray.remote(_kill).options(num_cpus=0, max_retries=0, scheduling_strategy=strategy)
    found: bool = ray.get(task.remote(pid, started), timeout=KILL_SECONDS)
    return found


def _kill(pid: int, started: float) -> bool:
    try:
        process = psutil.Process(pid)
        if abs(process.create_time() - started) > 1.0:
            return False  # another process has got the number
        process.kill()
    except psutil.NoSuchProcess:
        return False
    return True


def _wanted(config: TrainConfig) -> str:
    least, most = config.min_workers, config.num_workers
    return f"{most} workers" if least == most else f"{least} to {most} workers"
