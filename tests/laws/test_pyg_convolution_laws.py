"""PyG's convolutions, nearly all: each parameter is measured with the rows that make its gradient, or is named.

For a linear map `Z = M Wᵀ`, the rows M and output gradients g that the factors are made of give `∇W = gᵀM`: a call that
was missed, rows of the wrong order or too few of them break that, whatever the layer is inside.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg
from torch import Tensor, nn

from dngd.optim import NaturalGradient
from dngd.optim.capture import Capture
from dngd.optim.layers.base import CurvatureLayer
from tests.helpers.layers import close

pytestmark = pytest.mark.usefixtures("one_thread")

N, WIDTH, CLASSES, EDGES, RELATIONS = 20, 8, 6, 80, 3
IN_DEGREES = torch.tensor([0, 1, 5, 5, 4, 3, 2])


class Inputs:
    """What convolutions are called with: one small graph, its arrays in double precision."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        self.x = torch.randn(N, WIDTH, dtype=torch.float64, generator=draw)
        self.pair = (self.x, self.x)
        self.edges = torch.randint(0, N, (2, EDGES), generator=draw)
        self.weights = torch.rand(EDGES, dtype=torch.float64, generator=draw)
        self.attributes = torch.randn(EDGES, 5, dtype=torch.float64, generator=draw)
        self.types = torch.randint(0, RELATIONS, (EDGES,), generator=draw)
        self.places = torch.randn(N, 3, dtype=torch.float64, generator=draw)
        self.labels = torch.randint(0, CLASSES, (N,), generator=draw)


PLAIN = ("x", "edges")
WEIGHTED = ("x", "edges", "weights")
ATTRIBUTED = ("x", "edges", "attributes")
TYPED = ("x", "edges", "types")
PLACED = ("x", "places", "edges")


class Twice(nn.Module):
    """One convolution that is called twice, with weights and without."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, edges: Tensor, weights: Tensor) -> Tensor:
        out: Tensor = self.layer(torch.relu(self.layer(x, edges, weights)), edges)
        return out


def mlp(width: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 10), nn.ReLU(), nn.Linear(10, out))


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "CGConv": (lambda: pyg.CGConv(WIDTH, dim=5), ATTRIBUTED),
    "ChebConv": (lambda: pyg.ChebConv(WIDTH, CLASSES, 3), PLAIN),
    "ClusterGCNConv": (lambda: pyg.ClusterGCNConv(WIDTH, CLASSES), PLAIN),
    "DirGNNConv": (lambda: pyg.DirGNNConv(pyg.GCNConv(WIDTH, CLASSES)), PLAIN),
    "EGConv": (lambda: pyg.EGConv(WIDTH, 8, num_heads=4, num_bases=4), PLAIN),
    "EdgeConv": (lambda: pyg.EdgeConv(mlp(2 * WIDTH, CLASSES)), PLAIN),
    "FAConv": (lambda: pyg.FAConv(WIDTH), ("x", "x", "edges")),
    "FeaStConv": (lambda: pyg.FeaStConv(WIDTH, CLASSES, 2), PLAIN),
    "FiLMConv": (lambda: pyg.FiLMConv(WIDTH, CLASSES, num_relations=RELATIONS), TYPED),
    "GATConv": (lambda: pyg.GATConv(WIDTH, CLASSES, heads=2, concat=False), PLAIN),
    "GATConv with edges": (lambda: pyg.GATConv(WIDTH, CLASSES, edge_dim=5, residual=True), ATTRIBUTED),
    "GATConv of pairs": (lambda: pyg.GATConv((WIDTH, WIDTH), CLASSES, add_self_loops=False), ("pair", "edges")),
    "GATv2Conv": (lambda: pyg.GATv2Conv(WIDTH, CLASSES, heads=2, edge_dim=5, residual=True), ATTRIBUTED),
    "GATv2Conv shared": (lambda: pyg.GATv2Conv(WIDTH, CLASSES, share_weights=True), PLAIN),
    "GCNConv": (lambda: pyg.GCNConv(WIDTH, CLASSES), WEIGHTED),
    "GCNConv twice": (lambda: Twice(pyg.GCNConv(WIDTH, WIDTH)), WEIGHTED),
    "GCNConv improved": (lambda: pyg.GCNConv(WIDTH, CLASSES, improved=True, cached=True), WEIGHTED),
    "GCNConv reversed": (
        lambda: pyg.GCNConv(WIDTH, CLASSES, normalize=False, add_self_loops=False, flow="target_to_source"),
        WEIGHTED,
    ),
    "GCNConv mean": (lambda: pyg.GCNConv(WIDTH, CLASSES, aggr="mean"), WEIGHTED),
    "GCNConv max": (lambda: pyg.GCNConv(WIDTH, CLASSES, aggr="max"), WEIGHTED),
    "GENConv": (lambda: pyg.GENConv(WIDTH, CLASSES, edge_dim=5, msg_norm=True, learn_msg_scale=True), ATTRIBUTED),
    "GINConv": (lambda: pyg.GINConv(mlp(WIDTH, CLASSES), train_eps=True), PLAIN),
    "GINEConv": (lambda: pyg.GINEConv(mlp(WIDTH, CLASSES), edge_dim=5), ATTRIBUTED),
    "GMMConv": (lambda: pyg.GMMConv(WIDTH, CLASSES, 5, 4), ATTRIBUTED),
    "GPSConv": (lambda: pyg.GPSConv(WIDTH, pyg.GCNConv(WIDTH, WIDTH), heads=2, dropout=0.0), PLAIN),
    "GeneralConv": (
        lambda: pyg.GeneralConv(WIDTH, CLASSES, in_edge_channels=5, attention=True, heads=2, skip_linear=True),
        ATTRIBUTED,
    ),
    "GraphConv": (lambda: pyg.GraphConv(WIDTH, CLASSES), WEIGHTED),
    "LEConv": (lambda: pyg.LEConv(WIDTH, CLASSES), WEIGHTED),
    "MFConv": (lambda: pyg.MFConv(WIDTH, CLASSES, 5), PLAIN),
    "MixHopConv": (lambda: pyg.MixHopConv(WIDTH, 3, [0, 1]), PLAIN),
    "NNConv": (lambda: pyg.NNConv(WIDTH, CLASSES, mlp(5, WIDTH * CLASSES)), ATTRIBUTED),
    "PDNConv": (lambda: pyg.PDNConv(WIDTH, CLASSES, 5, 4), ATTRIBUTED),
    "PNAConv": (
        lambda: pyg.PNAConv(WIDTH, CLASSES, ["mean", "max"], ["identity", "amplification"], IN_DEGREES, edge_dim=5),
        ATTRIBUTED,
    ),
    "PointNetConv": (lambda: pyg.PointNetConv(mlp(WIDTH + 3, 10), mlp(10, CLASSES)), PLACED),
    "PointTransformerConv": (lambda: pyg.PointTransformerConv(WIDTH, CLASSES), PLACED),
    "ResGatedGraphConv": (lambda: pyg.ResGatedGraphConv(WIDTH, CLASSES), PLAIN),
    "RGCNConv": (lambda: pyg.RGCNConv(WIDTH, CLASSES, RELATIONS), TYPED),
    "RGCNConv of bases": (lambda: pyg.RGCNConv(WIDTH, CLASSES, RELATIONS, num_bases=2), TYPED),
    "FastRGCNConv": (lambda: pyg.FastRGCNConv(WIDTH, CLASSES, RELATIONS), TYPED),
    "SAGEConv": (lambda: pyg.SAGEConv(WIDTH, CLASSES, project=True, normalize=True), PLAIN),
    "SAGEConv of several": (lambda: pyg.SAGEConv(WIDTH, CLASSES, aggr=["mean", "max", "softmax"]), PLAIN),
    "SGConv": (lambda: pyg.SGConv(WIDTH, CLASSES, 2), PLAIN),
    "SSGConv": (lambda: pyg.SSGConv(WIDTH, CLASSES, 0.1, 2), PLAIN),
    "SuperGATConv": (lambda: pyg.SuperGATConv(WIDTH, CLASSES, heads=2, concat=False), PLAIN),
    "TAGConv": (lambda: pyg.TAGConv(WIDTH, CLASSES, 2), PLAIN),
    "TransformerConv": (
        lambda: pyg.TransformerConv(WIDTH, CLASSES, heads=2, edge_dim=5, beta=True, concat=False),
        ATTRIBUTED,
    ),
    "AntiSymmetricConv": (lambda: pyg.AntiSymmetricConv(WIDTH, num_iters=3), PLAIN),
}


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """The sums gᵀM over the calls that a step's factors are made of, by layer."""
    found: dict[str, Tensor] = {}
    take = Capture.take

    def noting(self: Capture, layer: CurvatureLayer, payload: Any, gradient: Tensor, **options: Any) -> None:
        gradients = layer.gradients(payload, gradient)
        gradients = gradients.reshape(-1, gradients.shape[-1])
        rows = layer.rows(payload)
        rows = rows.reshape(len(gradients), rows.shape[-1])
        if layer.has_ones:
            rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
        found[layer.name] = found.get(layer.name, 0) + gradients.T @ rows
        take(self, layer, payload, gradient, **options)

    monkeypatch.setattr(Capture, "take", noting)
    return found


