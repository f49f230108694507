"""From sampled layer graphs to the operators that a model multiplies with, and where a step's batches come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from dngd.graph import GraphStore
from dngd.models import Aggregation, Propagation, SparseRows
from dngd.models.graph_batch import GraphBatch
from dngd.models.message_passing import LayerGraphLike
from dngd.sampling import BatchCoordinates, MiniBatch
from dngd.sampling.cached_rows import CachedRows
from dngd.sampling.operators import LayerOperators
from dngd.train.metrics import StepClock

Move = Callable[[Tensor], Tensor]
"""Takes a tensor to the device."""


@dataclass(frozen=True)
class DeviceBatch:
    """A shard's part of a step on its device; see GNN.forward.

    seeds: int64 [n], global ids. labels: int64 [m], of the first m seeds; m = n but for semi-supervised losses.
    propagations: one a layer. first_aggregation: [num_dst, in_rows], the first layer's aggregated rows where they are
    kept from step to step; there is no propagation of the first layer then. first_output: [num_dst, hidden], what the
    first layer makes of these rows, where a pass with the same weights has left it. graph: of a module of one's own, in
    place of propagations. pairs: int64 [p, 2], of link prediction: rows of the outputs whose inner products are the
    logits; labels are int64 [p, 1] then, 1 of links and 0 of negatives.
    """

    seeds: Tensor
    labels: Tensor
    propagations: tuple[Propagation, ...]
    first_aggregation: Tensor | SparseRows | None = None
    first_output: Tensor | None = None
    graph: GraphBatch | None = None
    pairs: Tensor | None = None

    def device_tensors(self) -> Iterator[Tensor]:
        """Yield all that lies on the device."""
        yield self.labels
        if self.pairs is not None:
            yield self.pairs
        for p in self.propagations:
            yield from (p.indptr, p.indices)
            yield from (t for t in (p.edge_coefficients, p.self_coefficients, p.destinations) if t is not None)
        if isinstance(self.first_aggregation, Tensor):
            yield self.first_aggregation
        if self.first_output is not None:
            yield self.first_output
        if self.graph is not None:
            yield from self.graph.tensors()


class BatchSource(Protocol):
    """Hands out the batches of a rank's shards, in the order of the run."""

    def batch(self, epoch: int, step: int, shard: int) -> DeviceBatch:
        """Return a shard's part of a step (counted within its epoch)."""

    def look_ahead(self) -> None:
        """Hear that all work on the batch handed out last has been given to the device: time for the next one."""


class BatchBuilder(Protocol):
    """Puts mini-batches on the device."""

    def batch(self, mini_batch: MiniBatch, move: Move | None = None) -> DeviceBatch:
        """Return a sampled mini-batch there. move: how tensors get there; by default in the current stream."""


class PropagationBuilder:
    """Puts mini-batches on the device, with the operators of their layer graphs.

    aggregation: which operators the model needs. device: where they are wanted. cache: feature rows that it keeps,
    where mini-batches bring the first layer's rows without their part.
    """

    def __init__(
        self,
        store: GraphStore,
        aggregation: Aggregation,
        device: torch.device,
        cache: CachedRows | None = None,
    ) -> None:
        self._store = store
        self._device = device
        self._cache = cache
        self.operators = LayerOperators(store, aggregation)

    def batch(self, mini_batch: MiniBatch, move: Move | None = None) -> DeviceBatch:
        """Return a sampled mini-batch's seeds, labels and operators on the device.

        Where the mini-batch brings the first layer's rows, they take the place of its operator.
        move: how tensors get to the device; by default in the current stream.
        """
        move = self._move if move is None else move
        rows = mini_batch.first_rows
        operators = self.operators
        propagations = operators.of_layers(mini_batch.layers) if rows is None else operators.behind(mini_batch.layers)
        labels, pairs = targets(self._store, mini_batch, move)
        return DeviceBatch(
            mini_batch.seeds,
            labels,
            tuple(_moved(p, move) for p in propagations),
            self._whole_rows(move(rows), mini_batch.first_operator, move) if isinstance(rows, Tensor) else rows,
            pairs=pairs,
        )

    def propagation(
        self, graph: LayerGraphLike, source_ids: Tensor, destination_ids: Tensor, destinations: Tensor | None
    ) -> Propagation:
        """Return one layer's operator, on the CPU; see LayerOperators.propagation."""
        return self.operators.propagation(graph, source_ids, destination_ids, destinations)

    def _move(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, non_blocking=True)

    def _whole_rows(self, rows: Tensor, operator: Propagation | None, move: Move) -> Tensor:
        """Return the first layer's rows, with the part of the nodes whose features the device keeps. rows: there."""
        if operator is None:
            return rows
        assert self._cache is not None, "rows without a part that no device keeps"
        return rows + self._cache.part(self.operators.aggregation, _moved(operator, move))


def targets(store: GraphStore, mini_batch: MiniBatch, move: Move) -> tuple[Tensor, Tensor | None]:
    """Return a mini-batch's labels and pairs on the device; see DeviceBatch."""
    if mini_batch.pairs is None:
        return move(store.labels[mini_batch.seeds[: mini_batch.num_labelled]]), None
    rows, num_links = mini_batch.pairs.rows, mini_batch.pairs.num_links
    return move((torch.arange(len(rows)) < num_links)[:, None].long()), move(rows)


def _moved(operator: Propagation, move: Move) -> Propagation:
    edges, selves, destinations = operator.edge_coefficients, operator.self_coefficients, operator.destinations
    return replace(
        operator,
        indptr=move(operator.indptr),
        indices=move(operator.indices),
        edge_coefficients=None if edges is None else move(edges),
        self_coefficients=None if selves is None else move(selves),
        destinations=None if destinations is None else move(destinations),
    )


class BatchPipeline(Protocol):
    """Where mini-batches come from: dngd.sampling.SamplerPipeline."""

    @property
    def has_next(self) -> bool:
        """Whether the next one is there already."""

    def __next__(self) -> MiniBatch:
        """Return the next one, or raise what came in its place."""


class SampledBatches:
    """A pipeline's mini-batches with their operators. clock: gets the time waited, and that spent on operators."""

    def __init__(self, pipeline: BatchPipeline, builder: BatchBuilder, clock: StepClock) -> None:
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

    def look_ahead(self) -> None:
        """Do nothing: there is no copy to start."""
