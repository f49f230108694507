"""torch.set_default_device is a program's own matter: what has no device of the model's stays on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dngd.optim import FactorLayout, NaturalGradient


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_rows": 20},
        {"fisher": "monte_carlo"},
        {"fisher": "ggn", "weight_decay": 0.1},
        {"update": "adam_eigenbasis"},
        {"method": "ekfac"},
        {"layout": FactorLayout(max_dimension=3, wide="low_rank", rank=2)},
    ],
)
def test_training_with_a_default_device_is_training_without(options: dict[str, Any]) -> None:
    """Tensors on "meta" have no numbers: any that is made there by mistake ends in an error."""
    found = []
    for device in ("cpu", "meta"):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        x, y = torch.randn(60, 4), torch.randint(3, (60,))
        with torch.device(device):
            optimizer = NaturalGradient(net, **options)
            for _ in range(3):
                optimizer.zero_grad()
                z = net(x)
                optimizer.observe(z)
                F.cross_entropy(z, y).backward()
                optimizer.step(num_samples=60)
            optimizer.load_state_dict(optimizer.state_dict())
            assert optimizer.preconditioner.health()
        found.append([parameter.detach() for parameter in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found))
