"""The driver's side of a run on Ray: relays its progress, kills workers that stall, ends a wait without end."""

from __future__ import annotations

import contextlib
import logging
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
from dngd.train.progress import Reporter, deliver

logger = logging.getLogger(__name__)

RELAY_SECONDS = 0.2
LOOK_SECONDS = 1.0
ANSWER_SECONDS = 10.0
NODE_SECONDS = 60.0
NOTICE_SECONDS = 20.0
"""A recovery that takes longer than this is told of while it goes on."""

CONTROLLER_NOTICE_SECONDS = 60.0
"""Ray's controller answers nobody while it starts or stops workers; a silence longer than this is told of."""

MOST_LOOK_SECONDS = 60.0
"""Of a longer time between two looks this much counts as silence of the others: the driver itself was stopped."""


class Watch:
    """A thread that looks after a run while the context is open; what is left to relay is relayed when it closes.

    channel: the actor of RunChannel. A worker that is silent, or keeps the others waiting, for
    ray.stall_timeout_seconds is killed, whereupon Ray starts the workers again. Where none runs within
    ray.recovery_timeout_seconds of the start or of a failure, or where the channel or Ray's controller does not answer
    for as long, the run is given up: given_up says why, and Ray's controller is killed.
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
        self._stop_wanted: str | None = None
        self._looked = time.monotonic()
        self._question: Any = None
        self._waited: float | None = None  # what the channel answered last; None: nothing yet
        self._before_channel = 0.0  # of the present wait, what had passed when the channel's clock began
        self._silent = 0.0
        self._controller: Any = None
        self._controller_question: Any = None
        self._controller_silent = 0.0
        self._controller_noticed = False
        self.given_up: str | None = None
        """Why this watch gave the run up, in a sentence; None if it did not."""

    def ask_to_stop(self, told: str) -> None:
        """Let the run end after a step, as soon as this can be told; returns at once. told: a sentence on it."""
        self._stop_wanted = told

    def end_controller(self) -> None:
        """Let Ray's controller be killed, and with it its workers. Returns at once, whether or not Ray answers."""
        self._beside(self._kill_controller)

    def __enter__(self) -> Watch:
        self._looked = time.monotonic()
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
            if self._waited is None:
                # The channel does not run yet: it has nothing to relay, and questions would only hold this thread up.
                self._quietly(self._bound_waiting)
                continue
            self._quietly(self._relay)
            if self._stop_wanted is not None and not told:
                told = True
                self._quietly(partial(self._tell_stop, self._stop_wanted))
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

    def _tell_stop(self, told: str) -> None:
        self._channel.ask_to_stop.remote()
        self._reporter.message(told)

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
        if self.given_up is not None:
            return
        seconds = self._seconds_waiting()
        limit = self._config.ray.recovery_timeout_seconds
        longer = "wait longer with --set ray.recovery_timeout_seconds=N"
        if seconds <= NOTICE_SECONDS:
            self._noticed = False
        elif not self._noticed:
            self._noticed = True
            self._reporter.message(f"waiting up to {limit:.0f} s for the cluster to run {_wanted(self._config)}")
        if self._controller_silent <= CONTROLLER_NOTICE_SECONDS:
            self._controller_noticed = False
        elif not self._controller_noticed and not self._noticed:
            self._controller_noticed = True
            self._reporter.message(f"waiting up to {limit:.0f} s for Ray's controller to answer")
        if seconds > limit:
            self._give_up(
                f"the cluster did not run {_wanted(self._config)} within {limit:.0f} s; go on with --resume when it "
                f"has nodes, allow fewer with --min-workers, or {longer}"
            )
        elif self._silent > limit:
            self._give_up(
                f"the actor on this node that hears of the workers (RunChannel) did not answer for {limit:.0f} s; go "
                f"on with --resume, or {longer}"
            )
        elif self._controller_silent > limit:
            self._give_up(
                f"Ray's controller (TrainController, on this node) did not answer for {limit:.0f} s; go on with "
                f"--resume, or {longer}"
            )

    def _seconds_waiting(self) -> float:
        """Return for how many seconds workers have been expected to run (0.0: they do), and note who is silent.

        While the channel does not answer the driver's own clock goes on; that of the start begins with this watch.
        """
        now = time.monotonic()
        passed = min(now - self._looked, MOST_LOOK_SECONDS)
        self._looked = now
        self._silent += passed
        self._controller_silent += passed
        if self._question is None:
            self._question = self._channel.waiting.remote()
        if ray.wait([self._question], timeout=LOOK_SECONDS)[0]:
            question, self._question = self._question, None
            # A channel that is gone answers with an error: it stays silent.
            with contextlib.suppress(ray.exceptions.RayError):
                seconds, self._controller = ray.get(question, timeout=ANSWER_SECONDS)
                if self._waited is None:
                    self._before_channel = max(0.0, self._silent - seconds)
                elif seconds < self._waited:  # another wait than the last one
                    self._before_channel = 0.0
                self._waited, self._silent = seconds, 0.0
        self._ask_controller()
        return 0.0 if self._waited == 0.0 else (self._waited or 0.0) + self._before_channel + self._silent

    def _ask_controller(self) -> None:
        if self._controller is None:
            self._controller_silent = 0.0
            return
        if self._controller_question is None:
            self._controller_question = self._controller.__ray_ready__.remote()
        # One that is gone answers with an error. The end of the run is heard of elsewhere.
        if ray.wait([self._controller_question], timeout=0)[0]:
            self._controller_question = None
            self._controller_silent = 0.0

    def _give_up(self, text: str) -> None:
        self.given_up = text
        self._channel.give_up.remote(text)
        self.end_controller()

    def _kill_controller(self) -> None:
        if self._controller is None:  # it may have been about to start
            _, self._controller = ray.get(self._channel.waiting.remote(), timeout=NODE_SECONDS)
        if self._controller is not None:
            ray.kill(self._controller)


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
