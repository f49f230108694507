"""The fused first layer, straight from the feature table, is gather-then-aggregate: values and gradients.

The reference gathers each edge's source row and adds it to its destination, edge by edge, in float64.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dngd.models import message_passing
from dngd.models.message_passing import Aggregation, aggregate_rows
from dngd.sampling import operators as operators_module
from dngd.sampling.minibatch import LayerGraph
from dngd.sampling.operators import FirstRows, LayerOperators
from dngd.sampling.sampler import NeighborSampler
from dngd.sampling.topology import Topology
from tests.helpers.mutants import assert_caught
from tests.unit.sampling.graphs import graphs, skewed_graph


def input_layer(graph: Topology, seeds: list[int], fanouts: tuple[int, ...], rng_seed: int = 3) -> LayerGraph:
    sampler = NeighborSampler(graph.indptr, graph.indices, graph.edge_weight, fanouts)
    return sampler.sample(torch.tensor(seeds, dtype=torch.int64), rng_seed)[0]


def reference(graph: Topology, layer: LayerGraph, aggregation: Aggregation, table: Tensor) -> Tensor:
    """M by the formulas of the models' docstrings, one edge at a time."""
    weights = graph.edge_weight if graph.edge_weight is not None else torch.ones(graph.indices.shape[0])
    rows = []
    for i, v in enumerate(layer.dst_nodes.tolist()):
        edges = range(int(layer.indptr[i]), int(layer.indptr[i + 1]))
        drawn = [] if layer.edge_weight is None else [float(layer.edge_weight[e]) for e in edges]
        w = drawn or [1.0] * len(edges)
        neighbours = torch.zeros(table.shape[1], dtype=table.dtype)
        if aggregation == "mean":
            total = sum(w)
            for e, w_e in zip(edges, w):
                neighbours = neighbours + table[layer.indices[e]] * (w_e / (total or 1.0))
            rows.append(torch.cat([table[v], neighbours]))
            continue

        def norm(node: int) -> float:
            first, last = int(graph.indptr[node]), int(graph.indptr[node + 1])
            return float(1 + weights[first:last].double().sum()) ** -0.5

        degree = int(graph.indptr[v + 1] - graph.indptr[v])
        for e, w_e in zip(edges, w):
            u = int(layer.indices[e])
            neighbours = neighbours + table[u] * (degree / len(edges) * w_e * norm(u) * norm(v))
        rows.append(neighbours + table[v] * norm(v) ** 2)
    return torch.stack(rows) if rows else table.new_zeros(0, table.shape[1] * (2 if aggregation == "mean" else 1))


def law_fused_is_gather_then_aggregate(
    graph: Topology, seeds: list[int], fanouts: tuple[int, ...], aggregation: Aggregation
) -> None:
    layer = input_layer(graph, seeds, fanouts)
    table = torch.randn(graph.indptr.shape[0] - 1, 4, dtype=torch.float64, requires_grad=True)
    operators = LayerOperators(graph, aggregation)
    fused = aggregate_rows(aggregation, table, operators.first(layer))
    expected = reference(graph, layer, aggregation, table)
    # The coefficients are float32.
    assert torch.allclose(fused, expected, rtol=1e-5, atol=1e-5), (fused - expected).abs().max()
    ready = FirstRows(operators, table.detach()).of(layer)
    assert torch.equal(ready, fused.detach())
    if not seeds:
        return
    upstream = torch.randn_like(expected)
    [gradient] = torch.autograd.grad(fused, table, upstream)
    [expected_gradient] = torch.autograd.grad(expected, table, upstream)
    assert torch.allclose(gradient, expected_gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("aggregation", ["mean", "gcn"])
@settings(max_examples=15, deadline=None)
@given(graph=graphs(), data=st.data())
def test_fused_is_gather_then_aggregate(aggregation: Aggregation, graph: Topology, data: st.DataObject) -> None:
    nodes = st.integers(0, graph.indptr.shape[0] - 2)
    seeds = data.draw(st.lists(nodes, unique=True, max_size=6))
    fanouts = tuple(data.draw(st.lists(st.sampled_from([-1, 1, 2, 5]), min_size=1, max_size=2)))
    law_fused_is_gather_then_aggregate(graph, seeds, fanouts, aggregation)


def on_a_skewed_graph(aggregation: Aggregation) -> None:
    law_fused_is_gather_then_aggregate(skewed_graph(), list(range(0, 400, 9)), (3, 4), aggregation)
    law_fused_is_gather_then_aggregate(skewed_graph(weighted=False), list(range(0, 400, 9)), (3, 4), aggregation)


def test_mutant_that_forgets_the_undrawn_neighbours_is_caught() -> None:
    original = operators_module.gcn_coefficients

    def unscaled(graph: Any, source: Tensor, destination: Tensor) -> tuple[Tensor, Tensor]:
        edges, selves = original(replace(graph, degrees=graph.indptr.diff()), source, destination)
        return edges, selves

    assert_caught(lambda: on_a_skewed_graph("gcn"), operators_module, "gcn_coefficients", unscaled)


def test_mutant_that_takes_a_plain_mean_of_weighted_edges_is_caught() -> None:
    assert_caught(lambda: on_a_skewed_graph("mean"), operators_module, "mean_coefficients", lambda graph: None)


def test_mutant_that_drops_the_last_edge_is_caught() -> None:
    original = message_passing.F.embedding_bag

    def short(indices: Tensor, table: Tensor, offsets: Tensor, **options: Any) -> Tensor:
        weights = options.pop("per_sample_weights")
        offsets = offsets.clamp(max=indices.shape[0] - 1)
        return original(
            indices[:-1], table, offsets, per_sample_weights=None if weights is None else weights[:-1], **options
        )

    for aggregation in ("mean", "gcn"):
        assert_caught(lambda a=aggregation: on_a_skewed_graph(a), message_passing.F, "embedding_bag", short)  # type: ignore[misc]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("aggregation", ["mean", "gcn"])
def test_a_16_bit_table_gives_float32_rows_to_its_precision(aggregation: Aggregation, dtype: torch.dtype) -> None:
    graph = skewed_graph()
    layer = input_layer(graph, list(range(0, 400, 9)), (5, 4))
    table = torch.randn(400, 6)
    operators = LayerOperators(graph, aggregation)
    rows = FirstRows(operators, table.to(dtype)).of(layer)
    assert rows.dtype == torch.float32
    expected = FirstRows(operators, table.to(dtype).float()).of(layer)
    scale = float(expected.abs().max())
    assert float((rows - expected).abs().max()) <= 4 * torch.finfo(dtype).eps * scale
    out = torch.empty_like(rows)
    assert FirstRows(operators, table.to(dtype)).of(layer, out=out) is out
    assert torch.equal(out, rows)
