"""The GPU path; run by `pytest -m gpu` on a machine with a CUDA device (no Ray needed)."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dngd
from dngd.comm import LocalCommunicator
from dngd.optim import FactorLayout, KLTrustRegion, NaturalGradient
from dngd.optim.trust import mean_divergence
from dngd.train.optimizers import SecondOrder, StepOptimizer, build_optimizer, load_moments, moments
from dngd.train.streams import seed_generators
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
        {"layout": FactorLayout(max_dimension=16, rank=8, output_rank=4)},
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
        # Without corners: rounding moves some unit of a ReLU over its own within a dozen steps (seed 0 with ggn).
        smooth = nn.Tanh() if options.get("fisher") == "ggn" else nn.ReLU()
        net = nn.Sequential(nn.Linear(20, 32), nn.BatchNorm1d(32), smooth, nn.Linear(32, 5)).to(device)
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


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kl_clip": KLTrustRegion},
        {"kl_clip": None, "norm_constraint": 1e-3},
        {"update": "momentum", "kl_clip": 1e-5},
        {"layout": FactorLayout(max_dimension=16, rank=8, output_rank=4)},
        {"layout": FactorLayout(max_dimension=16, wide="block_diagonal")},
        {"inverse_precision": "full", "inverse_delay": 3},
    ],
    ids=["default", "measured", "length", "momentum", "low_rank", "block_diagonal", "delayed"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_replayed_steps_are_the_steps(options: dict[str, Any], dtype: torch.dtype) -> None:
    """With a CUDA graph and without, whatever becomes of the gradients' memory: the same bits."""
    found = []
    for cuda_graph in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(20, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 5, bias=False))
        net = net.to("cuda", dtype)
        own = {key: value(0.1) if value is KLTrustRegion else value for key, value in options.items()}
        optimizer = NaturalGradient(net, inverse_update_period=7, cuda_graph=cuda_graph, **own)
        generator = torch.Generator().manual_seed(1)
        for step in range(40):
            x = torch.randn(64, 20, generator=generator, dtype=dtype).cuda()
            y = torch.randint(5, (64,), generator=generator).cuda()
            optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
            optimizer.zero_grad(set_to_none=step % 3 > 0)
            outputs, is_measured = net(x), optimizer.is_clip_due
            nn.functional.cross_entropy(outputs, y).backward()
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                optimizer.step(num_samples=64)
            if is_measured:
                with torch.no_grad():
                    optimizer.adapt_clip(outputs, net(x))
        pre = optimizer.preconditioner
        assert (pre._replay is not None) == cuda_graph
        if pre._replay is not None:
            assert len(pre._replay._recordings) == 1
        found.append([*(p.detach().cpu() for p in net.parameters()), pre.last_scale.cpu()])
        pre.close()
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize(("own", "others"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_measured_outputs_may_be_elsewhere(own: str, others: str) -> None:
    """As those of a model whose last layers are on another device than the first."""
    torch.manual_seed(0)
    net = nn.Linear(6, 3).to(own)
    optimizer = NaturalGradient(net, kl_clip=KLTrustRegion(0.1))
    x, y = torch.randn(24, 6).to(own), torch.randint(3, (24,)).to(own)
    before = net(x)
    nn.functional.cross_entropy(before, y).backward()
    optimizer.step(num_samples=24)
    after = net(x)
    measured = optimizer.adapt_clip(before.to(others), after.to(others))
    assert measured == pytest.approx(mean_divergence(before, after))
    assert measured > 0


@pytest.mark.parametrize("name", ["kfac", "adam", "adamw", "sgd"])
def test_a_loaded_state_goes_on_alike(name: str) -> None:
    """Moments of a fused optimizer, its step counts on the GPU included, and what a CUDA graph reads: the same bits."""
    config = dngd.TrainConfig(dataset="cora", optimizer=name, use_gpu=True, epochs=1, kfac={"kl_bound": None})
    nets, optimizers = [], []
    for _ in range(2):
        torch.manual_seed(0)
        nets.append(nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 5)).cuda())
        optimizers.append(build_optimizer(config, nets[-1], LocalCommunicator()))
    data = torch.randn(8, 64, 20).cuda(), torch.randint(5, (8, 64)).cuda()
    train(nets[0], optimizers[0], *(part[:4] for part in data))
    train(nets[1], optimizers[1], *(part[4:] for part in data))
    nets[1].load_state_dict(nets[0].state_dict())
    load_moments(optimizers[1].torch_optimizer, moments(optimizers[0].torch_optimizer))
    if name == "kfac":
        mine, other = (optimizer.preconditioner for optimizer in optimizers)
        assert mine is not None
        assert other is not None
        other.load_state_dict(mine.state_dict())
    else:
        assert bool(optimizers[0].torch_optimizer.param_groups[0].get("fused")) == name.startswith("adam")
    for net, optimizer in zip(nets, optimizers):
        train(net, optimizer, *(part[4:] for part in data))
    assert all(torch.equal(one, other) for one, other in zip(nets[0].parameters(), nets[1].parameters()))


