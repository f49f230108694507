"""Exact evaluation equals the dense forward pass, whatever its order, blocks, tables and ranks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dngd.comm import LocalCommunicator
from dngd.errors import UserError
from dngd.graph import GraphStore
from dngd.graph.splits import Split
from dngd.models import GNN
from dngd.train import evaluation as evaluation_module
from dngd.train import evaluation_plan, neighbour_sums, tables
from dngd.train.evaluation import ExactEvaluator
from dngd.train.layer_arithmetic import LayerArithmetic
from dngd.train.neighbour_sums import NeighbourSums
from dngd.train.tables import Table, TableSpace
from tests.helpers.exact_evaluation import CLASSES, N, awkward_store, dense_forward, evaluator, made_model
from tests.helpers.mutants import assert_caught, mutant
from tests.helpers.thread_world import ThreadCommunicator, run_threads

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = {"widening": (6, 8), "narrowing": (12, 5)}
SOME = torch.tensor([60, 2, 17, 40, 41, 59, 3])
"""Wanted nodes: the hub, an isolated one, in no order."""


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], GraphStore]:
    folder = tmp_path_factory.mktemp("awkward")
    return {
        (name, weighted): awkward_store(folder / f"{name}-{weighted}", weighted=weighted, features=features)
        for (name, (features, _)), weighted in itertools.product(SHAPES.items(), (False, True))
    }


@pytest.fixture(autouse=True)
def nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small graphs take the ways of large ones: no block is made larger, no order is settled, no table is private."""
    monkeypatch.setattr(evaluation_plan, "SMALL_TABLE_BYTES", 0)
    monkeypatch.setattr(evaluation_plan, "_LEAST_BLOCK_ROWS", 1)
    monkeypatch.setattr(evaluation_plan, "_BLOCKS", 1)
    monkeypatch.setattr(tables, "SHARED_FROM_BYTES", 0)
    monkeypatch.setattr(tables, "PIECE_BYTES", 100)


def law_logits(store: GraphStore, model: GNN, tolerance: float, **options: Any) -> None:
    """Twice: the second time from the kept first rows."""
    made = evaluator(store, model.train(), **options)
    expected = dense_forward(store, model)
    for _ in range(2):
        found = made.logits(model)
        assert found.dtype == model.graph_layers()[0].linear.weight.dtype
        assert torch.allclose(found.double(), expected, rtol=tolerance, atol=tolerance)
    assert model.training, "evaluation left the model in eval mode"


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("kind", ["gcn", "sage"])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_the_dense_forward_pass(
    stores: dict[tuple[str, bool], GraphStore], tmp_path: Path, shape: str, kind: str, weighted: bool
) -> None:
    """Blocks of 1, 7, N and more rows; tables in memory and on disk; the first rows kept or not."""
    store, (features, hidden) = stores[shape, weighted], SHAPES[shape]
    model = made_model(kind, features, hidden)
    for rows, memory, keeps in ((1, None, True), (7, 0, False), (7, 0, True), (N, None, False), (1000, 0, True)):
        law_logits(store, model, 1e-5, rows=rows, memory_bytes=memory, folders=[tmp_path], keeps_first=keeps)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["gcn", "sage"])
def test_in_float64(stores: dict[tuple[str, bool], GraphStore], kind: str) -> None:
    """GCN's norms are float32."""
    for shape, weighted in stores:
        features, hidden = SHAPES[shape]
        model = made_model(kind, features, hidden, dtype=torch.float64)
        law_logits(stores[shape, weighted], model, 1e-12 if kind == "sage" else 1e-6, rows=9)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["gcn", "sage"])
def test_sixteen_bit_features_are_summed_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, dtype: str
) -> None:
    """Exact for the features that the table holds; a run of widened edges ends inside a node's edges."""
    monkeypatch.setattr(neighbour_sums, "WIDENED_EDGES", 5)
    store = awkward_store(tmp_path / "store", weighted=kind == "gcn", dtype=dtype)
    assert store.features.dtype == getattr(torch, dtype)
    law_logits(store, made_model(kind, 6, 8), 1e-5, rows=13)
    law_logits(store, made_model(kind, 6, 2), 1e-5, rows=13, keeps_first=False)


