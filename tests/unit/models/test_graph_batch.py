"""A layer's edges in a module's hands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_geometric.nn as pyg
from torch import Tensor, nn

import dngd
from dngd.errors import UserError
from dngd.graph import GraphStore
from dngd.models import LayerEdges
from dngd.sampling.operators import node_norm
from dngd.train.module_batches import ModuleBatchBuilder

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


class Passing(nn.Module):
    """A convolution over (x, edge_index, edge_weight)."""

    def __init__(self, conv: nn.Module, weighted: bool = True) -> None:
        super().__init__()
        self.conv, self.weighted = conv, weighted

    def forward(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None = None) -> Tensor:
        out: Tensor = self.conv(x, edge_index, edge_weight=edge_weight if self.weighted else None)
        return out


class Own(nn.Module):
    """GCN's coefficients in a module of one's own."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, batch: dngd.GraphBatch) -> Tensor:
        out: Tensor = self.conv(batch.x, *batch.layers[0].gcn())
        return out[: batch.layers[0].num_dst]


def conv(**options: Any) -> Any:
    return pyg.GCNConv(4, 2, **options)


def with_total(path: Path, total: float) -> GraphStore:
    """A ring with another in-edge of node 3, which sum to a number; those of the other nodes sum to 1."""
    edges = torch.tensor([[0, 1, 2, 3, 4, 5, 0], [1, 2, 3, 4, 5, 0, 3]])
    weight = torch.ones(7)
    weight[6] = total - 1
    masks = {"train": torch.arange(6) < 2, "val": torch.arange(6) // 2 == 1, "test": torch.arange(6) > 3}
    fields: dict[str, Any] = {"features": torch.randn(6, 4), "labels": torch.arange(6) % 2, "masks": masks}
    GraphStore.write(path / "ring", edge_index=edges, edge_weight=weight, **fields)
    return GraphStore.open(path / "ring")


@pytest.mark.parametrize(
    ("make", "total", "needs"),
    [
        (lambda: dngd.PyGStack([conv(normalize=False)]), -1.0, "above -1"),
        (lambda: dngd.PyGStack([conv(normalize=False)]), -0.9, None),
        (lambda: Own(conv(normalize=False)), -1.5, "above -1"),
        (lambda: dngd.PyGModel(conv()), -1.5, "above -1"),
        (lambda: dngd.PyGModel(conv(improved=True)), -1.5, None),
        (lambda: dngd.PyGModel(conv(improved=True)), -2.0, "above -2"),
        (lambda: dngd.PyGModel(conv(add_self_loops=False)), -0.5, "of at least 0"),
        (lambda: dngd.PyGModel(conv(add_self_loops=False)), 0.0, None),
        (lambda: dngd.PyGModel(Passing(conv())), -1.5, "above -1"),
        (lambda: dngd.PyGModel(Passing(conv(), weighted=False)), -1.5, None),
        (lambda: dngd.PyGModel(Passing(pyg.GraphConv(4, 2))), -1.5, None),
    ],
)
def test_weights_that_gcn_cannot_normalise(
    tmp_path: Path, make: Callable[[], nn.Module], total: float, needs: str | None
) -> None:
    """Refused where they are used, in batches without that node too; the sentence is that of the built-in GCN."""
    store = with_total(tmp_path, total)
    batch = ModuleBatchBuilder(store, store.features, torch.device("cpu")).whole(torch.tensor([0]), 1)
    assert 3 not in batch.nodes.tolist()
    if needs is None:
        assert bool(make()(batch).isfinite().all())
        return
    said = rf"node 3 of ring has in-edge weights that sum to {total:g}; GCN's normalisation needs sums {needs}, so use"
    with pytest.raises(UserError, match=f"{said} weights of at least 0, or a convolution that does not normalise"):
        make()(batch)
    if needs == "above -1":
        with pytest.raises(UserError, match=f"{said} weights of at least 0, or --model sage"):
            node_norm(store)


def test_a_run_with_such_weights_is_refused(tmp_path: Path) -> None:
    store = with_total(tmp_path, -3.0)
    fields: dict[str, Any] = {"engine": "local", "num_layers": 1, "fanout": (2,), "num_samplers": 0}
    config = dngd.TrainConfig(dataset=str(store.path), run_dir=tmp_path / "run", **fields)
    with pytest.raises(UserError, match="node 3 of ring has in-edge weights that sum to -3"):
        dngd.Trainer(config, module=conv(), quiet=True).fit()
