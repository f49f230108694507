"""Constant full batch, semi-supervised mini-batches and links on several real processes: the same shards and curve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dngd.comm import LocalCommunicator
from dngd.graph import GraphStore
from tests.helpers.ranks import run_ranks
from tests.multiprocess.full_batch import fit

SEMI = ("none", "two_means", "pooled")


def scenarios(store: GraphStore, folder: Path) -> list[dict[str, Any]]:
    made = []
    for semi in SEMI:
        run_dir = folder / semi
        run_dir.mkdir(parents=True)
        fields = {"dataset": str(store.path), "engine": "local", "batch_size": "full", "num_layers": 2, "hidden": 16}
        fields |= {"optimizer": "adam", "epochs": 4, "num_shards": 3, "semi": semi, "run_dir": str(run_dir)}
        made.append(fields)
    return made


def test_any_world_size_is_the_same_run(store: GraphStore, tmp_path: Path) -> None:
    """Three shards with dropout; two ranks run two and one of them."""
    alone = [fit(LocalCommunicator(), scenario) for scenario in scenarios(store, tmp_path / "alone")]
    pair = run_ranks("tests.multiprocess.full_batch:fit", 2, scenarios(store, tmp_path / "pair"))
    for semi, expected, (one, other) in zip(SEMI, alone, pair, strict=True):
        assert one == other, semi
        np.testing.assert_allclose(one, expected, rtol=1e-4, err_msg=semi)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(alone[0], alone[1], rtol=1e-4)


def sampled(store: GraphStore, folder: Path) -> list[dict[str, Any]]:
    """Four shards of 15 labelled and 15 unlabelled seeds, or of 30 links, with dropout."""
    made = []
    different: list[dict[str, Any]] = [
        {"semi": "two_means", "semi_labels": "argmax", "optimizer": "kfac"},
        {"semi": "pooled", "semi_labels": "soft", "optimizer": "adam"},
        {"task": "link", "optimizer": "kfac", "negatives": 2, "max_steps": 12},
    ]
    for number, changes in enumerate(different):
        run_dir = folder / str(number)
        run_dir.mkdir(parents=True)
        fields = {"dataset": str(store.path), "engine": "local", "batch_size": 30, "num_layers": 2, "hidden": 16}
        fields |= {"fanout": [5, 5], "epochs": 2, "num_shards": 4, "run_dir": str(run_dir), "num_samplers": 0}
        made.append(fields | changes)
    return made


@pytest.mark.parametrize(
    "world_size", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_any_world_size_draws_the_same_seeds(store: GraphStore, tmp_path: Path, world_size: int) -> None:
    alone = [fit(LocalCommunicator(), scenario) for scenario in sampled(store, tmp_path / "alone")]
    together = run_ranks("tests.multiprocess.full_batch:fit", world_size, sampled(store, tmp_path / "together"))
    for expected, (one, *others) in zip(alone, together, strict=True):
        assert all(other == one for other in others)
        np.testing.assert_allclose(one, expected, rtol=1e-3)
