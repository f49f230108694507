"""Statistics that travel in 16 bits: nothing is lost, ranks agree, and what could not bear it travels as it is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dngd.comm import LocalCommunicator, RoundedReduction, machines, rounding
from dngd.config import KFACConfig, TrainConfig
from dngd.curvature import FactorLayout
from dngd.optim import KFACPreconditioner, NaturalGradient, UpdateSchedule, layer_footprint
from dngd.optim.plan import LayerSizes, Planner
from dngd.optim.refresh import RefreshPipeline
from dngd.train.optimizers import TrainingSet, damping_in_use, factor_layout
from tests.helpers.mutants import assert_caught, mutant
from tests.helpers.thread_world import ThreadCommunicator, run_threads

UNIT = 2.0**-8
"""Unit roundoff of bfloat16."""


def term(rank: int, size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return torch.randn(size, generator=generator) * 10.0 ** torch.randint(-6, 7, (size,), generator=generator)


def law_nothing_is_lost(world_size: int, size: int, seed: int) -> None:
    """total + Σ_r (left_r + late_r) = Σ_r x_r; the total is within two roundings, and the same on all ranks."""

    def work(comm: ThreadCommunicator) -> tuple[Tensor, Tensor, Tensor]:
        reduction = RoundedReduction(term(comm.rank, size, seed), torch.bfloat16, comm, "factor", "factor")  # type: ignore[arg-type]
        total, late = reduction.finish()
        assert comm.bytes_sent["factor"] == 2 * -(-size // world_size) * world_size
        return total, reduction.left, late

    results = run_threads(world_size, work)
    terms = torch.stack([term(rank, size, seed).double() for rank in range(world_size)])
    total = results[0][0].double()
    assert all(torch.equal(found, results[0][0]) for found, _, _ in results)
    leftovers = sum((left.double() + late.double() for _, left, late in results), torch.zeros(size).double())
    scale = terms.abs().sum(dim=0)
    assert bool(((total + leftovers - terms.sum(dim=0)).abs() <= 1e-6 * scale).all())
    assert bool(((total - terms.sum(dim=0)).abs() <= 2.01 * UNIT * scale).all())


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 10**6))
def test_nothing_is_lost(world_size: int, size: int, seed: int) -> None:
    law_nothing_is_lost(world_size, size, seed)


def test_mutants_of_the_reduction_are_caught() -> None:
    original = RoundedReduction.finish

    def forgets_late(self: RoundedReduction) -> tuple[Tensor, Tensor]:
        total, late = original(self)
        return total, torch.zeros_like(late)

    def forgets_left(self: RoundedReduction) -> tuple[Tensor, Tensor]:
        found = original(self)
        self.left = torch.zeros_like(self.left)
        return found

    def adds_its_own_first(self: RoundedReduction) -> tuple[Tensor, Tensor]:
        total, late = original(self)
        return total + self.left, late

    for mutated in (forgets_late, forgets_left, adds_its_own_first):
        assert_caught(lambda: law_nothing_is_lost(3, 20, 1), RoundedReduction, "finish", mutated)


def law_overflow_is_alike_and_leaves_nothing() -> None:
    """Float32's largest numbers round to infinity: the total says so on all ranks, what is kept stays finite."""

    def work(comm: ThreadCommunicator) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.ones(4)
        if comm.rank == 1:
            x[2] = 3.4e38
        reduction = RoundedReduction(x, torch.bfloat16, comm, "factor", "factor")  # type: ignore[arg-type]
        total, late = reduction.finish()
        return total, reduction.left, late

    for total, left, late in run_threads(2, work):
        assert torch.isfinite(total).tolist() == [True, True, False, True]
        assert bool(torch.isfinite(left).all())
        assert bool(torch.isfinite(late).all())


def test_overflow_is_alike_and_leaves_nothing() -> None:
    law_overflow_is_alike_and_leaves_nothing()
    assert_caught(law_overflow_is_alike_and_leaves_nothing, rounding, "_finite_or_zero", lambda tensor: tensor)


@dataclass(frozen=True)
class Scenario:
    counts: tuple[tuple[int, ...], ...]
    rho: float
    inverse_period: int
    delay: int

    @property
    def world_size(self) -> int:
        return len(self.counts[0])


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    world = draw(st.integers(2, 4))
    row = st.tuples(*[st.integers(0, 4)] * world)
    inverse_period = draw(st.integers(1, 4))
    return Scenario(
        counts=tuple(draw(st.lists(row, min_size=3, max_size=12))),
        rho=draw(st.sampled_from([0.0, 0.5, 0.95])),
        inverse_period=inverse_period,
        delay=draw(st.integers(0, inverse_period - 1)),
    )


