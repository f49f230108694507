"""Run folders: their names, who may write there, what they keep of paths and results."""

from __future__ import annotations

import json
import math
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch

import dngd
from dngd import cli
from dngd.comm import LocalCommunicator
from dngd.errors import UserError
from dngd.graph import GraphStore
from dngd.train import hold_run_folder, run_folder, run_rank
from dngd.train.callbacks import Callback, RunState
from dngd.train.checkpoint import CheckpointFolder, Snapshot, said_in, weights_file
from dngd.train.evaluate_run import evaluate_run
from dngd.train.evaluation import ExactEvaluator, Scores
from dngd.train.metrics import RunResult, read_metrics, read_result
from dngd.train.predict import predict_run
from dngd.train.progress import SilentReporter
from dngd.train.run_folder import RunFolder, default_run_dir


def config(dataset: str, run_dir: Path, **changes: Any) -> dngd.TrainConfig:
    fields: dict[str, Any] = {"engine": "local", "num_layers": 2, "fanout": (4, 4), "hidden": 8, "batch_size": 60}
    return dngd.TrainConfig(dataset=dataset, run_dir=run_dir, **(fields | {"epochs": 1, "num_samplers": 0} | changes))


def fit(configuration: dngd.TrainConfig) -> dngd.RunResult:
    return dngd.Trainer(configuration, quiet=True).fit()


