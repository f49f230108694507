"""Which order a layer takes, for which nodes, on which rank; and that the plan's bytes are what is held."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dngd.graph import GraphStore
from dngd.train import evaluation_plan, tables
from dngd.train.evaluation_plan import LayerShape, block_rows, blocks_between, bounds_of, evaluation_bytes, plan_work
from dngd.train.tables import Rows, Table, TableSpace
from tests.helpers.exact_evaluation import N, awkward_store, evaluator, made_model

PRODUCTS = (LayerShape(100, 256, 2), LayerShape(256, 256, 2), LayerShape(256, 47, 2))


@pytest.fixture(scope="module")
def awkward(tmp_path_factory: pytest.TempPathFactory) -> GraphStore:
    return awkward_store(tmp_path_factory.mktemp("plan") / "store")


class Degrees:
    """As much of a store as bounds need."""

    def __init__(self, degrees: Tensor) -> None:
        self.indptr = torch.cat([torch.zeros(1, dtype=torch.int64), degrees.cumsum(0)])
        self.num_nodes, self.num_edges = degrees.numel(), int(degrees.sum())
        self.edge_weight = None


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 2000), min_size=1, max_size=80),
    st.integers(1, 9),
    st.integers(1, 6),
    st.booleans(),
    st.data(),
)
def test_bounds_are_balanced_whole_blocks(
    degrees: list[int], block: int, world_size: int, chooses: bool, data: st.DataObject
) -> None:
    """Every row has one rank; no rank has more than its share and a block."""
    store: Any = Degrees(torch.tensor(degrees))
    rows = Rows(None, len(degrees))
    if chooses:
        ids = torch.tensor(sorted(data.draw(st.sets(st.integers(0, len(degrees) - 1)))), dtype=torch.int64)
        rows = Rows(ids, ids.numel())
    bounds = bounds_of(store, rows, block, world_size)
    parts = [blocks_between(bounds, rank, block) for rank in range(world_size)]
    flat = [pair for part in parts for pair in part]
    assert flat == [(a, min(a + block, rows.count)) for a in range(0, rows.count, block)]
    chosen = torch.arange(len(degrees)) if rows.ids is None else rows.ids
    cost = [sum(degrees[int(v)] + evaluation_plan._ROW_EDGES for v in chosen[first:last]) for first, last in flat]
    share = sum(cost) / world_size
    by_rank = [
        sum(degrees[int(v)] + evaluation_plan._ROW_EDGES for a, b in part for v in chosen[a:b]) for part in parts
    ]
    assert max(by_rank) <= share + max(cost, default=0)


def test_one_node_with_most_edges_is_not_everyones() -> None:
    """By nodes, the rank with the hub would have several times the edges of the other."""
    store: Any = Degrees(torch.tensor([10_000] + [100] * 99))
    assert bounds_of(store, Rows(None, 100), 1, 2) == [0, 12, 100]


def test_blocks() -> None:
    assert block_rows(2_449_029, 65536, on_gpu=False) == 8192
    assert block_rows(2_449_029, 65536, on_gpu=True) == 38267
    assert block_rows(60_000, 65536, on_gpu=False) == 1024
    assert block_rows(60_000, 100, on_gpu=False) == 100


def orders(store: GraphStore, shapes: Any, nodes: Tensor | None, *, keeps_first: bool) -> list[bool]:
    return [layer.transforms_first for layer in plan_work(store, shapes, nodes, keeps_first=keeps_first).layers]


def test_orders(awkward: GraphStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transform first where that narrows what is gathered; but not for few nodes of many sources, nor what is kept."""
    assert orders(awkward, PRODUCTS, None, keeps_first=True) == [False, False, True]
    wide = (LayerShape(1000, 16, 1), LayerShape(16, 7, 1))
    assert orders(awkward, wide, None, keeps_first=True) == [False, True]  # small: aggregated once, kept
    monkeypatch.setattr(evaluation_plan, "SMALL_TABLE_BYTES", 0)
    assert orders(awkward, wide, None, keeps_first=True) == [True, True]
    assert orders(awkward, (LayerShape(60, 16, 1),), None, keeps_first=True) == [False]
    assert orders(awkward, (LayerShape(60, 16, 1),), None, keeps_first=False) == [True]
    # A few edges' rows are gathered sooner than their sources are transformed.
    few = torch.tensor([int((awkward.in_degrees() == 1).nonzero()[0, 0])])
    assert orders(awkward, PRODUCTS, few, keeps_first=True)[-1] is False
    monkeypatch.setattr(evaluation_plan, "_FLOPS_A_BYTE", 1e6)
    assert orders(awkward, PRODUCTS, few, keeps_first=True)[-1] is True


def test_rows_are_what_the_wanted_nodes_need(awkward: GraphStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation_plan, "_MOST_PRUNED", 1.0)
    nodes = torch.tensor([3, 59])
    work = plan_work(awkward, PRODUCTS, nodes, keeps_first=False)
    needed = {3, 59}
    for rows in (*(layer.rows for layer in reversed(work.layers)), work.inputs):
        found = set(range(N)) if rows.ids is None else set(rows.ids.tolist())
        assert found == needed or (rows.ids is None and len(needed) > N / 2)
        for v in list(needed):
            needed |= set(awkward.indices[awkward.indptr[v] : awkward.indptr[v + 1]].tolist())
    monkeypatch.setattr(evaluation_plan, "_MOST_PRUNED", 0.0)
    assert plan_work(awkward, PRODUCTS, nodes, keeps_first=False).layers[-2].rows.ids is None


@pytest.mark.parametrize("kind", ["gcn", "sage"])
@pytest.mark.parametrize("widths", [(6, 8), (12, 5), (3, 64)])
def test_bytes_bound_what_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, widths: tuple[int, int]
) -> None:
    """The tables that are open at a time, of all nodes and of some, in any order; equal where the order is certain."""
    monkeypatch.setattr(evaluation_plan, "SMALL_TABLE_BYTES", 0)
    monkeypatch.setattr(tables, "SHARED_FROM_BYTES", 0)
    open_bytes, most = 0, 0
    shared, close = TableSpace.shared, Table.close

    def opened(self: TableSpace, *arguments: Any) -> Table:
        nonlocal open_bytes, most
        table = shared(self, *arguments)
        open_bytes += table.rows.numel() * 4
        most = max(most, open_bytes)
        return table

    def closed(self: Table) -> None:
        nonlocal open_bytes
        open_bytes -= self.rows.numel() * 4
        close(self)

    monkeypatch.setattr(TableSpace, "shared", opened)
    monkeypatch.setattr(Table, "close", closed)
    store = awkward_store(tmp_path / "store", features=widths[0])
    model = made_model(kind, *widths, num_layers=4)
    shapes = evaluation_plan.shapes_of(model)
    for nodes in (None, torch.tensor([3, 59]), torch.arange(50)):
        for keeps in (False, True):
            open_bytes = most = 0
            made = evaluator(store, model, keeps_first=keeps, memory_bytes=2**30)
            list(made.predictions(model, nodes))
            bound = evaluation_bytes(store, shapes, nodes, 7)
            assert 0 < most <= bound.tables
            assert open_bytes == 0
            if nodes is None and not keeps:
                assert most == bound.tables
    assert evaluation_bytes(store, shapes, None, 7).kept == N * widths[0] * 4


def test_products_bytes(awkward: GraphStore) -> None:
    """A layer's 256 wide table and the two narrow ones of the last; not two wide ones."""
    found = evaluation_bytes(awkward, PRODUCTS, None, 8192)
    assert found.tables == N * (256 + 2 * 47) * 4
    assert found.kept == N * 100 * 4
