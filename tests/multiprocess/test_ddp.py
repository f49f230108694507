"""A DDP-wrapped module in a user's own loop, on two real processes, against one process with the whole batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dngd.comm import LocalCommunicator
from tests.helpers.ranks import run_ranks
from tests.multiprocess.ddp import train

SCENARIOS: list[dict[str, Any]] = [
    {"fisher": "empirical"},
    {"fisher": "ggn"},
    {"fisher": "empirical", "method": "ekfac", "inverse_delay": 2},
    {"fisher": "monte_carlo"},
]


@pytest.fixture(scope="module")
def pairs() -> list[list[dict[str, Any]]]:
    """Every scenario's results on both ranks, from one set of processes."""
    return run_ranks("tests.multiprocess.ddp:train", 2, SCENARIOS)


@pytest.mark.parametrize("index", range(len(SCENARIOS)), ids=[str(s) for s in SCENARIOS])
def test_two_ranks_are_one_process_with_the_whole_batch(pairs: list[list[dict[str, Any]]], index: int) -> None:
    scenario, results = SCENARIOS[index], pairs[index]
    assert results[0]["weights"] == results[1]["weights"], "ranks drifted apart"
    for result in results:
        assert result["names"] == ["0", "2"]
        assert not result["disturbed"], "observe reached a parameter's gradient"
        assert np.isfinite(np.concatenate(result["weights"])).all()
    if scenario["fisher"] == "monte_carlo":
        return  # other labels are drawn: equal in the mean only
    alone = train(LocalCommunicator(), scenario)
    for result in results:
        for name, pair in alone["factors"].items():
            for mine, theirs in zip(result["factors"][name], pair, strict=True):
                np.testing.assert_allclose(mine, theirs, rtol=1e-9, atol=1e-13)
        for step, (mine, theirs) in enumerate(zip(result["gradients"], alone["gradients"], strict=True)):
            for a, b in zip(mine, theirs, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12, err_msg=f"step {step}")


def test_another_batch_is_another_result(pairs: list[list[dict[str, Any]]]) -> None:
    """Otherwise the comparison above would not see whether both ranks' rows are in the factors."""
    empirical, ggn = pairs[0][0], pairs[1][0]
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(empirical["factors"]["0"][1], ggn["factors"]["0"][1], rtol=1e-2)
