"""Options of the preconditioner and the optimizer, one at a time, against direct computation."""

from __future__ import annotations

import copy
import io
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dngd.curvature import BlockDiagonal, Dense, Diagonal, FactorLayout, FactorStructure, LowRank, vectors_on_host
from dngd.errors import TrainingError, UserError
from dngd.optim import KFACPreconditioner, NaturalGradient, UpdateSchedule, directions, inverses, step_scale
from dngd.optim.findings import Findings
from dngd.optim.inverses import Wanted, decompose, from_bytes, to_bytes
from dngd.optim.layers.base import ConstantInput
from dngd.optim.trust import LevenbergMarquardt
from tests.helpers.mutants import assert_caught

F64 = torch.float64
N = 8


def make_net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def make_data(seed: int, n: int = N) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator, dtype=F64)
    return x, torch.randint(3, (n,), generator=generator)


def back_propagate(net: nn.Module, seed: int = 1) -> None:
    x, y = make_data(seed)
    net.zero_grad()
    F.cross_entropy(net(x), y).backward()


def gradients(pre: KFACPreconditioner) -> dict[str, Tensor]:
    return {name: g for name, layer in pre.layers.items() if (g := layer.gradient()) is not None}


def eye(matrix: Tensor) -> Tensor:
    return torch.eye(len(matrix), dtype=matrix.dtype)


# What bounds a step


def law_norm_constraint() -> None:
    """η‖v‖ is min(c, its length without the bound), over all layers together."""
    lengths = {}
    for bound in (None, 0.05, 1e6):
        net = make_net()
        pre = KFACPreconditioner(net, damping=0.1, norm_constraint=bound, lr=0.5)
        back_propagate(net)
        pre.step(num_samples=N)
        lengths[bound] = 0.5 * float(torch.cat([g.flatten() for g in gradients(pre).values()]).norm())
        pre.close()
    assert lengths[None] > 0.05
    assert lengths[0.05] == pytest.approx(0.05, rel=1e-12)
    assert lengths[1e6] == pytest.approx(lengths[None], rel=1e-12)


def test_norm_constraint() -> None:
    law_norm_constraint()
    original = step_scale.norm_scale
    assert_caught(
        law_norm_constraint, step_scale, "norm_scale", lambda squared, lr, bound: original(squared, lr**2, bound)
    )


def test_the_tighter_bound_holds() -> None:
    for kl_clip, bound in ((1e-4, 1e6), (1e6, 1e-3), (1e-4, 1e-3)):
        scales = []
        for limits in (
            {"kl_clip": kl_clip},
            {"norm_constraint": bound},
            {"kl_clip": kl_clip, "norm_constraint": bound},
        ):
            net = make_net()
            pre = KFACPreconditioner(net, lr=2.0, **limits)
            back_propagate(net)
            pre.step(num_samples=N)
            scales.append(float(pre.last_scale))
            pre.close()
        assert scales[2] == min(scales[:2]) < 1


def law_predicted_reduction(options: dict[str, Any]) -> None:
    """`-(⟨∇, δ⟩ + ½ δᵀ (F + damping) δ)` of the step δ = -ην v, in the damped Kronecker model, computed densely."""
    net = make_net()
    pre = KFACPreconditioner(net, damping=0.05, lr=0.7, **options)
    back_propagate(net)
    before = gradients(pre)
    pre.step(num_samples=N)
    expected = 0.0
    for name, (a, g) in pre.factors().items():
        lambda_a, lambda_g = pre.states[name].damping
        model = torch.kron(a + lambda_a * eye(a), g + lambda_g * eye(g))
        delta = -0.7 * gradients(pre)[name].T.reshape(-1)
        expected -= float(before[name].T.reshape(-1) @ delta + delta @ model @ delta / 2)
    assert pre.predicted_reduction(0.7) == pytest.approx(expected, rel=1e-9)
    pre.close()


@pytest.mark.parametrize("options", [{}, {"kl_clip": 1e-3}, {"norm_constraint": 0.1}], ids=str)
def test_predicted_reduction(options: dict[str, Any]) -> None:
    law_predicted_reduction(options)
    assert_caught(
        lambda: law_predicted_reduction(options),
        step_scale.StepScale,
        "predicted_reduction",
        lambda self, lr: lr * float(self.last) * float(self._quadratic) / 2,
    )


def test_nothing_to_predict() -> None:
    with pytest.raises(UserError, match="step"):
        KFACPreconditioner(make_net()).predicted_reduction(0.1)


# Levenberg-Marquardt


