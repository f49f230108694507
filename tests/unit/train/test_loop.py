"""What each step of the loop does, seen from inside."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch_geometric.nn import SAGEConv

import dngd
from dngd.comm import FlatGradients, LocalCommunicator
from dngd.config import LearningRateKind
from dngd.errors import TrainingError, UserError
from dngd.graph import GraphStore
from dngd.optim import NaturalGradient, learning_rate
from dngd.train import TrainingLoop, loop, prepare_run_folder, run_rank
from dngd.train.checkpoint_writer import CheckpointWriter
from dngd.train.evaluation import ExactEvaluator, Scores
from dngd.train.metrics import EvaluationRecord, MetricsLog, StepClock, read_metrics
from dngd.train.parts import RunParts
from dngd.train.progress import SilentReporter
from dngd.train.supervision import Attempt, Supervision


def config(store: GraphStore, run_dir: Path, **changes: Any) -> dngd.TrainConfig:
    fields: dict[str, Any] = {
        "dataset": str(store.path),
        "engine": "local",
        "num_layers": 2,
        "fanout": (5, 5),
        "hidden": 16,
        "batch_size": 50,
        "epochs": 2,
        "num_workers": 2,
        "num_samplers": 0,
        "run_dir": run_dir,
    }
    return dngd.TrainConfig(**(fields | changes))


def run(configuration: dngd.TrainConfig) -> TrainingLoop:
    made = TrainingLoop(prepare_run_folder(configuration), LocalCommunicator(), SilentReporter())
    made.run()
    return made


@pytest.mark.parametrize(("chosen", "used", "peak"), [(None, "hyperbolic", 0.3), ("cosine", "cosine", 0.1)])
def test_each_step_has_its_rate_its_seeds_and_mean_gradients(
    store: GraphStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    chosen: str | None,
    used: LearningRateKind,
    peak: float,
) -> None:
    seen: list[tuple[float, float, bool]] = []
    original = NaturalGradient.step

    def recording(self: NaturalGradient, closure: None = None, **arguments: Any) -> None:
        seen.append((self.param_groups[0]["lr"], arguments["num_samples"], arguments["mean_gradients"]))
        original(self, closure, **arguments)

    monkeypatch.setattr(NaturalGradient, "step", recording)
    num_train = len(store.split("masks").train)
    made = run(config(store, tmp_path / "run", batch_size=50, warmup_steps=2, lr_schedule=chosen, lr_half_steps=7))
    per_epoch = made.plan.steps_per_epoch
    assert made.config.learning_rate == peak
    rates = [learning_rate(step, 2 * per_epoch, peak, used, 2, 7) for step in range(2 * per_epoch)]
    assert [rate for rate, _, _ in seen] == rates
    sizes = [min(100, num_train - 100 * step) for step in range(per_epoch)]
    assert [n for _, n, _ in seen] == sizes * 2
    assert all(mean for _, _, mean in seen)


def test_train_loss_is_of_its_own_epoch(store: GraphStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sums: list[tuple[float, float]] = []
    original = FlatGradients.reduce_

    def recording(self: FlatGradients, communicator: Any) -> Any:
        out = original(self, communicator)
        sums.append((out.loss_sum, out.num_seeds))
        return out

    monkeypatch.setattr(FlatGradients, "reduce_", recording)
    made = run(config(store, tmp_path / "run"))
    half = made.plan.steps_per_epoch
    for record, part in zip(made.history, (sums[:half], sums[half:])):
        assert record.train_loss == pytest.approx(sum(s for s, _ in part) / sum(n for _, n in part))


@pytest.mark.parametrize("first", [0.5, float("nan")])
def test_the_best_is_chosen_by_validation(
    store: GraphStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: float
) -> None:
    script = iter([(first, 0.9), (0.7, 0.6), (float("nan"), 0.8), (0.6, 0.95)])

    def scripted(self: ExactEvaluator, model: nn.Module, split: Any) -> dict[str, Scores]:
        val, test = next(script)
        return {"val": Scores(1.0, val), "test": Scores(1.0, test)}

    monkeypatch.setattr(ExactEvaluator, "scores", scripted)
    result = run_rank(
        prepare_run_folder(config(store, tmp_path / "run", epochs=4)), LocalCommunicator(), SilentReporter()
    )
    assert (result.best_val_accuracy, result.test_accuracy) == (0.7, 0.6)


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "kfac"])
def test_one_non_finite_step_changes_nothing(
    store: GraphStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    """A NaN gradient with a finite loss: parameters and moments stay as they are."""
    original = FlatGradients.reduce_
    calls = 0

    def poisoned(self: FlatGradients, communicator: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            self._flat[3] = float("nan")
        return original(self, communicator)

    monkeypatch.setattr(FlatGradients, "reduce_", poisoned)
    weights: list[torch.Tensor] = []
    account = TrainingLoop._account

    def recording(self: TrainingLoop, sums: Any, step_in_epoch: int) -> None:
        weights.append(torch.cat([p.detach().flatten().clone() for p in self.model.parameters()]))
        account(self, sums, step_in_epoch)

    monkeypatch.setattr(TrainingLoop, "_account", recording)
    made = run(config(store, tmp_path / "run", optimizer=optimizer))
    assert made.dropped_steps == 1
    assert torch.equal(weights[1], weights[0])
    assert not torch.equal(weights[2], weights[1])
    assert all(torch.isfinite(w).all() for w in weights)


def test_resume_takes_its_own_best_model(store: GraphStore, tmp_path: Path) -> None:
    """A best model written after the last checkpoint belongs to a time line that is given up."""
    run_dir = tmp_path / "run"
    run(config(store, run_dir, epochs=1))
    kept = (run_dir / "model.safetensors").read_bytes()
    (run_dir / "model.safetensors").write_bytes(b"of a later step")
    run(config(store, run_dir, epochs=1, resume=True))
    assert (run_dir / "model.safetensors").read_bytes() == kept


def test_a_checkpoint_of_other_settings_is_refused_before_its_configuration_is_overwritten(
    store: GraphStore, tmp_path: Path
) -> None:
    """As when a newer dngd has another default for what the saved configuration leaves open."""
    run_dir = tmp_path / "run"
    run(config(store, run_dir, epochs=2))
    saved = (run_dir / "config.yaml").read_text().replace("epochs: 2", "epochs: 1").replace("seed: 0", "seed: 7")
    (run_dir / "config.yaml").write_text(saved)
    files = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"cannot resume with another seed=7 \(the run has 0\)"):
        prepare_run_folder(config(store, run_dir, epochs=3, seed=7, resume=True))
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == files
    newest = max((run_dir / "checkpoints").iterdir())
    for path in (newest, newest.with_name(newest.name + "0")):  # damaged ones, and none, say nothing
        path.mkdir(exist_ok=True)
        (path / "state.json").write_text('{"checksum": ""}')
    older = sorted((run_dir / "checkpoints").iterdir())[0]
    with pytest.raises(UserError, match="cannot resume with another seed=7"):
        prepare_run_folder(config(store, run_dir, epochs=3, seed=7, resume=True))
    (older / "state.json").unlink()
    assert prepare_run_folder(config(store, run_dir, epochs=3, seed=7, resume=True)).seed == 7


def test_factor_health_is_kept_with_each_evaluation(store: GraphStore, tmp_path: Path) -> None:
    """What a run wrote after its last checkpoint is dropped when it goes on; a first-order run has no such file."""
    path = tmp_path / "run" / "health.jsonl"
    made = run(config(store, tmp_path / "run", epochs=1))
    evaluated = [record.step for record in made.history]
    lines = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == evaluated
    preconditioner = made.optimizer.preconditioner
    assert preconditioner is not None
    assert set(lines[-1]["layers"]) == set(preconditioner.layers)
    assert all(values["a_condition"] > 1 for values in lines[-1]["layers"].values())
    with open(path, "a") as file:
        file.write(json.dumps({"step": 999, "layers": {}}) + '\n{"step": 10')
    again = run(config(store, tmp_path / "run", epochs=2, resume=True))
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps == [record.step for record in again.history]
    run(config(store, tmp_path / "adam", epochs=1, optimizer="adam"))
    assert not (tmp_path / "adam" / "health.jsonl").exists()


def test_metrics_are_json_even_without_a_loss(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(EvaluationRecord(1.0, 3, float("nan"), 0.5, 0.6, 0.7, 1.0))
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    [record] = read_metrics(tmp_path / "metrics.jsonl")
    assert record.train_loss != record.train_loss
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 2.0, "st')
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


class Listener(SilentReporter):
    """Keeps messages."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def message(self, text: str) -> None:
        self.texts.append(text)


