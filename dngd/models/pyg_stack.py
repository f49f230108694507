"""A stack of PyG's convolutions over layer graphs."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dngd.errors import UserError
from dngd.models.activation import relu_dropout
from dngd.models.graph_batch import GraphBatch, LayerEdges
from dngd.models.pyg_model import differing_share, small_batch
from dngd.models.pyg_norm import TAKES_COEFFICIENTS, check_sampled, pyg_name

WHOLE_MODEL = "a model of forward(x, edge_index) in place of a PyGStack"


class PyGStack(nn.Module):
    """`h ← dropout(relu(conv(h)))` for every convolution but the last, whose output are the logits.

    ::

        from torch_geometric.nn import SAGEConv
        stack = dngd.PyGStack([SAGEConv(100, 256), SAGEConv(256, 47)], dropout=0.5)

    convs: message-passing layers of PyG, one a layer graph, with widths given (no lazy -1). A GCNConv must be made with
    `normalize=False`: it gets the whole graph's coefficients (LayerEdges.gcn), which a sampled layer graph does not
    tell. Convolutions that take (sources, destinations) compute destinations alone; others all rows, of which the
    destinations are kept. Edge weights go to convolutions that take `edge_weight`.
    Layers may be used one at a time (LayerwiseModule), so that evaluation is exact. Raises UserError for a convolution
    that normalises by itself or takes out-edges, and for a dropout that is not in [0, 1).
    """

    def __init__(self, convs: Iterable[nn.Module], *, dropout: float = 0.5) -> None:
        super().__init__()
        self.convs = nn.ModuleList(convs)
        self.dropout = dropout
        if not 0 <= dropout < 1:
            raise UserError(f"dropout={dropout} is out of range; it must be at least 0 and below 1")
        for conv in self.convs:
            _check(conv)

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

    @torch.no_grad()
    def check(self, num_features: int) -> None:
        """Raise UserError for a layer whose rows depend on those of nodes without an edge to their own, and warn of one
        that gives some nodes other rows from all their in-neighbours than on the whole graph, as where it counts
        degrees by itself: on a small directed graph, in evaluation mode. One that cannot be run on it is warned of.
        """
        if any(parameter.device.type != "cpu" for parameter in self.parameters()):
            return
        width, dtype = num_features, torch.float32
        for index, layer in enumerate(self.convs):
            shown = f"layer {index} of the PyGStack, {type(layer).__name__},"
            weight = inspect.signature(layer.forward).parameters.get("edge_weight")
            weighted = weight is not None and weight.default is weight.empty
            batch, x, edge_index = small_batch(width, 1, weighted=weighted)
            x, edge_index = x.to(dtype), edge_index[:, edge_index[1].argsort(stable=True)]
            hidden = x.index_fill(0, _outside(batch.nodes, len(x)), torch.nan)
            try:
                conv = copy.deepcopy(layer).eval()  # some keep what they see
                with torch.random.fork_rng(devices=[]):
                    runs = [_alone(conv, rows, edge_index, weighted)[batch.seeds] for rows in (x, x, hidden)]
                    found = convolve(conv, batch.x.to(dtype), batch.layers[0])
                wanted, again, reached = runs
            except Exception as error:
                warnings.warn(
                    f"{shown} could not be run on a small graph of random rows ({type(error).__name__}: {error}), so "
                    "that it is not known whether a layer graph has what its rows depend on",
                    stacklevel=2,
                )
                return
            if bool(reached.isnan().any()) and not bool(wanted.isnan().any()):
                raise UserError(
                    f"{shown} depends on nodes that have no edge to a row's own (neighbours of neighbours, out-edges, "
                    f"or all nodes), which a layer graph does not have; give {WHOLE_MODEL}, with all of its hops in "
                    "num_layers"
                )
            share = differing_share(wanted, again, found)
            if share:
                warnings.warn(
                    f"{shown} gives other rows on the in-neighbours of some nodes than on the whole graph that they "
                    f"are of (by {share:.1%} on a small one): degrees that it counts by itself, or numbers of nodes or "
                    "neighbours, which a layer graph does not have. Predictions will depend on eval_rows",
                    stacklevel=2,
                )
            width, dtype = wanted.shape[1], wanted.dtype


def convolve(conv: Any, x: Tensor, edges: LayerEdges) -> Tensor:
    """Return a PyG convolution's output at the destinations, [num_dst, d], from source rows [num_src, d_in]."""
    parameters = inspect.signature(conv.forward).parameters
    if _is_gcn(conv):
        edge_index, coefficients = edges.gcn()
        out: Tensor = conv(x, edge_index, edge_weight=coefficients)
        return out[: edges.num_dst]
    weights = {}
    if edges.edge_weight is not None and "edge_weight" in parameters:
        weights["edge_weight"] = edges.edge_weight
    if _takes_pairs(parameters):
        paired: Tensor = conv((x, x[: edges.num_dst]), edges.edge_index, **weights)
        return paired
    square: Tensor = conv(x, edges.edge_index, **weights)
    return square[: edges.num_dst]


def _alone(conv: Any, x: Tensor, edge_index: Tensor, weighted: bool) -> Tensor:
    """Return a convolution's rows on a whole graph, whose coefficients are a GCNConv's."""
    ones = torch.ones(edge_index.shape[1]) if weighted else None
    if _is_gcn(conv):
        degrees = torch.bincount(edge_index[1], minlength=len(x))
        return convolve(conv, x, LayerEdges(edge_index, len(x), len(x), degrees, degrees.float(), ones))
    weights: Mapping[str, Tensor] = {} if ones is None else {"edge_weight": ones}
    out: Tensor = conv(x, edge_index, **weights)
    return out


def _outside(nodes: Tensor, num_nodes: int) -> Tensor:
    """Return the ids of the other nodes, ascending."""
    return torch.ones(num_nodes).index_fill(0, nodes, 0.0).nonzero()[:, 0]


def _check(conv: nn.Module) -> None:
    """Raise UserError for a convolution that is not right on a layer graph."""
    for name, module in conv.named_modules():
        shown = f"{type(module).__name__}{f' {name}' if name else ''}"
        check_sampled(module, shown, f", in {WHOLE_MODEL}")
        kind = pyg_name(module, *TAKES_COEFFICIENTS)
        is_gcn = kind == "GCNConv" and not name
        if is_gcn and "edge_weight" not in inspect.signature(module.forward).parameters:
            raise UserError(
                f"{shown} is a GCNConv whose forward takes no edge_weight, where it would get the whole graph's "
                "coefficients; let it take one"
            )
        if kind is not None and getattr(module, "normalize", False):
            fix = "make it with normalize=False, and it" if is_gcn else f"give {WHOLE_MODEL}, whose convolutions"
            raise UserError(
                f"{shown} normalises by the degrees of the edges that it sees, which are a sample here; {fix} "
                f"get{'s' if is_gcn else ''} the whole graph's coefficients"
            )


def _is_gcn(conv: nn.Module) -> bool:
    return pyg_name(conv, "GCNConv") is not None


def _takes_pairs(parameters: Any) -> bool:
    """Whether the first argument may be (sources, destinations); PyG tells by its type alone."""
    first = next(iter(parameters.values()), None)
    return first is not None and "tuple" in str(first.annotation).lower().replace("pairtensor", "tuple")
