"""ReLU with dropout: the law of torch's own, from fewer random bits."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from dngd.errors import UserError
from dngd.models import activation
from dngd.models.activation import relu_dropout


def draw(p: float, seed: int = 0, shape: tuple[int, int] = (600, 700)) -> torch.Tensor:
    torch.manual_seed(seed)
    return relu_dropout(torch.ones(shape, dtype=torch.float64), p, training=True)


@pytest.mark.parametrize("p", [0.5, 0.25, 0.75, 0.1, 0.3, 0.9])
def test_each_element_is_dropped_with_probability_p(p: float) -> None:
    out = draw(p)
    n = out.numel()
    spread = math.sqrt(p * (1 - p) / n)
    assert abs(float((out == 0).double().mean()) - p) < 4 * spread
    kept = out[out > 0]
    assert torch.all(kept == kept[0])
    # Unbiased with the rounded p too.
    bits, dropped = activation._threshold(p)
    assert float(kept[0]) == pytest.approx(1 / (1 - dropped / 2**bits), rel=1e-12)
    assert abs(dropped / 2**bits - p) <= 2**-17
    # Rows and columns alike, and neighbours independent.
    zero = (out == 0).double() - p
    for axis in (0, 1):
        assert float(zero.mean(axis).abs().max()) < 6 * math.sqrt(p * (1 - p) / out.shape[axis])
    flat = zero.flatten()
    for lag in (1, 7, 8, 64, 700):
        assert abs(float((flat[lag:] * flat[:-lag]).mean())) < 5 * p * (1 - p) / math.sqrt(n)


@pytest.mark.parametrize("p", [-0.2, 1.0, 1.5, math.nan])
def test_what_is_no_probability_is_refused(p: float) -> None:
    with pytest.raises(UserError, match="at least 0 and below 1"):
        relu_dropout(torch.ones(3), p, training=True)


def test_blocks_do_not_repeat_each_other() -> None:
    out = draw(0.5, shape=(2, activation._BLOCK_ELEMENTS))
    assert abs(float(((out[0] > 0) == (out[1] > 0)).double().mean()) - 0.5) < 0.01


def test_torchs_seed_rules_it() -> None:
    assert torch.equal(draw(0.5, seed=1), draw(0.5, seed=1))
    assert not torch.equal(draw(0.5, seed=1), draw(0.5, seed=2))
    torch.manual_seed(3)
    one = relu_dropout(torch.ones(64), 0.5, True)
    two = relu_dropout(torch.ones(64), 0.5, True)
    assert not torch.equal(one, two)


@pytest.mark.parametrize("p", [0.5, 0.3])
def test_gradient_is_that_of_the_kept_positive_elements(p: float) -> None:
    values = torch.randn(50, 40, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(50, 40, dtype=torch.float64)
    out = relu_dropout(values, p, True)
    (gradient,) = torch.autograd.grad(out, values, upstream)
    mask = (out > 0).double()
    scale = float((out[out > 0] / values[out > 0]).detach().mean())
    torch.testing.assert_close(out.detach(), values.detach() * mask * scale)
    torch.testing.assert_close(gradient, upstream * mask * scale)
    assert float(mask[values > 0].mean()) == pytest.approx(1 - p, abs=0.08)


@pytest.mark.parametrize("training", [True, False])
def test_without_dropout_it_is_relu(training: bool) -> None:
    values = torch.randn(9, 5)
    assert torch.equal(relu_dropout(values, 0.0 if training else 0.5, training), F.relu(values))


def test_not_a_number_comes_through() -> None:
    out = relu_dropout(torch.tensor([[float("nan"), 1.0]] * 8), 0.5, True)
    assert out[:, 0].isnan().all()
    assert out[:, 1].isfinite().all()


def test_shapes_dtypes_and_strides() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        values = torch.randn(7, 6, dtype=dtype).t().requires_grad_()
        out = relu_dropout(values, 0.5, True)
        assert (out.shape, out.dtype) == (values.shape, dtype)
        out.sum().backward()
        assert values.grad is not None
        assert values.grad.shape == values.shape
    assert relu_dropout(torch.empty(0, 4), 0.5, True).shape == (0, 4)
    assert float(relu_dropout(torch.ones(1000), 1 - 1e-7, True).sum()) >= 0