def test_a_later_attempt_says_what_happened_and_what_is_done_again(store: GraphStore, tmp_path: Path) -> None:
    """Steps 15 to 20 were done, and are done again from the checkpoint of step 12; the run is the one it would be."""
    straight = run(config(store, tmp_path / "straight", epochs=6))
    per_epoch = straight.plan.steps_per_epoch
    run(config(store, tmp_path / "run", epochs=6, max_steps=2 * per_epoch))
    heard: list[tuple[int, int]] = []
    supervision = Supervision(
        Attempt(number=3, reason="rank 1 was lost", reached_step=2 * per_epoch + 2, recoveries=2, steps_repeated=5),
        resumed=lambda step, repeated: heard.append((step, repeated)),
    )
    listener = Listener()
    result = run_rank(
        prepare_run_folder(config(store, tmp_path / "run", epochs=6, resume=True)),
        LocalCommunicator(),
        listener,
        supervision=supervision,
    )
    total = 6 * per_epoch
    assert listener.texts[-1] == (
        f"rank 1 was lost; the run goes on from step {2 * per_epoch} of {total} with 1 worker, 2 steps are done again"
    )
    assert heard == [(2 * per_epoch, 2)]
    assert (result.recoveries, result.steps_repeated) == (2, 7)
    assert [record.val_loss for record in result.history] == [record.val_loss for record in straight.history]


