"""The working folder of a run at an address, against a stand-in for what is there."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dngd.config import TrainConfig
from dngd.errors import UserError
from dngd.train import remote_run
from dngd.train.remote_run import RemoteRunFolder, open_run_folder
from dngd.train.run_folder import RunFolder, resume_command


class FakeFiles:
    """Keeps what is done there. holds: writes wait while it is unset. away: nothing is reached."""

    def __init__(self) -> None:
        self.shown = "s3://runs/one"
        self.done: list[tuple[str, str]] = []
        self.is_writing = threading.Event()
        self.goes_on = threading.Event()
        self.goes_on.set()
        self.away = False

    def _do(self, what: str, name: str) -> None:
        if self.away:
            raise UserError(f"{self.shown}/{name} could not be reached")
        self.done.append((what, name))

    def write(self, name: str, data: bytes) -> None:
        self.is_writing.set()
        assert self.goes_on.wait(10)
        self._do("write", name)

    def remove(self, name: str) -> None:
        self._do("remove", name)

    def send_checkpoint(self, folder: Path, keep: int) -> None:
        self._do("checkpoint", folder.name)


@pytest.fixture
def files() -> FakeFiles:
    return FakeFiles()


@pytest.fixture
def folder(tmp_path: Path, files: FakeFiles, monkeypatch: pytest.MonkeyPatch) -> Iterator[RemoteRunFolder]:
    monkeypatch.setattr(remote_run, "SETTLE_SECONDS", 0.1)
    path = tmp_path / "work"
    path.mkdir()
    (path / "metrics.jsonl").write_text("{}")
    remote: Any = files
    made = RemoteRunFolder(path, remote, 3, lambda text: None)
    yield made
    files.goes_on.set()
    made.close()


def test_a_thread_that_outlives_its_run_removes_nothing_there(folder: RemoteRunFolder, files: FakeFiles) -> None:
    """It still sends when the working folder goes, and has been asked for one more pass."""
    folder.finish()
    files.goes_on.clear()
    (folder.path / "health.jsonl").write_text("{}")
    files.is_writing.clear()
    folder.changed()
    assert files.is_writing.wait(10)
    folder.close()
    assert folder._thread.is_alive()
    shutil.rmtree(folder.path)
    files.goes_on.set()
    folder._thread.join(10)
    assert not folder._thread.is_alive()
    assert files.done == [("write", "metrics.jsonl"), ("write", "health.jsonl")]


def test_a_working_folder_that_is_gone_is_no_removal_of_its_files(folder: RemoteRunFolder, files: FakeFiles) -> None:
    folder.finish()
    (folder.path / "health.jsonl").write_text("{}")
    folder.finish()
    (folder.path / "health.jsonl").unlink()
    folder.finish()
    assert files.done[-1] == ("remove", "health.jsonl")
    shutil.rmtree(folder.path)
    folder.finish()
    assert ("remove", "metrics.jsonl") not in files.done


def test_a_checkpoint_that_was_not_sent_goes_first_with_the_next_files(
    folder: RemoteRunFolder, files: FakeFiles
) -> None:
    files.away = True
    with pytest.raises(UserError, match="could not be reached"):
        folder.send_checkpoint(folder.checkpoints / "step-00000007")
    files.away = False
    folder.finish()
    folder.finish()
    assert files.done == [("checkpoint", "step-00000007"), ("write", "metrics.jsonl")], "sent, once"


def test_a_newer_checkpoint_takes_the_place_of_one_that_was_not_sent(folder: RemoteRunFolder, files: FakeFiles) -> None:
    files.away = True
    with pytest.raises(UserError):
        folder.send_checkpoint(folder.checkpoints / "step-00000007")
    files.away = False
    folder.send_checkpoint(folder.checkpoints / "step-00000009")
    folder.finish()
    assert [name for what, name in files.done if what == "checkpoint"] == ["step-00000009"]


def test_a_checkpoint_that_cannot_be_sent_to_the_end_is_told(
    folder: RemoteRunFolder, files: FakeFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_run, "FINISH_SECONDS", 0.0)
    folder.finish()
    files.away = True
    with pytest.raises(UserError):
        folder.send_checkpoint(folder.checkpoints / "step-00000007")
    with pytest.raises(UserError, match=r"the run's last files were not sent: .*step-00000007"):
        folder.finish()


def test_the_command_that_goes_on_keeps_the_options_of_an_address() -> None:
    address = "s3://bucket/one?scheme=http&endpoint_override=localhost:9000"
    config = TrainConfig(dataset="products-mini", run_dir=Path(address))
    command = resume_command(config, RunFolder(Path("work"), "s3://bucket/one"))
    assert command == f"dngd train --run-dir '{address}' --resume"
    here = TrainConfig(dataset="products-mini", run_dir=Path("runs/one"))
    assert resume_command(here, RunFolder(Path("runs/one"))) == "dngd train --run-dir runs/one --resume"


def test_a_folder_that_only_the_drivers_node_has_is_refused_by_rank_0(tmp_path: Path) -> None:
    config = TrainConfig(dataset="products-mini", run_dir=tmp_path / "one")
    with pytest.raises(UserError, match="put --run-dir on storage that all nodes share, or at s3://"):
        open_run_folder(config, 0, lambda text: None).__enter__()
    with open_run_folder(config, 1, lambda text: None) as folder:
        assert folder.path == tmp_path / "one"
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "config.yaml").write_text("dataset: products-mini")
    with open_run_folder(config, 0, lambda text: None) as folder:
        assert folder.holds_a_run
