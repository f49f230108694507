"""Child processes of a benchmark: answers, errors, deaths, stops, turns, and that none is left behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from dngd.bench.children import Child, RankGroup, take_turns
from dngd.bench.progress import BenchProgress
from dngd.errors import TrainingError, UserError
from dngd.graph import GraphStore


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    one = Child("opener", {"part": "open"}, {"DNGD_TEST_MARK": "its own"})
    one.wait_until_ready()
    yield one
    one.close()


def test_it_answers_from_a_process_of_its_own(child: Child, store: GraphStore) -> None:
    assert child.ask({"store": str(store.path)})["seconds"] > 0
    (process,) = child.tree()
    assert process.environ()["DNGD_TEST_MARK"] == "its own"


def test_its_errors_are_raised_here_and_it_goes_on(child: Child, store: GraphStore, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        child.ask({"store": str(tmp_path / "none")})
    with pytest.raises(TrainingError, match=r"opener failed: Traceback[\s\S]*KeyError: 'store'"):
        child.ask({})
    assert child.ask({"store": str(store.path)})["seconds"] > 0


def test_a_stopped_one_does_nothing_until_it_is_resumed(child: Child) -> None:
    (process,) = child.tree()
    child.pause()
    assert _until(lambda: process.status() == psutil.STATUS_STOPPED)
    child.resume()
    assert _until(lambda: process.status() != psutil.STATUS_STOPPED)


def test_a_failing_setup_is_told() -> None:
    one = Child("broken", {"part": "nonsense"})
    with pytest.raises(TrainingError, match=r"broken failed: Traceback[\s\S]*AssertionError: nonsense"):
        one.wait_until_ready()
    one.close()


def test_a_death_is_told() -> None:
    one = Child("victim", {"part": "open"})
    one.wait_until_ready()
    psutil.Process(one.pid).kill()
    with pytest.raises(TrainingError, match=r"victim was killed \(out of memory, perhaps\)"):
        one.ask({})
    one.close()
    one.close()


def test_ranks_are_asked_together_and_end_together(store: GraphStore, tmp_path: Path) -> None:
    prefix = ["env", "DNGD_TEST_MARK=from a prefix"]
    group = RankGroup("pair", [{"part": "open"}] * 2, prefixes=[prefix, []])
    try:
        group.wait_until_ready()
        answers = group.ask({"store": str(store.path)})["ranks"]
        assert [answer["seconds"] > 0 for answer in answers] == [True, True]
        first, second = (child.tree()[0] for child in group._children)
        # A prefix becomes the child: no process is between.
        assert first.environ()["DNGD_TEST_MARK"] == "from a prefix"
        assert "DNGD_TEST_MARK" not in second.environ()
        group.pause()
        assert _until(lambda: {first.status(), second.status()} == {psutil.STATUS_STOPPED})
        group.resume()
        second.kill()
        with pytest.raises(TrainingError, match="pair, rank 1 was killed"):
            group.ask({"store": str(store.path)})
    finally:
        group.close()
    assert not psutil.wait_procs([first, second], timeout=10)[1]
    group.close()


PARENT = """
import contextlib, time
from pathlib import Path
from dngd.bench.children import Child, ended_by_sigterm
with ended_by_sigterm(), contextlib.ExitStack() as stack:
    child = Child("left alone", {"part": "open"})
    stack.callback(print, "cleaned up")
    child.wait_until_ready()
    child.pause()
    print(child.pid, flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
def test_sigterm_unwinds_the_benchmark() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout:
        child = psutil.Process(int(parent.stdout.readline()))
        parent.send_signal(signal.SIGTERM)
        assert parent.stdout.read() == "cleaned up\n"
    assert parent.wait() == 128 + signal.SIGTERM
    assert not psutil.wait_procs([child], timeout=10)[1]


@pytest.mark.slow
def test_a_stopped_child_does_not_outlive_a_killed_benchmark() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout:
        child = psutil.Process(int(parent.stdout.readline()))
    assert _until(lambda: child.status() == psutil.STATUS_STOPPED)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    _, alive = psutil.wait_procs([child], timeout=10)
    for process in alive:
        process.kill()
    assert not alive


class Recorder:
    """Stands in for a Child: writes down what is asked of it."""

    def __init__(self, name: str, log: list[tuple[str, Any]]) -> None:
        self.name = name
        self._log = log

    def resume(self) -> None:
        self._log.append((self.name, "resume"))

    def pause(self) -> None:
        self._log.append((self.name, "pause"))

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        self._log.append((self.name, request["size"]))
        return {"answer": len(self._log)}


def test_turns_rotate_and_only_one_works_at_a_time() -> None:
    log: list[tuple[str, Any]] = []
    children: Any = {name: Recorder(name, log) for name in "abc"}
    first = {"a": {"size": 10}, "b": {"size": 20}, "c": {"size": 30}}
    answers = take_turns(children, 2, {"size": 1}, first, BenchProgress())
    asked = [entry for entry in log if isinstance(entry[1], int)]
    assert [name for name, _ in asked[:3]] == ["a", "b", "c"]
    assert dict(asked[:3]) == {"a": 10, "b": 20, "c": 30}
    assert [name for name, _ in asked[3:]] == ["b", "c", "a", "c", "a", "b"]
    assert {size for _, size in asked[3:]} == {1}
    for start in range(0, len(log), 3):
        name = log[start][0]
        assert [entry[0] for entry in log[start : start + 3]] == [name] * 3
        assert (log[start][1], log[start + 2][1]) == ("resume", "pause")
    assert [answer["answer"] for answer in answers["a"]] == [2, 17, 23]


def _until(true: Any, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if true():
            return True
        time.sleep(0.01)
    return False
