"""Damping by the size of the training set and the number of classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dngd.curvature import Dense, FactorLayout, FactorStructure, LowRank
from dngd.optim import NaturalGradient, default_damping, output_rank_for


def test_shares_of_the_traces() -> None:
    known = default_damping(10_000, 4)
    assert known["damping"] == pytest.approx(1e-3)
    assert known["damping"] * known["damping_g_ratio"] == pytest.approx(0.125)
    given = default_damping(10_000, 4, damping=0.01)
    assert (given["damping"], given["damping_g_ratio"]) == pytest.approx((0.01, 12.5))
    for classes, share in ((10, 0.1), (20, 0.05), (100, 0.01)):
        many = default_damping(10_000, classes)
        assert many["damping"] == pytest.approx(share / 100)
        assert many["damping"] * many["damping_g_ratio"] == pytest.approx(0.5 / classes)
    assert default_damping(num_classes=100)["damping"] == default_damping()["damping"]
    assert default_damping(10_000) == {"damping": 0.001, "damping_g_ratio": 30.0}
    assert default_damping() == {"damping": 1e-3, "damping_g_ratio": 30.0}
    for full in (default_damping(10_000, 4, full_batch=True), default_damping(10_000, full_batch=True)):
        assert (full["damping"], full["damping_g_ratio"]) == pytest.approx((1e-3, 10.0))
    few = default_damping(100, 50, full_batch=True)
    assert (few["damping"], few["damping"] * few["damping_g_ratio"]) == pytest.approx((2e-3, 0.01))


def test_natural_gradient_takes_them() -> None:
    torch.manual_seed(0)
    net = nn.Linear(6, 4).double()
    usual = default_damping(400, 4)
    optimizer = NaturalGradient(net, 1.0, momentum=0.0, kl_clip=None, inverse_precision="full", **usual)
    nn.functional.cross_entropy(net(torch.randn(50, 6, dtype=torch.float64)), torch.randint(4, (50,))).backward()
    before = torch.cat([net.weight, net.bias[:, None]], dim=1).detach().clone()
    gradient = torch.cat([net.weight.grad, net.bias.grad[:, None]], dim=1)
    optimizer.step(num_samples=50)
    (factors,) = optimizer.preconditioner.factors().values()
    a = factors.A + 0.1 / 20 * factors.A.trace() * torch.eye(7, dtype=torch.float64)
    g = factors.G + 0.125 * factors.G.trace() * torch.eye(4, dtype=torch.float64)
    after = torch.cat([net.weight, net.bias[:, None]], dim=1).detach()
    assert torch.allclose(before - after, g.inverse() @ gradient @ a.inverse(), rtol=1e-9)
    optimizer.preconditioner.close()


@pytest.mark.parametrize(
    ("arguments", "g"),
    [
        ({}, Dense(192)),
        (default_damping(1000, 5), Dense(192)),
        ({"layout": FactorLayout(None, "low_rank", None, output_rank=output_rank_for(0.03))}, LowRank(192, 48)),
        ({"layout": FactorLayout(output_rank=48), "method": "ekfac"}, Dense(192)),
        ({"layout": FactorLayout(output_rank=48), "update": "adam_eigenbasis"}, Dense(192)),
    ],
)
def test_g_is_low_rank_in_a_loop_of_ones_own_where_it_is_asked_for(
    arguments: dict[str, Any], g: FactorStructure
) -> None:
    """Its damping may then be changed from one run to the next: what is kept of G does not depend on it."""
    optimizer = NaturalGradient(nn.Sequential(nn.Linear(3, 192), nn.ReLU(), nn.Linear(192, 47)), **arguments)
    layers = optimizer.preconditioner.layers
    assert (layers["0"].g, layers["2"].g) == (g, Dense(47))
    optimizer.preconditioner.close()
