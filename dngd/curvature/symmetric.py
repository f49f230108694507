"""Symmetric matrices in half the space: rectangular full packed storage.

A symmetric [d, d] matrix has d(d+1)/2 different entries. They fill a rectangle without a gap: the lower
trapezoid of the first h = ⌈d/2⌉ columns, and in the corner that it leaves free the upper triangle of
the rest (Gustavson et al. 2010, LAPACK's RFP format). Two block copies pack it, where gathering a
triangle row by row would take an index per entry. Factors are kept and sent in this form.
"""

from __future__ import annotations

import torch
from torch import Tensor


def packed_size(d: int) -> int:
    """Return d(d+1)/2, the number of entries of a packed symmetric [d, d] matrix."""
    return d * (d + 1) // 2


def pack_symmetric(matrix: Tensor) -> Tensor:
    """Return a symmetric [d, d] matrix packed, [d(d+1)/2]. Only the lower triangle is read."""
    d = matrix.shape[0]
    if d == 1:
        return matrix.reshape(1).clone()
    h = (d + 1) // 2
    shift = 1 - d % 2
    out = matrix.new_zeros(d + shift, h)
    out[shift:] = matrix[:, :h].tril()
    # Transposed so that it is an upper triangle: what stands at (i, j) of it has i <= j.
    corner = out[: d - h, 1 - shift :]
    corner += matrix[h:, h:].tril().T
    return out.view(-1)


def unpack_symmetric(packed: Tensor, d: int) -> Tensor:
    """Return the symmetric [d, d] matrix of its packed form: the exact inverse of packing."""
    if d == 1:
        return packed.reshape(1, 1).clone()
    h = (d + 1) // 2
    shift = 1 - d % 2
    rectangle = packed.view(d + shift, h)
    out = packed.new_zeros(d, d)
    out[:, :h] = rectangle[shift:].tril()
    out[h:, h:] = rectangle[: d - h, 1 - shift :].triu().T
    upper = out.tril(-1).T
    return out + upper


def packed_diagonal(packed: Tensor, d: int) -> Tensor:
    """Return the diagonal, [d], of a packed symmetric [d, d] matrix."""
    if d == 1:
        return packed.reshape(1)
    h = (d + 1) // 2
    shift = 1 - d % 2
    rectangle = packed.view(d + shift, h)
    return torch.cat([rectangle.diagonal(-shift), rectangle.diagonal(1 - shift)[: d - h]])
