"""What a benchmark says of a GPU that the features do not fit on."""

from __future__ import annotations

import pytest
import torch

from dngd.bench import device
from dngd.errors import UserError
from dngd.graph import GraphStore


def test_a_table_that_does_not_fit_names_what_every_benchmark_takes(
    store: GraphStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not all of them have a --scale."""
    monkeypatch.setattr(device, "free_gpu_bytes", lambda of: 2**20)
    monkeypatch.setattr(device, "table_bytes", lambda features: 2**20)
    with pytest.raises(UserError) as error:
        device.features_on(torch.device("cuda", 0), store)
    assert str(error.value).endswith("may use half; take a smaller graph, or leave --use-gpu out")
