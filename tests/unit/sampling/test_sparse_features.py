"""Tables of few entries: which are such, and first rows taken from them, in this process and in others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dngd.models import Aggregation, SparseRows
from dngd.sampling import pipeline as pipeline_module
from dngd.sampling import sparse_features
from dngd.sampling.operators import FirstRows, LayerOperators
from dngd.sampling.sampler import NeighborSampler
from dngd.sampling.sparse_features import SparseFirstRows, arrays_of, beside, from_arrays, shares_of, sparse_table
from dngd.sampling.topology import Topology
from tests.unit.models.test_sparse_rows import few_entries
from tests.unit.sampling.graphs import digest, graphs, make_pipeline, skewed_graph, take


def words(graph: Topology, width: int = 30, share: float = 0.1) -> Topology:
    return replace(graph, features=few_entries(graph.indptr.numel() - 1, width, share=share))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block", [1, 40, 1 << 19])
def test_a_table_of_any_type_in_blocks_of_any_size(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, block: int
) -> None:
    monkeypatch.setattr(sparse_features, "_BLOCK", block)
    table = few_entries(37, 11).to(dtype)
    table[3, 2] = -0.0
    kept = sparse_table(table)
    assert kept.values.dtype == torch.float32
    assert torch.equal(kept.dense(), table.float())
    assert kept.values.numel() == int((table != 0).sum())
    again = from_arrays(arrays_of(kept), 11)
    assert torch.equal(again.dense(), table.float())


def ring(num_nodes: int, degree: int) -> Topology:
    """Each node has the `degree` nodes before it as in-neighbours."""
    sources = (torch.arange(num_nodes)[:, None] - torch.arange(1, degree + 1)) % num_nodes
    return Topology(torch.arange(num_nodes + 1) * degree, sources.reshape(-1))


def test_which_tables_are_such() -> None:
    table = torch.zeros(3000, 400)
    table[:, :4] = 1  # a hundredth

    def rows(table: Tensor, fanout: int, degree: int) -> float | None:
        shares = shares_of(table, ring(len(table), degree), fanout)
        if shares is not None:
            assert shares.table == pytest.approx(0.01)
        return None if shares is None else shares.rows

    assert rows(table, 10, 50) == pytest.approx(0.11)
    assert rows(table, 18, 50) == pytest.approx(0.19)
    assert rows(table, 20, 50) is None
    assert rows(table, 20, 3) == pytest.approx(0.04)
    assert rows(table, -1, 18) == pytest.approx(0.19)
    assert rows(table, -1, 50) is None
    assert rows(table, 20, 0) == pytest.approx(0.01)
    assert rows(table[:, :255], 1, 1) is None
    assert rows(table[:5], 3, 2) == pytest.approx(0.03)
    assert (
        shares_of(table[:0], Topology(torch.zeros(1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)), 1) is None
    )
    table[1500:] = 1  # what it is told by is spread over the graph
    assert rows(table, 1, 1) is None


def test_nodes_without_edges_do_not_make_a_graph_seem_sparse() -> None:
    """A hundredth of each row, 30 neighbours in one node of ten: what is summed is a third full."""
    table = torch.zeros(3000, 400)
    table[:, :4] = 1
    inner = ring(300, 30)
    graph = Topology(torch.cat([inner.indptr, torch.full((2700,), 9000)]), inner.indices)
    assert shares_of(table, graph, -1) is None
    table[300:] = 0  # nor do nodes that nothing reads
    assert shares_of(table, graph, -1) is None


def law_first_rows_are_those_of_the_dense_table(
    graph: Topology, aggregation: Aggregation, fanout: int, excluded: Tensor | None = None
) -> None:
    graph = words(graph, share=0.3)
    assert graph.features is not None
    sampler = NeighborSampler(graph.indptr, graph.indices, graph.edge_weight, (fanout, fanout))
    num_nodes = graph.indptr.numel() - 1
    layer = sampler.draw(torch.arange(0, num_nodes, 2), 5, excluded).layers[0]
    operators = LayerOperators(graph, aggregation)
    found = SparseFirstRows(operators, sparse_table(graph.features)).of(layer)
    expected = FirstRows(operators, graph.features).of(layer)
    assert found.shape == expected.shape
    for row in range(found.shape[0]):  # a column once at most
        begin, end = int(found.indptr[row]), int(found.indptr[row + 1])
        assert len(set(found.columns[begin:end].tolist())) == end - begin
    assert torch.allclose(found.dense(), expected, rtol=1e-5, atol=1e-6)


@given(st.integers(0, 8), st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_matrices_beside_each_other(rows: int, left: int, right: int, seed: int) -> None:
    parts = [few_entries(rows, width, seed + i, share=0.5) for i, width in enumerate((left, right))]
    assert torch.equal(beside(*map(sparse_table, parts)).dense(), torch.cat(parts, 1))


@given(graphs(), st.sampled_from(["gcn", "mean"]), st.sampled_from([-1, 1, 3]))
@settings(max_examples=60, deadline=None)
def test_first_rows_are_those_of_the_dense_table(graph: Topology, aggregation: Aggregation, fanout: int) -> None:
    law_first_rows_are_those_of_the_dense_table(graph, aggregation, fanout)


@pytest.mark.parametrize("aggregation", ["gcn", "mean"])
@pytest.mark.parametrize("weighted", [False, True])
def test_first_rows_without_edges_that_are_left_out(aggregation: Aggregation, weighted: bool) -> None:
    graph = skewed_graph(80, weighted=weighted)
    excluded = torch.arange(0, graph.indices.numel(), 7)
    law_first_rows_are_those_of_the_dense_table(graph, aggregation, 3, excluded)


@pytest.mark.parametrize("aggregation", ["gcn", "mean"])
def test_batches_are_alike_whoever_draws_them(monkeypatch: pytest.MonkeyPatch, aggregation: Aggregation) -> None:
    """By one process and by two, in shared memory and over the socket, and by this process's thread, whose draws are
    others where another thread of these tests used DGL before; as the dense ones are."""
    monkeypatch.setattr(pipeline_module, "inline_sampling_is_canonical", lambda: True)
    graph = words(skewed_graph())
    assert graph.features is not None
    table = sparse_table(graph.features)
    digests = set()
    for samplers, slots in ((0, 10), (1, 10), (2, 10), (1, 0)):
        monkeypatch.setattr(pipeline_module, "MAX_SLOTS", slots)
        drawn = []
        for sparse in (None, table):
            with make_pipeline(samplers, store=graph, aggregation=aggregation, sparse=sparse) as batches:
                drawn.append(take(batches, 9))
        if samplers:
            digests.add(digest(drawn[1]))
        for dense, kept in zip(*drawn):
            assert isinstance(dense.first_rows, Tensor)
            assert isinstance(kept.first_rows, SparseRows)
            assert torch.allclose(kept.first_rows.dense(), dense.first_rows, rtol=1e-5, atol=1e-6)
    assert len(digests) == 1


def test_without_first_rows_no_table_is_sent() -> None:
    graph = words(skewed_graph())
    assert graph.features is not None
    with make_pipeline(1, store=graph, aggregation=None, sparse=sparse_table(graph.features)) as batches:
        assert next(batches).first_rows is None
