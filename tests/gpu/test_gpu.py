"""The GPU path; run by `pytest -m gpu` on a machine with a CUDA device (no Ray needed)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dngd
from tests.helpers.graphs import small_store

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here"),
]


@pytest.mark.parametrize("optimizer", ["kfac", "adam"])
@pytest.mark.parametrize("model", ["gcn", "sage"])
def test_gpu_and_cpu_train_alike(tmp_path: Path, model: str, optimizer: str) -> None:
    """Without dropout the same batches give the same curve, to float tolerance."""
    store = small_store(tmp_path / "store")
    curves = []
    for use_gpu in (False, True):
        config = dngd.TrainConfig(
            dataset=str(store.path),
            engine="local",
            model=model,
            optimizer=optimizer,
            num_layers=2,
            fanout=(5, 5),
            hidden=32,
            batch_size=64,
            epochs=2,
            dropout=0.0,
            use_gpu=use_gpu,
            run_dir=tmp_path / f"run-{use_gpu}",
        )
        result = dngd.Trainer(config, quiet=True).fit()
        curves.append([record.train_loss for record in result.history])
        assert (result.peak_gpu_bytes > 0) == use_gpu
    assert curves[0] == pytest.approx(curves[1], rel=5e-3)
