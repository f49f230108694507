"""Where a rank's batches come from, by the configuration: sampled ahead, or constant in full batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dngd.config import TrainConfig
from dngd.graph import GraphStore
from dngd.models import GNN
from dngd.sampling import LinkSeeds, SamplerPipeline, UnlabelledSeeds
from dngd.train.batch import BatchSource, PropagationBuilder, SampledBatches
from dngd.train.feeder import CudaCopyStream, DeviceFeeder
from dngd.train.full_batch import FullBatches, outside
from dngd.train.metrics import StepClock
from dngd.train.module_batches import ModuleBatchBuilder, ModuleFullBatches
from dngd.train.page_lock import CudaHostRegistration, PageLockedMemory
from dngd.train.placement import PlacedFeatures
from dngd.train.plan import RunPlan


@dataclass(frozen=True)
class BatchSources:
    """What a run's batches are made of.

    store: the graph whose edges the run may see. train: int64 [n], of the split: nodes, or entries of links. builder:
    of the model. device: where batches go.
    """

    config: TrainConfig
    store: GraphStore
    train: Tensor
    plan: RunPlan
    model: nn.Module
    builder: PropagationBuilder | ModuleBatchBuilder
    placed: PlacedFeatures
    device: torch.device
    clock: StepClock

    @contextlib.contextmanager
    def open(self, shards: Sequence[int], step: int) -> Iterator[BatchSource]:
        """Give the batches of a rank's shards, from a step of the run on."""
        if self.config.constant_full_batch:
            yield self._full_batches(shards)
            return
        on_gpu = self.device.type == "cuda"
        # Closed in the reverse order: copies end before the memory that they read goes.
        with contextlib.ExitStack() as stack:
            locked = stack.enter_context(PageLockedMemory(CudaHostRegistration(self.device))) if on_gpu else None
            pipeline = stack.enter_context(self._pipeline(shards, step, locked))
            if on_gpu:
                copies = CudaCopyStream(self.device)
                yield stack.enter_context(DeviceFeeder(pipeline, self.builder, self.clock, copies))
            else:
                yield SampledBatches(pipeline, self.builder, self.clock)

    def _full_batches(self, shards: Sequence[int]) -> BatchSource:
        config, with_unlabelled = self.config, self.config.semi != "none"
        if isinstance(self.builder, ModuleBatchBuilder):
            return ModuleFullBatches(
                self.store,
                self.builder,
                self.train,
                with_unlabelled=with_unlabelled,
                shards=shards,
                num_shards=config.shards,
                num_layers=config.num_layers,
                device=self.device,
            )
        assert isinstance(self.model, GNN)
        return FullBatches(
            self.store,
            self.builder,
            self.model,
            self.placed.table,
            self.train,
            with_unlabelled=with_unlabelled,
            shards=shards,
            num_shards=config.shards,
            rows=config.eval_rows,
            device=self.device,
            sparse=self.placed.sparse,
        )

    def _pipeline(self, shards: Sequence[int], step: int, locked: PageLockedMemory | None) -> SamplerPipeline:
        config, placed = self.config, self.placed
        own = isinstance(self.model, GNN)
        return SamplerPipeline(
            self.store,
            self.train,
            config.fanouts,
            config.seed,
            config.shards,
            self.plan.labelled,
            shards,
            num_samplers=config.samplers,
            prefetch=config.prefetch,
            start=divmod(step, self.plan.steps_per_epoch),
            timeout_seconds=config.collective_timeout_seconds,
            # On a GPU that holds the table, the first rows are taken there.
            aggregation=self.model.aggregation if placed.on_host and isinstance(self.model, GNN) else None,
            on_mapped=None if locked is None else locked.add,
            on_host=None if placed.cache is None or not own else placed.cache.on_host,
            unlabelled=None if config.semi == "none" else self._unlabelled_seeds(),
            links=LinkSeeds(self.store, config.negatives, config.seed) if config.task == "link" else None,
            sparse=placed.sparse,
        )

    def _unlabelled_seeds(self) -> UnlabelledSeeds:
        others = outside(self.train, self.store.num_nodes)
        return UnlabelledSeeds(others, self.config.seed, self.config.shards, self.plan.unlabelled)
