"""Damped inverses and eigendecompositions of dense factors, with escalation instead of silent failure.

Order of attempts of an inverse: Cholesky in the factor's own precision; Cholesky in float64; more
damping (×10, at most three times) in float64. Each attempt is checked with one probe vector, since a
Cholesky factorisation of an ill-conditioned matrix can succeed and still be useless.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from dngd.curvature.reads import entries_are_finite, read_together

MAX_DAMPING_ESCALATIONS = 3
PROBE_TOLERANCE = 1e-2


@dataclass(frozen=True)
class InverseResult:
    """The outcome of one inversion.

    inverse: `(M + λ'I)⁻¹` as its structure's tensors, in M's dtype, or None when every attempt failed.
    damping: the λ' used (equal to the λ asked for unless escalated).
    escalations: number of attempts that failed before this one.
    """

    inverse: tuple[Tensor, ...] | None
    damping: float
    escalations: int


def cholesky_inverse(matrix: Tensor, damping: Tensor | float) -> InverseResult:
    """Return `(M + λI)⁻¹` for a symmetric positive semi-definite M.

    matrix: [d, d]. damping: λ > 0. Raises ValueError if λ <= 0. A matrix that holds a non-finite
    value yields inverse=None: the caller keeps its last good inverse.
    """
    lam = float(damping)
    if not lam > 0:
        raise ValueError(f"damping={lam} is out of range; it must be above 0")
    escalations = 0
    attempts: list[tuple[torch.dtype, float]] = [(matrix.dtype, lam)]
    if matrix.dtype != torch.float64:
        attempts.append((torch.float64, lam))
    attempts += [(torch.float64, lam * 10.0**k) for k in range(1, MAX_DAMPING_ESCALATIONS + 1)]
    for dtype, value in attempts:
        inverse = _cholesky_inverse(matrix.to(dtype), value)
        if inverse is not None:
            return InverseResult((inverse.to(matrix.dtype),), value, escalations)
        # No attempt with a matrix that is not finite passes its probe, so that others need not be asked.
        if escalations == 0 and not entries_are_finite([matrix]):
            return InverseResult(None, lam, 0)
        escalations += 1
    return InverseResult(None, lam, escalations)


def _cholesky_inverse(matrix: Tensor, damping: float) -> Tensor | None:
    """Return the damped inverse, or None if the factorisation fails or its probe is inaccurate."""
    damped = matrix.clone()
    damped.diagonal().add_(damping)
    factor, info = torch.linalg.cholesky_ex(damped)
    try:
        # LAPACK's result is column-major; products round differently by layout, and a checkpoint keeps none.
        inverse = torch.cholesky_inverse(factor).contiguous()
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # of a factor that failed: a zero on its diagonal
        return None
    probe, limit = _probe(matrix.shape[0], matrix.dtype, matrix.device)
    residual = torch.linalg.vector_norm(torch.addmv(probe, damped, inverse @ probe, alpha=-1))
    found, failed = read_together([residual, info])
    return inverse if failed == 0 and found <= limit else None


@lru_cache(maxsize=64)
def _probe(dimension: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, float]:
    """Return a fixed vector and the most that an inverse's residual of it may be.

    It is dense, and not an eigenvector of anything in particular.
    """
    with torch.inference_mode(False):
        probe = torch.linspace(0.5, 1.5, dimension, dtype=dtype, device="cpu")
        return probe.to(device), PROBE_TOLERANCE * float(torch.linalg.vector_norm(probe))


def eigendecomposition(matrix: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return (Q [d, d], e [d] >= 0) with M = Q diag(e) Qᵀ, computed in float64; None if M is not finite.

    Rounding below zero is clamped: the factors are positive semi-definite by construction.
    """
    if not entries_are_finite([matrix]):
        return None
    try:
        values, vectors = torch.linalg.eigh(matrix.double())
    except RuntimeError:  # torch.linalg.LinAlgError, which torch does not export for type checkers
        return None
    return vectors.to(matrix.dtype).contiguous(), values.clamp_min(0).to(matrix.dtype)
