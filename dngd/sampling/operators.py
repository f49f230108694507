"""From sampled layer graphs to the operators that a model multiplies with, and the first layer's rows.

The coefficients come from the whole graph's degrees. The first layer's rows M need no parameter, so that they are
taken here, straight from the feature table: the matrix of gathered input rows, the largest of a batch, is never built.
Runs in the trainer and in sampler processes alike; plain functions of their arguments, whichever runs them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dngd.errors import UserError
from dngd.models.graph_batch import LeastTotal
from dngd.models.message_passing import (
    Aggregation,
    LayerGraphLike,
    Propagation,
    aggregate_rows,
    gcn_coefficients,
    inverse_sqrt_degrees,
    mean_coefficients,
)
from dngd.sampling.cached_rows import host_part
from dngd.sampling.left_out import LeftOut
from dngd.sampling.minibatch import LayerGraph
from dngd.sampling.topology import HasTopology

LARGEST_WEIGHT = 1e30
"""Of edges, in size: a hundred million of them sum to less than the 3.4e38 where 32-bit floats end."""


class LayerOperators:
    """Computes the operators of layer graphs, on the CPU.

    aggregation: what the model's layers take. norm: d^(-1/2) of every node as of node_norm; computed where it is None
    and aggregation is gcn.
    """

    def __init__(self, graph: HasTopology, aggregation: Aggregation, norm: Tensor | None = None) -> None:
        self.aggregation: Aggregation = aggregation
        self.norm = node_norm(graph) if norm is None and aggregation == "gcn" else norm

    def propagation(
        self,
        graph: LayerGraphLike,
        source_ids: Tensor,
        destination_ids: Tensor,
        destinations: Tensor | None,
        left_out: LeftOut | None = None,
    ) -> Propagation:
        """Return one layer's operator.

        source_ids: global id of each edge's source, [num_edges]. destination_ids: global ids, [num_dst].
        destinations: the destinations' rows in the source table, None if they are its first rows. left_out: what the
        degrees lack.
        """
        if self.norm is None:
            return Propagation(graph.indptr, graph.indices, mean_coefficients(graph), None, destinations)
        edges, selves = gcn_coefficients(
            graph, self._norm_of(source_ids, left_out), self._norm_of(destination_ids, left_out)
        )
        return Propagation(graph.indptr, graph.indices, edges, selves, destinations)

    def _norm_of(self, nodes: Tensor, left_out: LeftOut | None) -> Tensor:
        """Return d^(-1/2) of nodes, without the edges that are left out."""
        assert self.norm is not None
        norm = self.norm[nodes]
        if left_out is None:
            return norm
        kept = left_out.kept_of(nodes, norm.new_tensor(torch.nan))
        return torch.where(kept.isnan(), norm, (kept + 1.0).rsqrt().to(norm.dtype))

    def of_layers(self, layers: Sequence[LayerGraph]) -> tuple[Propagation, ...]:
        """Return the operators of layer graphs, input side first; their sources are global ids or the layer before."""
        operators = []
        below: LayerGraph | None = None
        for layer in layers:
            if layer.global_indices:
                operators.append(self.first(layer))
            else:
                assert below is not None, "a layer graph behind none"
                sources = below.dst_nodes[layer.indices]
                operators.append(self.propagation(layer, sources, layer.dst_nodes, None, layer.left_out))
            below = layer
        return tuple(operators)

    def behind(self, layers: Sequence[LayerGraph]) -> tuple[Propagation, ...]:
        """Return the operators of all layer graphs but the first, whose rows are known already."""
        return tuple(
            self.propagation(layer, below.dst_nodes[layer.indices], layer.dst_nodes, None, layer.left_out)
            for below, layer in zip(layers, layers[1:])
        )

    def first(self, layer: LayerGraph) -> Propagation:
        """Return the input layer's operator, from the table of all nodes."""
        return self.propagation(layer, layer.indices, layer.dst_nodes, layer.dst_nodes, layer.left_out)