def make(scenario: Scenario, comm: Any, wire: Any, **options: Any) -> tuple[nn.Module, KFACPreconditioner]:
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        nn.init.normal_(parameter, generator=generator)
        parameter.grad = torch.zeros_like(parameter)
    settings_ = {"damping": 0.05, "damping_mode": "relative", "damping_g_ratio": 1.0} | options
    pre = KFACPreconditioner(
        net,
        loss_reduction="sum",
        factor_decay=scenario.rho,
        factor_update_period=1,
        inverse_update_period=scenario.inverse_period,
        inverse_delay=scenario.delay,
        dense_steps=0,
        factor_wire=wire,
        strategy="share_inverse",
        communicator=comm,
        **settings_,
    )
    return net, pre


def take_step(net: nn.Module, pre: KFACPreconditioner, comm: Any, step: int, count: int) -> None:
    net.zero_grad(set_to_none=False)
    if count:
        generator = torch.Generator().manual_seed(100 * step + comm.rank)
        x = torch.randn(count, 5, generator=generator, dtype=next(net.parameters()).dtype)
        net(x).square().sum().backward()
    pre.step(count, finite=True, mean_gradients=True)


def law_error_feedback(scenario: Scenario) -> None:
    """Whatever was rounded on the way, sums in use and leftovers together are the sums that were measured."""

    def work(wire: str) -> Any:
        def rank(comm: ThreadCommunicator) -> tuple[list[Any], list[Tensor]]:
            net, pre = make(scenario, comm, wire)
            totals = []
            for step, counts in enumerate(scenario.counts):
                take_step(net, pre, comm, step, counts[comm.rank])
                pre.pipeline.drain()  # what is on its way is part of the sums
                totals.append([pre._total(n, s) for n, s in pre.states.items()])
            used = [t.clone() for s in pre.states.values() for t in s.folded.tensors()]
            pre.close()
            return totals, used

        return run_threads(scenario.world_size, rank)

    exact, rounded = work("float32"), work("bfloat16")
    for (found, used), (expected, _) in zip(rounded, exact):
        assert all(torch.equal(a, b) for a, b in zip(used, rounded[0][1])), "ranks drifted apart"
        for step, (mine, theirs) in enumerate(zip(found, expected)):
            for a, b in zip(mine, theirs):
                assert torch.equal(a.counts, b.counts)
                for x, y in zip(a.tensors(), b.tensors()):
                    assert torch.allclose(x, y, rtol=1e-5, atol=1e-5 * float(y.abs().max())), f"step {step}"


@pytest.mark.filterwarnings("ignore:layer .* has a gradient")  # a layer that no row has reached so far
@settings(max_examples=12, deadline=None)
@given(scenarios())
def test_error_feedback(scenario: Scenario) -> None:
    law_error_feedback(scenario)


EXAMPLE = Scenario(
    counts=((2, 1), (0, 3), (1, 4), (3, 0), (2, 2), (1, 0), (0, 0), (1, 2), (2, 1), (1, 1)),
    rho=0.9,
    inverse_period=3,
    delay=2,
)


def test_mutants_of_the_feedback_are_caught() -> None:
    original_launch, original_pay_back = RefreshPipeline.launch, RefreshPipeline._pay_back

    def forgets_everything(self: RefreshPipeline, step: int, layers: Any, damping: Any, delay: int) -> None:
        original_launch(self, step, layers, damping, delay)
        for name in layers:
            self._states[name].unfolded.zero_()  # type: ignore[union-attr]

    def pays_nothing_back(self: RefreshPipeline, refresh: Any, name: str, state: Any) -> None:
        refresh.late.clear()

    def pays_back_without_decay(self: RefreshPipeline, refresh: Any, name: str, state: Any) -> None:
        decay, state.decay = state.decay, 100.0
        original_pay_back(self, refresh, name, state)
        state.decay = decay

    for attribute, mutated in (
        ("launch", forgets_everything),
        ("_pay_back", pays_nothing_back),
        ("_pay_back", pays_back_without_decay),
    ):
        assert_caught(lambda: law_error_feedback(EXAMPLE), RefreshPipeline, attribute, mutated)


def law_resume_in_the_middle_of_a_refresh() -> None:
    """Bitwise in a world of the same size; in another one no leftover is lost."""

    def through(comm: ThreadCommunicator, saved_at: int | None) -> tuple[list[Tensor], Any, Any]:
        net, pre = make(EXAMPLE, comm, "bfloat16")
        state = None
        for step, counts in enumerate(EXAMPLE.counts):
            if step == saved_at:
                pre.pipeline.drain()
                total = [t for n, s in pre.states.items() for t in pre._total(n, s).tensors()]
                state = pre.state_dict()
                pre.close()
                assert any(key.startswith("local.late") and bool(v.any()) for key, v in state.items()) == (
                    comm.rank in (0, 1)
                )
                net, pre = make(EXAMPLE, comm, "bfloat16")
                pre.load_state_dict(state)
            take_step(net, pre, comm, step, counts[comm.rank])
        out = [t.clone() for s in pre.states.values() for t in s.folded.tensors() + s.unfolded.tensors()]
        pre.close()
        return out, state, total if saved_at is not None else None

    straight = run_threads(2, lambda comm: through(comm, None))
    resumed = run_threads(2, lambda comm: through(comm, SAVED_AT))
    for (mine, _, _), (theirs, _, _) in zip(resumed, straight):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs)), "not bitwise"
    _, alone = make(EXAMPLE, LocalCommunicator(), "bfloat16")
    alone.load_state_dict(resumed[0][1], resumed[1][1])
    held = [t for n, s in alone.states.items() for t in alone._total(n, s).tensors()]
    for a, b in zip(held, resumed[0][2]):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


