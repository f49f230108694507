"""By how much a step is shortened, all layers alike, and what the quadratic model says that it does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dngd.curvature import inner_product, kl_clip_scale, norm_scale, read_together
from dngd.errors import UserError
from dngd.optim.arguments import in_range


class Bounds(NamedTuple):
    """What bounds a step: numbers, or 0-d tensors of the gradients' type and device, which give the same bits.

    rate: η, and squared_rate: η². kl_clip: κ > 0 bounds η²ν²q, twice the step's predicted KL. norm_constraint: c > 0
    bounds ην‖v‖. None where it does not.
    """

    rate: float | Tensor
    squared_rate: float | Tensor
    kl_clip: float | Tensor | None
    norm_constraint: float | Tensor | None

    @classmethod
    def checked(cls, lr: float | None, kl_clip: float | None, norm_constraint: float | None) -> Bounds:
        """Return a step's bounds. lr: η, which both need. Raises UserError for one out of range."""
        if kl_clip is None and norm_constraint is None:
            return cls(0.0, 0.0, None, None)
        assert lr is not None
        if kl_clip is not None:
            in_range("kl_clip", kl_clip, low_open=0.0)
        if norm_constraint is not None:
            in_range("norm_constraint", norm_constraint, low_open=0.0)
        return cls(lr, lr**2, kl_clip, norm_constraint)


class Shortening(NamedTuple):
    """`q = Σ_l ⟨v_l, ∇_l⟩`, v the directions and ∇ the gradients, and ν, None where nothing bounds the step."""

    quadratic: Tensor
    scale: Tensor | None


def shortening(directions: Sequence[Tensor], gradients: Sequence[Tensor], bounds: Bounds) -> Shortening:
    """Return q and ν as 0-d tensors, without a host synchronisation."""
    quadratic = inner_product(zip(directions, gradients))
    if bounds.kl_clip is None and bounds.norm_constraint is None:
        return Shortening(quadratic, None)
    if bounds.kl_clip is None:
        scale = torch.ones_like(quadratic)
    else:
        scale = kl_clip_scale(quadratic, bounds.squared_rate, bounds.kl_clip)
    if bounds.norm_constraint is not None:
        squared = inner_product(zip(directions, directions))
        scale = torch.minimum(scale, norm_scale(squared, bounds.rate, bounds.norm_constraint))
    return Shortening(quadratic, scale)


class StepScale:
    """ν of the last step `-ηνv`, and its model.

    last: ν as a 0-d tensor, 1 where nothing bounds the step.
    """

    def __init__(self) -> None:
        self.last: Tensor = torch.ones((), device="cpu")
        self._quadratic: Tensor | None = None
        self._bounded_rate = 0.0

    def note(self, found: Shortening, bounds: Bounds) -> None:
        """Note a step's q and ν. bounds: numbers."""
        self._quadratic = found.quadratic
        if found.scale is not None:
            self.last = found.scale
            self._bounded_rate = float(bounds.rate)

    def predicted_reduction(self, lr: float) -> float:
        """Return by how much the damped quadratic model says that the step reduces the loss: `ηνq (1 - ην/2)`."""
        if self._quadratic is None:
            raise UserError("there is no step to predict yet; call step() first")
        length = lr * float(self.last)
        return length * float(self._quadratic) * (1 - length / 2)

    def predicted_divergence(self) -> float:
        """Return the KL divergence that it says the step brought: `(ην)² q / 2`, η the rate that bounded it; 0 before
        the first step."""
        if self._quadratic is None:
            return 0.0
        scale, quadratic = read_together([self.last, self._quadratic])
        return (self._bounded_rate * scale) ** 2 * quadratic / 2
