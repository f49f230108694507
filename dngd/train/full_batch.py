"""Constant full batch: all training nodes as seeds, all neighbours, one step an epoch, nothing sampled.

The layer graphs of a shard never change, so that they are read from the store's CSC once, with their operators. Nor do
the first layer's aggregated rows `M = Â·X`: aggregation has no parameters and there is no dropout on the input. M is
computed once, and the same object (a tensor, or SparseRows) is every step's input of the first linear map, which is how
the curvature knows that its factor A is constant.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dngd.graph import GraphStore
from dngd.models import GNN, GraphLayer, Propagation, SparseRows
from dngd.sampling.minibatch import LayerGraph
from dngd.sampling.sparse_features import MOST_OF_ROWS, SparseFirstRows
from dngd.train.batch import DeviceBatch, PropagationBuilder


class FullBatches:
    """This rank's shards, built once; every step hands out the same.

    train_nodes: int64 [n_l], of all shards. with_unlabelled: whether all other nodes of the graph are seeds too,
    behind the labelled ones of their shard. shards: those that this rank executes, of num_shards.
    features: the table; M is computed where it lies. rows: most rows of M computed at a time. device: where the batches
    are wanted; by default beside the features. sparse: the table's entries; M is kept as its own, where it has few.
    """

    def __init__(
        self,
        store: GraphStore,
        builder: PropagationBuilder,
        model: GNN,
        features: Tensor,
        train_nodes: Tensor,
        *,
        with_unlabelled: bool,
        shards: Sequence[int],
        num_shards: int,
        rows: int,
        device: torch.device | None = None,
        sparse: SparseRows | None = None,
    ) -> None:
        self._store = store
        self._builder = builder
        self._layers = model.graph_layers()
        self._features = features
        self._rows = rows
        self._device = features.device if device is None else device
        self._sparse = None if sparse is None else SparseFirstRows(builder.operators, sparse)
        others = outside(train_nodes, store.num_nodes) if with_unlabelled else train_nodes.new_empty(0)
        self._batches = {
            shard: self._build(part(train_nodes, shard, num_shards), part(others, shard, num_shards))
            for shard in shards
        }

    def batch(self, epoch: int, step: int, shard: int) -> DeviceBatch:
        """Return a shard's batch, the same object in each step."""
        return self._batches[shard]

    def look_ahead(self) -> None:
        """Do nothing: every batch is on its device."""

    def _build(self, labelled: Tensor, unlabelled: Tensor) -> DeviceBatch:
        device = self._device
        nodes = seeds = torch.cat([labelled, unlabelled])
        propagations: list[Propagation] = []
        closed = False
        for _ in self._layers[1:]:
            # Nodes that contain all their sources are the layer below's destinations too: the same graph again.
            if not closed:
                graph, sources = layer_graph(self._store, nodes)
                source_ids = sources[graph.indices]
                operator = self._builder.propagation(graph, source_ids, nodes, None).to(device)
                closed = sources.numel() == nodes.numel()
                nodes = sources
            propagations.insert(0, operator)
        labels = self._store.labels[labelled].to(device)
        if self._sparse is not None:
            entries = self._sparse.of(in_edges(self._store, nodes))
            if entries.share <= MOST_OF_ROWS:
                return DeviceBatch(seeds, labels, tuple(propagations), entries)
            del entries
        first = first_aggregation(self._layers[0], self._builder, self._store, self._features, nodes, self._rows)
        return DeviceBatch(seeds, labels, tuple(propagations), first.to(device))


def part(nodes: Tensor, shard: int, num_shards: int) -> Tensor:
    """Return a shard's seeds: its contiguous part of the sorted nodes, larger parts first, alike at any world size."""
    return nodes.sort().values.tensor_split(num_shards)[shard]


def outside(train_nodes: Tensor, num_nodes: int) -> Tensor:
    """Return the nodes that are not in the training set, sorted: int64 [num_nodes - n_l]."""
    is_outside = torch.ones(num_nodes, dtype=torch.bool)
    is_outside[train_nodes] = False
    return is_outside.nonzero()[:, 0]


def layer_graph(store: GraphStore, nodes: Tensor) -> tuple[LayerGraph, Tensor]:
    """Return all in-edges of nodes as a layer graph behind another layer, and its sources.

    nodes: int64 [n], distinct, the destinations. sources: int64 [num_src], global ids: the nodes themselves, then the
    other in-neighbours, sorted. `indices` are rows of sources.
    """
    edges = in_edges(store, nodes)
    is_new = torch.zeros(store.num_nodes, dtype=torch.bool)
    is_new[edges.indices] = True
    is_new[nodes] = False
    sources = torch.cat([nodes, is_new.nonzero()[:, 0]])
    row_of = torch.empty(store.num_nodes, dtype=torch.int64)
    row_of[sources] = torch.arange(sources.numel())
    graph = LayerGraph(
        indptr=edges.indptr,
        indices=row_of[edges.indices],
        num_src=sources.numel(),
        num_dst=edges.num_dst,
        degrees=edges.degrees,
        edge_weight=edges.edge_weight,
        dst_nodes=nodes,
        global_indices=False,
    )
    return graph, sources


def in_edges(store: GraphStore, nodes: Tensor) -> LayerGraph:
    """Return all in-edges of nodes, int64 [n], in the store's order, with global ids as `indices`."""
    starts = store.indptr[nodes]
    degrees = store.indptr[nodes + 1] - starts
    indptr = torch.zeros(nodes.numel() + 1, dtype=torch.int64)
    torch.cumsum(degrees, 0, out=indptr[1:])
    edge_ids = torch.arange(int(indptr[-1])) + torch.repeat_interleave(starts - indptr[:-1], degrees)
    return LayerGraph(
        indptr=indptr,
        indices=store.indices[edge_ids],
        num_src=store.num_nodes,
        num_dst=nodes.numel(),
        degrees=degrees,
        edge_weight=None if store.edge_weight is None else store.edge_weight[edge_ids],
        dst_nodes=nodes,
        global_indices=True,
    )


@torch.no_grad()
def first_aggregation(
    layer: GraphLayer, builder: PropagationBuilder, store: GraphStore, features: Tensor, nodes: Tensor, rows: int
) -> Tensor:
    """Return the first layer's rows M of nodes int64 [n]: [n, in_rows], computed `rows` at a time.

    Needs no gradient: M depends on no parameter.
    """
    dtype = torch.float32 if features.element_size() < 4 else features.dtype  # as aggregate's, of 16-bit features
    out = features.new_empty(nodes.numel(), layer.linear.in_features, dtype=dtype)
    for first in range(0, nodes.numel(), rows):
        chunk = nodes[first : first + rows]
        edges = in_edges(store, chunk)
        propagation = builder.propagation(edges, edges.indices, chunk, chunk).to(features.device)
        out[first : first + rows] = layer.aggregate(features, propagation)
    return out
