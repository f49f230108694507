"""A stack of PyG's convolutions over layer graphs."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from dngd.errors import UserError
from dngd.models.activation import relu_dropout
from dngd.models.graph_batch import GraphBatch, LayerEdges


class PyGStack(nn.Module):
    """`h ← dropout(relu(conv(h)))` for every convolution but the last, whose output are the logits.

    ::

        from torch_geometric.nn import SAGEConv
        stack = dngd.PyGStack([SAGEConv(100, 256), SAGEConv(256, 47)], dropout=0.5)

    convs: message-passing layers of PyG, one a layer graph, with widths given (no lazy -1). A GCNConv must be made with
    `normalize=False`: it gets the whole graph's coefficients (LayerEdges.gcn), which a sampled layer graph does not
    tell. Convolutions that take (sources, destinations) compute destinations alone; others all rows, of which the
    destinations are kept. Edge weights go to convolutions that take `edge_weight`.
    Layers may be used one at a time (LayerwiseModule), so that evaluation is exact. Raises UserError for a GCNConv that
    normalises by itself, and for a dropout that is not in [0, 1).
    """

    def __init__(self, convs: Iterable[nn.Module], *, dropout: float = 0.5) -> None:
        super().__init__()
        self.convs = nn.ModuleList(convs)
        self.dropout = dropout
        if not 0 <= dropout < 1:
            raise UserError(f"dropout={dropout} is out of range; it must be at least 0 and below 1")
        for conv in self.convs:
            if _is_gcn(conv) and getattr(conv, "normalize", False):
                raise UserError(
                    "GCNConv normalises by the degrees of the edges that it sees, which are a sample here; make it "
                    "with normalize=False, and it gets the whole graph's coefficients"
                )

    def forward(self, batch: GraphBatch) -> Tensor:
        """Return the seeds' logits, [n, C]."""
        if len(batch.layers) != len(self.convs):
            raise UserError(
                f"the batch has {len(batch.layers)} layer graphs for {len(self.convs)} convolutions; sample with one "
                "fanout a convolution"
            )
        hidden = batch.x
        for index, edges in enumerate(batch.layers):
            hidden = self.forward_layer(index, hidden, edges)
        return hidden

    def forward_layer(self, index: int, x: Tensor, edges: LayerEdges) -> Tensor:
        """Return layer `index`'s rows, [num_dst, d]; see LayerwiseModule."""
        out = convolve(self.convs[index], x, edges)
        if index + 1 == len(self.convs):
            return out
        return relu_dropout(out, self.dropout, self.training)


def convolve(conv: Any, x: Tensor, edges: LayerEdges) -> Tensor:
    """Return a PyG convolution's output at the destinations, [num_dst, d], from source rows [num_src, d_in]."""
    parameters = inspect.signature(conv.forward).parameters
    if _is_gcn(conv):
        edge_index, coefficients = edges.gcn()
        out: Tensor = conv(x, edge_index, coefficients)
        return out[: edges.num_dst]
    weights = {}
    if edges.edge_weight is not None and "edge_weight" in parameters:
        weights["edge_weight"] = edges.edge_weight
    if _takes_pairs(parameters):
        paired: Tensor = conv((x, x[: edges.num_dst]), edges.edge_index, **weights)
        return paired
    square: Tensor = conv(x, edges.edge_index, **weights)
    return square[: edges.num_dst]


def _is_gcn(conv: nn.Module) -> bool:
    return type(conv).__module__.startswith("torch_geometric.") and type(conv).__name__ == "GCNConv"


def _takes_pairs(parameters: Any) -> bool:
    """Whether the first argument may be (sources, destinations); PyG tells by its type alone."""
    first = next(iter(parameters.values()), None)
    return first is not None and "tuple" in str(first.annotation).lower().replace("pairtensor", "tuple")