class Listener(SilentReporter):
    """Keeps messages."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def message(self, text: str) -> None:
        self.texts.append(text)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory; its sibling `other` is another one."""
    for name in ("here", "other"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "other"


def test_relative_paths_hold_from_any_working_directory(
    store: GraphStore, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(store.path, "graph")
    fit(config("graph", Path("run"), cache_dir=Path("cache")))
    run = Path("run").absolute()
    monkeypatch.chdir(elsewhere)
    saved = dngd.TrainConfig.from_yaml(run / "config.yaml")
    assert saved.dataset == str(run.parent / "graph")
    assert saved.cache_dir == run.parent / "cache"
    assert saved.data_root is None, "what the environment says is not the run's"
    assert evaluate_run(run)["step"] > 0
    resumed = dngd.TrainConfig.from_yaml(run / "config.yaml", {"run_dir": run, "resume": True, "epochs": 2})
    assert fit(resumed).epochs == 2.0


def test_names_and_folders_of_data_sets_stay_names(
    store: GraphStore, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(store.path, "data/graph")
    fit(config("graph", Path("run"), data_root=Path("data")))
    saved = dngd.TrainConfig.from_yaml(Path("run/config.yaml"))
    assert (saved.dataset, saved.data_root) == ("graph", Path("data").absolute())


def test_a_run_folder_has_one_writer(store: GraphStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second process that resumes a run under way is told, and changes nothing; after the first it may go on."""
    monkeypatch.setattr(run_folder, "OTHER_RUN_SECONDS", 0.3)
    run = tmp_path / "run"
    first = config(str(store.path), run)
    told: list[str] = []
    with hold_run_folder(first, told.append):
        before = (run / "config.yaml").read_bytes()
        with pytest.raises(UserError, match=r"another process to finish: the run in .*run"):
            fit(config(str(store.path), run, resume=True, epochs=5))
        with (
            pytest.raises(UserError, match="another process"),
            hold_run_folder(config(str(store.path), run, resume=True), told.append),
        ):
            pass
        assert (run / "config.yaml").read_bytes() == before
    assert len(told) == 1, "said once, not at each try"
    assert fit(config(str(store.path), run, resume=True)).steps > 0


def test_a_new_run_does_not_take_the_folder_of_one_that_began_meanwhile(
    store: GraphStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "OTHER_RUN_SECONDS", 20.0)
    run = tmp_path / "run"
    run.mkdir()
    waits = threading.Event()
    raised: list[BaseException] = []

    def second() -> None:
        try:
            with hold_run_folder(config(str(store.path), run), lambda text: waits.set()):
                pass
        except UserError as error:
            raised.append(error)

    with ExitStack() as stack:
        stack.enter_context(run_folder.folder_lock(run, purpose="a test", wait_seconds=1.0))
        other = threading.Thread(target=second)
        other.start()
        assert waits.wait(10)
        (run / "config.yaml").write_text(config(str(store.path), run).to_yaml())
    other.join(20)
    assert "already holds a run" in str(raised[0])


def test_a_run_that_failed_before_anything_was_kept_leaves_its_folder_free(store: GraphStore, tmp_path: Path) -> None:
    """Mend the model, and give the same command again."""

    class Fails(Callback):
        def on_step(self, run: RunState) -> None:
            raise UserError("not yet")

    run = tmp_path / "run"
    settings = config(str(store.path), run)
    with pytest.raises(UserError, match="not yet"):
        dngd.Trainer(settings, quiet=True, callbacks=[Fails()]).fit()
    left = {path.name for path in run.iterdir()}
    assert "config.yaml" in left
    assert "metrics.jsonl" not in left
    (run / "tensorboard").mkdir()
    for name in ("health.jsonl", "mlflow-run", "wandb-run", "tensorboard/events.out.tfevents.1.here"):
        (run / name).write_text('{"step": 1, "layers": {"left": 1}}\n')
    assert fit(settings).steps > 0
    assert {path.name for path in run.rglob("*")}.isdisjoint(
        {"mlflow-run", "wandb-run", "events.out.tfevents.1.here", run_folder.FREE_MARK}
    )
    health = run / "health.jsonl"
    assert not health.exists() or "left" not in health.read_text()
    with pytest.raises(UserError, match="already holds a run"):
        fit(settings)


@pytest.mark.parametrize("kept", ["metrics.jsonl", "result.json", "model.safetensors"])
def test_what_a_run_kept_is_not_replaced(store: GraphStore, tmp_path: Path, kept: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(config(str(store.path), run).to_yaml())
    (run / run_folder.FREE_MARK).touch()
    (run / kept).write_text("{}\n")
    with pytest.raises(UserError, match="already holds a run"):
        fit(config(str(store.path), run))
    assert (run / kept).read_text() == "{}\n"


def test_a_run_killed_before_its_result_gets_one(store: GraphStore, tmp_path: Path) -> None:
    """Its last checkpoint is there, its result.json is of an earlier end."""
    run = tmp_path / "run"
    early = fit(config(str(store.path), run))
    old = (run / "result.json").read_bytes()
    late = fit(config(str(store.path), run, resume=True, epochs=2))
    (run / "result.json").write_bytes(old)
    again = fit(config(str(store.path), run, resume=True, epochs=2))
    assert early.steps < again.steps == late.steps
    assert again.best_val_accuracy == late.best_val_accuracy
    found = read_result(run / "result.json")
    assert found is not None
    assert found.steps == late.steps
    assert found.train_seconds == pytest.approx(late.train_seconds, rel=0.5)


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"steps": 4}', b"\xff"])
def test_a_damaged_result_is_written_anew(store: GraphStore, tmp_path: Path, content: bytes) -> None:
    run = tmp_path / "run"
    before = fit(config(str(store.path), run))
    (run / "result.json").write_bytes(content)
    assert fit(config(str(store.path), run, resume=True)).best_val_accuracy == before.best_val_accuracy
    assert json.loads((run / "result.json").read_text())["steps"] == before.steps


def test_a_result_of_another_version_is_read(store: GraphStore, tmp_path: Path) -> None:
    run = tmp_path / "run"
    before = fit(config(str(store.path), run))
    said = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(said | {"of_a_later_version": 1}))
    again = fit(config(str(store.path), run, resume=True))
    assert (again.steps, again.step_ms) == (before.steps, before.step_ms)


def test_less_than_was_done_is_refused(store: GraphStore, tmp_path: Path) -> None:
    run = tmp_path / "run"
    steps = fit(config(str(store.path), run, epochs=3)).steps
    before = (run / "config.yaml").read_bytes()
    for fewer in ({"epochs": 1}, {"epochs": 3, "max_steps": steps - 1}):
        with pytest.raises(UserError, match=rf"has taken {steps} steps .* give at least as many"):
            fit(config(str(store.path), run, resume=True, **fewer))
    assert (run / "config.yaml").read_bytes() == before
    assert fit(config(str(store.path), run, resume=True, epochs=3)).steps == steps


def test_only_good_checkpoints_say_how_far_a_run_is(store: GraphStore, tmp_path: Path) -> None:
    run = tmp_path / "run"
    steps = fit(config(str(store.path), run)).steps
    (run / "checkpoints" / "step-99999999").mkdir()
    damaged = run / "checkpoints" / "step-99999998"
    damaged.mkdir()
    (damaged / "state.json").write_text('{"step": 99999998, "format_version": 1, "checksum": "0"}')
    assert fit(config(str(store.path), run, resume=True, epochs=2)).steps == 2 * steps


def test_a_damaged_line_of_the_metrics_is_left_out(store: GraphStore, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fit(config(str(store.path), run, epochs=3))
    path = run / "metrics.jsonl"
    first, second, third = path.read_bytes().splitlines()
    steps = [record.step for record in read_metrics(path)]
    for damaged in (
        b"\xff" + second,
        b"\0" * 50,
        b"[]",
        second.replace(b"{", b'{"other": 1, ', 1),
        b'{"step": 1}',
        second.replace(b": ", b': "x", "y": ', 1),
    ):
        path.write_bytes(first + b"\n" + damaged + b"\n" + third + b"\n")
        assert [record.step for record in read_metrics(path)] == [steps[0], steps[2]]


def damage_nothing(path: Path) -> None:
    return None


def remove_lines(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def overwrite_with_nul(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:1], b"\0" * 50 + b"\n", *lines[2:]]))


def tear_a_later_line(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b'{"epoch": 9.0, "st')


@pytest.mark.parametrize("has_record", [True, False])
@pytest.mark.parametrize(
    ("damage", "warned", "kept"),
    [
        (damage_nothing, "", [0, 1, 2, 3]),
        (tear_a_later_line, "", [0, 1, 2, 3]),
        (overwrite_with_nul, "had 1 damaged line, which", [0, 1, 2, 3]),
        (remove_lines, "had lines lost, which", [1, 3]),
        (empty, "had lines lost, which", [1, 3]),
    ],
)
def test_the_best_is_the_checkpoints_whatever_became_of_the_metrics(
    store: GraphStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path], None],
    warned: str,
    kept: list[int],
    has_record: bool,
) -> None:
    """The second evaluation of four is the best; the run goes on after the third, whose metrics.jsonl is damaged.

    has_record: an earlier dngd's checkpoints have the best evaluation's step and model alone.
    """
    values = iter([0.5, 0.8, 0.6, 0.7])
    original = ExactEvaluator.scores

    def scores(self: ExactEvaluator, *arguments: Any) -> dict[str, Scores]:
        found = original(self, *arguments)
        return found | {"val": replace(found["val"], accuracy=next(values))}

    monkeypatch.setattr(ExactEvaluator, "scores", scores)
    if not has_record:
        write = CheckpointFolder._write

        def older(self: CheckpointFolder, snapshot: Snapshot, *arguments: Any) -> None:
            position = {name: value for name, value in snapshot.position.items() if name != "best"}
            write(self, replace(snapshot, position=position), *arguments)

        monkeypatch.setattr(CheckpointFolder, "_write", older)
    run = tmp_path / "run"
    per_epoch = dngd.Trainer(config(str(store.path), run)).plan().total_steps
    before = fit(config(str(store.path), run, epochs=4, max_steps=3 * per_epoch))
    best_model = (run / "model.safetensors").read_bytes()
    steps = [record.step for record in before.history]
    damage(run / "metrics.jsonl")

    told = Listener()
    with hold_run_folder(config(str(store.path), run, epochs=4, resume=True), told.message) as prepared:
        after = run_rank(prepared, LocalCommunicator(), told)
    assert (after.best_val_accuracy, after.steps) == (0.8, 4 * per_epoch)
    assert (run / "model.safetensors").read_bytes() == best_model
    said = [text for text in told.texts if "metrics.jsonl" in text]
    assert len(said) == bool(warned)
    if warned:
        assert warned in said[0]
        assert f"of step {steps[1]} with validation accuracy 0.8000" in said[0]
    wanted = [step for k, step in enumerate([*steps, 4 * per_epoch]) if k in kept]
    assert [record.step for record in after.history] == wanted
    assert [record.step for record in read_metrics(run / "metrics.jsonl")] == wanted
    if has_record:
        assert after.test_accuracy == before.test_accuracy
        assert after.seconds_to_best_val == before.seconds_to_best_val


def test_a_finished_run_that_was_moved_stays_where_it_is(store: GraphStore, tmp_path: Path) -> None:
    """Its result names the folder that it had, in which there may be another run by now."""
    fit(config(str(store.path), tmp_path / "run"))
    shutil.move(tmp_path / "run", tmp_path / "moved")
    fit(config(str(store.path), tmp_path / "run", seed=5))
    others = {path: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    (tmp_path / "moved" / "report.html").unlink()
    result = fit(config(str(store.path), tmp_path / "moved", resume=True))
    assert result.run_dir == str(tmp_path / "moved")
    assert (tmp_path / "moved" / "report.html").exists()
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()} == others


@pytest.mark.parametrize("has_checkpoints", [True, False])
def test_another_graph_in_the_place_of_the_runs_is_refused(
    store: GraphStore, tmp_path: Path, has_checkpoints: bool
) -> None:
    """Unless it is asked for by name: scores on another graph are not the run's. Its model's file tells of it too."""
    shutil.copytree(store.path, tmp_path / "graph")
    run = tmp_path / "run"
    fit(config(str(tmp_path / "graph"), run))
    assert evaluate_run(run)["step"] > 0
    if not has_checkpoints:
        shutil.rmtree(run / "checkpoints")
    shutil.rmtree(tmp_path / "graph")
    changed = {"indptr": store.indptr, "indices": store.indices, "features": store.features * 2}
    GraphStore.write(tmp_path / "graph", **changed, labels=store.labels, masks=store.split_masks)
    with pytest.raises(UserError, match=r"was trained on another graph .* with --dataset"):
        evaluate_run(run)
    with pytest.raises(UserError, match="another graph"):
        predict_run(run, tmp_path / "out.parquet")
    assert evaluate_run(run, dataset=str(tmp_path / "graph"))["step"] > 0
    if not has_checkpoints:
        model = run / "model.safetensors"  # as an earlier dngd wrote it
        said = {name: value for name, value in said_in(model.read_bytes()).items() if name != "graph_digest"}
        model.write_bytes(weights_file(safetensors.torch.load(model.read_bytes()), said))
        assert evaluate_run(run)["step"] > 0


def test_an_undefined_metric_is_null(store: GraphStore, tmp_path: Path) -> None:
    """JSON has no NaN: validation nodes of one class have no ROC-AUC."""
    labels = store.labels.clone()
    labels[store.split("masks").val] = 0
    parts = {"indptr": store.indptr, "indices": store.indices, "features": store.features}
    made = GraphStore.write(tmp_path / "graph", **parts, labels=labels, masks=store.split_masks)
    run = tmp_path / "run"
    result = fit(config(str(made.path), run, metric="roc_auc"))
    assert np.isnan(result.best_val_accuracy)

    def refuse(text: str) -> None:
        raise AssertionError(text)

    written = json.loads((run / "result.json").read_text(), parse_constant=refuse)
    assert written["best_val_accuracy"] is None
    again = read_result(run / "result.json")
    assert again is not None
    assert np.isnan(again.best_val_accuracy)
    assert np.isnan(fit(config(str(made.path), run, metric="roc_auc", resume=True)).best_val_accuracy)


def test_runs_that_begin_in_one_second_have_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda form: "20260102-030405")
    config = dngd.TrainConfig(dataset="cora")
    names = []
    for _ in range(3):
        folder = default_run_dir(config)
        folder.mkdir(parents=True)
        names.append(str(folder))
    first = "runs/cora-gcn-kfac-20260102-030405"
    assert names == [first, f"{first}-2", f"{first}-3"]


@pytest.mark.parametrize("settings", [{"eval_period": 4}, {"eval_period": 1}], ids=["checkpoint", "evaluation"])
def test_a_run_whose_folder_is_removed_ends_with_a_sentence(
    store: GraphStore, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Whatever is written next; and the folder stays away."""
    run = tmp_path / "run"

    class Remover(Callback):
        def on_step(self, state: RunState) -> None:
            while state.step == 6 and run.exists():  # a checkpoint may be on its way there
                shutil.rmtree(run, ignore_errors=True)

    trainer = dngd.Trainer(config(str(store.path), run, epochs=4, **settings), callbacks=[Remover()], quiet=True)
    with pytest.raises(UserError, match=rf"^the run folder {run} is gone: .*--resume"):
        trainer.fit()
    assert not run.exists()


@pytest.mark.parametrize(
    ("ended", "asked", "named"),
    [
        ({"epochs": 1}, {}, "raise --epochs to go on"),
        ({"epochs": 2, "max_steps": 3}, {}, "raise --max-steps to go on"),
        ({"epochs": 1, "max_steps": 3}, {"epochs": 2}, "raise --max-steps to go on"),
        ({"epochs": 1, "max_steps": 4}, {}, "raise --epochs and --max-steps to go on"),
        ({"epochs": 1, "max_steps": 9}, {}, "raise --epochs to go on"),
    ],
)
def test_a_finished_run_says_what_ends_it(
    store: GraphStore, tmp_path: Path, ended: dict[str, Any], asked: dict[str, Any], named: str
) -> None:
    """And what it names makes the run longer, as nothing less does."""
    run = tmp_path / "run"
    steps = fit(config(str(store.path), run, **ended)).steps
    listener = Listener()
    again = ended | asked | {"resume": True}
    assert dngd.Trainer(config(str(store.path), run, **again), reporter=listener).fit().steps == steps
    assert f"the run is finished (step {steps}); nothing to do: {named}" in listener.texts
    more = {name: 20 for name in ("epochs", "max_steps") if f"--{name.replace('_', '-')} " in named}
    assert (
        fit(config(str(store.path), run, **(again | more | ({"max_steps": 5} if "max_steps" in more else {})))).steps
        > steps
    )


def test_a_run_that_patience_ended_says_so(
    store: GraphStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what it names makes the run longer."""
    original = ExactEvaluator.scores

    def scores(self: ExactEvaluator, *arguments: Any) -> dict[str, Scores]:
        found = original(self, *arguments)
        return found | {"val": replace(found["val"], accuracy=0.5)}

    monkeypatch.setattr(ExactEvaluator, "scores", scores)
    run = tmp_path / "run"
    ended = config(str(store.path), run, epochs=6, patience=1)
    per_epoch = dngd.Trainer(ended).plan().steps_per_epoch
    assert fit(ended).steps == 2 * per_epoch
    listener = Listener()
    again = ended.model_copy(update={"resume": True})
    assert dngd.Trainer(again, reporter=listener).fit().steps == 2 * per_epoch
    assert listener.texts[-1] == (
        f"the run was ended by patience=1 after step {2 * per_epoch} of {6 * per_epoch}; nothing to do: raise "
        "--patience (or --set patience=null) to go on"
    )
    listener = Listener()
    both = again.model_copy(update={"epochs": 2})
    assert dngd.Trainer(both, reporter=listener).fit().steps == 2 * per_epoch
    assert listener.texts[-1].endswith("nothing to do: raise --epochs and --patience to go on")
    for options, steps in ((["--epochs", "6", "--patience", "2"], 3), (["--set", "patience=null"], 6)):
        with pytest.raises(SystemExit):
            cli.main(["train", "--run-dir", str(run), "--resume", *options, "--json"])
        told = capsys.readouterr()
        assert json.loads(told.out)["steps"] == steps * per_epoch
        assert f"resumed from step {(2 if steps == 3 else 3) * per_epoch} of {6 * per_epoch}" in told.err


@pytest.mark.parametrize("is_link", [False, True], ids=["file", "dangling link"])
def test_a_run_without_a_place_for_checkpoints_is_refused(store: GraphStore, tmp_path: Path, is_link: bool) -> None:
    run = tmp_path / "run"
    fit(config(str(store.path), run))
    shutil.rmtree(run / "checkpoints")
    if is_link:
        (run / "checkpoints").symlink_to("nowhere")
    else:
        (run / "checkpoints").write_text("mine")
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    with pytest.raises(UserError, match=rf"{run}/checkpoints is no folder.*; move it away, or give another --run-dir"):
        fit(config(str(store.path), run, resume=True, epochs=2))
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


def test_a_run_of_before_g_was_low_rank_goes_on_as_it_was(store: GraphStore, tmp_path: Path) -> None:
    """Its files have no output_rank: its own configuration then says none, and another is refused before it loads."""
    run = tmp_path / "run"
    whole = fit(config(str(store.path), tmp_path / "whole", hidden=64, epochs=2, kfac={"output_rank": 0}))
    fit(config(str(store.path), run, hidden=64, kfac={"output_rank": 0}))
    lines = (run / "config.yaml").read_text().splitlines(keepends=True)
    kept = [line for line in lines if "output_rank" not in line]
    assert len(kept) == len(lines) - 1
    (run / "config.yaml").write_text("".join(kept))
    with pytest.raises(UserError, match=r"another kfac.output_rank='by damping' \(the run has 0\); use the run's own"):
        fit(config(str(store.path), run, hidden=64, epochs=2, resume=True))
    own = run_folder.run_config(RunFolder(run)).model_copy(update={"epochs": 2, "resume": True})
    assert fit(own).history[-1].val_loss == whole.history[-1].val_loss


def test_a_result_of_other_types_is_none(tmp_path: Path) -> None:
    """As one that was written by hand, or by another program; null is a number that there is none of."""
    file = tmp_path / "result.json"
    whole = {"best_val_accuracy": 0.5, "test_accuracy": 0.5, "train_seconds": 1, "seconds_to_best_val": 1.0, "steps": 3}
    whole |= {"epochs": 1.0, "world_size": 1, "seeds_per_second": 9.0, "phase_ms": {}, "bytes": {"gradient": 5}}
    whole |= {"step_ms": {"mean": 1.0, "p50": 1, "p99": 2.0}, "peak_rss_bytes": 1, "peak_gpu_bytes": 0}
    whole |= {"dropped_steps": 0, "versions": {"python": "3"}, "run_dir": "run", "resolved": {"lr": None, "x": [1]}}

    def read(**changes: Any) -> RunResult | None:
        file.write_text(json.dumps(whole | changes))
        return read_result(file)

    for good in ({}, {"step_ms": {}}, {"history": 3, "finished": False}, {"bytes": {}}):
        assert read(**good) is not None, good
    undefined = read(test_accuracy=None, seeds_per_second=None)
    assert undefined is not None
    assert math.isnan(undefined.test_accuracy)
    assert math.isnan(undefined.seeds_per_second)
    for bad in (
        {"best_val_accuracy": "x"},
        {"best_val_accuracy": True},
        {"best_val_accuracy": 10**400},
        {"step_ms": None},
        {"step_ms": {"mean": 1}},
        {"step_ms": {"mean": 1.0, "p50": "1", "p99": 2.0}},
        {"step_ms": [1.0]},
        {"bytes": None},
        {"bytes": {"gradient": 1.5}},
        {"bytes": {"gradient": 10**400}},
        {"metric": 3},
        {"metric": None},
        {"steps": None},
        {"steps": 3.5},
        {"recoveries": "x"},
        {"resolved": "a"},
        {"versions": {"python": 3}},
    ):
        assert read(**bad) is None, bad