def test_levenberg_marquardt_rules() -> None:
    damping = LevenbergMarquardt(1.0, omega=0.5, low=0.25, high=4.0)
    assert damping.update(0.8, 1.0) == 0.8
    assert damping(0) == 0.5
    damping.update(0.5, 1.0)
    assert damping(7) == 0.5, "between 1/4 and 3/4 nothing changes"
    damping.update(0.75, 1.0)
    damping.update(0.25, 1.0)
    assert damping(0) == 0.5, "the limits themselves are between"
    damping.update(0.2, 1.0)
    assert damping(0) == 1.0
    for actual, predicted in ((-1.0, 1.0), (math.nan, 1.0), (1.0, 0.0), (-1.0, -1.0), (-math.inf, 1.0)):
        damping.value = 1.0
        damping.update(actual, predicted)
        assert damping(0) == 2.0, (actual, predicted)
    for _ in range(5):
        damping.update(-1.0, 1.0)
    assert damping(0) == 4.0
    for _ in range(9):
        damping.update(1.0, 1.0)
    assert damping(0) == 0.25


@pytest.mark.parametrize("arguments", [{"value": 0.0}, {"value": 1.0, "high": 0.5}, {"omega": 1.0}, {"omega": 0.0}])
def test_levenberg_marquardt_out_of_range(arguments: dict[str, float]) -> None:
    with pytest.raises(UserError):
        LevenbergMarquardt(**arguments)


def test_levenberg_marquardt_is_saved() -> None:
    net = make_net()
    optimizer = NaturalGradient(net, damping=LevenbergMarquardt(1e-2), momentum=0.0)
    x, y = make_data(1)
    for _ in range(3):
        optimizer.zero_grad()
        before = F.cross_entropy(net(x), y)
        before.backward()
        optimizer.step(num_samples=N)
        with torch.no_grad():
            after = float(F.cross_entropy(net(x), y))
        predicted = optimizer.preconditioner.predicted_reduction(optimizer.param_groups[0]["lr"])
        assert optimizer.adapt_damping(before.item(), after) == pytest.approx((before.item() - after) / predicted)
    damping = optimizer.preconditioner.damping
    assert isinstance(damping, LevenbergMarquardt)
    assert damping.value != 1e-2
    other = NaturalGradient(make_net(), damping=LevenbergMarquardt(5.0))
    other.load_state_dict(optimizer.state_dict())
    restored = other.preconditioner.damping
    assert isinstance(restored, LevenbergMarquardt)
    assert restored.value == damping.value
    with pytest.raises(UserError, match="LevenbergMarquardt"):
        NaturalGradient(make_net(), momentum=0.0).adapt_damping(1.0, 0.5)
    with pytest.raises(UserError, match="momentum=0"):
        NaturalGradient(make_net(), damping=LevenbergMarquardt(), momentum=0.9).adapt_damping(1.0, 0.5)


# Schedules


STEPS = 7


def by_step(values: list[float]) -> Callable[[int], float]:
    return lambda step: values[step]


def run(pre: KFACPreconditioner, net: nn.Module, after: Callable[[int], None], steps: int = STEPS) -> None:
    for step in range(steps):
        back_propagate(net, step)
        pre.step(num_samples=N)
        after(step)
    pre.close()


def test_damping_is_a_schedule() -> None:
    damping = [0.1, 0.2, 0.05, 1.0, 0.3, 0.3, 2.0]
    net = make_net()
    pre = KFACPreconditioner(net, damping=by_step(damping), damping_mode="even", inverse_update_period=1)

    def after(step: int) -> None:
        assert pre.states["0"].damping == pytest.approx((damping[step] ** 0.5,) * 2)
        a, _ = pre.factors()["0"]
        expected = torch.linalg.inv(a + damping[step] ** 0.5 * eye(a))
        assert torch.allclose(pre.states["0"].inverses["A"].tensors[0], expected)

    run(pre, net, after)


