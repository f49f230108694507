"""Tensors to flat buffers and back: lists of tensors, buckets."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """Return the tensors' entries one after another in one buffer."""
    if not tensors:
        return torch.zeros(0, device="cpu")
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
