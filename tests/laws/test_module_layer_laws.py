"""Embeddings and normalisations against dense algebra, and the mistakes that the laws catch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch_geometric import nn as pyg

from dngd.curvature import Dense, Diagonal
from dngd.optim.layers import base, normalization
from dngd.optim.layers.embedding import EmbeddingLayer
from tests.helpers.layers import close, features, randomised, read_loss, start
from tests.helpers.mutants import assert_caught

pytestmark = pytest.mark.usefixtures("one_thread")


def embedding_case(seed: int, *, padding: bool) -> tuple[nn.Embedding, Tensor]:
    module = nn.Embedding(7, 3, padding_idx=2 if padding else None, dtype=torch.float64)
    return module, torch.randint(7, (5, 4), generator=torch.Generator().manual_seed(seed))


def law_embedding_is_linear_on_one_hot_rows(seed: int, padding: bool) -> None:
    """A, G, gradient and EKFAC's scales are those of `Z = onehot(v) E`; padding rows do not exist."""
    module, index = embedding_case(seed, padding=padding)
    (layer,), _ = start(module)
    assert isinstance(layer, EmbeddingLayer)
    assert isinstance(layer.a, Diagonal)
    q = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))[0]
    layer.basis = ((torch.ones(7, dtype=torch.float64),), (q, torch.ones(3, dtype=torch.float64)))
    out = module(index)
    read_loss(out).backward()

    z = out.detach().reshape(-1, 3).requires_grad_()
    (g,) = torch.autograd.grad(read_loss(z), z)
    kept = g.abs().sum(1) > 0
    if padding:
        kept &= index.reshape(-1) != 2
    one_hot = F.one_hot(index.reshape(-1), 7).double()[kept]
    g = g[kept]
    assert layer.pending is not None
    assert layer.pending_scales is not None
    assert close(layer.a.dense(layer.pending.a), one_hot.T @ one_hot)
    assert close(layer.g.dense(layer.pending.g), g.T @ g)
    assert float(layer.pending.counts[0]) == len(g)
    assert close(layer.pending_scales, ((g @ q) ** 2).T @ one_hot)
    assert close(layer.gradient(), g.T @ one_hot)
    value = torch.arange(21.0, dtype=torch.float64).view(3, 7)
    layer.set_gradient(value)
    assert module.weight.grad is not None
    assert close(module.weight.grad, value.T)


@given(seed=st.integers(0, 1000), padding=st.booleans())
@settings(max_examples=15, deadline=None)
def test_embedding_is_linear_on_one_hot_rows(seed: int, padding: bool) -> None:
    law_embedding_is_linear_on_one_hot_rows(seed, padding)


