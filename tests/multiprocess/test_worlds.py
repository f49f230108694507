"""The same shards at world sizes 1 to 4, on real processes: equal losses, weights, factors."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import numpy as np
import pytest

from dngd.comm import STRATEGIES
from dngd.optim import UpdateSchedule
from tests.helpers.ranks import run_ranks
from tests.multiprocess.work import STEPS

TRAIN = "tests.multiprocess.work:train"
DELAYS = (0, 4)
SAVED_AT = 7
"""A step in the middle of a refresh of delay 4."""

BASICS = [{"delay": delay} for delay in DELAYS] + [
    {"poison_step": 4},
    {"delay": 4, "steps": SAVED_AT},
    {"inverse_period": 100, "dense_steps": 0, "factor_period": 1},
    {"delay": 0, "mutant": "per_rank_means"},
]
VARIANTS: list[dict[str, Any]] = [
    {"options": {"fisher": "monte_carlo"}, "delay": 4},
    {"options": {"fisher": "monte_carlo", "max_rows": 3}},
    {"options": {"fisher": "ggn"}},
    {"options": {"method": "ekfac", "eigenvalue_update_period": 3}, "delay": 2},
    {"options": {"update": "adam_eigenbasis"}},
    {"layout": {"max_dimension": 4, "rank": 2}},
    {"layout": {"output_rank": 1}},
    {"layout": {"max_dimension": 3, "wide": "block_diagonal"}, "delay": 4},
    {"options": {"fisher": "monte_carlo"}, "poison_step": 4},
    {"options": {"fisher": "monte_carlo"}, "mutant": "key_of_rank"},
    {"options": {"change_threshold": 0.2}, "delay": 2},
]
"""What else must not depend on the world size; one of them draws labels by the rank instead of the shard."""

SHARING: list[dict[str, Any]] = [
    *({"options": {"strategy": s}, "delay": d} for s in ("replicate", "share_gradient") for d in DELAYS),
    {"options": {"strategy": "share_gradient"}, "poison_step": 4},
    {"options": {"strategy": "replicate", "method": "ekfac", "eigenvalue_update_period": 3}, "delay": 2},
    {"options": {"strategy": "share_gradient"}, "delay": 4, "steps": SAVED_AT},
    *({"options": {"strategy": s}, "single": True} for s in ("replicate", "share_inverse", "share_gradient", "auto")),
    {"options": {"strategy": "share_gradient"}, "inverse_period": 100},
]
"""How curvature is shared, which changes nothing; the "single" ones in float32, with inverses in half precision."""

AWKWARD: list[dict[str, Any]] = [
    *({"side": True, "overflow_step": 6, "delay": 4, "options": {"strategy": s}} for s in STRATEGIES),
    *({"side": True, "options": {"strategy": s}} for s in ("share_inverse", "share_gradient")),
]
"""A layer that only shard 0 passes, in the first ones with rows that overflow once; shards are uneven and empty."""


@lru_cache
def basics(world_size: int) -> dict[str, list[dict[str, Any]]]:
    """Every basic scenario's results by rank, from one set of processes."""
    scenarios = BASICS + VARIANTS + SHARING + AWKWARD
    results = run_ranks(TRAIN, world_size, scenarios)
    return {json.dumps(scenario): result for scenario, result in zip(scenarios, results)}


def run(world_size: int, scenario: dict[str, Any]) -> list[dict[str, Any]]:
    return basics(world_size)[json.dumps(scenario)]


def assert_same_run(
    found: dict[str, Any], expected: dict[str, Any], rtol: float = 1e-9, weights_atol: float = 1e-12
) -> None:
    np.testing.assert_allclose(found["losses"], expected["losses"][-len(found["losses"]) :], rtol=rtol)
    for mine, theirs in zip(found["weights"], expected["weights"]):
        np.testing.assert_allclose(mine, theirs, rtol=rtol, atol=weights_atol)
    assert found["factors"].keys() == expected["factors"].keys()
    for name in expected["factors"]:
        for mine, theirs in zip(found["factors"][name], expected["factors"][name]):
            np.testing.assert_allclose(mine, theirs, rtol=rtol, atol=1e-12)
    assert found["staleness"] == expected["staleness"]


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("delay", DELAYS)
def test_any_world_size_is_the_same_run(world_size: int, delay: int) -> None:
    results = run(world_size, {"delay": delay})
    for result in results:
        assert_same_run(result, run(1, {"delay": delay})[0])
    assert all(result["weights"] == results[0]["weights"] for result in results), "ranks drifted apart"


