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
    """M, [r, d], multiplied as `M·x`; its transpose is kept beside it for the gradient `Mᵀ·g`."""

    def __init__(self, matrix: Tensor | scipy.sparse.csr_matrix) -> None:
        rows = scipy.sparse.csr_matrix(matrix)
        is_sparse = rows.nnz <= DENSEST * rows.shape[0] * rows.shape[1]
        dense = None if is_sparse else torch.from_numpy(rows.toarray())
        self._forward = _compressed(rows) if dense is None else dense
        self._backward = _compressed(rows.T.tocsr()) if dense is None else dense.t()

    def times(self, x: Tensor) -> Tensor:
        """Return `M·x`, [r, k], of x [d, k]."""
        out: Tensor = _Product.apply(x, self._forward, self._backward)  # type: ignore[no-untyped-call]
        return out

    def enter(self, linear: nn.Linear) -> None:
        """Let a layer compute `M Wᵀ + b` from the compressed rows when it is called with M, and only with M.

        It stays an `nn.Linear` that was called with M: what hooks see of it is the same.
        """

        def product(rows: Tensor) -> Tensor:
            assert rows.shape == self._forward.shape
            return self.times(linear.weight.t()) + linear.bias

        linear.forward = product  # type: ignore[method-assign]


def _compressed(rows: scipy.sparse.csr_matrix) -> Tensor:
    parts = (torch.from_numpy(part) for part in (rows.indptr, rows.indices, rows.data))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says once that its compressed rows are a beta
        return torch.sparse_csr_tensor(*parts, size=rows.shape)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Tensor, transposed: Tensor) -> Tensor:
        ctx.transposed = transposed
        return matrix @ x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return ctx.transposed @ gradient, None, None
