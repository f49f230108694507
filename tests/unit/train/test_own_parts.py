"""A run with a loss or metric of a program's own does not go on without it."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dngd
from dngd import cli
from dngd.errors import RunInterrupted, UserError
from dngd.graph import GraphStore
from dngd.train import prepare_run_folder
from dngd.train.own_parts import OWN_PARTS_NAME, check_own_parts
from dngd.train.parts import RunParts
from dngd.train.run_folder import RunFolder, resume_command
from dngd.train.trained_model import load_trained


def smoothed(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs, labels, reduction="none", label_smoothing=0.1)


def top_two(outputs: Tensor, labels: Tensor) -> float:
    return float((outputs.topk(2).indices == labels[:, None]).any(1).float().mean())


def make_adam(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(module.parameters())


def config(store: GraphStore, run: Path, **changes: Any) -> dngd.TrainConfig:
    fields: dict[str, Any] = {"engine": "local", "num_layers": 2, "fanout": (4, 4), "hidden": 8, "batch_size": 60}
    fields |= {"num_samplers": 0, "optimizer": "adam", "max_steps": 2} | changes
    return dngd.TrainConfig(dataset=str(store.path), run_dir=run, **fields)


@pytest.mark.parametrize(
    ("parts", "named", "arguments"),
    [
        ({"loss": smoothed}, "loss (smoothed)", "loss=..."),
        ({"metric": top_two}, "metric (top_two)", "metric=..."),
        ({"loss": smoothed, "metric": top_two}, "loss (smoothed) and metric (top_two)", "loss=..., metric=..."),
    ],
)
def test_a_resume_without_them_is_refused(
    store: GraphStore,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    parts: dict[str, Any],
    named: str,
    arguments: str,
) -> None:
    """Before anything is written; with them it goes on."""
    run = tmp_path / "run"
    dngd.Trainer(config(store, run), quiet=True, **parts).fit()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["train", "--run-dir", str(run), "--resume", "--max-steps", "3"])
    assert exit_info.value.code == 2
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .endswith(
            f"the run in {run} was trained with a program's own {named}, which its folder does not hold; go on from "
            f"Python: dngd.Trainer(config, {arguments}).resume()"
        )
    )
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert dngd.Trainer(config(store, run, max_steps=3), quiet=True, **parts).resume().steps == 3


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"metric": top_two}, "own metric (top_two), which its folder does not hold: accuracy stands here for it;"),
        (
            {"loss": smoothed, "metric": top_two},
            "own loss (smoothed) and metric (top_two), which its folder does not hold: the built-in loss and accuracy "
            "stand here for it; dngd.Trainer(config, loss=..., metric=...).evaluate() has the run's own",
        ),
    ],
)
def test_evaluate_says_that_other_scores_stand_for_them(
    store: GraphStore,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
    parts: dict[str, Any],
    said: str,
) -> None:
    run = tmp_path / "run"
    trainer = dngd.Trainer(config(store, run), quiet=True, **parts)
    trainer.fit()
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["evaluate", str(run), "--json"])
    assert exit_info.value.code == 0
    found = capsys.readouterr()
    assert f"warning: {run} was trained with a program's {said}" in found.err
    assert json.loads(found.out)["metric"] == "accuracy"
    assert trainer.evaluate()["metric"] == "top_two"
    assert not [warning for warning in recwarn if "program's own" in str(warning.message)]


def test_one_of_two_is_not_enough(store: GraphStore, tmp_path: Path) -> None:
    """A program's own optimizer is config.yaml's to tell of."""
    run = tmp_path / "run"
    dngd.Trainer(config(store, run), quiet=True, loss=smoothed, metric=top_two, optimizer=make_adam).fit()
    assert json.loads((run / OWN_PARTS_NAME).read_text()) == {"loss": "smoothed", "metric": "top_two"}
    with pytest.raises(UserError, match=r"own metric \(top_two\), .*Trainer\(config, loss=\.\.\., metric=\.\.\.\)"):
        dngd.Trainer(config(store, run, max_steps=3), quiet=True, loss=smoothed, optimizer=make_adam).resume()


def test_a_run_of_an_earlier_version_goes_on(store: GraphStore, tmp_path: Path) -> None:
    run = tmp_path / "run"
    dngd.Trainer(config(store, run), quiet=True, loss=smoothed).fit()
    (run / OWN_PARTS_NAME).unlink()
    assert dngd.Trainer(config(store, run, max_steps=3), quiet=True).resume().steps == 3
    assert not (run / OWN_PARTS_NAME).exists()


def test_a_new_run_in_a_folder_that_is_free_has_its_own_note(store: GraphStore, tmp_path: Path) -> None:
    class Fails(dngd.Callback):
        def on_step(self, run: dngd.RunState) -> None:
            raise UserError("not yet")

    run = tmp_path / "run"
    with pytest.raises(UserError, match="not yet"):
        dngd.Trainer(config(store, run), quiet=True, loss=smoothed, callbacks=[Fails()]).fit()
    assert (run / OWN_PARTS_NAME).exists()
    dngd.Trainer(config(store, run), quiet=True).fit()
    assert not (run / OWN_PARTS_NAME).exists()


def test_a_damaged_note_is_said(store: GraphStore, tmp_path: Path) -> None:
    run = tmp_path / "run"
    prepare_run_folder(config(store, run), {"loss": "smoothed"})
    for content in ("{", "3", "null", '["loss"]'):
        (run / OWN_PARTS_NAME).write_text(content)
        with pytest.raises(UserError, match=rf"{OWN_PARTS_NAME} is not as a run writes it"):
            check_own_parts(config(store, run, resume=True), ())


def test_what_goes_on_with_such_a_run_is_its_program(store: GraphStore, tmp_path: Path) -> None:
    """Said after a Ctrl-C, and where the model's file is damaged."""
    run = tmp_path / "run"
    made = config(store, run, max_steps=3)
    assert resume_command(made, RunFolder(run), RunParts(module=nn.Linear(2, 2), loss=smoothed).own()) == (
        "Trainer.resume(), which needs the program's own module and loss"
    )

    class Stops(dngd.Callback):
        def on_step(self, state: dngd.RunState) -> None:
            if state.step == 1:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(RunInterrupted, match=r"after step 2 of 3; go on with Trainer.resume\(\), which needs the prog"):
        dngd.Trainer(made, quiet=True, metric=top_two, callbacks=[Stops()]).fit()
    assert dngd.Trainer(made, quiet=True, metric=top_two).resume().steps == 3
    (run / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"; Trainer.resume\(\) writes it anew"):
        load_trained(run)


