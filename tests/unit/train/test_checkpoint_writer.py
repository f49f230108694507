"""Checkpoints are written beside training, one at a time, and a failed write costs no more than itself."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dngd.comm import LocalCommunicator
from dngd.errors import UserError
from dngd.train import checkpoint
from dngd.train.checkpoint import CheckpointFolder, Snapshot
from dngd.train.checkpoint_writer import FIRST_LOOK_STEPS, CheckpointSchedule, CheckpointWriter
from tests.helpers.thread_world import run_threads


def snapshot(step: int, value: float) -> Snapshot:
    weights = {"w": torch.full((3,), value)}
    curvature = {"shared.a": torch.full((2,), value), "local.b": torch.full((2,), value)}
    return Snapshot(step, {"position": step}, {"identity": 1}, weights, {"0.m": torch.ones(3)}, curvature)


def writer(path: Path, communicator: Any = None, **changes: Any) -> tuple[CheckpointWriter, list[str], list[int]]:
    told: list[str] = []
    written: list[int] = []
    communicator = communicator or LocalCommunicator()
    settings: dict[str, Any] = {"timeout_seconds": 30.0, "signal_seconds": 5.0} | changes
    folder = CheckpointFolder(path, communicator, keep=3)
    made = CheckpointWriter(folder, communicator, tell=told.append, written=written.append, **settings)
    return made, told, written


def newest(path: Path) -> Snapshot | None:
    return CheckpointFolder(path, LocalCommunicator(), keep=3).load_newest()[0]


def test_training_goes_on_during_a_write_and_does_not_change_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    original = checkpoint.write_flushed

    def held(path: Path, data: bytes) -> None:
        assert gate.wait(20)
        original(path, data)

    monkeypatch.setattr(checkpoint, "write_flushed", held)
    made, told, written = writer(tmp_path / "c")
    first = snapshot(1, 1.0)
    made.save(first)
    assert not written, "save returned before a byte was written"
    for tensors in (first.model, first.optimizer, first.curvature or {}):
        for tensor in tensors.values():
            tensor.fill_(7.0)  # the next step
    gate.set()
    made.finish()
    found = newest(tmp_path / "c")
    assert found is not None
    assert found.model["w"].tolist() == [1.0] * 3
    assert found.optimizer["0.m"].tolist() == [1.0] * 3
    assert found.rank_curvatures[0]["local.b"].tolist() == [1.0] * 2
    assert found.rank_curvatures[0]["shared.a"].tolist() == [1.0] * 2
    assert (written, told) == ([1], [])


@pytest.mark.parametrize("failing", [0, 2, 4])
def test_a_full_disk_leaves_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """ENOSPC at any file: told, counted, cleaned up; the checkpoint before is whole, and the next one is written."""
    made, told, written = writer(tmp_path / "c")
    made.save(snapshot(1, 1.0))
    made.finish()
    original, calls = checkpoint.write_flushed, 0

    def full(path: Path, data: bytes) -> None:
        nonlocal calls
        calls += 1
        if calls > failing:
            path.write_bytes(data[: len(data) // 2])
            raise OSError(28, "No space left on device", str(path))
        original(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_flushed", full)
        made.save(snapshot(2, 2.0))
        made.finish()
    found = newest(tmp_path / "c")
    assert found is not None
    assert found.step == 1
    assert made.failed == 1
    assert "step 2 could not be written (No space left on device)" in told[0]
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["step-00000001"], "the space is given back"
    made.save(snapshot(3, 3.0))
    made.finish()
    assert written[-1] == 3
    found = newest(tmp_path / "c")
    assert found is not None
    assert found.step == 3


@pytest.mark.parametrize("ends", ["save", "finish"])
def test_a_run_folder_that_is_gone_ends_all_ranks_alike(tmp_path: Path, ends: str) -> None:
    """It is not made anew, without the run's configuration; what hears of it is the next wait of all ranks."""
    run = tmp_path / "run"
    run.mkdir()
    told: list[list[str]] = []

    def rank(communicator: Any) -> str:
        made, said, _ = writer(run / "checkpoints", communicator)
        told.append(said)
        made.save(snapshot(1, 1.0))
        made.finish()
        if communicator.rank == 0:
            shutil.rmtree(run)
        made.save(snapshot(2, 2.0))
        with pytest.raises(UserError) as info:
            made.save(snapshot(3, 3.0)) if ends == "save" else made.finish()
        assert made.failed == 0
        return str(info.value)

    first, second = run_threads(2, rank)
    assert first == second
    assert first.startswith(f"the run folder {run} is gone: ")
    assert told == [[], []]
    assert not run.exists()