def test_relative_damping_and_its_ratio() -> None:
    """λ_A = λ tr A, λ_G = r λ tr G: free of units, so that rescaled losses and inputs move λ with the factors."""
    ratios = [1.0, 10.0, 3.0, 0.1, 2.0, 7.0, 5.0]
    net = make_net()
    options: dict[str, Any] = {"damping": 0.02, "damping_mode": "relative", "inverse_update_period": 1}
    pre = KFACPreconditioner(net, damping_g_ratio=by_step(ratios), **options)

    def after(step: int) -> None:
        a, g = pre.factors()["2"]
        expected = 0.02 * float(a.trace()), ratios[step] * 0.02 * float(g.trace())
        assert pre.states["2"].damping == pytest.approx(expected)

    run(pre, net, after)
    nets = [nn.Sequential(nn.Linear(4, 3, bias=False)).double() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    x, y = make_data(3)
    directions = []
    for scale, net in zip((1.0, 100.0), nets):
        pre = KFACPreconditioner(net, **options)
        F.mse_loss(net(x) * scale, F.one_hot(y, 3).double() * scale, reduction="sum").backward()
        pre.step(num_samples=N, mean_gradients=True)
        directions.append(gradients(pre)["0"] * scale**2)
        pre.close()
    # Of a loss 10⁴ times as large: ∇ is 10⁴, G and λ_G 10⁸ times as large, and the natural gradient 10⁻⁴ times.
    assert torch.allclose(directions[0], directions[1], rtol=1e-9)


def test_factor_decay_is_a_schedule() -> None:
    decays = [0.0, 0.5, 0.9, 0.0, 0.3, 0.99, 0.5]
    net = make_net()
    pre = KFACPreconditioner(net, factor_decay=by_step(decays))
    total, count = torch.zeros(5, 5, dtype=F64), 0.0

    def after(step: int) -> None:
        nonlocal total, count
        m = torch.cat([make_data(step)[0], torch.ones(N, 1, dtype=F64)], dim=1)
        total, count = decays[step] * total + m.T @ m, decays[step] * count + N
        assert torch.allclose(pre.factors()["0"].A, total / count)

    run(pre, net, after)


def test_bounds_are_schedules() -> None:
    rates, bounds = [1.0, 0.5, 2.0, 1.0, 4.0, 0.1, 1.0], [1e-3, 1e-2, 1e-3, 1e-4, 1e-5, 1e-3, 1e-6]
    net = make_net()
    pre = KFACPreconditioner(net, kl_clip=by_step(bounds), lr=by_step(rates), damping=0.01)

    def clipped(step: int) -> None:
        assert pre._scale._quadratic is not None
        length = rates[step] ** 2 * float(pre._scale._quadratic)
        assert float(pre.last_scale) == pytest.approx(min(1.0, (bounds[step] / length) ** 0.5))

    run(pre, net, clipped)
    net = make_net()
    bounded = KFACPreconditioner(net, norm_constraint=by_step(bounds), lr=by_step(rates), damping=0.01)

    def short(step: int) -> None:
        norm = float(torch.cat([g.flatten() for g in gradients(bounded).values()]).norm())
        assert rates[step] * norm == pytest.approx(bounds[step])

    run(bounded, net, short)


def test_momentum_and_weight_decay_are_schedules() -> None:
    momenta, decays = [0.9, 0.0, 0.5, 0.9, 0.1, 0.0, 0.7], [0.0, 0.1, 0.5, 0.0, 0.2, 0.3, 0.0]
    net = make_net()
    optimizer = NaturalGradient(net, lr=0.2, update="momentum", momentum=by_step(momenta), weight_decay=by_step(decays))
    weight, buffer = net[0].weight.detach().clone(), torch.zeros(6, 4, dtype=F64)
    for step in range(STEPS):
        back_propagate(net, step)
        optimizer.step(num_samples=N)
        v = net[0].weight.grad
        assert v is not None
        if momenta[step] > 0:
            buffer = momenta[step] * buffer + v
            v = buffer
        weight = weight - 0.2 * (v + decays[step] * weight)
        assert torch.allclose(net[0].weight, weight)


def test_periods_are_schedules() -> None:
    net = make_net()
    pre = KFACPreconditioner(
        net,
        factor_update_period=lambda step: 1 if step < 4 else 3,
        inverse_update_period=lambda step: 2 if step < 8 else 6,
        dense_steps=0,
    )
    measured, launched = [], {"0": [], "2": []}
    for step in range(20):
        if pre.capture.active:
            measured.append(step)
        back_propagate(net, step)
        pre.step(num_samples=N)
        for name, steps in launched.items():
            if pre.states[name].launched_step == step:
                steps.append(step)
    pre.close()
    assert measured == [0, 1, 2, 3, 6, 9, 12, 15, 18]
    # Layer i of 2 has its turn where step ≡ i · period // 2.
    assert launched == {"0": [0, 2, 4, 6, 12, 18], "2": [0, 1, 3, 5, 7, 9, 15]}


def test_the_period_of_eigenvalues_is_a_schedule() -> None:
    net = make_net()
    pre = KFACPreconditioner(
        net, method="ekfac", dense_steps=20, eigenvalue_update_period=lambda step: 1 if step < 4 else 5
    )
    pre.schedule = UpdateSchedule(1, 100, 0)  # one basis for the whole run
    renewed = []
    last: Tensor | None = None
    for step in range(20):
        back_propagate(net, step)
        pre.step(num_samples=N)
        assert pre.eigenvalues is not None
        scales = pre.eigenvalues.scales("0")
        if scales is not last:
            renewed.append(step)
        last = scales
    pre.close()
    assert renewed == [1, 2, 3, 5, 10, 15]


# Inversions that are spared


def law_change_threshold() -> None:
    """A factor is inverted again when it has moved by more than t since its inversion, however small the steps."""
    net = nn.Sequential(nn.Linear(4, 3)).double()
    pre = KFACPreconditioner(
        net,
        factor_decay=0.0,
        change_threshold=0.1,
        factor_update_period=1,
        inverse_update_period=1,
        damping=0.1,
        damping_mode="even",
    )
    x, y = make_data(0)
    reused = []
    for step in range(12):
        net.zero_grad()
        F.cross_entropy(net(x * 1.01**step), y).backward()
        pre.step(num_samples=N)
        state = pre.states["0"]
        reused.append(state.reused_inversions)
        a, _ = pre.factors()["0"]
        inverted = torch.linalg.inv(state.inverses["A"].tensors[0]) - 0.1**0.5 * eye(a)
        assert float((a - inverted).norm() / a.norm()) <= 0.15
    assert reused[-1] > 12, "small changes were inverted again"
    assert reused[-1] < 22, "a large change was not"
    pre.close()


def test_change_threshold() -> None:
    law_change_threshold()

    assert_caught(law_change_threshold, Findings, "_is_unchanged", lambda self, *measured: True)
    assert_caught(law_change_threshold, Findings, "_is_unchanged", lambda self, *measured: False)


class Reads(TorchFunctionMode):
    """Counts what makes the host wait for a GPU's numbers, which are float64 here; copies on the host are float32."""

    WAITS = (Tensor.tolist, Tensor.item, Tensor.__float__, Tensor.__bool__, Tensor.__int__)

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in self.WAITS and args[0].dtype == torch.float64
        return func(*args, **(kwargs or {}))


def refreshed_twice(net: nn.Module) -> KFACPreconditioner:
    pre = KFACPreconditioner(net, damping=0.1, damping_mode="relative")
    for seed in range(2):
        net.zero_grad()
        x, y = make_data(seed)
        F.cross_entropy(net(x), y).backward()
        pre.step(num_samples=N)
    return pre


def test_what_a_refresh_finds_is_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each number that is read by itself makes the host wait for a GPU; what is read of the copy on the host does
    not."""
    pre = refreshed_twice(make_net())
    reads, read_before = Reads(), []

    def on_host(vectors: list[torch.Tensor]) -> list[torch.Tensor]:
        read_before.append(reads.count)
        return [vector.float() for vector in vectors_on_host(vectors)]

    monkeypatch.setattr("dngd.optim.findings.vectors_on_host", on_host)
    with reads:
        found = pre.pipeline._findings.measure(list(pre.layers), pre._damping_now())
    assert len(found) == 2 * len(pre.layers)
    assert (read_before, reads.count) == ([1], 1), "the counts, then one copy, and nothing else"
    pre.close()


def test_a_factor_of_a_layer_without_one_of_two_counts_is_not_measured() -> None:
    pre = refreshed_twice(make_net())
    pre.states["2"].folded.counts[1] = 0
    found = pre.pipeline._findings.measure(list(pre.layers), pre._damping_now())
    assert [m.factor for m in found] == [("0", "A"), ("0", "G")]
    pre.close()


def test_unsound_sums_are_forgotten_alone() -> None:
    """Those of another layer go on."""
    pre = refreshed_twice(make_net())
    kept = pre.states["0"].folded.clone()
    pre.states["2"].folded.a[0][1] = torch.inf
    pre.pipeline.launch(pre.steps, list(pre.layers), pre._damping_now(), 0)
    pre.pipeline.advance(pre.steps)
    assert pre.pipeline.discarded_statistics == 1
    assert all(torch.equal(now, before) for now, before in zip(pre.states["0"].folded.tensors(), kept.tensors()))
    assert not any(bool(tensor.any()) for tensor in pre.states["2"].folded.tensors())
    pre.close()


def test_another_damping_is_another_inverse() -> None:
    net = make_net()
    damping = [0.1, 0.1, 0.11, 0.3]
    pre = KFACPreconditioner(
        net,
        damping=by_step(damping),
        damping_mode="even",
        factor_decay=0.0,
        inverse_update_period=1,
        change_threshold=0.2,
    )
    found = []
    for _ in damping:
        back_propagate(net, 0)
        pre.step(num_samples=N)
        found.append((pre.states["0"].reused_inversions, pre.states["0"].damping[0]))
    root = 0.1**0.5
    # √0.11 is within the threshold: the old inverse stays, and with it the damping that it was made with.
    assert found == [(0, root), (2, root), (4, root), (4, 0.3**0.5)]
    pre.close()


def full_batch(
    steps: int, change: Callable[[int, Tensor], Tensor], **options: Any
) -> tuple[KFACPreconditioner, list[Any]]:
    """Full-batch steps on the tensor that `change(step, tensor)` returns; A's sums after each, and accumulations."""
    net = make_net()
    optimizer = NaturalGradient(net, inverse_update_period=1, factor_update_period=1, **options)
    pre = optimizer.preconditioner
    accumulated = []
    original = Dense.accumulate_

    def counted(self: Dense, sums: Any, rows: Tensor, **arguments: Any) -> None:
        if self.dimension == 5:
            accumulated.append(rows.shape[0])
        original(self, sums, rows, **arguments)

    x, y = make_data(0)
    factors = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Dense, "accumulate_", counted)
        for step in range(steps):
            optimizer.zero_grad()
            x = change(step, x)
            F.cross_entropy(net(x), y).backward()
            optimizer.step(num_samples=N)
            factors.append([pre.factors()["0"].A, pre.factors()["2"].A, len(accumulated)])
    pre.close()
    return pre, factors


