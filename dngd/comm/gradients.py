"""Gradients of a step as one flat buffer, reduced in place."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dngd.comm.communicator import Communicator
from dngd.errors import UserError

TRAILING = 3
"""Numbers behind the gradients: wishes to stop, loss sum, divisor."""
REFUSED = 1 << 16
"""What a rank that refuses a step adds to the wishes to stop: more than there are ranks."""


class FlatGradients:
    """Every parameter's `.grad` as a view of one buffer, followed by a wish to stop, the step's loss sum and divisor.

    The backward pass of each shard's **summed** loss `Σ_s w_s ℓ_s` accumulates into the views; one bucketed
    all-reduce then yields the globally summed loss's gradient, and division by the globally summed divisor (the
    number of seeds, where all weigh 1) that of the loss, also when shards differ in size.

    parameters: of one type. Of 16-bit ones the trailing numbers are float32, in a buffer of their own. model: names
    the parameters; its others must stay without gradients.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], model: nn.Module | None = None) -> None:
        own = list(parameters)
        size = sum(p.numel() for p in own)
        first = own[0]
        is_half = first.element_size() < 4
        self._flat = torch.zeros(size if is_half else size + TRAILING, dtype=first.dtype, device=first.device)
        self._told = torch.zeros(TRAILING, device=first.device) if is_half else self._flat[size:]
        self._buffers = [self._flat, self._told] if is_half else [self._flat]
        self._gradients = self._flat[:size]
        parts = torch.split(self._gradients, [p.numel() for p in own])
        self._views = {parameter: part.view_as(parameter) for parameter, part in zip(own, parts)}
        for parameter, view in self._views.items():
            parameter.grad = view
        named = {} if model is None else {parameter: name for name, parameter in model.named_parameters()}
        self._names = named
        self._others = [parameter for parameter in named if parameter not in self._views]
        for parameter in self._others:
            parameter.grad = None  # what it has left over is of no step

    def zero_(self) -> None:
        """Start a step. A `.grad` that was replaced since the last one, as by zero_grad(), is the view again."""
        for buffer in self._buffers:
            buffer.zero_()
        for parameter, view in self._views.items():
            if parameter.grad is not view:
                parameter.grad = view

    def add_loss_(self, loss_sum: Tensor, num_seeds: float) -> None:
        """Add a shard's summed loss and number of seeds (its share of the divisor) to what is reduced."""
        self._told[-2].add_(loss_sum.detach())
        self._told[-1].add_(num_seeds)

    def ask_to_stop_(self) -> None:
        """Let all ranks learn from this step's reduction that the run is to stop after it."""
        self._told[-3].add_(1)

    def reduce_(self, communicator: Communicator) -> StepSums:
        """Sum over ranks, then divide the gradients by the divisor. All ranks enter; all get the same bits.

        Raises UserError, on all ranks, where one has a gradient that is not in the buffer.
        """
        refusal = self._refusal()
        if refusal:
            self._told[-3].add_(REFUSED)
        works = [communicator.all_reduce(buffer, "gradient") for buffer in self._buffers]
        for work in works:
            work.wait()
        # One host synchronisation a step: the sums and what tells whether all is finite travel together. A NaN is the
        # least and the largest entry; one pass finds both, where isfinite takes ten times as long.
        least, largest = torch.aminmax(self._flat)
        read = torch.cat([self._told, least[None], largest[None]])
        stop, loss_sum, count, *extremes = read.tolist()
        if stop >= REFUSED:
            found = communicator.gather_bytes(refusal.encode())
            said = None if found is None else next(filter(None, found))
            raise UserError(communicator.broadcast_bytes(said).decode())
        if count > 0:
            self._gradients.div_(count)
        return StepSums(loss_sum, count, all(map(math.isfinite, [loss_sum, count, *extremes])), stop=stop > 0)

    def _refusal(self) -> str:
        """Return what is wrong with a gradient here; empty if all are in the buffer."""
        for parameter, view in self._views.items():
            if parameter.grad is not view:
                return (
                    f"the gradient of {self._name_of(parameter)} was replaced or set to None within a step, and ranks "
                    "sum the one that was there; leave .grad to the backward pass, and take gradients of your own by "
                    "torch.autograd.grad"
                )
        for parameter in self._others:
            if parameter.grad is not None:
                return (
                    f"{self._name_of(parameter)} was frozen when the run was set up and got a gradient, which ranks do "
                    "not sum; unfreeze it before the run: two phases are two runs, the second one with the first one's "
                    "best_model()"
                )
        return ""

    def _name_of(self, parameter: nn.Parameter) -> str:
        return f"parameter {self._names.get(parameter, f'of shape {list(parameter.shape)}')}"


class StepSums:
    """What a step's reduction tells every rank alike: summed loss, number of seeds (divisor), all values finite, and
    whether a rank wants the run to stop."""

    def __init__(self, loss_sum: float, num_seeds: float, finite: bool, *, stop: bool = False) -> None:
        self.loss_sum = loss_sum
        self.num_seeds = num_seeds
        self.finite = finite
        self.stop = stop