def test_a_seed_is_the_gpus_too() -> None:
    torch.manual_seed(7)
    expected = torch.randn(5), torch.randn(5, device="cuda").cpu()
    seed_generators(7, torch.device("cuda", torch.cuda.current_device()))
    assert torch.equal(torch.randn(5), expected[0])
    assert torch.equal(torch.randn(5, device="cuda").cpu(), expected[1])


def test_the_host_waits_for_few_reads() -> None:
    """What a refresh finds of all its factors takes two: the counts, and all else at once."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 5)).cuda()
    optimizer = NaturalGradient(net, layout=FactorLayout(max_dimension=16, rank=8, output_rank=4))
    train(net, SecondOrder(optimizer), torch.randn(3, 64, 20).cuda(), torch.randint(5, (3, 64)).cuda())
    pre = optimizer.preconditioner
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            found = pre.pipeline._findings.measure(list(pre.layers), pre._damping_now())
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(found) == 2 * len(pre.layers)
    assert sum("called a synchronizing CUDA operation" in str(w.message) for w in told) == 2


def train(net: nn.Module, optimizer: StepOptimizer, inputs: torch.Tensor, labels: torch.Tensor) -> None:
    for x, y in zip(inputs, labels):
        optimizer.torch_optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y, reduction="sum").backward()
        for parameter in net.parameters():
            assert parameter.grad is not None
            parameter.grad /= 64
        optimizer.step(num_seeds_here=64, finite=True)


class _Scaled(nn.Module):
    """A layer and a parameter without a dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear(x) * self.scale
        return out


@pytest.mark.parametrize("place", ["cpu", "cuda"])
def test_a_state_that_was_read_onto_any_device_goes_on(tmp_path: Path, place: str) -> None:
    """Counts on the host, where reading them waits for nothing; all else beside its parameter."""
    torch.manual_seed(0)
    x, y = torch.randn(16, 4, device="cuda"), torch.randint(3, (16,), device="cuda")
    net = _Scaled().cuda()
    optimizer = NaturalGradient(net)

    def step(net: nn.Module, optimizer: NaturalGradient) -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step(num_samples=16)

    step(net, optimizer)
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    read = torch.load(tmp_path / "state.pt", map_location=place, weights_only=True)
    other = _Scaled().cuda()
    other.load_state_dict(read["net"])
    resumed = NaturalGradient(other)
    resumed.load_state_dict(read["optimizer"])
    for parameter, state in resumed.state.items():
        for name, value in state.items():
            assert value.device.type == ("cpu" if name in ("weight", "step") else parameter.device.type), name
    step(net, optimizer)
    step(other, resumed)
    for mine, theirs in zip(other.parameters(), net.parameters()):
        torch.testing.assert_close(mine, theirs)
