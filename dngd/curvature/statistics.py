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


class KroneckerFactors(NamedTuple):
    """The two factors of a layer's Fisher block `F ≈ A ⊗ G`.

    A: [d_in (+1 with a bias), same], mean outer product of the layer's input rows.
    G: [d_out, d_out], `(1/n) Σ g_i g_iᵀ` over n seeds.
    """

    A: Tensor
    G: Tensor


def input_gram(rows: Tensor, has_bias: bool) -> Tensor:
    """Return `Σ m_i m_iᵀ` with m_i = [x_i, 1] (or x_i without a bias).

    rows: [r, d_in], input rows x_i. Returns [d, d], d = d_in + has_bias. The ones column is not
    built: its products are the column sums and r.
    """
    gram = rows.T @ rows
    if not has_bias:
        return gram
    d_in = rows.shape[1]
    out = rows.new_empty(d_in + 1, d_in + 1)
    out[:d_in, :d_in] = gram
    column_sums = rows.sum(dim=0)
    out[:d_in, d_in] = column_sums
    out[d_in, :d_in] = column_sums
    out[d_in, d_in] = rows.shape[0]
    return out


def output_gram(gradients: Tensor) -> Tensor:
    """Return `Σ g_i g_iᵀ` for gradients [r, d_out] with respect to the layer's output rows."""
    return gradients.T @ gradients


@dataclass
class FactorStatistics:
    """Sums and counts of one layer.

    a_sum: [d_a, d_a] = Σ m mᵀ; g_sum: [d_g, d_g] = Σ g gᵀ with g from the summed loss;
    counts: [2] = (number of input rows r, number of seeds n), decayed like the sums.
    """

    a_sum: Tensor
    g_sum: Tensor
    counts: Tensor

    @classmethod
    def zeros(cls, d_a: int, d_g: int, *, dtype: torch.dtype, device: torch.device) -> FactorStatistics:
        """Return empty statistics."""
        return cls(
            torch.zeros(d_a, d_a, dtype=dtype, device=device),
            torch.zeros(d_g, d_g, dtype=dtype, device=device),
            torch.zeros(2, dtype=dtype, device=device),
        )

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return (a_sum, g_sum, counts)."""
        return self.a_sum, self.g_sum, self.counts

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

    def factors(self) -> KroneckerFactors | None:
        """Return (S_A / c_A, S_G / c_G), or None while a count is zero."""
        if not bool((self.counts > 0).all()):
            return None
        return KroneckerFactors(self.a_sum / self.counts[0], self.g_sum / self.counts[1])
