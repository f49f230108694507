"""Runs that live on an object store: a local S3 server."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import dngd
from dngd import cli
from dngd.comm import LocalCommunicator
from dngd.errors import TrainingError, UserError
from dngd.graph import GraphStore
from dngd.train import remote_run, run_rank
from dngd.train.checkpoint import CheckpointFolder, HostSnapshot
from dngd.train.progress import SilentReporter
from dngd.train.remote_files import RemoteFiles
from dngd.train.supervision import Attempt, Supervision
from tests.helpers import survival
from tests.helpers.object_store import ObjectStore, object_store
from tests.helpers.ray_cluster import ray_cluster
from tests.helpers.survival import fault
from tests.unit.report.run_folders import write_run


@pytest.fixture(scope="module")
def bucket() -> Iterator[ObjectStore]:
    with object_store("runs") as serving:
        yield serving


class Listener(SilentReporter):
    """Keeps messages, and calls `at` with each evaluation's step."""

    def __init__(self, at: Any = None) -> None:
        self.texts: list[str] = []
        self._at = at

    def message(self, text: str) -> None:
        self.texts.append(text)

    def evaluation(self, record: Any) -> None:
        if self._at is not None:
            self._at(record.step)


def settings(store: GraphStore, run_dir: Any, **changes: Any) -> dngd.TrainConfig:
    fields: dict[str, Any] = {"engine": "local", "num_workers": 1, "num_samplers": 0, "epochs": 4} | changes
    return survival.settings(store, run_dir, **fields)


def local_copy(bucket: ObjectStore, prefix: str, folder: Path) -> Path:
    for key in bucket.keys(prefix):
        path = folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bucket.read(key))
    return folder / prefix


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(list(arguments))
    err = capsys.readouterr().err
    assert exit_info.value.code == 2, err
    return err.strip().splitlines()[-1]