@pytest.mark.parametrize("max_rows", [4096, None])
def test_constant_inputs(max_rows: int | None) -> None:
    """The same tensor at every step: its product is taken once and inverted once, with the same numbers."""
    constant, factors = full_batch(6, lambda step, x: x, max_rows=max_rows)
    copied, expected = full_batch(6, lambda step, x: x.clone(), max_rows=max_rows)
    assert [count for *_, count in factors] == [1] * 6
    assert [count for *_, count in expected] == [1, 2, 3, 4, 5, 6]
    for (a0, a2, _), (b0, b2, _) in zip(factors, expected):
        assert torch.allclose(a0, b0, rtol=1e-13)
        assert torch.allclose(a2, b2, rtol=1e-13)
    assert constant.states["0"].reused_inversions >= 5
    # a clone's product differs by no more than rounding either: inverted once, though taken at every step
    assert copied.states["0"].reused_inversions >= 5


def law_input_changed_in_place() -> None:
    def change(step: int, x: Tensor) -> Tensor:
        return x.mul_(1.5) if step == 3 else x

    _, found = full_batch(6, change)
    _, expected = full_batch(6, lambda step, x: change(step, x).clone())
    for (a, *_), (b, *_) in zip(found, expected):
        assert torch.allclose(a, b, rtol=1e-12)
    # Taken at first, at the change, and once the changed tensor has come twice; then it is kept again.
    assert [count for *_, count in found] == [1, 1, 1, 2, 3, 3]


