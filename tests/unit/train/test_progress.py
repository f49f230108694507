"""Who hears what of a run: messages are for those who watch it, warnings for all."""

from __future__ import annotations

import errno
import io
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import dngd
from dngd import cli
from dngd.graph import GraphStore
from dngd.train.checkpoint import CheckpointFolder
from dngd.train.progress import ConsoleReporter, QuietReporter, SilentReporter, StepRecord, deliver, event

FLAGS = ["--engine", "local", "--num-layers", "2", "--fanout", "4,4", "--hidden", "8", "--batch-size", "60"]
FAILED = "checkpoint of step 2 could not be written (No space left on device); training goes on"


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(CheckpointFolder, "write", fails)


def config(store: GraphStore, run: Path) -> dngd.TrainConfig:
    fields: dict[str, Any] = {"engine": "local", "num_layers": 2, "fanout": (4, 4), "hidden": 8, "batch_size": 60}
    return dngd.TrainConfig(dataset=str(store.path), run_dir=run, max_steps=2, **fields)


@pytest.mark.usefixtures("full_disk", "one_thread")
def test_quiet_commands_tell_of_checkpoints_that_are_not_written(
    store: GraphStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["--dataset", str(store.path), "--run-dir", str(tmp_path / "run"), "--max-steps", "2", *FLAGS]
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["train", *run, "--quiet"])
    told = capsys.readouterr()
    assert not exit_info.value.code
    assert told.out == ""
    assert [line.partition(",")[0] for line in told.err.splitlines()] == [f"warning: {FAILED}"]


@pytest.mark.usefixtures("full_disk")
def test_quiet_programs_are_warned(store: GraphStore, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"checkpoint of step 2 could not be written \(No space"):
        dngd.Trainer(config(store, tmp_path / "run"), quiet=True).fit()


def test_what_is_no_warning_is_not_said_to_them(store: GraphStore, tmp_path: Path) -> None:
    """A run and its resumption have messages; that there was nothing to resume is a warning."""
    said: list[str] = []
    changes: dict[str, Any] = {"run_dir": tmp_path / "run", "resume": True}
    dngd.Trainer(config(store, tmp_path / "run"), reporter=QuietReporter(said.append)).fit()
    dngd.Trainer(config(store, tmp_path / "run").model_copy(update=changes), reporter=QuietReporter(said.append)).fit()
    assert said == []
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").mkdir()
    dngd.Trainer(config(store, tmp_path / "run").model_copy(update=changes), reporter=QuietReporter(said.append)).fit()
    assert said == [f"nothing to resume in {tmp_path / 'run'}; starting from the beginning"]


def test_a_warning_is_one_on_the_other_side_of_a_channel_too() -> None:
    class Listener(SilentReporter):
        def __init__(self) -> None:
            self.heard: list[Any] = []

        def step(self, record: StepRecord) -> None:
            self.heard.append(record)

        def message(self, text: str) -> None:
            self.heard.append(("message", text))

        def warning(self, text: str) -> None:
            self.heard.append(("warning", text))

    class MessagesAlone:
        """A program's own, of before there were warnings."""

        def __init__(self) -> None:
            self.heard: list[str] = []

        def message(self, text: str) -> None:
            self.heard.append(text)

    listener, older = Listener(), MessagesAlone()
    step = StepRecord(1, 2, 1, 0.5, 10.0)
    for sent in (event("step", step), event("message", "a"), event("warning", "b")):
        deliver(listener, sent)
    assert listener.heard == [step, ("message", "a"), ("warning", "b")]
    deliver(older, event("warning", "b"))  # type: ignore[arg-type]
    assert older.heard == ["b"]


def test_what_each_reporter_makes_of_a_warning() -> None:
    console = Console(file=io.StringIO(), width=80)
    ConsoleReporter(console).warning("a disk is full")
    assert console.file.getvalue() == "warning: a disk is full\n"  # type: ignore[attr-defined]
    with pytest.warns(UserWarning, match="^a disk is full$"):
        QuietReporter().warning("a disk is full")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        QuietReporter().message("reading a graph")
        SilentReporter().warning("a disk is full")
