"""Parameter groups with settings of their own, and states that do not fit."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dngd.errors import UserError
from dngd.optim import NaturalGradient

N = 16


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def back_propagate(net: nn.Module, optimizer: NaturalGradient) -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(N, 4, generator=generator), torch.randint(3, (N,), generator=generator)
    optimizer.zero_grad()
    F.cross_entropy(net(x), y).backward()


def with_group(**changes: Any) -> tuple[nn.Module, NaturalGradient, nn.Parameter]:
    net, extra = make_net(), nn.Parameter(torch.ones(3))
    optimizer = NaturalGradient(net, lr=0.1, weight_decay=0.5, **changes)
    with pytest.warns(UserWarning, match=r"the parameters added \(1, of shapes \[\(3,\)\]\) take their plain gradient"):
        optimizer.add_param_group({"params": [extra], "weight_decay": 0.0, "lr": 0.5})
    return net, optimizer, extra


@pytest.mark.parametrize("update", ["mean_gradient", "momentum", "adam_eigenbasis"])
def test_a_group_has_its_own_rate_and_decay(update: str) -> None:
    net, optimizer, extra = with_group(update=update)
    back_propagate(net, optimizer)
    extra.grad = torch.zeros(3)
    before = net[0].weight.detach().clone()
    optimizer.step(num_samples=N)
    assert torch.equal(extra, torch.ones(3)), "no decay"
    moved = net[0].weight.detach() - before
    assert net[0].weight.grad is not None
    if update != "adam_eigenbasis":
        assert torch.allclose(moved, -0.1 * (net[0].weight.grad + 0.5 * before), atol=1e-6)
    back_propagate(net, optimizer)
    extra.grad = torch.ones(3)
    optimizer.step(num_samples=N)
    # Of gradients 0 and 1: their mean .8·0 + .2·1 over 1 - .8², the second momentum's, or Adam's corrected ones.
    direction = {"mean_gradient": 0.2 / 0.36, "momentum": 1.0}.get(update)
    if direction is None:
        direction = (0.1 / (1 - 0.9**2)) / ((0.05 / (1 - 0.95**2)) ** 0.5 + 1e-8)
    assert torch.allclose(extra, torch.full((3,), 1 - 0.5 * direction), atol=1e-5)


@pytest.mark.parametrize("update", ["mean_gradient", "momentum", "adam_eigenbasis"])
def test_a_gradient_of_an_added_group_that_is_not_finite_drops_the_step(update: str) -> None:
    net, optimizer, extra = with_group(update=update)
    back_propagate(net, optimizer)
    extra.grad = torch.full((3,), float("nan"))
    before = [parameter.detach().clone() for parameter in (*net.parameters(), extra)]
    optimizer.step(num_samples=N)
    assert all(torch.equal(a, b) for a, b in zip(before, (*net.parameters(), extra)))
    assert optimizer.preconditioner.dropped_steps == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"update": "momentum"}, "the state is of update='mean_gradient', this optimizer's is 'momentum'"),
        ({"update": "adam_eigenbasis"}, "this optimizer's is 'adam_eigenbasis'"),
        ({"method": "ekfac"}, "the saved curvature is of method='kfac', this one's is 'ekfac'"),
        ({"group": True}, r"groups of \[4\] parameters, this optimizer of \[4, 1\]"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_before_anything_is_changed(changes: dict[str, Any], words: str) -> None:
    net = make_net()
    optimizer = NaturalGradient(net, lr=0.1)
    back_propagate(net, optimizer)
    optimizer.step(num_samples=N)
    state = optimizer.state_dict()
    if "group" in changes:
        _, other, _ = with_group()
    else:
        other = NaturalGradient(make_net(), lr=0.1, **changes)
    with pytest.raises(UserError, match=words):
        other.load_state_dict(state)
    assert other.preconditioner.steps == 0
    assert not other.state


def test_a_state_of_before_it_said_its_update_loads() -> None:
    net = make_net()
    optimizer = NaturalGradient(net, lr=0.1)
    back_propagate(net, optimizer)
    optimizer.step(num_samples=N)
    state = optimizer.state_dict()
    del state["update"]
    for key in ("shared.method", "shared.participation"):
        del state["preconditioner"][key]
    twin = make_net()
    twin.load_state_dict(net.state_dict())
    other = NaturalGradient(twin, lr=0.1)
    other.load_state_dict(state)
    for _ in range(12):
        for model, own in ((net, optimizer), (twin, other)):
            back_propagate(model, own)
            own.step(num_samples=N)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters()))


def test_it_cannot_be_pickled() -> None:
    with pytest.raises(UserError, match=r"cannot be pickled; save its state_dict\(\)"):
        pickle.dumps(NaturalGradient(make_net()))