def test_input_changed_in_place() -> None:
    law_input_changed_in_place()
    assert_caught(law_input_changed_in_place, ConstantInput, "is_worth_keeping", lambda *arguments, **named: True)


def law_input_changed_behind_torch() -> None:
    """A loader that fills one numpy buffer again and again changes no version counter."""
    buffer = make_data(0)[0].numpy().copy()
    shared = torch.from_numpy(buffer)

    def change(step: int, x: Tensor) -> Tensor:
        buffer[:] = make_data(step)[0].numpy()
        return shared

    _, found = full_batch(4, change)
    _, expected = full_batch(4, lambda step, x: make_data(step)[0])
    for (a, *_), (b, *_) in zip(found, expected):
        assert torch.allclose(a, b, rtol=1e-12)


def test_input_changed_behind_torch() -> None:
    from dngd.optim.layers import base

    law_input_changed_behind_torch()
    assert_caught(law_input_changed_behind_torch, base, "_sample", lambda source: None)


def test_many_rows_are_drawn_until_the_input_repeats() -> None:
    """More rows than max_rows: a first call is not trusted, so that a resumed run does what the straight one did."""
    _, factors = full_batch(4, lambda step, x: x, max_rows=5, factor_decay=0.0)
    m = torch.cat([make_data(0)[0], torch.ones(N, 1, dtype=F64)], dim=1)
    assert not torch.allclose(factors[0][0], m.T @ m / N)
    assert all(torch.allclose(a, m.T @ m / N) for a, *_ in factors[1:])
    seen = ConstantInput()
    x = torch.ones(2)
    assert [seen.is_worth_keeping((x,), trusts_first=False) for _ in range(3)] == [False, True, True]
    assert seen.repeats
    restored = ConstantInput()
    restored.repeats = True
    assert restored.is_worth_keeping((x,), trusts_first=False)


# What modules are made of


def test_copies_are_not_measured() -> None:
    """deepcopy and torch.save of a model with hooks work, and calls of the copy leave no rows."""
    net = make_net()
    pre = KFACPreconditioner(net)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    for twin in (copy.deepcopy(net), torch.load(file, weights_only=False)):
        x, y = make_data(3)
        F.cross_entropy(twin(x), y).backward()
        assert all(layer.pending is None for layer in pre.layers.values())
        assert all(p.grad is None for p in net.parameters())
    back_propagate(net)
    assert all(layer.pending is not None for layer in pre.layers.values())
    pre.close()


