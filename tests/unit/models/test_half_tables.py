"""Sums over feature tables of 16 bits."""

from __future__ import annotations

import pytest
import torch

from dngd.models import message_passing
from dngd.models.message_passing import Propagation, aggregate_rows


@pytest.mark.parametrize("at_once", [7, 1 << 14])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_hub_beyond_float16_is_summed_in_float32(
    dtype: torch.dtype, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GCN's sum over many leaves is far above any feature: the table holds these, and 16 bits not that."""
    monkeypatch.setattr(message_passing, "_EDGES_AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    table = (8000 + 4000 * torch.rand(151, 3, generator=generator)).to(dtype)
    indptr = torch.tensor([0, 150, 150, 152])
    indices = torch.cat([torch.arange(1, 151), torch.tensor([0, 5])])
    weights = torch.cat([torch.full((150,), 302**-0.5), torch.tensor([0.5, 0.25])])
    selves = torch.tensor([1 / 151, 1.0, 0.5])
    rows = aggregate_rows("gcn", table, Propagation(indptr, indices, weights, selves, None))
    dense = torch.zeros(3, 151, dtype=torch.float64)
    dense[0, 1:] = 302**-0.5
    dense[2, 0], dense[2, 5] = 0.5, 0.25
    dense[range(3), range(3)] += selves.double()
    assert rows.dtype == torch.float32
    assert torch.allclose(rows.double(), dense @ table.double(), rtol=2e-2 if dtype == torch.bfloat16 else 2e-3)
    assert rows[0].min() > 65_504
