"""DGL's convolutions against dense algebra, and the mistakes that the laws catch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dgl
import pytest
import torch
import torch.nn.functional as F
from dgl.nn.pytorch import GraphConv, SAGEConv
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dngd.optim.layers import dgl as dgl_layers
from tests.helpers.layers import (
    D_IN,
    Case,
    Get,
    N,
    adjacency,
    edges,
    features,
    law_layer_equals_its_dense_reference,
    randomised,
    read_loss,
    start,
    with_ones,
)
from tests.helpers.mutants import assert_caught

pytestmark = pytest.mark.usefixtures("one_thread")

NARROW, WIDE = 3, 6


def graph_and_adjacency(seed: int, block: bool) -> tuple[Any, Tensor]:
    edge_index = edges(seed)
    if not block:
        return dgl.graph((edge_index[0], edge_index[1]), num_nodes=N), adjacency(edge_index)
    edge_index[1] %= 6
    graph = dgl.create_block((edge_index[0], edge_index[1]), num_src_nodes=N, num_dst_nodes=6)
    return graph, adjacency(edge_index, rows=6)


def graph_conv_case(
    seed: int, d_out: int = NARROW, block: bool = False, weights: bool = False, pair: bool = False, **options: Any
) -> Case:
    conv = randomised(GraphConv(D_IN, d_out, allow_zero_in_degree=True, **options), seed)
    graph, a = graph_and_adjacency(seed, block)
    edge_weight = None
    degrees_in, degrees_out = a.sum(1).clamp(min=1), a.sum(0).clamp(min=1)
    if weights:
        edge_weight = torch.rand(graph.num_edges(), dtype=torch.float64) + 0.5
        a = adjacency(torch.stack(graph.edges()), edge_weight, rows=a.shape[0])
    norm = options.get("norm", "both")
    m = {
        "both": degrees_in[:, None].rsqrt() * a * degrees_out.rsqrt(),
        "right": a / degrees_in[:, None],
        "left": a / degrees_out,
        "none": a,
    }[norm]

    def matrix(get: Get) -> Tensor:
        w = get(conv.weight).T
        return w if conv.bias is None else torch.cat([w, get(conv.bias)[:, None]], dim=1)

    return Case(
        "conv",
        nn.ModuleDict({"conv": conv}),
        features(seed),
        lambda x: conv(graph, (x, x[: a.shape[0]]) if pair else x, edge_weight=edge_weight),
        lambda x: m @ x if conv.bias is None else with_ones(m @ x),
        matrix,
        options.get("activation") or (lambda z: z),
    )


def option_names(options: dict[str, Any]) -> str:
    """Name a case alike in every process: a function's str holds its address."""
    return ",".join(f"{key}={getattr(value, '__name__', value)}" for key, value in options.items()) or "default"


@pytest.mark.parametrize("d_out", [NARROW, WIDE])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm": "right"},
        {"norm": "left", "bias": False},
        {"norm": "none", "weights": True},
        {"activation": torch.tanh},
        {"activation": nn.Sigmoid()},
        {"block": True, "weights": True},
        {"block": True, "pair": True, "activation": F.softplus},
    ],
    ids=option_names,
)
def test_graph_conv_rows_are_aggregated(d_out: int, options: dict[str, Any]) -> None:
    law_layer_equals_its_dense_reference(graph_conv_case(1, d_out, **options))


@given(seed=st.integers(0, 10_000), d_out=st.sampled_from((NARROW, WIDE)))
@settings(max_examples=6, deadline=None)
def test_graph_conv_of_any_graph(seed: int, d_out: int) -> None:
    law_layer_equals_its_dense_reference(graph_conv_case(seed, d_out))


def sage_case(
    seed: int,
    aggregator: str = "gcn",
    d_out: int = NARROW,
    inner: str = "fc_neigh",
    block: bool = False,
    **options: Any,
) -> Case:
    conv = randomised(SAGEConv(D_IN, d_out, aggregator, **options), seed)
    graph, a = graph_and_adjacency(seed, block)
    targets = a.shape[0]
    if aggregator == "gcn":
        m = (a + torch.eye(targets, N, dtype=torch.float64)) / (a.sum(1) + 1)[:, None]
    else:
        m = a / a.sum(1).clamp(min=1)[:, None]
    layer = getattr(conv, inner)
    bias = (conv.bias if aggregator == "gcn" else layer.bias) if hasattr(layer, "bias") else None
    held: dict[str, Tensor] = {}

    def dropped(x: Tensor) -> Tensor:
        torch.manual_seed(77)
        return F.dropout(x, conv.feat_drop.p)

    def call(x: Tensor) -> Tensor:
        torch.manual_seed(77)
        out: Tensor = conv(graph, x)
        return out

    def rows(x: Tensor) -> Tensor:
        h = dropped(x.detach())
        held["x"] = h
        raw = m @ h if inner == "fc_neigh" else h[:targets]
        return raw if bias is None else with_ones(raw)

    def after(z: Tensor) -> Tensor:
        if aggregator != "gcn":
            z = (
                z
                + (conv.fc_self(held["x"][:targets]) if inner == "fc_neigh" else conv.fc_neigh(m @ held["x"])).detach()
            )
        z = conv.activation(z) if conv.activation else z
        return conv.norm(z) if conv.norm else z

    def matrix(get: Get) -> Tensor:
        return get(layer.weight) if bias is None else torch.cat([get(layer.weight), get(bias)[:, None]], dim=1)

    return Case(f"conv.{inner}", nn.ModuleDict({"conv": conv}), features(seed), call, rows, matrix, after)