def test_an_attempt_before_the_first_checkpoint_starts_over(store: GraphStore, tmp_path: Path) -> None:
    straight = run(config(store, tmp_path / "straight"))
    prepared = prepare_run_folder(config(store, tmp_path / "run", resume=True))
    # What the attempt before left behind, and the beginning does not have.
    (tmp_path / "run" / "metrics.jsonl").write_text((tmp_path / "straight" / "metrics.jsonl").read_text())
    listener = Listener()
    supervision = Supervision(Attempt(number=2, reason="rank 0 was lost", reached_step=4, recoveries=1))
    result = run_rank(prepared, LocalCommunicator(), listener, supervision=supervision)
    assert "rank 0 was lost; the run goes on from step 0" in listener.texts[-1]
    assert "4 steps are done again" in listener.texts[-1]
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == len(straight.history)
    assert result.steps_repeated == 4


def test_an_evaluation_comes_with_measurements(store: GraphStore, tmp_path: Path) -> None:
    """What the dashboard of Ray shows: step phases, bytes, staleness and factor health."""
    measured: list[tuple[EvaluationRecord, dict[str, float]]] = []
    supervision = Supervision(measured=lambda record, values: measured.append((record, values)))
    prepared = prepare_run_folder(config(store, tmp_path / "run"))
    result = run_rank(prepared, LocalCommunicator(), SilentReporter(), supervision=supervision)
    assert [record for record, _ in measured] == result.history
    values = measured[-1][1]
    assert {"step_ms/p50", "phase_ms/forward", "phase_ms/optimizer.refresh", "dropped_steps"} <= values.keys()
    health = {name for name in values if name.startswith("factor_health/")}
    assert any(name.endswith("/staleness") for name in health)
    assert any(name.endswith("/a_condition") for name in health)
    assert values["phase_ms/forward"] > 0


class Zeroing(torch.optim.SGD):
    """Ends its step as some optimizers do."""

    def step(self, closure: Any = None) -> Any:
        out = super().step(closure)
        self.zero_grad()
        return out


def test_an_optimizer_that_sets_gradients_to_none_has_the_same_curve(store: GraphStore, tmp_path: Path) -> None:
    curves = []
    for kind in (torch.optim.SGD, Zeroing):
        given = config(store, tmp_path / kind.__name__, optimizer="custom")
        parts = RunParts(optimizer=lambda model, kind=kind: kind(model.parameters(), lr=0.1))  # type: ignore[misc]
        made = TrainingLoop(prepare_run_folder(given), LocalCommunicator(), SilentReporter(), parts=parts)
        curves.append([(r.train_loss, r.val_loss) for r in made.run().history])
    assert curves[0] == curves[1]


