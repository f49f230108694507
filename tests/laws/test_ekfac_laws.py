"""EKFAC and Adam in the eigenbasis: against dense solves, transcriptions of their formulas, and torch's own Adam."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dngd.curvature import (
    Dense,
    Diagonal,
    precondition_in_eigenbasis,
    precondition_with_inverses,
    rotate,
    rotate_back,
    row_scales,
)
from dngd.optim import KFACPreconditioner, NaturalGradient, directions, eigenvalues, natural_gradient
from dngd.optim.eigenvalues import EigenvalueCorrection
from dngd.optim.layers import base
from tests.helpers.mutants import assert_caught

F64 = torch.float64
D_IN, HIDDEN, OUT = 4, 3, 3


def make_net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(D_IN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, OUT)).double()


def make_data(seed: int, n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, D_IN, generator=generator, dtype=F64)
    return x, torch.randint(OUT, (n,), generator=generator)


def sample_gradients(net: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """vec of every sample's ∇[W | b], columns stacked, by layer: [n, d_a · d_g], one backward a sample."""
    out: dict[str, list[Tensor]] = {"0": [], "2": []}
    for i in range(len(y)):
        loss = F.cross_entropy(net(x[i : i + 1]), y[i : i + 1])
        for name, vectors in out.items():
            w, b = torch.autograd.grad(loss, list(net.get_submodule(name).parameters()), retain_graph=True)
            vectors.append(torch.cat([w, b[:, None]], dim=1).T.reshape(-1))
    return {name: torch.stack(vectors) for name, vectors in out.items()}


def after_two_steps(
    net: nn.Module, x: Tensor, y: Tensor, **options: Any
) -> tuple[KFACPreconditioner, dict[str, Tensor]]:
    """A preconditioner after two steps on one batch (the first finds the basis), and the second step's gradients."""
    periods: dict[str, Any] = {"dense_steps": 0, "factor_update_period": 1, "eigenvalue_update_period": 1}
    pre = KFACPreconditioner(net, method="ekfac", factor_decay=0.0, **periods, **options)
    gradients = {}
    for _ in range(2):
        net.zero_grad()
        F.cross_entropy(net(x), y).backward()
        gradients = {name: g for name, layer in pre.layers.items() if (g := layer.gradient()) is not None}
        pre.step(num_samples=len(y))
    return pre, gradients


def basis_matrix(pre: KFACPreconditioner, name: str) -> Tensor:
    rotation = pre.rotation(name)
    assert rotation is not None
    return torch.kron(rotation[0][0], rotation[1][0])


def law_nearest_to_the_fisher(seed: int, n: int) -> None:
    """Its scales are diag(Qᵀ F Q), the nearest to the dense Fisher of all in that basis; K-FAC's are no nearer."""
    net = make_net(seed)
    x, y = make_data(seed + 1, n)
    pre, _ = after_two_steps(net, x, y)
    factors = pre.factors()
    for name, vectors in sample_gradients(net, x, y).items():
        fisher = vectors.T @ vectors / n
        q = basis_matrix(pre, name)
        assert pre.eigenvalues is not None
        scales = pre.eigenvalues.scales(name)
        assert scales is not None
        s = scales.T.reshape(-1)
        assert torch.allclose(s, (q.T @ fisher @ q).diagonal(), rtol=1e-7, atol=1e-13)
        ekfac_error = float((fisher - (q * s) @ q.T).norm())
        kfac_error = float((fisher - torch.kron(factors[name].A, factors[name].G)).norm())
        assert ekfac_error <= kfac_error * (1 + 1e-9) + 1e-14
    pre.close()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9))
def test_nearest_to_the_fisher(seed: int, n: int) -> None:
    law_nearest_to_the_fisher(seed, n)


def test_mutants_of_the_scales_are_caught() -> None:
    def unrotated(rows: Tensor, gradients: Tensor, ones: bool, a_basis: Any, g_basis: Any) -> Tensor:
        return row_scales(rows, gradients, ones, a_basis, (g_basis[1],))

    assert_caught(lambda: law_nearest_to_the_fisher(0, 7), base, "row_scales", unrotated)
    original = EigenvalueCorrection.commit

    def of_the_mean_loss(self: EigenvalueCorrection, rho: float, num_samples: float, *others: Any) -> None:
        original(self, rho, num_samples, 1.0, *others[1:])

    assert_caught(lambda: law_nearest_to_the_fisher(0, 7), EigenvalueCorrection, "commit", of_the_mean_loss)


