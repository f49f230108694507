"""Plans: from agreed measurements, alike on all ranks, logged, kept in states, made anew in another world."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dngd.comm import STRATEGIES, Line, LocalCommunicator, Network
from dngd.config import TrainConfig
from dngd.errors import UserError
from dngd.optim import KFACPreconditioner, NaturalGradient, plan
from dngd.optim.plan import LayerSizes, Plan, Planner, make_plan
from tests.helpers.mutants import assert_caught, mutant
from tests.helpers.thread_world import ThreadCommunicator, run_threads

CPU = torch.device("cpu")
SIZES = {
    "wide": LayerSizes((1000.0, 8.0), 4000, 4000),
    "square": LayerSizes((64.0, 64.0), 500, 256),
    "narrow": LayerSizes((8.0, 1.0), 60, 30),
}
SLOW = Network(Line(1.0, 1.0), Line(1.0, 1.0))
FREE = Network(Line(0.0, 0.0), Line(0.0, 0.0))


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 6),
    st.tuples(*[st.sampled_from(STRATEGIES)] * 3),
    st.dictionaries(st.tuples(st.sampled_from(sorted(SIZES)), st.sampled_from("AG")), st.floats(1e-9, 10.0)),
    st.none() | st.just(SLOW),
)
def test_a_plan_survives_json(
    world_size: int, strategies: tuple[Any, ...], seconds: dict[tuple[str, str], float], network: Network | None
) -> None:
    made = make_plan(7, SIZES, dict(zip(SIZES, strategies)), world_size, seconds, {"wide": 0.1 + 0.2}, network)
    assert Plan.from_json(made.to_json()) == made
    assert set(made.owners) == {(name, which) for name in SIZES for which in "AG"}
    assert set(made.owners.values()) <= set(range(world_size))
    for name in SIZES:
        if made.strategies[name] == "share_gradient":
            assert made.owners[name, "A"] == made.owners[name, "G"] == made.holder(name)
        else:
            assert made.holder(name) is None
    assert "measured" in str(made) if seconds else "assumed" in str(made)


def law_measured_cost_decides() -> None:
    """By flops "wide" A is the dearest; by the clock "narrow" G is, and the plan goes by the clock."""
    assumed = make_plan(0, SIZES, dict.fromkeys(SIZES, "share_gradient"), 2)
    alone = [name for name in SIZES if [*map(assumed.holder, SIZES)].count(assumed.holder(name)) == 1]
    assert alone == ["wide"]
    seconds = {(name, which): 1e-3 for name in SIZES for which in "AG"} | {("narrow", "G"): 1.0}
    measured = make_plan(5, SIZES, dict.fromkeys(SIZES, "share_gradient"), 2, seconds)
    alone = [name for name in SIZES if [*map(measured.holder, SIZES)].count(measured.holder(name)) == 1]
    assert alone == ["narrow"]


def test_measured_cost_decides() -> None:
    law_measured_cost_decides()
    original = plan._filled
    assert_caught(law_measured_cost_decides, plan, "_filled", lambda sizes, measured: original(sizes, {}))


def test_what_was_not_measured_costs_its_flops_at_the_measured_rate() -> None:
    made = make_plan(5, SIZES, dict.fromkeys(SIZES, "replicate"), 2, {("wide", "A"): 2.0, ("wide", "G"): 0.016})
    assert made.inversion_seconds["square", "A"] == pytest.approx(64 * 2.016 / 1008)
    assert made.refresh_seconds(["square"]) == pytest.approx(2 * 64 * 2.016 / 1008)


def test_when_plans_are_made() -> None:
    planner = Planner(SIZES, LocalCommunicator(), "auto")
    assert [step for step in range(2101) if planner.is_due(step, 50)] == [50, 1000, 2000]


def agreed(
    choice: Any, network: Network = FREE, alike: bool = True, unused: str | None = None, **options: Any
) -> list[Plan]:
    """Plans of three ranks that measured differently. unused: a layer that never had a gradient."""

    def work(comm: ThreadCommunicator) -> Plan:
        planner = Planner(SIZES, comm, choice, **options)  # type: ignore[arg-type]
        for factor, owner in planner.plan.owners.items():
            if owner == comm.rank or choice == "replicate":
                planner.record_inversion(factor, 1e-3 * (1 + comm.rank))
                planner.record_inversion(factor, 1e-3 * (1 + comm.rank))
                planner.record_inversion(factor, 50.0)  # an outlier
        for name in set(SIZES) - {unused}:
            planner.record_preconditioning(name, 1e-4 * (1 + comm.rank))
        return planner.replan(50, 50, CPU)

    with (
        mutant(plan, "probe_network", lambda comm, device: network),
        mutant(plan, "ranks_are_alike", lambda comm, device: alike),
    ):
        return run_threads(3, work)


def law_ranks_agree() -> None:
    first, second, third = agreed("replicate")
    assert first == second == third
    assert first.inversion_seconds["wide", "A"] == pytest.approx(2e-3)  # mean of the ranks' medians
    assert first.precondition_seconds["wide"] == pytest.approx(2e-4)
    assert first.network is None
    assert first.step == 50


def test_ranks_agree() -> None:
    law_ranks_agree()
    original = Planner._agree

    def goes_by_its_own(self: Planner, device: torch.device) -> Any:
        original(self, device)
        own = {factor: sum(values) / len(values) for factor, values in self._inversions.items()}
        return own, {name: values[0] for name, values in self._preconditionings.items()}

    assert_caught(law_ranks_agree, Planner, "_agree", goes_by_its_own)


def test_auto_follows_the_network_within_what_is_allowed() -> None:
    assert set(agreed("auto", SLOW)[0].strategies.values()) == {"replicate"}
    # Ranks that round differently must not each invert for themselves.
    assert set(agreed("auto", SLOW, alike=False)[0].strategies.values()) == {"share_inverse"}
    assert "share_gradient" in agreed("auto", FREE, traffic_budget=1.0)[0].strategies.values()
    assert "share_gradient" not in agreed("auto", FREE)[0].strategies.values(), "it doubles the traffic"
    eigenbases = agreed("auto", FREE, traffic_budget=1.0, shares_gradients=False)[0]
    assert "share_gradient" not in eigenbases.strategies.values()
    unused = dict(agreed("auto", SLOW, unused="square")[0].strategies)
    assert unused.pop("square") == "share_inverse", "as it was: nothing is known of it"
    assert set(unused.values()) == {"replicate"}
    for choice in STRATEGIES:
        for network in (SLOW, FREE):
            assert set(agreed(choice, network)[0].strategies.values()) == {choice}


HEAVY = {name: LayerSizes(of.flops, of.inverse_bytes, 1000, 900) for name, of in SIZES.items()}
"""Statistics and inverses of 1,800 bytes where a period of 50 steps may send .03 of 50,000."""


@pytest.mark.parametrize(
    ("alike", "budget", "strategy"),
    [(True, 0.03, "replicate"), (True, 0.04, "share_inverse"), (False, 0.03, "share_inverse")],
)
def test_what_exceeds_the_budget_is_inverted_by_all_that_round_alike(alike: bool, budget: float, strategy: str) -> None:
    """From the first launch on, and also where measured times would have it sent."""

    def work(comm: ThreadCommunicator) -> list[Plan | None]:
        planner = Planner(HEAVY, comm, "auto", traffic_budget=budget)
        first = planner.begin(0, 50, CPU)
        assert planner.begin(1, 50, CPU) is None, "once"
        for factor in planner.plan.owners:
            planner.record_inversion(factor, 1.0)
        for name in HEAVY:
            planner.record_preconditioning(name, 1e-4)
        return [first, planner.replan(50, 50, CPU)]

    with (
        mutant(plan, "probe_network", lambda comm, device: FREE),
        mutant(plan, "ranks_are_alike", lambda comm, device: alike),
    ):
        for first, later in run_threads(3, work):
            assert (first is None) == (strategy == "share_inverse"), "that is what was assumed"
            assert first is None or set(first.strategies.values()) == {strategy}
            assert later is not None
            assert set(later.strategies.values()) == {strategy}

        def in_another_world(comm: ThreadCommunicator) -> Plan:
            planner = Planner(HEAVY, comm, "auto", traffic_budget=budget)
            planner.restore(later, CPU)
            planner.begin(60, 50, CPU)
            return planner.plan

        for resumed in run_threads(2, in_another_world):
            assert set(resumed.strategies.values()) == {strategy}, "after a resume with fewer ranks too"


def train(comm: Any, steps: int, strategy: Any = "auto", state: tuple[dict[str, Any], ...] = ()) -> Any:
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    for parameter in net.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(parameter.numel()))
    pre = KFACPreconditioner(
        net, loss_reduction="sum", inverse_update_period=4, dense_steps=0, strategy=strategy, communicator=comm
    )
    if state:
        pre.load_state_dict(*state)
    for _ in range(steps):
        net.zero_grad()
        net(torch.ones(3, 4)).square().sum().backward()
        pre.step(3, finite=True, mean_gradients=True)
    found = pre.plan(), pre.state_dict()
    pre.close()
    return found


def test_a_resumed_run_has_the_same_plan(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="dngd.optim.plan"):
        saved = run_threads(2, lambda comm: train(comm, 6))
    logged = [record.message for record in caplog.records]
    assert logged == [str(saved[0][0])]
    assert "from step 4 on (measured, 2 ranks)" in logged[0]
    states = tuple(state for _, state in saved)
    for made, _ in run_threads(2, lambda comm: train(comm, 1, state=(states[comm.rank],))):
        assert made == saved[0][0]
    for made, _ in run_threads(3, lambda comm: train(comm, 1, state=states)):
        assert made.world_size == 3
        assert made.inversion_seconds == saved[0][0].inversion_seconds
        assert made.network is None
    for made, _ in run_threads(2, lambda comm: train(comm, 1, "share_gradient", (states[comm.rank],))):
        assert set(made.strategies.values()) == {"share_gradient"}, "what was asked for counts"
    alone, _ = train(LocalCommunicator(), 1, state=states)
    assert alone.world_size == 1
    assert set(alone.owners.values()) == {0}


def test_eigenbases_and_shared_gradients() -> None:
    net = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(UserError, match="method='ekfac' works in their eigenbases"):
        KFACPreconditioner(net, method="ekfac", strategy="share_gradient")
    with pytest.raises(UserError, match="update='adam_eigenbasis' works in their eigenbases"):
        NaturalGradient(net, update="adam_eigenbasis", strategy="share_gradient")
    with pytest.raises(UserError, match=r"share_gradient.*use --set kfac.strategy=share_inverse"):
        TrainConfig(dataset="cora", kfac={"strategy": "share_gradient", "method": "ekfac"})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="strategy='all' is unknown"):
        KFACPreconditioner(net, strategy="all")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="refresh_budget_seconds=0"):
        KFACPreconditioner(net, refresh_budget_seconds=0)
    with pytest.raises(UserError, match="factor_wire='int8' is unknown"):
        KFACPreconditioner(net, factor_wire="int8")  # type: ignore[arg-type]


@pytest.mark.parametrize(("alike", "strategy"), [(True, "replicate"), (False, "share_inverse")])
def test_a_replaced_rank_may_round_otherwise(alike: bool, strategy: str) -> None:
    saved = agreed("auto", SLOW)[0]
    assert set(saved.strategies.values()) == {"replicate"}
    with mutant(plan, "ranks_are_alike", lambda comm, device: alike):
        restored = run_threads(3, lambda comm: Planner(SIZES, comm, "auto").restore(saved, CPU))
    assert {s for found in restored for s in found.strategies.values()} == {strategy}
