"""Rows kept as their entries: products, parts and gradients against the same rows with their zeros."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dngd.curvature import FactorLayout, LowRank
from dngd.errors import UserError
from dngd.models import RowsLinear, SparseRows
from dngd.optim import NaturalGradient
from dngd.optim.layers import base
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
    for _ in range(3):  # kept from the second time on
        assert torch.equal(kept.transposed().dense(), dense.t())
    assert kept.transposed() is kept.transposed()
    matrix = torch.randn(width, 3, generator=generator, dtype=torch.float64)
    assert torch.allclose(kept.times(matrix), dense.double() @ matrix, rtol=1e-12, atol=1e-12)
    assert torch.allclose(kept[1:4].times(matrix.t().contiguous().t()), dense[1:4].double() @ matrix, atol=1e-12)
    wide = torch.randn(rows, 150, generator=generator, dtype=torch.float64)
    assert torch.allclose(kept.transposed_times(wide), wide.t() @ dense.double(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ones", [False, True])
@pytest.mark.parametrize("weight", [1.0, 2.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_low_rank_factor_is_measured_from_the_entries(ones: bool, weight: float, dtype: torch.dtype) -> None:
    dense = few_entries(50, 30)
    kind = LowRank(30 + ones, 7)
    found, expected = (kind.zeros(dtype, torch.device("cpu")) for _ in range(2))
    for _ in range(2):  # added to what is there
        kind.accumulate_sparse_(found, sparse_table(dense), ones=ones, weight=weight)
        kind.accumulate_(expected, dense.to(dtype), ones=ones, weight=weight)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-12
    assert all(torch.allclose(a, b, rtol=tolerance, atol=tolerance) for a, b in zip(found, expected))
    assert float(expected[0].abs().max()) > 1


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("max_rows", [12, None])
def test_a_low_rank_layer_never_has_its_rows_dense(
    monkeypatch: pytest.MonkeyPatch, constant: bool, max_rows: int | None
) -> None:
    """Nor do others have all of them dense at once."""
    shapes: list[int] = []
    plain = SparseRows.dense

    def seen(self: SparseRows, positions: Tensor | None = None) -> Tensor:
        rows = plain(self, positions)
        shapes.append(len(rows))
        return rows

    monkeypatch.setattr(SparseRows, "dense", seen)
    monkeypatch.setattr(base, "DENSE_ROWS", 16)
    for layout in (FactorLayout(max_dimension=8, rank=5), FactorLayout()):
        net = nn.Sequential(RowsLinear(16, 6), nn.ReLU(), nn.Linear(6, 3))
        optimizer = NaturalGradient(net, layout=layout, max_rows=max_rows, factor_update_period=1)
        rows = sparse_table(few_entries(40, 16))
        for step in range(3):
            optimizer.zero_grad()
            logits = net(rows if constant else sparse_table(few_entries(40, 16, seed=step)))
            nn.functional.cross_entropy(logits, torch.arange(40) % 3).backward()
            optimizer.step(num_samples=40)
        if layout.max_dimension == 8:
            assert shapes == []
    assert shapes
    assert max(shapes) <= 16


def test_rows_that_are_overwritten_are_refused() -> None:
    net = nn.Sequential(RowsLinear(16, 6), nn.Linear(6, 3))
    rows = sparse_table(few_entries(40, 16))
    loss = nn.functional.cross_entropy(net(rows), torch.arange(40) % 3)
    rows.values.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    optimizer = NaturalGradient(net)
    loss = nn.functional.cross_entropy(net(rows), torch.arange(40) % 3)
    rows.values.mul_(2)
    with pytest.raises((UserError, RuntimeError), match=r"overwritten|modified"):
        loss.backward()
    optimizer.preconditioner.close()


@pytest.mark.parametrize("frozen", ["", "weight", "bias", "none"])
def test_the_affine_map_and_its_gradients(frozen: str) -> None:
    dense = few_entries(30, 11)
    linear = RowsLinear(11, 4, bias=frozen != "none").double()
    other = nn.Linear(11, 4, bias=frozen != "none").double()
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
        (FactorLayout(max_dimension=8, rank=5), {"max_rows": 12}),
        (FactorLayout(max_dimension=8, rank=5), {"max_rows": None}),
        (FactorLayout(max_dimension=8, wide="block_diagonal"), {"max_rows": 12}),
        (FactorLayout(max_dimension=8, wide="diagonal"), {}),
        (None, {"max_rows": 12}),
        (None, {"weight_sharing": "reduce"}),
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
    reduces = options.get("weight_sharing") == "reduce"
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
            optimizer.observe(logits, row_samples=torch.arange(40) // 2 if reduces else None)
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
