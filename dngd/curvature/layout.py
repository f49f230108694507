"""Which structure each factor of a layer gets, by its width and the parts that its input is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from dngd.curvature.low_rank import LowRank
from dngd.curvature.structure import BlockDiagonal, Dense, Diagonal, FactorStructure
from dngd.errors import UserError

RANK, RANK_OF_WIDEST, WIDEST = 64, 128, 4096
"""Columns of a low-rank factor where none are asked for: up to a width, and beyond it."""

DENSE, DENSE_INPUT = 640, 400
"""The widest factor that is kept dense where none is asked for: any, and an A in whose place low rank is cheaper."""

OUTPUT_WIDTHS = 4
"""How many times as wide as its columns a G is at least that becomes low rank: at twice, multiplying by its inverse
takes as many operations as by a dense one."""
COLUMNS_STEP = 16

WideInputs = str
"""What is done with an A factor wider than max_dimension: "low_rank", "block_diagonal", "diagonal" or "dense"."""


@dataclass(frozen=True)
class FactorLayout:
    """Which structure a factor gets, by its width.

    max_dimension: the widest factor that is kept dense; None: 640, and 400 for an A that becomes "low_rank" (as
    accurate at that width, and cheaper). wide: what a wider A becomes: "low_rank", "block_diagonal"
    (equal blocks of at most max_dimension), "diagonal" or "dense". A wider G becomes block-diagonal, or diagonal or
    dense where wide says so. rank: columns of "low_rank" (an A no wider than that becomes blocks); None: 64, and 128
    for a factor wider than 4,096. split_inputs: whether an input that a layer puts together from several parts (self
    and neighbour rows of GraphSAGE) gets one block a part. output_rank: columns of a G at least four times as wide,
    which then is low rank, too, see output_rank_for; None: none is. inverse_rank: columns of the inverse of an A that
    is low rank and wider than 4,096 (LowRank.inverse_rank); None: as many as its sketch has.
    """

    max_dimension: int | None = 2048
    wide: WideInputs = "low_rank"
    rank: int | None = 256
    split_inputs: bool = True
    output_rank: int | None = None
    inverse_rank: int | None = None

    def __post_init__(self) -> None:
        if self.wide not in ("low_rank", "block_diagonal", "diagonal", "dense"):
            raise UserError(f"wide={self.wide!r} is unknown; use one of: low_rank, block_diagonal, diagonal, dense")
        for name in ("max_dimension", "rank", "output_rank", "inverse_rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}={value} is out of range; give a whole number, at least 1")

    def for_eigenbases(self) -> FactorLayout:
        """Return the layout where factors are decomposed: a low-rank sketch has no full basis. Of a wide A its diagonal
        is kept."""
        return replace(self, wide="diagonal" if self.wide == "low_rank" else self.wide, output_rank=None)

    def input_structure(self, dimension: int, parts: tuple[int, ...] = ()) -> FactorStructure:
        """Return A's structure. parts: sizes of the blocks that the layer itself is made of (relations,
        self and neighbour rows), () for none."""
        sizes = parts if parts and self.split_inputs else (dimension,)
        rank = (RANK if dimension <= WIDEST else RANK_OF_WIDEST) if self.rank is None else self.rank
        limit = DENSE_INPUT if self.max_dimension is None else self.max_dimension
        if max(sizes) > limit and self.wide == "low_rank" and rank < dimension:
            fewer = self.inverse_rank is not None and self.inverse_rank < rank and dimension > WIDEST
            return LowRank(dimension, rank, self.inverse_rank if fewer else None)
        if max(sizes) > self._limit and self.wide == "diagonal":
            return Diagonal(dimension)
        if self.wide != "dense":
            sizes = tuple(block for size in sizes for block in _even_blocks(size, self._limit))
        return Dense(dimension) if len(sizes) == 1 else BlockDiagonal(sizes)

    def output_structure(self, dimension: int) -> FactorStructure:
        """Return G's structure."""
        if self.output_rank is not None and dimension >= OUTPUT_WIDTHS * self.output_rank:
            return LowRank(dimension, self.output_rank)
        if dimension <= self._limit or self.wide == "dense":
            return Dense(dimension)
        if self.wide == "diagonal":
            return Diagonal(dimension)
        return BlockDiagonal(_even_blocks(dimension, self._limit))

    @property
    def _limit(self) -> int:
        return DENSE if self.max_dimension is None else self.max_dimension


def output_rank_for(share: float) -> int:
    """Return the columns of a low-rank G that is damped by a share of its trace: λ = s · tr G leaves at most 1/s
    eigenvalues above λ, here rounded up to a multiple of 16. Where what low rank leaves out of G is δλ, the inverse is
    off by δ/λ at most.

    share: s, above 0. Raises UserError for another.
    """
    if not share > 0:
        raise UserError(f"share={share} is out of range; give damping as a share of tr G, above 0")
    return COLUMNS_STEP * max(1, math.ceil(1.0 / (COLUMNS_STEP * share) - 1e-9))


def _even_blocks(dimension: int, limit: int) -> tuple[int, ...]:
    """Return sizes of the fewest nearly equal blocks of at most `limit`; they add up to `dimension`."""
    count = math.ceil(dimension / limit)
    return tuple(dimension * (i + 1) // count - dimension * i // count for i in range(count))
