"""From sampled layer graphs to the operators that a model multiplies with, and where a step's batches come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dngd.errors import UserError
from dngd.graph import GraphStore
from dngd.models import (
    Aggregation,
    Propagation,
    gcn_coefficients,
    inverse_sqrt_degrees,
    mean_coefficients,
)
from dngd.models.message_passing import LayerGraphLike
from dngd.sampling import BatchCoordinates, MiniBatch, SamplerPipeline
from dngd.train.metrics import StepClock


@dataclass(frozen=True)
class DeviceBatch:
    """A shard's part of a step on its device; see GNN.forward.

    seeds: int64 [n], global ids. labels: int64 [m], of the first m seeds; m = n but for semi-supervised losses.
    propagations: one a layer. first_aggregation: [num_dst, in_rows], the first layer's aggregated rows where they are
    kept from step to step; there is no propagation of the first layer then.
    """

    seeds: Tensor
    labels: Tensor
    propagations: tuple[Propagation, ...]
    first_aggregation: Tensor | None = None


class BatchSource(Protocol):
    """Hands out the batches of a rank's shards, in the order of the run."""

    def batch(self, epoch: int, step: int, shard: int) -> DeviceBatch:
        """Return a shard's part of a step (counted within its epoch)."""


class PropagationBuilder:
    """Computes the coefficients of layer graphs from the whole graph's degrees.

    aggregation: which kind the model needs. device: where the operators are wanted.
    """

    def __init__(self, store: GraphStore, aggregation: Aggregation, device: torch.device) -> None:
        self._store = store
        self._device = device
        self._norm = _node_norm(store) if aggregation == "gcn" else None

    def batch(self, mini_batch: MiniBatch) -> DeviceBatch:
        """Return a sampled mini-batch's seeds, labels and operators on the device."""
        propagations = []
        source_nodes: Tensor | None = None  # the input layer's sources are global ids
        for layer in mini_batch.layers:
            sources = layer.indices if source_nodes is None else source_nodes[layer.indices]
            destinations = layer.dst_nodes if source_nodes is None else None
            propagations.append(self.propagation(layer, sources, layer.dst_nodes, destinations))
            source_nodes = layer.dst_nodes
        labels = self._store.labels[mini_batch.seeds]
        return DeviceBatch(
            mini_batch.seeds,
            labels.to(self._device),
            tuple(p.to(self._device) for p in propagations),
        )

    def propagation(
        self, graph: LayerGraphLike, source_ids: Tensor, destination_ids: Tensor, destinations: Tensor | None
    ) -> Propagation:
        """Return one layer's operator, on the CPU.

        source_ids: global id of each edge's source, [num_edges]. destination_ids: global ids, [num_dst].
        destinations: the destinations' rows in the source table, None if they are its first rows.
        """
        if self._norm is None:
            return Propagation(graph.indptr, graph.indices, mean_coefficients(graph), None, destinations)
        edges, selves = gcn_coefficients(graph, self._norm[source_ids], self._norm[destination_ids])
        return Propagation(graph.indptr, graph.indices, edges, selves, destinations)


class SampledBatches:
    """A pipeline's mini-batches with their operators. clock: gets the time waited, and that spent on operators."""

    def __init__(self, pipeline: SamplerPipeline, builder: PropagationBuilder, clock: StepClock) -> None:
        self._pipeline = pipeline
        self._builder = builder
        self._clock = clock

    def batch(self, epoch: int, step: int, shard: int) -> DeviceBatch:
        """Return the next mini-batch, which must be the one asked for."""
        with self._clock.phase("sample_wait"):
            mini_batch = next(self._pipeline)
        asked = BatchCoordinates(epoch, step, shard)
        assert mini_batch.coordinates == asked, f"{mini_batch.coordinates} is not {asked}"
        with self._clock.phase("forward"):
            return self._builder.batch(mini_batch)


def _node_norm(store: GraphStore) -> Tensor:
    """Return d_v^(-1/2) of every node, float32 [N]; weighted in-degrees where the graph has weights."""
    if store.edge_weight is None:
        return inverse_sqrt_degrees(store.in_degrees())
    weights = store.edge_weight
    totals = torch.segment_reduce(weights.to(torch.float64), "sum", offsets=store.indptr, axis=0)
    if bool((totals <= -1).any()):
        node = int((totals <= -1).nonzero()[0, 0])
        raise UserError(
            f"node {node} of {store.name} has in-edge weights that sum to {float(totals[node]):g}; GCN's "
            "normalisation needs sums above -1, so use weights of at least 0, or --model sage"
        )
    return inverse_sqrt_degrees(store.in_degrees(), totals)