@pytest.mark.parametrize(
    "options", [{"sparse": True}, {"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"_freeze": True}], ids=str
)
def test_embeddings_that_are_left_over(options: dict[str, Any]) -> None:
    layers, _ = start(nn.ModuleDict({"e": nn.Embedding(4, 2, **options), "l": nn.Linear(2, 2)}))
    assert [layer.name for layer in layers] == ["l"]


def test_embedding_draws_of_rows_are_weighted() -> None:
    """Half of the rows are measured, each for two: the number of rows stays, and so does the shape of everything."""
    module, index = embedding_case(0, padding=False)
    (layer,), _ = start(module, max_rows=10)
    module(index).sum().backward()
    assert layer.pending is not None
    assert float(layer.pending.counts[0]) == 20
    assert float(layer.pending.a[0].sum()) == 20


def test_merged_samples_leave_embeddings_apart() -> None:
    """reduce merges a sample's rows of scale and shift (their gradient is the sum), never one-hot rows."""
    module, index = embedding_case(3, padding=False)
    net = nn.Sequential(module, nn.LayerNorm(3)).double()
    factors = {}
    for sharing in ("expand", "reduce"):
        layers, _ = start(net, weight_sharing=sharing)
        net(index).pow(3).sum().backward()
        for layer in layers:
            assert layer.pending is not None
            factors[sharing, layer.kind] = (layer.a.dense(layer.pending.a), layer.pending.counts[0].clone())
            layer.remove()
    assert torch.equal(factors["expand", "embedding"][0], factors["reduce", "embedding"][0])
    assert float(factors["expand", "normalization"][1]) == index.numel()
    assert float(factors["reduce", "normalization"][1]) == len(index)


def batch_norm(x: Tensor) -> Tensor:
    return (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()


def row_norm(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()


def law_norms_rows_are_scale_and_shift(
    make: Callable[[], nn.Module],
    shape: tuple[int, ...],
    by_row: Callable[[Tensor], Tensor],
    normalized: Any,
    last: int,
) -> None:
    """`u_i = [g ∘ x̂ | g]`: `[∇γ | ∇β] = Σ u`, `S_G = Σ u uᵀ` (the Fisher itself for a seed a row), `A = [1]`."""
    module = randomised(make())
    module.train()
    state = {k: v.clone() for k, v in module.state_dict().items()}
    x = torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 2 + 1
    (layer,), _ = start(module)
    out = module(x)
    moved = {k: v.clone() for k, v in module.state_dict().items()}
    read_loss(by_row(out)).backward()
    assert all(torch.equal(v, moved[k]) for k, v in module.state_dict().items()), "running statistics were touched"
    assert all(k in state for k in moved)

    x_hat = normalized(by_row(x).reshape(-1, last))
    inner = module.module if hasattr(module, "module") else module
    gamma, beta = (torch.as_tensor(p).detach().reshape(-1) for p in (inner.weight, inner.bias))
    z = (x_hat * gamma + beta).requires_grad_()
    assert close(z.detach(), by_row(out).detach().reshape(-1, last)), "the reference is of another layer"
    (g,) = torch.autograd.grad(read_loss(z), z)
    u = torch.cat([g * x_hat, g], dim=1)
    assert layer.pending is not None
    assert close(layer.g.dense(layer.pending.g), u.T @ u)
    assert float(layer.a.dense(layer.pending.a)) == float(layer.pending.counts[0]) == int((u != 0).any(1).sum())
    assert close(layer.gradient(), u.sum(0)[:, None])
    value = torch.arange(1.0, 2 * last + 1, dtype=torch.float64)[:, None]
    layer.set_gradient(value)
    assert inner.weight.grad is not None
    assert inner.bias.grad is not None
    assert close(torch.cat([inner.weight.grad.reshape(-1), inner.bias.grad.reshape(-1)])[:, None], value)


NORMS: dict[str, tuple[Any, ...]] = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(4), (9, 4), lambda t: t, batch_norm, 4),
    "BatchNorm1d over positions": (lambda: nn.BatchNorm1d(4), (5, 4, 3), lambda t: t.movedim(1, -1), batch_norm, 4),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(3), (4, 3, 2, 2), lambda t: t.movedim(1, -1), batch_norm, 3),
    "PyG BatchNorm": (lambda: pyg.BatchNorm(4), (9, 4), lambda t: t, batch_norm, 4),
    "LayerNorm": (lambda: nn.LayerNorm(4), (9, 4), lambda t: t, row_norm, 4),
    "LayerNorm over two": (lambda: nn.LayerNorm((2, 3)), (9, 2, 3), lambda t: t.flatten(1), row_norm, 6),
    "PyG LayerNorm": (lambda: pyg.LayerNorm(4, mode="node"), (9, 4), lambda t: t, row_norm, 4),
}


@pytest.mark.parametrize("kind", NORMS)
def test_norms_rows_are_scale_and_shift(kind: str) -> None:
    law_norms_rows_are_scale_and_shift(*NORMS[kind])


def test_batch_norm_in_eval_mode_uses_running_statistics() -> None:
    module = randomised(nn.BatchNorm1d(4))
    module.running_mean += 0.7
    module.running_var *= 2.0
    module.eval()
    (layer,), _ = start(module)
    x = features(6).detach()
    read_loss(module(x)).backward()
    assert layer.pending is not None
    x_hat = (x - 0.7) / (2.0 + 1e-5) ** 0.5
    z = (x_hat * module.weight + module.bias).detach().requires_grad_()
    (g,) = torch.autograd.grad(read_loss(z), z)
    u = torch.cat([g * x_hat, g], dim=1)
    assert close(layer.g.dense(layer.pending.g), u.T @ u)
    assert close(layer.gradient(), u.sum(0)[:, None])


def test_wide_norms_and_norms_without_parameters() -> None:
    assert isinstance(start(nn.LayerNorm(128))[0][0].g, Dense)
    assert isinstance(start(nn.LayerNorm(129))[0][0].g, Diagonal)
    shift = nn.LayerNorm(4)
    shift.weight.requires_grad_(False)
    assert start(shift)[0][0].g.dimension == 4
    for silent in (nn.LayerNorm(4, elementwise_affine=False), nn.BatchNorm1d(4, affine=False), pyg.LayerNorm(4)):
        layers, _ = start(nn.ModuleDict({"norm": silent, "l": nn.Linear(2, 2)}))
        assert [layer.name for layer in layers] == ["l"]


@pytest.mark.parametrize(
    ("target", "attribute", "replacement"),
    [
        (EmbeddingLayer, "gradients", lambda self, payload, gradient: gradient),
        (EmbeddingLayer, "set_gradient", lambda self, value: self.weight.grad.copy_(value.reshape(7, 3))),
        (EmbeddingLayer, "_add_scales", lambda self, scales: base.CurvatureLayer._add_scales(self, scales.sqrt())),
    ],
)
def test_mutants_of_embeddings(target: Any, attribute: str, replacement: Any) -> None:
    assert_caught(lambda: law_embedding_is_linear_on_one_hot_rows(1, True), target, attribute, replacement)


@pytest.mark.parametrize("kind", ["BatchNorm1d", "BatchNorm2d", "LayerNorm over two"])
def test_mutant_norm_of_the_raw_input(kind: str) -> None:
    law = lambda: law_norms_rows_are_scale_and_shift(*NORMS[kind])  # noqa: E731
    assert_caught(law, normalization.NormalizationLayer, "_normalized", lambda self, payload: payload.x)
