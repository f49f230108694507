"""How a factor is kept: dense, diagonal or block-diagonal; low-rank plus diagonal is in dngd.curvature.low_rank.

A factor is `M = (1/c) Σ m mᵀ` over rows m. Each structure keeps sums that are **linear** in the outer
products, so that sums of different steps, shards and ranks add up whatever the structure; it knows how
to invert the damped average, how to multiply by the result, and what travels between ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from dngd.curvature.inverse import InverseResult, cholesky_inverse, eigendecomposition
from dngd.curvature.reads import entries_are_finite
from dngd.curvature.symmetric import pack_symmetric, packed_diagonal, packed_size, unpack_symmetric

Tensors = tuple[Tensor, ...]
Operator = Callable[[Tensor], Tensor]


@runtime_checkable
class SparseInput(Protocol):
    """Input rows [r, d] that are kept as their entries that are not zero, and have no gradient, such as
    dngd.models.SparseRows."""

    @property
    def indptr(self) -> Tensor: ...
    @property
    def columns(self) -> Tensor: ...
    @property
    def values(self) -> Tensor: ...
    @property
    def shape(self) -> torch.Size: ...

    def dense(self, positions: Tensor | None = None) -> Tensor:
        """Return the rows, or those at some positions, with their zeros."""

    def __getitem__(self, rows: Tensor | slice) -> SparseInput:
        """Return the rows at some positions, or those of a slice."""

    def times(self, matrix: Tensor) -> Tensor:
        """Return `M X`, [r, k], of X [d, k]."""

    def transposed_times(self, matrix: Tensor) -> Tensor:
        """Return `(Mᵀ Y)ᵀ`, [k, d], of Y [r, k]."""


class FactorStructure(Protocol):
    """What statistics, inverses and communication need to know of a [d, d] factor."""

    @property
    def dimension(self) -> int:
        """d."""

    @property
    def label(self) -> str:
        """Words for tables, e.g. "dense 513"."""

    @property
    def inversion_cost(self) -> float:
        """Cost model of one inversion, in flops up to a constant."""

    @property
    def bears_rounding(self) -> bool:
        """Whether sums with each entry rounded are sums of a factor near by: damping then makes up for it."""

    def zeros(self, dtype: torch.dtype, device: torch.device) -> Tensors:
        """Return empty sums."""

    def accumulate_(self, sums: Tensors, rows: Tensor, *, ones: bool = False, weight: float = 1.0) -> None:
        """Add `weight · Σ m mᵀ` of rows [r, d] (or [r, d - 1] with a column of ones that is not built)."""

    def diagonal(self, sums: Tensors) -> Tensor:
        """Return the diagonal, [d]."""

    def operator(self, sums: Tensors) -> Operator:
        """Return the function v [d] -> `M v` [d]; what many products share is made once."""

    def probe(self, sums: Tensors) -> Tensor:
        """Return `M p` for a fixed vector p with entries of both signs: whether it moves tells whether M did."""

    def dense(self, sums: Tensors) -> Tensor:
        """Return M as [d, d]."""

    def invert(self, averages: Tensors, damping: Tensor | float) -> InverseResult:
        """Return `(M + λI)⁻¹` in this structure's own form."""

    def inverse_shapes(self) -> list[tuple[tuple[int, ...], bool]]:
        """Return shape and symmetry of each tensor of an inverse."""

    def multiply(self, matrix: Tensor, inverse: Tensors) -> Tensor:
        """Return `matrix · (M + λI)⁻¹` for matrix [k, d]."""

    def multiply_from_left(self, matrix: Tensor, inverse: Tensors) -> Tensor:
        """Return `(M + λI)⁻¹ · matrix` for matrix [d, k]."""

    def eigenbasis(self, averages: Tensors) -> Tensors | None:
        """Return (Q [d, d], e [d]) with M = Q diag(e) Qᵀ, or (e,) where Q is the identity; None on failure."""

    def eigenbasis_shapes(self) -> list[tuple[int, ...]]:
        """Return the shapes of the tensors of an eigenbasis."""