class FirstRows:
    """Takes the input layer's rows M straight from the feature table, memory-mapped or not.

    features: [N, F]. dtype: of M: float32 from a 16-bit table, else the table's.
    on_host: bool [N], where a device keeps the rows of the other nodes: their part of M is left out.
    """

    def __init__(self, operators: LayerOperators, features: Tensor, on_host: Tensor | None = None) -> None:
        self._operators = operators
        self._features = features
        self._on_host = on_host
        self.dtype = torch.float32 if features.element_size() < 4 else features.dtype

    def shape(self, layer: LayerGraph) -> list[int]:
        """Return M's shape: [num_dst, F], twice the width for the mean, which keeps a node's own row apart."""
        return [layer.num_dst, self._features.shape[1] * (2 if self._operators.aggregation == "mean" else 1)]

    def operator(self, layer: LayerGraph) -> Propagation | None:
        """Return the input layer's operator where a device adds a part of M, None where M is whole."""
        return None if self._on_host is None else self._operators.first(layer)

    def of(self, layer: LayerGraph, out: Tensor | None = None, operator: Propagation | None = None) -> Tensor:
        """Return M of an input layer graph. out: where to write it, of M's shape and type.

        operator: the layer's, if it is known already.
        """
        aggregation = self._operators.aggregation
        operator = self._operators.first(layer) if operator is None else operator
        if self._on_host is not None:
            return host_part(aggregation, self._features, operator, self._on_host, out)
        return aggregate_rows(aggregation, self._features, operator, out)


def first_rows_of(
    graph: HasTopology,
    aggregation: Aggregation | None,
    norm: Tensor | None = None,
    on_host: Tensor | None = None,
) -> FirstRows | None:
    """Return what takes a graph's first rows; None where aggregation is None. on_host: see FirstRows."""
    if aggregation is None:
        return None
    features: Tensor | None = getattr(graph, "features", None)
    assert features is not None, "the first layer's rows were asked for of a graph without features"
    return FirstRows(LayerOperators(graph, aggregation, norm), features, on_host)


def check_weights(graph: HasTopology) -> None:
    """Raise UserError for an edge weight above LARGEST_WEIGHT in size, or NaN.

    Sums of such weights, and their products with rows, end in infinity, by which a norm or a mean becomes 0: messages
    would vanish without a word. Reads the weights once.
    """
    weights = graph.edge_weight
    if weights is None or weights.numel() == 0:
        return
    if bool((torch.stack(weights.aminmax()).abs() <= LARGEST_WEIGHT).all()):
        return
    edge = int((~(weights.abs() <= LARGEST_WEIGHT)).nonzero()[0, 0])
    node = int(torch.searchsorted(graph.indptr, edge, right=True)) - 1
    raise UserError(
        f"the edge from node {int(graph.indices[edge])} to node {node} of {_name_of(graph)} has the weight "
        f"{float(weights[edge]):g}, and 32-bit floats do not hold sums of weights beyond {LARGEST_WEIGHT:g}; divide "
        "all weights by one number"
    )


def node_norm(graph: HasTopology) -> Tensor:
    """Return GCN's d_v^(-1/2) of every node, float32 [N]; weighted in-degrees where the graph has weights.

    Raises UserError where a node's weights sum to -1 or less, and for what `check_weights` refuses.
    """
    degrees = graph.indptr.diff()
    if graph.edge_weight is None:
        return inverse_sqrt_degrees(degrees)
    check_weights(graph)
    totals = torch.segment_reduce(graph.edge_weight.to(torch.float64), "sum", offsets=graph.indptr, axis=0)
    if totals.numel():
        LeastTotal.of(graph, totals).check(1.0, "--model sage")
    return inverse_sqrt_degrees(degrees, totals)


def _name_of(graph: HasTopology) -> str:
    return str(getattr(graph, "name", "the graph"))
