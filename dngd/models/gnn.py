"""A stack of graph layers with ReLU and dropout between them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from dngd.errors import UserError
from dngd.models.activation import relu_dropout
from dngd.models.layers import GCNLayer, GraphLayer, SAGELayer
from dngd.models.message_passing import Aggregation, Propagation
from dngd.models.sparse_rows import SparseRows

MODELS: dict[str, type[GCNLayer] | type[SAGELayer]] = {"gcn": GCNLayer, "sage": SAGELayer}


class GNN(nn.Module):
    """`h ← dropout(relu(layer(h)))` for every layer but the last, whose output are the logits.

    The first layer takes the whole feature table and aggregates straight from it. The layers are also
    used one at a time by exact evaluation (dngd.train.evaluation).
    """

    def __init__(self, layers: Sequence[GraphLayer], dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.dropout = dropout

    @property
    def aggregation(self) -> Aggregation:
        """Which coefficients the layers' Propagation needs."""
        return self.graph_layers()[0].aggregation

    def graph_layers(self) -> list[GraphLayer]:
        """Return the layers, input side first."""
        return [layer for layer in self.layers if isinstance(layer, GraphLayer)]

    def between(self, hidden: Tensor) -> Tensor:
        """Return what follows every layer but the last: ReLU, then dropout in training mode."""
        return relu_dropout(hidden, self.dropout, self.training)

    def forward(
        self,
        features: Tensor,
        propagations: Sequence[Propagation],
        first_aggregation: Tensor | SparseRows | None = None,
        first_output: Tensor | None = None,
    ) -> Tensor:
        """Return the seeds' logits, [num_seeds, num_classes].

        features: [N, F], the whole table that the first propagation indexes. propagations: one a layer.
        first_aggregation: the first layer's rows M, [num_dst, in_rows], where they are known already: they go into
            its `nn.Linear` as the object that they are, features are not read, and propagations are those of the
            layers behind it.
        first_output: [num_dst, out_features], what the first layer makes of those rows, where that is known too: the
            layers behind it alone are gone through.
        """
        first, *others = self.graph_layers()
        if first_output is not None:
            assert first_aggregation is not None, "propagations are of the layers behind the first"
            hidden = first_output
        elif first_aggregation is None:
            hidden = first(features, propagations[0])
            propagations = propagations[1:]
        else:
            hidden = first.linear(first_aggregation)
        assert len(propagations) == len(others), "one propagation a layer"
        for layer, propagation in zip(others, propagations):
            hidden = layer(self.between(hidden), propagation)
        logits: Tensor = hidden
        return logits


def build_model(kind: str, *, in_features: int, hidden: int, out_features: int, num_layers: int, dropout: float) -> GNN:
    """Return a GNN of num_layers layers, hidden wide inside; weights from torch's current random stream.

    Raises UserError for an unknown kind.
    """
    if kind not in MODELS:
        raise UserError(f"model={kind!r} is unknown; use one of: " + ", ".join(sorted(MODELS)))
    widths = [in_features] + [hidden] * (num_layers - 1) + [out_features]
    return GNN([MODELS[kind](a, b) for a, b in zip(widths, widths[1:])], dropout)
