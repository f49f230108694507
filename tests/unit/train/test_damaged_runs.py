"""Runs whose files were damaged: one sentence says which file, what is wrong with it, and what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import dngd
from dngd.errors import DivergedError, UserError
from dngd.graph import GraphStore
from dngd.train.checkpoint import said_in
from dngd.train.evaluate_run import evaluate_run
from dngd.train.export import export_run
from dngd.train.loop import TrainingLoop
from dngd.train.predict import predict_run
from dngd.train.progress import SilentReporter
from dngd.train.trained_model import load_trained


@pytest.fixture(scope="module")
def trained(store: GraphStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps."""
    run = tmp_path_factory.mktemp("trained") / "run"
    fit(store, run)
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it that may be damaged."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def fit(store: GraphStore, run: Path, **changes: object) -> None:
    fields = {"engine": "local", "num_layers": 2, "fanout": (4, 4), "hidden": 8, "batch_size": 60, "max_steps": 2}
    dngd.Trainer(dngd.TrainConfig(dataset=str(store.path), run_dir=run, **(fields | changes)), quiet=True).fit()


def refusal(run: Path) -> str:
    with pytest.raises(UserError) as info:
        load_trained(run)
    assert "\n" not in str(info.value)
    return str(info.value)


@pytest.mark.parametrize("part", [0, 1, 8, 9, 50, 0.5, 0.99])
def test_a_model_that_was_cut_short(run: Path, part: float) -> None:
    file = run / "model.safetensors"
    whole = file.read_bytes()
    kept = whole[: int(part * len(whole)) if isinstance(part, float) else part]
    file.write_bytes(kept)
    said = refusal(run)
    assert said.startswith(f"{file} is damaged")
    assert f"in {len(kept)} bytes" in said
    assert f"dngd train --run-dir {run} --resume writes it anew" in said


def test_a_run_folder_whose_name_is_not_utf8(run: Path, tmp_path: Path) -> None:
    """It is not damaged: safetensors opens no such path, and says no such name of a file."""
    other = run.rename(tmp_path / "run\udcff")
    assert load_trained(other).step == 2
    assert evaluate_run(other)["step"] == 2
    assert predict_run(other, tmp_path / "p\udcff").rows
    assert said_in(export_run(other, tmp_path / "e\udcff").read_bytes())["dngd.run"] == "run?"
    assert export_run(other, tmp_path / "pyg", format="pyg").is_dir()


def test_a_model_that_is_no_file(run: Path) -> None:
    (run / "model.safetensors").unlink()
    (run / "model.safetensors").mkdir()
    assert refusal(run).startswith(f"{run / 'model.safetensors'} cannot be read (Is a directory); dngd train")


@pytest.mark.parametrize("content", [b"\xff" * 500, b"\0" * 500, b"[1, 2]", b'{"step": 3}', b"PK\x03\x04" * 40])
def test_what_is_no_model(run: Path, content: bytes) -> None:
    (run / "model.safetensors").write_bytes(content)
    assert refusal(run).startswith(f"{run / 'model.safetensors'} is damaged, or no safetensors file (")


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"step": None}, "no 'step'"),
        ({"step": "x"}, "'x'"),
        ({"label_names": "{"}, "cannot be read"),
        ({"label_names": "3"}, "label_names is 3"),
        ({"label_names": '[1, "b"]'}, 'label_names is [1, "b"]'),
        ({"label_names": "[true, false]"}, "label_names is [true, false]"),
    ],
)
def test_a_model_that_says_other_things_of_itself(run: Path, changes: dict[str, str | None], what: str) -> None:
    file = run / "model.safetensors"
    said = {name: value for name, value in (said_in(file.read_bytes()) | changes).items() if value is not None}
    file.write_bytes(safetensors.torch.save(safetensors.torch.load(file.read_bytes()), said))
    told = refusal(run)
    assert told.startswith(f"{file} is not as dngd train wrote it")
    assert what in told
    assert "--resume writes it anew" in told


@pytest.mark.parametrize(
    ("weights", "what"),
    [
        ({"w": torch.ones(3)}, "no matrix layers.0.linear.weight"),
        ({"layers.0.linear.weight": torch.ones(3), "layers.1.linear.weight": torch.ones(())}, "no matrix layers.0"),
        ({"layers.0.linear.weight": torch.ones(8, 16)}, "no matrix layers.1.linear.weight"),
        ({"layers.0.linear.weight": torch.ones(9, 16), "layers.1.linear.weight": torch.ones(5, 9)}, "is nothing there"),
    ],
)
def test_the_weights_of_another_model(run: Path, weights: dict[str, torch.Tensor], what: str) -> None:
    file = run / "model.safetensors"
    file.write_bytes(safetensors.torch.save(weights, {"step": "2"}))
    told = refusal(run)
    assert told.startswith(f"{file} is of another model")
    assert what in told
    assert f"{run / 'config.yaml'} says gcn of 2 layers of width 8: put back the run's own" in told


def test_the_model_of_another_run(store: GraphStore, run: Path, tmp_path: Path) -> None:
    fit(store, tmp_path / "other", model="sage")
    shutil.copy(tmp_path / "other" / "model.safetensors", run)
    assert "layers.1.linear.weight is [5, 16] there and [5, 8] in this model" in refusal(run)


