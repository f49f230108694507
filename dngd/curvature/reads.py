"""What the host reads of tensors: numbers together, so that it waits for a GPU once, and whether all is finite."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def read_together(scalars: Sequence[Tensor]) -> list[float]:
    """Return the values of 0-d tensors; one host synchronisation where they are of one device."""
    if len({scalar.device for scalar in scalars}) > 1:
        return [float(scalar) for scalar in scalars]
    values: list[float] = torch.stack(list(scalars)).tolist() if scalars else []
    return values


def vectors_on_host(vectors: Sequence[Tensor]) -> list[Tensor]:
    """Return vectors [k] on the CPU, each of its own length and type; one copy where they are of one device."""
    if len({vector.device for vector in vectors}) != 1:
        return [vector.cpu() for vector in vectors]
    parts = torch.split(torch.cat(list(vectors)).cpu(), [vector.numel() for vector in vectors])
    return [part.to(vector.dtype) for part, vector in zip(parts, vectors)]


def extremes(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the least and the largest entry of each tensor, 0-d: both are finite if all its entries are.

    A NaN takes both with it. On a CPU this is some twelve times as fast as isfinite, and on a GPU one kernel instead of
    five.
    """
    return [extreme for tensor in tensors if tensor.numel() for extreme in torch.aminmax(tensor)]


def entries_are_finite(tensors: Sequence[Tensor]) -> bool:
    """Return whether every entry of every tensor is finite, however large; one host synchronisation for tensors of one
    device."""
    return all(map(math.isfinite, read_together(extremes(tensors))))
