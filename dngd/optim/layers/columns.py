"""A layer's gradient as one [d_out, d] matrix, from parameters that keep the output dimension last.

torch's Linear keeps W as [d_out, d_in]; graph convolutions often keep [d_in, d_out], or a stack of those
with one entry a relation, [R, d_in, d_out]. The columns of such a parameter are `w.reshape(-1, d_out)ᵀ`; a
bias, [d_out], is one column.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dngd.optim.gradients import gradient_of


def join_columns(parameters: Sequence[nn.Parameter]) -> Tensor | None:
    """Return the gradients side by side, [d_out, d], a new tensor; None if no parameter has one.

    parameters: each [..., d_out]. One without a gradient, beside others with one, stands as zeros.
    """
    found = [gradient_of(p) for p in parameters]
    if all(g is None for g in found):
        return None
    gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found)]
    return torch.cat([g.reshape(-1, g.shape[-1]).T for g in gradients], dim=1)


def split_columns(parameters: Sequence[nn.Parameter], value: Tensor) -> None:
    """Overwrite the gradients in place with the columns of a [d_out, d] matrix."""
    widths = [p.numel() // p.shape[-1] for p in parameters]
    for parameter, columns in zip(parameters, torch.split(value, widths, dim=1)):
        gradient = gradient_of(parameter)
        if gradient is not None:
            gradient.copy_(columns.T.reshape(parameter.shape))
