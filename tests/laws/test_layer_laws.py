"""PyG's convolutions with one weight against dense algebra, and the mistakes that the laws catch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch_geometric import nn as pyg

from dngd.optim.layers import base, linear
from dngd.optim.layers import pyg as pyg_layers
from dngd.optim.layers.pyg import neighbour_sums
from tests.helpers.layers import (
    D_IN,
    D_OUT,
    Case,
    Get,
    N,
    adjacency,
    assert_sums_make_the_gradient,
    edges,
    features,
    law_kronecker_is_the_fisher_of_one_seed,
    law_layer_equals_its_dense_reference,
    randomised,
    read_loss,
    start,
    with_ones,
)
from tests.helpers.mutants import assert_caught

pytestmark = pytest.mark.usefixtures("one_thread")


def gcn_case(seed: int, variant: str = "plain") -> Case:
    options: dict[str, Any] = {
        # PyG 2.8 ignores `improved` where no edge weights are given.
        "improved, weights": {"improved": True},
        "no bias": {"bias": False},
        "cached": {"cached": True},
        "no loops": {"add_self_loops": False},
        "raw weights": {"normalize": False},
        "mean": {"aggr": "mean"},
        "reversed": {"flow": "target_to_source"},
    }.get(variant, {})
    conv = randomised(pyg.GCNConv(D_IN, D_OUT, **options), seed)
    edge_index = edges(seed)
    weight = torch.rand(edge_index.shape[1], dtype=torch.float64) + 0.5 if "weights" in variant else None
    a = adjacency(edge_index if variant != "reversed" else edge_index.flip(0), weight)
    counts = (adjacency(edge_index) + torch.eye(N)).sum(1)
    if conv.normalize:
        loops = 0.0 if variant == "no loops" else 2.0 if conv.improved else 1.0
        a = a + loops * torch.eye(N)
        root = a.sum(dim=1).pow(-0.5)
        root[root == float("inf")] = 0.0
        a = root[:, None] * a * root
    if variant == "mean":
        a = a / counts[:, None]
    given_edges: Any = edge_index
    if variant == "sparse":
        given_edges = adjacency(edge_index).to_sparse_csr()
    arguments = (given_edges,) if weight is None else (given_edges, weight)

    def matrix(get: Get) -> Tensor:
        w = get(conv.lin.weight)
        return w if conv.bias is None else torch.cat([w, get(conv.bias)[:, None]], dim=1)

    return Case(
        name="conv",
        model=nn.ModuleDict({"conv": conv}),
        x=features(seed),
        call=lambda x: conv(x, *arguments),
        rows=lambda x: a @ x if conv.bias is None else with_ones(a @ x),
        matrix=matrix,
    )


GCN_VARIANTS = (
    "plain", "improved, weights", "no bias", "cached", "no loops",
    "weights", "raw weights", "mean", "reversed", "sparse",
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("variant", GCN_VARIANTS)
def test_gcn_rows_are_aggregated(variant: str) -> None:
    law_layer_equals_its_dense_reference(gcn_case(1, variant))


@given(seed=st.integers(0, 10_000), variant=st.sampled_from(("plain", "weights", "no bias")))
@settings(max_examples=10, deadline=None)
def test_gcn_of_any_graph(seed: int, variant: str) -> None:
    law_layer_equals_its_dense_reference(gcn_case(seed, variant))


def free_bias_case(kind: str, **options: Any) -> Case:
    extra = {"ChebConv": {"K": 2}}.get(kind, {})
    conv = randomised(getattr(pyg, kind)(D_IN, D_OUT, **extra, **options))
    edge_index = edges(4)
    silent: dict[str, Tensor] = {}

    def call(x: Tensor) -> Tensor:
        with torch.no_grad():
            silent["rest"] = conv(x, edge_index) - conv.bias
        out: Tensor = conv(x, edge_index)
        return out

    return Case(
        name="conv.bias",
        model=nn.ModuleDict({"conv": conv}),
        x=features(4),
        call=call,
        rows=lambda x: torch.ones(N, 1, dtype=torch.float64),
        matrix=lambda get: get(conv.bias)[:, None],
        after=lambda z: z + silent["rest"],
    )


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("GATConv", {"heads": 2}),
        ("GATConv", {"heads": 2, "concat": False, "residual": True}),
        ("GATv2Conv", {}),
        ("ChebConv", {}),
        ("TAGConv", {}),
        ("ResGatedGraphConv", {}),
        ("GCNConv", {"aggr": "max"}),
    ],
    ids=str,
)
def test_free_bias_is_a_block_of_its_own(kind: str, options: dict[str, Any]) -> None:
    law_layer_equals_its_dense_reference(free_bias_case(kind, **options))


def sage_case(inner: str, **options: Any) -> Case:
    """SAGEConv's inner layers; Z is the inner layer's own output and the rest of the module comes after it."""
    conv = randomised(pyg.SAGEConv(D_IN, D_OUT, **options))
    edge_index = edges(5)
    a = adjacency(edge_index)
    mean = a / a.sum(1).clamp(min=1)[:, None]
    layer = getattr(conv, inner)
    project = torch.relu if options.get("project") else None
    held: dict[str, Tensor] = {}

    def moved(x: Tensor) -> Tensor:
        return project(x @ conv.lin.weight.T + conv.lin.bias).detach() if project else x

    def aggregate(x: Tensor) -> Tensor:
        return torch.cat([a @ x, mean @ x], dim=1) if isinstance(options.get("aggr"), list) else mean @ x

    def rows(x: Tensor) -> Tensor:
        held["x"] = x.detach()
        raw = {"lin": x, "lin_l": aggregate(moved(x)), "lin_r": x}[inner]
        return raw if layer.bias is None else with_ones(raw)

    def after(z: Tensor) -> Tensor:
        x = held["x"]
        left = z if inner == "lin_l" else conv.lin_l(aggregate(torch.relu(z) if inner == "lin" else moved(x)))
        right = z if inner == "lin_r" else conv.lin_r(x) if hasattr(conv, "lin_r") else 0.0
        out = left + right
        return nn.functional.normalize(out, dim=-1) if conv.normalize else out

    def matrix(get: Get) -> Tensor:
        return get(layer.weight) if layer.bias is None else torch.cat([get(layer.weight), get(layer.bias)[:, None]], 1)

    return Case(
        f"conv.{inner}",
        nn.ModuleDict({"conv": conv}),
        features(5),
        lambda x: conv(x, edge_index),
        rows,
        matrix,
        after,
    )


@pytest.mark.parametrize(
    ("inner", "options"),
    [
        ("lin_l", {}),
        ("lin_r", {}),
        ("lin_l", {"normalize": True}),
        ("lin_r", {"normalize": True, "bias": False}),
        ("lin_l", {"root_weight": False}),
        ("lin_l", {"aggr": ["sum", "mean"]}),
        ("lin_l", {"project": True}),
    ],
    ids=str,
)
def test_sage_is_two_linear_layers(inner: str, options: dict[str, Any]) -> None:
    law_layer_equals_its_dense_reference(sage_case(inner, **options))


@pytest.mark.parametrize(
    ("model", "call"),
    [
        (lambda: pyg.GATConv(D_IN, D_OUT, heads=2, edge_dim=2), lambda m, x: m(x, edges(6), features(7, 20, 2))),
        (lambda: pyg.GATConv((D_IN, D_IN), D_OUT), lambda m, x: m((x, x[:6]), edges(6) % 6)),
        (lambda: pyg.GATv2Conv(D_IN, D_OUT, share_weights=True), lambda m, x: m(x, edges(6))),
        (lambda: pyg.SAGEConv(D_IN, D_OUT, project=True), lambda m, x: m(x, edges(6))),
        (lambda: pyg.SAGEConv((D_IN, D_IN), D_OUT), lambda m, x: m((x, x[:6]), edges(6) % 6)),
        (lambda: pyg.GINConv(pyg.MLP([D_IN, 5, D_OUT])), lambda m, x: m(x, edges(6))),
        (lambda: pyg.GCNConv(D_IN, D_IN), lambda m, x: m(m(x, edges(6)).tanh(), edges(6))),
    ],
    ids=["gat edges", "gat pair", "gatv2 shared", "sage project", "sage pair", "gin", "gcn twice"],
)
def test_rows_and_gradients_make_the_parameters_gradient(
    model: Callable[[], nn.Module], call: Callable[[Any, Tensor], Tensor]
) -> None:
    """`Σ g_i m_iᵀ` over what a layer was given equals autograd's gradient, also over several calls of a module."""
    net = randomised(model())
    assert_sums_make_the_gradient(net, lambda: call(net, features(6)))