@pytest.mark.parametrize("num_layers", [1, 2, 4])
def test_any_depth(stores: dict[tuple[str, bool], GraphStore], num_layers: int) -> None:
    for kind, shape in itertools.product(("gcn", "sage"), SHAPES):
        features, hidden = SHAPES[shape]
        law_logits(stores[shape, True], made_model(kind, features, hidden, num_layers=num_layers), 1e-5, rows=7)


def predicted(made: ExactEvaluator, model: GNN, nodes: Tensor | None) -> tuple[Tensor, Tensor]:
    ids, logits = zip(*made.predictions(model, nodes))
    return torch.cat(ids), torch.cat(logits)


@pytest.mark.parametrize("kind", ["gcn", "sage"])
@pytest.mark.parametrize("shape", SHAPES)
def test_chosen_nodes(
    stores: dict[tuple[str, bool], GraphStore], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shape: str, kind: str
) -> None:
    """Only they come out, in order, equal to the full forward pass; hubs' edges are copied a node at a time."""
    monkeypatch.setattr(neighbour_sums, "MOST_EDGES", 20)
    monkeypatch.setattr(evaluation_plan, "_MOST_PRUNED", 1.0)
    store, (features, hidden) = stores[shape, True], SHAPES[shape]
    model = made_model(kind, features, hidden)
    expected = dense_forward(store, model)
    chosen = [SOME, torch.arange(N), torch.arange(10, 50), torch.tensor([59, 60]), torch.tensor([17])]
    for nodes, memory in itertools.product(chosen, (None, 0)):
        made = evaluator(store, model, rows=4, memory_bytes=memory, folders=[tmp_path], keeps_first=False)
        ids, logits = predicted(made, model, nodes)
        assert torch.equal(ids, nodes.sort().values)
        assert torch.allclose(logits.double(), expected[ids], rtol=1e-5, atol=1e-5)


