"""Arithmetic on all of a model's parameters at once.

On a GPU a kernel for each small tensor costs the host more time than the GPU: torch's foreach functions start few. On
a CPU, where they go from tensor to tensor, the same numbers come with the fewest passes over memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def average_into(
    gradients: Sequence[Tensor], means: Sequence[Tensor], decay: float, weight: float, scales: Sequence[float]
) -> None:
    """Make each mean `decay·mean + weight·gradient`, then each gradient `scale·mean`, all in place."""
    if _in_few_kernels(gradients):
        own, averaged = list(gradients), list(means)
        torch._foreach_mul_(averaged, decay)
        torch._foreach_add_(averaged, own, alpha=weight)
        torch._foreach_copy_(own, averaged)
        torch._foreach_mul_(own, list(scales))
        return
    for gradient, mean, scale in zip(gradients, means, scales):
        torch.mul(mean.mul_(decay).add_(gradient, alpha=weight), scale, out=gradient)


def step_along(parameters: Sequence[nn.Parameter], updates: Sequence[Tensor], lr: float, weight_decay: float) -> None:
    """Make each parameter `(1 - lr·weight_decay)·w - lr·update` in place."""
    if _in_few_kernels(updates):
        own: list[Tensor] = list(parameters)
        if weight_decay > 0:
            torch._foreach_mul_(own, 1 - lr * weight_decay)
        torch._foreach_add_(own, list(updates), alpha=-lr)
        return
    for parameter, update in zip(parameters, updates):
        if weight_decay > 0:
            parameter.mul_(1 - lr * weight_decay)
        parameter.add_(update, alpha=-lr)


def scale_together(tensors: Sequence[Tensor], scale: float) -> None:
    """Multiply each tensor by a number in place."""
    if _in_few_kernels(tensors):
        torch._foreach_mul_(list(tensors), scale)
        return
    for tensor in tensors:
        tensor.mul_(scale)


def add_together(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """Add to each tensor another one, in place."""
    if _in_few_kernels(tensors):
        torch._foreach_add_(list(tensors), list(others))
        return
    for tensor, other in zip(tensors, others, strict=True):
        tensor.add_(other)


def scaled(tensors: Sequence[Tensor], scale: Tensor) -> Sequence[Tensor]:
    """Return each tensor times a 0-d one, in the tensor's own type, without a host synchronisation."""
    if _in_few_kernels(tensors):
        return torch._foreach_mul(list(tensors), scale.to(tensors[0].dtype))
    return [tensor * scale for tensor in tensors]


def norms_of(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Return each tensor's norm, 0-d, all of one device and type.

    device: where the norms are brought together if they are of several devices or types.
    """
    are_halves = [tensor.dtype.itemsize < torch.float32.itemsize for tensor in tensors]
    halves = iter(_norms_of_halves([t for t, is_half in zip(tensors, are_halves) if is_half]))
    others = [t for t, is_half in zip(tensors, are_halves) if not is_half]
    of_others = iter(torch._foreach_norm(others) if others else ())
    norms = [next(halves) if is_half else next(of_others) for is_half in are_halves]
    if len({(norm.device, norm.dtype) for norm in norms}) > 1:
        norms = [norm.to(device, torch.float64) for norm in norms]
    return norms


def _norms_of_halves(tensors: list[Tensor]) -> list[Tensor]:
    """Return norms in float32."""
    try:
        return list(torch._foreach_norm(tensors, 2, torch.float32)) if tensors else []
    except TypeError:  # a torch whose function takes no type
        return [torch.linalg.vector_norm(tensor, dtype=torch.float32) for tensor in tensors]


def _in_few_kernels(tensors: Sequence[Tensor]) -> bool:
    """Whether there is something to gain: several dense tensors of one type on one GPU."""
    if len(tensors) < 2 or tensors[0].device.type != "cuda":
        return False
    first = tensors[0]
    return all(t.layout == torch.strided and (t.device, t.dtype) == (first.device, first.dtype) for t in tensors)
