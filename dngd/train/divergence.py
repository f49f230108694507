"""How far a step moves its own predictions, for K-FAC's trust region (dngd.optim.KLTrustRegion).

The batch of a step's first logical shard goes through the network before the step and after it, without dropout: with
the masks of the step's own gradient the divergence would be that of a network which this gradient fits, several times
as large. Some of the shard's seeds stand for it, on a CPU with what reaches them alone, so that a measurement costs a
small part of a step; on a GPU, where finding that takes longer, all of a sampled batch goes through. From the training
pass the first layer's aggregated rows are kept, since reading them takes longest, and for the pass before the step what
the layer makes of them, which no dropout has touched. It is one shard, whichever rank has it, so that any number of
workers measures the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dngd.config import TrainConfig
from dngd.models import GNN
from dngd.models.message_passing import Propagation
from dngd.train.batch import DeviceBatch
from dngd.train.optimizers import StepOptimizer

MEASURED_SHARD = 0
MEASURED_SEEDS = 64
"""Of a shard, at most: a mean over so few is off by a fifth or so, the predictions that it corrects by a factor."""


class _Kept(NamedTuple):
    """A batch that goes through again, its logits before the step, and where the measured seeds stand in it; None: it
    has no others."""

    batch: DeviceBatch
    before: Tensor
    positions: Tensor | None


class DivergenceMeter:
    """Measures the steps that the optimizer's trust region wants measured.

    Use, on all ranks: `watch` around each shard's forward pass, `note` after it, and for a step that was due
    `measure` at its end. forward: returns a batch's logits with the present weights. takes_all: whether all of a batch
    goes through, and not what its measured seeds need alone.
    """

    def __init__(
        self,
        optimizer: StepOptimizer,
        model: nn.Module,
        forward: Callable[[DeviceBatch], Tensor],
        *,
        takes_all: bool = False,
    ) -> None:
        self._takes_all = takes_all
        self._optimizer = optimizer
        self._model = model
        self._forward = forward
        self._first: tuple[Tensor, Tensor] | None = None
        self._kept: _Kept | None = None

    @property
    def is_due(self) -> bool:
        """Whether the step that comes next is to be measured; alike on all ranks."""
        natural_gradient = self._optimizer.natural_gradient
        return natural_gradient is not None and natural_gradient.is_clip_due

    @contextmanager
    def watch(self, shard: int) -> Iterator[None]:
        """Around a shard's forward pass in training."""
        self._first = None
        if shard != MEASURED_SHARD or not isinstance(self._model, GNN) or not self.is_due:
            yield
            return
        hook = self._model.graph_layers()[0].linear.register_forward_hook(self._keep_first)
        try:
            yield
        finally:
            hook.remove()

    def note(self, shard: int, batch: DeviceBatch) -> None:
        """Keep a shard's batch and its logits before the step, if it is what is measured."""
        if shard != MEASURED_SHARD or not self.is_due:
            return
        first, self._first = self._first, None
        if first is not None:
            rows, output = first
            behind = batch.propagations if batch.first_aggregation is not None else batch.propagations[1:]
            batch = replace(batch, propagations=behind, first_aggregation=rows, first_output=output)
        positions = None
        if self._takes_all:
            positions = measured_positions(batch, MEASURED_SEEDS)
        else:
            batch = some_seeds(batch, MEASURED_SEEDS)
        before = self._logits(batch, positions)
        self._kept = _Kept(replace(batch, first_output=None), before, positions)

    def measure(self, *, finite: bool) -> None:
        """Measure the step just taken and adapt the trust region. All ranks enter for a step that was due, those
        without the shard too. finite: whether the step was taken at all."""
        kept, self._kept = self._kept, None
        natural_gradient = self._optimizer.natural_gradient
        if natural_gradient is None or not finite:
            return
        if kept is None:
            natural_gradient.adapt_clip(None, None)
        else:
            natural_gradient.adapt_clip(kept.before, self._logits(kept.batch, kept.positions))

    def _logits(self, batch: DeviceBatch, positions: Tensor | None) -> Tensor:
        modes = [(module, module.training) for module in self._model.modules()]
        self._model.eval()
        try:
            with torch.no_grad():
                logits = self._forward(batch)
                return logits if positions is None else logits[positions]
        finally:
            for module, was_training in modes:
                module.training = was_training

    def _keep_first(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        self._first = (inputs[0].detach(), output.detach())


def takes_whole_batches(config: TrainConfig, device: torch.device) -> bool:
    """Return whether all of a batch goes through: on a GPU, where it was sampled. A full batch may be a whole graph."""
    return device.type == "cuda" and not config.constant_full_batch


def measured_positions(batch: DeviceBatch, count: int) -> Tensor | None:
    """Return where in a batch `count` evenly spaced seeds stand, int64 [count] on the labels' device; None for all."""
    num_seeds = batch.seeds.numel()
    if num_seeds <= count or batch.pairs is not None or batch.graph is not None:
        return None
    device = batch.labels.device
    return torch.arange(count, device=device) * num_seeds // count


def some_seeds(batch: DeviceBatch, count: int) -> DeviceBatch:
    """Return the part of a batch that `count` of its seeds need: evenly spaced ones, since a full batch's are in the
    order of the graph, which may be that of the classes.

    The whole batch where it has no more, and where it is of links or of a module of one's own.
    """
    chosen = measured_positions(batch, count)
    if chosen is None:
        return batch
    rows, num_seeds = chosen, batch.seeds.numel()
    labels = batch.labels[rows] if len(batch.labels) == num_seeds else batch.labels
    parts: list[Propagation] = []
    for place, propagation in reversed(list(enumerate(batch.propagations))):
        part = propagation.of_rows(rows)
        if place > 0 or batch.first_aggregation is not None:
            # Its sources are the rows of the layer before it, of which only these are then made.
            assert part.destinations is not None
            rows, where = torch.cat([part.destinations, part.indices]).unique(return_inverse=True)  # type: ignore[no-untyped-call]
            own = part.destinations.numel()
            part = replace(part, destinations=where[:own], indices=where[own:])
        parts.insert(0, part)
    aggregation, output = batch.first_aggregation, batch.first_output
    return replace(
        batch,
        seeds=batch.seeds[chosen.to(batch.seeds.device)],
        labels=labels,
        propagations=tuple(parts),
        first_aggregation=None if aggregation is None else aggregation[rows],
        first_output=None if output is None else output[rows],
    )
