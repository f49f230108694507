"""Gradients of a step as one flat buffer, reduced in place."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dngd.comm.communicator import Communicator

TRAILING = 3
"""Numbers behind the gradients: wishes to stop, loss sum, divisor."""


class FlatGradients:
    """Every parameter's `.grad` as a view of one buffer, followed by a wish to stop, the step's loss sum and divisor.

    The backward pass of each shard's **summed** loss `Σ_s w_s ℓ_s` accumulates into the views; one bucketed
    all-reduce then yields the globally summed loss's gradient, and division by the globally summed divisor (the
    number of seeds, where all weigh 1) that of the loss, also when shards differ in size.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        size = sum(p.numel() for p in self._parameters)
        first = self._parameters[0]
        self._flat = torch.zeros(size + TRAILING, dtype=first.dtype, device=first.device)
        offset = 0
        for parameter in self._parameters:
            parameter.grad = self._flat[offset : offset + parameter.numel()].view_as(parameter)
            offset += parameter.numel()

    def zero_(self) -> None:
        """Start a step."""
        self._flat.zero_()

    def add_loss_(self, loss_sum: Tensor, num_seeds: float) -> None:
        """Add a shard's summed loss and number of seeds (its share of the divisor) to what is reduced."""
        self._flat[-2].add_(loss_sum.detach())
        self._flat[-1].add_(num_seeds)

    def ask_to_stop_(self) -> None:
        """Let all ranks learn from this step's reduction that the run is to stop after it."""
        self._flat[-3].add_(1)

    def reduce_(self, communicator: Communicator) -> StepSums:
        """Sum over ranks, then divide the gradients by the divisor. All ranks enter; all get the same bits."""
        communicator.all_reduce(self._flat, "gradient").wait()
        # One host synchronisation a step: the sums and what tells whether all is finite travel together. A NaN is the
        # least and the largest entry; one pass finds both, where isfinite takes ten times as long.
        least, largest = torch.aminmax(self._flat)
        read = torch.cat([self._flat[-TRAILING:], least[None], largest[None]])
        stop, loss_sum, count, *extremes = read.tolist()
        if count > 0:
            self._flat[:-TRAILING].div_(count)
        return StepSums(loss_sum, count, all(map(math.isfinite, extremes)), stop=stop > 0)


class StepSums:
    """What a step's reduction tells every rank alike: summed loss, number of seeds (divisor), all values finite, and
    whether a rank wants the run to stop."""

    def __init__(self, loss_sum: float, num_seeds: float, finite: bool, *, stop: bool = False) -> None:
        self.loss_sum = loss_sum
        self.num_seeds = num_seeds
        self.finite = finite
        self.stop = stop
