"""What each Fisher kind measures, against dense references: per-sample Jacobians and autograd's own Hessians."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dngd.curvature import fisher
from dngd.errors import UserError
from dngd.optim import KFACPreconditioner, NaturalGradient, capture
from dngd.optim.capture import Capture
from dngd.optim.gradients import StepGradients
from dngd.optim.layers.base import CurvatureLayer
from tests.helpers.mutants import assert_caught

F64 = torch.float64
LOSSES = ("cross_entropy", "binary_cross_entropy", "squared_error")
D_IN, HIDDEN, OUT = 4, 3, 3


def make_net(seed: int = 0, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(D_IN, HIDDEN, bias=bias), nn.Tanh(), nn.Linear(HIDDEN, OUT, bias=bias)).double()


def make_rows(seed: int, n: int, d: int = D_IN) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=F64)


def make_labels(seed: int, n: int, loss: str = "cross_entropy") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if loss == "cross_entropy":
        return torch.randint(OUT, (n,), generator=generator)
    if loss == "binary_cross_entropy":
        return torch.randint(2, (n, OUT), generator=generator).double()
    return torch.randn(n, OUT, generator=generator, dtype=F64)


def seed_losses(z: Tensor, y: Tensor, loss: str) -> Tensor:
    """ℓ(z_s, y_s) of each seed, [n], by torch's own functions."""
    if loss == "cross_entropy":
        return F.cross_entropy(z, y, reduction="none")
    if loss == "binary_cross_entropy":
        return F.binary_cross_entropy_with_logits(z, y, reduction="none").sum(dim=1)
    return F.mse_loss(z, y, reduction="none").sum(dim=1)


def hessian(z: Tensor, loss: str) -> Tensor:
    """∇²_z ℓ at one seed's outputs, [C, C], by autograd; it does not depend on the label."""
    y = make_labels(0, 1, loss)
    out = torch.autograd.functional.hessian(lambda v: seed_losses(v[None], y, loss).sum(), z.detach())
    assert isinstance(out, Tensor)
    return out


def jacobian(outputs: Tensor, inputs: Tensor) -> Tensor:
    """∂outputs/∂inputs of one-dimensional outputs, [C, inputs.numel()], one backward a row."""
    rows = [torch.autograd.grad(o, inputs, retain_graph=True)[0].reshape(-1) for o in outputs]
    return torch.stack(rows)


def forward(net: nn.Sequential, x: Tensor, mixing: Tensor | None) -> tuple[list[Tensor], Tensor]:
    """Row outputs of both linear layers, and the seeds' outputs; mixing [n, r] makes seeds share hidden rows."""
    z1 = net[0](x)
    h = torch.tanh(z1)
    z2 = net[2](h if mixing is None else mixing @ h)
    return [z1, z2], z2


def exact_output_factors(
    net: nn.Sequential, x: Tensor, loss: str, mixing: Tensor | None = None, weights: Tensor | None = None
) -> list[Tensor]:
    """`G = (1/n) Σ_s w_s Σ_i (∂z_s/∂z_i)ᵀ ∇²ℓ (∂z_s/∂z_i)` of both layers: the GGN's own, seed by seed."""
    layers, z = forward(net, x, mixing)
    w = torch.ones(len(z), dtype=F64) if weights is None else weights
    out = []
    for rows in layers:
        total = torch.zeros(rows.shape[1], rows.shape[1], dtype=F64)
        for s in range(len(z)):
            block = jacobian(z[s], rows).view(z.shape[1], *rows.shape)
            total += w[s] * torch.einsum("cia,cd,dib->ab", block, hessian(z[s], loss), block)
        out.append(total / w.sum())
    return out


def dense_ggn(net: nn.Sequential, name: str, x: Tensor, loss: str) -> Tensor:
    """(1/n) Σ_s J_sᵀ ∇²ℓ J_s over vec[W | b], columns stacked: one layer's block of the GGN."""
    layer = net.get_submodule(name)
    total: Tensor | None = None
    for i in range(len(x)):
        z = net(x[i : i + 1])[0]
        blocks = [jacobian(z, p).view(len(z), *p.shape) for p in layer.parameters()]
        matrix = blocks[0] if len(blocks) == 1 else torch.cat([blocks[0], blocks[1][:, :, None]], dim=2)
        j = matrix.transpose(1, 2).reshape(len(z), -1)
        block = j.T @ hessian(z, loss) @ j
        total = block if total is None else total + block
    assert total is not None
    return total / len(x)


