"""Unnormalised sums and counts from which a layer's Kronecker factors are averaged.

A running average is kept as a decayed sum and a decayed count, divided only when used:
`S ← ρS + ΔS`, `c ← ρc + Δc`, `A = S_A / c_A`, `G = S_G / c_G`. Sums and counts of different ranks,
shards and steps add up, so a reduction can wait until an inverse is about to be renewed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dngd.curvature.structure import FactorStructure, Tensors


class KroneckerFactors(NamedTuple):
    """The two factors of a layer's Fisher block `F ≈ A ⊗ G`, as matrices whatever their structure.

    A: [d_in (+1 with a bias), same], mean outer product of the layer's input rows.
    G: [d_out, d_out], `(1/n) Σ g_i g_iᵀ` over n seeds.
    """

    A: Tensor
    G: Tensor


@dataclass
class FactorStatistics:
    """Sums and counts of one layer.

    a: A's sums Σ m mᵀ in its structure; g: G's, Σ g gᵀ with g from the summed loss; counts: [2] =
    (number of input rows r, number of seeds n), decayed like the sums.
    """

    a: Tensors
    g: Tensors
    counts: Tensor

    @classmethod
    def zeros(
        cls, a: FactorStructure, g: FactorStructure, *, dtype: torch.dtype, device: torch.device
    ) -> FactorStatistics:
        """Return empty statistics."""
        return cls(a.zeros(dtype, device), g.zeros(dtype, device), torch.zeros(2, dtype=dtype, device=device))

    def tensors(self) -> Tensors:
        """Return A's sums, G's sums, counts."""
        return (*self.a, *self.g, self.counts)

    def sums(self, which: str) -> Tensors:
        """Return the sums of factor "A" or "G"."""
        return self.a if which == "A" else self.g

    def decay_(self, rho: float) -> None:
        """Multiply sums and counts by ρ."""
        for tensor in self.tensors():
            tensor.mul_(rho)

    def add_(self, other: FactorStatistics) -> None:
        """Add another pair of sums and counts."""
        for mine, theirs in zip(self.tensors(), other.tensors()):
            mine.add_(theirs)

    def zero_(self) -> None:
        """Forget everything."""
        for tensor in self.tensors():
            tensor.zero_()

    def clone(self) -> FactorStatistics:
        """Return a copy."""
        return FactorStatistics(tuple(t.clone() for t in self.a), tuple(t.clone() for t in self.g), self.counts.clone())

    def averages(self) -> tuple[Tensors, Tensors] | None:
        """Return (S_A / c_A, S_G / c_G) in their structures, or None while a count is zero."""
        if not bool((self.counts > 0).all()):
            return None
        return self.quotients()

    def quotients(self) -> tuple[Tensors, Tensors]:
        """Return the averages of sums whose counts are known to be above zero; no host synchronisation."""
        return tuple(t / self.counts[0] for t in self.a), tuple(t / self.counts[1] for t in self.g)
