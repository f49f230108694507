"""Batches for modules of one's own: from sampled layer graphs, or all neighbours, to a GraphBatch on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dngd.graph import GraphStore
from dngd.models.graph_batch import GraphBatch, LayerEdges, LeastTotal
from dngd.sampling import MiniBatch
from dngd.sampling.minibatch import LayerGraph
from dngd.train.batch import DeviceBatch, Move, targets
from dngd.train.full_batch import in_edges, layer_graph, outside, part


class ModuleBatchBuilder:
    """Makes GraphBatches of a graph.

    features: the table [N, F], on the CPU or the device; rows of 16-bit floats are widened. device: where batches are
    wanted.
    """

    def __init__(self, store: GraphStore, features: Tensor, device: torch.device) -> None:
        self._store = store
        self._features = features
        self._device = device
        self._degrees = store.in_degrees()
        self._least_total: LeastTotal | None = None
        if store.edge_weight is None:
            self._totals = self._degrees.float()
        else:
            totals = torch.segment_reduce(store.edge_weight.double(), "sum", offsets=store.indptr, axis=0)
            self._totals = totals.float()
            self._least_total = LeastTotal.of(store, totals)

    def batch(self, mini_batch: MiniBatch, move: Move | None = None) -> DeviceBatch:
        """Return a sampled mini-batch. move: how tensors get to the device; by default in the current stream."""
        move = self._move if move is None else move
        first, *others = mini_batch.layers
        edges, nodes = self.local(first, move)
        layers, below = [edges], first.dst_nodes
        for layer in others:
            layers.append(self.edges(layer, below, move))
            below = layer.dst_nodes
        graph = GraphBatch(self.rows(self._features, nodes, move), tuple(layers), nodes, mini_batch.seeds)
        labels, pairs = targets(self._store, mini_batch, move)
        return DeviceBatch(mini_batch.seeds, labels, (), graph=graph, pairs=pairs)

    def whole(self, seeds: Tensor, num_layers: int) -> GraphBatch:
        """Return the seeds' batch with all neighbours in every layer. seeds: int64 [n], distinct."""
        layers: list[LayerEdges] = []
        nodes = seeds
        for _ in range(num_layers):
            graph, sources = layer_graph(self._store, nodes)
            layers.insert(0, self.edges(graph, sources, self._move))
            nodes = sources
        return GraphBatch(self.rows(self._features, nodes, self._move), tuple(layers), nodes, seeds)

    def of_nodes(self, nodes: Tensor) -> tuple[LayerEdges, Tensor]:
        """Return all in-edges of nodes, int64 [n], distinct, as a layer, and the global ids of its sources."""
        return self.local(in_edges(self._store, nodes), self._move)

    def local(self, graph: LayerGraph, move: Move) -> tuple[LayerEdges, Tensor]:
        """Return a layer whose sources are global ids with local ones, and the global ids of its sources:
        the destinations first, then the others, ascending."""
        num_dst = graph.num_dst
        distinct, place = torch.unique(torch.cat([graph.dst_nodes, graph.indices]), return_inverse=True)
        row_of = torch.full((distinct.numel(),), -1)
        row_of[place[:num_dst]] = torch.arange(num_dst)
        others = (row_of < 0).nonzero()[:, 0]
        row_of[others] = torch.arange(num_dst, distinct.numel())
        nodes = torch.empty_like(distinct)
        nodes[row_of] = distinct
        return self._edges(graph, row_of[place[num_dst:]], nodes, move), nodes

    def edges(self, graph: LayerGraph, sources: Tensor, move: Move) -> LayerEdges:
        """Return a layer whose sources are rows already. sources: their global ids, int64 [num_src]."""
        return self._edges(graph, graph.indices, sources, move)

    def rows(self, table: Tensor, nodes: Tensor, move: Move | None = None) -> Tensor:
        """Return rows of a table of all nodes on the device; float32 of 16-bit floats."""
        move = self._move if move is None else move
        if table.device.type == "cpu":
            found = table.index_select(0, nodes)
            return move(found.float() if found.element_size() < 4 else found)
        found = table.index_select(0, move(nodes))
        return found.float() if found.element_size() < 4 else found

    def _edges(self, graph: LayerGraph, indices: Tensor, sources: Tensor, move: Move) -> LayerEdges:
        destinations = torch.repeat_interleave(torch.arange(graph.num_dst), graph.indptr.diff())
        weight, left_out = graph.edge_weight, graph.left_out
        degrees, totals = self._degrees[sources], self._totals[sources]
        if left_out is not None:
            degrees = degrees - left_out.counts_of(sources).to(degrees.dtype)
            totals = left_out.kept_of(sources, totals).to(totals.dtype)
        return LayerEdges(
            move(torch.stack([indices, destinations])),
            sources.numel(),
            graph.num_dst,
            move(degrees),
            move(totals),
            None if weight is None else move(weight),
            self._least_total,
        )

    def _move(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, non_blocking=True)


class ModuleFullBatches:
    """Constant full batch for a module: this rank's shards with all neighbours, built once; see FullBatches."""

    def __init__(
        self,
        store: GraphStore,
        builder: ModuleBatchBuilder,
        train_nodes: Tensor,
        *,
        with_unlabelled: bool,
        shards: Sequence[int],
        num_shards: int,
        num_layers: int,
        device: torch.device,
    ) -> None:
        others = outside(train_nodes, store.num_nodes) if with_unlabelled else train_nodes.new_empty(0)
        self._batches = {}
        for shard in shards:
            labelled = part(train_nodes, shard, num_shards)
            seeds = torch.cat([labelled, part(others, shard, num_shards)])
            labels = store.labels[labelled].to(device)
            self._batches[shard] = DeviceBatch(seeds, labels, (), graph=builder.whole(seeds, num_layers))

    def batch(self, epoch: int, step: int, shard: int) -> DeviceBatch:
        """Return a shard's batch, the same object in each step."""
        return self._batches[shard]

    def look_ahead(self) -> None:
        """Do nothing: every batch is on its device."""