def test_only_what_they_need_is_computed(
    stores: dict[tuple[str, bool], GraphStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An isolated node needs itself; all nodes need all. The aggregated rows are counted."""
    summed: list[int] = []
    original = LayerArithmetic._aggregate

    def counted(self: LayerArithmetic, source: Any, where: Any) -> Tensor:
        out = original(self, source, where)
        summed.append(out.shape[0])
        return out

    monkeypatch.setattr(LayerArithmetic, "_aggregate", counted)
    store, model = stores["widening", False], made_model("sage", 6, 8)
    made = evaluator(store, model, keeps_first=False)
    for nodes, rows in ((torch.tensor([60]), 3), (torch.arange(N), 3 * N)):
        summed.clear()
        predicted(made, model, nodes)
        assert sum(summed) == rows


def test_scores(stores: dict[tuple[str, bool], GraphStore]) -> None:
    """Of the parts that are asked for; parts may share nodes."""
    store, model = stores["widening", False], made_model("gcn", 6, 8)
    split = Split(torch.arange(20), torch.arange(20, 33), torch.arange(33, N), {})
    made = evaluator(store, model, rows=7)
    expected = dense_forward(store, model)
    found = made.scores(model, split)
    assert found.keys() == {"val", "test"}
    found |= made.scores_of(model, {"train": split.train, "shared": SOME})
    for name, nodes in (("train", split.train), ("val", split.val), ("test", split.test), ("shared", SOME)):
        loss = F.cross_entropy(expected[nodes], store.labels[nodes])
        right = (expected[nodes].argmax(dim=1) == store.labels[nodes]).double().mean()
        assert found[name].loss == pytest.approx(float(loss), rel=1e-5), name
        assert found[name].accuracy == float(right), name


def worlds(store: GraphStore, model: GNN, world_size: int, folder: Path, **options: Any) -> list[Any]:
    """Each rank's (logits, scores of two sets, ids of its predictions)."""

    def work(communicator: ThreadCommunicator) -> Any:
        made = evaluator(store, model, communicator, rows=7, folders=[folder], **options)
        logits = [made.logits(model) for _ in range(2)]
        scores = made.scores_of(model, {"a": SOME, "b": torch.arange(30)})
        ids = [list(map(int, block)) for block, _ in made.predictions(model, SOME)]
        return logits, scores, list(itertools.chain(*ids))

    if world_size == 1:
        return [work(LocalCommunicator())]  # type: ignore[arg-type]
    return run_threads(world_size, work)


def law_world_size_does_not_matter(
    store: GraphStore, model: GNN, folder: Path, world_sizes: tuple[int, ...] = (2, 3, 4), **options: Any
) -> None:
    """But for rounding: the blocks are the same, where they lie in memory is not."""
    [(expected, scores, _)] = worlds(store, model, 1, folder, **options)
    for world_size in world_sizes:
        found = worlds(store, model, world_size, folder, **options)
        for logits, rank_scores, _ in found:
            for first, second in zip(logits, expected):
                assert torch.allclose(first, second, rtol=1e-6, atol=1e-6)
            for name in scores:
                assert rank_scores[name].loss == pytest.approx(scores[name].loss, rel=1e-6)
                assert rank_scores[name].accuracy == scores[name].accuracy
        assert sorted(itertools.chain(*(ids for *_, ids in found))) == sorted(SOME.tolist())
    assert torch.allclose(expected[0].double(), dense_forward(store, model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["gcn", "sage"])
@pytest.mark.parametrize("place", ["memory", "disk", "private"])
def test_world_size_does_not_matter(
    stores: dict[tuple[str, bool], GraphStore],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    place: str,
) -> None:
    """With tables that the ranks share, in memory and on disk, and with one each."""
    if place == "private":
        monkeypatch.setattr(tables, "SHARED_FROM_BYTES", 2**40)
    model = made_model(kind, 6, 8)
    memory = 0 if place == "disk" else None
    law_world_size_does_not_matter(stores["widening", True], model, tmp_path, memory_bytes=memory)
    assert not list(tmp_path.iterdir())


def test_a_failure_closes_every_table(
    stores: dict[tuple[str, bool], GraphStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And leaves the model as it was."""
    closed: list[Table] = []
    made: list[Table] = []
    original, shared = Table.close, TableSpace.shared
    monkeypatch.setattr(Table, "close", lambda self: (closed.append(self), original(self))[1])
    monkeypatch.setattr(TableSpace, "shared", lambda *a, **k: made.append(shared(*a, **k)) or made[-1])
    monkeypatch.setattr(LayerArithmetic, "output", lambda *_: (_ for _ in ()).throw(OSError("gone")))
    model = made_model("sage", 6, 8).train()
    with pytest.raises(OSError, match="gone"):
        evaluator(stores["widening", False], model, memory_bytes=0, folders=[tmp_path]).logits(model)
    assert made
    assert set(map(id, made)) <= set(map(id, closed))
    assert model.training


def test_progress_ends_at_its_total(stores: dict[tuple[str, bool], GraphStore]) -> None:
    told: list[tuple[int, int]] = []
    model = made_model("sage", 6, 8)
    made = evaluator(stores["widening", False], model, rows=7, progress=lambda *now: told.append(now))
    made.logits(model)
    store = stores["widening", False]
    assert told[-1] == (3 * (store.num_edges + N),) * 2
    assert [done for done, _ in told] == sorted({done for done, _ in told})


@st.composite
def graphs(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    n = draw(st.integers(1, 12))
    edges = draw(st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), max_size=60))
    degrees = torch.bincount(torch.tensor([v for _, v in edges], dtype=torch.int64), minlength=n)
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), degrees.cumsum(0)])
    return indptr, torch.tensor([u for u, _ in sorted(edges, key=lambda edge: edge[1])], dtype=torch.int64)


class _Graph:
    """As much of a store as sums need."""

    def __init__(self, indptr: Tensor, indices: Tensor, weight: Tensor | None) -> None:
        self.indptr, self.indices, self.edge_weight, self.num_nodes = indptr, indices, weight, indptr.numel() - 1


@settings(max_examples=60, deadline=None)
@given(graphs(), st.data())
def test_sums_over_any_nodes(graph: tuple[Tensor, Tensor], data: st.DataObject) -> None:
    """Slices and chosen nodes, few or many, with weights and source scales, of a widened table or not."""
    indptr, indices = graph
    n = indptr.numel() - 1
    weighted, scaled, most = data.draw(st.booleans()), data.draw(st.booleans()), data.draw(st.sampled_from([1, 3, 999]))
    weight = torch.arange(1.0, indices.numel() + 1) if weighted else None
    norm = torch.arange(1.0, n + 1) if scaled else None
    table = torch.arange(2.0 * n).view(n, 2).to(data.draw(st.sampled_from([torch.float32, torch.bfloat16])))
    ids = torch.tensor(sorted(data.draw(st.sets(st.integers(0, n - 1)))), dtype=torch.int64)
    made = NeighbourSums(_Graph(indptr, indices, weight), "gcn" if scaled else "mean", norm)  # type: ignore[arg-type]
    dense = torch.zeros(n, n)
    owners = torch.repeat_interleave(torch.arange(n), indptr.diff())
    coefficients = torch.ones(indices.numel()) if weight is None else weight
    dense.index_put_((owners, indices), coefficients * (1 if norm is None else norm[indices]), accumulate=True)
    expected = dense @ table.float()
    with mutant(neighbour_sums, "MOST_EDGES", most), mutant(neighbour_sums, "WIDENED_EDGES", most):
        for where in (ids, slice(0, n), slice(n // 2, n)):
            found = made.sums(table, where, torch.float32, scale_sources=scaled)
            assert torch.allclose(found, expected[where], rtol=1e-5)


def mutants() -> Iterator[tuple[Any, str, Any]]:
    """Mistakes that evaluation could hide: in the divisor, the ranges, the sharing, the self loop, the own part."""
    bounds, aggregate, publish = evaluation_plan.bounds_of, LayerArithmetic._aggregate, TableSpace.publish

    def one_off(*arguments: Any) -> list[int]:
        first, *others = bounds(*arguments)
        return [first, *(max(0, bound - 1) for bound in others[:-1]), others[-1] - 1]

    def by_fanout(self: NeighbourSums, sums: Tensor, where: Any) -> Tensor:
        return sums.div_(10)

    def without_self(self: LayerArithmetic, source: Any, where: Any) -> Tensor:
        out = aggregate(self, source, where)
        return out if self._is_mean else out - self.rows(source, where) * self._neighbours.norm(where, out) ** 2

    def last_rank_forgotten(self: TableSpace, table: Table, rows: Any, ends: list[int]) -> None:
        publish(self, table, rows, [*ends[:-1], ends[-2]])

    yield evaluation_module, "bounds_of", one_off
    yield NeighbourSums, "to_mean_", by_fanout
    yield LayerArithmetic, "_aggregate", without_self
    yield TableSpace, "publish", last_rank_forgotten


@pytest.mark.parametrize("change", list(mutants()), ids=lambda change: change[1])
def test_mutants_are_caught(
    stores: dict[tuple[str, bool], GraphStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any
) -> None:
    monkeypatch.setattr(tables, "SHARED_FROM_BYTES", 2**40)  # a table each: what is not sent is missed

    def law() -> None:
        for kind in ("gcn", "sage"):
            law_world_size_does_not_matter(stores["widening", False], made_model(kind, 6, 8), tmp_path, (2,))

    assert_caught(law, *change)


def test_classes_count(stores: dict[tuple[str, bool], GraphStore]) -> None:
    model = made_model("sage", 6, 8)
    assert evaluator(stores["widening", False], model).logits(model).shape == (N, CLASSES)


def law_all_ranks_look_for_room(store: GraphStore, folder: Path) -> None:
    """Where a look for room is a collective, as on GPUs: one rank has none, and no later evaluation waits for it."""
    model = made_model("gcn", *SHAPES["widening"])
    original = TableSpace.private

    def private(self: TableSpace, *given: Any, **named: Any) -> Table:
        self._agree(False)
        if self._comm.rank == 1:
            raise UserError("no room here")
        return original(self, *given, **named)

    def work(communicator: ThreadCommunicator) -> list[Tensor]:
        made = evaluator(store, model, communicator, rows=7, folders=[folder])
        return [made.logits(model) for _ in range(3)]

    expected = dense_forward(store, model)
    with mutant(TableSpace, "private", private):
        for logits in itertools.chain(*run_threads(2, work)):
            assert torch.allclose(logits.double(), expected, rtol=1e-4, atol=1e-4)


def test_a_rank_without_room_for_first_rows_is_not_waited_for(
    stores: dict[tuple[str, bool], GraphStore], tmp_path: Path
) -> None:
    law_all_ranks_look_for_room(stores["widening", False], tmp_path)
