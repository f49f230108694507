"""The preconditioned gradient and the trust region that bounds it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from dngd.curvature.damping import pi_ratio
from dngd.curvature.statistics import KroneckerFactors


def precondition(grad: Tensor, factors: KroneckerFactors, damping: float) -> Tensor:
    """Return `(G + √λ/π I)⁻¹ · grad · (A + √λ·π I)⁻¹`, by solving; the reference for the inverses.

    grad: [d_out, d_in]; A: [d_in, d_in]; G: [d_out, d_out].
    damping: λ > 0, in units of the loss's Fisher.
    Raises ValueError if λ <= 0. Martens & Grosse 2015, section 6.3.
    """
    if not damping > 0:
        raise ValueError(f"damping={damping} is out of range; it must be above 0")
    pi = pi_ratio(factors.A, factors.G)
    eye_a = torch.eye(factors.A.shape[0], dtype=grad.dtype, device=grad.device)
    eye_g = torch.eye(factors.G.shape[0], dtype=grad.dtype, device=grad.device)
    left = torch.linalg.solve(factors.G + damping**0.5 / pi * eye_g, grad)
    out: Tensor = torch.linalg.solve(factors.A + damping**0.5 * pi * eye_a, left, left=False)
    return out


def precondition_with_inverses(grad: Tensor, a_inverse: Tensor, g_inverse: Tensor) -> Tensor:
    """Return `G⁻¹ · grad · A⁻¹` for damped inverses; grad: [d_out, d_in]."""
    return g_inverse @ grad @ a_inverse


def kl_clip_scale(pairs: Iterable[tuple[Tensor, Tensor]], lr: float, kl_clip: float) -> Tensor:
    """Return `ν = min(1, √(κ / (η² Σ_l ⟨v_l, ∇_l⟩)))` as a 0-d tensor, without a host synchronisation.

    pairs: (preconditioned gradient v_l, mean-loss gradient ∇_l) of each layer. lr: η >= 0.
    kl_clip: κ > 0. `η²Σ⟨v, ∇⟩` is the step's predicted squared length in the Fisher's metric, twice
    its predicted KL divergence. Ba, Grosse & Martens 2017, section 5.
    """
    total: Tensor | None = None
    for preconditioned, gradient in pairs:
        product = (preconditioned * gradient).sum()
        total = product if total is None else total + product
    if total is None:
        return torch.ones(())
    quadratic = lr**2 * total.abs()
    bound = (kl_clip / quadratic.clamp_min(torch.finfo(quadratic.dtype).tiny)).sqrt()
    return bound.clamp_max(1.0)
