"""The GPU path; run by `pytest -m gpu` on a machine with a CUDA device (no Ray needed)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dngd
from dngd.optim import FactorLayout, NaturalGradient
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


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fisher": "monte_carlo"},
        {"fisher": "ggn"},
        {"method": "ekfac"},
        {"layout": FactorLayout(max_dimension=16, rank=8)},
        {"layout": FactorLayout(max_dimension=16, wide="block_diagonal")},
        {"inverse_delay": 3},
    ],
    ids=["default", "monte_carlo", "ggn", "ekfac", "low_rank", "block_diagonal", "delayed"],
)
def test_curvature_on_both_devices(options: dict[str, Any]) -> None:
    """Draws come from the CPU's streams, so factors and weights agree to float tolerance."""
    found = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(20, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 5)).to(device)
        x, y = torch.randn(64, 20).to(device), torch.randint(5, (64,)).to(device)
        optimizer = NaturalGradient(net, dense_steps=4, inverse_update_period=5, **options)
        for _ in range(12):
            optimizer.zero_grad()
            outputs = net(x)
            optimizer.observe(outputs)
            nn.functional.cross_entropy(outputs, y).backward()
            optimizer.step(num_samples=64)
        factors = optimizer.preconditioner.factors()
        found.append([*(t.cpu() for pair in factors.values() for t in pair), *(p.cpu() for p in net.parameters())])
    for mine, theirs in zip(*found):
        assert torch.allclose(mine, theirs, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_with_grad_scaler(dtype: torch.dtype) -> None:
    """The scale is divided out of the factors, and an overflowing step is skipped and forgotten."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 5)).cuda()
    x, y = torch.randn(256, 20).cuda(), torch.randint(5, (256,)).cuda()
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**24, enabled=dtype == torch.float16)
    optimizer = NaturalGradient(net, loss_scale=scaler.get_scale)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype):
            loss = nn.functional.cross_entropy(net(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer, num_samples=256)
        scaler.update()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.isfinite(p).all() for p in net.parameters())
    trace = float(optimizer.preconditioner.factors()["2"].G.trace())
    assert 0 < trace < 2, "a cross-entropy's gradient at the logits is at most √2 long"