@dataclass(frozen=True)
class Dense:
    """The whole matrix; its sums are packed (dngd.curvature.symmetric)."""

    dimension: int

    @property
    def label(self) -> str:
        return f"dense {self.dimension}"

    @property
    def inversion_cost(self) -> float:
        return float(self.dimension) ** 3

    @property
    def bears_rounding(self) -> bool:
        return True

    def zeros(self, dtype: torch.dtype, device: torch.device) -> Tensors:
        return (torch.zeros(packed_size(self.dimension), dtype=dtype, device=device),)

    def accumulate_(self, sums: Tensors, rows: Tensor, *, ones: bool = False, weight: float = 1.0) -> None:
        sums[0].add_(pack_symmetric(gram(rows, ones)), alpha=weight)

    def diagonal(self, sums: Tensors) -> Tensor:
        return packed_diagonal(sums[0], self.dimension)

    def operator(self, sums: Tensors) -> Operator:
        matrix = self.dense(sums)
        return lambda vector: matrix @ vector

    def probe(self, sums: Tensors) -> Tensor:
        return self.operator(sums)(probe_vector(self.dimension, sums[0]))

    def dense(self, sums: Tensors) -> Tensor:
        return unpack_symmetric(sums[0], self.dimension)

    def invert(self, averages: Tensors, damping: Tensor | float) -> InverseResult:
        return cholesky_inverse(self.dense(averages), damping)

    def inverse_shapes(self) -> list[tuple[tuple[int, ...], bool]]:
        return [((self.dimension, self.dimension), True)]

    def multiply(self, matrix: Tensor, inverse: Tensors) -> Tensor:
        return matrix @ inverse[0]

    def multiply_from_left(self, matrix: Tensor, inverse: Tensors) -> Tensor:
        return inverse[0] @ matrix

    def eigenbasis(self, averages: Tensors) -> Tensors | None:
        return eigendecomposition(self.dense(averages))

    def eigenbasis_shapes(self) -> list[tuple[int, ...]]:
        return [(self.dimension, self.dimension), (self.dimension,)]


@dataclass(frozen=True)
class Diagonal:
    """The diagonal alone: exact for one-hot rows (embeddings), an approximation elsewhere."""

    dimension: int

    @property
    def label(self) -> str:
        return f"diagonal {self.dimension}"

    @property
    def inversion_cost(self) -> float:
        return float(self.dimension)

    @property
    def bears_rounding(self) -> bool:
        return True

    def zeros(self, dtype: torch.dtype, device: torch.device) -> Tensors:
        return (torch.zeros(self.dimension, dtype=dtype, device=device),)

    def accumulate_(self, sums: Tensors, rows: Tensor, *, ones: bool = False, weight: float = 1.0) -> None:
        squares = rows.square().sum(dim=0)
        if ones:
            squares = torch.cat([squares, squares.new_tensor([float(rows.shape[0])])])
        sums[0].add_(squares, alpha=weight)

    def diagonal(self, sums: Tensors) -> Tensor:
        return sums[0]

    def operator(self, sums: Tensors) -> Operator:
        return lambda vector: sums[0] * vector

    def probe(self, sums: Tensors) -> Tensor:
        return self.operator(sums)(probe_vector(self.dimension, sums[0]))

    def dense(self, sums: Tensors) -> Tensor:
        return torch.diag(sums[0])

    def invert(self, averages: Tensors, damping: Tensor | float) -> InverseResult:
        inverse = (averages[0] + float(damping)).reciprocal()
        sound = float(damping) > 0 and entries_are_finite([averages[0], inverse])
        return InverseResult((inverse,) if sound else None, float(damping), 0)

    def inverse_shapes(self) -> list[tuple[tuple[int, ...], bool]]:
        return [((self.dimension,), False)]

    def multiply(self, matrix: Tensor, inverse: Tensors) -> Tensor:
        return matrix * inverse[0]

    def multiply_from_left(self, matrix: Tensor, inverse: Tensors) -> Tensor:
        return inverse[0][:, None] * matrix

    def eigenbasis(self, averages: Tensors) -> Tensors | None:
        return (averages[0],) if entries_are_finite(averages) else None

    def eigenbasis_shapes(self) -> list[tuple[int, ...]]:
        return [(self.dimension,)]


