"""The step benchmark on a tiny graph: who steps on what, in which order, how often. No times are asserted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dngd.bench import BenchProgress, StepOptions, run_step_bench
from dngd.bench.learner import Batch, Learner
from dngd.bench.step import describe_config, enough_warmup, kfac_period
from dngd.bench.timing import turn_order
from dngd.config import KFACConfig, TrainConfig
from dngd.errors import TrainingError, UserError
from dngd.graph import GraphStore

PERIOD = 6


def config(store: GraphStore, **changes: Any) -> TrainConfig:
    kfac = {"inverse_update_period": PERIOD, "factor_update_period": 2, "dense_steps": 2, "inverse_delay": 0}
    kfac["kl_bound_period"] = PERIOD // 2
    fields: dict[str, Any] = {"dataset": str(store.path), "model": "sage", "num_layers": 2, "hidden": 8}
    fields |= {"fanout": (3, 3), "batch_size": 70, "engine": "local", "kfac": kfac}
    return TrainConfig(**(fields | changes))


def test_all_step_on_the_same_batches_in_turns(store: GraphStore, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[str, Any]] = []
    real = Learner.step

    def step(self: Learner, batch: Batch, lr: float, *, alone: bool) -> Any:
        assert alone
        taken.append((self.name, batch.content))
        return real(self, batch, lr, alone=alone)

    monkeypatch.setattr(Learner, "step", step)
    names = ("adam", "kfac", "sgd")
    counted: list[int] = []

    class Counting(BenchProgress):
        def advance(self, steps: int, text: str) -> None:
            counted.append(steps)

    result = run_step_bench(StepOptions(config(store), names, steps=7, warmup=3, threads=1), Counting())

    num_batches = 3 + 12  # 7 steps are rounded up to two periods of 6
    assert result["steps"]["measured"] == 12
    assert sum(counted) == num_batches
    assert len(taken) == 3 * num_batches
    for number in range(num_batches):
        turn = taken[3 * number : 3 * number + 3]
        assert [name for name, _ in turn] == [names[i] for i in turn_order(number, 3, PERIOD)]
        assert len({id(content) for _, content in turn}) == 1
        # 240 training nodes make 3 batches of 70 and one of 30, which is left out.
        assert turn[0][1].seeds.numel() == 70
    assert [len(result["optimizers"][name]["step_ms"]) for name in names] == [12] * 3


def test_the_result_says_what_was_measured(store: GraphStore) -> None:
    result = run_step_bench(StepOptions(config(store), ("kfac", "adam"), steps=1, warmup=0, threads=1))
    assert result["machine"]["threads"] == 1
    assert result["config"]["kfac"]["inverse_update_period"] == PERIOD
    assert result["config"]["kfac"]["kl_clip"] is None  # as in use, not auto
    assert result["config"]["kfac"]["kl_bound"] == 0.1
    assert result["graph"]["num_nodes"] == 600
    assert not result["steps"]["warmup_covers_start"]
    assert result["stream"]["mean_seeds"] == 70
    kfac, adam = result["optimizers"]["kfac"], result["optimizers"]["adam"]
    assert {"commit", "refresh", "precondition"} <= set(kfac["kfac_phase_ms"])
    assert kfac["state_bytes"] > adam["state_bytes"] == 2 * adam["parameter_bytes"] + 4 * 4
    assert result["ratios_to_adam"]["kfac"]["mean"] == kfac["mean_ms"] / adam["mean_ms"]


def test_warm_up_outlasts_kfacs_start() -> None:
    assert enough_warmup(KFACConfig()) >= 60
    assert enough_warmup(KFACConfig(dense_steps=90)) >= 90
    assert enough_warmup(KFACConfig(inverse_update_period=200)) >= 200


def test_a_period_is_one_of_inverses_and_of_measured_steps() -> None:
    assert kfac_period(TrainConfig(dataset="any", optimizer="adam")) == 100  # inverses every 50, divergences every 20
    assert kfac_period(TrainConfig(dataset="any", kfac={"kl_clip": 0.03})) == 50
    described = describe_config(TrainConfig(dataset="any", kfac={"kl_clip": 0.03}))["kfac"]
    assert (described["kl_clip"], described["kl_bound"]) == (0.03, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0 is too small"),
        ({"warmup": -1}, "warmup=-1 is too small"),
        ({"threads": 0}, "threads=0"),
        ({"scale": 0.5}, "scale=0.5"),
        ({"optimizers": ("newton",)}, "'newton' is unknown"),
    ],
)
def test_bad_options(store: GraphStore, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_step_bench(StepOptions(config(store), **options))


def test_a_batch_beyond_the_training_set_is_refused(store: GraphStore) -> None:
    with pytest.raises(UserError, match="larger than the training set"):
        run_step_bench(StepOptions(config(store, batch_size=500), steps=1, warmup=0))


def test_a_dropped_step_is_not_timed(tmp_path: Path, store: GraphStore) -> None:
    huge = GraphStore.write(
        tmp_path / "huge",
        indptr=store.indptr,
        indices=store.indices,
        features=store.features * 1e37,
        labels=store.labels,
        masks=store.split_masks,
    )
    with pytest.raises(TrainingError, match="non-finite gradients at step 0"):
        run_step_bench(StepOptions(config(huge), ("adam",), steps=1, warmup=0))
