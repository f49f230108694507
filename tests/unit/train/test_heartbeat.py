"""A worker's sign of life, and what stays when it is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from dngd.train import heartbeat
from dngd.train.heartbeat import Beat, FlightRecord, Heartbeat
from dngd.train.metrics import StepClock

PLACE = {"attempt": 2, "rank": 1, "world_size": 2, "node_id": "ab", "node_name": "host"}

KILLED = """
import os, signal, sys
from dngd.train.heartbeat import Heartbeat
from dngd.train.metrics import StepClock
clock = StepClock()
beats = []
with Heartbeat(clock, beats.append, attempt=1, rank=0, world_size=1, node_id="", node_name="") as alive:
    clock.at_step(41)
    print(alive.now().record, flush=True)
    with clock.phase("optimizer"), clock.inside("refresh"):
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_beats_say_where_the_training_thread_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "PERIOD_SECONDS", 0.02)
    clock = StepClock()
    beats: list[Beat] = []
    with Heartbeat(clock, beats.append, **PLACE) as alive:
        clock.at_step(7)
        with clock.phase("backward"):
            until = time.monotonic() + 20
            while not any(beat.phase == "backward" and beat.phase_seconds > 0.05 for beat in beats):
                assert time.monotonic() < until, beats
                time.sleep(0.01)
        record = Path(alive.now().record)
        assert record.read_bytes().split() == [b"7", b"step"]
    assert {(b.attempt, b.rank, b.step, b.pid) for b in beats if b.phase == "backward"} == {(2, 1, 7, os.getpid())}
    count = len(beats)
    time.sleep(0.1)
    assert len(beats) == count, "silent after its end"
    assert not record.exists(), "nobody will ask"


def test_a_killed_process_leaves_its_phase() -> None:
    done = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    record = done.stdout.strip()
    assert FlightRecord.take(record) == ("refresh", 41)
    assert FlightRecord.take(record) is None, "taken once"


def test_records_that_nobody_asks_for_go_after_an_hour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    gone = 2**22 + 5  # above the highest pid of Linux
    old, young = tmp_path / f"dngd-{gone}-a.phase", tmp_path / f"dngd-{gone}-b.phase"
    alive = tmp_path / f"dngd-{os.getpid()}-c.phase"
    for path, age in ((old, 4000), (young, 10), (alive, 4000)):
        path.write_text("3 reduce")
        os.utime(path, (time.time() - age,) * 2)
    record = FlightRecord()
    assert sorted(tmp_path.iterdir()) == sorted([young, alive, Path(record.path)])
