"""The driver's side of a run on Ray: relays its progress, kills workers that stall, ends a wait without end."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dngd.config import TrainConfig
from dngd.train.heartbeat import FlightRecord
from dngd.train.interrupt import TOLD
from dngd.train.progress import Reporter, deliver

logger = logging.getLogger(__name__)

RELAY_SECONDS = 0.2
LOOK_SECONDS = 1.0
ANSWER_SECONDS = 10.0
NODE_SECONDS = 60.0
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
        self._failed = False
        self._stop_wanted = False
        self.gave_up = False
        """Whether this watch itself sent the SIGINT that ends the run."""
        self._is_main_thread = threading.current_thread() is threading.main_thread()

    def ask_to_stop(self) -> None:
        """Let the run end after a step, as soon as this can be told; may be called in a signal's handler."""
        self._stop_wanted = True

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
        told = False
        while not self._stop.wait(RELAY_SECONDS):
            self._quietly(self._relay)
            if self._stop_wanted and not told:
                told = True
                self._quietly(self._tell_stop)
            if time.monotonic() - looked >= LOOK_SECONDS:
                looked = time.monotonic()
                self._quietly(self._kill_stalled)
                self._quietly(self._locate_lost)
                self._quietly(self._bound_waiting)

    def _quietly(self, work: Callable[[], None]) -> None:
        try:
            work()
        except ray.exceptions.RayError:
            return  # progress is lost, not the run; the next look comes soon
        except Exception:
            # A user's reporter, a closed terminal: neither is to end the run's supervision.
            if not self._failed:
                self._failed = True
                logger.warning("what looks after the run failed (told once)", exc_info=True)

    def _relay(self) -> None:
        for item in ray.get(self._channel.drain.remote(), timeout=ANSWER_SECONDS):
            deliver(self._reporter, item)

    def _tell_stop(self) -> None:
        self._channel.ask_to_stop.remote()
        self._reporter.message(TOLD)

    def _kill_stalled(self) -> None:
        limit = self._config.ray.stall_timeout_seconds
        for stall in ray.get(self._channel.stalls.remote(limit), timeout=ANSWER_SECONDS):
            key = (stall["attempt"], stall["rank"])
            if key not in self._killing:
                self._killing.add(key)
                self._beside(partial(self._kill_or_try_again, stall, key))

    def _beside(self, work: Callable[[], None]) -> None:
        """Do something in a thread: a node that is gone does not answer, and progress is to go on."""
        threading.Thread(target=self._quietly, args=(work,), name="dngd-watch-node", daemon=True).start()

    def _kill_or_try_again(self, stall: dict[str, Any], key: tuple[int, int]) -> None:
        try:
            self._kill(stall)
        except BaseException:
            self._killing.discard(key)  # its node did not answer: the next look tries again
            raise

    def _kill(self, stall: dict[str, Any]) -> None:
        was_there, place = on_node(stall["node_id"], _kill, stall["pid"], stall["started"], stall["record"])
        diagnosis = ray.get(self._channel.killed.remote(stall, place), timeout=ANSWER_SECONDS)
        if was_there:
            self._reporter.message(f"{diagnosis}: killed, to be started again")

    def _locate_lost(self) -> None:
        for beat in ray.get(self._channel.unlocated.remote(), timeout=ANSWER_SECONDS):
            self._beside(partial(self._locate, beat))

    def _locate(self, beat: dict[str, Any]) -> None:
        # On the driver's own node there is no need of a task, whose process takes seconds to start.
        place = FlightRecord.take(beat["record"]) or on_node(beat["node_id"], FlightRecord.take, beat["record"])
        if place is not None:
            ray.get(self._channel.located.remote(beat, *place), timeout=ANSWER_SECONDS)

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
        elif self._is_main_thread:
            self.gave_up = True
            os.kill(os.getpid(), signal.SIGINT)  # on which Ray aborts the controller
        else:
            # In a thread of somebody's program Ray does not see the signal, and the program would.
            self._reporter.message(text)
        self._stop.wait(limit)


def on_node(node_id: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function returns in a task on a node. Raises a RayError if the node does not answer in a minute."""
    strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
    task = ray.remote(function).options(num_cpus=0, max_retries=0, scheduling_strategy=strategy)
    answer = task.remote(*arguments)
    try:
        return ray.get(answer, timeout=NODE_SECONDS)
    except ray.exceptions.GetTimeoutError:
        # Not to be done later, when it may no longer be wanted.
        ray.cancel(answer, force=True)
        raise


def _kill(pid: int, started: float, record: str) -> tuple[bool, tuple[str, int] | None]:
    """Kill a process, which may be stopped; return whether it was there, and the place in its flight record."""
    place = FlightRecord.take(record)
    try:
        process = psutil.Process(pid)
        if abs(process.create_time() - started) > 1.0:
            return False, place  # another process has got the number
        process.kill()
    except psutil.NoSuchProcess:
        return False, place
    return True, place


def _wanted(config: TrainConfig) -> str:
    least, most = config.min_workers, config.num_workers
    return f"{most} workers" if least == most else f"{least} to {most} workers"