def test_input_by_keyword() -> None:
    found = []
    for named in (True, False):
        net = make_net()
        pre = KFACPreconditioner(net)
        x, y = make_data(1)
        z = net[2](input=torch.tanh(net[0](input=x))) if named else net(x)
        F.cross_entropy(z, y).backward()
        pre.step(num_samples=N)
        found.append([t for pair in pre.factors().values() for t in pair])
        pre.close()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_frozen_bias() -> None:
    net = make_net()
    net[0].bias.requires_grad_(False)
    pre = KFACPreconditioner(net)
    back_propagate(net)
    pre.step(num_samples=N)
    x, _ = make_data(1)
    a, _ = pre.factors()["0"]
    assert torch.allclose(a, x.T @ x / N)
    assert gradients(pre)["0"].shape == (6, 4)
    assert net[0].bias.grad is None
    pre.close()


def left_over(net: nn.Module) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pre = KFACPreconditioner(net)
    pre.close()
    return pre.left_over


def test_parametrized_weights_are_left_over() -> None:
    net = make_net()
    nn.utils.parametrizations.weight_norm(net[0])
    assert left_over(net) == [
        "0.bias",
        "0.parametrizations.weight.original0",
        "0.parametrizations.weight.original1",
    ]


def test_multi_head_attention_is_left_over() -> None:
    """Its out_proj is never called as a module: rows would be missing, so it is no layer."""
    assert left_over(nn.TransformerEncoderLayer(8, 2, 16)) == [
        "self_attn.in_proj_weight",
        "self_attn.in_proj_bias",
        "self_attn.out_proj.weight",
        "self_attn.out_proj.bias",
    ]


def test_subclasses_of_linear_are_left_over() -> None:
    class Twice(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    assert left_over(nn.Sequential(Twice(4, 4), nn.Linear(4, 3))) == ["0.weight", "0.bias"]


def test_strict_refuses_what_is_left_over() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.PReLU(), nn.Linear(6, 3))
    with pytest.raises(UserError, match=r"strict: .* 1\.weight$"):
        KFACPreconditioner(net, strict=True)
    KFACPreconditioner(make_net(), strict=True).close()


def test_names_are_the_models_own() -> None:
    """Of a wrapper only; a model's own child may be called `module`, beside one whose name would be the same."""
    net = nn.ModuleDict({"module": nn.Sequential(nn.Linear(4, 4)), "0": nn.Linear(4, 4)})
    pre = KFACPreconditioner(net)
    assert list(pre.layers) == ["module.0", "0"]
    pre.close()
    with pytest.raises(UserError, match="DataParallel"):
        KFACPreconditioner(nn.DataParallel(make_net()))
    pre = KFACPreconditioner(torch.compile(make_net()))  # type: ignore[arg-type]
    assert list(pre.layers) == ["0", "2"]
    pre.close()


# Dropped steps


def test_many_dropped_steps_in_a_row_stop() -> None:
    net = make_net()
    optimizer = NaturalGradient(net, max_dropped_steps=3)

    def step(poison: float) -> None:
        optimizer.zero_grad()
        x, y = make_data(0)
        F.cross_entropy(net(x * poison), y).backward()
        optimizer.step(num_samples=N)

    for poison in (math.nan, math.nan, 1.0, math.nan, math.nan):
        step(poison)
    assert optimizer.preconditioner.dropped_steps == 4
    assert optimizer.preconditioner.dropped_in_a_row == 2
    with pytest.raises(TrainingError, match="3 steps in a row"):
        step(math.nan)


def test_no_limit_of_dropped_steps() -> None:
    net = make_net()
    pre = KFACPreconditioner(net, max_dropped_steps=None)
    x, y = make_data(0)
    for _ in range(30):
        net.zero_grad()
        F.cross_entropy(net(x * math.nan), y).backward()
        assert not pre.step(num_samples=N)
    assert pre.dropped_in_a_row == 30


# What a person sees


def test_describe() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.PReLU(), nn.Linear(6, 3), nn.Linear(3, 40))
    with pytest.warns(UserWarning, match="plain gradient"):
        pre = KFACPreconditioner(net, layout=FactorLayout(max_dimension=6, rank=3))
    text = pre.describe()
    lines = {line.split()[0]: line for line in text.splitlines()}
    for name in ("0", "2", "3"):
        assert "linear" in lines[name]
        assert "MiB" in lines[name]
    assert "dense 5" in lines["0"]
    assert "rank 3 of 7" in lines["2"]
    assert "blocks 7 x " in lines["3"] or "blocks 5+" in lines["3"]
    assert "1.weight" in text.splitlines()[-1]


