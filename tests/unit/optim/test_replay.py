"""Replayed steps against steps that are not: the same bits. What a CUDA graph does is done here by calling again; with
a GPU's graphs, tests/gpu/test_gpu.py."""

from __future__ import annotations

import contextlib
import math
import warnings
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dngd.curvature import FactorLayout
from dngd.errors import TrainingError, UserError
from dngd.optim import KFACPreconditioner, KLTrustRegion, NaturalGradient, replay
from dngd.optim.inverses import StoredInverse
from dngd.optim.replay import MOST_RECORDINGS, CudaGraphs, StepReplay
from dngd.optim.step_scale import Bounds, Shortening

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
        outputs, is_measured = net(x), optimizer.is_clip_due
        F.cross_entropy(outputs, y).backward()
        optimizer.step(num_samples=32)
        if is_measured:
            with torch.no_grad():
                optimizer.adapt_clip(outputs, net(x))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kl_clip": KLTrustRegion},
        {"kl_clip": None},
        {"kl_clip": None, "norm_constraint": 1e-3},
        {"norm_constraint": 1e-2},
        {"update": "momentum", "kl_clip": 1e-5},
        {"layout": FactorLayout(max_dimension=8, rank=4, output_rank=2)},
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
        own = {key: value(0.1) if value is KLTrustRegion else value for key, value in options.items()}
        optimizer = NaturalGradient(net, inverse_update_period=7, **own)
        if record is not None:
            replayed(optimizer, record)
        train(net, optimizer, dtype=dtype)
        pre = optimizer.preconditioner
        found.append([*net.parameters(), pre.last_scale, torch.tensor(pre.predicted_divergence())])
        if record is not None:
            # Each recording is replayed once more, to be compared with the step.
            assert record.replays == STEPS + record.recordings
            # The body with one head, and with the other, are sets of their own.
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
        assert record.replays == 0


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


def test_a_loaded_state_is_what_is_replayed() -> None:
    """Into an optimizer that has steps of its own behind it: its inverses are others from then on."""
    nets, optimizers = [], []
    for seed in (0, 1):
        torch.manual_seed(seed)
        nets.append(plain_net())
        optimizers.append(NaturalGradient(nets[-1], inverse_update_period=7))
        train(nets[-1], optimizers[-1], 10 + seed)
    replayed(optimizers[1], CalledAgain())
    train(nets[1], optimizers[1], 3)
    nets[1].load_state_dict(nets[0].state_dict())
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    for net, optimizer in zip(nets, optimizers):
        train(net, optimizer, 4)
    assert all(torch.equal(one, other) for one, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True))


def test_what_cannot_be_recorded_leaves_other_recordings_alone() -> None:
    record = CalledAgain()
    torch.manual_seed(0)
    net = plain_net()
    optimizer = NaturalGradient(net)
    own = replayed(optimizer, record)
    train(net, optimizer, 3)
    own._record = refuses
    net[0].requires_grad_(False)
    with pytest.warns(UserWarning, match="goes on without"):
        train(net, optimizer, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(net, optimizer, 2)
    net[0].requires_grad_(True)
    before = record.replays
    train(net, optimizer, 3)
    assert record.replays == before + 3
    assert len(own.tensors()) > 0


def test_nothing_is_kept_where_nothing_could_be_recorded() -> None:
    torch.manual_seed(0)
    net = plain_net()
    optimizer = NaturalGradient(net)
    own = replayed(optimizer, refuses)
    with pytest.warns(UserWarning, match="goes on without"):
        train(net, optimizer, 3)
    assert own.tensors() == []
    assert own._copied == {}


def test_a_step_that_is_not_finite_tells_nothing() -> None:
    """Its recording is not kept; the next step's is."""
    record = CalledAgain()
    torch.manual_seed(0)
    net = nn.Linear(20, 5)
    optimizer = NaturalGradient(net, kl_clip=None, max_dropped_steps=None)
    replayed(optimizer, record)
    for huge in (True, False, False):
        optimizer.zero_grad()
        F.cross_entropy(net(torch.randn(8, 20)), torch.randint(5, (8,))).backward()
        if huge:
            for parameter in net.parameters():
                assert parameter.grad is not None
                parameter.grad.fill_(1e38)
        weight = net.weight.detach().clone()
        optimizer.step(num_samples=8, finite=True)
        with torch.no_grad():
            net.weight.copy_(weight)
            net.bias.zero_()
            for state in optimizer.state.values():
                state["exp_avg"].zero_()
    assert (record.recordings, record.replays) == (2, 4)


def test_a_bound_beyond_the_type_is_none() -> None:
    fixed = Bounds(*(torch.zeros(()) for _ in range(4)))
    replay._fill(fixed, Bounds(0.1, 0.01, 1e40, 3.0))
    assert [float(value) for value in fixed if value is not None] == [
        pytest.approx(0.1),
        pytest.approx(0.01),
        math.inf,
        3,
    ]


def test_a_preconditioner_that_is_dropped_is_gone_at_once() -> None:
    net = plain_net()
    pre = KFACPreconditioner(net)
    pre._replay = StepReplay(pre.layers, pre.states, pre._precondition_now, refuses)
    gone = weakref.ref(pre)
    del pre
    assert gone() is None


def test_a_layer_that_keeps_its_plain_gradient_is_no_part() -> None:
    torch.manual_seed(0)
    net = plain_net()
    optimizer = NaturalGradient(net)
    own = replayed(optimizer, CalledAgain())
    train(net, optimizer, 2)
    first = next(iter(optimizer.preconditioner.layers.values()))
    every = own._parameters()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(first), "keeps_plain_gradient", property(lambda layer: layer is first))
        assert len(own._parameters()) == len(every) - len(first.parameters)