def test_a_run_on_s3_is_the_run_of_a_folder(
    bucket: ObjectStore, store: GraphStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of its files are there, checkpoints as many as are kept; what reads runs reads it; nothing stays here."""
    listener = Listener()
    changes: dict[str, Any] = {"checkpoint": {"keep": 2}, "cache_dir": tmp_path / "cache"}
    result = dngd.Trainer(settings(store, "s3://runs/team/one", **changes), reporter=listener).fit()
    assert (result.run_dir, result.failed_uploads) == ("s3://runs/team/one", 0)
    straight = dngd.Trainer(settings(store, tmp_path / "straight"), quiet=True).fit()
    copy = local_copy(bucket, "team/one", tmp_path / "copy")
    survival.assert_same_run(copy, tmp_path / "straight")
    assert (copy / "report.html").read_bytes().startswith(b"<!DOCTYPE html>")
    steps = [straight.steps * epoch // 4 for epoch in (3, 4)]
    assert [path.name for path in sorted((copy / "checkpoints").iterdir())] == [f"step-{n:08d}" for n in steps]
    assert list((tmp_path / "cache" / "runs").iterdir()) == []
    text = (copy / "config.yaml").read_text()
    assert "run_dir: s3://runs/team/one\n" in text
    assert not any(secret in bucket.read(key) for key in bucket.keys("team/one") for secret in (b"testing-secret",))

    with pytest.raises(SystemExit):
        cli.main(["evaluate", "s3://runs/team/one", "--json"])
    assert json.loads(capsys.readouterr().out)["val"]["accuracy"] == pytest.approx(straight.best_val_accuracy)
    with pytest.raises(SystemExit):
        cli.main(["predict", "s3://runs/team/one", "--out", str(tmp_path / "p.parquet"), "--json"])
    assert json.loads(capsys.readouterr().out)["run"] == "one"
    with pytest.raises(SystemExit):
        cli.main(["report", "s3://runs/team/one", str(tmp_path / "straight"), "--out", str(tmp_path / "r.html")])
    assert "one" in (tmp_path / "r.html").read_text()

    train = ["train", "--dataset", str(store.path), "--batch-size", "20", "--engine", "local", "--run-dir"]
    again = refused(capsys, *train, "s3://runs/team/one")
    assert "run folder s3://runs/team/one already holds a run; go on with --resume" in again
    assert "holds files that are no run's" in refused(capsys, *train, "s3://runs/team")

    for key in bucket.keys("team/one/checkpoints"):
        bucket.remove(key)
    lost = refused(capsys, "train", "--run-dir", "s3://runs/team/one", "--resume")
    assert "the run in s3://runs/team/one is finished, but its checkpoints are gone" in lost


def test_a_run_with_a_metric_of_its_own(
    bucket: ObjectStore, store: GraphStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def top_two(outputs: Tensor, labels: Tensor) -> float:
        return float((outputs.topk(2).indices == labels[:, None]).any(1).float().mean())

    made = settings(store, "s3://runs/own", max_steps=3)
    dngd.Trainer(made, quiet=True, metric=top_two).fit()
    said = refused(capsys, "train", "--run-dir", "s3://runs/own", "--resume", "--max-steps", "4")
    assert "the run in s3://runs/own was trained with a program's own metric (top_two)" in said
    more = made.model_copy(update={"max_steps": 4})
    assert dngd.Trainer(more, quiet=True, metric=top_two).resume().steps == 4
    assert json.loads(bucket.read("own/own-parts.json")) == {"metric": "top_two"}


def test_a_report_of_all_runs_at_an_address(
    bucket: ObjectStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("b", "a"):
        write_run(tmp_path / "lab" / name)
    (tmp_path / "lab" / "graphs").mkdir()
    (tmp_path / "lab" / "graphs" / "x.npz").write_bytes(b"x")
    bucket.upload(tmp_path / "lab", "lab")
    for address in ("s3://runs/lab", "s3://runs/lab/?scheme=http"):
        with pytest.raises(SystemExit):
            cli.main(["report", address, str(tmp_path / "lab" / "b"), "--out", str(tmp_path / "r.html"), "--json"])
        assert [run["name"].rpartition("/")[2] for run in json.loads(capsys.readouterr().out)["runs"]] == [
            "a",
            "b",
            "b",
        ]
        with pytest.raises(SystemExit):
            cli.main(["report", address, "--out", str(tmp_path / "r.html")])
        assert capsys.readouterr().out.splitlines()[0] == f"{address.partition('?')[0]}: 2 runs, a, b"
    for address in ("s3://runs/lab/graphs", "s3://runs/nowhere"):
        assert f"{address} holds no run" in refused(capsys, "report", address)


def test_resume_takes_the_newest_good_checkpoint(bucket: ObjectStore, store: GraphStore, tmp_path: Path) -> None:
    """One that was not sent whole is none; a damaged one is passed over, told; the run ends as if never stopped."""
    straight = dngd.Trainer(settings(store, tmp_path / "straight"), quiet=True).fit()
    per_epoch = straight.steps // 4
    stopped = settings(store, "s3://runs/two", max_steps=3 * per_epoch)
    dngd.Trainer(stopped, quiet=True).fit()
    newest = f"two/checkpoints/step-{3 * per_epoch:08d}"
    damaged = bucket.read(f"{newest}/model.safetensors")
    bucket.write(f"{newest}/model.safetensors", damaged[:-4] + b"oops")
    bucket.write(f"two/checkpoints/step-{3 * per_epoch + 1:08d}/model.safetensors", damaged)
    listener = Listener()
    dngd.Trainer(settings(store, "s3://runs/two", resume=True), reporter=listener).fit()
    assert f"resumed from step {2 * per_epoch} of {straight.steps}" in listener.texts
    passed_over = [text for text in listener.texts if "is damaged" in text]
    assert passed_over == [
        f"checkpoint step-{3 * per_epoch:08d} is damaged (model.safetensors does not match its sha256) and was passed "
        "over"
    ]
    survival.assert_same_run(local_copy(bucket, "two", tmp_path / "copy"), tmp_path / "straight")
    assert not bucket.keys(f"two/checkpoints/step-{3 * per_epoch + 1:08d}"), "what was not whole is removed"

    other = bucket.read("two/config.yaml").replace(b"\nseed: 0\n", b"\nseed: 7\n")
    bucket.write("two/config.yaml", other)
    with pytest.raises(dngd.UserError, match=r"cannot resume with another seed=7 \(the run has 0\)"):
        dngd.Trainer(settings(store, "s3://runs/two", seed=7, epochs=5, resume=True), quiet=True).fit()
    assert bucket.read("two/config.yaml") == other


def test_a_store_that_is_away_for_a_while(
    bucket: ObjectStore, store: GraphStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told and counted; the run goes on, and in the end all of it is there."""
    monkeypatch.setattr("dngd.graph.filesystems._S3_ATTEMPTS", 1)
    straight = dngd.Trainer(settings(store, tmp_path / "straight"), quiet=True).fit()
    per_epoch = straight.steps // 4
    away = bucket.away()
    write = CheckpointFolder.write

    def leaving(self: CheckpointFolder, captured: HostSnapshot) -> None:
        if captured.snapshot.step == 2 * per_epoch:
            away.__enter__()
        if captured.snapshot.step == 4 * per_epoch:
            away.__exit__(None, None, None)
        write(self, captured)

    monkeypatch.setattr(CheckpointFolder, "write", leaving)
    listener = Listener()
    result = dngd.Trainer(settings(store, "s3://runs/three"), reporter=listener).fit()
    assert result.failed_checkpoints == 2, listener.texts
    told = [text for text in listener.texts if "could not be written" in text]
    assert [text.split()[3] for text in told] == [str(2 * per_epoch), str(3 * per_epoch)]
    assert all("s3://runs/three/checkpoints/step-" in text and "could not be reached" in text for text in told)
    assert result.failed_uploads > 0
    files = [text for text in listener.texts if "is sent with the next ones" in text]
    assert 0 < len(files) <= result.failed_uploads
    copy = local_copy(bucket, "three", tmp_path / "copy")
    assert json.loads((copy / "result.json").read_text())["failed_checkpoints"] == 2
    survival.assert_same_run(copy, tmp_path / "straight")


def test_a_store_that_stays_away_ends_the_run_with_a_sentence(
    bucket: ObjectStore, store: GraphStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_run, "FINISH_SECONDS", 1.0)
    monkeypatch.setattr("dngd.graph.filesystems._S3_ATTEMPTS", 1)
    away = bucket.away()
    began: list[int] = []

    def leave(step: int) -> None:
        if not began:
            began.append(step)
            away.__enter__()

    try:
        with pytest.raises(UserError, match=r"the run's last files were not sent: s3://runs/four/.*--resume"):
            dngd.Trainer(settings(store, "s3://runs/four"), reporter=Listener(leave)).fit()
    finally:
        away.__exit__(None, None, None)


def test_a_recovery_that_does_not_reach_the_store_may_be_tried_again(
    bucket: ObjectStore, store: GraphStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A TrainingError, which Ray starts workers again for; at the first attempt the user is asked."""
    monkeypatch.setattr("dngd.graph.filesystems._S3_ATTEMPTS", 1)
    config = settings(store, "s3://runs/six", resume=True, cache_dir=tmp_path)
    kinds: dict[int, type[Exception]] = {1: UserError, 2: TrainingError}
    with bucket.away():
        for number, kind in kinds.items():
            supervision = Supervision(Attempt(number=number))
            with pytest.raises(kind, match="s3://runs/six could not be reached"):
                run_rank(config, LocalCommunicator(), SilentReporter(), supervision=supervision)
    assert list((tmp_path / "runs").iterdir()) == [], "no working folder stays"


def test_mutant_that_sends_the_state_first_is_caught(
    bucket: ObjectStore, store: GraphStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order is what makes a checkpoint whole: a sender that is killed in between leaves none."""
    folder = tmp_path / "checkpoints" / "step-00000007"
    folder.mkdir(parents=True)
    for name in ("model.safetensors", "state.json", "zebra.safetensors"):
        (folder / name).write_bytes(b"x")
    files = RemoteFiles("s3://runs/five")
    write, sent = files.write, []

    def killed(name: str, data: bytes) -> None:
        if len(sent) == 2:
            raise KeyboardInterrupt
        write(name, data)
        sent.append(name)

    monkeypatch.setattr(files, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        files.send_checkpoint(folder, keep=3)
    assert len(sent) == 2
    assert not files.fetch_checkpoint("step-00000007", tmp_path / "got" / "checkpoints" / "step-00000007")
    mutant = sorted(folder.iterdir(), key=lambda path: path.name != "state.json")
    bucket.write(f"five/checkpoints/step-00000007/{mutant[0].name}", b"x")
    assert files.fetch_checkpoint("step-00000007", tmp_path / "got" / "checkpoints" / "step-00000007")


@pytest.mark.parametrize(
    ("run_dir", "said"),
    [
        ("s3://id:secret@runs/x", "holds credentials before an @"),
        ("http://runs/x", "run_dir=http://… is no place for a run"),
        ("s3://no-such-bucket/x", "s3://no-such-bucket/x"),
        ("s3://runs/x?acl=public", "option 'acl'"),
    ],
)
def test_addresses_that_are_refused(
    bucket: ObjectStore, store: GraphStore, capsys: pytest.CaptureFixture[str], run_dir: str, said: str
) -> None:
    train = ["train", "--dataset", str(store.path), "--batch-size", "20", "--engine", "local"]
    err = refused(capsys, *train, "--run-dir", run_dir)
    assert said in err
    assert "secret" not in err.replace("AWS_SECRET_ACCESS_KEY", "")
    assert not re.search("Traceback|pyarrow", err)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_lost_worker_of_a_run_on_s3(bucket: ObjectStore, store: GraphStore, tmp_path: Path) -> None:
    """Its next attempt goes on from the newest checkpoint there: the same weights in the end."""
    survival.undisturbed([survival.settings(store, tmp_path / "straight")])
    steps = json.loads((tmp_path / "straight" / "result.json").read_text())["steps"]
    per_epoch = steps // 3
    faults = [fault("reduce", 0, 2 * per_epoch + 3)]
    config = survival.settings(store, "s3://runs/survivor")
    with ray_cluster() as cluster:  # one of its own, which has the server's address and credentials
        code, said = survival.finish(survival.start(cluster, config, faults, tmp_path), 300)
    assert code == 0, said
    assert survival.hits(tmp_path) == {survival.name(f) for f in faults}
    went_on = [int(step) for step in re.findall(r"the run goes on from step (\d+) of", said)]
    assert went_on in ([per_epoch], [2 * per_epoch]), said
    copy = local_copy(bucket, "survivor", tmp_path / "copy")
    survival.assert_same_run(copy, tmp_path / "straight")
    result = json.loads((copy / "result.json").read_text())
    assert (result["recoveries"], result["run_dir"]) == (1, "s3://runs/survivor")
    assert (copy / "report.html").exists()
    assert "Traceback" not in said