def law_dense_solve(seed: int, mode: str) -> None:
    """vec(V) = (Q diag(s + λ_G e_A + e_G λ_A + λ_A λ_G) Qᵀ)⁻¹ vec(∇)."""
    net = make_net(seed)
    x, y = make_data(seed + 1, 9)
    pre, gradients = after_two_steps(net, x, y, damping=0.03, damping_mode=mode)
    for name, vectors in sample_gradients(net, x, y).items():
        a, g = pre.factors()[name]
        q = basis_matrix(pre, name)
        s = (q.T @ (vectors.T @ vectors / 9) @ q).diagonal()
        if mode == "relative":
            lambda_a, lambda_g = 0.03 * a.trace(), 0.3 * g.trace()
        else:
            pi = ((a.trace() / len(a)) / (g.trace() / len(g))) ** 0.5
            lambda_a, lambda_g = 0.03**0.5 * pi, 0.03**0.5 / pi
        e_a, e_g = torch.linalg.eigvalsh(a), torch.linalg.eigvalsh(g)
        extra = torch.kron(e_a, lambda_g * torch.ones_like(e_g)) + torch.kron(lambda_a * torch.ones_like(e_a), e_g)
        matrix = (q * (s + extra + lambda_a * lambda_g)) @ q.T
        gradient = gradients[name]
        expected = torch.linalg.solve(matrix, gradient.T.reshape(-1)).view(gradient.shape[1], gradient.shape[0]).T
        found = pre.layers[name].gradient()
        assert found is not None
        assert torch.allclose(found, expected, rtol=1e-7, atol=1e-11)
    pre.close()


@pytest.mark.parametrize("mode", ["relative", "tikhonov"])
def test_dense_solve(mode: str) -> None:
    for seed in range(3):
        law_dense_solve(seed, mode)

    def swapped(grad: Tensor, a: Any, g: Any, scales: Tensor | None, lambda_a: float, lambda_g: float) -> Tensor:
        return precondition_in_eigenbasis(grad, a, g, scales, lambda_g, lambda_a)

    assert_caught(lambda: law_dense_solve(0, mode), directions, "precondition_in_eigenbasis", swapped)


def law_kronecker_scales_are_kfac(seed: int) -> None:
    """With s = e_G e_Aᵀ, given or by default, the step is K-FAC's with its factored damping."""
    generator = torch.Generator().manual_seed(seed)
    grad, rows, gradients = (torch.randn(n, d, generator=generator, dtype=F64) for n, d in ((3, 5), (9, 5), (9, 3)))
    for a_kind in (Dense(5), Diagonal(5)):
        a, g = a_kind, Dense(3)
        sums = []
        for kind, m in ((a, rows), (g, gradients)):
            total = kind.zeros(F64, torch.device("cpu"))
            kind.accumulate_(total, m)
            sums.append(total)
        a_inverse, g_inverse = a.invert(sums[0], 0.3).inverse, g.invert(sums[1], 0.7).inverse
        a_basis, g_basis = a.eigenbasis(sums[0]), g.eigenbasis(sums[1])
        assert a_inverse is not None
        assert g_inverse is not None
        assert a_basis is not None
        assert g_basis is not None
        expected = precondition_with_inverses(grad, a, a_inverse, g, g_inverse)
        for scales in (None, torch.outer(g_basis[-1], a_basis[-1])):
            found = precondition_in_eigenbasis(grad, a_basis, g_basis, scales, 0.3, 0.7)
            assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)
        back = rotate_back(rotate(grad, a_basis, g_basis), a_basis, g_basis)
        assert torch.allclose(back, grad, rtol=1e-12, atol=1e-14)


def test_kronecker_scales_are_kfac() -> None:
    law_kronecker_scales_are_kfac(0)
    assert_caught(
        lambda: law_kronecker_scales_are_kfac(0),
        Dense,
        "multiply",
        lambda self, matrix, inverse: matrix @ inverse[0] * 2,
    )


