"""Lazy reduction equals reducing every step, for random uneven counts, decays, schedules, delays and worlds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dngd.comm import LocalCommunicator
from dngd.curvature import damping_split
from dngd.optim import KFACPreconditioner, UpdateSchedule
from dngd.optim.refresh import RefreshPipeline
from tests.helpers.mutants import assert_caught
from tests.helpers.thread_world import ThreadCommunicator, run_threads

DAMPING = 0.05


@dataclass(frozen=True)
class Scenario:
    """counts[step][rank]: rows of that rank at that step; dropped: steps that all ranks drop."""

    counts: tuple[tuple[int, ...], ...]
    dropped: frozenset[int]
    rho: float
    factor_period: int
    inverse_period: int
    dense_steps: int
    delay: int

    @property
    def world_size(self) -> int:
        return len(self.counts[0])


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    world = draw(st.integers(1, 4))
    steps = draw(st.integers(1, 14))
    counts = draw(st.lists(st.tuples(*[st.integers(0, 3)] * world), min_size=steps, max_size=steps))
    inverse_period = draw(st.integers(1, 6))
    return Scenario(
        counts=tuple(counts),
        dropped=frozenset(draw(st.sets(st.integers(0, steps - 1), max_size=3))),
        rho=draw(st.sampled_from([0.0, 0.5, 0.9])),
        factor_period=draw(st.integers(1, 3)),
        inverse_period=inverse_period,
        dense_steps=draw(st.integers(0, 4)),
        delay=draw(st.integers(0, inverse_period - 1)),
    )


def make_net() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)).double()
    generator = torch.Generator().manual_seed(0)  # torch's own stream is shared by the threads of a world
    for parameter in net.parameters():
        nn.init.normal_(parameter, generator=generator)
    return net


def rows(step: int, rank: int, count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return (
        torch.randn(count, 3, generator=generator, dtype=torch.float64),
        torch.randn(count, 2, generator=generator, dtype=torch.float64),
    )


def back_propagate(net: nn.Module, step: int, rank: int, count: int) -> None:
    net.zero_grad(set_to_none=False)
    for parameter in net.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if count:
        x, target = rows(step, rank, count)
        ((net(x) - target) ** 2).sum().backward()


def lazy(scenario: Scenario) -> list[dict[str, Any]]:
    """What the preconditioner does on every rank: inverses in use after each step, factors at the end."""

    def work(comm: ThreadCommunicator) -> dict[str, Any]:
        net = make_net()
        pre = KFACPreconditioner(
            net,
            damping=DAMPING,
            loss_reduction="sum",
            factor_decay=scenario.rho,
            factor_update_period=scenario.factor_period,
            inverse_update_period=scenario.inverse_period,
            dense_steps=scenario.dense_steps,
            inverse_delay=scenario.delay,
            communicator=comm,
        )
        in_use = []
        for step, counts in enumerate(scenario.counts):
            back_propagate(net, step, comm.rank, counts[comm.rank])
            pre.step(counts[comm.rank], finite=step not in scenario.dropped, mean_gradients=True)
            in_use.append(
                {
                    name: None if len(s.inverses) < 2 else (s.inverses["A"].tensors[0], s.inverses["G"].tensors[0])
                    for name, s in pre.states.items()
                }
            )
        factors = pre.factors()
        pre.close()
        return {"in_use": in_use, "factors": factors}

    return run_threads(scenario.world_size, work)


def eager(scenario: Scenario) -> dict[str, Any]:
    """The definition: every factor step's rows of all ranks at once, `S ← ρS + ΔS`, no pipeline."""
    net = make_net()
    names = ["0", "2"]
    schedule = UpdateSchedule(
        scenario.factor_period, scenario.inverse_period, scenario.dense_steps, at_once=scenario.delay == 0
    )
    sums = {name: [torch.zeros(d, d, dtype=torch.float64) for d in (d_a, 2)] for name, d_a in zip(names, (4, 3))}
    rows_seen = dict.fromkeys(names, 0.0)
    inverses: dict[str, tuple[Tensor, Tensor] | None] = dict.fromkeys(names)
    due: list[tuple[int, str, tuple[Tensor, Tensor] | None]] = []
    tried: set[str] = set()
    in_use, committed = [], 0
    for step, counts in enumerate(scenario.counts):
        if (committed == 0 or schedule.is_factor_step(step)) and step not in scenario.dropped:
            committed += 1
            parts = [rows(step, rank, count) for rank, count in enumerate(counts)]
            x, target = (torch.cat(tensors) for tensors in zip(*parts))
            with torch.no_grad():
                h = torch.tanh(net[0](x))
                g_out = 2 * (net[2](h) - target)
                g_hidden = (g_out @ net[2].weight) * (1 - h**2)
            for name, inputs, gradients in (("0", x, g_hidden), ("2", h, g_out)):
                m = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=torch.float64)], dim=1)
                sums[name] = [scenario.rho * old + t.T @ t for old, t in zip(sums[name], (m, gradients))]
                rows_seen[name] = scenario.rho * rows_seen[name] + len(m)
        under_way = {name for _, name, _ in due}
        if committed:
            wanted = {names[i] for i in schedule.layers_due(step, 2)}
            for name in names:
                if name in under_way or not (name in wanted or name not in tried):
                    continue
                delay = scenario.delay if name in tried else 0
                due.append((step + delay, name, invert(sums[name], rows_seen[name])))
        for at, name, pair in due:
            if at <= step:
                tried.add(name)
                inverses[name] = pair or inverses[name]
        due = [item for item in due if item[0] > step]
        in_use.append(dict(inverses))
    return {"in_use": in_use, "factors": {n: f for n in names if (f := averages(sums[n], rows_seen[n])) is not None}}


