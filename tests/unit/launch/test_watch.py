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
