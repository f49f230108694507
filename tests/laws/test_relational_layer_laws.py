"""Convolutions with a weight a relation against dense algebra, and the mistakes that the laws catch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch_geometric import nn as pyg
from torch_geometric.nn.conv import rgcn_conv

from dngd.optim.layers import pyg_relational
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
    start,
    with_ones,
)
from tests.helpers.mutants import assert_caught

pytestmark = pytest.mark.usefixtures("one_thread")

RELATIONS = 3


def relational_case(
    seed: int, kind: str = "RGCNConv", *, one_mean: bool = False, bipartite: bool = False, **options: Any
) -> Case:
    d_in: Any = (D_IN, D_IN + 1) if bipartite else D_IN
    conv = randomised(getattr(pyg, kind)(d_in, D_OUT, RELATIONS, **options), seed)
    targets = N - 3 if bipartite else N
    edge_index = edges(seed)
    edge_index[1] %= targets
    types = torch.arange(edge_index.shape[1]) % RELATIONS
    x_target = features(seed + 1, targets, D_IN + 1)

    def aggregated(x: Tensor) -> list[Tensor]:
        out = []
        for r in range(RELATIONS):
            a = adjacency(edge_index[:, types == r], rows=targets)
            degrees = adjacency(edge_index if one_mean else edge_index[:, types == r], rows=targets).sum(1)
            out.append((a / degrees.clamp(min=1)[:, None] if conv.aggr == "mean" else a) @ x)
        if conv.num_bases is None:
            return out
        comp = conv.comp.detach()
        return [sum(comp[r, b] * out[r] for r in range(RELATIONS)) for b in range(conv.num_bases)]  # type: ignore[misc]

    def rows(x: Tensor) -> Tensor:
        parts = aggregated(x) + ([] if conv.root is None else [x_target if bipartite else x])
        joined = torch.cat(parts, dim=1)
        return joined if conv.bias is None else with_ones(joined)

    def matrix(get: Get) -> Tensor:
        parts = [w.T for w in get(conv.weight)]
        parts += [] if conv.root is None else [get(conv.root).T]
        parts += [] if conv.bias is None else [get(conv.bias)[:, None]]
        return torch.cat(parts, dim=1)

    blocks = [D_IN] * len(conv.weight) + ([] if conv.root is None else [conv.root.shape[0]])
    blocks[-1] += int(conv.bias is not None)
    return Case(
        name="conv",
        model=nn.ModuleDict({"conv": conv}),
        x=features(seed),
        call=lambda x: conv((x, x_target) if bipartite else x, edge_index, types),
        rows=rows,
        matrix=matrix,
        blocks=tuple(blocks),
    )


@pytest.mark.parametrize("kind", ["RGCNConv", "FastRGCNConv"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_bases": 2},
        {"root_weight": False},
        {"bias": False},
        {"root_weight": False, "bias": False},
        {"aggr": "add"},
        {"bipartite": True},
        {"num_bases": 2, "aggr": "add", "bias": False},
    ],
    ids=str,
)
def test_relational_rows_are_each_relations_aggregate(kind: str, options: dict[str, Any]) -> None:
    law_layer_equals_its_dense_reference(relational_case(2, kind, **options))


@given(seed=st.integers(0, 10_000), kind=st.sampled_from(("RGCNConv", "FastRGCNConv")))
@settings(max_examples=8, deadline=None)
def test_relational_of_any_graph(seed: int, kind: str) -> None:
    law_layer_equals_its_dense_reference(relational_case(seed, kind))


@pytest.mark.parametrize("aggr", ["mean", "add"])
def test_relational_on_pyg_lib(aggr: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With pyg-lib RGCNConv takes one mean over all relations' edges (a stand-in plays the library)."""

    class Ops:
        @staticmethod
        def segment_matmul(x: Tensor, pointer: Tensor, weight: Tensor) -> Tensor:
            ends = pointer.tolist()
            return torch.cat([x[a:b] @ weight[r] for r, (a, b) in enumerate(zip(ends, ends[1:]))])

    class Library:
        ops = Ops

    monkeypatch.setattr(rgcn_conv.torch_geometric.typing, "WITH_SEGMM", True)
    monkeypatch.setattr(rgcn_conv.torch_geometric.backend, "use_segment_matmul", True)
    monkeypatch.setattr(rgcn_conv, "pyg_lib", Library)
    law_layer_equals_its_dense_reference(relational_case(3, one_mean=True, aggr=aggr))


def test_kronecker_is_the_fisher_of_one_seed() -> None:
    law_kronecker_is_the_fisher_of_one_seed(relational_case(8))


def test_two_calls_of_one_module_add_up() -> None:
    conv = randomised(pyg.RGCNConv(D_IN, D_IN, 2))
    types = torch.arange(20) % 2
    assert_sums_make_the_gradient(conv, lambda: conv(conv(features(6), edges(6), types), edges(6), types))


def test_relations_without_features_keep_the_plain_gradient() -> None:
    conv = pyg.RGCNConv(N, D_OUT, RELATIONS, num_bases=2)
    (layer,), _ = start(conv)
    with pytest.warns(UserWarning, match="table of embeddings"):
        out = conv(None, edges(1), torch.arange(20) % RELATIONS)
    out.sum().backward()
    assert layer.gradient() is None
    assert layer.pending is None


def untransposed(parameters: Any) -> Tensor:
    return torch.cat([p.grad.reshape(p.shape[-1], -1) for p in parameters], dim=1)


@pytest.mark.parametrize(
    ("target", "attribute", "replacement"),
    [
        (pyg_relational, "join_columns", untransposed),
        (pyg_relational, "_degrees", lambda target, n, like: like.new_ones(n, 1)),
        (pyg_relational.RelationalLayer, "_edges", lambda self, e: (e[0], e[1], None)),
    ],
)
def test_mutants_of_relational_layers(target: Any, attribute: str, replacement: Any) -> None:
    assert_caught(lambda: law_layer_equals_its_dense_reference(relational_case(11)), target, attribute, replacement)
