"""How a factor is kept: dense, diagonal, block-diagonal, or low-rank plus diagonal.

A factor is `M = (1/c) Σ m mᵀ` over rows m. Each structure keeps sums that are **linear** in the outer
products, so that sums of different steps, shards and ranks add up whatever the structure; it knows how
to invert the damped average, how to multiply by the result, and what travels between ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from dngd.curvature.inverse import InverseResult, cholesky_inverse, eigendecomposition
from dngd.curvature.symmetric import pack_symmetric, packed_diagonal, packed_size, unpack_symmetric
from dngd.errors import UserError

Tensors = tuple[Tensor, ...]
Operator = Callable[[Tensor], Tensor]

SKETCH_SEED = 20_080_962
"""Of the fixed test matrices of low-rank sketches: every rank and every run draws the same."""


FLOAT32_DAMPING = 1e-4
"""Share of the trace above which damping lets a low-rank factor be inverted in single precision."""

RANK, RANK_OF_WIDEST, WIDEST = 64, 128, 4096
"""Columns of a low-rank factor where none are asked for: up to a width, and beyond it."""


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
        sound = float(damping) > 0 and bool((torch.isfinite(averages[0]) & torch.isfinite(inverse)).all())
        return InverseResult((inverse,) if sound else None, float(damping), 0)

    def inverse_shapes(self) -> list[tuple[tuple[int, ...], bool]]:
        return [((self.dimension,), False)]

    def multiply(self, matrix: Tensor, inverse: Tensors) -> Tensor:
        return matrix * inverse[0]

    def multiply_from_left(self, matrix: Tensor, inverse: Tensors) -> Tensor:
        return inverse[0][:, None] * matrix

    def eigenbasis(self, averages: Tensors) -> Tensors | None:
        return (averages[0],) if bool(torch.isfinite(averages[0]).all()) else None

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


@dataclass(frozen=True)
class LowRank:
    """`M ≈ F Fᵀ + D`, F [d, k] from a linear sketch, D the diagonal that F leaves over; for wide inputs.

    Kept: the sketch `Y = M Ω` with a fixed random Ω [d, k], and the diagonal of M; both are linear in
    M, so they add up and decay like dense sums. `F Fᵀ = Y (Ωᵀ Y)⁺ Yᵀ` (Nyström; Tropp, Yurtsever, Udell &
    Cevher 2017), never above M, and M itself when its rank is at most k. With damping λ = c·tr M at
    most 1/c eigenvalues exceed λ, so that k of that size loses little; in float32, directions below about
    1e-4·tr M are rounding, so damp above that. The inverse is exact (Woodbury):
    `(E + F Fᵀ)⁻¹ = E⁻¹ - K Kᵀ`, E = D + λ, K = E⁻¹ F L⁻ᵀ, L Lᵀ = I + Fᵀ E⁻¹ F.
    """

    dimension: int
    rank: int
    _omega: dict[tuple[torch.dtype, torch.device], Tensor] = field(default_factory=dict, compare=False, repr=False)

    @property
    def label(self) -> str:
        return f"rank {self.rank} of {self.dimension}"

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
            diagonal[width] += weight * rows.shape[0]
        sketch[:width].addmm_(rows.T, projected, alpha=weight)
        diagonal[:width].add_(squares, alpha=weight)

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
        core = (self.test_matrix(sums[1].dtype, sketch.device).to(dtype).T @ sketch).double()
        values, vectors = torch.linalg.eigh((core + core.T) / 2)
        # Below the sums' own rounding a direction of the core is noise; its inverse would amplify it.
        floor = values.amax().clamp_min(0) * self.dimension * torch.finfo(sums[1].dtype).eps
        kept = values > floor
        scale = torch.where(kept, torch.where(kept, values, 1.0).rsqrt(), 0.0)
        low = sketch @ (vectors * scale).to(dtype)
        return low, (diagonal - low.square().sum(dim=1)).clamp_min(0)

    def invert(self, averages: Tensors, damping: Tensor | float) -> InverseResult:
        lam = float(damping)
        if not (lam > 0 and all(bool(torch.isfinite(t).all()) for t in averages)):
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
        inverse_diagonal = (rest + lam).reciprocal()
        scaled = inverse_diagonal[:, None] * low
        core = (low.T @ scaled).double()  # only what is [k, k] is worth double precision
        core.diagonal().add_(1.0)
        factor, info = torch.linalg.cholesky_ex(core)
        if int(info) != 0:
            return InverseResult(None, lam, 1)
        identity = torch.eye(self.rank, dtype=core.dtype, device=core.device)
        inverse_factor = torch.linalg.solve_triangular(factor, identity, upper=False)
        correction = scaled @ inverse_factor.T.to(working)
        return InverseResult((inverse_diagonal.to(dtype), correction.to(dtype)), lam, 0)

    def inverse_shapes(self) -> list[tuple[tuple[int, ...], bool]]:
        return [((self.dimension,), False), ((self.dimension, self.rank), False)]

    def multiply(self, matrix: Tensor, inverse: Tensors) -> Tensor:
        diagonal, correction = inverse
        return (matrix * diagonal).addmm_(matrix @ correction, correction.T, alpha=-1)

    def multiply_from_left(self, matrix: Tensor, inverse: Tensors) -> Tensor:
        diagonal, correction = inverse
        return (diagonal[:, None] * matrix).addmm_(correction, correction.T @ matrix, alpha=-1)

    def eigenbasis(self, averages: Tensors) -> Tensors | None:
        return (averages[1],) if bool(torch.isfinite(averages[1]).all()) else None

    def eigenbasis_shapes(self) -> list[tuple[int, ...]]:
        return [(self.dimension,)]


def probe_vector(dimension: int, like: Tensor) -> Tensor:
    """Return a fixed Gaussian vector, the same on every rank."""
    generator = torch.Generator().manual_seed(dimension)
    return torch.randn(dimension, generator=generator, dtype=torch.float64, device="cpu").to(like.device, like.dtype)


def gram(rows: Tensor, ones: bool) -> Tensor:
    """Return `Σ m_i m_iᵀ` with m_i = [x_i, 1] (or x_i without ones).

    rows: [r, d_in], input rows x_i. Returns [d, d], d = d_in + ones. The ones column is not built: its
    products are the column sums and r.
    """
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


WideInputs = str
"""What is done with an A factor wider than max_dimension: "low_rank", "block_diagonal", "diagonal" or "dense"."""


@dataclass(frozen=True)
class FactorLayout:
    """Which structure a factor gets, by its width.

    max_dimension: the widest factor that is kept dense. wide: what a wider A becomes: "low_rank", "block_diagonal"
    (equal blocks of at most max_dimension), "diagonal" or "dense". A wider G becomes block-diagonal, or diagonal or
    dense where wide says so. rank: columns of "low_rank"; None: 64, and 128 for a factor wider than 4,096.
    split_inputs: whether an input that a layer puts together from several parts (self and neighbour rows of
    GraphSAGE) gets one block a part.
    """

    max_dimension: int = 2048
    wide: WideInputs = "low_rank"
    rank: int | None = 256
    split_inputs: bool = True

    def __post_init__(self) -> None:
        if self.wide not in ("low_rank", "block_diagonal", "diagonal", "dense"):
            raise UserError(f"wide={self.wide!r} is unknown; use one of: low_rank, block_diagonal, diagonal, dense")
        for name in ("max_dimension", "rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}={value} is out of range; give a whole number, at least 1")

    def for_eigenbases(self) -> FactorLayout:
        """Return the layout where factors are decomposed: a low-rank sketch has no full basis, its diagonal is kept."""
        return replace(self, wide="diagonal") if self.wide == "low_rank" else self

    def input_structure(self, dimension: int, parts: tuple[int, ...] = ()) -> FactorStructure:
        """Return A's structure. parts: sizes of the blocks that the layer itself is made of (relations,
        self and neighbour rows), () for none."""
        sizes = parts if parts and self.split_inputs else (dimension,)
        rank = (RANK if dimension <= WIDEST else RANK_OF_WIDEST) if self.rank is None else self.rank
        if max(sizes) > self.max_dimension and self.wide == "low_rank" and rank < dimension:
            return LowRank(dimension, rank)
        if max(sizes) > self.max_dimension and self.wide == "diagonal":
            return Diagonal(dimension)
        if self.wide != "dense":
            sizes = tuple(block for size in sizes for block in _even_blocks(size, self.max_dimension))
        return Dense(dimension) if len(sizes) == 1 else BlockDiagonal(sizes)

    def output_structure(self, dimension: int) -> FactorStructure:
        """Return G's structure."""
        if dimension <= self.max_dimension or self.wide == "dense":
            return Dense(dimension)
        if self.wide == "diagonal":
            return Diagonal(dimension)
        return BlockDiagonal(_even_blocks(dimension, self.max_dimension))


def _even_blocks(dimension: int, limit: int) -> tuple[int, ...]:
    """Return sizes of the fewest nearly equal blocks of at most `limit`; they add up to `dimension`."""
    count = math.ceil(dimension / limit)
    return tuple(dimension * (i + 1) // count - dimension * i // count for i in range(count))