def unit_rows(z: Tensor) -> Tensor:
    return F.normalize(z, dim=-1)


@pytest.mark.parametrize("d_out", [NARROW, WIDE])
@pytest.mark.parametrize("aggregator", ["gcn", "mean"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False, "block": True},
        {"activation": torch.tanh, "norm": unit_rows},
        {"norm": unit_rows},
        {"feat_drop": 0.4},
    ],
    ids=option_names,
)
def test_sage_conv_rows_are_aggregated(d_out: int, aggregator: str, options: dict[str, Any]) -> None:
    law_layer_equals_its_dense_reference(sage_case(2, aggregator, d_out, **options))


@pytest.mark.parametrize("d_out", [NARROW, WIDE])
def test_sage_conv_keeps_its_own_rows(d_out: int) -> None:
    law_layer_equals_its_dense_reference(sage_case(3, "mean", d_out, "fc_self", feat_drop=0.2))


def test_pool_is_made_of_linear_layers() -> None:
    layers, _ = start(randomised(SAGEConv(D_IN, NARROW, "pool")))
    assert [layer.name for layer in layers] == ["fc_pool", "fc_neigh", "fc_self"]
    assert {layer.kind for layer in layers} == {"linear"}


def test_a_function_is_put_back_after_an_exception() -> None:
    def fails(z: Tensor) -> Tensor:
        raise RuntimeError("in the activation")

    conv = GraphConv(D_IN, NARROW, activation=fails)
    start(conv)
    with pytest.raises(RuntimeError, match="in the activation"):
        conv(dgl.add_self_loop(dgl.graph(([0], [1]))), torch.ones(2, D_IN))
    assert conv._activation is fails


def test_a_constant_graph_is_aggregated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    conv = randomised(GraphConv(D_IN, NARROW))
    graph = dgl.add_self_loop(graph_and_adjacency(4, block=False)[0])
    x = features(4).detach()
    (layer,), capture = start(conv)
    counts = []
    for step in range(4):
        if step == 2:
            graph.add_edges([0], [1])
        capture.start_step(step, True)
        layer.forget()
        before = layer.bare.forward  # type: ignore[attr-defined]
        calls: list[int] = []
        monkeypatch.setattr(
            layer.bare, "forward", lambda *a, before=before, calls=calls, **k: (calls.append(1), before(*a, **k))[1]
        )
        read_loss(conv(graph, x)).backward()
        monkeypatch.undo()
        counts.append(len(calls))
    assert counts == [1, 0, 1, 1]  # a changed graph ends the trust; it is kept again when it comes a second time


def gradients_after_the_activation(self: Any, conv: Any, inputs: Any, named: Any, output: Any) -> None:
    graph, x = inputs
    self.capture.record(self, dgl_layers.GraphCall(graph, x, named.get("edge_weight"), ()), output)


def sum_without_degrees(self: Any, payload: Any) -> Tensor:
    self.bare._norm = "none"
    return self.bare(payload.graph, payload.features)  # type: ignore[no-any-return]


GRAPH = dgl_layers.GraphConvLayer

SAGE = dgl_layers.SageNeighbourLayer


@pytest.mark.parametrize(
    ("law", "target", "attribute", "replacement"),
    [
        (lambda: graph_conv_case(7), GRAPH, "rows", lambda self, payload: payload.features.detach()),
        (lambda: graph_conv_case(7), GRAPH, "rows", sum_without_degrees),
        (lambda: graph_conv_case(7, activation=nn.Tanh()), GRAPH, "on_forward", gradients_after_the_activation),
        (lambda: sage_case(7, "mean", feat_drop=0.5), SAGE, "_features", lambda self, given: given),
        (lambda: sage_case(7), SAGE, "gradient", lambda self: torch.cat([self.weight.grad, self.bias[:, None]], 1)),
    ],
)
def test_mutants_of_dgl_layers(law: Callable[[], Case], target: Any, attribute: str, replacement: Any) -> None:
    assert_caught(lambda: law_layer_equals_its_dense_reference(law()), target, attribute, replacement)