def invert(sums: list[Tensor], count: float) -> tuple[Tensor, Tensor] | None:
    pair = averages(sums, count)
    if pair is None:
        return None
    lambdas = damping_split(pair[0].diagonal(), pair[1].diagonal(), DAMPING, "tikhonov")
    a, g = (torch.linalg.inv(m + lam * torch.eye(len(m), dtype=m.dtype)) for m, lam in zip(pair, lambdas))
    return a, g


def averages(sums: list[Tensor], count: float) -> tuple[Tensor, Tensor] | None:
    """(A, G): every row is a seed here, so that both counts are one."""
    return (sums[0] / count, sums[1] / count) if count > 0 else None


def law_lazy_is_eager(scenario: Scenario) -> None:
    expected = eager(scenario)
    for found in lazy(scenario):
        assert found["factors"].keys() == expected["factors"].keys()
        for name, pair in expected["factors"].items():
            for mine, theirs in zip(found["factors"][name], pair):
                assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-12)
        for step, (mine_now, theirs_now) in enumerate(zip(found["in_use"], expected["in_use"])):
            for name in theirs_now:
                mine, theirs = mine_now[name], theirs_now[name]
                assert (mine is None) == (theirs is None), f"step {step}, layer {name}"
                if mine is not None and theirs is not None:
                    for a, b in zip(mine, theirs):
                        assert torch.allclose(a, b, rtol=1e-7, atol=1e-9), f"step {step}, layer {name}"


DROPPED_FACTOR_STEPS = Scenario(((1,),) * 9, frozenset({4, 6}), 0.0, 2, 2, 0, 0)
"""A layer of all steps is not late where factor steps were dropped."""


@settings(max_examples=60, deadline=None)
@given(scenarios())
@example(DROPPED_FACTOR_STEPS)
def test_lazy_is_eager(scenario: Scenario) -> None:
    law_lazy_is_eager(scenario)


EXAMPLE = Scenario(
    counts=((2, 1), (0, 3), (1, 1), (3, 0), (2, 2), (1, 0), (0, 0), (1, 2), (2, 1), (1, 1)),
    dropped=frozenset({1, 7}),
    rho=0.7,
    factor_period=2,
    inverse_period=4,
    dense_steps=3,
    delay=2,
)