def law_own_period() -> None:
    """Scales are renewed on their own period, start again with a new basis, and are K-FAC's until then."""
    net = make_net()
    pre = KFACPreconditioner(
        net,
        method="ekfac",
        factor_update_period=1,
        dense_steps=0,
        inverse_update_period=8,
        eigenvalue_update_period=3,
        factor_decay=0.9,
    )
    twin = make_net()  # nobody applies the gradients, and this one has no hooks
    renewed, known = [], []
    last: Tensor | None = None
    for step in range(18):
        x, y = make_data(step, 6)
        net.zero_grad()
        F.cross_entropy(net(x), y).backward()
        pre.step(num_samples=6)
        assert pre.eigenvalues is not None
        scales = pre.eigenvalues.scales("0")
        known.append(scales is not None)
        if scales is not None and scales is not last:
            renewed.append(step)
            # Decayed sums over the factor steps since the basis came.
            since = 8 * (step // 8) + 1
            basis = pre.rotation("0")
            assert basis is not None
            total, count = torch.zeros_like(scales), 0.0
            for past in range(since, step + 1):
                px, py = make_data(past, 6)
                z1 = twin[0](px)
                z2 = twin[2](torch.tanh(z1))
                (g,) = torch.autograd.grad(F.cross_entropy(z2, py, reduction="sum"), z1)
                total = 0.9 * total + row_scales(px, g, True, *basis)
                count = 0.9 * count + 6
            assert torch.allclose(scales, total / count, rtol=1e-9)
        last = scales
    assert renewed == [3, 6, 9, 12, 15]
    assert known == [False] * 3 + [True] * 5 + [False] + [True] * 7 + [False] * 2
    pre.close()


def test_own_period() -> None:
    law_own_period()
    original = eigenvalues.period_at
    assert_caught(law_own_period, eigenvalues, "period_at", lambda period, step: 2 * original(period, step))

    def never_again(self: EigenvalueCorrection) -> None:
        if not self.by_layer:
            follow(self)

    follow = EigenvalueCorrection.follow_bases
    assert_caught(law_own_period, EigenvalueCorrection, "follow_bases", never_again)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "ekfac"},
        {"method": "ekfac", "inverse_delay": 3, "fisher": "monte_carlo"},
        {"update": "adam_eigenbasis"},
        {"update": "adam_eigenbasis", "inverse_delay": 2, "fisher": "ggn", "max_rows": 5},
        {"max_rows": 5},
        {"max_rows": 5, "fisher": "monte_carlo"},
    ],
    ids=str,
)
def test_resume_is_bitwise(options: dict[str, Any]) -> None:
    def run(steps: range, net: nn.Module, optimizer: NaturalGradient) -> None:
        for step in steps:
            x, y = make_data(step, 8)
            optimizer.zero_grad()
            z = net(x)
            optimizer.observe(z)
            F.cross_entropy(z, y).backward()
            optimizer.step(num_samples=8)

    options = options | {"inverse_update_period": 5, "dense_steps": 2, "factor_update_period": 2}
    options |= {"eigenvalue_update_period": 4}
    straight = make_net()
    run(range(20), straight, NaturalGradient(straight, **options))
    for stop in (1, 7, 12):
        first = make_net()
        optimizer = NaturalGradient(first, **options)
        run(range(stop), first, optimizer)
        second = make_net()
        second.load_state_dict(first.state_dict())
        resumed = NaturalGradient(second, **options)
        resumed.load_state_dict(optimizer.state_dict())
        run(range(stop, 20), second, resumed)
        for a, b in zip(straight.parameters(), second.parameters()):
            assert torch.equal(a, b), f"stopped at step {stop}"


def test_resume_of_half_precision_weights_is_bitwise() -> None:
    """Moments of layers are float32 there, and torch would cast what it loads to the weights' precision."""

    def run(steps: range, net: nn.Module, optimizer: NaturalGradient) -> None:
        for step in steps:
            x, y = make_data(step, 8)
            optimizer.zero_grad()
            F.cross_entropy(net(x.bfloat16()).float(), y).backward()
            optimizer.step(num_samples=8)

    nets = [make_net().bfloat16() for _ in range(2)]
    optimizers = [NaturalGradient(net, update="adam_eigenbasis") for net in nets]
    run(range(8), nets[0], optimizers[0])
    nets[1].load_state_dict(nets[0].state_dict())
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    for net, optimizer in zip(nets, optimizers):
        run(range(8, 14), net, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters()))


# Adam in the eigenbasis


