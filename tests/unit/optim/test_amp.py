"""Mixed precision: bf16 autocast, GradScaler, and gradient clipping between backward and step."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dngd.errors import TrainingError
from dngd.optim import KFACPreconditioner, NaturalGradient
from dngd.optim.capture import Capture
from dngd.optim.gradients import StepGradients
from tests.helpers.mutants import assert_caught

N = 16


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))


def make_data(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, 8, generator=generator), torch.randint(4, (N,), generator=generator)


def factors_of(pre: KFACPreconditioner) -> list[Tensor]:
    return [t for pair in pre.factors().values() for t in pair]


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("fisher", ["empirical", "ggn", "monte_carlo"])
def test_autocast(fisher: str) -> None:
    """Factors under bf16 autocast are float32 and near those without: bf16 has 8 bits, an outer product two of them."""
    found = []
    for enabled in (True, False):
        net = make_net()
        pre = KFACPreconditioner(net, fisher=fisher, damping=0.1)
        x, y = make_data(1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            z = net(x)
            loss = F.cross_entropy(z, y)
        assert z.dtype == (torch.bfloat16 if enabled else torch.float32)
        pre.observe(z)
        loss.backward()
        assert pre.step(num_samples=N)
        factors = factors_of(pre)
        assert all(t.dtype == torch.float32 for t in factors)
        found.append([*factors, *(p.grad for p in net.parameters())])
        pre.close()
    for short, full in zip(*found, strict=True):
        assert relative_error(short, full) <= 0.03


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(dtype: torch.dtype) -> None:
    """Statistics of half-precision weights are float32; the gradient keeps the weights' own precision."""
    net, exact = make_net().to(dtype), make_net()
    exact.load_state_dict(net.state_dict())
    x, y = make_data(2)
    found = []
    for model, inputs in ((net, x.to(dtype)), (exact, x.to(dtype).float())):
        pre = KFACPreconditioner(model, damping=0.1)
        F.cross_entropy(model(inputs).float(), y).backward()
        pre.step(num_samples=N)
        found.append(factors_of(pre))
        assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters())
        pre.close()
    for short, full in zip(*found, strict=True):
        assert short.dtype == torch.float32
        assert relative_error(short, full) <= 0.03


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kl_clip", [1.0, 1e-6, 1e-12])
def test_the_clip_of_half_precision_weights(dtype: torch.dtype, kl_clip: float) -> None:
    """ν of float16's q would be lost in its range: `min(1, √(κ/η²q))` within what rounding leaves of q."""
    net, exact = make_net().to(dtype), make_net()
    exact.load_state_dict(net.state_dict())
    x, y = make_data(2)
    scales = []
    for model, inputs in ((net, x.to(dtype)), (exact, x.to(dtype).float())):
        pre = KFACPreconditioner(model, damping=0.1, kl_clip=kl_clip, lr=1e-4)
        F.cross_entropy(model(inputs).float(), y).backward()
        pre.step(num_samples=N)
        scales.append(float(pre.last_scale))
        pre.close()
    assert scales[0] == pytest.approx(scales[1], rel=0.05)
    assert 0 < scales[0] <= 1


def test_large_finite_gradients_in_float16() -> None:
    """Their norm is beyond float16, they are not."""
    gradients = [torch.full((300, 300), 400.0, dtype=torch.float16), torch.ones(3), torch.ones(2, dtype=torch.float64)]

    def are_finite(*given: Tensor) -> bool | None:
        parameters = [nn.Parameter(torch.zeros_like(gradient)) for gradient in given]
        for parameter, gradient in zip(parameters, given):
            parameter.grad = gradient
        return StepGradients().are_finite(parameters, torch.device("cpu"))

    assert are_finite(*gradients)
    assert are_finite(gradients[0])
    for dtype in (torch.float16, torch.float64):
        assert are_finite(*gradients, torch.tensor([1.0, float("nan")], dtype=dtype)) is False


def scaled_run(scale: float, optimizer_kind: str, *, tells_scale: bool = True, poisoned: int = -1) -> dict[str, Any]:
    """Five steps with a GradScaler; at the poisoned one the gradients overflow."""
    net = make_net().double()
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
    options: dict[str, Any] = {"loss_scale": scaler.get_scale if tells_scale else None, "damping": 0.1}
    options |= {"factor_update_period": 1, "inverse_update_period": 2}
    if optimizer_kind == "natural_gradient":
        optimizer: Any = NaturalGradient(net, lr=0.1, **options)
        pre = optimizer.preconditioner
    else:
        pre = KFACPreconditioner(net, **options)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(5):
        x, y = make_data(step)
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x.double()), y)
        if step == poisoned:
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        before = [p.detach().clone() for p in net.parameters()]
        scaler.unscale_(optimizer)
        if optimizer_kind == "natural_gradient":
            scaler.step(optimizer, num_samples=N)
        else:
            assert pre.step(num_samples=N) == (step != poisoned)
            scaler.step(optimizer)
        scaler.update()
        unmoved = all(torch.equal(a, b) for a, b in zip(before, net.parameters()))
        assert unmoved == (step == poisoned)
    return {
        "factors": factors_of(pre),
        "weights": [p.detach().clone() for p in net.parameters()],
        "scale": scaler.get_scale(),
        "counts": pre.states["0"].folded.counts.tolist(),
    }


