"""A wide factor as low rank plus diagonal, from a linear sketch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dngd.curvature.inverse import InverseResult
from dngd.curvature.reads import entries_are_finite
from dngd.curvature.structure import Operator, SparseInput, Tensors, probe_vector

SKETCH_SEED = 20_080_962
"""Of the fixed test matrices of low-rank sketches: every rank and every run draws the same."""

HOST_RANK = 128
"""Columns up to which the host decomposes [k, k] matrices of a GPU: eigh of 64 in float64 takes one thread .26 ms and
an H100 .81 ms, of 128 1.3 and 1.7 ms, of 257 4.8 and 2.5 ms."""

FLOAT32_DAMPING = 1e-4
"""Share of the trace above which damping lets a low-rank factor be inverted in single precision."""


@dataclass(frozen=True)
class LowRank:
    """`M ≈ F Fᵀ + D`, F [d, k] from a linear sketch, D the diagonal that F leaves over; for wide inputs, and for
    outputs whose damping leaves few directions of use.

    Kept: the sketch `Y = M Ω` with a fixed random Ω [d, k], and the diagonal of M; both are linear in
    M, so they add up and decay like dense sums. `F Fᵀ = Y (Ωᵀ Y)⁺ Yᵀ` (Nyström; Tropp, Yurtsever, Udell &
    Cevher 2017), never above M, and M itself when its rank is at most k. With damping λ = c·tr M at
    most 1/c eigenvalues exceed λ, so that k of that size loses little; in float32, directions below about
    1e-4·tr M are rounding, so damp above that. The inverse is exact (Woodbury):
    `(E + F Fᵀ)⁻¹ = E⁻¹ - K Kᵀ`, E = D + λ, K = E⁻¹ F L⁻ᵀ, L Lᵀ = I + Fᵀ E⁻¹ F.

    inverse_rank: r <= k columns of F that the inverse is made of, those of F's r largest singular values; what the
    others hold of the diagonal goes to D. A sketch is best in its largest directions (the others are its oversampling),
    and a product with the inverse costs 4·d·r a row. None: all k.
    """

    dimension: int
    rank: int
    inverse_rank: int | None = None
    _omega: dict[tuple[torch.dtype, torch.device], Tensor] = field(default_factory=dict, compare=False, repr=False)

    @property
    def label(self) -> str:
        kept = "" if self.inverse_rank is None else f" ({self.inverse_rank} in the inverse)"
        return f"rank {self.rank}{kept} of {self.dimension}"

    @property
    def inverse_columns(self) -> int:
        """Columns of F in the inverse."""
        return self.rank if self.inverse_rank is None else min(self.inverse_rank, self.rank)

    @property
    def inversion_cost(self) -> float:
        return 4.0 * self.dimension * self.rank**2

    @property
    def bears_rounding(self) -> bool:
        # The core Ωᵀ Y is inverted without damping: rounding of Y would be amplified.
        return False

    def test_matrix(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return Ω, [d, k]: fixed Gaussian entries, kept after the first call."""
        if (dtype, device) not in self._omega:
            generator = torch.Generator().manual_seed(SKETCH_SEED)
            omega = torch.randn(self.dimension, self.rank, generator=generator, dtype=torch.float64, device="cpu")
            self._omega[dtype, device] = omega.to(device, dtype)
        return self._omega[dtype, device]

    def zeros(self, dtype: torch.dtype, device: torch.device) -> Tensors:
        sketch = torch.zeros(self.dimension, self.rank, dtype=dtype, device=device)
        return sketch, torch.zeros(self.dimension, dtype=dtype, device=device)

    def accumulate_(self, sums: Tensors, rows: Tensor, *, ones: bool = False, weight: float = 1.0) -> None:
        sketch, diagonal = sums
        omega = self.test_matrix(rows.dtype, rows.device)
        width = rows.shape[1]
        projected = rows @ omega[:width]
        squares = rows.square().sum(dim=0)
        if ones:
            projected = projected + omega[width]
            sketch[width].add_(projected.sum(dim=0), alpha=weight)
            diagonal[width].add_(weight * rows.shape[0])
        sketch[:width].addmm_(rows.T, projected, alpha=weight)
        diagonal[:width].add_(squares, alpha=weight)

    def accumulate_sparse_(self, sums: Tensors, rows: SparseInput, *, ones: bool = False, weight: float = 1.0) -> None:
        """Add `weight · Σ m mᵀ` of rows, as accumulate_ does, without a look at their zeros."""
        sketch, diagonal = sums
        omega = self.test_matrix(sketch.dtype, sketch.device)
        count, width = rows.shape
        projected = rows.times(omega[:width])
        if ones:
            projected = projected + omega[width]
            sketch[width].add_(projected.sum(dim=0), alpha=weight)
            diagonal[width].add_(weight * count)
        sketch[:width].add_(rows.transposed_times(projected).t(), alpha=weight)
        diagonal[:width].index_add_(0, rows.columns, rows.values.to(sketch.dtype).square(), alpha=weight)

    def diagonal(self, sums: Tensors) -> Tensor:
        return sums[1]

    def operator(self, sums: Tensors) -> Operator:
        low, rest = self._parts(sums, torch.float64)

        def product(vector: Tensor) -> Tensor:
            wide = vector.double()
            return (low @ (low.T @ wide) + rest * wide).to(vector.dtype)

        return product

    def probe(self, sums: Tensors) -> Tensor:
        # p = Ω q, so that M p = Y q is at hand, of M itself and without F.
        return sums[0] @ probe_vector(self.rank, sums[0])

    def dense(self, sums: Tensors) -> Tensor:
        low, rest = self._parts(sums, torch.float64)
        return (low @ low.T + torch.diag(rest)).to(sums[1].dtype)

    def _parts(self, sums: Tensors, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return F [d, k] and the diagonal D [d] >= 0 that it leaves over, in the type that products are taken in."""
        sketch, diagonal = (tensor.to(dtype) for tensor in sums)
        core = self._where_small((self.test_matrix(sums[1].dtype, sketch.device).to(dtype).T @ sketch).double())
        values, vectors = torch.linalg.eigh((core + core.T) / 2)
        # Below the sums' own rounding a direction of the core is noise; its inverse would amplify it.
        floor = values[-1].clamp_min(0) * (self.dimension * torch.finfo(sums[1].dtype).eps)
        scale = torch.where(values > floor, values, math.inf).rsqrt()
        low = sketch @ (vectors * scale).to(sketch)
        return low, (diagonal - low.square().sum(dim=1)).clamp_min(0)

    def _where_small(self, core: Tensor) -> Tensor:
        """Return a [k, k] matrix where its decomposition takes less time: for small k on the host, a GPU's copies and
        waits included."""
        return core.cpu() if self.rank <= HOST_RANK else core

    def invert(self, averages: Tensors, damping: Tensor | float) -> InverseResult:
        lam = float(damping)
        if not (lam > 0 and entries_are_finite(averages)):
            return InverseResult(None, lam, 0)
        dtype = averages[1].dtype
        with torch.autocast(averages[1].device.type, enabled=False):
            return self._woodbury(averages, lam, dtype if self._bears_float32(averages[1], lam) else torch.float64)

    def _bears_float32(self, diagonal: Tensor, lam: float) -> bool:
        """Whether products of width d may be taken in the sums' own type: Woodbury's error is about eps · tr M / λ.
        Not on a GPU, where float32 may be TF32 and double precision is at hand."""
        return diagonal.device.type == "cpu" and lam > FLOAT32_DAMPING * float(diagonal.sum())

    def _woodbury(self, averages: Tensors, lam: float, working: torch.dtype) -> InverseResult:
        dtype = averages[1].dtype
        low, rest = self._parts(averages, working)
        if self.inverse_columns < self.rank:
            gram = self._where_small((low.T @ low).double())
            largest = torch.linalg.eigh((gram + gram.T) / 2)[1][:, -self.inverse_columns :]
            low = low @ largest.to(low)
            rest = (averages[1].to(low.dtype) - low.square().sum(dim=1)).clamp_min(0)
        inverse_diagonal = (rest + lam).reciprocal()
        scaled = inverse_diagonal[:, None] * low
        core = self._where_small((low.T @ scaled).double())  # only what is [k, k] is worth double precision
        core.diagonal().add_(1.0)
        factor, info = torch.linalg.cholesky_ex(core)
        if int(info) != 0:
            return InverseResult(None, lam, 1)
        identity = torch.eye(self.inverse_columns, dtype=core.dtype, device=core.device)
        inverse_factor = torch.linalg.solve_triangular(factor, identity, upper=False)
        correction = scaled @ inverse_factor.T.to(scaled)
        return InverseResult((inverse_diagonal.to(dtype), correction.to(dtype)), lam, 0)

    def inverse_shapes(self) -> list[tuple[tuple[int, ...], bool]]:
        return [((self.dimension,), False), ((self.dimension, self.inverse_columns), False)]

    def multiply(self, matrix: Tensor, inverse: Tensors) -> Tensor:
        diagonal, correction = inverse
        return (matrix * diagonal).addmm_(matrix @ correction, correction.T, alpha=-1)

    def multiply_from_left(self, matrix: Tensor, inverse: Tensors) -> Tensor:
        diagonal, correction = inverse
        return (diagonal[:, None] * matrix).addmm_(correction, correction.T @ matrix, alpha=-1)

    def eigenbasis(self, averages: Tensors) -> Tensors | None:
        return (averages[1],) if entries_are_finite(averages[1:]) else None

    def eigenbasis_shapes(self) -> list[tuple[int, ...]]:
        return [(self.dimension,)]