def test_kronecker_is_the_fisher_of_one_seed() -> None:
    law_kronecker_is_the_fisher_of_one_seed(gcn_case(8))


@given(
    data=st.data(),
    num_edges=st.integers(0, 60),
    with_weights=st.booleans(),
    takes_mean=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_sums_over_neighbours(data: st.DataObject, num_edges: int, with_weights: bool, takes_mean: bool) -> None:
    """Of edges in any order, repeated ones and nodes without any, at all nodes or at some, in any order."""
    seed = data.draw(st.integers(0, 10_000))
    edge_index, x = edges(seed, num_edges), features(seed)
    weight = torch.rand(num_edges, dtype=torch.float64) - 0.5 if with_weights else None
    dense = torch.zeros(N, N, dtype=torch.float64)
    dense.index_put_(tuple(edge_index.flip(0)), torch.ones(num_edges).double() if weight is None else weight, True)
    expected = dense @ x
    if takes_mean:
        expected /= torch.bincount(edge_index[1], minlength=N).clamp_min(1)[:, None]
    places = data.draw(st.none() | st.lists(st.integers(0, N - 1), unique=True))
    positions = None if places is None else torch.tensor(places, dtype=torch.int64)
    found = neighbour_sums(x, edge_index[0], edge_index[1], weight, positions, takes_mean=takes_mean)
    assert torch.allclose(found, expected if positions is None else expected[positions], rtol=1e-12)


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("is_watched", [False, True])
@pytest.mark.parametrize("variant", GCN_VARIANTS)
def test_rows_at_some_positions_are_those_of_all(variant: str, is_watched: bool) -> None:
    """By this package's own sums, and by PyG's propagation where somebody watches or changes its messages."""
    case = gcn_case(2, variant)
    (layer,), capture = start(case.model)
    conv: Any = case.model["conv"]  # type: ignore[index]
    if is_watched:
        conv.register_propagate_forward_hook(lambda conv, inputs, out: 2 * out)
    calls: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capture, "record", lambda layer, payload, output: calls.append(payload))
        case.call(case.x)
    rows = layer.rows(calls[0])
    expected = case.rows(case.x)[:, :D_IN] * (1 + int(is_watched))
    assert torch.allclose(rows, expected, rtol=1e-12)
    positions = torch.tensor([5, 0, 3])
    assert torch.allclose(layer.rows_at(calls[0], positions), expected[positions], rtol=1e-12)


