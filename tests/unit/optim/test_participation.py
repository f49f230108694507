"""Layers that take part in some steps alone: frozen for a time, or used by turns."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dngd.optim import NaturalGradient, commit, preconditioner
from dngd.optim.gradients import StepGradients
from dngd.optim.layers.base import CurvatureLayer
from dngd.optim.participation import MOST_STEPS, Participation
from tests.helpers.mutants import assert_caught
from tests.helpers.thread_world import ThreadCommunicator, run_threads

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

    @classmethod
    def of_stream(cls) -> Heads:
        """The same weights in any thread: torch's own stream is shared by the threads of a world."""
        net = cls()
        generator = torch.Generator().manual_seed(0)
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)
        return net

    def forward(self, x: Tensor, head: int) -> Tensor:
        out: Tensor = (self.first, self.second)[head](torch.tanh(self.trunk(x)))
        return out


Turns = Literal["none", "zeros", "weights", "told"]
"""How a head is left out of a step: its gradients are None; zeros; zeros, by a loss of weight 0, where its rows are
seen; zeros, of which the optimizer is told that all gradients are finite, and does not look at them in each step."""


def loss_of_turns(net: Heads, x: Tensor, y: Tensor, step: int, turns: Turns) -> Tensor:
    if turns != "weights":
        return F.cross_entropy(net(x, step % 2), y)
    losses = [F.cross_entropy(net(x, head), y) for head in (0, 1)]
    return losses[0] * float(step % 2 == 0) + losses[1] * float(step % 2 == 1)


def by_turns(turns: Turns, steps: range, net: Heads, optimizer: NaturalGradient) -> None:
    x, y = make_data()
    for step in steps:
        optimizer.zero_grad(set_to_none=turns == "none")
        loss_of_turns(net, x, y, step, turns).backward()
        optimizer.step(num_samples=N, finite=True if turns == "told" else None)


def law_heads_by_turns_are_both_measured(turns: Turns, *, asks: bool = True, **options: Any) -> None:
    """All steps of the schedule from the 10th on fall on the first head."""
    x, y = make_data()
    net = Heads()
    optimizer = NaturalGradient(net, lr=STILL, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        by_turns(turns, range(200), net, optimizer)
    factors = optimizer.preconditioner.factors()
    for name, head in (("first", 0), ("second", 1)):
        z = net(x, head)
        g = torch.autograd.grad(F.cross_entropy(z, y, reduction="sum"), z)[0]
        assert torch.allclose(factors[name].G, g.T @ g / N, rtol=1e-4, atol=1e-6)
        if asks:
            assert optimizer.preconditioner.states[name].launched_step >= 100
            assert float(optimizer.preconditioner.states[name].folded.counts[0]) > 1.5 * N


def test_heads_by_turns_are_both_measured() -> None:
    law_heads_by_turns_are_both_measured("none")


@pytest.mark.parametrize("turns", ["zeros", "weights"])
@pytest.mark.parametrize("update", ["mean_gradient", "momentum", "adam_eigenbasis"])
def test_a_head_whose_gradients_are_zeros_is_as_one_without(turns: Turns, update: Any) -> None:
    """Its G would fall to nothing, with it what it is damped with, and its direction would grow without bound."""
    law_heads_by_turns_are_both_measured(turns, update=update)


def test_zeros_neither_count_nor_take_part() -> None:
    def law() -> None:
        law_heads_by_turns_are_both_measured("weights")

    def looks_away(layers: Any, gradients: Any, device: Any) -> Any:
        return commit.look_at_pending(layers, {}, device)

    assert_caught(law, preconditioner, "look_at_pending", looks_away)
    assert_caught(law, StepGradients, "is_zero", lambda self, layer: False)


@pytest.mark.parametrize("update", ["mean_gradient", "momentum"])
def test_zeros_do_not_count_where_the_step_is_told_that_gradients_are_finite(update: Any) -> None:
    """They are looked at in factor steps alone, as they were before their mean took their place."""
    law_heads_by_turns_are_both_measured("told", asks=False, update=update)


def law_scales_of_heads_whose_gradients_are_zeros(turns: Turns) -> None:
    """EKFAC's, over the steps in which a head is read."""
    x, y = make_data()
    net = Heads()
    optimizer = NaturalGradient(net, lr=STILL, method="ekfac", factor_update_period=1)
    by_turns(turns, range(61), net, optimizer)
    corrected = optimizer.preconditioner.eigenvalues
    assert corrected is not None
    for name, head in (("first", 0), ("second", 1)):
        scales = corrected.scales(name)
        assert scales is not None
        with torch.no_grad():
            hidden = torch.tanh(net.trunk(x))
            g = net(x, head).softmax(dim=1) - F.one_hot(y, 3)
        expected = float((g.square().sum(dim=1) * (1 + hidden.square().sum(dim=1))).mean())
        assert float(scales.sum()) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("turns", ["none", "zeros", "weights"])
def test_scales_of_heads_whose_gradients_are_zeros(turns: Turns) -> None:
    law_scales_of_heads_whose_gradients_are_zeros(turns)


@pytest.mark.parametrize("turns", ["zeros", "weights", "told"])
@pytest.mark.parametrize("num_steps", [1, 2, 9, 12, 13])
def test_a_state_amid_turns_is_gone_on_with_bitwise(turns: Turns, num_steps: int) -> None:
    net = Heads()
    optimizer = NaturalGradient(net)
    by_turns(turns, range(num_steps), net, optimizer)
    saved = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    by_turns(turns, range(num_steps, 25), net, optimizer)
    other = Heads()
    restored = NaturalGradient(other)
    other.load_state_dict(saved[0])
    restored.load_state_dict(saved[1])
    for parameter in other.parameters():  # gradients are no part of a state
        parameter.grad = torch.zeros_like(parameter)
    by_turns(turns, range(num_steps, 25), other, restored)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters()))


@pytest.mark.parametrize("is_told", [False, True])
def test_a_head_that_one_rank_alone_reaches_counts_on_all(is_told: bool) -> None:
    """Of two ranks the first has seeds of the first head alone, the second in each other step of the second head."""
    x, y = make_data()
    halves = [(x[: N // 2], y[: N // 2], 0), (x[N // 2 :], y[N // 2 :], 1)]

    def work(communicator: ThreadCommunicator) -> Any:
        net = Heads.of_stream()
        optimizer = NaturalGradient(net, lr=STILL, communicator=communicator)
        for step in range(60):
            optimizer.zero_grad(set_to_none=False)
            for parameter in net.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            own_x, own_y, head = halves[communicator.rank]
            # The last steps of the schedule are even.
            used = head if step % 2 else 0
            F.cross_entropy(net(own_x, used), own_y).backward()
            for parameter in net.parameters():
                assert parameter.grad is not None
                communicator.all_reduce(parameter.grad.view(-1), "gradient").wait()
                parameter.grad /= 2
            optimizer.step(num_samples=N // 2, finite=True if is_told else None)
        launched = [state.launched_step for state in optimizer.preconditioner.states.values()]
        return optimizer.preconditioner.factors()["second"].G, launched

    (found, launched), (other, others) = run_threads(2, work)
    assert torch.equal(found, other)
    assert launched == others
    net = Heads.of_stream()
    z = net(halves[1][0], 1)
    g = torch.autograd.grad(F.cross_entropy(z, halves[1][1], reduction="sum"), z)[0]
    assert torch.allclose(found, g.T @ g / N, rtol=1e-4, atol=1e-6)


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