@pytest.mark.parametrize("scenario", [v for v in VARIANTS if "mutant" not in v], ids=json.dumps)
def test_variants_are_the_same_run_at_any_world_size(scenario: dict[str, Any]) -> None:
    """Draws depend on the shard (the key), not on the rank; scales, bases and sketches are reduced like sums."""
    alone = run(1, scenario)[0]
    assert alone["dropped"] == ("poison_step" in scenario)
    for world_size in (2, 3, 4):
        for result in run(world_size, scenario):
            # Along a null direction of G the gradient is rounding alone, and Adam divides it by ε = 1e-8.
            is_adam = "update" in scenario.get("options", {})
            assert_same_run(result, alone, weights_atol=1e-8 if is_adam else 1e-12)


@pytest.mark.parametrize("scenario", SHARING[:5], ids=json.dumps)
def test_strategies_are_the_same_run_at_any_world_size(scenario: dict[str, Any]) -> None:
    """As the strategy that is chosen by itself: to float tolerance across world sizes, bit by bit at the same one."""
    usual = {key: value for key, value in scenario.items() if key != "options"} | {"delay": scenario.get("delay", 0)}
    usual = {"poison_step": 4} if "poison_step" in scenario else usual
    for world_size in (1, 2, 3, 4):
        for result in run(world_size, scenario):
            assert_same_run(result, run(1, usual)[0])
            assert result["weights"] == run(world_size, usual)[0]["weights"], "not bitwise"


def test_replicated_eigenbases() -> None:
    scenario = SHARING[5]
    usual = next(v for v in VARIANTS if v.get("options", {}).get("method") == "ekfac")
    for world_size in (2, 3, 4):
        for result in run(world_size, scenario):
            assert_same_run(result, run(1, usual)[0])
            assert result["weights"] == run(world_size, usual)[0]["weights"], "not bitwise"


@pytest.mark.parametrize("world_size", [2, 4])
def test_half_precision_is_the_same_in_every_strategy(world_size: int) -> None:
    results = [result for scenario in SHARING[7:-1] for result in run(world_size, scenario)]
    assert len(results) == 4 * world_size
    assert all(result["weights"] == results[0]["weights"] for result in results)
    assert all(result["losses"] == results[0]["losses"] for result in results)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_rows_that_some_ranks_do_not_have(world_size: int) -> None:
    """No deadlock: a layer without rows on most ranks, rows that are not finite on one."""
    results = [result for scenario in AWKWARD[:3] for result in run(world_size, scenario)]
    assert all(result["weights"] == results[0]["weights"] for result in results), "ranks or strategies drifted apart"
    assert [result["non_finite"] for result in results] == [1, *[0] * (world_size - 1)] * 3
    assert [result["dropped"] for result in results] == [0] * 3 * world_size
    for scenario in AWKWARD[3:]:
        for result in run(world_size, scenario):
            assert_same_run(result, run(1, AWKWARD[3])[0])


def test_mutant_that_leaves_out_what_it_has_no_rows_for_is_caught() -> None:
    """A rank that shares directions by what it has: an error within the limit or another result, never a hang."""
    scenario = AWKWARD[4]
    assert scenario["options"] == {"strategy": "share_gradient"}
    with pytest.raises(AssertionError, match=r"rank \d of 2: .* failed|Not equal|drifted|exited with"):
        assert_same_run(
            run_ranks(TRAIN, 2, [scenario | {"mutant": "sends_only_with_rows"}], wait_limit_seconds=5)[0][0],
            run(1, AWKWARD[3])[0],
        )


def test_ranks_agree_on_a_plan_that_was_measured() -> None:
    """Planned at the end of the first inverse period (5 steps), from what each rank measured for itself."""
    plans = [json.loads(result["plan"]) for result in run(3, {"delay": 0})]
    assert plans[0] == plans[1] == plans[2]
    assert plans[0]["step"] == 5
    assert len(plans[0]["inversion_seconds"]) == 6
    assert all(seconds > 0 for _, _, seconds in plans[0]["inversion_seconds"])
    assert all(seconds > 0 for seconds in plans[0]["precondition_seconds"].values())
    assert plans[0]["network"]["broadcast"]["latency_seconds"] >= 0


def test_what_a_strategy_holds_and_sends() -> None:
    """Without a new plan on the way, which may move inverses."""
    apart, replicated = run(2, SHARING[-1]), run(2, SHARING[0])
    whole = replicated[0]["held"]
    assert replicated[1]["held"] == whole
    assert sum(result["held"] for result in apart) == whole
    assert "preconditioned" not in replicated[0]["bytes"]
    inverse, preconditioned = (
        [sum(result["bytes"].get(kind, 0) for result in results) for results in (apart, replicated)]
        for kind in ("inverse", "preconditioned")
    )
    schedule = UpdateSchedule(2, 100, 3)
    flags = 2 * sum(len(schedule.layers_due(step, 3)) for step in range(STEPS))
    assert inverse == [flags, 0]
    assert preconditioned == [STEPS * 8 * (5 * 5 + 4 * 6 + 3 * 5), 0]  # weights and biases, in float64