class Largest(TorchDispatchMode):
    """Notes the entries of the largest tensor that is made while it is on."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.entries = max(self.entries, tensor.numel())
        return out


def law_no_message_is_built(max_rows: int | None = 16) -> None:
    """A wide input, of which PyG would send a message of its whole width along each edge: 600 x 200 entries here."""
    num_edges, width = 600, 200
    conv = randomised(pyg.GCNConv(width, 3))
    x, edge_index = features(3, 40, width), edges(3, num_edges) % 40
    (layer,), capture = start(conv, max_rows=max_rows)
    for step in range(2):
        capture.start_step(step, True)
        layer.forget()
        loss = read_loss(conv(x, edge_index))
        with Largest() as largest:
            loss.backward()
        assert layer.pending is not None
        assert float(layer.pending.counts[0]) > 0
        assert largest.entries < num_edges * width / 2


def test_no_message_of_the_inputs_width_is_built() -> None:
    law_no_message_is_built()
    law_no_message_is_built(max_rows=None)
    assert_caught(law_no_message_is_built, pyg_layers, "_has_message_hooks", lambda conv: True)


class Counting(nn.Module):
    """Counts the propagates of a convolution."""

    def __init__(self, conv: Any) -> None:
        super().__init__()
        self.conv, self.count = conv, 0
        conv.register_propagate_forward_pre_hook(self.note)

    def note(self, *_: Any) -> None:
        self.count += 1


def law_constant_input_is_aggregated_once(changes: bool = False, is_watched: bool = True) -> None:
    """A full-batch input is aggregated once more in all; another x, or one changed in place, is seen as such.

    is_watched: count PyG's propagations, those of the forward passes too; otherwise this package's own sums.
    """
    conv = randomised(pyg.GCNConv(D_IN, D_OUT))
    counting = Counting(conv) if is_watched else None
    x, edge_index = features(9).detach(), edges(9)
    (layer,), capture = start(conv)
    sums, own = [], []
    with pytest.MonkeyPatch.context() as patch:
        counted = lambda *given, **named: own.append(given) or neighbour_sums(*given, **named)  # noqa: E731
        patch.setattr(pyg_layers, "neighbour_sums", counted)
        for step in range(3):
            capture.start_step(step, True)
            layer.forget()
            if changes and step == 1:
                x.mul_(2.0)
            read_loss(conv(x, edge_index)).backward()
            assert layer.pending is not None
            sums.append(layer.a.dense(layer.pending.a))
    a = adjacency(edge_index) + torch.eye(N)
    m = with_ones(a.sum(1)[:, None].rsqrt() * a * a.sum(1).rsqrt() @ x)
    reached = torch.arange(N) % 3 != 1
    assert torch.allclose(sums[2], m[reached].T @ m[reached])
    times = 1 + 2 * int(changes)
    if counting is None:
        assert len(own) == times
    else:
        assert (counting.count, own) == (3 + times, [])


@pytest.mark.parametrize("is_watched", [False, True])
def test_constant_input_is_aggregated_once(is_watched: bool) -> None:
    law_constant_input_is_aggregated_once(is_watched=is_watched)
    law_constant_input_is_aggregated_once(changes=True, is_watched=is_watched)


def test_a_compiled_convolution_is_measured() -> None:
    """PyG calls no hook of its own in a compiled model; the rows do not depend on one."""
    case = gcn_case(10)
    conv = case.model["conv"]  # type: ignore[index]
    compiled = torch.compile(conv, backend="eager")
    edge_index = edges(10)
    case.model, case.name = nn.Sequential(compiled), "0._orig_mod"
    case.call = lambda x: compiled(x, edge_index)
    law_layer_equals_its_dense_reference(case)


def test_columns_of_the_ggn_share_one_input() -> None:
    """A's rows are counted once however many columns are back-propagated, for a constant input as for another."""
    sums = []
    for x in (features(3), features(3).detach()):
        conv = randomised(pyg.GCNConv(D_IN, D_OUT))
        (layer,), capture = start(conv, fisher="ggn")
        capture.observe(conv(x, edges(3)), None, 0)
        assert layer.pending is not None
        assert float(layer.pending.counts[0]) == N
        sums.append(torch.cat([t.reshape(-1) for t in (*layer.pending.a, *layer.pending.g)]))
    assert torch.allclose(sums[0], sums[1], rtol=1e-12)


