"""From sampled layer graphs to the operators that a model multiplies with, and where a step's batches come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dngd.graph import GraphStore
from dngd.models import Aggregation, Propagation
from dngd.models.message_passing import LayerGraphLike
from dngd.sampling import BatchCoordinates, MiniBatch, SamplerPipeline
from dngd.sampling.operators import LayerOperators
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
    """Puts mini-batches on the device, with the operators of their layer graphs.

    aggregation: which operators the model needs. device: where they are wanted.
    """

    def __init__(self, store: GraphStore, aggregation: Aggregation, device: torch.device) -> None:
        self._store = store
        self._device = device
        self.operators = LayerOperators(store, aggregation)

    def batch(self, mini_batch: MiniBatch) -> DeviceBatch:
        """Return a sampled mini-batch's seeds, labels and operators on the device.

        Where the mini-batch brings the first layer's rows, they take the place of its operator.
        """
        rows = mini_batch.first_rows
        operators = self.operators
        propagations = operators.of_layers(mini_batch.layers) if rows is None else operators.behind(mini_batch.layers)
        labels = self._store.labels[mini_batch.seeds]
        return DeviceBatch(
            mini_batch.seeds,
            labels.to(self._device),
            tuple(p.to(self._device) for p in propagations),
            None if rows is None else rows.to(self._device, non_blocking=True),
        )

    def propagation(
        self, graph: LayerGraphLike, source_ids: Tensor, destination_ids: Tensor, destinations: Tensor | None
    ) -> Propagation:
        """Return one layer's operator, on the CPU; see LayerOperators.propagation."""
        return self.operators.propagation(graph, source_ids, destination_ids, destinations)


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