class Mixed(nn.Module):
    """Layers of two types."""

    def __init__(self, shape: dngd.GraphShape, types: tuple[torch.dtype, torch.dtype]) -> None:
        super().__init__()
        self.first = nn.Linear(shape.num_features, 8).to(types[0])
        self.second = nn.Linear(8, shape.num_classes).to(types[1])

    def forward(self, batch: dngd.GraphBatch) -> Tensor:
        hidden = self.first(batch.x[: batch.seeds.numel()].to(self.first.weight.dtype)).relu()
        out: Tensor = self.second(hidden.to(self.second.weight.dtype))
        return out


def test_trained_parameters_of_two_types_are_refused(store: GraphStore, tmp_path: Path) -> None:
    """Both are named; where one of them is frozen, there is but one type to sum."""

    def module(shape: dngd.GraphShape) -> nn.Module:
        return Mixed(shape, (torch.float32, torch.float64))

    with pytest.raises(UserError, match=r"first\.weight and second\.weight are float32 and float64, and workers sum"):
        dngd.Trainer(config(store, tmp_path / "run"), module=module, quiet=True).fit()

    def frozen(shape: dngd.GraphShape) -> nn.Module:
        made = module(shape)
        made.first.requires_grad_(False)
        return made

    assert dngd.Trainer(config(store, tmp_path / "frozen"), module=frozen, quiet=True).fit().steps == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_module_of_another_type_is_trained(store: GraphStore, tmp_path: Path, dtype: torch.dtype) -> None:
    made = dngd.Trainer(config(store, tmp_path / "run"), module=lambda shape: Mixed(shape, (dtype, dtype)), quiet=True)
    result = made.fit()
    assert result.steps == 2
    assert result.dropped_steps == 0
    assert made.best_model().first.weight.dtype == dtype