def law_health() -> None:
    """Numbers against direct computation; the condition is never above (σ_max + λ)/λ and never below the true one."""
    net = make_net()
    pre = KFACPreconditioner(net, damping=0.02, factor_decay=0.0)
    assert math.isnan(pre.health()["0"]["a_condition"])
    assert pre.health()["0"]["staleness"] == -1.0
    back_propagate(net)
    pre.step(num_samples=N)
    for name, (a, g) in pre.factors().items():
        found = pre.health()[name]
        for which, matrix, lam in (("a", a, pre.states[name].damping[0]), ("g", g, pre.states[name].damping[1])):
            values = torch.linalg.eigvalsh(matrix)
            top = float(values[-1])
            assert found[f"{which}_condition"] == pytest.approx((top + lam) / lam, rel=0.02)
            assert found[f"{which}_condition"] >= (top + lam) / (float(values[0]) + lam) * (1 - 1e-2)
            share = lam * len(matrix) / (float(matrix.trace()) + lam * len(matrix))
            assert found[f"{which}_damping_share"] == pytest.approx(share)
        assert found["staleness"] == 1.0
        assert (found["escalations"], found["failed_inversions"], found["reused_inversions"]) == (0, 0, 0)
    for _ in range(2):  # step 1 renews both layers' inverses, step 2 the first one's
        back_propagate(net)
        pre.step(num_samples=N)
    assert [pre.health()[name]["staleness"] for name in ("0", "2")] == [1.0, 2.0]
    pre.close()


def test_health() -> None:
    law_health()
    from dngd.optim import health

    assert_caught(law_health, health, "_largest_eigenvalue", lambda structure, averages: 0.0)


@pytest.mark.parametrize("options", [{}, {"method": "ekfac"}, {"inverse_precision": "full"}], ids=str)
@pytest.mark.parametrize("layout", [FactorLayout(), FactorLayout(max_dimension=4, rank=2, output_rank=1)], ids=str)
def test_memory_counts_every_tensor_once(options: dict[str, Any], layout: FactorLayout) -> None:
    """Against a walk over everything that hangs on the preconditioner."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5))
    pre = KFACPreconditioner(net, layout=layout, inverse_delay=3, inverse_update_period=4, dense_steps=2, **options)
    x = torch.randn(N, 4)
    for _ in range(6):
        net.zero_grad()
        net(x).square().mean().backward()
        pre.step(num_samples=N)
    net(x).square().mean().backward()
    parameters = {p.data_ptr() for p in net.parameters()}
    held: dict[int, int] = {}
    seen: set[int] = set()

    def walk(item: Any) -> None:
        if id(item) in seen or isinstance(item, nn.Module):
            return
        seen.add(id(item))
        if isinstance(item, Tensor):
            if item.dim() > 0 and item.data_ptr() not in parameters and item is not x:
                held[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, dict):
            for value in item.values():
                walk(value)
        elif isinstance(item, list | tuple):
            for value in item:
                walk(value)
        elif hasattr(item, "__dict__") and type(item).__module__.startswith("dngd"):
            walk(vars(item))

    walk(pre)
    assert pre.memory_bytes() == sum(held.values())
    pre.close()


# Precision of stored inverses


STRUCTURES: list[FactorStructure] = [Dense(7), Diagonal(7), BlockDiagonal((3, 3, 1)), LowRank(7, 3)]


def averages_of(structure: FactorStructure, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    sums = structure.zeros(dtype, torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(20, structure.dimension, generator=generator, dtype=torch.float64).to(dtype)
    structure.accumulate_(sums, rows, weight=1 / 20)
    return sums


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, None], ids=str)
@pytest.mark.parametrize("eigenbasis", [False, True])
@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_wire_round_trip_is_bitwise(structure: FactorStructure, eigenbasis: bool, dtype: torch.dtype | None) -> None:
    for computed in (torch.float32, torch.float64):
        wanted = Wanted(eigenbasis, dtype)
        for seed in range(5):
            stored = decompose(structure, averages_of(structure, seed, computed), 1e-4 * 10**seed, wanted).stored
            assert stored is not None
            packed = to_bytes(structure, stored, wanted)
            assert packed.numel() == wanted.wire_bytes(structure, computed)
            back = from_bytes(structure, packed, wanted, computed)
            assert back.scales == stored.scales
            for a, b in zip(stored.tensors, back.tensors, strict=True):
                assert a.dtype == b.dtype
                assert torch.equal(a, b)


def test_mutant_dropped_scale_is_caught() -> None:
    def law() -> None:
        structure, wanted = Dense(7), Wanted(False, torch.float16)
        stored = decompose(structure, averages_of(structure, 0), 1e-4, wanted).stored
        assert stored is not None
        assert from_bytes(structure, to_bytes(structure, stored, wanted), wanted, torch.float32).scales == stored.scales

    original = inverses.to_bytes
    law()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "to_bytes", lambda s, i, w: original(s, inverses.StoredInverse(i.tensors, (1.0,)), w))
        with pytest.raises(AssertionError):
            law()


def law_inverse_precision(precision: str, log_condition: float, seed: int) -> None:
    """`‖V - V'‖ <= (ε_G + ε_A + ε_G ε_A) κ' ‖V‖`-like: a stored inverse is off by u‖M⁻¹‖_F + s·2⁻²⁵·d at most.

    With V = G⁻¹∇A⁻¹ and errors E of the two inverses, ‖V' - V‖ <= (‖E_G‖‖A⁻¹‖ + ‖G⁻¹‖‖E_A‖ + ‖E_G‖‖E_A‖)‖∇‖ in
    spectral norms; u = 2⁻¹¹ (float16) or 2⁻⁸ (bfloat16), s the largest entry, 2⁻²⁵ half of float16's smallest step.
    """
    unit = {"float16": 2.0**-11, "bfloat16": 2.0**-8}[precision]
    generator = torch.Generator().manual_seed(seed)
    structures = Dense(9), Dense(6)
    grad = torch.randn(6, 9, generator=generator)
    full, stored, norms, errors = [], [], [], []
    for structure in structures:
        d = structure.dimension
        rows = torch.randn(30, d, generator=generator) * torch.logspace(0, -log_condition / 2, d)
        sums = structure.zeros(torch.float32, torch.device("cpu"))
        structure.accumulate_(sums, rows, weight=1 / 30)
        damping = 10.0**-log_condition
        exact = decompose(structure, sums, damping, Wanted(False, None)).stored
        short = decompose(structure, sums, damping, Wanted(False, getattr(torch, precision))).stored
        assert exact is not None
        assert short is not None
        assert short.tensors[0].dtype == getattr(torch, precision)
        assert torch.isfinite(short.tensors[0]).all()
        full.append(exact.expanded(torch.float32))
        stored.append(short.expanded(torch.float32))
        norms.append(float(torch.linalg.matrix_norm(full[-1][0], 2)))
        smallest = 2.0**-25 if precision == "float16" else 0.0
        errors.append(1.01 * (unit * float(full[-1][0].norm()) + short.scales[0] * smallest * d))
    a, g = structures
    v, w = (directions.precondition_with_inverses(grad, a, pair[0], g, pair[1]) for pair in (full, stored))
    bound = errors[1] * norms[0] + norms[1] * errors[0] + errors[0] * errors[1]
    assert float((v - w).norm()) <= bound * float(grad.norm())


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(["float16", "bfloat16"]), st.floats(0, 6), st.integers(0, 10**6))
def test_inverse_precision(precision: str, log_condition: float, seed: int) -> None:
    law_inverse_precision(precision, log_condition, seed)


def test_mutant_unscaled_half_precision_is_caught() -> None:
    """Without the scale, float16's range ends at 65504."""

    def unscaled(structure: Any, inverse: Any, wanted: Wanted) -> Any:
        return inverses.StoredInverse(tuple(t.to(wanted.dtype or t.dtype) for t in inverse), (1.0,) * len(inverse))

    assert_caught(lambda: law_inverse_precision("float16", 6.0, 0), inverses, "_store", unscaled)


