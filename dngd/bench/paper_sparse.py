"""Constant matrices that every step multiplies with, as compressed rows where that is faster."""

from __future__ import annotations

import warnings
from typing import Any

import scipy.sparse
import torch
from torch import Tensor, nn

DENSEST = 0.4
"""Share of entries that are not zero, above which a dense product is faster (measured at 16 columns)."""


class ConstantMatrix:
    """M, [r, d], multiplied as `M·x`; transposes are kept for the gradient `Mᵀ·g`.

    factors: M is their product, multiplied with one after another: `Â(X·w)` takes fewer operations than `(Â·X)w`, which
    has more entries that are not zero.
    """

    def __init__(self, *factors: Tensor | scipy.sparse.csr_matrix) -> None:
        self._factors = [_both_ways(scipy.sparse.csr_matrix(factor)) for factor in factors]

    def times(self, x: Tensor) -> Tensor:
        """Return `M·x`, [r, k], of x [d, k]."""
        for factor in reversed(self._factors):
            x = _Product.apply(x, *factor)  # type: ignore[no-untyped-call]
        return x

    def enter(self, linear: nn.Linear) -> None:
        """Let a layer compute `M Wᵀ + b` from the compressed rows when it is called with M, and only with M.

        It stays an `nn.Linear` that was called with M: what hooks see of it is the same.
        """

        def product(rows: Tensor) -> Tensor:
            assert rows.shape == (self._factors[0][0].shape[0], self._factors[-1][0].shape[1])
            return self.times(linear.weight.t()) + linear.bias

        linear.forward = product  # type: ignore[assignment, method-assign]


def _both_ways(rows: scipy.sparse.csr_matrix) -> tuple[Tensor, Tensor]:
    """Return a matrix and its transpose."""
    if rows.nnz > DENSEST * rows.shape[0] * rows.shape[1]:
        dense = torch.from_numpy(rows.toarray())
        return dense, dense.t()
    return _compressed(rows), _compressed(rows.T.tocsr())


def _compressed(rows: scipy.sparse.csr_matrix) -> Tensor:
    starts, columns, values = (torch.from_numpy(part) for part in (rows.indptr, rows.indices, rows.data))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says once that its compressed rows are a beta
        return torch.sparse_csr_tensor(starts, columns, values, rows.shape)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Tensor, transposed: Tensor) -> Tensor:
        ctx.transposed = transposed
        return matrix @ x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.transposed @ gradient, None, None