def measured(
    net: nn.Sequential,
    x: Tensor,
    y: Tensor,
    *,
    loss: str,
    mixing: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
    parts: int = 1,
    **options: Any,
) -> list[tuple[Tensor, Tensor]]:
    """(A, G) of both layers after one step over the batch in so many parts."""
    pre = KFACPreconditioner(net, loss=loss, loss_reduction=reduction, **options)
    net.zero_grad()
    w = torch.ones(len(y), dtype=F64) if weights is None else weights
    total = float(w.sum())
    for part in range(parts):
        chosen = slice(part * len(y) // parts, (part + 1) * len(y) // parts)
        _, z = forward(net, x[chosen] if mixing is None else x, None if mixing is None else mixing[chosen])
        pre.observe(z, weights=None if weights is None else w[chosen], key=part)
        value = (w[chosen] * seed_losses(z, y[chosen], loss)).sum()
        (value / total if reduction == "mean" else value).backward()
    assert pre.step(num_samples=total)
    factors = pre.factors()
    pre.close()
    return [(factors[name].A, factors[name].G) for name in ("0", "2")]


def same(found: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= tolerance * max(1e-12, float(expected.abs().max()))


def draws(
    net: nn.Sequential,
    x: Tensor,
    count: int,
    *,
    loss: str,
    mixing: Tensor | None = None,
    weights: Tensor | None = None,
    **options: Any,
) -> list[Tensor]:
    """G of both layers, [count, d, d], from so many independent draws."""
    pre = KFACPreconditioner(net, loss=loss, **options)
    _, z = forward(net, x, mixing)
    total = len(z) if weights is None else float(weights.sum())
    found: list[list[Tensor]] = [[], []]
    for key in range(count):
        pre.forget()
        _, z = forward(net, x, mixing)
        pre.observe(z, weights=weights, key=key)
        for store, layer in zip(found, pre.layers.values()):
            assert layer.pending is not None
            store.append(layer.g.dense(layer.pending.g) / total)
    pre.close()
    return [torch.stack(store) for store in found]


def assert_unbiased(sample: Tensor, expected: Tensor) -> None:
    """Every entry's mean lies within five standard errors of what is expected."""
    error = sample.std(dim=0) / len(sample) ** 0.5
    assert bool(((sample.mean(dim=0) - expected).abs() <= 5 * error + 1e-9).all())


# GGN


def law_ggn_is_exact(loss: str, reduction: str, parts: int, equal_rows: bool) -> None:
    """Seeds that share no rows: G exact in one draw, and A ⊗ G the dense GGN block where all rows are equal."""
    net, n = make_net(), 6
    x = make_rows(1, 1).expand(n, D_IN).contiguous() if equal_rows else make_rows(1, n)
    found = measured(net, x, make_labels(2, n, loss), loss=loss, fisher="ggn", reduction=reduction, parts=parts)
    hidden = torch.tanh(net[0](x)).detach()
    for (a, g), expected, rows, name in zip(found, exact_output_factors(net, x, loss), (x, hidden), ("0", "2")):
        m = torch.cat([rows, torch.ones(n, 1, dtype=F64)], dim=1)
        same(a, m.T @ m / n)
        same(g, expected)
        if equal_rows:
            same(torch.kron(a, g), dense_ggn(net, name, x, loss))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("reduction", "parts"), [("mean", 1), ("sum", 3)])
def test_ggn_is_exact(loss: str, reduction: str, parts: int) -> None:
    law_ggn_is_exact(loss, reduction, parts, equal_rows=True)
    law_ggn_is_exact(loss, reduction, parts, equal_rows=False)


@pytest.mark.parametrize("loss", LOSSES)
def test_mutant_missing_hessian_column_is_caught(loss: str) -> None:
    original = fisher.hessian_columns
    assert_caught(
        lambda: law_ggn_is_exact(loss, "mean", 1, equal_rows=False),
        capture,
        "hessian_columns",
        lambda outputs, kind: list(original(outputs, kind))[:-1],
    )


def law_ggn_is_unbiased(loss: str) -> None:
    """Seeds that share hidden rows: the random signs leave `Σ_s` in expectation, without cross terms."""
    net, x = make_net(3), make_rows(4, 5)
    mixing = torch.softmax(make_rows(5, 4, 5), dim=1)
    sample = draws(net, x, 400, loss=loss, mixing=mixing, fisher="ggn")
    for found, expected in zip(sample, exact_output_factors(net, x, loss, mixing)):
        assert_unbiased(found, expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_ggn_is_unbiased_where_seeds_share_rows(loss: str) -> None:
    law_ggn_is_unbiased(loss)


def test_mutant_equal_signs_are_caught() -> None:
    assert_caught(
        lambda: law_ggn_is_unbiased("squared_error"),
        capture,
        "random_signs",
        lambda count, generator: torch.ones(count, dtype=torch.int64),
    )


def law_outputs_of_different_rows() -> None:
    """An output need not depend on every row: A has the rows that any output reaches."""
    torch.manual_seed(0)
    layer = nn.Linear(D_IN, 1).double()
    first, second = make_rows(1, 5), make_rows(2, 5)
    pre = KFACPreconditioner(layer, fisher="ggn", loss="squared_error")
    z = torch.cat([layer(first), layer(second)], dim=1)
    pre.observe(z)
    z.square().sum(dim=1).mean().backward()
    pre.step(num_samples=5)
    (factors,) = pre.factors().values()
    m = torch.cat([torch.cat([first, second]), torch.ones(10, 1, dtype=F64)], dim=1)
    same(factors.A, m.T @ m / 10)
    same(factors.G, torch.full((1, 1), 2 * 2.0, dtype=F64))
    pre.close()


def test_outputs_of_different_rows() -> None:
    law_outputs_of_different_rows()

    def first_column_only(self: Tensor, other: Tensor) -> Tensor:
        return self

    assert_caught(law_outputs_of_different_rows, Tensor, "logical_or_", first_column_only)


# Monte-Carlo


def law_monte_carlo_is_the_ggn(loss: str, shared: bool) -> None:
    net, x = make_net(6), make_rows(7, 5)
    mixing = torch.softmax(make_rows(8, 4, 5), dim=1) if shared else None
    sample = draws(net, x, 500, loss=loss, mixing=mixing, fisher="monte_carlo")
    for found, expected in zip(sample, exact_output_factors(net, x, loss, mixing)):
        assert_unbiased(found, expected)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_monte_carlo_is_the_ggn_in_the_mean(loss: str, shared: bool) -> None:
    law_monte_carlo_is_the_ggn(loss, shared)


@pytest.mark.parametrize("loss", LOSSES)
def test_mutants_of_the_draw_are_caught(loss: str) -> None:
    def most_likely(outputs: Tensor, kind: str, generator: torch.Generator) -> Tensor:
        z = outputs.detach()
        if kind == "cross_entropy":
            return z.softmax(dim=1) - F.one_hot(z.argmax(dim=1), z.shape[1])
        if kind == "binary_cross_entropy":
            return z.sigmoid() - (z > 0).double()
        return 2 * torch.randn(z.shape, generator=generator, dtype=z.dtype)

    assert_caught(lambda: law_monte_carlo_is_the_ggn(loss, False), capture, "sampled_gradient", most_likely)


def test_draws_repeat() -> None:
    """Equal for an equal (seed, step, key), and another draw otherwise."""

    def draw(seed: int, step: int, key: int) -> list[Tensor]:
        net = make_net()
        pre = KFACPreconditioner(net, fisher="monte_carlo", seed=seed)
        pre.capture.start_step(step, True)
        pre.observe(net(make_rows(0, 40)), key=key)
        pre.close()
        return [layer.pending.g[0] for layer in pre.layers.values() if layer.pending is not None]

    base = draw(1, 2, 3)
    assert len(base) == 2
    assert all(torch.equal(a, b) for a, b in zip(base, draw(1, 2, 3)))
    for other in (draw(0, 2, 3), draw(1, 0, 3), draw(1, 2, 0)):
        assert not any(torch.equal(a, b) for a, b in zip(base, other))


def test_drawn_labels_follow_the_prediction() -> None:
    n, generator = 20_000, torch.Generator().manual_seed(0)
    z = torch.tensor([0.3, -1.0, 1.2], dtype=F64)
    p = z.softmax(dim=0)
    labels = (fisher.sampled_gradient(z.expand(n, 3), "cross_entropy", generator) < 0).double()
    assert torch.equal(labels.sum(dim=1), torch.ones(n, dtype=F64))
    assert bool(((labels.mean(dim=0) - p).abs() <= 5 * (p * (1 - p) / n).sqrt()).all())
    p = z.sigmoid()
    labels = p - fisher.sampled_gradient(z.expand(n, 3), "binary_cross_entropy", generator)
    assert bool(((labels.mean(dim=0) - p).abs() <= 5 * (p * (1 - p) / n).sqrt()).all())
    noise = fisher.sampled_gradient(z.expand(n, 3), "squared_error", generator)
    assert bool((noise.mean(dim=0).abs() <= 5 * (2 / n) ** 0.5).all())
    assert bool(((noise.square().mean(dim=0) - 2).abs() <= 5 * 2 * (2 / n) ** 0.5).all())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_outputs_that_are_not_finite_drop_the_step(loss: str, poison: float) -> None:
    """No label can be drawn from them, and no other row may notice."""
    net = make_net()
    pre = KFACPreconditioner(net, fisher="monte_carlo", loss=loss)
    x = make_rows(0, 4)
    x[1, 0] = poison
    z = net(x)
    pre.observe(z)
    spoiled = z * torch.tensor([1.0, poison, 1.0, 1.0], dtype=F64)[:, None]
    seed_losses(spoiled, make_labels(1, 4, loss), loss).mean().backward()
    assert not pre.step(num_samples=4)
    assert pre.dropped_steps == 1
    pre.close()


# Weights


def law_weights(fisher_kind: str, loss: str) -> None:
    """`n = Σ w`, each seed's Fisher times w; a weight of 0 is a seed that is not there, in A too."""
    net, n = make_net(9), 6
    x, y = make_rows(10, n), make_labels(11, n, loss)
    w = torch.tensor([0.5, 2.0, 0.0, 1.0, 0.0, 3.0], dtype=F64)
    expected = exact_output_factors(net, x, loss, weights=w)
    if fisher_kind == "ggn":
        found = measured(net, x, y, loss=loss, weights=w, fisher="ggn")
        for (_, g), exact in zip(found, expected):
            same(g, exact)
    else:
        for sample, exact in zip(draws(net, x, 500, loss=loss, weights=w, fisher="monte_carlo"), expected):
            assert_unbiased(sample, exact)
    kept = w > 0
    with_zeros = measured(net, x, y, loss=loss, weights=w, fisher="ggn")
    without = measured(net, x[kept], y[kept], loss=loss, weights=w[kept], fisher="ggn")
    for pair, other in zip(with_zeros, without):
        for a, b in zip(pair, other):
            same(a, b)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", ["ggn", "monte_carlo"])
def test_weights(kind: str, loss: str) -> None:
    law_weights(kind, loss)


def test_mutant_squared_weights_are_caught() -> None:
    """Weights of the losses go into the gradients squared."""
    original = Capture.observe

    def squared(self: Capture, outputs: Tensor, weights: Tensor | None, *rest: Any) -> None:
        original(self, outputs, None if weights is None else weights.square(), *rest)

    for kind in ("ggn", "monte_carlo"):
        assert_caught(lambda kind=kind: law_weights(kind, "cross_entropy"), Capture, "observe", squared)


def law_equal_weights_of_the_empirical_fisher(reduction: str) -> None:
    """All weights c: the same factors as without; c enters once, in n, not squared."""
    net, n = make_net(9), 6
    x, y = make_rows(10, n), make_labels(11, n)
    plain = measured(net, x, y, loss="cross_entropy", reduction=reduction)
    for c in (0.25, 3.0):
        w = torch.full((n,), c, dtype=F64)
        for pair, other in zip(plain, measured(net, x, y, loss="cross_entropy", weights=w, reduction=reduction)):
            for a, b in zip(pair, other):
                same(b, a)
    w = torch.tensor([2.0, 0.0, 2.0, 2.0, 0.0, 2.0], dtype=F64)
    kept = w > 0
    absent = measured(net, x[kept], y[kept], loss="cross_entropy", reduction=reduction)
    for pair, other in zip(absent, measured(net, x, y, loss="cross_entropy", weights=w, reduction=reduction)):
        for a, b in zip(pair, other):
            same(b, a)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_equal_weights_of_the_empirical_fisher(reduction: str) -> None:
    law_equal_weights_of_the_empirical_fisher(reduction)
    assert_caught(
        lambda: law_equal_weights_of_the_empirical_fisher(reduction), capture, "_uniform_weight", lambda weights: 1.0
    )


def test_weights_out_of_range() -> None:
    net = make_net()
    pre = KFACPreconditioner(net)
    z = net(make_rows(0, 3))
    with pytest.raises(UserError, match="monte_carlo"):
        pre.observe(z, weights=torch.tensor([1.0, 2.0, 1.0]))
    for weights in (torch.ones(2), torch.tensor([1.0, -1.0, 1.0]), torch.tensor([1.0, torch.nan, 1.0])):
        with pytest.raises(UserError, match="at least 0"):
            pre.observe(z, weights=weights)


# The user's own graph is left alone


@pytest.mark.parametrize("kind", ["monte_carlo", "ggn"])
def test_observe_touches_no_parameter(kind: str) -> None:
    """No `.grad`, no hook of a parameter or of its accumulation (DDP's), and backward afterwards as ever."""
    found = []
    for observed in (True, False):
        net = make_net()
        fired: list[str] = []
        for parameter in net.parameters():
            parameter.register_hook(lambda g, fired=fired: fired.append("gradient"))
            parameter.register_post_accumulate_grad_hook(lambda p, fired=fired: fired.append("accumulated"))
        pre = KFACPreconditioner(net, fisher=kind)
        z = net(make_rows(0, 5))
        if observed:
            pre.observe(z)
            assert fired == []
            assert all(p.grad is None for p in net.parameters())
        F.cross_entropy(z, make_labels(1, 5)).backward()
        assert len(fired) == 8
        found.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
        pre.close()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("kind", ["empirical", "monte_carlo", "ggn"])
def test_activation_in_place(kind: str) -> None:
    """ReLU(inplace=True) overwrites the layer's output: its own gradient is wanted, not the activation's."""
    found = []
    for inplace in (True, False):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Linear(D_IN, HIDDEN), nn.ReLU(inplace), nn.Linear(HIDDEN, OUT), nn.ELU(0.3, inplace)
        ).double()
        pre = KFACPreconditioner(net, fisher=kind)
        z = net(make_rows(1, 6))
        pre.observe(z)
        F.cross_entropy(z, make_labels(2, 6)).backward()
        pre.step(num_samples=6)
        found.append([t for pair in pre.factors().values() for t in pair])
        pre.close()
    for a, b in zip(*found, strict=True):
        same(a, b, 1e-13)


@pytest.mark.parametrize("kind", ["monte_carlo", "ggn"])
def test_observe_is_asked_for(kind: str) -> None:
    net = make_net()
    pre = KFACPreconditioner(net, fisher=kind)
    F.cross_entropy(net(make_rows(0, 5)), make_labels(1, 5)).backward()
    with pytest.raises(UserError, match="observe"):
        pre.step(num_samples=5)
    with pytest.raises(UserError, match="outputs of shape"):
        pre.observe(net(make_rows(0, 5)).detach())
    with pytest.raises(UserError, match="outputs of shape"):
        pre.observe(net(make_rows(0, 5)).sum(dim=1))


def test_zero_grad_between_forward_and_backward() -> None:
    """`zero_grad` right before backward is common: what was observed before it must not be lost in silence."""
    for kind in ("empirical", "monte_carlo", "ggn"):
        net = make_net()
        optimizer = NaturalGradient(net, fisher=kind)
        z = net(make_rows(0, 5))
        optimizer.zero_grad()
        optimizer.observe(z)
        F.cross_entropy(z, make_labels(1, 5)).backward()
        optimizer.step(num_samples=5)
        assert optimizer.preconditioner.states["0"].folded.counts.tolist() == [5, 5]
    optimizer.zero_grad()
    z = net(make_rows(0, 5))
    optimizer.observe(z)
    optimizer.zero_grad()
    F.cross_entropy(z, make_labels(1, 5)).backward()
    with pytest.raises(UserError, match="observe"):
        optimizer.step(num_samples=5)


# Micro-batches, reached rows, modules used twice


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_micro_batches_are_one_batch(reduction: str) -> None:
    """Exactly for the empirical Fisher and the GGN; Monte-Carlo draws other labels, of the same mean."""
    net, n = make_net(2), 8
    x, y = make_rows(3, n), make_labels(4, n)
    for kind in ("empirical", "ggn"):
        whole = measured(net, x, y, loss="cross_entropy", fisher=kind, reduction=reduction)
        parts = measured(net, x, y, loss="cross_entropy", fisher=kind, reduction=reduction, parts=4)
        for pair, other in zip(whole, parts):
            for a, b in zip(pair, other):
                same(b, a)
    sample = torch.stack(
        [
            measured(net, x, y, loss="cross_entropy", fisher="monte_carlo", reduction=reduction, parts=4, seed=s)[0][1]
            for s in range(150)
        ]
    )
    assert_unbiased(sample, exact_output_factors(net, x, "cross_entropy")[0])


def law_unreached_rows(kind: str) -> None:
    """Rows that no seed reaches are in no A, whichever way the rows are taken; n is the number of seeds."""
    net, rows, n = make_net(5), 9, 4
    seeds = torch.tensor([1, 3, 4, 8])
    y = make_labels(1, n)
    for as_constant in (True, False):
        x = make_rows(2, rows).requires_grad_(not as_constant)
        pre = KFACPreconditioner(net, fisher=kind)
        net.zero_grad()
        z = net(x)[seeds]
        pre.observe(z)
        F.cross_entropy(z, y).backward()
        pre.step(num_samples=n)
        m = torch.cat([x.detach()[seeds], torch.ones(n, 1, dtype=F64)], dim=1)
        same(pre.factors()["0"].A, m.T @ m / n)
        assert pre.states["2"].folded.counts.tolist() == [n, n]
        pre.close()


@pytest.mark.parametrize("kind", ["empirical", "monte_carlo", "ggn"])
def test_unreached_rows(kind: str) -> None:
    law_unreached_rows(kind)
    assert_caught(
        lambda: law_unreached_rows(kind),
        Capture,
        "_reached",
        lambda self, gradients: torch.ones(len(gradients), dtype=torch.bool),
    )


def law_used_twice(kind: str) -> None:
    """One module used twice: rows of both uses in A, gradients of both in G, n the number of seeds."""
    torch.manual_seed(0)
    layer = nn.Linear(HIDDEN, HIDDEN).double()
    x, y, n = make_rows(1, 6, HIDDEN), make_labels(2, 6), 6
    pre = KFACPreconditioner(layer, fisher=kind)
    first = layer(x)
    inputs = torch.tanh(first)
    second = layer(inputs)
    pre.observe(second)
    loss = F.cross_entropy(second, y)
    if kind == "empirical":
        gradients = [n * g for g in torch.autograd.grad(loss, [first, second], retain_graph=True)]
        g = sum((t.T @ t for t in gradients), torch.zeros(HIDDEN, HIDDEN, dtype=F64)) / n
        # autograd.grad ran the hooks of the layer's outputs too
        pre.forget()
    else:
        total = torch.zeros(HIDDEN, HIDDEN, dtype=F64)
        for s in range(n):
            for rows in (first, second):
                j = jacobian(second[s], rows).view(OUT, *rows.shape)[:, s]
                total += j.T @ hessian(second[s], "cross_entropy") @ j
        g = total / n
    loss.backward()
    pre.step(num_samples=n)
    assert list(pre.factors()) == [""]
    (factors,) = pre.factors().values()
    m = torch.cat([torch.cat([x, inputs.detach()]), torch.ones(2 * n, 1, dtype=F64)], dim=1)
    same(factors.A, m.T @ m / (2 * n))
    same(factors.G, g)
    pre.close()


@pytest.mark.parametrize("kind", ["empirical", "ggn"])
def test_used_twice(kind: str) -> None:
    law_used_twice(kind)
    original = CurvatureLayer.add

    def only_the_last(
        self: CurvatureLayer, rows: Tensor, gradients: Tensor, weight: float, *, with_inputs: bool
    ) -> None:
        self.pending = None
        original(self, rows, gradients, weight, with_inputs=with_inputs)

    assert_caught(lambda: law_used_twice(kind), CurvatureLayer, "add", only_the_last)


def law_seeds_that_miss_a_layer(zeros: bool) -> None:
    """A step whose seeds do not reach a layer at all is no step of its G, which is over the seeds of those that do.

    zeros: whether the layer has a gradient then, of zeros, or none. Of a step in which one seed reaches it all n count,
    `G = (1/n) Σ g gᵀ`, as laws above say.
    """

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(D_IN, OUT), nn.Linear(D_IN, OUT)

        def forward(self, x: Tensor, both: bool) -> Tensor:
            out: Tensor = self.a(x) + self.b(x) if both else self.a(x)
            return out

    torch.manual_seed(0)
    net = Branches().double()
    pre = KFACPreconditioner(net, factor_decay=0.5)
    gradients = []
    for both in (True, False):
        x, y = make_rows(int(both), 6), make_labels(int(both), 6)
        net.zero_grad(set_to_none=not zeros)
        z = net(x, both)
        F.cross_entropy(z, y).backward()
        gradients.append((z.softmax(dim=1) - F.one_hot(y, OUT)).detach())
        pre.step(num_samples=6)
    sums = [g.T @ g for g in gradients]
    net_factors = pre.factors()
    same(net_factors["a"].G, (0.5 * sums[0] + sums[1]) / 9)
    same(net_factors["b"].G, 0.5 * sums[0] / 3)
    pre.close()


@pytest.mark.parametrize("zeros", [True, False])
def test_seeds_that_miss_a_layer(zeros: bool) -> None:
    # The net moves between the two steps only through its gradients, which nobody applies.
    law = lambda: law_seeds_that_miss_a_layer(zeros)  # noqa: E731
    if zeros:
        assert_caught(law, StepGradients, "sizes", lambda self, layers: {})
    else:
        assert_caught(law, CurvatureLayer, "has_gradient", property(lambda layer: True))


# Shared weights


class Pooled(nn.Module):
    """[n, R, d] rows through one linear layer; `mean`: outputs averaged over R, otherwise every row has a label."""

    def __init__(self, mean: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.linear = nn.Linear(D_IN, OUT)
        self.mean = mean

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.linear(x)
        return z.mean(dim=1) if self.mean else z


def shared_rows(equal: bool) -> Tensor:
    return (
        make_rows(3, 1).expand(5 * 4, D_IN).reshape(5, 4, D_IN).contiguous()
        if equal
        else make_rows(3, 20).view(5, 4, D_IN)
    )


def shared_factors(
    x: Tensor, mean: bool, treatment: str, row_samples: Tensor | None = None
) -> tuple[Tensor, Tensor, Pooled]:
    net = Pooled(mean).double()
    pre = KFACPreconditioner(net, weight_sharing=treatment)
    z = net(x)
    if mean:
        F.cross_entropy(z, make_labels(6, 5)).backward()
    else:
        (F.cross_entropy(z.reshape(-1, OUT), make_labels(6, 20), reduction="sum") / 5).backward()
    pre.step(num_samples=5)
    (factors,) = pre.factors().values()
    pre.close()
    return factors.A, factors.G, net


def empirical_block(net: Pooled, x: Tensor, mean: bool) -> Tensor:
    """(1/n) Σ over independent terms (samples, or rows with labels of their own) of vec∇ vec∇ᵀ."""
    terms = []
    if mean:
        y = make_labels(6, 5)
        terms = [F.cross_entropy(net(x[s : s + 1]), y[s : s + 1]) for s in range(5)]
    else:
        y = make_labels(6, 20).view(5, 4)
        terms = [F.cross_entropy(net(x)[s, r][None], y[s, r][None]) for s in range(5) for r in range(4)]
    total = torch.zeros(OUT * (D_IN + 1), OUT * (D_IN + 1), dtype=F64)
    for term in terms:
        w, b = torch.autograd.grad(term, list(net.linear.parameters()))
        vec = torch.cat([w, b[:, None]], dim=1).T.reshape(-1)
        total += torch.outer(vec, vec)
    return total / 5


def law_reduce() -> None:
    """`A = (1/n) Σ m̄ m̄ᵀ`, `G = (1/n) Σ ĝ ĝᵀ`; exact where outputs are averaged over a sample's (equal) rows."""
    for equal in (True, False):
        x = shared_rows(equal)
        a, g, net = shared_factors(x, True, "reduce")
        m = torch.cat([x.mean(dim=1), torch.ones(5, 1, dtype=F64)], dim=1)
        z = net(x)
        ghat = (z.softmax(dim=1) - F.one_hot(make_labels(6, 5), OUT)).detach()
        same(a, m.T @ m / 5)
        same(g, ghat.T @ ghat / 5)
        if equal:
            same(torch.kron(a, g), empirical_block(net, x, True))


def law_expand() -> None:
    """`A = (1/r) Σ m mᵀ`, `G = (1/n) Σ g gᵀ` over all rows; exact where (equal) rows have losses of their own."""
    for equal in (True, False):
        x = shared_rows(equal)
        a, g, net = shared_factors(x, False, "expand")
        m = torch.cat([x.view(20, D_IN), torch.ones(20, 1, dtype=F64)], dim=1)
        gradients = (net(x).view(20, OUT).softmax(dim=1) - F.one_hot(make_labels(6, 20), OUT)).detach()
        same(a, m.T @ m / 20)
        same(g, gradients.T @ gradients / 5)
        if equal:
            same(torch.kron(a, g), empirical_block(net, x, False))


def test_reduce() -> None:
    law_reduce()
    original = capture._merged_rows
    assert_caught(law_reduce, capture, "_merged_rows", lambda rows, samples: original(2 * rows, samples))


def test_expand() -> None:
    law_expand()
    assert_caught(law_expand, capture.Capture, "_reached", lambda self, gradients: torch.arange(len(gradients)) < 5)


def law_row_samples() -> None:
    """Two-dimensional rows are merged by `row_samples` as if they came as [n, R, d], in any order and of any size."""
    x, y = make_rows(3, 20), make_labels(6, 3)
    samples = torch.tensor([0, 2, 1, 0, 2, 2, 1, 0, 2, 1, 0, 0, 2, 1, 1, 2, 2, 2, 0, 1])
    torch.manual_seed(1)
    net = nn.Linear(D_IN, OUT).double()
    pre = KFACPreconditioner(net, weight_sharing="reduce")
    mean = torch.zeros(3, 20, dtype=F64)
    mean[samples, torch.arange(20)] = 1.0
    mean /= mean.sum(dim=1, keepdim=True)
    z = mean @ net(x)
    pre.observe(z, row_samples=samples)
    F.cross_entropy(z, y).backward()
    pre.step(num_samples=3)
    (factors,) = pre.factors().values()
    m = torch.cat([mean @ x, torch.ones(3, 1, dtype=F64)], dim=1)
    ghat = (z.softmax(dim=1) - F.one_hot(y, OUT)).detach()
    same(factors.A, m.T @ m / 3)
    same(factors.G, ghat.T @ ghat / 3)
    pre.close()


def test_row_samples() -> None:
    law_row_samples()
    assert_caught(law_row_samples, Capture, "_samples_of", lambda self, layer, gradient: None)


# The published code's variant


def law_paper(reduction: str, factor_samples: float | None) -> None:
    """`G = (1/n) Σ (d_g ĝ)(d_g ĝ)ᵀ`, ĝ of the mean loss; `A = (1/n) Σ m mᵀ` over all rows; n = factor_samples."""
    net, rows = make_net(4), 9
    x, seeds = make_rows(5, rows), torch.tensor([0, 2, 3, 7])
    y = make_labels(6, len(seeds))
    pre = KFACPreconditioner(net, variant="paper", loss_reduction=reduction)
    (z1, z2), _ = forward(net, x, None)
    mean = F.cross_entropy(z2[seeds], y)
    ghats = torch.autograd.grad(mean, [z1, z2], retain_graph=True)
    pre.forget()
    (mean if reduction == "mean" else 4 * mean).backward()
    pre.step(num_samples=4, factor_samples=factor_samples)
    n = 4 if factor_samples is None else factor_samples
    factors = pre.factors()
    for name, inputs, ghat in zip(("0", "2"), (x, torch.tanh(z1).detach()), ghats):
        m = torch.cat([inputs, torch.ones(rows, 1, dtype=F64)], dim=1)
        scaled = ghat.shape[1] * ghat
        same(factors[name].A, m.T @ m / n)
        same(factors[name].G, scaled.T @ scaled / n)
    pre.close()


@pytest.mark.parametrize("factor_samples", [None, 6.5])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_paper(reduction: str, factor_samples: float | None) -> None:
    law_paper(reduction, factor_samples)
    assert_caught(
        lambda: law_paper(reduction, factor_samples),
        Capture,
        "_reached",
        lambda self, gradients: (gradients != 0).any(dim=1),
    )


# Rows drawn


def law_max_rows(kind: str) -> None:
    """Sums over drawn rows have the whole's mean, and their counts are right."""
    net, rows, seeds = make_net(7), 12, torch.tensor([0, 1, 2, 3, 5, 6, 8, 9])
    x = make_rows(8, rows)
    y = make_labels(9, len(seeds))

    def sums(max_rows: int | None, seed: int) -> list[Tensor]:
        pre = KFACPreconditioner(net, fisher=kind, max_rows=max_rows, seed=seed)
        net.zero_grad()
        z = net(x)[seeds]
        pre.observe(z)
        F.cross_entropy(z, y, reduction="sum").backward()
        out = []
        for layer in pre.layers.values():
            assert layer.pending is not None
            out += [layer.a.dense(layer.pending.a), layer.g.dense(layer.pending.g), layer.pending.counts[:1].clone()]
        pre.close()
        return out

    whole = sums(None, 0)
    assert float(whole[2]) == len(seeds)
    assert all(torch.equal(a, b) for a, b in zip(whole, sums(rows, 3)))
    sample = [sums(5, seed) for seed in range(300)]
    for i, expected in enumerate(whole):
        assert_unbiased(torch.stack([s[i] for s in sample]), expected)


@pytest.mark.parametrize("kind", ["empirical", "ggn"])
def test_max_rows(kind: str) -> None:
    law_max_rows(kind)


@pytest.mark.parametrize("kind", ["empirical", pytest.param("ggn", marks=pytest.mark.slow)])
def test_mutants_of_the_row_draw_are_caught(kind: str) -> None:
    original = Capture._choose

    def unweighted(self: Capture, layer: CurvatureLayer, num_rows: int) -> tuple[Tensor | None, float]:
        return original(self, layer, num_rows)[0], 1.0

    def the_first(self: Capture, layer: CurvatureLayer, num_rows: int) -> tuple[Tensor | None, float]:
        chosen, weight = original(self, layer, num_rows)
        return None if chosen is None else torch.arange(len(chosen)), weight

    for mutant in (unweighted, the_first):
        assert_caught(lambda: law_max_rows(kind), Capture, "_choose", mutant)


def test_a_drawn_row_goes_with_its_gradient() -> None:
    """A and G are sums over the same drawn rows: with row i's input and gradient both a multiple of e_i, they show."""
    n = 8
    layer = nn.Linear(n, n, bias=False).double()
    pre = KFACPreconditioner(layer, max_rows=3, loss_reduction="sum")
    z = layer(torch.eye(n, dtype=F64).requires_grad_())
    (z * torch.eye(n, dtype=F64)).sum().backward()
    (found,) = pre.layers.values()
    assert found.pending is not None
    a, g = found.a.dense(found.pending.a), found.g.dense(found.pending.g)
    same(a, g)
    assert sorted(a.diagonal().tolist()) == pytest.approx([0] * 5 + [8 / 3] * 3)
    pre.close()


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["empirical", "ggn"]), st.sampled_from(["mean", "sum"]), st.booleans())
def test_reduction_does_not_matter(seed: int, kind: str, reduction: str, bias: bool) -> None:
    """Mean and sum of the losses have the same factors, which are the sum's own averages."""
    net = make_net(seed, bias)
    x, y = make_rows(seed, 5), make_labels(seed, 5)
    found = measured(net, x, y, loss="cross_entropy", fisher=kind, reduction=reduction)
    if kind == "ggn":
        expected = exact_output_factors(net, x, "cross_entropy")
    else:
        layers, z = forward(net, x, None)
        gradients = torch.autograd.grad(F.cross_entropy(z, y, reduction="sum"), layers)
        expected = [g.T @ g / 5 for g in gradients]
    for (_, g), exact in zip(found, expected):
        same(g, exact)
