"""A step's gradients in one buffer: what is reduced, divided and told."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dngd.comm import FlatGradients, LocalCommunicator


def flat(net: nn.Module) -> FlatGradients:
    gradients = FlatGradients(net.parameters())
    gradients.zero_()
    return gradients


def test_sums_are_divided_and_told() -> None:
    net = nn.Linear(3, 2)
    gradients = flat(net)
    for size, loss in ((4, 8.0), (6, 5.0)):
        for parameter in net.parameters():
            assert parameter.grad is not None
            parameter.grad += size
        gradients.add_loss_(torch.tensor(loss), size)
    sums = gradients.reduce_(LocalCommunicator())
    assert (sums.loss_sum, sums.num_seeds, sums.finite, sums.stop) == (13.0, 10.0, True, False)
    for parameter in net.parameters():
        assert torch.equal(parameter.grad, torch.ones_like(parameter))  # type: ignore[arg-type]
    gradients.zero_()
    gradients.ask_to_stop_()
    gradients.add_loss_(torch.tensor(0.0), 0)
    sums = gradients.reduce_(LocalCommunicator())
    assert (sums.num_seeds, sums.finite, sums.stop) == (0.0, True, True)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", ["first", "last", "loss"])
def test_what_is_not_finite_is_told(wrong: float, place: str) -> None:
    net = nn.Linear(3, 2)
    gradients = flat(net)
    assert net.weight.grad is not None
    assert net.bias.grad is not None
    if place == "first":
        net.weight.grad[0, 0] = wrong
    if place == "last":
        net.bias.grad[-1] = wrong
    gradients.add_loss_(torch.tensor(wrong if place == "loss" else 1.0), 4)
    assert not gradients.reduce_(LocalCommunicator()).finite