def law_factors_do_not_depend_on_the_scale(kind: str) -> None:
    plain, scaled = scaled_run(1.0, kind), scaled_run(2.0**12, kind)
    for name in ("factors", "weights"):
        for a, b in zip(plain[name], scaled[name], strict=True):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("kind", ["natural_gradient", "preconditioner"])
def test_factors_do_not_depend_on_the_scale(kind: str) -> None:
    law_factors_do_not_depend_on_the_scale(kind)
    original = Capture.__init__

    def untold(self: Capture, **arguments: Any) -> None:
        original(self, **(arguments | {"loss_scale": None}))

    assert_caught(lambda: law_factors_do_not_depend_on_the_scale(kind), Capture, "__init__", untold)


@pytest.mark.parametrize("kind", ["natural_gradient", "preconditioner"])
def test_an_overflowing_step_leaves_no_trace(kind: str) -> None:
    """It is skipped, its rows are forgotten, the scale goes down, and the next steps go on."""
    found = scaled_run(2.0**8, kind, poisoned=2)
    assert found["scale"] == 2.0**7
    assert all(torch.isfinite(t).all() for t in [*found["factors"], *found["weights"]])
    # Four steps with ρ = .95, none of them the poisoned one.
    assert found["counts"] == pytest.approx([N * sum(0.95**k for k in range(4))] * 2)


@pytest.mark.parametrize("kind", ["natural_gradient", "preconditioner"])
def test_a_scale_that_is_not_told_is_said(kind: str) -> None:
    with pytest.warns(UserWarning, match=r"give loss_scale=scaler\.get_scale") as caught:
        scaled_run(2.0**16, kind, tells_scale=False)
    assert len(caught) == 1
    for scale, tells in ((2.0**16, True), (1.0, False)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            scaled_run(scale, kind, tells_scale=tells)


@pytest.mark.parametrize("case", ["random labels", "dead units", "zero output", "many rows"])
def test_no_scale_is_seen_where_there_is_none(case: str) -> None:
    """Rows that mostly cancel, or reach few layers."""
    torch.manual_seed(0)
    n = 20_000 if case == "many rows" else 64
    net = nn.Sequential(nn.Linear(5, 32), nn.ReLU(), nn.Linear(32, 2))
    if case == "dead units":
        nn.init.constant_(net[0].bias, -100.0)
    if case == "zero output":
        nn.init.zeros_(net[2].weight)
    x = torch.randn(n, 5).repeat(2, 1)
    y = torch.cat([torch.zeros(n), torch.ones(n)]).long()  # each row with both labels: gradients all but cancel
    pre = KFACPreconditioner(net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        F.cross_entropy(net(x), y).backward()
        pre.step(num_samples=2 * n)


@pytest.mark.parametrize("fisher", ["empirical", "monte_carlo"])
def test_clipping_changes_no_factor(fisher: str) -> None:
    """torch's own clipping, between backward and step, is for the gradient alone."""
    found = []
    for clip in (True, False):
        net = make_net()
        pre = KFACPreconditioner(net, fisher=fisher)
        x, y = make_data(1)
        z = net(x)
        pre.observe(z)
        F.cross_entropy(z, y).backward()
        if clip:
            norm = nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
            assert norm > 1e-3
        pre.step(num_samples=N)
        found.append(factors_of(pre))
        pre.close()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("first_bad", [1, 5, 10])
def test_steps_that_the_scaler_skips_are_counted_on_any_step(first_bad: int) -> None:
    """Also where no row is measured, in which case the same step is tried again and again."""
    net = make_net()
    x, y = make_data(0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = NaturalGradient(net, loss_scale=scaler.get_scale, max_dropped_steps=4)

    def iterate(inputs: Tensor) -> None:
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(net(inputs), y)).backward()
        scaler.step(optimizer, num_samples=N)
        scaler.update()

    for _ in range(first_bad):
        iterate(x)
    for _ in range(4):
        iterate(x * float("nan"))
    assert optimizer.preconditioner.dropped_steps == 3
    with pytest.raises(TrainingError, match="4 steps in a row had non-finite gradients"):
        optimizer.zero_grad()


def test_gradients_that_are_given_up_are_no_skipped_step() -> None:
    net = make_net()
    x, y = make_data(0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    optimizer = NaturalGradient(net, loss_scale=scaler.get_scale, max_dropped_steps=1)
    for _ in range(3):
        scaler.scale(F.cross_entropy(net(x), y)).backward()
        optimizer.zero_grad(set_to_none=False)
    assert optimizer.preconditioner.dropped_steps == 0


def test_a_step_that_was_discarded_is_counted_once() -> None:
    net = make_net()
    x, y = make_data(0)
    optimizer = NaturalGradient(net, loss_scale=lambda: 1.0)
    for count in (1, 2):
        (F.cross_entropy(net(x), y) * float("inf")).backward()
        optimizer.preconditioner.discard()
        optimizer.zero_grad()
        assert optimizer.preconditioner.dropped_steps == count
