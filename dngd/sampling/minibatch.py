"""What a sampler returns: layer graphs (message-flow graphs), input side first.

Destination rows are the first rows of the source rows, as in DGL. The input layer's edges name global
node ids: its distinct source nodes are never collected, since the first aggregation reads the feature table
itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from dngd.models.message_passing import Propagation
from dngd.models.sparse_rows import SparseRows
from dngd.sampling.left_out import LeftOut


@dataclass(frozen=True)
class BatchCoordinates:
    """Where a mini-batch stands in a run; with the run seed, everything that its content depends on."""

    epoch: int
    step: int
    """Within the epoch, from 0."""
    shard: int

    def __str__(self) -> str:
        return f"epoch {self.epoch}, step {self.step}, shard {self.shard}"


@dataclass(frozen=True)
class LayerGraph:
    """One layer's sampled edges, by destination (CSC).

    indptr: int64 [num_dst + 1]; edges of destination row i are indices[indptr[i]:indptr[i + 1]].
    indices: int64 [num_edges], the source of each edge: a global node id where global_indices is True (the
        input layer), else a row of the layer before (`layers[l - 1].dst_nodes[indices]` are the global ids).
    num_src: rows that indices may name: all nodes of the graph for the input layer, else the layer
        before's num_dst, of which the first num_dst rows are this layer's own destinations.
    degrees: int64 [num_dst], in-degree of each destination in the full graph, without edges that are excluded from
        the batch.
    edge_weight: float32 [num_edges], or None on a graph without weights.
    dst_nodes: int64 [num_dst], global ids. left_out: what excluded edges take from degrees, those of sources too.

    Edges stand in the order of their destination and, within it, of the draw: a function of the random
    seed alone. With all neighbours (fanout -1) that is the order in the graph.
    """

    indptr: Tensor
    indices: Tensor
    num_src: int
    num_dst: int
    degrees: Tensor
    edge_weight: Tensor | None
    dst_nodes: Tensor
    global_indices: bool
    left_out: LeftOut | None = None

    @property
    def num_edges(self) -> int:
        """Number of sampled edges."""
        return int(self.indices.shape[0])


class Drawn(NamedTuple):
    """What is drawn for a batch's seeds; see MiniBatch."""

    layers: tuple[LayerGraph, ...]
    first_rows: Tensor | SparseRows | None = None
    first_operator: Propagation | None = None
    nodes: Tensor | None = None


@dataclass(frozen=True)
class SeedPairs:
    """Pairs of seeds of link prediction. rows: int64 [m, 2], places among the batch's seeds; the first num_links are
    links, the others negatives."""

    rows: Tensor
    num_links: int


@dataclass(frozen=True)
class MiniBatch:
    """A shard's part of one step.

    seeds: int64 [n], global ids, distinct; n may be 0. layers[-1].dst_nodes are the seeds, in this order.
    num_labelled: how many of them, the first ones, are training nodes; None: all.
    first_rows: float32 [layers[0].num_dst, width], the rows that enter the first layer's `nn.Linear`, where the
    pipeline was asked for them (SamplerPipeline's aggregation); SparseRows of a table that it has as these.
    first_operator: the input layer's, from the table of all nodes, where first_rows lacks the part of the nodes whose
    features a device keeps (SamplerPipeline's on_host): what CachedRows.part adds it with. pairs: of link prediction,
    where seeds are the pairs' end nodes. excluded: int64, ascending, entries of the graph's indices that no layer graph
    has. nodes: int64, where each node's neighbours are drawn once (HopSampler): the global ids of the rows that layer
    graphs name. Arrays that a sampler process sent lie in memory that is used again once nothing refers to them; clone
    what is to outlive the batch for long.
    """

    seeds: Tensor
    layers: tuple[LayerGraph, ...]
    coordinates: BatchCoordinates
    first_rows: Tensor | SparseRows | None = None
    first_operator: Propagation | None = None
    num_labelled: int | None = None
    pairs: SeedPairs | None = None
    excluded: Tensor | None = None
    nodes: Tensor | None = None

    @property
    def num_edges(self) -> int:
        """Number of sampled edges of all layers."""
        return sum(layer.num_edges for layer in self.layers)
