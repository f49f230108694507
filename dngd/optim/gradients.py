"""Which gradient of a parameter counts: a frozen one may have kept one from before it was frozen."""

from __future__ import annotations

from torch import Tensor, nn


def gradient_of(parameter: nn.Parameter | Tensor) -> Tensor | None:
    """Return a parameter's gradient; None of a frozen one, whose `.grad` is of a step before."""
    return parameter.grad if parameter.requires_grad else None
