"""The preconditioned gradient, in Kronecker-factored and eigenvalue-corrected form, and its trust region."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from dngd.curvature.damping import pi_ratio
from dngd.curvature.statistics import KroneckerFactors
from dngd.curvature.structure import FactorStructure, Tensors


def precondition(grad: Tensor, factors: KroneckerFactors, damping: float) -> Tensor:
    """Return `(G + √λ/π I)⁻¹ · grad · (A + √λ·π I)⁻¹`, by solving; the reference for the inverses.

    grad: [d_out, d_in]; A: [d_in, d_in]; G: [d_out, d_out].
    damping: λ > 0, in units of the loss's Fisher.
    Raises ValueError if λ <= 0. Martens & Grosse 2015, section 6.3.
    """
    if not damping > 0:
        raise ValueError(f"damping={damping} is out of range; it must be above 0")
    pi = pi_ratio(factors.A.diagonal(), factors.G.diagonal())
    eye_a = torch.eye(factors.A.shape[0], dtype=grad.dtype, device=grad.device)
    eye_g = torch.eye(factors.G.shape[0], dtype=grad.dtype, device=grad.device)
    left = torch.linalg.solve(factors.G + damping**0.5 / pi * eye_g, grad)
    out: Tensor = torch.linalg.solve(factors.A + damping**0.5 * pi * eye_a, left, left=False)
    return out


def precondition_with_inverses(
    grad: Tensor, a: FactorStructure, a_inverse: Tensors, g: FactorStructure, g_inverse: Tensors
) -> Tensor:
    """Return `G⁻¹ · grad · A⁻¹` for damped inverses in their structures; grad: [d_out, d_in]."""
    return a.multiply(g.multiply_from_left(grad, g_inverse), a_inverse)


def rotate(grad: Tensor, a_basis: Tensors, g_basis: Tensors) -> Tensor:
    """Return `Q_Gᵀ · grad · Q_A`, the gradient in the factors' eigenbasis; a basis (e,) has Q = I."""
    out = grad @ a_basis[0] if len(a_basis) == 2 else grad
    return g_basis[0].T @ out if len(g_basis) == 2 else out


def rotate_back(matrix: Tensor, a_basis: Tensors, g_basis: Tensors) -> Tensor:
    """Return `Q_G · matrix · Q_Aᵀ`, the inverse of `rotate`."""
    out = matrix @ a_basis[0].T if len(a_basis) == 2 else matrix
    return g_basis[0] @ out if len(g_basis) == 2 else out


def precondition_in_eigenbasis(
    grad: Tensor, a_basis: Tensors, g_basis: Tensors, scales: Tensor | None, lambda_a: float, lambda_g: float
) -> Tensor:
    """Return `Q_G [ (Q_Gᵀ ∇ Q_A) / (s + λ_G e_Aᵀ + e_G λ_A + λ_A λ_G) ] Q_Aᵀ`.

    grad: [d_g, d_a]. scales: s, [d_g, d_a], the second moments of the per-row gradients in the eigenbasis
    (EKFAC; George et al. 2018); None: `s = e_G e_Aᵀ`, for which this is K-FAC with factored damping.
    """
    a_values, g_values = a_basis[-1], g_basis[-1]
    if scales is None:
        denominator = torch.outer(g_values + lambda_g, a_values + lambda_a)
    else:
        denominator = scales + lambda_g * a_values + lambda_a * g_values[:, None] + lambda_a * lambda_g
    return rotate_back(rotate(grad, a_basis, g_basis) / denominator, a_basis, g_basis)


def row_scales(rows: Tensor, gradients: Tensor, ones: bool, a_basis: Tensors, g_basis: Tensors) -> Tensor:
    """Return `Σ_i (Q_Gᵀ g_i)² (Q_Aᵀ m_i)²ᵀ`, [d_g, d_a]: the summed squares of EKFAC's scales.

    rows: [r, d_in], a 1 appended where `ones`; gradients: [r, d_g].
    """
    if ones:
        rows = torch.cat([rows, rows.new_ones(rows.shape[0], 1)], dim=1)
    m = rows @ a_basis[0] if len(a_basis) == 2 else rows
    g = gradients @ g_basis[0] if len(g_basis) == 2 else gradients
    return g.square().T @ m.square()


def inner_product(pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Return `Σ_l ⟨v_l, ∇_l⟩` as a 0-d tensor, without a host synchronisation; 0 without pairs.

    In float32 at least: of float16 squares and their sums are soon out of range.
    """
    total: Tensor | None = None
    for preconditioned, gradient in pairs:
        if gradient.dtype.itemsize < torch.float32.itemsize:
            preconditioned, gradient = preconditioned.float(), gradient.float()
        product = (preconditioned * gradient).sum()
        total = product if total is None else total + product
    return torch.zeros((), device="cpu") if total is None else total


def kl_clip_scale(quadratic: Tensor, squared_rate: float | Tensor, kl_clip: float | Tensor) -> Tensor:
    """Return `ν = min(1, √(κ / (η² q)))`, `q = Σ_l ⟨v_l, ∇_l⟩`, as a 0-d tensor without a host synchronisation.

    squared_rate: η² >= 0. kl_clip: κ > 0. Both numbers, or 0-d tensors of q's type, which give the same bits. `η² q` is
    the step's predicted squared length in the Fisher's metric, twice its predicted KL divergence. Ba, Grosse & Martens
    2017, section 5.
    """
    length = squared_rate * quadratic.abs()
    return (length.clamp_min(torch.finfo(length.dtype).tiny).reciprocal() * kl_clip).sqrt().clamp_max(1.0)


def norm_scale(squared_norm: Tensor, lr: float | Tensor, bound: float | Tensor) -> Tensor:
    """Return `min(1, c / (η ‖v‖))`, which bounds the step's Euclidean length by c; 0-d tensor.

    lr: η. bound: c. Both numbers, or 0-d tensors of the norm's type, which give the same bits.
    """
    length = lr * squared_norm.sqrt()
    return (length.clamp_min(torch.finfo(length.dtype).tiny).reciprocal() * bound).clamp_max(1.0)
