"""All of a model's parameters at once: the same numbers one by one and in few kernels, and of the formula."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dngd.optim import NaturalGradient, foreach
from dngd.optim.foreach import add_together, average_into, scale_together, scaled, step_along


def several(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in ((3, 4), (5,), (1, 1))]


@pytest.fixture(params=[False, True], ids=["one by one", "few kernels"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreach, "_in_few_kernels", lambda tensors: request.param)


@pytest.mark.usefixtures("way")
def test_each_formula() -> None:
    gradients, means, scales = several(0), several(1), [2.0, 0.5, -1.0]
    expected_means = [0.9 * m + 0.3 * g for m, g in zip(means, gradients)]
    average_into(gradients, means, 0.9, 0.3, scales)
    for gradient, mean, expected, scale in zip(gradients, means, expected_means, scales):
        assert torch.allclose(mean, expected)
        assert torch.allclose(gradient, scale * expected)
    parameters = [nn.Parameter(t) for t in several(2)]
    before = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        step_along(parameters, gradients, 0.1, 0.2)
    for parameter, old, update in zip(parameters, before, gradients):
        assert torch.allclose(parameter, 0.98 * old - 0.1 * update)
    for tensor, out in zip(gradients, scaled(gradients, torch.tensor(0.25))):
        assert torch.equal(out, tensor / 4)
    tensors, others = several(3), several(4)
    expected = [3.0 * tensor + other for tensor, other in zip(tensors, others)]
    scale_together(tensors, 3.0)
    add_together(tensors, others)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(tensors, expected))


def train(update: str, momentum: float) -> list[Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 3))
    x, y = torch.randn(32, 6), torch.randint(3, (32,))
    optimizer = NaturalGradient(net, update=update, momentum=momentum, weight_decay=1e-2)  # type: ignore[arg-type]
    for _ in range(12):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step(num_samples=32)
    return [p.detach() for p in net.parameters()]


def test_a_parameter_without_a_gradient_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the others of its layer take their own step, not one of another's gradient."""
    torch.manual_seed(0)
    for way in (lambda tensors: False, lambda tensors: True):
        monkeypatch.setattr(foreach, "_in_few_kernels", way)
        net = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))
        norm = net[1]
        assert isinstance(norm, nn.LayerNorm)
        optimizer = NaturalGradient(net, update="adam_eigenbasis", momentum=0.9)
        weight, bias = norm.weight.detach().clone(), norm.bias.detach().clone()
        nn.functional.cross_entropy(net(torch.randn(32, 6)), torch.randint(3, (32,))).backward()  # type: ignore[no-untyped-call]
        norm.weight.grad = None
        optimizer.step(num_samples=32)
        assert torch.equal(norm.weight, weight)
        assert not torch.equal(norm.bias, bias)


@pytest.mark.parametrize(("update", "momentum"), [("mean_gradient", 0.9), ("momentum", 0.9), ("momentum", 0.0)])
def test_training_is_bitwise_the_same_either_way(monkeypatch: pytest.MonkeyPatch, update: str, momentum: float) -> None:
    way: Callable[[list[Tensor]], bool]
    found = []
    for way in (lambda tensors: False, lambda tensors: True):
        monkeypatch.setattr(foreach, "_in_few_kernels", way)
        found.append(train(update, momentum))
    assert all(torch.equal(a, b) for a, b in zip(*found))
