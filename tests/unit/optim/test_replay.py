"""Replayed steps against steps that are not: the same bits. What a CUDA graph does is done here by calling again; with
a GPU's graphs, tests/gpu/test_gpu.py."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dngd.curvature import FactorLayout
from dngd.errors import UserError
from dngd.optim import KLTrustRegion, NaturalGradient, replay
from dngd.optim.inverses import StoredInverse
from dngd.optim.replay import MOST_RECORDINGS, StepReplay
from dngd.optim.step_scale import Shortening

STEPS = 30


class CalledAgain:
    """Stands for a graph: what is done at each replay may read nothing but the memory that was there at recording."""

    def __init__(self) -> None:
        self.recordings = 0
        self.replays = 0

    def __call__(self, work: Callable[[], Shortening], device: torch.device) -> Callable[[], Shortening]:
        assert device.type == "cpu"
        self.recordings += 1
        found = work()

        def again() -> Shortening:
            self.replays += 1
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(StoredInverse, "expanded", _not_here)
                latest = work()
            for mine, now in zip(found, latest):
                if mine is not None:
                    assert now is not None
                    mine.copy_(now)
            return found

        return again


def _not_here(*_: Any) -> None:
    raise AssertionError("an inverse is read that a refresh may have replaced")


def replayed(optimizer: NaturalGradient, record: Callable[..., Any]) -> StepReplay:
    pre = optimizer.preconditioner
    assert pre._replay is None, "only on a GPU"
    pre._replay = StepReplay(pre.layers, pre.states, pre._precondition_now, record)
    return pre._replay


def plain_net() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 5, bias=False))


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(20, 16)
        self.heads = nn.ModuleList(nn.Linear(16, 5) for _ in range(2))
        self.turn = 0

    def forward(self, x: Tensor) -> Tensor:
        self.turn += 1
        out: Tensor = self.heads[self.turn // 3 % 2](self.body(x).relu())
        return out


def train(net: nn.Module, optimizer: NaturalGradient, steps: int = STEPS, dtype: torch.dtype = torch.float32) -> None:
    generator = torch.Generator().manual_seed(3)
    for step in range(steps):
        x = torch.randn(32, 20, generator=generator).to(dtype)
        y = torch.randint(5, (32,), generator=generator)
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step(num_samples=32)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kl_clip": KLTrustRegion(0.1)},
        {"kl_clip": None},
        {"kl_clip": None, "norm_constraint": 1e-3},
        {"norm_constraint": 1e-2},
        {"update": "momentum", "kl_clip": 1e-5},
        {"layout": FactorLayout(max_dimension=8, rank=4)},
        {"layout": FactorLayout(max_dimension=8, wide="block_diagonal")},
        {"inverse_precision": "full", "inverse_delay": 2},
    ],
    ids=["default", "measured", "unbounded", "length", "both", "momentum", "low_rank", "block_diagonal", "delayed"],
)
@pytest.mark.parametrize("make", [plain_net, TwoHeads])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_replayed_steps_are_the_steps(
    make: Callable[[], nn.Module], options: dict[str, Any], dtype: torch.dtype
) -> None:
    found = []
    for record in (None, CalledAgain()):
        torch.manual_seed(0)
        net = make().to(dtype)
        optimizer = NaturalGradient(net, inverse_update_period=7, **options)
        if record is not None:
            replayed(optimizer, record)
        train(net, optimizer, dtype=dtype)
        pre = optimizer.preconditioner
        found.append([*net.parameters(), pre.last_scale, torch.tensor(pre.predicted_divergence())])
        if record is not None:
            # Each recording is replayed once more, to be compared with the step.
            assert record.replays == STEPS + record.recordings
            # The first head alone, both while the second one's inverse is new, and the second alone are sets.
            assert record.recordings == (1 if make is plain_net else 2)
        pre.close()
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_frozen_layer_is_another_recording() -> None:
    record = CalledAgain()
    torch.manual_seed(0)
    net = plain_net()
    optimizer = NaturalGradient(net)
    replayed(optimizer, record)
    train(net, optimizer, 3)
    net[0].requires_grad_(False)
    train(net, optimizer, 3)
    assert (record.recordings, record.replays) == (2, 8)


def test_too_many_sets_of_layers_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MOST_RECORDINGS > 1
    monkeypatch.setattr(replay, "MOST_RECORDINGS", 1)
    record = CalledAgain()
    net = TwoHeads()
    optimizer = NaturalGradient(net)
    replayed(optimizer, record)
    train(net, optimizer)
    assert record.recordings == 1
    assert 0 < record.replays < STEPS


@pytest.mark.parametrize("what", ["half", "summed", "sparse"])
def test_what_is_not_recorded(what: str) -> None:
    torch.manual_seed(0)
    record = CalledAgain()
    net = nn.Linear(20, 5).to(torch.bfloat16 if what == "half" else torch.float32)
    optimizer = NaturalGradient(net, loss_reduction="sum" if what == "summed" else "mean")
    own = replayed(optimizer, record)
    x, y = torch.randn(8, 20).to(net.weight.dtype), torch.randint(5, (8,))
    F.cross_entropy(net(x), y, reduction="sum" if what == "summed" else "mean").backward()
    if what == "sparse":
        optimizer.step(num_samples=8)
        assert net.weight.grad is not None
        net.weight.grad = net.weight.grad.to_sparse()
        assert own._parameters() == ()
    else:
        optimizer.step(num_samples=8)
        assert record.replays == (1 if what == "sparse" else 0)


def refuses(work: Callable[[], Shortening], device: torch.device) -> Callable[[], Shortening]:
    work()
    raise RuntimeError("operation not permitted when stream is capturing")


def misses_something(work: Callable[[], Shortening], device: torch.device) -> Callable[[], Shortening]:
    """As where kernels run on another device than the one that records."""
    found = work()
    return lambda: found


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (refuses, "operation not permitted when stream is capturing"),
        (misses_something, "its replay gave other numbers"),
    ],
)
def test_a_step_that_cannot_be_recorded_goes_on_without(record: Callable[..., Any], reason: str) -> None:
    found = []
    for replays in (False, True):
        torch.manual_seed(0)
        net = plain_net()
        optimizer = NaturalGradient(net)
        if replays:
            replayed(optimizer, record)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            train(net, optimizer)
        said = [str(w.message) for w in told if "CUDA graph" in str(w.message)]
        expected = f"K-FAC's step could not be recorded as a CUDA graph and goes on without, slower: {reason}"
        assert said == [expected] * replays
        found.append(list(net.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_mistake_of_the_caller_is_not_hidden() -> None:
    net = plain_net()
    optimizer = NaturalGradient(net)
    replayed(optimizer, CalledAgain())
    with pytest.raises(UserError, match="no gradient"):
        optimizer.step(num_samples=8, finite=True)


def test_its_memory_is_told_and_released() -> None:
    torch.manual_seed(0)
    net = plain_net()
    optimizer = NaturalGradient(net)
    own = replayed(optimizer, CalledAgain())
    before = optimizer.preconditioner.memory_bytes()
    train(net, optimizer, 2)
    kept = sum(tensor.numel() * tensor.element_size() for tensor in own.tensors())
    gradients = sum(p.numel() * 4 for p in net.parameters())
    inverses = 4 * (21 * 21 + 16 * 16 + 1 + 32 * 32 + 16 * 16 + 5 * 5)
    assert kept == gradients + inverses
    assert optimizer.preconditioner.memory_bytes() >= before + kept
    optimizer.preconditioner.close()
    assert own.tensors() == []


def test_the_scale_of_a_step_does_not_change_with_the_next() -> None:
    torch.manual_seed(0)
    net = plain_net()
    optimizer = NaturalGradient(net, kl_clip=1e-6)
    replayed(optimizer, CalledAgain())
    train(net, optimizer, 3)
    scale = optimizer.preconditioner.last_scale
    value = float(scale)
    train(net, optimizer, 1)
    assert float(scale) == value != float(optimizer.preconditioner.last_scale)
