"""The preconditioner in a user's own loop: use, misuse, state."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dngd.errors import UserError
from dngd.optim import KFACPreconditioner, NaturalGradient
from dngd.optim.natural_gradient import Update


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def back_propagate(net: nn.Module, n: int = 8) -> None:
    torch.manual_seed(1)
    F.cross_entropy(net(torch.randn(n, 4)), torch.randint(3, (n,))).backward()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"damping": 0.0}, "damping=0.0"),
        ({"damping": -1}, "above 0"),
        ({"damping_mode": "huge"}, "tikhonov"),
        ({"damping_g_ratio": 0.0}, "damping_g_ratio"),
        ({"factor_decay": 1.0}, "below 1.0"),
        ({"factor_update_period": 0}, "factor_update_period=0"),
        ({"inverse_update_period": 0}, "inverse_update_period=0"),
        ({"dense_steps": -1}, "dense_steps=-1"),
        ({"inverse_delay": 100}, "inverse_delay=100"),
        ({"kl_clip": 0.0, "lr": 1.0}, "kl_clip=0.0"),
        ({"kl_clip": 1e-3}, "pass lr="),
        ({"loss_reduction": "none"}, "mean, sum"),
        ({"fisher": "ggm"}, "empirical"),
        ({"method": "shampoo"}, "ekfac"),
        ({"loss": "hinge"}, "cross_entropy"),
        ({"weight_sharing": "both"}, "reduce"),
        ({"max_rows": 0}, "max_rows=0"),
        ({"eigenvalue_update_period": 0}, "eigenvalue_update_period=0"),
        ({"norm_constraint": 1.0}, "pass lr="),
        ({"change_threshold": -1.0}, "change_threshold"),
        ({"inverse_precision": "int8"}, "bfloat16"),
        ({"max_dropped_steps": 0}, "max_dropped_steps=0"),
        ({"variant": "paper", "fisher": "ggn"}, "empirical"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said.replace("(", r"\(")):
        KFACPreconditioner(make_net(), **arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [({"lr": 0.0}, "lr"), ({"momentum": 1.0}, "momentum"), ({"weight_decay": -1.0}, "weight_decay")],
)
def test_optimizer_arguments_out_of_range(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        NaturalGradient(make_net(), **arguments)


def test_step_before_backward() -> None:
    with pytest.raises(UserError, match="backward"):
        KFACPreconditioner(make_net()).step(num_samples=8)
    with pytest.raises(UserError, match="num_samples"):
        NaturalGradient(make_net()).step()


def test_no_supported_layer() -> None:
    with pytest.raises(UserError, match="no layer that K-FAC supports"):
        KFACPreconditioner(nn.Conv2d(1, 1, 3))


def test_shared_weight_is_refused() -> None:
    net = make_net()
    net.append(nn.Linear(6, 3))
    net[3].weight = net[2].weight
    with pytest.raises(UserError, match="share"):
        KFACPreconditioner(net)


def test_left_over_parameters_are_named_and_keep_their_gradient() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.PReLU(6), nn.Linear(6, 3))
    with pytest.warns(UserWarning, match=r": 1\.weight$"):
        pre = KFACPreconditioner(net)
    back_propagate(net)
    norm, linear = net[1].weight.grad.clone(), net[0].weight.grad.clone()
    pre.step(num_samples=8)
    assert torch.equal(net[1].weight.grad, norm)
    assert not torch.equal(net[0].weight.grad, linear)


def test_frozen_layers_are_left_alone() -> None:
    net = make_net()
    net[0].requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pre = KFACPreconditioner(net)
    assert list(pre.layers) == ["2"]
    back_propagate(net)
    assert pre.step(num_samples=8)


def test_forward_without_backward_leaves_no_trace() -> None:
    net = make_net()
    pre = KFACPreconditioner(net)
    net(torch.randn(100, 4))
    with torch.no_grad():
        net(torch.randn(100, 4))
    back_propagate(net)
    pre.step(num_samples=8)
    assert float(pre.states["0"].folded.counts[0]) == 8


def test_accumulated_micro_batches_are_one_batch() -> None:
    """Two backward passes of half the mean loss each: the factors and gradient of the whole batch."""
    found = []
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    for parts in (1, 2):
        net = make_net()
        pre = KFACPreconditioner(net, damping=0.1)
        for xs, ys in zip(x.chunk(parts), y.chunk(parts)):
            (F.cross_entropy(net(xs), ys) / parts).backward()
        pre.step(num_samples=8)
        found.append([*pre.factors()["0"], *(p.grad for p in net.parameters())])
    for whole, halves in zip(*found):
        assert torch.allclose(whole, halves, rtol=1e-4, atol=1e-6)


def test_non_finite_gradient_drops_the_step() -> None:
    net = make_net()
    optimizer = NaturalGradient(net)
    back_propagate(net)
    optimizer.step(num_samples=8)
    before = [p.clone() for p in net.parameters()]
    state = {k: v.clone() for k, v in optimizer.preconditioner.state_dict().items()}
    optimizer.zero_grad()
    back_propagate(net)
    net[0].weight.grad[0, 0] = float("inf")
    optimizer.step(num_samples=8)
    assert optimizer.preconditioner.dropped_steps == 1
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters()))
    after = optimizer.preconditioner.state_dict()
    assert torch.equal(after["shared.folded.a.0.0"], state["shared.folded.a.0.0"])


@pytest.mark.parametrize("delay", [0, 3])
def test_state_dict_is_tensors_and_resumes_bitwise(delay: int) -> None:
    def run(steps: range, net: nn.Module, optimizer: NaturalGradient) -> None:
        for step in steps:
            torch.manual_seed(step)
            optimizer.zero_grad()
            F.cross_entropy(net(torch.randn(8, 4)), torch.randint(3, (8,))).backward()
            optimizer.step(num_samples=8)

    options = {"inverse_delay": delay, "inverse_update_period": 5, "dense_steps": 2, "factor_update_period": 2}
    straight = make_net()
    run(range(20), straight, NaturalGradient(straight, **options))
    first = make_net()
    optimizer = NaturalGradient(first, **options)
    run(range(7), first, optimizer)
    state = optimizer.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state["preconditioner"].values())
    second = make_net()
    second.load_state_dict(first.state_dict())
    resumed = NaturalGradient(second, **options)
    resumed.load_state_dict(state)
    run(range(7, 20), second, resumed)
    for a, b in zip(straight.parameters(), second.parameters()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_gradient_without_factors_counts_too(poison: float) -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.PReLU(6), nn.Linear(6, 3))
    with pytest.warns(UserWarning, match=r": 1\.weight$"):
        optimizer = NaturalGradient(net)
    back_propagate(net)
    net[1].weight.grad[0] = poison
    optimizer.step(num_samples=8)
    assert optimizer.preconditioner.dropped_steps == 1
    assert all(torch.isfinite(p).all() for p in net.parameters())


def test_rows_of_a_skipped_step_are_forgotten() -> None:
    """`zero_grad` begins a step anew: what an earlier backward left is in no factor."""
    net = make_net()
    optimizer = NaturalGradient(net)
    (F.cross_entropy(net(torch.full((3, 4), 1e30)), torch.zeros(3, dtype=torch.int64))).backward()
    optimizer.zero_grad()
    back_propagate(net)
    optimizer.step(num_samples=8)
    assert float(optimizer.preconditioner.states["0"].folded.counts[0]) == 8
    assert torch.isfinite(optimizer.preconditioner.factors()["0"].A).all()


def test_statistics_that_overflow_are_left_out() -> None:
    """Finite gradients, rows whose squares are not: the refresh drops them and the next ones are sound."""
    net = nn.Sequential(nn.Linear(2, 2))
    pre = KFACPreconditioner(net, inverse_update_period=1, factor_update_period=1)
    for scale in (1.0, 1e25, 1.0, 1.0):
        net.zero_grad()
        (net(torch.full((4, 2), scale)).mean() * 1e-20).backward()
        assert pre.step(num_samples=4)
    assert pre.non_finite_statistics == 1
    assert torch.isfinite(pre.factors()["0"].A).all()
    assert pre.health()["0"]["staleness"] == 1.0


def test_several_ranks_must_say_that_gradients_are_means() -> None:
    class Two:
        rank, world_size = 0, 2

    net = make_net()
    pre = KFACPreconditioner(net, loss_reduction="sum", communicator=Two())  # type: ignore[arg-type]
    back_propagate(net)
    with pytest.raises(UserError, match="mean_gradients=True"):
        pre.step(num_samples=8)


def test_momentum_and_weight_decay() -> None:
    """`u ← μu + v`, `W ← W − η(u + w·W)`, over three steps, v as the preconditioner left it."""
    net = make_net()
    optimizer = NaturalGradient(net, lr=0.3, update="momentum", momentum=0.7, weight_decay=0.2)
    weights = [p.detach().clone() for p in net.parameters()]
    momenta = [torch.zeros_like(p) for p in net.parameters()]
    for step in range(3):
        lr = 0.3 / (step + 1)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        back_propagate(net)
        optimizer.step(num_samples=8)
        for i, parameter in enumerate(net.parameters()):
            momenta[i] = 0.7 * momenta[i] + parameter.grad
            weights[i] = weights[i] - lr * (momenta[i] + 0.2 * weights[i])
            assert torch.allclose(parameter, weights[i], rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore:these parameters keep the optimizer's plain gradient")
@pytest.mark.parametrize("update", ["mean_gradient", "momentum", "adam_eigenbasis"])
def test_a_sum_takes_the_steps_of_its_mean(update: Update) -> None:
    """Parameters without factors too."""
    found = []
    for reduction, size in (("mean", 1), ("sum", 8)):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 6), nn.PReLU(), nn.Linear(6, 3)).double()
        optimizer = NaturalGradient(net, update=update, loss_reduction=reduction)
        for _ in range(3):
            optimizer.zero_grad()
            rows, labels = torch.randn(8, 4, dtype=torch.float64), torch.randint(3, (8,))
            (F.cross_entropy(net(rows), labels) * size).backward()
            optimizer.step(num_samples=8)
        found.append(nn.utils.parameters_to_vector(net.parameters()))
    assert torch.allclose(*found, rtol=1e-7, atol=1e-10)


@pytest.mark.filterwarnings("ignore:these parameters keep the optimizer's plain gradient")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_mean_of_gradients_is_preconditioned(reduction: Literal["mean", "sum"]) -> None:
    """`W ← W − η(v + w·W)`, v the natural gradient of `Σ μ^(t-k) ∇_k / Σ μ^(t-k)` of the mean losses, in float64.

    The reference takes a preconditioner of its own through the same rows, with the mean put in the place of each
    gradient. Steps differ in size, μ too, and a step that is not finite is left out of all. PReLU has no factors.
    """
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.PReLU(), nn.Linear(6, 3)).double()
    options = {"damping": 0.03, "kl_clip": 1e-3, "dense_steps": 3, "inverse_update_period": 4}
    twin = copy.deepcopy(net)
    momenta, sizes = [0.7, 0.7, 0.2, 0.0, 0.9, 0.5], [8, 12, 5, 8, 16, 4]
    optimizer = NaturalGradient(
        net, lr=0.3, momentum=lambda step: momenta[step], weight_decay=0.2, loss_reduction=reduction, **options
    )
    reference = KFACPreconditioner(twin, damping_mode="relative", damping_g_ratio=30.0, lr=0.3, **options)
    sums, total = [torch.zeros_like(p) for p in twin.parameters()], 0.0
    torch.manual_seed(1)
    for step, (mu, size) in enumerate(zip(momenta, sizes)):
        rows, labels = torch.randn(size, 4, dtype=torch.float64), torch.randint(3, (size,))
        is_finite = step != 3
        for model, kind in ((net, reduction), (twin, "mean")):
            model.zero_grad()
            F.cross_entropy(model(rows), labels, reduction=kind).backward()
            if not is_finite:
                next(model.parameters()).grad[0] = math.nan
        optimizer.step(num_samples=size)
        if is_finite:
            total = mu * total + (1 - mu)
            for sum_, parameter in zip(sums, twin.parameters()):
                sum_.mul_(mu).add_(parameter.grad, alpha=1 - mu)
                parameter.grad.copy_(sum_ / total)
        taken = reference.step(num_samples=size)
        assert taken == is_finite
        with torch.no_grad():
            for parameter, twin_parameter in zip(net.parameters(), twin.parameters()):
                if is_finite:
                    twin_parameter.sub_(0.3 * (twin_parameter.grad + 0.2 * twin_parameter))
                assert torch.allclose(parameter, twin_parameter, rtol=1e-7, atol=1e-10)


def test_loading_state_forgets_the_old_life() -> None:
    """A rollback is a fresh load: no refresh under way, no inverse, no rows of the steps given up."""
    options: dict[str, Any] = {"inverse_update_period": 5, "inverse_delay": 3, "dense_steps": 4}
    net = make_net()
    pre = KFACPreconditioner(net, **options)
    beginning = pre.state_dict()
    for _ in range(7):
        net.zero_grad()
        back_propagate(net)
        pre.step(num_samples=8)
    back_propagate(net)
    pre.load_state_dict(beginning)
    assert pre.pipeline.under_way == ()
    assert all(not state.inverses for state in pre.states.values())
    net.zero_grad()
    back_propagate(net)
    pre.step(num_samples=8)
    assert float(pre.states["0"].folded.counts[0]) == 8


def test_state_of_another_model_is_refused() -> None:
    net = make_net()
    pre = KFACPreconditioner(net)
    back_propagate(net)
    pre.step(num_samples=8)
    other = KFACPreconditioner(nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)))
    with pytest.raises(UserError, match="layers"):
        other.load_state_dict(pre.state_dict())


def test_failed_inversion_keeps_the_last_good_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from dngd.optim import refresh
    from dngd.optim.inverses import Decomposition

    net = make_net()
    pre = KFACPreconditioner(net, inverse_update_period=1, factor_update_period=1)
    back_propagate(net)
    pre.step(num_samples=8)
    good = pre.states["0"].inverses
    monkeypatch.setattr(refresh, "decompose", lambda *arguments: Decomposition(None, 5))
    back_propagate(net, 7)
    pre.step(num_samples=7)
    assert pre.states["0"].inverses is good
    found = pre.health()["0"]
    assert (found["staleness"], found["escalations"], found["failed_inversions"]) == (2.0, 5.0 * 2, 2.0)
