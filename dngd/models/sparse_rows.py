"""Rows of which few entries are not zero, kept as these alone, and the affine map that takes them as they are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt
import scipy.sparse
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Array = npt.NDArray[Any]

BLOCK_COLUMNS = 64
"""Columns that are multiplied at a time: their rows, read here and there, stay nearer to the processor. Of a batch of
Coauthor Physics, 256 columns at once take twice the time, 32 a third more (one core)."""


@dataclass(frozen=True, eq=False)
class SparseRows:
    """A matrix [r, d] on the CPU as compressed sparse rows, in place of a tensor of the first layer's rows.

    indptr: [r + 1]. columns, values: [nnz]; row i has the entries indptr[i] to indptr[i + 1], a column once at most.
    indptr and columns are int32 or int64, alike; values are float32. width: d.
    """

    indptr: Tensor
    columns: Tensor
    values: Tensor
    width: int
    _kept: dict[str, SparseRows | None] = field(default_factory=dict, repr=False)

    requires_grad = False

    @classmethod
    def of(cls, matrix: scipy.sparse.csr_matrix) -> SparseRows:
        """Return scipy's compressed rows as these; nothing is copied."""
        return cls.of_arrays(matrix.indptr, matrix.indices, matrix.data, int(matrix.shape[1]))

    @classmethod
    def of_arrays(cls, indptr: Array, columns: Array, values: Array, width: int) -> SparseRows:
        """Return numpy's arrays as these; nothing is copied."""
        return cls(torch.from_numpy(indptr), torch.from_numpy(columns), torch.from_numpy(values), width)

    @property
    def shape(self) -> torch.Size:
        """[r, d]."""
        return torch.Size((self.indptr.numel() - 1, self.width))

    @property
    def share(self) -> float:
        """Entries that are kept, of all that the matrix has."""
        return self.values.numel() / max(1, self.shape.numel())

    def scipy(self) -> scipy.sparse.csr_matrix:
        """Return these rows as scipy's; nothing is copied."""
        parts = (self.values.numpy(), self.columns.numpy(), self.indptr.numpy())
        return scipy.sparse.csr_matrix(parts, shape=tuple(self.shape), copy=False)

    def __getitem__(self, rows: Tensor | slice) -> SparseRows:
        """Return some rows, by int64 positions [k] or by a slice of step 1."""
        if isinstance(rows, slice):
            first, last, step = rows.indices(self.shape[0])
            assert step == 1, rows
            last = max(first, last)
            indptr = self.indptr[first : last + 1]
            begin, end = int(indptr[0]), int(indptr[-1])
            return SparseRows(indptr - begin, self.columns[begin:end], self.values[begin:end], self.width)
        indptr, entries, _ = self._entries(rows)
        return SparseRows(indptr.to(self.indptr.dtype), self.columns[entries], self.values[entries], self.width)

    def dense(self, positions: Tensor | None = None) -> Tensor:
        """Return the rows, or those at some positions (int64 [k]), with their zeros: [r, d] or [k, d]."""
        if positions is None:
            positions = torch.arange(self.shape[0])
        _, entries, owners = self._entries(positions)
        out = self.values.new_zeros(positions.numel(), self.width)
        out[owners, self.columns[entries].long()] = self.values[entries]
        return out

    def detach(self) -> SparseRows:
        """Return itself, which has no gradient."""
        return self

    def times(self, matrix: Tensor) -> Tensor:
        """Return the product with a matrix [d, k]: [r, k], in the matrix's type; without gradients."""
        out = matrix.new_empty(self.shape[0], matrix.shape[1])
        for some in _column_blocks(matrix):
            out[:, some] = self._sums(matrix[:, some])
        return out

    def transposed_times(self, matrix: Tensor) -> Tensor:
        """Return the transpose's product with a matrix [r, k], transposed: [k, d], as a weight's gradient is laid out;
        without gradients."""
        out, transposed = matrix.new_empty(matrix.shape[1], self.width), self.transposed()
        for some in _column_blocks(matrix):
            out[some] = transposed._sums(matrix[:, some]).t()
        return out

    def transposed(self) -> SparseRows:
        """Return the transpose, [d, r], its entries in the order of the rows; kept from the second time on."""
        kept = self._kept.get("transposed")
        if kept is not None:
            return kept
        made = self._transposed()
        # A batch's rows are asked for it once; those of a full batch at each step.
        self._kept["transposed"] = made if "transposed" in self._kept else None
        return made

    def _transposed(self) -> SparseRows:
        columns = self.scipy().tocsc()
        return SparseRows.of_arrays(columns.indptr, columns.indices, columns.data, self.shape[0])

    def _sums(self, matrix: Tensor) -> Tensor:
        """Return the product with a few columns."""
        if self.values.numel() == 0:
            return matrix.new_zeros(self.shape[0], matrix.shape[1])
        return F.embedding_bag(
            self.columns,
            matrix.contiguous(),
            self.indptr,
            mode="sum",
            per_sample_weights=self.values.to(matrix.dtype),
            include_last_offset=True,
        )

    def _entries(self, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return of some rows, one after another: offsets int64 [k + 1], places of their entries, and whose they are
        (0 to k - 1)."""
        begins = self.indptr[positions].long()
        lengths = self.indptr[positions + 1].long() - begins
        indptr = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        owners = torch.repeat_interleave(lengths)
        entries = torch.arange(owners.numel()) + (begins - indptr[:-1])[owners]
        return indptr, entries, owners


def _column_blocks(matrix: Tensor) -> list[slice]:
    width = matrix.shape[1]
    return [slice(first, min(first + BLOCK_COLUMNS, width)) for first in range(0, width, BLOCK_COLUMNS)]


class RowsLinear(nn.Linear):
    """`Z = M Wᵀ + b`; M is a tensor, or SparseRows, whose products with W, and for its gradient, skip the zeros.

    Forward hooks see what it was called with. Of SparseRows Z is of W's type, also under autocast, columns without an
    entry do not count, be W infinite there, and there are no second derivatives, batched or forward-mode ones.
    """

    def forward(self, input: Tensor | SparseRows) -> Tensor:
        """Return Z, [r, d_out], of M [r, d_in]."""
        if isinstance(input, Tensor):
            return super().forward(input)
        parts = input.indptr, input.columns, input.values
        out: Tensor = _SparseProduct.apply(self.weight, input, *parts)  # type: ignore[no-untyped-call]
        return out if self.bias is None else out + self.bias


class _SparseProduct(torch.autograd.Function):
    """`Z = M Wᵀ`, `∇W = gᵀ M`; M is a constant, whose arrays are given too, so that autograd watches them."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rows: SparseRows, *parts: Tensor) -> Tensor:
        ctx.rows = rows
        ctx.save_for_backward(*parts)
        return rows.times(weight.t())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        _ = ctx.saved_tensors  # an error, where they were written to since
        return ctx.rows.transposed_times(gradient), None, None, None, None
