"""A running mean of a module's weights, which is evaluated and kept in their place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dngd.errors import UserError

STEPS = "steps"
"""The entry of a state that counts steps; names of weights have a prefix."""
_WEIGHT = "weight."
_HALF = (torch.float16, torch.bfloat16)


class WeightAverage:
    """The mean of a module's parameters over about the last `share` of the steps so far.

    After the t-th update, t = 0, 1, ...:

        w̄ ← w̄ + (w - w̄) / (1 + share · max(0, t - begin))

    which is polynomial-decay averaging (Shamir & Zhang 2013, arXiv 1212.1824, with η = 1/share - 1) from the step
    `begin` on; up to there the mean is the last step's weights, which move too far for a mean to help. The weights
    after step s count about as `s^η`, so that the mean's age comes to `share/(1 + share)` of the steps, however many
    they are. share = 1 and begin = 0 is the plain mean of all. Buffers (running means of a BatchNorm, say) stay the
    last step's. The mean is one more copy of the parameters, of 16-bit ones in float32; while it is applied there is
    another, of the module's own.

    >>> net = nn.Linear(1, 1, bias=False)
    >>> average = WeightAverage(net, share=0.5, begin=0)
    >>> for value in (1.0, 4.0, 4.0):
    ...     _ = net.weight.data.fill_(value)
    ...     average.update()
    >>> with average.applied():
    ...     net.weight.item()
    3.5
    >>> net.weight.item()
    4.0
    """

    def __init__(self, module: nn.Module, share: float = 0.3, begin: int = 5) -> None:
        if not 0 < share <= 1:
            raise UserError(f"share={share} is no share of the steps; give a number above 0, at most 1")
        if not begin >= 0:
            raise UserError(f"begin={begin} is no number of steps; give one of at least 0")
        self.share = share
        self.begin = begin
        self.steps = 0
        self._module = module
        self._mean = {
            name: tensor.to(torch.float32 if tensor.dtype in _HALF else tensor.dtype, copy=True)
            for name, tensor in self._current().items()
        }

    @property
    def nbytes(self) -> int:
        """Bytes of the mean."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._mean.values())

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights of the step that has ended into the mean."""
        age = max(0, self.steps - self.begin)
        self.steps += 1
        if age == 0:
            _copy(self._mean.values(), self._current().values())
            return
        means = list(self._mean.values())
        current = [tensor.to(mean.dtype) for tensor, mean in zip(self._current().values(), means, strict=True)]
        torch._foreach_lerp_(means, current, 1.0 / (1.0 + self.share * age))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Have the mean in the module's place; on leaving, its own weights again, bit for bit.

        Before the first update the module stays as it is.
        """
        if self.steps == 0:
            yield
            return
        current = list(self._current().values())
        own = [tensor.clone() for tensor in current]
        _copy(current, self._mean.values())
        try:
            yield
        finally:
            _copy(current, own)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the mean and the number of updates."""
        weights = {_WEIGHT + name: tensor for name, tensor in self._mean.items()}
        return {STEPS: torch.tensor(self.steps, device="cpu"), **weights}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a state. Raises UserError if it is of another module."""
        saved = {name.removeprefix(_WEIGHT): tensor for name, tensor in state.items() if name != STEPS}
        if STEPS not in state or {n: t.shape for n, t in saved.items()} != {n: t.shape for n, t in self._mean.items()}:
            raise UserError("the weights' average is of another model; load it into the one that it was saved from")
        _copy(self._mean.values(), (saved[name] for name in self._mean))
        self.steps = int(state[STEPS])

    def _current(self) -> dict[str, Tensor]:
        return {name: parameter.data for name, parameter in self._module.named_parameters()}


@torch.no_grad()
def _copy(targets: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)