def law_left_over_parameters_are_adams(lr_of: Any) -> None:
    """A parameter without factors takes torch.optim.Adam's own steps."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(D_IN, HIDDEN), nn.PReLU(HIDDEN), nn.Linear(HIDDEN, OUT)).double()
    with pytest.warns(UserWarning, match="plain gradient"):
        optimizer = NaturalGradient(net, lr=0.05, update="adam_eigenbasis", loss_reduction="sum")
    twin = nn.Parameter(net[1].weight.detach().clone())
    adam = torch.optim.Adam([twin], lr=0.05, betas=(0.9, 0.95), eps=1e-8)
    for step in range(12):
        x, y = make_data(step, 8)
        optimizer.zero_grad()
        F.cross_entropy(net(x), y, reduction="sum").backward()
        assert net[1].weight.grad is not None
        twin.grad = net[1].weight.grad / 8
        optimizer.param_groups[0]["lr"] = adam.param_groups[0]["lr"] = lr_of(step)
        optimizer.step(num_samples=8)
        adam.step()
        assert torch.allclose(net[1].weight, twin, rtol=1e-11, atol=1e-15)


def test_left_over_parameters_are_adams() -> None:
    law_left_over_parameters_are_adams(lambda step: 0.05)
    law_left_over_parameters_are_adams(lambda step: 0.1 / (step + 1))
    for name, value in (("ADAM_BETA2", 0.999), ("ADAM_EPSILON", 1e-4)):
        assert_caught(lambda: law_left_over_parameters_are_adams(lambda step: 0.05), natural_gradient, name, value)


def law_adam_formula() -> None:
    """`m ← μm + (1-μ)∇`, `s ← β₂s + (1-β₂)(Q_Gᵀ∇Q_A)²`, `W ← W - η(Q_G [(Q_GᵀmQ_A)/(√s + ε)] Q_Aᵀ + w W)`."""
    net = make_net()
    optimizer = NaturalGradient(
        net, lr=0.03, update="adam_eigenbasis", momentum=0.8, weight_decay=0.1, inverse_update_period=4, dense_steps=0
    )
    pre = optimizer.preconditioner
    m = {name: torch.zeros(3, d + 1, dtype=F64) for name, d in (("0", D_IN), ("2", HIDDEN))}
    s = {name: torch.zeros_like(value) for name, value in m.items()}
    for step in range(9):
        x, y = make_data(step, 8)
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        before = {}
        for name, layer in pre.layers.items():
            before[name] = (layer.gradient(), torch.cat([layer.weight, layer.bias[:, None]], dim=1).detach())
        optimizer.step(num_samples=8)
        for name, (gradient, weight) in before.items():
            assert gradient is not None
            rotation = pre.rotation(name)
            assert rotation is not None
            q_a, q_g = rotation[0][0], rotation[1][0]
            m[name] = 0.8 * m[name] + 0.2 * gradient
            s[name] = 0.95 * s[name] + 0.05 * (q_g.T @ gradient @ q_a) ** 2
            mean, square = m[name] / (1 - 0.8 ** (step + 1)), s[name] / (1 - 0.95 ** (step + 1))
            direction = q_g @ ((q_g.T @ mean @ q_a) / (square.sqrt() + 1e-8)) @ q_a.T
            layer = pre.layers[name]
            found = torch.cat([layer.weight, layer.bias[:, None]], dim=1)
            assert torch.allclose(found, weight - 0.03 * (direction + 0.1 * weight), rtol=1e-9, atol=1e-9)


def test_adam_formula() -> None:
    law_adam_formula()

    def unrotated(grad: Tensor, a_basis: Any, g_basis: Any) -> Tensor:
        return grad

    assert_caught(law_adam_formula, natural_gradient, "rotate", unrotated)


def trajectory(rotation: Tensor, update: str) -> list[Tensor]:
    """First-layer weights after each step of training on inputs x Rᵀ, mapped back: W' R."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(D_IN, HIDDEN, bias=False), nn.Tanh(), nn.Linear(HIDDEN, OUT, bias=False)).double()
    with torch.no_grad():
        net[0].weight.copy_(net[0].weight @ rotation.T)
    if update == "adam":
        optimizer: Any = torch.optim.Adam(net.parameters(), lr=0.02)
    else:
        optimizer = NaturalGradient(net, lr=0.02, update=update, inverse_update_period=5, dense_steps=3)
    found = []
    for step in range(15):
        x, y = make_data(100 + step, 24)
        x = x * torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=F64)  # distinct eigenvalues
        optimizer.zero_grad()
        F.cross_entropy(net(x @ rotation.T), y).backward()
        optimizer.step(**({} if update == "adam" else {"num_samples": 24}))
        found.append(net[0].weight.detach() @ rotation)
    return found


def law_rotation_equivariance(update: str) -> None:
    """Rotated inputs: the rotated trajectory. Its step does not depend on the axes that the features came in."""
    rotation, _ = torch.linalg.qr(torch.randn(D_IN, D_IN, generator=torch.Generator().manual_seed(5), dtype=F64))
    for straight, rotated in zip(trajectory(torch.eye(D_IN, dtype=F64), update), trajectory(rotation, update)):
        assert torch.allclose(straight, rotated, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("update", ["adam_eigenbasis", "momentum", "mean_gradient"])
def test_rotation_equivariance(update: str) -> None:
    law_rotation_equivariance(update)
    with pytest.raises(AssertionError):
        law_rotation_equivariance("adam")
    if update == "adam_eigenbasis":
        assert_caught(
            lambda: law_rotation_equivariance(update), KFACPreconditioner, "rotation", lambda self, name: None
        )