def test_each_command_says_so_and_a_resume_mends_it(store: GraphStore, run: Path, tmp_path: Path) -> None:
    file = run / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:100])
    told = refusal(run)
    for command in (
        evaluate_run,
        lambda run: predict_run(run, tmp_path / "p"),
        lambda run: export_run(run, tmp_path / "e"),
    ):
        with pytest.raises(UserError) as info:
            command(run)
        assert str(info.value) == told
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    fit(store, run, resume=True)
    assert file.read_bytes() == whole


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b"\xff\xfe\x01", "is no text in UTF-8"),
        (b"\0" * 40, "is not YAML"),
        (b"- 1\n- 2\n", "holds a list"),
        (b"3", "holds one value"),
        (b"data", "holds one text"),
        (b'{"dataset": "x"}', "is cut short: it has no 'resume'"),
        (b"resume: false\n", "dataset is required"),
        (b"dataset: x\nkfac: [1]\nresume: false\n", "kfac=[1]"),
        (b"dataset: x\nhiden: 3\nresume: false\n", "did you mean hidden?"),
    ],
)
def test_a_configuration_that_no_run_wrote(store: GraphStore, run: Path, content: bytes, what: str) -> None:
    file = run / "config.yaml"
    file.write_bytes(content)
    told = refusal(run)
    assert told.startswith(f"configuration file {file} ")
    assert what in told
    assert told.endswith("; put back a copy of the run's own")
    with pytest.raises(UserError) as info:
        fit(store, run, resume=True)
    assert str(info.value) == told
    assert file.read_bytes() == content


def test_a_damaged_state_of_a_checkpoint(store: GraphStore, run: Path) -> None:
    """Each that reads it passes over it, or says which it is."""
    for state in (run / "checkpoints").glob("*/state.json"):
        state.write_bytes(b"[" * 100_000)
    (run / "result.json").write_bytes(b"[" * 100_000)
    assert evaluate_run(run)["step"] == 2
    with pytest.raises(UserError, match=r"all checkpoints .* are damaged, .*\(it is nested too deeply\)"):
        fit(store, run, resume=True)


def test_a_configuration_that_was_cut_short_anywhere(run: Path) -> None:
    """At the end of a line too, where it is YAML that leaves the seed, say, at its default."""
    file = run / "config.yaml"
    lines = file.read_text().splitlines(keepends=True)
    assert json.dumps(lines[-1:]) == '["resume: false\\n"]'
    for count in range(len(lines)):
        file.write_text("".join(lines[:count]))
        assert refusal(run).startswith(f"configuration file {file} ")
        file.write_text("".join(lines[:count]) + lines[count][: len(lines[count]) // 2])
        assert refusal(run).startswith(f"configuration file {file} ")


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ([], "is finished, but its checkpoints are gone:"),
        (["result.json"], "was evaluated, but its checkpoints are gone:"),
        (["result.json", "model.safetensors"], "was evaluated, but"),
        (["result.json", "metrics.jsonl"], "was evaluated, but"),
    ],
    ids=["finished", "killed", "no model", "no metrics"],
)
def test_a_run_whose_checkpoints_are_gone_is_not_begun_anew(
    store: GraphStore, run: Path, lost: list[str], said: str
) -> None:
    for name in lost:
        (run / name).unlink()
    shutil.rmtree(run / "checkpoints")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError) as info:
        fit(store, run, resume=True)
    assert str(info.value).startswith(f"the run in {run} {said}")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("at", ["before an evaluation", "before the first checkpoint", "while it is written"])
def test_a_run_that_ended_before_its_first_checkpoint_begins_anew(store: GraphStore, run: Path, at: str) -> None:
    """No checkpoint was lost; an evaluation and a model may be there already."""
    model = (run / "model.safetensors").read_bytes()
    shutil.rmtree(run / "checkpoints")
    (run / "result.json").unlink()
    (run / "checkpoints").mkdir()
    if at == "while it is written":
        (run / "checkpoints" / ".writing-00000002").mkdir()
    if at == "before an evaluation":
        (run / "metrics.jsonl").unlink()
        (run / "model.safetensors").unlink()
    fit(store, run, resume=True)
    assert (run / "model.safetensors").read_bytes() == model


def test_a_run_has_a_folder_of_checkpoints_before_it_has_one(
    store: GraphStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By which one that was killed is told from one whose checkpoints are gone."""
    seen: list[bool] = []
    original = TrainingLoop._train_step

    def step(self: TrainingLoop, *given: Any) -> bool:
        seen.append(self.folder.checkpoints.is_dir() and not any(self.folder.checkpoints.iterdir()))
        return original(self, *given)

    monkeypatch.setattr(TrainingLoop, "_train_step", step)
    fit(store, tmp_path / "new")
    assert seen[0]


class Listener(SilentReporter):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def message(self, text: str) -> None:
        self.texts.append(text)


def wild(store: GraphStore, run: Path, listener: Listener, **changes: Any) -> None:
    fields = {"optimizer": "sgd", "engine": "local", "num_layers": 2, "fanout": (4, 4), "hidden": 8, "batch_size": 60}
    fields |= {"dataset": str(store.path), "run_dir": run, "lr": 1e37, "max_steps": 6} | changes
    dngd.Trainer(dngd.TrainConfig(**fields), reporter=listener).fit()


def test_a_run_whose_outputs_are_never_finite_is_no_result(store: GraphStore, tmp_path: Path) -> None:
    """They are wrong answers, not ones of whichever class argmax makes of them; told once."""
    listener = Listener()
    with pytest.raises(DivergedError, match=r"no output of the network is finite at step \d+, .* nothing was learnt"):
        wild(store, tmp_path / "run", listener)
    assert not (tmp_path / "run" / "result.json").exists()
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {record["val_accuracy"] for record in records} == {0.0}
    said = [text for text in listener.texts if "not finite and" in text]
    assert len(said) == 1
    assert "100.0% of the validation outputs are not finite and count as wrong" in said[0]