def test_the_folder_of_checkpoints_may_be_removed(tmp_path: Path) -> None:
    made, told, written = writer(tmp_path / "c")
    made.save(snapshot(1, 1.0))
    made.finish()
    shutil.rmtree(tmp_path / "c")
    made.save(snapshot(2, 2.0))
    made.finish()
    assert (written, told, made.failed) == ([1, 2], [], 0)


def test_a_write_that_does_not_end_is_waited_for_no_longer_than_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All ranks leave the next checkpoint out together, and rank 0 says so; here two ranks, as threads."""
    gate = threading.Event()
    original = checkpoint.write_flushed
    monkeypatch.setattr(checkpoint, "write_flushed", lambda path, data: (gate.wait(20), original(path, data)))
    told: list[list[str]] = [[], []]

    def rank(communicator: Any) -> int:
        made, told[communicator.rank], _ = writer(tmp_path / "c", communicator, timeout_seconds=0.3, signal_seconds=0.1)
        made.save(snapshot(1, 1.0))
        started = time.monotonic()
        made.save(snapshot(2, 2.0))
        assert time.monotonic() - started < 10
        assert made.left_out_step == 2, "on every rank"
        gate.set()
        made.finish()
        return made.failed

    assert run_threads(2, rank) == [1, 0]
    assert "step 2 is left out" in told[0][0]
    assert told[1] == []
    found = newest(tmp_path / "c")
    assert found is not None
    assert found.step == 1


def test_ranks_agree_on_minutes_that_only_rank_0_counts() -> None:
    """Ranks whose clocks differ make the same checkpoints, each within the period and a look."""

    def rank(communicator: Any) -> list[int]:
        now = 0.0
        clock_speed = 1.0 if communicator.rank == 0 else 3.0
        schedule = CheckpointSchedule(
            communicator, period_steps=1000, period_seconds=60.0, now=lambda: now * clock_speed
        )
        schedule.start(500)
        due = []
        for step in range(501, 1400):
            now += 0.5 if step < 900 else 2.0  # steps get slower
            if schedule.is_due(step, epoch_ended=False):
                due.append(step)
        return due

    first, second = run_threads(2, rank)
    assert first == second
    assert 1000 in first, "and by steps as well"
    assert first[0] - 500 in range(120, 130), "60 s of 0.5 s each, found within a look"
    gaps = [(b - a) * (2.0 if a >= 900 else 0.5) for a, b in zip(first, first[1:]) if a >= 900 or b < 900]
    assert gaps
    assert max(gaps) <= 60 + 2.0 * FIRST_LOOK_STEPS


def test_without_minutes_nothing_is_agreed_on() -> None:
    class Deaf(LocalCommunicator):
        def broadcast_bytes(self, payload: bytes | None) -> bytes:
            raise AssertionError("a collective that nobody needs")

    schedule = CheckpointSchedule(Deaf(), period_steps=None, period_seconds=None)
    schedule.start(0)
    ends = [step for step in range(1, 100) if schedule.is_due(step, epoch_ended=step % 40 == 0)]
    assert ends == [40, 80]


def test_a_damaged_later_checkpoint_does_not_outlive_the_one_that_replaces_it(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "c", LocalCommunicator(), keep=1)
    made = CheckpointWriter(
        folder, LocalCommunicator(), timeout_seconds=30, signal_seconds=5, tell=lambda _: None, written=lambda _: None
    )
    made.save(snapshot(200, 2.0))
    made.finish()
    (tmp_path / "c" / "step-00000200" / "model.safetensors").write_bytes(b"damaged")
    made.save(snapshot(150, 1.5))
    made.finish()
    found = newest(tmp_path / "c")
    assert found is not None
    assert found.step == 150


@pytest.mark.parametrize("is_known", [True, False])
def test_checkpoints_that_cannot_be_sent_do_not_pile_up(tmp_path: Path, is_known: bool) -> None:
    """The newest stay, and the last one that is safe elsewhere. is_known: whether there is such a one."""
    away = not is_known

    def send(folder: Path) -> None:
        if away:
            raise OSError("the store does not answer")

    folder = CheckpointFolder(tmp_path / "c", LocalCommunicator(), keep=2, send=send)
    for step in range(1, 9):
        captured = folder.capture(snapshot(step, float(step)))
        assert captured is not None
        if away:
            with pytest.raises(OSError, match="does not answer"):
                folder.write(captured)
        else:
            folder.write(captured)
        away = True
    kept = sorted(int(path.name.removeprefix("step-")) for path in (tmp_path / "c").iterdir())
    assert kept == ([1, 7, 8] if is_known else [7, 8])