class Thaws(dngd.Callback):
    """Unfreezes everything after two steps."""

    def on_step(self, run: Any) -> None:
        if run.step == 2:
            run.model.requires_grad_(True)


def test_a_layer_that_is_unfrozen_in_a_run_is_refused(store: GraphStore, tmp_path: Path) -> None:
    def module(shape: dngd.GraphShape) -> nn.Module:
        made = dngd.PyGStack([SAGEConv(shape.num_features, 8), SAGEConv(8, shape.num_classes)])
        made.convs[0].requires_grad_(False)
        return made

    given = config(store, tmp_path / "run", model="custom", optimizer="sgd")
    parts = RunParts(module=module, callbacks=(Thaws(),))
    made = TrainingLoop(prepare_run_folder(given), LocalCommunicator(), SilentReporter(), parts=parts)
    with pytest.raises(UserError, match=r"parameter convs\.0\.lin_l\.weight was frozen when the run was set up"):
        made.run()
    assert made.step == 2


def test_the_clock_says_where_a_step_is(store: GraphStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each phase is seen in its step; a failure leaves the clock where it came up."""
    seen: list[tuple[str, int]] = []
    supervision = Supervision()
    inside = StepClock.inside

    def recording(self: StepClock, name: str) -> Any:
        seen.append((name, self.activity.step))
        return inside(self, name)

    monkeypatch.setattr(StepClock, "inside", recording)
    reduce_, calls = FlatGradients.reduce_, []

    def failing(self: FlatGradients, communicator: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            raise RuntimeError("the network is gone")
        return reduce_(self, communicator)

    monkeypatch.setattr(FlatGradients, "reduce_", failing)
    prepared = prepare_run_folder(config(store, tmp_path / "run", epochs=3))
    with pytest.raises(RuntimeError, match="the network is gone"):
        run_rank(prepared, LocalCommunicator(), SilentReporter(), supervision=supervision)
    assert (supervision.clock.activity.phase, supervision.clock.activity.step) == ("reduce", 5)
    for phase in ("sample_wait", "forward", "observe", "backward", "reduce", "optimizer", "refresh"):
        assert {(phase, 0), (phase, 4)} <= set(seen)
    per_epoch = next(step for phase, step in seen if phase == "evaluation")
    assert ("checkpoint", per_epoch) in seen


def test_the_clock_keeps_the_step_that_a_resumed_run_goes_on_from() -> None:
    clock = StepClock()
    with clock.inside("resuming"):
        clock.at_step(40)
    assert (clock.activity.phase, clock.activity.step) == ("setup", 40)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl"), UserError),
        # Another node may do better.
        (OSError(errno.ESTALE, "Stale file handle", "metrics.jsonl"), TrainingError),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), ConnectionResetError),
    ],
)
def test_only_what_a_user_must_mend_is_called_so(
    store: GraphStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, kind: type[Exception]
) -> None:
    def fails(*_: Any) -> None:
        raise error

    monkeypatch.setattr(loop.MetricsLog, "append", fails)
    prepared = prepare_run_folder(config(store, tmp_path / "run"))
    with pytest.raises(kind) as caught:
        run_rank(prepared, LocalCommunicator(), SilentReporter())
    assert type(caught.value) is kind


def test_the_last_checkpoint_is_worth_a_second_wait(
    store: GraphStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left out because the one before took too long to write, it is made once training has ended."""
    made = TrainingLoop(prepare_run_folder(config(store, tmp_path / "run")), LocalCommunicator(), SilentReporter())
    asked: list[int] = []

    def busy(self: CheckpointWriter, snapshot: Any) -> None:
        asked.append(snapshot.step)
        if asked.count(snapshot.step) == 1:
            self.left_out_step = snapshot.step
        else:
            original(self, snapshot)

    original = CheckpointWriter.save
    monkeypatch.setattr(CheckpointWriter, "save", busy)
    result = made.run()
    assert asked == [result.steps // 2, result.steps, result.steps]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{result.steps:08d}"]