def test_variants_are_runs_of_their_own() -> None:
    """Otherwise the test above would not see whether an option has any effect."""
    plain = run(1, {"delay": 0})[0]["weights"]
    for scenario in VARIANTS:
        assert run(1, scenario)[0]["weights"] != plain, scenario


def test_mutant_draw_without_the_shard_is_caught() -> None:
    """Labels drawn by the rank: the world size shows."""
    scenario = {"options": {"fisher": "monte_carlo"}, "mutant": "key_of_rank"}
    with pytest.raises(AssertionError):
        assert_same_run(run(2, scenario)[0], run(1, scenario)[0])


def test_a_delay_changes_the_run() -> None:
    """Otherwise the test above would not see whether inverses are adopted on time."""
    assert run(1, {"delay": 0})[0]["losses"] != run(1, {"delay": 4})[0]["losses"]


def test_mutant_per_rank_means_is_caught() -> None:
    with pytest.raises(AssertionError):
        assert_same_run(run(2, {"delay": 0, "mutant": "per_rank_means"})[0], run(1, {"delay": 0})[0])


@pytest.mark.slow
def test_mutant_swapped_collective_is_caught() -> None:
    """One rank that shares inverses in another order: an error within the limit or another result, never a hang."""
    with pytest.raises(AssertionError, match=r"rank \d of 2: .* failed|Not equal|drifted|exited with"):
        assert_same_run(
            run_ranks(
                TRAIN,
                2,
                [{"mutant": "swapped_collectives", "options": {"strategy": "share_inverse"}}],
                wait_limit_seconds=15,
            )[0][0],
            run(1, {"delay": 0})[0],
        )


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_one_ranks_nan_drops_the_step_on_all(world_size: int) -> None:
    results = run(world_size, {"poison_step": 4})
    assert [result["dropped"] for result in results] == [1] * world_size
    for result in results:
        assert np.isfinite(np.concatenate(result["weights"])).all()
        assert all(np.isfinite(np.concatenate(pair)).all() for pair in result["factors"].values())
        assert result["weights"] == results[0]["weights"]
        # World sizes agree on what was dropped: the poisoned rank's rows are in nobody's factors.
        assert_same_run(result, run(1, {"poison_step": 4})[0])


@pytest.mark.parametrize(("resumed_at", "saved_at"), [(1, (1, 2, 4)), (2, (1, 2)), (4, (2,))])
def test_resume_at_any_world_size(resumed_at: int, saved_at: tuple[int, ...]) -> None:
    """Saved in the middle of a refresh, and gone on with: bitwise at the same world size, whoever held what."""
    resumes = []
    for world_size in saved_at:
        for scenario in ({"delay": 4, "steps": SAVED_AT}, SHARING[6]):
            saved = run(world_size, scenario)
            assert any(".refresh." in key for key in saved[0]["state"]["curvature"]), "no refresh was under way"
            state = [result["state"] for result in saved]
            resumes.append((world_size, {"delay": 4, "options": scenario.get("options", {}), "state": state}))
    assert SHARING[6]["options"] == {"strategy": "share_gradient"}
    resumed = run_ranks(TRAIN, resumed_at, [argument for _, argument in resumes])
    for (world_size, _), results in zip(resumes, resumed):
        if world_size == resumed_at:
            through = run(world_size, {"delay": 4})[0]
            assert results[0]["weights"] == through["weights"], "not bitwise"
            assert results[0]["losses"] == through["losses"][SAVED_AT:]
            assert results[0]["factors"] == through["factors"]
        for result in results:
            assert_same_run(result, run(1, {"delay": 4})[0])


def test_state_bytes() -> None:
    results = [result["exchanged"] for result in run(3, {"delay": 0})]
    assert results[0]["gathered"] == [[], [1] * 3, [2] * 6]
    assert [result["gathered"] for result in results[1:]] == [None, None]
    assert all(result["received"] == "from rank 0" for result in results)


def test_statistics_travel_only_at_refreshes() -> None:
    """Per-step reduction of both full factors would send d² + d² entries a layer at every factor step."""
    result = run(2, {"inverse_period": 100, "dense_steps": 0, "factor_period": 1})[0]
    triangles = sum(d * (d + 1) // 2 for d in (5, 5, 6, 4, 5, 3)) + 3 * 2
    # one refresh, at step 0; `factors()` at the end reduces the sums once more
    assert result["bytes"]["factor"] == 8 * 2 * triangles
