"""The first layer's rows in two parts, the host's and the device's, are the rows in one. The CPU plays the device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dngd.models.message_passing import Aggregation
from dngd.sampling import cached_rows
from dngd.sampling.cached_rows import CachedRows
from dngd.sampling.minibatch import MiniBatch
from dngd.sampling.operators import FirstRows, LayerOperators
from dngd.sampling.pipeline import SamplerPipeline
from dngd.sampling.sampler import NeighborSampler
from dngd.sampling.topology import Topology
from dngd.train.hot_rows import keep_rows
from tests.helpers.mutants import assert_caught
from tests.unit.sampling.graphs import graphs, make_pipeline, skewed_graph, take

CPU = torch.device("cpu")


def nan_where_kept(features: Tensor, cache: CachedRows) -> Tensor:
    """A host that reads a row that the device keeps gets NaN for it."""
    host = features.clone()
    host[~cache.on_host] = float("nan")
    return host


def law_both_parts_are_the_rows(
    graph: Topology, seeds: list[int], kept: list[int], aggregation: Aggregation, table: Tensor, fanout: int = 3
) -> None:
    sampler = NeighborSampler(graph.indptr, graph.indices, graph.edge_weight, (fanout,))
    [layer] = sampler.sample(torch.tensor(seeds, dtype=torch.int64), 3)
    operators = LayerOperators(graph, aggregation)
    whole = FirstRows(operators, table).of(layer)
    cache = keep_rows(table, torch.tensor(sorted(kept), dtype=torch.int64), CPU)
    host = FirstRows(operators, nan_where_kept(table, cache), cache.on_host)
    out = torch.full(host.shape(layer), 7.0)
    operator = host.operator(layer)
    assert operator is not None
    of_host = host.of(layer, out=out, operator=operator)
    assert of_host is out
    assert torch.equal(of_host, host.of(layer))
    both = of_host + cache.part(aggregation, operator)
    eps = torch.finfo(table.dtype).eps
    scale = max(1.0, float(whole.abs().max())) if whole.numel() else 1.0
    assert both.shape == whole.shape
    assert not both.isnan().any(), "the host read a row that the device keeps"
    assert torch.allclose(both, whole, rtol=0.0, atol=16 * eps * scale), (both - whole).abs().max()


@pytest.mark.parametrize("aggregation", ["mean", "gcn"])
@settings(max_examples=25, deadline=None)
@given(graph=graphs(), data=st.data())
def test_both_parts_are_the_rows(aggregation: Aggregation, graph: Topology, data: st.DataObject) -> None:
    num_nodes = graph.indptr.shape[0] - 1
    some = st.lists(st.integers(0, num_nodes - 1), unique=True)
    seeds = data.draw(some)
    kept = data.draw(st.one_of(some, st.just([]), st.just(list(range(num_nodes)))))
    fanout = data.draw(st.sampled_from([-1, 1, 3]))
    table = torch.randn(num_nodes, 4, generator=torch.Generator().manual_seed(0))
    law_both_parts_are_the_rows(graph, seeds, kept, aggregation, table, fanout)


def on_a_skewed_graph(aggregation: Aggregation, weighted: bool, dtype: torch.dtype = torch.float32) -> None:
    graph = skewed_graph(weighted=weighted)
    assert graph.features is not None
    law_both_parts_are_the_rows(
        graph, list(range(0, 400, 7)), list(range(0, 400, 2)), aggregation, graph.features.to(dtype), 5
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("aggregation", ["mean", "gcn"])
def test_of_16_bit_features(aggregation: Aggregation, dtype: torch.dtype) -> None:
    on_a_skewed_graph(aggregation, True, dtype)
    on_a_skewed_graph(aggregation, False, dtype)


def test_mutant_mean_over_the_edges_that_are_left_is_caught() -> None:
    original = cached_rows._restricted

    def own_offsets(operator: cached_rows.Propagation, on_host: Tensor) -> cached_rows.Propagation:
        left = original(operator, on_host)
        operator.indptr.copy_(left.indptr)
        return left

    assert_caught(lambda: on_a_skewed_graph("mean", False), cached_rows, "_restricted", own_offsets)


def test_mutant_that_sums_all_on_the_host_is_caught() -> None:
    def everything(operator: cached_rows.Propagation, on_host: Tensor) -> cached_rows.Propagation:
        return operator

    for aggregation in ("mean", "gcn"):
        assert_caught(lambda a=aggregation: on_a_skewed_graph(a, True), cached_rows, "_restricted", everything)  # type: ignore[misc]


def test_mutant_that_takes_another_row_for_those_on_the_host_is_caught() -> None:
    def clamped(cache: CachedRows, nodes: Tensor) -> Tensor:
        return cache.positions[nodes].long().clamp_max(cache.num_rows - 1)

    for aggregation in ("mean", "gcn"):
        assert_caught(lambda a=aggregation: on_a_skewed_graph(a, False), CachedRows, "_rows", clamped)  # type: ignore[misc]


# --- through the pipeline


@pytest.mark.parametrize(
    ("aggregation", "weighted"), [pytest.param("mean", False, marks=pytest.mark.slow), ("gcn", True)]
)
def test_children_leave_out_what_the_device_keeps(
    aggregation: Aggregation, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches held and let go, so that they come over the socket and in slots; shards without seeds; the thread too.

    Told to read randomly, they read the same.
    """
    monkeypatch.setattr("dngd.sampling.pipeline.inline_sampling_is_canonical", lambda: True)
    graph = skewed_graph(weighted=weighted)
    assert graph.features is not None
    cache = keep_rows(graph.features, torch.arange(0, 400, 3), CPU)
    blind = replace(graph, features=nan_where_kept(graph.features, cache))
    whole_rows = FirstRows(LayerOperators(graph, aggregation), graph.features)

    def check(batches: Iterable[MiniBatch]) -> list[int]:
        sizes = []
        for batch in batches:
            assert batch.first_rows is not None
            assert batch.first_operator is not None
            both = batch.first_rows + cache.part(aggregation, batch.first_operator)
            assert torch.allclose(both, whole_rows.of(batch.layers[0]), rtol=1e-5, atol=1e-5)
            sizes.append(batch.seeds.numel())
        return sizes

    def pipeline(num_samplers: int) -> SamplerPipeline:
        return make_pipeline(
            num_samplers,
            store=blind,
            aggregation=aggregation,
            train_nodes=torch.arange(33),
            shards=[0, 1, 2, 3],
            on_host=cache.on_host,
            random_reads=True,
        )

    assert check(islice(pipeline(0), 8)) == [8, 8, 8, 8, 1, 0, 0, 0]
    with pipeline(1) as child:
        assert check(take(child, 6)) == [8, 8, 8, 8, 1, 0]
        assert check(islice(child, 4)) == [0, 0, 8, 8]
