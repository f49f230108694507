"""Layers that take part in some steps alone: frozen for a time, or used by turns."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dngd.optim import NaturalGradient
from dngd.optim.layers.base import CurvatureLayer
from dngd.optim.participation import MOST_STEPS, Participation
from tests.helpers.mutants import assert_caught

N = 128
STILL = 1e-9
"""A rate at which the weights, and so the true factors, stay what they are."""


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))


def make_data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, 8, generator=generator), torch.randint(3, (N,), generator=generator)


def take_steps(optimizer: NaturalGradient, loss: Callable[[int], Tensor], steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step(num_samples=N)


def law_an_unfrozen_layer_has_the_factors_that_it_would_have_had() -> None:
    """Some steps after it is unfrozen: not after an inverse's period, and not diluted by the seeds before."""
    x, y = make_data()
    frozen, free = make_net(), make_net()
    one, other = NaturalGradient(frozen, lr=STILL), NaturalGradient(free, lr=STILL)
    for parameter in frozen[0].parameters():
        parameter.requires_grad_(False)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        take_steps(one, lambda step: F.cross_entropy(frozen(x), y), range(71))
        for parameter in frozen[0].parameters():
            parameter.requires_grad_(True)
        take_steps(one, lambda step: F.cross_entropy(frozen(x), y), range(71, 74))
    assert not told, "that no call of it was seen, say"
    take_steps(other, lambda step: F.cross_entropy(free(x), y), range(74))
    found, expected = one.preconditioner.factors(), other.preconditioner.factors()
    assert "0" in found
    for mine, theirs in zip(found["0"], expected["0"]):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-7)
    assert one.preconditioner.states["0"].launched_step in (72, 73)
    assert frozen[0].weight.grad is not None
    assert free[0].weight.grad is not None
    assert torch.allclose(frozen[0].weight.grad, free[0].weight.grad, rtol=0.02, atol=1e-3)


def test_an_unfrozen_layer_has_the_factors_that_it_would_have_had() -> None:
    law_an_unfrozen_layer_has_the_factors_that_it_would_have_had()

    def never_asks(self: Participation, step: int) -> bool:
        return False

    law = law_an_unfrozen_layer_has_the_factors_that_it_would_have_had
    assert_caught(law, Participation, "wants", never_asks)
    assert_caught(law, CurvatureLayer, "has_gradient", property(lambda layer: True))


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 3), nn.Linear(16, 3)

    def forward(self, x: Tensor, head: int) -> Tensor:
        out: Tensor = (self.first, self.second)[head](torch.tanh(self.trunk(x)))
        return out


def test_heads_by_turns_are_both_measured() -> None:
    """All steps of the schedule from the 10th on fall on the first head."""
    x, y = make_data()
    net = Heads()
    optimizer = NaturalGradient(net, lr=STILL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        take_steps(optimizer, lambda step: F.cross_entropy(net(x, step % 2), y), range(200))
    factors = optimizer.preconditioner.factors()
    for name, head in (("first", 0), ("second", 1)):
        z = net(x, head)
        g = torch.autograd.grad(F.cross_entropy(z, y, reduction="sum"), z)[0]
        assert torch.allclose(factors[name].G, g.T @ g / N, rtol=1e-4, atol=1e-6)
        assert optimizer.preconditioner.states[name].launched_step >= 100
        assert float(optimizer.preconditioner.states[name].folded.counts[0]) > 1.5 * N


@pytest.mark.parametrize("dropped", [(), range(10, 95, 10)])
def test_a_layer_of_all_steps_asks_for_none(dropped: Sequence[int]) -> None:
    """dropped: factor steps that were, and did not count."""
    asked = Participation()
    for step in range(500):
        if step not in dropped:
            assert asked.note(step, ["a"], is_factor_step=step % 10 == 0, period=10) == []
        assert not asked.wants(step + 1)


@pytest.mark.parametrize("period", [10, 1000])
def test_a_layer_that_is_used_once_is_not_waited_for_for_ever(period: int) -> None:
    asked = Participation()
    asked.note(0, ["a"], is_factor_step=True, period=period)
    asked.note(5, ["a", "b"], is_factor_step=False, period=period)
    steps = []
    for step in range(6, 2000):
        if asked.wants(step):
            steps.append(step)
        asked.note(step, ["a"], is_factor_step=asked.wants(step) or step % period == 0, period=period)
    assert steps == list(range(6, 6 + min(period, MOST_STEPS)))


def test_a_layer_waited_for_is_told_once_and_the_state_goes_on() -> None:
    first = Participation()
    first.note(0, ["a"], is_factor_step=True, period=10)
    first.note(3, ["a", "b"], is_factor_step=False, period=10)
    asked = Participation()
    asked.restore(["a", "b", "c"], first.state(["a", "b", "c"]))
    assert asked.wants(4)
    assert not asked.was_measured("b")
    assert asked.note(4, ["a", "b"], is_factor_step=True, period=10) == ["b"]
    assert not asked.wants(5)
    assert asked.was_measured("b")
    assert asked.note(5, ["a", "b"], is_factor_step=True, period=10) == []