@dataclass(frozen=True)
class BlockDiagonal:
    """Dense blocks on the diagonal, correlations between blocks left out; a ones column is in the last."""

    sizes: tuple[int, ...]

    @property
    def dimension(self) -> int:
        return sum(self.sizes)

    @property
    def label(self) -> str:
        if len(set(self.sizes[:-1])) == 1 and len(self.sizes) > 3:
            return f"blocks {len(self.sizes)} x {self.sizes[0]}"
        return "blocks " + "+".join(str(size) for size in self.sizes)

    @property
    def inversion_cost(self) -> float:
        return float(sum(size**3 for size in self.sizes))

    @property
    def bears_rounding(self) -> bool:
        return True

    def zeros(self, dtype: torch.dtype, device: torch.device) -> Tensors:
        return tuple(torch.zeros(packed_size(size), dtype=dtype, device=device) for size in self.sizes)

    def accumulate_(self, sums: Tensors, rows: Tensor, *, ones: bool = False, weight: float = 1.0) -> None:
        start = 0
        for i, (total, size) in enumerate(zip(sums, self.sizes)):
            last = i == len(self.sizes) - 1
            total.add_(pack_symmetric(gram(rows[:, start : start + size], ones and last)), alpha=weight)
            start += size

    def diagonal(self, sums: Tensors) -> Tensor:
        return torch.cat([packed_diagonal(total, size) for total, size in zip(sums, self.sizes)])

    def operator(self, sums: Tensors) -> Operator:
        blocks, sizes = [unpack_symmetric(t, s) for t, s in zip(sums, self.sizes)], list(self.sizes)
        return lambda vector: torch.cat([block @ part for block, part in zip(blocks, torch.split(vector, sizes))])

    def probe(self, sums: Tensors) -> Tensor:
        return self.operator(sums)(probe_vector(self.dimension, sums[0]))

    def dense(self, sums: Tensors) -> Tensor:
        return _block_diagonal([unpack_symmetric(t, s) for t, s in zip(sums, self.sizes)])

    def invert(self, averages: Tensors, damping: Tensor | float) -> InverseResult:
        results = [cholesky_inverse(unpack_symmetric(t, s), damping) for t, s in zip(averages, self.sizes)]
        inverses = [result.inverse for result in results]
        blocks = None if any(i is None for i in inverses) else tuple(t for i in inverses if i is not None for t in i)
        return InverseResult(blocks, max(r.damping for r in results), sum(r.escalations for r in results))

    def inverse_shapes(self) -> list[tuple[tuple[int, ...], bool]]:
        return [((size, size), True) for size in self.sizes]

    def multiply(self, matrix: Tensor, inverse: Tensors) -> Tensor:
        parts = torch.split(matrix, list(self.sizes), dim=1)
        return torch.cat([part @ block for part, block in zip(parts, inverse)], dim=1)

    def multiply_from_left(self, matrix: Tensor, inverse: Tensors) -> Tensor:
        parts = torch.split(matrix, list(self.sizes), dim=0)
        return torch.cat([block @ part for part, block in zip(parts, inverse)], dim=0)

    def eigenbasis(self, averages: Tensors) -> Tensors | None:
        pairs = [eigendecomposition(unpack_symmetric(t, s)) for t, s in zip(averages, self.sizes)]
        if any(pair is None for pair in pairs):
            return None
        sound = [pair for pair in pairs if pair is not None]
        return _block_diagonal([q for q, _ in sound]), torch.cat([e for _, e in sound])

    def eigenbasis_shapes(self) -> list[tuple[int, ...]]:
        return [(self.dimension, self.dimension), (self.dimension,)]


def _block_diagonal(blocks: list[Tensor]) -> Tensor:
    out: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return out


def probe_vector(dimension: int, like: Tensor) -> Tensor:
    """Return a fixed Gaussian vector, the same on every rank. Not to be written to: it is kept."""
    return _probe_vector(dimension, like.dtype, like.device)


@lru_cache(maxsize=64)
def _probe_vector(dimension: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        generator = torch.Generator().manual_seed(dimension)
        return torch.randn(dimension, generator=generator, dtype=torch.float64, device="cpu").to(device, dtype)


def gram(rows: Tensor, ones: bool) -> Tensor:
    """Return `Σ m_i m_iᵀ` with m_i = [x_i, 1] (or x_i without ones).

    rows: [r, d_in], input rows x_i. Returns [d, d], d = d_in + ones. On a CPU the ones column is not built: its
    products are the column sums and r.
    """
    if ones and rows.device.type != "cpu":  # three kernels instead of six, which take the host longer than the GPU
        wide = torch.nn.functional.pad(rows, (0, 1), value=1.0)
        return wide.T @ wide
    inner = rows.T @ rows
    if not ones:
        return inner
    d_in = rows.shape[1]
    out = rows.new_empty(d_in + 1, d_in + 1)
    out[:d_in, :d_in] = inner
    column_sums = rows.sum(dim=0)
    out[:d_in, d_in] = column_sums
    out[d_in, :d_in] = column_sums
    out[d_in, d_in].fill_(rows.shape[0])  # an assignment would wait for the GPU
    return out
