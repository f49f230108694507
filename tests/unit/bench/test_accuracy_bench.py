"""The accuracy benchmark on a tiny graph: equal work for all, in turns, clock stopped during evaluation."""

from __future__ import annotations

from typing import Any, cast

import pytest

from dngd.bench import AccuracyOptions, run_accuracy_bench
from dngd.bench.competitors import Setting
from dngd.bench.learner import Learner
from dngd.bench.runs import FullFeed, Run, evaluation_steps, slices
from dngd.config import TrainConfig
from dngd.errors import UserError
from dngd.graph import GraphStore
from dngd.train.evaluation import Scores


def config(**changes: Any) -> TrainConfig:
    fields: dict[str, Any] = {"dataset": "", "model": "gcn", "num_layers": 2, "hidden": 8, "fanout": (4, 4)}
    return TrainConfig(**(fields | {"batch_size": 60, "epochs": 4, "engine": "local"} | changes))


def test_evaluations_are_at_multiples_and_at_the_end() -> None:
    assert evaluation_steps(10, 4) == [4, 8, 10]
    assert evaluation_steps(8, 4) == [4, 8]


def test_turns_end_at_every_evaluation_and_are_short() -> None:
    assert slices([5, 10, 12], 50) == [5, 10, 12]
    ends = slices([120, 130], 50)
    assert ends == [40, 80, 120, 130]


def test_sampled_runs_do_equal_work_in_turns(store: GraphStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variant that changes nothing has the very same curve as what it varies: same weights, batches, dropout."""
    turns: list[tuple[str, int]] = []
    real = Run.advance

    def advance(self: Run, last_step: int) -> None:
        turns.append((self.setting.label, last_step))
        real(self, last_step)

    monkeypatch.setattr(Run, "advance", advance)
    result = run_accuracy_bench(
        AccuracyOptions(
            config(kfac={"inverse_delay": 0}),
            [str(store.path)],
            optimizers=("kfac",),
            seeds=(1,),
            rates="kfac=0.1",
            variants="same:kfac.inverse_delay=0",
            eval_steps=5,
            targets=(0.01, 1.0),
            threads=1,
        )
    )
    one, two = "kfac lr=0.1", "same lr=0.1"
    assert turns == [(one, 5), (two, 5), (two, 10), (one, 10), (two, 15), (one, 15), (one, 16), (two, 16)]
    (data,) = result["datasets"].values()
    kfac, same = (data["settings"][label]["runs"][0] for label in (one, two))
    assert kfac["step"] == same["step"] == [0, 5, 10, 15, 16]
    for key in ("val_accuracy", "val_loss", "test_accuracy"):
        assert kfac[key] == same[key]
    for run in (kfac, same):
        assert run["seconds"] == sorted(run["seconds"])
        assert run["seconds"][0] == 0
        assert run["sample_wait_seconds"] <= run["train_seconds"] == run["seconds"][-1]
    low, high = data["comparison"]
    assert low["groups"]["kfac"]["steps"] == 0
    assert high["groups"]["kfac"]["seconds"] is None
    assert high["groups"]["kfac"]["seconds_ratio"] is None


def test_evaluation_is_off_the_clock() -> None:
    run = Run(Setting("adam", "adam", 0.01), config(), cast(Learner, None), cast(FullFeed, None), 1, seconds=2.0)
    scores = {"val": Scores(float("nan"), 0.5), "test": Scores(1.0, 0.25)}
    run.evaluate(lambda _: scores)
    assert run.seconds == 2.0
    point = {"step": 0, "seconds": 2.0, "val_accuracy": 0.5, "val_loss": None, "test_accuracy": 0.25}
    assert run.evaluations == [point]


def test_full_batch_default_targets_and_means_over_seeds(store: GraphStore) -> None:
    result = run_accuracy_bench(
        AccuracyOptions(
            config(batch_size="full", fanout=None, epochs=20),
            [str(store.path)],
            seeds=(0, 3),
            rates="adam=0.01,0.03",
            threads=1,
        )
    )
    (data,) = result["datasets"].values()
    assert (data["batch_size"], data["steps_per_epoch"], data["total_steps"], data["eval_steps"]) == (240, 1, 20, 1)
    settings = data["settings"]
    assert list(settings) == ["kfac lr=0.1", "adam lr=0.01", "adam lr=0.03"]
    adam = [of for of in settings.values() if of["group"] == "adam"]
    best = max(of["best"]["mean"] for of in adam)
    assert data["targets"] == pytest.approx([best - 0.005, best])
    for of in settings.values():
        assert [run["seed"] for run in of["runs"]] == [0, 3]
        means = [sum(pair) / 2 for pair in zip(*(run["val_accuracy"] for run in of["runs"]))]
        assert of["mean_curve"]["val_accuracy"] == pytest.approx(means)
        assert of["best"]["mean"] == pytest.approx(max(means))
        assert of["final"]["mean"] == pytest.approx(means[-1])
        assert len(of["mean_curve"]["step"]) == 21
    # Some setting of Adam reaches Adam's own best, and is the one it is compared by.
    assert data["comparison"][1]["groups"]["adam"]["seconds"] is not None
    assert data["comparison"][1]["groups"]["adam"]["seconds_ratio"] == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizers": ("kfac",)}, "give --targets, or add adam"),
        ({"eval_steps": 0}, "eval_steps=0 is out of range"),
        ({"eval_steps": 1000}, "a run has 16 steps"),
        ({"rates": "adam=big"}, "no learning rate"),
        ({"datasets": ()}, "no data set"),
        ({"datasets": ("no-such-graph",)}, "no-such-graph"),
        ({"threads": 0}, "threads=0"),
    ],
)
def test_bad_options_are_told_before_training(store: GraphStore, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_accuracy_bench(AccuracyOptions(config(), **({"datasets": [str(store.path)]} | options)))
