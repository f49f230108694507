"""Symmetric matrices in half the space: rectangular full packed storage.

A symmetric [d, d] matrix has d(d+1)/2 different entries. They fill a rectangle without a gap: the lower
trapezoid of the first h = ⌈d/2⌉ columns, and in the corner that it leaves free the upper triangle of
the rest (Gustavson et al. 2010, LAPACK's RFP format). Factors are kept and sent in this form. Up to 1,024 rows one
gather packs it and one unpacks it, by places that the process keeps for the last 32 sizes (6 bytes for each entry of
the matrix, at most 6 MiB a size); larger ones, whose places would take more memory than the matrix in float32, go by
block copies.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

MOST_GATHERED = 1024
"""Rows up to which entries are gathered: on a GPU seven kernels cost the host several times as much as one, and on a
CPU a gather of that size is two to four times as fast as the passes over blocks."""


def packed_size(d: int) -> int:
    """Return d(d+1)/2, the number of entries of a packed symmetric [d, d] matrix."""
    return d * (d + 1) // 2


def pack_symmetric(matrix: Tensor) -> Tensor:
    """Return a symmetric [d, d] matrix packed, [d(d+1)/2]. Only the lower triangle is read."""
    d = matrix.shape[0]
    if d <= MOST_GATHERED:
        return matrix.reshape(d * d).index_select(0, _places(d, matrix.device)[0])
    return _pack_by_blocks(matrix)


def unpack_symmetric(packed: Tensor, d: int) -> Tensor:
    """Return the symmetric [d, d] matrix of its packed form: the exact inverse of packing."""
    if d <= MOST_GATHERED:
        return packed.view(packed_size(d)).index_select(0, _places(d, packed.device)[1]).view(d, d)
    return _unpack_by_blocks(packed, d)


def packed_diagonal(packed: Tensor, d: int) -> Tensor:
    """Return the diagonal, [d], of a packed symmetric [d, d] matrix."""
    if d == 1:
        return packed.reshape(1)
    h = (d + 1) // 2
    shift = 1 - d % 2
    rectangle = packed.view(d + shift, h)
    return torch.cat([rectangle.diagonal(-shift), rectangle.diagonal(1 - shift)[: d - h]])


@lru_cache(maxsize=32)
def _places(d: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return where in a [d, d] matrix each packed entry stands, and where in the packed form each entry of it does."""
    with torch.inference_mode(False), torch.no_grad():
        in_matrix = _pack_by_blocks(torch.arange(d * d, dtype=torch.int32, device="cpu").view(d, d))
        in_packed = _unpack_by_blocks(torch.arange(packed_size(d), dtype=torch.int32, device="cpu"), d)
        return in_matrix.to(device), in_packed.reshape(-1).to(device)


def _pack_by_blocks(matrix: Tensor) -> Tensor:
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


def _unpack_by_blocks(packed: Tensor, d: int) -> Tensor:
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
