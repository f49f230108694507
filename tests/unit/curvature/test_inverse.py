"""What a damped inverse is not made of: factors that are not finite, and factorisations that failed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dngd.curvature import cholesky_inverse, inverse


@pytest.mark.parametrize("wrong", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("d", [1, 2, 70])
def test_a_factor_that_is_not_finite_is_not_tried_again(wrong: float, dtype: torch.dtype, d: int) -> None:
    for row, column in {(0, 0), (d - 1, 0), (d // 2, d // 2), (d - 1, d - 1)}:
        matrix = torch.eye(d, dtype=dtype)
        matrix[row, column] = matrix[column, row] = wrong
        result = cholesky_inverse(matrix, 0.5)
        assert (result.inverse, result.damping, result.escalations) == (None, 0.5, 0)


def test_a_factorisation_that_failed_is_none_whatever_its_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a wide factor one wrong direction is less than what a probe tells."""

    def any_residual(dimension: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, float]:
        return torch.ones(dimension, dtype=dtype, device=device), math.inf

    monkeypatch.setattr(inverse, "_probe", any_residual)
    assert cholesky_inverse(torch.diag(torch.tensor([1.0, 1.0, 2.0])), 0.5).inverse is not None
    assert cholesky_inverse(torch.diag(torch.tensor([1.0, 1.0, -2e4])), 0.5).inverse is None
