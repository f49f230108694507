"""A layer against a dense reference: small graphs, what is captured from a module, and what it should have been."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dngd.curvature import FactorLayout
from dngd.optim.capture import Capture
from dngd.optim.layers import CurvatureLayer, find_layers

Get = Callable[[nn.Parameter], Tensor]


N, D_IN, D_OUT = 9, 4, 3


def features(seed: int, rows: int = N, width: int = D_IN) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def edges(seed: int, num_edges: int = 20) -> Tensor:
    """Directed edges without self loops; duplicates can happen, and nodes without any."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.randint(N, (num_edges,), generator=generator)
    return torch.stack([source, (source + torch.randint(1, N, (num_edges,), generator=generator)) % N])


def adjacency(edge_index: Tensor, weight: Tensor | None = None, rows: int = N, columns: int = N) -> Tensor:
    """Dense [targets, sources], weights of parallel edges added up."""
    out = torch.zeros(rows, columns, dtype=torch.float64)
    for k in range(edge_index.shape[1]):
        out[edge_index[1, k], edge_index[0, k]] += 1.0 if weight is None else weight[k]
    return out


def with_ones(rows: Tensor) -> Tensor:
    return torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)


def randomised(model: nn.Module, seed: int = 0) -> Any:
    """The model in float64, no parameter at zero."""
    model = model.double()
    torch.manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


def weight_of(parameter: nn.Parameter) -> Tensor:
    return parameter.detach()


def grad_of(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


@dataclass
class Case:
    """A module whose layer `name` should be `Z = rows(x) · matrixᵀ`, the output being after(Z).

    call: x -> output. rows: x -> [r, d_a], the ones column included, made by hand. matrix: assembles
    [d_g, d_a] from whatever `get` takes of a parameter. blocks: sizes of A's blocks, () for one.
    """

    name: str
    model: nn.Module
    x: Tensor
    call: Callable[[Tensor], Tensor]
    rows: Callable[[Tensor], Tensor]
    matrix: Callable[[Get], Tensor]
    after: Callable[[Tensor], Tensor] = lambda z: z
    blocks: tuple[int, ...] = ()


def start(model: nn.Module, layout: FactorLayout | None = None, **options: Any) -> tuple[list[CurvatureLayer], Capture]:
    """Return the model's layers and their capture, ready for a measured step."""
    settings: dict[str, Any] = {
        "fisher": "empirical",
        "loss": "cross_entropy",
        "weight_sharing": "expand",
        "max_rows": None,
        "seed": 0,
        "loss_scale": None,
    }
    capture = Capture(**(settings | options))
    layers, _ = find_layers(model, capture, layout or FactorLayout())
    capture.start_step(0, True)
    return layers, capture


def read_loss(output: Tensor) -> Tensor:
    """A summed loss that reads about two rows in three, with a different gradient in each."""
    flat = output.reshape(-1, output.shape[-1])
    chosen = torch.arange(flat.shape[0]) % 3 != 1
    factor = torch.linspace(0.5, 1.7, flat.numel(), dtype=flat.dtype).view_as(flat)
    return (torch.tanh(flat * factor)[chosen]).sum() + (flat[chosen] ** 2).sum() / 3


def close(actual: Tensor | None, expected: Tensor) -> bool:
    return (
        actual is not None
        and actual.shape == expected.shape
        and torch.allclose(actual, expected, rtol=1e-9, atol=1e-11)
    )


def law_layer_equals_its_dense_reference(case: Case) -> None:
    """Z, gradient, A and G are those of dense algebra: `∇ = Σ g mᵀ`, `S_A = Σ m mᵀ`, `S_G = Σ g gᵀ`, round trip."""
    case.model.zero_grad()
    layers, _ = start(case.model)
    (layer,) = [layer for layer in layers if layer.name == case.name]
    output = case.call(case.x)
    read_loss(output).backward()

    rows = case.rows(case.x).detach()
    z = (rows @ case.matrix(weight_of).T).requires_grad_()
    expected_output = case.after(z)
    assert close(output.detach(), expected_output.detach()), "the reference is of another layer"
    (g,) = torch.autograd.grad(read_loss(expected_output), z)

    reached = g.abs().sum(dim=1) > 0
    assert 0 < int(reached.sum()) < len(g)
    a = rows[reached].T @ rows[reached]
    if case.blocks:
        assert sum(case.blocks) == a.shape[0]
        a = a * torch.block_diag(*(a.new_ones(size, size) for size in case.blocks))
    assert layer.pending is not None
    assert close(layer.a.dense(layer.pending.a), a)
    assert close(layer.g.dense(layer.pending.g), g.T @ g)
    assert float(layer.pending.counts[0]) == int(reached.sum())

    assert close(layer.gradient(), g.T @ rows)
    assert close(case.matrix(grad_of), g.T @ rows)
    value = torch.arange(1.0, g.shape[1] * rows.shape[1] + 1, dtype=g.dtype).view(g.shape[1], -1)
    layer.set_gradient(value)
    assert close(layer.gradient(), value)
    assert close(case.matrix(grad_of), value)
    for other in layers:
        other.remove()


def assert_sums_make_the_gradient(net: nn.Module, run: Callable[[], Tensor]) -> None:
    """Assert `Σ g_i m_iᵀ = ∇` over the rows and gradients that each layer was given, whatever they are."""
    layers, _ = start(net)
    sums: dict[str, Tensor] = {}
    for layer in layers:

        def add(rows: Tensor, gradients: Tensor, weight: float, *, with_inputs: bool, layer: Any = layer) -> None:
            product = gradients.T @ (with_ones(rows) if layer.has_ones else rows)
            sums[layer.name] = sums.get(layer.name, 0.0) + product

        layer.add = add  # type: ignore[method-assign]
    read_loss(run()).backward()
    assert sums
    for layer in layers:
        assert torch.allclose(sums[layer.name], layer.gradient(), rtol=1e-9, atol=1e-11), layer.name


def law_kronecker_is_the_fisher_of_one_seed(case: Case) -> None:
    """With one seed read, one row is reached: `A ⊗ G = vec(∇) vec(∇)ᵀ`, the Fisher block itself."""
    (layer,), _ = start(case.model, FactorLayout(split_inputs=False))
    case.call(case.x)[4].pow(2).sum().backward()
    gradient = layer.gradient()
    assert layer.pending is not None
    assert gradient is not None
    vec = gradient.T.reshape(-1)
    block = torch.kron(layer.a.dense(layer.pending.a), layer.g.dense(layer.pending.g))
    assert torch.allclose(block, torch.outer(vec, vec), rtol=1e-9, atol=1e-12)
