"""A layer's edges in a module's hands."""

from __future__ import annotations

import pytest
import torch

from dngd.models import LayerEdges

NEIGHBOURS = 5000


def hub(*, weighted: bool) -> LayerEdges:
    """One destination with many sources, and one without any."""
    sources = torch.arange(2, NEIGHBOURS + 2)
    weight = torch.linspace(0.5, 1.5, NEIGHBOURS) if weighted else None
    degrees = torch.tensor([NEIGHBOURS, *[0] * (NEIGHBOURS + 1)])
    totals = degrees.float()
    edge_index = torch.stack([sources, torch.zeros_like(sources)])
    return LayerEdges(edge_index, NEIGHBOURS + 2, 2, degrees, totals, weight)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_mean_of_many_neighbours(dtype: torch.dtype, weighted: bool) -> None:
    """More than the 256 or 2048 to which a 16-bit sum of ones comes, and beyond float16's largest number."""
    edges = hub(weighted=weighted)
    rows = (100 * torch.rand(edges.num_src, 3, generator=torch.Generator().manual_seed(0))).to(dtype).requires_grad_()
    weight = torch.ones(NEIGHBOURS) if edges.edge_weight is None else edges.edge_weight
    expected = (rows[2:].double() * weight[:, None]).sum(0) / weight.sum()
    mean = edges.mean(rows)
    assert mean.dtype == dtype
    assert torch.allclose(mean[0].double(), expected, rtol=max(2 * torch.finfo(dtype).eps, 1e-5))
    assert not mean[1].any()
    mean.sum().backward()
    assert rows.grad is not None
    assert torch.allclose(rows.grad[2:].double(), (weight / weight.sum())[:, None].double(), rtol=1e-2)