@pytest.mark.parametrize("name", CASES)
def test_rows_and_gradients_make_the_weight_gradient_or_the_parameter_is_named(
    name: str, products: dict[str, Tensor]
) -> None:
    make, named = CASES[name]
    inputs = Inputs()
    arguments = [getattr(inputs, argument) for argument in named]
    torch.manual_seed(1)
    model = nn.ModuleDict({"conv": make().double()})
    with torch.no_grad():
        model["conv"](*arguments)  # layers that take their width from the first call have it now
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        optimizer = NaturalGradient(model, lr=1e-3, max_rows=None)
        for _ in range(3):
            optimizer.zero_grad()
            products.clear()
            out = model["conv"](*arguments)
            F.cross_entropy(out, inputs.labels % out.shape[1]).backward()
            gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
            layers = optimizer.preconditioner.layers.items()
            whole = {key: layer.gradient() for key, layer in layers if layer.kind != "normalization"}
            for key, gradient in whole.items():
                if gradient is not None and key in products:
                    assert close(products[key], gradient), f"{key}: rows and output gradients are not its gradient's"
            optimizer.step(num_samples=N)
    words = " ".join(str(warning.message) for warning in told)
    layer_of = {id(p): key for key, layer in layers for p in layer.parameters}
    measured = 0
    for key, parameter in model.named_parameters():
        if not bool(gradients.get(key, torch.zeros(())).count_nonzero()):
            continue  # no call needed it
        layer = layer_of.get(id(parameter))
        if layer is None or layer not in products:
            assert (key if layer is None else layer) in words, f"{key} has a gradient, no factors, and no word on it"
        else:
            assert float(optimizer.preconditioner.states[layer].folded.counts[0]) > 0
            measured += 1
    assert measured > 0
    optimizer.preconditioner.close()