def rows_before_the_aggregation(self: Any, call: Any, positions: Any) -> Tensor:
    return call.x.detach() if positions is None else call.x.detach()[positions]


def rows_without_self_loops(self: Any, call: Any, positions: Any) -> Tensor:
    bare = self._bare()
    bare.add_self_loops = False
    rows = bare.forward(call.x.detach(), call.edge_index)
    return rows if positions is None else rows[positions]


def sums_at_the_first_rows(x: Tensor, source: Any, target: Any, weight: Any, positions: Any, **named: Any) -> Tensor:
    sums = neighbour_sums(x, source, target, weight, None, **named)
    return sums if positions is None else sums[: positions.numel()]


def sums_of_sorted_edges(x: Tensor, source: Any, target: Any, *rest: Any, **named: Any) -> Tensor:
    return neighbour_sums(x, source, target.sort().values, *rest, **named)


def without_bias_column(weight: Any, bias: Any) -> Tensor:
    out = linear.join_gradient(weight, None)
    assert out is not None
    return torch.cat([out, torch.zeros_like(bias)[:, None]], dim=1)


def gat_case(seed: int) -> Case:
    return free_bias_case("GATConv")


@pytest.mark.parametrize(
    ("case", "target", "attribute", "replacement"),
    [
        (gcn_case, pyg_layers.GCNLayer, "_made", rows_before_the_aggregation),
        (gcn_case, pyg_layers.GCNLayer, "_made", rows_without_self_loops),
        (gcn_case, pyg_layers, "neighbour_sums", sums_at_the_first_rows),
        (gcn_case, pyg_layers, "neighbour_sums", sums_of_sorted_edges),
        (gcn_case, pyg_layers, "join_gradient", without_bias_column),
        (gcn_case, pyg_layers.GCNLayer, "set_gradient", lambda self, value: None),
        (gat_case, pyg_layers.BiasLayer, "gradient", lambda self: self.bias.grad[:, None] / N),
    ],
)
def test_mutants_of_graph_layers(case: Callable[[int], Case], target: Any, attribute: str, replacement: Any) -> None:
    assert_caught(lambda: law_layer_equals_its_dense_reference(case(11)), target, attribute, replacement)


def test_mutant_constant_product_that_is_never_renewed() -> None:
    law = lambda: law_constant_input_is_aggregated_once(changes=True)  # noqa: E731
    assert_caught(law, base.ConstantInput, "is_worth_keeping", lambda *arguments, **named: True)
