"""Which layers' pending sums count: those whose factors both are finite."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dngd.optim import FactorLayout, KFACPreconditioner
from dngd.optim.commit import look_at_pending


@pytest.mark.parametrize("wrong", [torch.inf, torch.nan])
@pytest.mark.parametrize("max_dimension", [1, 8], ids=["diagonal", "dense"])
def test_either_factor_makes_a_layer_unsound(wrong: float, max_dimension: int) -> None:
    """Sums near the type's end count: each of them is finite, though their own sum is not."""
    net = nn.Sequential(*[nn.Linear(3, 3) for _ in range(3)])
    pre = KFACPreconditioner(net, damping=0.1, layout=FactorLayout(max_dimension, "diagonal"))
    nn.functional.cross_entropy(net(torch.randn(5, 3)), torch.arange(5) % 3).backward()
    first, second, third = (layer.pending for layer in pre.layers.values())
    assert first is not None
    assert second is not None
    assert third is not None
    first.a[0][0] = wrong
    second.g[0][0] = wrong
    third.a[0].fill_(3e38)
    assert list(look_at_pending(pre.layers, {}, pre.device).sound.values()) == [False, False, True]
    pre.close()
