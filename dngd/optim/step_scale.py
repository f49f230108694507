"""By how much a step is shortened, all layers alike, and what the quadratic model says that it does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dngd.curvature import inner_product, kl_clip_scale, norm_scale
from dngd.errors import UserError
from dngd.optim.arguments import in_range


class StepScale:
    """ν of the last step `-ηνv`, and its model: `q = Σ_l ⟨v_l, ∇_l⟩`, v the directions and ∇ the gradients.

    last: ν as a 0-d tensor, 1 where nothing bounds the step.
    """

    def __init__(self) -> None:
        self.last: Tensor = torch.ones((), device="cpu")
        self._quadratic: Tensor | None = None
        self._bounded_rate = 0.0

    def take(
        self,
        directions: Sequence[Tensor],
        gradients: Sequence[Tensor],
        lr: float | None,
        kl_clip: float | None,
        norm_constraint: float | None,
    ) -> Tensor | None:
        """Return ν as a 0-d tensor, without a host synchronisation; None where nothing bounds the step.

        lr: η. kl_clip: κ > 0 bounds η²ν²q, twice the step's predicted KL. norm_constraint: c > 0 bounds ην‖v‖. Both
        need lr. Raises UserError for a bound out of range.
        """
        self._quadratic = inner_product(zip(directions, gradients))
        if kl_clip is None and norm_constraint is None:
            return None
        assert lr is not None
        self._bounded_rate = lr
        if kl_clip is None:
            scale = torch.ones_like(self._quadratic)
        else:
            in_range("kl_clip", kl_clip, low_open=0.0)
            scale = kl_clip_scale(self._quadratic, lr, kl_clip)
        if norm_constraint is not None:
            in_range("norm_constraint", norm_constraint, low_open=0.0)
            squared = inner_product(zip(directions, directions))
            scale = torch.minimum(scale, norm_scale(squared, lr, norm_constraint))
        self.last = scale
        return scale

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
        return (self._bounded_rate * float(self.last)) ** 2 * float(self._quadratic) / 2
