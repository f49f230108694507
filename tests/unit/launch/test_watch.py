"""The driver's supervision goes on, whatever a reporter or a node does."""

from __future__ import annotations

from typing import Any

import pytest

from dngd.config import TrainConfig
from dngd.launch import watch
from dngd.launch.watch import Watch
from dngd.train.progress import SilentReporter

STALL = {"attempt": 1, "rank": 0, "node_id": "ab", "pid": 1, "started": 0.0, "record": ""}


class Method:
    """An actor's method whose answer is there at once."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    def remote(self, *arguments: Any) -> Any:
        return self._answer


class Channel:
    """Stands in for the actor: one rank stalls."""

    drain = Method([{"event": "message", "text": "hello"}])
    stalls = Method([STALL])
    killed = Method("rank 0 stalled")


@pytest.fixture
def looking(monkeypatch: pytest.MonkeyPatch) -> Watch:
    monkeypatch.setattr(watch.ray, "get", lambda answer, timeout: answer)
    return Watch(Channel(), TrainConfig(dataset="none"), SilentReporter())


def test_a_reporter_that_fails_ends_nothing(
    looking: Watch, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def closed(*_: Any) -> None:
        raise BrokenPipeError("the terminal is closed")

    monkeypatch.setattr(watch, "deliver", closed)
    for _ in range(3):
        looking._quietly(looking._relay)
    assert len([record for record in caplog.records if "looks after" in record.message]) == 1, "told once"


def test_a_kill_that_did_not_reach_its_node_is_tried_again(looking: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def silent(node_id: str, *_: Any) -> Any:
        tried.append(node_id)
        if len(tried) == 1:
            raise watch.ray.exceptions.GetTimeoutError("no answer")
        return True, None

    monkeypatch.setattr(watch, "on_node", silent)
    monkeypatch.setattr(looking, "_beside", lambda work: looking._quietly(work))
    for _ in range(3):
        looking._kill_stalled()
    assert tried == ["ab", "ab"], "again after the failure, and not after the success"


class Clock:
    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


class Asked:
    """An actor's method that is silent while answer is None, and otherwise answers with it, later questions too."""

    def __init__(self, answer: Any = None) -> None:
        self.answer = answer

    def remote(self, *arguments: Any) -> Any:
        return self


class Told:
    """An actor's method that keeps what it was called with."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def remote(self, text: str) -> None:
        self.heard.append(text)


class Controller:
    def __init__(self) -> None:
        self.__ray_ready__ = Asked(True)


class Run:
    """A watch of a run whose channel and controller answer as a test says, on a clock of its own; limit: 100 s."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock, self.waiting, self.give_up, self.controller = Clock(), Asked(), Told(), Controller()
        self.said: list[str] = []
        self.killed: list[Any] = []
        monkeypatch.setattr(watch.time, "monotonic", self.clock)
        monkeypatch.setattr(watch.ray, "wait", lambda asked, timeout: ([a for a in asked if a.answer is not None], []))
        monkeypatch.setattr(watch.ray, "get", self._get)
        monkeypatch.setattr(watch.ray, "kill", self.killed.append)
        reporter = SilentReporter()
        monkeypatch.setattr(reporter, "message", self.said.append)
        config = TrainConfig(dataset="none", num_workers=2, ray={"recovery_timeout_seconds": 100.0})
        self.watch = Watch(self, config, reporter)
        monkeypatch.setattr(self.watch, "_beside", lambda work: self.watch._quietly(work))

    def _get(self, asked: Asked, timeout: float) -> Any:
        if asked.answer is None:
            raise watch.ray.exceptions.GetTimeoutError("no answer")
        if isinstance(asked.answer, Exception):
            raise asked.answer
        return asked.answer

    def look(self, seconds: float) -> None:
        """Let time pass, and look every 5 s."""
        for _ in range(int(seconds / 5)):
            self.clock.seconds += 5
            self.watch._bound_waiting()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    return Run(monkeypatch)


def test_the_drivers_clock_bounds_a_start_of_which_no_actor_knows(run: Run) -> None:
    run.look(25)
    assert run.said == ["waiting up to 100 s for the cluster to run 2 workers"]
    run.look(75)
    assert run.watch.given_up is None
    run.look(5)
    assert "the cluster did not run 2 workers within 100 s; go on with --resume" in (run.watch.given_up or "")
    run.look(200)
    assert len(run.give_up.heard) == 1, "given up once"


def test_what_passed_before_the_channel_ran_belongs_to_the_first_start_alone(run: Run) -> None:
    run.look(60)
    run.waiting.answer = (0.0001, run.controller)
    run.look(5)
    run.waiting.answer = (36.0, run.controller)
    run.watch._bound_waiting()
    assert "within 100 s" in (run.watch.given_up or "")
    assert run.killed == [run.controller]


def test_a_later_wait_has_all_of_its_limit(run: Run) -> None:
    run.look(60)
    for answer in (10.0, 0.0, 99.0):
        run.waiting.answer = (answer, run.controller)
        run.look(5)
    assert run.watch.given_up is None
    run.waiting.answer = (101.0, run.controller)
    run.look(5)
    assert run.killed == [run.controller]


def test_a_controller_that_is_stopped_while_workers_run(run: Run) -> None:
    run.waiting.answer = (0.0, run.controller)
    run.look(50)
    run.controller.__ray_ready__.answer = None
    run.look(95)
    assert run.said == ["waiting up to 100 s for Ray's controller to answer"]
    run.controller.__ray_ready__.answer = True
    run.look(5)
    run.controller.__ray_ready__.answer = None
    run.look(100)
    assert run.watch.given_up is None
    run.look(5)
    assert (run.watch.given_up or "").startswith("Ray's controller (TrainController, on this node) did not answer")
    assert run.killed == [run.controller]


@pytest.mark.parametrize("answer", [None, watch.ray.exceptions.RayActorError()])
def test_a_channel_that_is_stopped_or_gone_while_workers_run(run: Run, answer: Any) -> None:
    run.waiting.answer = (0.0, run.controller)
    run.look(50)
    run.waiting.answer = answer
    run.look(100)
    assert run.watch.given_up is None
    run.look(5)
    assert "(RunChannel) did not answer for 100 s" in (run.watch.given_up or "")
    assert run.killed == [run.controller]


def test_a_driver_that_was_stopped_itself_gives_nothing_up(run: Run) -> None:
    """Ctrl-Z for an hour: until the next answer, a minute of it counts as silence."""
    run.waiting.answer = (0.0, run.controller)
    run.look(10)
    run.waiting.answer = None
    run.clock.seconds += 3600
    run.watch._bound_waiting()
    assert run.watch.given_up is None
