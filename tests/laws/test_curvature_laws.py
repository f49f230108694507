"""The curvature against dense float64 references made from per-sample gradients, and its mutants."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dngd import curvature
from dngd.curvature import (
    KroneckerFactors,
    cholesky_inverse,
    damping_split,
    gram,
    kl_clip_scale,
    pi_ratio,
    precondition,
    precondition_with_inverses,
    structure,
)
from dngd.optim import KFACPreconditioner, commit, directions, step_scale
from tests.helpers.mutants import assert_caught

D_IN, D_HIDDEN, CLASSES = 4, 3, 3


def make_net(seed: int, bias: bool) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(D_IN, D_HIDDEN, bias=bias), nn.Tanh(), nn.Linear(D_HIDDEN, CLASSES, bias=bias)
    ).double()


def make_data(seed: int, n: int, *, equal_rows: bool) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1 if equal_rows else n, D_IN, generator=generator, dtype=torch.float64)
    return x.expand(n, D_IN).contiguous(), torch.randint(CLASSES, (n,), generator=generator)


def captured_factors(net: nn.Module, x: Tensor, y: Tensor, reduction: str) -> dict[str, KroneckerFactors]:
    pre = KFACPreconditioner(net, loss_reduction=reduction, factor_decay=0.0)
    net.zero_grad()
    F.cross_entropy(net(x), y, reduction=reduction).backward()
    pre.step(num_samples=len(y))
    out = pre.factors()
    pre.close()
    return out


def dense_fisher(net: nn.Sequential, layer: nn.Linear, x: Tensor, y: Tensor) -> Tensor:
    """(1/n) Σ_i vec(∇_i) vec(∇_i)ᵀ, ∇_i = ∂loss_i/∂[W | b], vec stacking columns, one backward a sample."""
    total: Tensor | None = None
    for i in range(len(y)):
        loss = F.cross_entropy(net(x[i : i + 1]), y[i : i + 1])
        grads = torch.autograd.grad(loss, list(layer.parameters()))
        matrix = grads[0] if layer.bias is None else torch.cat([grads[0], grads[1][:, None]], dim=1)
        vec = matrix.T.reshape(-1)
        outer = torch.outer(vec, vec)
        total = outer if total is None else total + outer
    assert total is not None
    return total / len(y)


def law_kronecker_is_exact_for_equal_rows(seed: int, n: int, bias: bool, reduction: str) -> None:
    """With one input row repeated, A and G are independent and A ⊗ G is the Fisher block itself."""
    net = make_net(seed, bias)
    x, y = make_data(seed + 1, n, equal_rows=True)
    factors = captured_factors(net, x, y, reduction)
    for name in ("0", "2"):
        expected = dense_fisher(net, net.get_submodule(name), x, y)
        a, g = factors[name]
        assert torch.allclose(torch.kron(a, g), expected, rtol=1e-9, atol=1e-14)


def law_factors_are_the_averages(seed: int, n: int, bias: bool, reduction: str) -> None:
    """With rows of any kind, A and G are exactly the averages of the per-sample outer products."""
    net = make_net(seed, bias)
    x, y = make_data(seed + 1, n, equal_rows=False)
    factors = captured_factors(net, x, y, reduction)
    hidden = torch.tanh(net[0](x)).detach()
    for name, rows in (("0", x), ("2", hidden)):
        if bias:
            rows = torch.cat([rows, torch.ones(n, 1, dtype=torch.float64)], dim=1)
        assert torch.allclose(factors[name].A, rows.T @ rows / n, rtol=1e-10, atol=1e-14)
        expected = torch.zeros_like(factors[name].G)
        for i in range(n):
            z = net[0](x[i : i + 1]) if name == "0" else net(x[i : i + 1])
            out = net[2](torch.tanh(z)) if name == "0" else z
            (g,) = torch.autograd.grad(F.cross_entropy(out, y[i : i + 1]), z)
            expected += g.T @ g / n
        assert torch.allclose(factors[name].G, expected, rtol=1e-9, atol=1e-14)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 7), st.booleans(), st.sampled_from(["mean", "sum"]))
def test_kronecker_is_exact_for_equal_rows(seed: int, n: int, bias: bool, reduction: str) -> None:
    law_kronecker_is_exact_for_equal_rows(seed, n, bias, reduction)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 7), st.booleans(), st.sampled_from(["mean", "sum"]))
def test_factors_are_the_averages(seed: int, n: int, bias: bool, reduction: str) -> None:
    law_factors_are_the_averages(seed, n, bias, reduction)


def test_mutant_dropped_n_is_caught() -> None:
    """The gradient of the mean loss used as it is: G shrinks as 1/n²."""

    def commit_without_n(self: KFACPreconditioner, num_samples: float, factor_samples: float | None = None) -> None:
        self.loss_reduction = "sum"
        original_commit(self, num_samples)

    original_commit = KFACPreconditioner.commit
    for law in (law_kronecker_is_exact_for_equal_rows, law_factors_are_the_averages):
        assert_caught(lambda law=law: law(0, 5, True, "mean"), KFACPreconditioner, "commit", commit_without_n)


def test_mutant_missing_ones_column_is_caught() -> None:
    def without_ones(rows: Tensor, has_bias: bool) -> Tensor:
        found = gram(rows, has_bias)
        if has_bias:
            found[-1, :-1] = 0
            found[:-1, -1] = 0
        return found

    assert_caught(lambda: law_factors_are_the_averages(0, 5, True, "mean"), structure, "gram", without_ones)


def psd(seed: int, d: int, rank: int, log_condition: float) -> Tensor:
    """A PSD [d, d] matrix of a given rank whose eigenvalues span 10^log_condition."""
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    eigenvalues = torch.logspace(0, -log_condition, d, dtype=torch.float64)
    eigenvalues[rank:] = 0
    return (q * eigenvalues) @ q.T


def law_inverse(seed: int, d: int, rank: int, log_condition: float, log_damping: float, dtype: torch.dtype) -> None:
    """inverse · (M + λI) = I, up to what the conditioning leaves of the precision."""
    matrix = psd(seed, d, min(rank, d), log_condition).to(dtype)
    damping = 10.0**log_damping
    result = cholesky_inverse(matrix, damping)
    assert result.inverse is not None
    damped = matrix.double() + result.damping * torch.eye(d, dtype=torch.float64)
    error = (result.inverse[0].double() @ damped - torch.eye(d, dtype=torch.float64)).abs().max()
    condition = float(torch.linalg.cond(damped))
    assert error <= 20 * d * condition * torch.finfo(dtype).eps
    if dtype == torch.float64 and condition < 1e9:
        assert result.damping == damping
        assert result.escalations == 0


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 24),
    st.integers(0, 24),
    st.floats(0, 12),
    st.floats(-6, 2),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_inverse(seed: int, d: int, rank: int, condition: float, damping: float, dtype: torch.dtype) -> None:
    law_inverse(seed, d, rank, condition, damping, dtype)


def test_mutant_undamped_inverse_is_caught() -> None:
    original = curvature.inverse._cholesky_inverse
    assert_caught(
        lambda: law_inverse(0, 8, 8, 1.0, -1.0, torch.float64),
        curvature.inverse,
        "_cholesky_inverse",
        lambda matrix, damping: original(matrix, damping * 0.5),
    )


def test_inverse_escalates_and_says_so() -> None:
    ones = torch.ones(64, 64)  # rank one; λ far below float32's resolution of its largest eigenvalue
    result = cholesky_inverse(ones, 1e-9)
    assert result.inverse is not None
    assert result.escalations > 0
    indefinite = torch.diag(torch.tensor([1.0, -1.0]))
    failed = cholesky_inverse(indefinite, 1e-6)
    assert failed.inverse is None
    assert failed.escalations == 5
    assert cholesky_inverse(torch.full((2, 2), torch.nan), 1.0).inverse is None


@pytest.mark.parametrize("damping", [0.0, -1.0, float("nan")])
def test_damping_out_of_range(damping: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        cholesky_inverse(torch.eye(2), damping)
    with pytest.raises(ValueError, match="above 0"):
        damping_split(torch.ones(2), torch.ones(2), damping, "tikhonov")
    with pytest.raises(ValueError, match="above 0"):
        precondition(torch.ones(2, 2), KroneckerFactors(torch.eye(2), torch.eye(2)), damping)


def law_precondition_is_the_damped_solve(seed: int, mode: str) -> None:
    """vec(V) = ((A + λ_A I) ⊗ (G + λ_G I))⁻¹ vec(∇), with the damping as its formula says."""
    net = make_net(seed, True)
    x, y = make_data(seed + 1, 9, equal_rows=False)
    lam = 0.03
    pre = KFACPreconditioner(net, damping=lam, damping_mode=mode, damping_g_ratio=10.0)
    F.cross_entropy(net(x), y).backward()
    before = {name: layer.gradient() for name, layer in pre.layers.items()}
    pre.step(num_samples=9)
    for name, (a, g) in pre.factors().items():
        if mode == "even":
            lambda_a = lambda_g = lam**0.5
        elif mode == "tikhonov":
            pi = ((a.trace() / a.shape[0]) / (g.trace() / g.shape[0])) ** 0.5
            lambda_a, lambda_g = lam**0.5 * pi, lam**0.5 / pi
        elif mode == "mean":
            features = len(a) - 1  # and a 1 for the bias, the last
            lambda_a = lam * a.diagonal()[:features].sum() / features
            lambda_g = 10 * lam * g.trace() / len(g)
        else:
            lambda_a, lambda_g = lam * a.trace(), 10 * lam * g.trace()
        damped = torch.kron(
            a + lambda_a * torch.eye(len(a), dtype=a.dtype), g + lambda_g * torch.eye(len(g), dtype=g.dtype)
        )
        gradient = before[name]
        assert gradient is not None
        solved = torch.linalg.solve(damped, gradient.T.reshape(-1)).view(gradient.shape[1], gradient.shape[0]).T
        found = pre.layers[name].gradient()
        assert found is not None
        assert torch.allclose(found, solved, rtol=1e-8, atol=1e-12)
        if mode == "tikhonov":
            assert torch.allclose(found, precondition(gradient, KroneckerFactors(a, g), lam), rtol=1e-8, atol=1e-12)
    pre.close()


@pytest.mark.parametrize("mode", ["tikhonov", "relative", "mean", "even"])
@pytest.mark.parametrize("seed", range(3))
def test_precondition_is_the_damped_solve(seed: int, mode: str) -> None:
    law_precondition_is_the_damped_solve(seed, mode)


def test_mutant_wrong_pi_is_caught() -> None:
    assert_caught(
        lambda: law_precondition_is_the_damped_solve(0, "tikhonov"),
        curvature.damping,
        "pi_ratio",
        lambda a, g: 1 / pi_ratio(a, g),
    )


def test_mutant_swapped_inverses_are_caught() -> None:
    def squared(grad: Tensor, a: Any, a_inverse: Any, g: Any, g_inverse: Any) -> Tensor:
        return precondition_with_inverses(grad, a, a_inverse, g, (g_inverse[0] @ g_inverse[0],))

    assert_caught(
        lambda: law_precondition_is_the_damped_solve(0, "relative"),
        directions,
        "precondition_with_inverses",
        squared,
    )


def test_pi_at_its_limits() -> None:
    ones = torch.ones(3, dtype=torch.float64)
    assert float(pi_ratio(4 * ones, ones)) == 2.0
    assert float(pi_ratio(torch.zeros(3), ones.float())) == 1.0
    assert float(pi_ratio(ones, 1e-30 * ones)) == 1e3
    assert float(pi_ratio(1e-30 * ones, ones)) == 1e-3


def law_kl_clip(mean_gradients: bool) -> None:
    """η²Σ⟨νv, ν∇⟩ is κ where the clip acts, and ν = 1 where it does not; ∇ is the mean loss's gradient."""
    for lr, acts in ((5.0, True), (1e-4, False)):
        net = make_net(0, True)
        x, y = make_data(1, 9, equal_rows=False)
        reduction = "mean" if mean_gradients else "sum"
        pre = KFACPreconditioner(net, damping=0.1, kl_clip=1e-3, lr=lr, loss_reduction=reduction)
        F.cross_entropy(net(x), y, reduction=reduction).backward()
        scale = 1.0 if mean_gradients else 1 / 9
        before = {name: layer.gradient() * scale for name, layer in pre.layers.items()}
        pre.step(num_samples=9)
        quadratic = 0.0
        for name, layer in pre.layers.items():
            v = layer.gradient() / pre.last_scale
            quadratic += float((v * before[name]).sum()) * lr**2
        nu = float(pre.last_scale)
        assert nu == pytest.approx((1e-3 / quadratic) ** 0.5 if acts else 1.0, rel=1e-9)
        assert (nu < 1) == acts
        pre.close()


