"""Rows kept as their entries: products, parts and gradients against the same rows with their zeros."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dngd.curvature import FactorLayout
from dngd.models import RowsLinear, SparseRows
from dngd.optim import NaturalGradient
from dngd.sampling.sparse_features import sparse_table


def few_entries(rows: int, width: int, seed: int = 0, share: float = 0.2) -> Tensor:
    """Some entries not zero; among them whole rows and columns of zeros, as there is room."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(rows, width, generator=generator)
    dense *= torch.rand(rows, width, generator=generator) < share
    dense[rows // 2 :: 5] = 0
    dense[:, width // 2 :: 7] = 0
    return dense


@given(st.integers(0, 12), st.integers(1, 9), st.integers(0, 1000), st.sampled_from([0.0, 0.3, 1.0]))
@settings(max_examples=60, deadline=None)
def test_entries_stand_for_the_whole(rows: int, width: int, seed: int, share: float) -> None:
    dense = few_entries(rows, width, seed, share)
    kept = sparse_table(dense)
    assert kept.shape == dense.shape
    assert kept.values.numel() == int((dense != 0).sum())
    assert torch.equal(kept.dense(), dense)
    generator = torch.Generator().manual_seed(seed)
    places = torch.randint(0, max(rows, 1), (5 if rows else 0,), generator=generator)  # some of them twice
    assert torch.equal(kept.dense(places), dense[places])
    assert torch.equal(kept[places].dense(), dense[places])
    assert torch.equal(kept[1:4].dense(), dense[1:4])
    assert torch.equal(kept[4:1].dense(), dense[4:1])
    assert torch.equal(kept.transposed().dense(), dense.t())
    matrix = torch.randn(width, 3, generator=generator, dtype=torch.float64)
    assert torch.allclose(kept.times(matrix), dense.double() @ matrix, rtol=1e-12, atol=1e-12)
    assert torch.allclose(kept[1:4].times(matrix.t().contiguous().t()), dense[1:4].double() @ matrix, atol=1e-12)
    wide = torch.randn(rows, 150, generator=generator, dtype=torch.float64)
    assert torch.allclose(kept.transposed_times(wide), wide.t() @ dense.double(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", ["", "weight", "bias"])
def test_the_affine_map_and_its_gradients(frozen: str) -> None:
    dense = few_entries(30, 11)
    linear = RowsLinear(11, 4).double()
    other = nn.Linear(11, 4).double()
    other.load_state_dict(linear.state_dict())
    for layer in (linear, other):
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(name != frozen)
    outputs = []
    for layer, rows in ((linear, sparse_table(dense)), (other, dense.double())):
        z = layer(rows)
        z.sin().sum().backward()
        outputs.append(z.detach())
    assert torch.allclose(*outputs, rtol=1e-12, atol=1e-14)
    for name, parameter in linear.named_parameters():
        expected = other.get_parameter(name).grad
        assert (parameter.grad is None) == (expected is None) == (name == frozen)
        if expected is not None:
            assert parameter.grad is not None
            assert torch.allclose(parameter.grad, expected, rtol=1e-12, atol=1e-14)
    assert torch.equal(linear(dense.double()), other(dense.double()))


def test_it_is_a_linear_map_for_others() -> None:
    linear = RowsLinear(11, 4)
    rows = sparse_table(few_entries(6, 11))
    expected = linear(rows)
    assert torch.equal(copy.deepcopy(linear)(rows), expected)
    assert list(linear.state_dict()) == ["weight", "bias"]
    (gradient,) = torch.autograd.grad(linear(rows).square().sum(), linear.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        (None, {}),
        (FactorLayout(max_dimension=8, rank=5), {}),
        (None, {"max_rows": 12}),
        (None, {"fisher": "monte_carlo"}),
        (None, {"fisher": "ggn"}),
        (None, {"method": "ekfac"}),
    ],
)
@pytest.mark.parametrize("constant", [False, True])
def test_curvature_is_that_of_the_dense_rows(
    layout: FactorLayout | None, options: dict[str, object], constant: bool
) -> None:
    """Steps of natural gradients on a net whose first input is kept as entries, and on one that has it dense."""
    torch.manual_seed(0)
    nets = [nn.Sequential(RowsLinear(16, 6), nn.Tanh(), nn.Linear(6, 3)).double()]
    nets.append(nn.Sequential(nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 3)).double())
    nets[1].load_state_dict(nets[0].state_dict())
    begun = nets[0][0].weight.detach().clone()
    made = [
        NaturalGradient(net, layout=layout, factor_update_period=2, inverse_update_period=2, **options) for net in nets
    ]  # type: ignore[arg-type]
    labels = torch.arange(40) % 3
    first = few_entries(40, 16)
    inputs = [(sparse_table(first), first.double())]
    for step in range(5):
        if step and not constant:
            dense = few_entries(40, 16, seed=step)
            inputs.append((sparse_table(dense), dense.double()))
        for net, optimizer, rows in zip(nets, made, inputs[-1]):
            optimizer.zero_grad()
            logits = net(rows)
            optimizer.observe(logits)
            nn.functional.cross_entropy(logits, labels).backward()
            optimizer.step(num_samples=40)
    for own, other in zip(nets[0].parameters(), nets[1].parameters()):
        assert torch.allclose(own, other, rtol=1e-7, atol=1e-9)
    assert float((nets[0][0].weight.detach() - begun).abs().max()) > 1e-2


def test_a_kept_product_is_told_by_the_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rows at each step are multiplied once; other rows are not taken for them."""
    torch.manual_seed(0)
    made = []
    plain = SparseRows.dense

    def counted(self: SparseRows, positions: Tensor | None = None) -> Tensor:
        made.append(self)
        return plain(self, positions)

    monkeypatch.setattr(SparseRows, "dense", counted)
    net = nn.Sequential(RowsLinear(16, 6), nn.Linear(6, 3))
    optimizer = NaturalGradient(net, factor_update_period=1)
    labels = torch.arange(40) % 3
    rows, others = (sparse_table(few_entries(40, 16, seed=s)) for s in (1, 2))
    for given_rows, expected in ((rows, 1), (rows, 1), (rows, 1), (others, 2)):
        optimizer.zero_grad()
        logits = net(given_rows)
        optimizer.observe(logits)
        nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step(num_samples=40)
        assert len(made) == expected