class Streams:
    """Stands for torch.cuda: which stream is current, and who waits for whom."""

    def __init__(self, patch: pytest.MonkeyPatch, fails: str = "") -> None:
        self.current = "caller"
        self.waits: list[tuple[str, str]] = []
        self.pools: list[Any] = []
        self.worked_on: list[str] = []
        self.fails = fails
        for name in ("device", "stream", "current_stream", "current_device", "CUDAGraph", "graph"):
            patch.setattr(torch.cuda, name, getattr(self, name))
        patch.setattr(replay, "_streams", lambda device: (self.named("warm-up"), self.named("recording")))

    def named(self, name: str) -> Any:
        return SimpleNamespace(name=name, wait_stream=lambda other: self.waits.append((name, other.name)))

    def device(self, device: torch.device) -> Any:
        return contextlib.nullcontext()

    def current_device(self) -> int:
        return 0

    def current_stream(self, device: torch.device | None = None) -> Any:
        return self.named(self.current)

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream.name
        try:
            yield
        finally:
            self.current = before

    def CUDAGraph(self) -> Any:
        return SimpleNamespace(replay=lambda: self.worked_on.append("replay"), pool=lambda: "the pool")

    @contextlib.contextmanager
    def graph(self, graph: Any, pool: Any, stream: Any, *, capture_error_mode: str) -> Iterator[None]:
        """As torch's, it leaves its stream the current one where the recording fails."""
        assert capture_error_mode == "thread_local"
        self.pools.append(pool)
        self.current = stream.name
        yield
        if self.fails == "recording":
            raise RuntimeError("operation failed due to a previous error during capture")
        self.current = "caller"

    def work(self) -> Shortening:
        if self.fails == self.current:
            raise RuntimeError(f"out of memory on {self.current}")
        self.worked_on.append(self.current)
        return Shortening(torch.ones(()), None)


def test_a_graph_is_recorded_after_a_warm_up_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, graphs = Streams(monkeypatch), CudaGraphs()
    device = torch.device("cuda", 0)
    replays = [graphs(cuda.work, device) for _ in range(2)]
    assert cuda.worked_on == ["warm-up", "recording"] * 2
    assert cuda.waits[:2] == [("warm-up", "caller"), ("caller", "warm-up")]
    assert cuda.pools == [None, "the pool"], "graphs that are replayed by turns share their memory"
    found = replays[0]()
    assert cuda.worked_on[-1] == "replay"
    assert replays[0]() is found


def test_a_recording_that_fails_ends_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch is left with is not what one may go on with; the stream is the caller's again."""
    cuda = Streams(monkeypatch, fails="recording")
    with pytest.raises(TrainingError, match=r"kfac.cuda_graph=false$"):
        CudaGraphs()(cuda.work, torch.device("cuda", 0))
    assert cuda.current == "caller"


def test_a_warm_up_that_fails_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Streams(monkeypatch, fails="warm-up")
    with pytest.raises(RuntimeError, match="out of memory on warm-up"):
        CudaGraphs()(cuda.work, torch.device("cuda", 0))
    assert cuda.waits == [("warm-up", "caller"), ("caller", "warm-up")]
    assert cuda.current == "caller"


def test_a_failed_recording_is_not_swallowed() -> None:
    def fails(work: Callable[[], Shortening], device: torch.device) -> Callable[[], Shortening]:
        raise TrainingError("could not be recorded")

    net = plain_net()
    optimizer = NaturalGradient(net)
    replayed(optimizer, fails)
    with pytest.raises(TrainingError, match="could not be recorded"):
        train(net, optimizer, 2)


@pytest.mark.parametrize("name", replay.DEBUGGING)
def test_nothing_is_recorded_while_a_gpu_program_is_debugged(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for other in replay.DEBUGGING:
        monkeypatch.delenv(other, raising=False)
    assert replay.can_record()
    monkeypatch.setenv(name, "0")
    assert replay.can_record()
    monkeypatch.setenv(name, "1")
    assert not replay.can_record()
