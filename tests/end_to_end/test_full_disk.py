"""A run folder on a file system that is really full: a tmpfs of a few pages, mounted by the test."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import dngd
from dngd.graph import GraphStore
from dngd.train.checkpoint import CheckpointFolder, HostSnapshot
from dngd.train.progress import SilentReporter
from tests.helpers import survival
from tests.helpers.full_disk import fill


class Listener(SilentReporter):
    """Keeps messages."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def message(self, text: str) -> None:
        self.texts.append(text)


def settings(store: GraphStore, run_dir: Path, **changes: Any) -> dngd.TrainConfig:
    fields: dict[str, Any] = {"engine": "local", "num_workers": 1, "num_samplers": 0, "epochs": 2} | changes
    return survival.settings(store, run_dir, **fields)


@pytest.fixture
def fills_and_frees(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Fills the disk before the second checkpoint is written, and frees it before the one at "until"."""
    plan = {"writes": 0, "until": 4}
    write = CheckpointFolder.write

    def filling(self: CheckpointFolder, captured: HostSnapshot) -> None:
        plan["writes"] += 1
        if plan["writes"] == 2:
            fill(small_disk)
        if plan["writes"] == plan["until"]:
            (small_disk / "ballast").unlink()
        write(self, captured)

    monkeypatch.setattr(CheckpointFolder, "write", filling)
    return plan


def test_a_run_goes_on_without_its_checkpoints(
    store: GraphStore, tmp_path: Path, small_disk: Path, fills_and_frees: dict[str, int]
) -> None:
    """Two checkpoints find no space: told, counted; the run ends as it would have, with the later ones."""
    changes: dict[str, Any] = {"checkpoint": {"period_steps": 3, "keep": 2}, "eval_period": 2}
    listener = Listener()
    result = dngd.Trainer(settings(store, small_disk / "run", **changes), reporter=listener).fit()
    assert result.failed_checkpoints == 2
    failures = [text for text in listener.texts if "could not be written (No space left on device)" in text]
    assert [text.split()[3] for text in failures] == ["6", "9"]
    fills_and_frees["writes"] = 10  # the straight run below meets no full disk
    dngd.Trainer(settings(store, tmp_path / "straight", **changes), quiet=True).fit()
    survival.assert_same_run(small_disk / "run", tmp_path / "straight")


def test_a_run_that_cannot_write_its_metrics_stops_and_is_gone_on_with(
    store: GraphStore, tmp_path: Path, small_disk: Path, fills_and_frees: dict[str, int]
) -> None:
    """No space for an evaluation's line: one sentence, and the last good checkpoint is whole."""
    fills_and_frees["until"] = 10**9
    changes: dict[str, Any] = {"checkpoint": {"period_steps": 3, "keep": 2}}
    with pytest.raises(dngd.UserError, match=r"No space left on device.*free space.*--resume"):
        dngd.Trainer(settings(store, small_disk / "run", **changes), quiet=True).fit()
    assert [path.name for path in (small_disk / "run" / "checkpoints").iterdir()] == ["step-00000003"]
    (small_disk / "ballast").unlink()
    listener = Listener()
    dngd.Trainer(settings(store, small_disk / "run", resume=True, **changes), reporter=listener).fit()
    assert any(text.startswith("resumed from step 3 of") for text in listener.texts)
    dngd.Trainer(settings(store, tmp_path / "straight", **changes), quiet=True).fit()
    survival.assert_same_run(small_disk / "run", tmp_path / "straight")


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_report_that_finds_no_space(store: GraphStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run is finished all the same, and the sentence says what is left to do."""
    monkeypatch.setattr("dngd.report.document.os", SimpleNamespace(replace=no_space, getpid=os.getpid, path=os.path))
    with pytest.raises(
        dngd.UserError, match=r"the run is finished, but report .*No space left.*dngd report .*/run --out"
    ):
        dngd.Trainer(settings(store, tmp_path / "run", epochs=1, max_steps=2), quiet=True).fit()
    assert (tmp_path / "run" / "result.json").exists()


def test_a_disk_without_a_page_has_no_room_for_the_graph(store: GraphStore, tmp_path: Path, small_disk: Path) -> None:
    """Not even for the lock's content."""
    fill(small_disk)
    config = settings(store, tmp_path / "run", stage_dir=small_disk)
    with pytest.raises(dngd.UserError, match=f"{small_disk} on .* has 0 free; .*--stage-dir"):
        dngd.Trainer(config).plan()
