"""Which rows a seed reaches, on both devices' ways."""

from __future__ import annotations

import pytest
import torch

from dngd.optim.capture import nonzero_rows


@pytest.mark.parametrize("is_on_cpu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_entry_counts(is_on_cpu: bool, dtype: torch.dtype) -> None:
    """The smallest number that there is, of either sign, and NaN; squares of these would be zero."""
    tiny = float(torch.nextafter(torch.zeros((), dtype=dtype), torch.ones((), dtype=dtype)))
    assert 0 < tiny < torch.finfo(dtype).tiny
    rows = torch.zeros(7, 5, dtype=dtype)
    for row, value in enumerate((tiny, -tiny, 3.0, torch.nan, -torch.inf)):
        rows[row, row] = value
    rows[6] = -0.0
    assert nonzero_rows(rows, is_on_cpu=is_on_cpu).tolist() == [True] * 5 + [False] * 2