@pytest.mark.parametrize("mean_gradients", [True, False])
def test_kl_clip(mean_gradients: bool) -> None:
    law_kl_clip(mean_gradients)


def test_mutant_kl_clip_without_lr_is_caught() -> None:
    assert_caught(
        lambda: law_kl_clip(True),
        step_scale,
        "kl_clip_scale",
        lambda quadratic, squared, kl_clip: kl_clip_scale(quadratic, squared**0.5, kl_clip),
    )


def law_reduction_does_not_matter() -> None:
    """The same data give the same factors and natural gradient from a mean loss and from a sum loss."""
    found = []
    for reduction in ("mean", "sum"):
        net = make_net(3, True)
        x, y = make_data(4, 8, equal_rows=False)
        pre = KFACPreconditioner(net, damping=0.05, kl_clip=1e-2, lr=1.0, loss_reduction=reduction)
        F.cross_entropy(net(x), y, reduction=reduction).backward()
        pre.step(num_samples=8)
        found.append([p.grad.clone() for p in net.parameters()])
        pre.close()
    for mean, total in zip(*found):
        assert torch.allclose(mean, total, rtol=1e-9, atol=1e-14)


def test_reduction_does_not_matter() -> None:
    law_reduction_does_not_matter()


def running_average_law(decays: list[float], rows: list[int]) -> None:
    """S ← ρS + ΔS, c ← ρc + Δc, divided when used: a weighted average of the steps' rows."""
    net = nn.Sequential(nn.Linear(2, 2, bias=False)).double()
    pre = KFACPreconditioner(
        net, damping=1.0, factor_decay=lambda step: decays[step], dense_steps=100, inverse_update_period=3
    )
    generator = torch.Generator().manual_seed(0)
    s_a, c_a = torch.zeros(2, 2, dtype=torch.float64), 0.0
    s_g, c_g = torch.zeros(2, 2, dtype=torch.float64), 0.0
    for rho, n in zip(decays, rows):
        x = torch.randn(n, 2, generator=generator, dtype=torch.float64)
        target = torch.randn(n, 2, generator=generator, dtype=torch.float64)
        net.zero_grad()
        z = net(x)
        ((z - target) ** 2).sum(dim=1).mean().backward()
        g = 2 * (z - target).detach()
        s_a, c_a = rho * s_a + x.T @ x, rho * c_a + n
        s_g, c_g = rho * s_g + g.T @ g, rho * c_g + n
        pre.step(num_samples=n)
        factors = pre.factors()["0"]
        assert torch.allclose(factors.A, s_a / c_a, rtol=1e-9)
        assert torch.allclose(factors.G, s_g / c_g, rtol=1e-9)
    pre.close()


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 0.99), st.integers(1, 5)), min_size=1, max_size=9))
def test_running_average(steps: list[tuple[float, int]]) -> None:
    running_average_law([rho for rho, _ in steps], [n for _, n in steps])