def test_mutants_are_caught() -> None:
    def stale_fold(self: RefreshPipeline, refresh: Any) -> None:
        refresh.decays = dict.fromkeys(refresh.decays, 1.0)
        original_fold(self, refresh)

    def keeps_local_sums(self: RefreshPipeline, step: int, layers: Any, damping: Any, delay: int) -> None:
        kept = {n: [t.clone() for t in self._states[n].unfolded.tensors()] for n in layers}
        original_launch(self, step, layers, damping, delay)
        for name, tensors in kept.items():
            for tensor, value in zip(self._states[name].unfolded.tensors(), tensors):
                tensor.copy_(value)

    def adopts_late(self: RefreshPipeline, step: int) -> None:
        original_advance(self, step - 1 if self.under_way and self.under_way[0].step < step else step)

    def ignores_drops(self: KFACPreconditioner) -> None:
        self.commit(1.0)
        self.dropped_steps += 1

    def forgets_idle_decay(self: KFACPreconditioner, num_samples: float, factor_samples: Any = None) -> None:
        before = {n: ([t.clone() for t in s.unfolded.tensors()], s.decay) for n, s in self.states.items()}
        idle = [n for n, layer in self.layers.items() if layer.pending is None]
        original_commit(self, num_samples)
        for name in idle:
            tensors, self.states[name].decay = before[name]
            for tensor, value in zip(self.states[name].unfolded.tensors(), tensors):
                tensor.copy_(value)

    original_fold, original_launch = RefreshPipeline._fold, RefreshPipeline.launch
    original_advance, original_commit = RefreshPipeline.advance, KFACPreconditioner.commit
    for target, attribute, replacement in (
        (RefreshPipeline, "_fold", stale_fold),
        (RefreshPipeline, "launch", keeps_local_sums),
        (RefreshPipeline, "advance", adopts_late),
        (KFACPreconditioner, "discard", ignores_drops),
        (KFACPreconditioner, "commit", forgets_idle_decay),
    ):
        assert_caught(lambda: law_lazy_is_eager(EXAMPLE), target, attribute, replacement)


def law_a_layer_that_one_rank_never_uses() -> None:
    """Seeds that do not reach a layer count in its G wherever they are: two ranks are one process with both shards."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor, both: bool) -> Tensor:
            out: Tensor = self.a(x) + self.b(x) if both else self.a(x)
            return out

    def work(comm: Any) -> dict[str, Any]:
        net = Branches().double()
        generator = torch.Generator().manual_seed(0)
        for parameter in net.parameters():
            nn.init.normal_(parameter, generator=generator)
            parameter.grad = torch.zeros_like(parameter)
        periods: dict[str, Any] = {"dense_steps": 0, "factor_update_period": 1, "eigenvalue_update_period": 1}
        pre = KFACPreconditioner(net, loss_reduction="sum", method="ekfac", communicator=comm, **periods)
        for step in range(2):
            here = 0
            net.zero_grad(set_to_none=False)
            for shard in range(comm.rank, 2, comm.world_size):
                x, target = rows(step, shard, 3 + shard)
                ((net(x, both=shard == 0) - target) ** 2).sum().backward()
                here += len(x)
            for parameter in net.parameters():  # a gradient that is zero on all ranks would be that of no step
                assert parameter.grad is not None
                comm.all_reduce(parameter.grad.view(-1), "gradient").wait()
            pre.step(here, finite=True, mean_gradients=True)
        assert pre.eigenvalues is not None
        scales = {name: pre.eigenvalues.scales(name) for name in ("a", "b")}
        found = {"factors": pre.factors(), "scales": scales}
        pre.close()
        return found

    alone = work(LocalCommunicator())
    for found in run_threads(2, work):
        for name, pair in alone["factors"].items():
            for mine, theirs in zip(found["factors"][name], pair):
                assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-12)
            # Signs of eigenvectors do not matter: their squares do.
            assert torch.allclose(found["scales"][name], alone["scales"][name], rtol=1e-7, atol=1e-10)


def test_a_layer_that_one_rank_never_uses() -> None:
    law_a_layer_that_one_rank_never_uses()
    original = KFACPreconditioner.commit

    def only_where_used(self: KFACPreconditioner, num_samples: float, factor_samples: Any = None) -> None:
        held = {n: s.unfolded if s.unfolded is not None else s.folded for n, s in self.states.items()}
        unused = [name for name, layer in self.layers.items() if layer.pending is None]
        original(self, num_samples, factor_samples)
        for name in unused:
            held[name].counts[1] -= num_samples

    assert_caught(law_a_layer_that_one_rank_never_uses, KFACPreconditioner, "commit", only_where_used)