SAVED_AT = 8
"""A step between a launch and its adoption."""


def test_resume_in_the_middle_of_a_refresh() -> None:
    law_resume_in_the_middle_of_a_refresh()
    from dngd.optim import state

    assert_caught(
        law_resume_in_the_middle_of_a_refresh, state, "_take_late", lambda pre, position, refresh, local: None
    )


def sent(comm_wire: str, **options: Any) -> tuple[int, int]:
    """Bytes that two refreshes of each layer send, the first and the second one."""

    def work(comm: ThreadCommunicator) -> tuple[int, int]:
        scenario = Scenario(((4, 4),), 0.5, 4, 0)
        double = options.get("double", False)
        net, pre = make(scenario, comm, comm_wire, **{k: v for k, v in options.items() if k != "double"})
        if double:
            pre.close()
            net = net.double()
            pre = KFACPreconditioner(
                net, damping_mode="relative", loss_reduction="sum", factor_wire="bfloat16", communicator=comm
            )
        take_step(net, pre, comm, 0, 4)
        first = comm.bytes_sent["factor"]
        pre.pipeline.launch(1, list(pre.layers), pre._damping_now(), 0)
        pre.pipeline.advance(1)
        return first, comm.bytes_sent["factor"] - first

    return run_threads(2, work)[0]