def test_float64_models_keep_full_precision() -> None:
    net = make_net()
    pre = KFACPreconditioner(net, inverse_precision="float16")
    back_propagate(net)
    pre.step(num_samples=N)
    assert pre.states["0"].inverses["A"].tensors[0].dtype == F64
    pre.close()


@pytest.mark.parametrize("mode", ["relative", "tikhonov"])
def test_unit_scale_multiplies_by_both_dampings(mode: Any) -> None:
    """`λ_A λ_G (G + λ_G I)⁻¹ ∇W (A + λ_A I)⁻¹`: with damping far above the factors, the gradient itself."""
    directions = {}
    for unit_scale in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        pre = KFACPreconditioner(model, damping=0.5, damping_mode=mode, unit_scale=unit_scale)
        nn.functional.cross_entropy(model(torch.randn(20, 4)), torch.randint(3, (20,))).backward()
        pre.step(num_samples=20)
        assert model.weight.grad is not None
        directions[unit_scale] = model.weight.grad
        lambda_a, lambda_g = next(iter(pre.states.values())).damping
    assert torch.allclose(directions[True], directions[False] * lambda_a * lambda_g, rtol=1e-5)
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    pre = KFACPreconditioner(model, damping=1e8, damping_mode=mode, unit_scale=True)
    nn.functional.cross_entropy(model(torch.randn(20, 4)), torch.randint(3, (20,))).backward()
    assert model.weight.grad is not None
    gradient = model.weight.grad.clone()
    pre.step(num_samples=20)
    assert torch.allclose(model.weight.grad, gradient, rtol=1e-3)