def test_mutant_undecayed_count_is_caught() -> None:
    """Sums that decay while their counts do not (a fold that forgets the decay: test_reduction_laws)."""

    def stale(tensors: list[torch.Tensor], scale: float) -> None:
        for tensor in tensors:
            if tensor.shape != (2,):
                tensor.mul_(scale)

    assert_caught(
        lambda: running_average_law([0.5, 0.5, 0.5, 0.5, 0.5], [3, 1, 4, 1, 5]), commit, "scale_together", stale
    )


def law_disjoint_copies(copies: int) -> None:
    """Repeating a batch as disjoint copies changes no factor and no natural gradient."""
    found = []
    for repeat in (1, copies):
        net = make_net(5, True)
        x, y = make_data(6, 6, equal_rows=False)
        pre = KFACPreconditioner(net, damping=0.05)
        F.cross_entropy(net(x.repeat(repeat, 1)), y.repeat(repeat)).backward()
        pre.step(num_samples=6 * repeat)
        found.append([t for pair in pre.factors().values() for t in pair] + [p.grad.clone() for p in net.parameters()])
        pre.close()
    for once, repeated in zip(*found):
        assert torch.allclose(once, repeated, rtol=1e-9, atol=1e-13)


def test_disjoint_copies() -> None:
    law_disjoint_copies(3)


def test_mutant_wrong_count_is_caught() -> None:
    original = KFACPreconditioner.commit

    def commit(self: KFACPreconditioner, num_samples: float, factor_samples: float | None = None) -> None:
        original(self, num_samples**0.5)

    assert_caught(lambda: law_disjoint_copies(3), KFACPreconditioner, "commit", commit)
