"""How much of the identity is added to each factor before it is inverted.

`tikhonov`: the π-split of Martens & Grosse 2015, section 6.3: λ_A = √λ·π, λ_G = √λ/π, with
`π² = (tr A / dim A) / (tr G / dim G)`; λ is in units of the loss's Fisher.
`even`: λ_A = λ_G = √λ, as in the code behind arXiv 2008.09624.
`relative`: scale-free, λ_A = λ·tr A and λ_G = r·λ·tr G with a fixed ratio r. It does not change when
features or losses are rescaled, and so one λ serves graphs whose factors differ by orders of magnitude.
`mean`: scale-free too, relative to mean eigenvalues: λ_A = λ·(mean of A's diagonal without the bias's 1) and
λ_G = r·λ·tr G / dim G. A wide A is then damped more, as a share of its trace, than a narrow one, and the 1, which is
most of the trace where features are small, has no say: λ of hundreds whitens little else than the bias.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

DampingMode = Literal["relative", "mean", "tikhonov", "even"]

PI_RANGE = (1e-3, 1e3)


def pi_ratio(a_diagonal: Tensor, g_diagonal: Tensor) -> Tensor:
    """Return π, `π² = (tr A / dim A) / (tr G / dim G)`, clamped to [1e-3, 1e3]; 1 when a trace is 0.

    a_diagonal: [d_a], g_diagonal: [d_g], of the factors. Returns a 0-d tensor; no host synchronisation.
    """
    mean_a = a_diagonal.mean()
    mean_g = g_diagonal.mean()
    defined = (mean_a > 0) & (mean_g > 0)
    ratio = torch.where(defined, mean_a / torch.where(defined, mean_g, 1.0), 1.0)
    return ratio.sqrt().clamp(*PI_RANGE)


def damping_split(
    a_diagonal: Tensor,
    g_diagonal: Tensor,
    damping: float,
    mode: DampingMode,
    g_ratio: float = 10.0,
    *,
    has_ones: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return (λ_A, λ_G), the multiples of the identity added to A and to G, as 0-d tensors.

    a_diagonal, g_diagonal: the factors' diagonals. damping: λ > 0. g_ratio: r of the relative and mean modes. has_ones:
    whether A's last row is the bias's 1. A factor whose trace (mean) is 0 gets λ itself in these modes, so that it
    stays invertible.
    Raises ValueError if λ <= 0.
    """
    if not damping > 0:
        raise ValueError(f"damping={damping} is out of range; it must be above 0")
    if mode == "even":
        root = torch.full_like(a_diagonal.sum(), damping**0.5)
        return root, root.to(g_diagonal)
    if mode == "tikhonov":
        pi = pi_ratio(a_diagonal, g_diagonal)
        root = damping**0.5
        return root * pi, root / pi
    if mode == "mean":
        features = a_diagonal[:-1] if has_ones and a_diagonal.numel() > 1 else a_diagonal
        size_a, size_g = features.mean(), g_diagonal.mean()
    else:
        size_a, size_g = a_diagonal.sum(), g_diagonal.sum()
    fallback = torch.full_like(size_a, damping)
    lambda_a = torch.where(size_a > 0, damping * size_a, fallback)
    lambda_g = torch.where(size_g > 0, g_ratio * damping * size_g, fallback)
    return lambda_a, lambda_g