def test_what_cannot_bear_rounding_travels_as_it_is() -> None:
    entries = sum(d * (d + 1) // 2 for d in (6, 6, 7, 4))
    whole = 4 * entries + 2 * 2 * 4
    assert sent("float32") == (whole, whole)
    # of a factor that nothing is known of, first; counts always
    assert sent("bfloat16") == (whole, 2 * entries + 2 * 2 * 4)
    assert sent("bfloat16", damping=1e-3) == (whole, whole)
    assert sent("bfloat16", damping=1e-3, damping_g_ratio=10.0)[1] == whole - 4 * 31 + 2 * 32  # chunks of equal size
    sketch = sent("bfloat16", layout=FactorLayout(max_dimension=6, rank=2))
    assert sketch[0] - sketch[1] == 2 * (21 + 21 + 10), "a sketch was rounded"
    assert sent("bfloat16", double=True)[1] == 2 * whole


def law_ranks_that_round_differently_send_alike() -> None:
    """A rank whose numbers fall on the other side of a limit: all do what every one of them can."""

    def work(comm: ThreadCommunicator) -> list[Tensor]:
        net, pre = make(EXAMPLE, comm, "bfloat16", damping=0.1, inverse_precision="float16")
        if comm.rank == 1:
            pre.pipeline._findings._bears_rounding = lambda state, damping: dict.fromkeys("AG", False)  # type: ignore[method-assign]
            pre.pipeline._findings._is_unchanged = lambda *measured: True  # type: ignore[method-assign]
            pre.pipeline._findings._wanted = replace(pre.pipeline._wanted, dtype=None)
        for step, counts in enumerate(EXAMPLE.counts):
            take_step(net, pre, comm, step, counts[comm.rank])
        pre.pipeline.drain()
        out = [t.clone() for s in pre.states.values() for i in s.inverses.values() for t in i.tensors]
        assert all(s.reused_inversions == 0 for s in pre.states.values())
        pre.close()
        return out

    with mutant(machines, "ranks_are_alike", lambda comm, device: False):
        first, second = run_threads(2, work)
    assert first
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.filterwarnings("ignore:layer .* has a gradient")
def test_ranks_that_round_differently_send_alike() -> None:
    law_ranks_that_round_differently_send_alike()
    assert_caught(
        law_ranks_that_round_differently_send_alike, machines.Agreement, "of_all", lambda self, found, device: found
    )


WIDTHS = ((6, 8), (8, 5))


def footprints(wire: Any, layers: Any, layout: FactorLayout, shares: tuple[float, float]) -> list[Any]:
    return [
        layer_footprint(d_a, d_g, parts, layout, "float16", eigenbasis=False, factor_wire=wire, shares=shares)
        for d_a, d_g, parts in layers
    ]


def expected_bytes(
    wire: Any, layers: Any, schedule: UpdateSchedule, steps: int, layout: FactorLayout, shares: tuple[float, float]
) -> tuple[int, int]:
    """Bytes of (factors, inverses) that a run sends, each collective counted once: the first round is not rounded."""
    rounded, whole = footprints(wire, layers, layout, shares), footprints("float32", layers, layout, shares)
    factor, inverse, seen = 0, 0, set()
    for step in range(steps):
        for i in schedule.layers_due(step, len(layers)):
            factor += rounded[i].statistics_sent if i in seen else whole[i].statistics_sent
            inverse += rounded[i].inverses_sent + 2
            seen.add(i)
    return factor, inverse


@pytest.mark.parametrize("damping", [1e-3, 2e-2])
def test_traffic_is_what_the_footprint_says(damping: float) -> None:
    """With damping that bears rounding of nothing (its G's share is a hundredth), and of all."""
    layout = FactorLayout()

    def work(comm: ThreadCommunicator) -> tuple[int, int]:
        net = nn.Sequential(*(nn.Linear(a, b) for a, b in WIDTHS))
        pre = NaturalGradient(
            net,
            damping=damping,
            damping_g_ratio=2.0,
            factor_wire="bfloat16",
            inverse_update_period=9,
            dense_steps=20,
            strategy="share_inverse",
            loss_reduction="sum",
            layout=layout,
            communicator=comm,
        )
        for step in range(40):
            pre.zero_grad()
            net(torch.randn(30, 6, generator=torch.Generator().manual_seed(step))).square().sum().backward()
            pre.step(num_samples=30, finite=True, mean_gradients=True)
        pre.preconditioner.close()
        return comm.bytes_sent["factor"], comm.bytes_sent["inverse"]

    results = run_threads(2, work)
    layers = [(a + 1, b, ()) for a, b in WIDTHS]
    shares = (damping, 2 * damping)
    factor, inverse = expected_bytes("bfloat16", layers, UpdateSchedule(10, 9, 20), 40, layout, shares)
    refreshes = sum(len(UpdateSchedule(10, 9, 20).layers_due(step, 2)) for step in range(40))
    for found, _ in results:
        assert factor <= found <= factor + 2 * refreshes  # chunks of equal size
    assert sum(found for _, found in results) == inverse


def law_traffic_target() -> None:
    """Factors and inverses are at most 3 % of the gradients, and a tenth of full matrices every step: 3-layer SAGE 256,
    100 features, 47 classes, the defaults, 1000 steps, with few labels (strong damping) and with many."""
    kfac = KFACConfig()
    schedule = UpdateSchedule(kfac.factor_update_period, kfac.inverse_update_period, kfac.dense_steps)
    widths = [(100, 256), (256, 256), (256, 47)]
    layers = [(2 * a + 1, b, (a, a + 1)) for a, b in widths]
    for num_training_nodes in (100, 10_000, 196_615):
        config, training_set = TrainConfig(dataset="any"), TrainingSet(num_training_nodes, 47)
        layout = factor_layout(config, training_set)
        damping, g_ratio = damping_in_use(config, training_set)
        shares = (damping, g_ratio * damping)
        known = footprints("float32", layers, layout, shares)
        sizes = {
            str(i): LayerSizes(of.inversion_flops, of.inverses_sent, 4 * d_a * d_g, of.statistics)
            for i, (of, (d_a, d_g, _)) in enumerate(zip(known, layers))
        }

        def plan(comm: ThreadCommunicator, sizes: dict[str, LayerSizes] = sizes) -> list[str]:
            planner = Planner(sizes, comm, "auto", traffic_budget=kfac.traffic_budget)
            planner.begin(0, kfac.inverse_update_period, torch.device("cpu"))
            return list(planner.plan.strategies.values())

        factor, inverse = 0, 0
        for layer, strategy in zip(layers, run_threads(2, plan)[0]):
            of_factors, of_inverses = expected_bytes(
                kfac.factor_wire, [layer] * len(layers), schedule, 1000, layout, shares
            )
            factor += of_factors // len(layers)
            inverse += of_inverses // len(layers) if strategy == "share_inverse" else 0
        gradients = 1000 * 4 * (sum(d_a * d_g for d_a, d_g, _ in layers) + 2)
        assert factor + inverse <= 0.03 * gradients, f"{(factor + inverse) / gradients} for {num_training_nodes} nodes"
        full = 1000 * 4 * sum(p * p for _, d_g, parts in layers for p in (*parts, d_g))
        assert factor + inverse <= 0.1 * full


def test_traffic_target() -> None:
    law_traffic_target()
    assert_caught(
        law_traffic_target, Planner, "_allowed", lambda self, alike, sizes, period: ["replicate", "share_inverse"]
    )
