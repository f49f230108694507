"""Tensors to flat buffers and back: triangles of symmetric matrices, lists of tensors, buckets."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def triangle_size(d: int) -> int:
    """Return d(d+1)/2, the number of entries of a symmetric [d, d] matrix that travel."""
    return d * (d + 1) // 2


def pack_triangle(matrix: Tensor) -> Tensor:
    """Return the upper triangle of a symmetric [d, d] matrix, row by row, as [d(d+1)/2]."""
    d = matrix.shape[0]
    mask = torch.ones(d, d, dtype=torch.bool, device=matrix.device).triu_()
    return matrix.masked_select(mask)


def unpack_triangle(packed: Tensor, d: int) -> Tensor:
    """Return the symmetric [d, d] matrix of a packed upper triangle: the exact inverse of packing."""
    mask = torch.ones(d, d, dtype=torch.bool, device=packed.device).triu_()
    upper = torch.zeros(d, d, dtype=packed.dtype, device=packed.device).masked_scatter_(mask, packed)
    return torch.where(mask, upper, upper.T)


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """Return the tensors' entries one after another in one buffer."""
    if not tensors:
        return torch.zeros(0)
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def unflatten(flat: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return views of a buffer with the given shapes; their sizes must add up to the buffer's."""
    sizes = [math.prod(shape) for shape in shapes]
    assert sum(sizes) == flat.numel(), f"shapes hold {sum(sizes)} entries, the buffer {flat.numel()}"
    parts = torch.split(flat, sizes)
    return [part.view(tuple(shape)) for part, shape in zip(parts, shapes)]


def buckets(flat: Tensor, bucket_bytes: int) -> Iterator[Tensor]:
    """Yield consecutive views of a flat buffer, each of at most bucket_bytes bytes (at least one entry)."""
    entries = max(1, bucket_bytes // flat.element_size())
    for start in range(0, flat.numel(), entries):
        yield flat[start : start + entries]
