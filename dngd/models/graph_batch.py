"""What a module of one's own gets of a mini-batch: input rows and one set of edges a layer, input side first.

Row numbers are local: the destinations of a layer are the first rows of its sources, and the sources of a layer are
the destinations of the one before. So a module keeps `num_dst` rows a layer, and its last ones are the seeds::

    class Mean(torch.nn.Module):
        def forward(self, batch: dngd.GraphBatch) -> Tensor:
            h = batch.x
            for linear, edges in zip(self.linears, batch.layers):
                h = linear(edges.mean(h) + h[: edges.num_dst])
            return h
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn, Protocol, runtime_checkable

import torch
from torch import Tensor

from dngd.errors import UserError


@dataclass(frozen=True)
class GraphShape:
    """What a module must fit: width of the features, and number of outputs (classes, labels of a node, or in link
    prediction the width of its embedding)."""

    num_features: int
    num_classes: int


@dataclass(frozen=True)
class LeastTotal:
    """The least sum of in-edge weights in a whole graph, and the node whose it is."""

    graph: str
    node: int
    total: float

    @classmethod
    def of(cls, graph: object, totals: Tensor) -> LeastTotal:
        """Return that of a graph, which may have a name. totals: [N], N > 0."""
        node = int(totals.argmin())
        return cls(str(getattr(graph, "name", "the graph")), node, float(totals[node]))

    def check(self, self_weight: float, instead: str) -> None:
        """Raise UserError where GCN's normalisation by d = self_weight + total is not defined: d < 0, or, with self
        loops, d = 0. instead: what does without it."""
        if self.total > -self_weight or self.total == self_weight == 0:
            return
        sums = f"above {-self_weight:g}" if self_weight else "of at least 0"
        raise UserError(
            f"node {self.node} of {self.graph} has in-edge weights that sum to {self.total:g}; GCN's normalisation "
            f"needs sums {sums}, so use weights of at least 0, or {instead}"
        )


@dataclass(frozen=True)
class LayerEdges:
    """One layer's edges, from source rows to destination rows.

    edge_index: int64 [2, E] as PyG's: row 0 sources (0 to num_src - 1), row 1 destinations (0 to num_dst - 1),
        ascending. Sampled, where there is a fanout.
    num_src, num_dst: rows; the destinations are the first num_dst sources.
    degrees: int64 [num_src], in-degrees in the whole graph. totals: float32 [num_src], summed weights of the in-edges
        there; the degrees of a graph without weights.
    edge_weight: float32 [E], None of a graph without weights.
    least_total: of the whole graph's nodes, where it has weights; None: not known.
    """

    edge_index: Tensor
    num_src: int
    num_dst: int
    degrees: Tensor
    totals: Tensor
    edge_weight: Tensor | None = None
    least_total: LeastTotal | None = None

    def mean(self, rows: Tensor) -> Tensor:
        """Return the mean of each destination's sources (weighted by edge_weight), [num_dst, d], from rows
        [num_src, d]; zeros without edges. Of 16-bit rows sums and counts are taken in float32."""
        source, destination = self.edge_index
        wide = rows.float() if rows.element_size() < 4 else rows
        weight = wide.new_ones(source.numel()) if self.edge_weight is None else self.edge_weight.to(wide)
        sums = wide.new_zeros(self.num_dst, rows.shape[1]).index_add_(0, destination, wide[source] * weight[:, None])
        counts = wide.new_zeros(self.num_dst).index_add_(0, destination, weight)
        return (sums / torch.where(counts == 0, 1.0, counts)[:, None]).to(rows.dtype)

    def gcn(self) -> tuple[Tensor, Tensor]:
        """Return GCN's edges, self loops added, and their coefficients: ([2, E + num_dst], float32 [E + num_dst]).

        See gcn_coefficients. For convolutions that take edge weights as they are, such as GCNConv(normalize=False).
        """
        own = torch.arange(self.num_dst, device=self.edge_index.device)
        edges = torch.cat([self.edge_index, own.expand(2, -1)], dim=1)
        return edges, torch.cat(self.gcn_coefficients())

    def gcn_coefficients(self, self_weight: float = 1.0, *, weighted: bool = True) -> tuple[Tensor, Tensor]:
        """Return GCN's coefficients of the edges, float32 [E], and of the destinations' self loops, [num_dst].

        `c_uv = (deg_v / k_v) · w_uv · d_u^(-1/2) · d_v^(-1/2)` and `c_vv = s / d_v`, with d = s + totals of the whole
        graph and k_v the sampled neighbours: unbiased for `D^(-1/2)(A + sI)D^(-1/2)`, but for edges that are left out
        after the draw (dngd.models.message_passing.gcn_coefficients). self_weight: s, at least 0; where d is 0, so are
        the coefficients. weighted: by edge_weight and totals, where the graph has them; else by degrees. Raises
        UserError where a node of the graph has a d below 0, or of 0 with s.
        """
        if weighted and self.least_total is not None:
            self.least_total.check(self_weight, "a convolution that does not normalise")
        source, destination = self.edge_index
        totals = self.totals if weighted else self.degrees
        norm = (totals + self_weight).rsqrt()
        if not self_weight:
            norm = norm.masked_fill(norm.isinf(), 0.0)
        sampled = torch.bincount(destination, minlength=self.num_dst).clamp_min(1)
        scale = norm[: self.num_dst] * self.degrees[: self.num_dst] / sampled
        coefficients = norm[source] * scale[destination]
        if weighted and self.edge_weight is not None:
            coefficients = coefficients * self.edge_weight
        return coefficients, self_weight * norm[: self.num_dst].square()

    def tensors(self) -> Iterator[Tensor]:
        """Yield all tensors."""
        yield from (self.edge_index, self.degrees, self.totals)
        if self.edge_weight is not None:
            yield self.edge_weight


OF_DATA = ("edge_index", "edge_weight", "edge_attr", "adj_t", "y", "batch")
"""What a module over PyG's Data objects looks for."""


@dataclass(frozen=True)
class GraphBatch:
    """A mini-batch, or a whole graph's batch, for a module.

    x: [num_inputs, F] features of the input nodes, float32 of 16-bit tables. layers: one a layer, input side first.
    nodes: int64 [num_inputs], global ids of x's rows. seeds: int64 [n], global ids of the outputs' rows, the first n of
    `nodes`. Both are on the CPU, also where x is on a GPU: `batch.nodes.to(batch.x.device)` for an embedding there.
    """

    x: Tensor
    layers: tuple[LayerEdges, ...]
    nodes: Tensor
    seeds: Tensor

    def __getattr__(self, name: str) -> NoReturn:
        if name in OF_DATA:
            raise AttributeError(
                f"a GraphBatch has no {name}: it has a set of edges for each layer (batch.layers); a model of PyG's "
                "that takes a Data object is to take forward(x, edge_index)"
            )
        raise AttributeError(f"a GraphBatch has no {name}")

    def tensors(self) -> Iterator[Tensor]:
        """Yield all tensors that lie on the device."""
        yield self.x
        for layer in self.layers:
            yield from layer.tensors()


@runtime_checkable
class LayerwiseModule(Protocol):
    """A module that can be evaluated layer by layer: exactly, and each node once a layer."""

    def forward_layer(self, index: int, x: Tensor, edges: LayerEdges) -> Tensor:
        """Return layer `index`'s output with whatever follows it (activation, say), [num_dst, d], from its source rows
        [num_src, d_in]; the last layer's are the outputs, [num_dst, C]."""
