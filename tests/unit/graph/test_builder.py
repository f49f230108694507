"""Stores built from streams: equal to the definition whatever the blocks and the memory; columns; errors."""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dngd.errors import UserError
from dngd.graph import GraphStore, RowBlocks, StoreBuilder, describe, edge_sort, key_sort
from dngd.graph.arrow_files import write_columns
from dngd.graph.edge_sort import EdgeSort
from dngd.graph.key_sort import KeySort
from tests.helpers.mutants import assert_caught

# Where there is one, a folder in memory: each store is synced to its disk.
SHARED_MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None


@dataclass(frozen=True)
class Expected:
    """What a store of some edges holds, by its definition, edge by edge."""

    indptr: list[int]
    indices: list[int]
    weight: list[np.float32] | None
    directed: bool
    loops: tuple[int, int]
    copies: tuple[int, int]
    """(dropped, kept)"""


def expected(case: Case) -> Expected:
    weights = [None] * len(case.pairs) if case.weights is None else [np.float32(w) + 0 for w in case.weights]
    entries = [(d, s, w) for (s, d), w in zip(case.pairs, weights)]
    num_loops = sum(d == s for d, s, _ in entries)
    if case.self_loops == "drop":
        entries = [e for e in entries if e[0] != e[1]]
    if case.add_reverse:
        entries += [(s, d, w) for d, s, w in entries if d != s]
    entries.sort(key=lambda e: e if e[2] is not None else e[:2])
    groups = [(key, list(group)) for key, group in itertools.groupby(entries, key=lambda e: e[:2])]
    num_copies = len(entries) - len(groups)
    keep = case.duplicates == "keep"
    if not keep:
        if case.duplicates == "sum":
            entries = [(*key, np.float32(sum(float(w) for _, _, w in group))) for key, group in groups]
        else:
            entries = [group[0] for _, group in groups]
    found = Counter(e[:2] for e in entries)
    return Expected(
        indptr=[sum(e[0] < v for e in entries) for v in range(case.num_nodes + 1)],
        indices=[s for _, s, _ in entries],
        weight=None if case.weights is None else [w for _, _, w in entries],
        directed=found != Counter({(s, d): count for (d, s), count in found.items()}),
        loops=(0, num_loops if keep else len({e[:2] for e in entries if e[0] == e[1]}))
        if case.self_loops == "keep"
        else (num_loops, 0),
        copies=(0, num_copies) if keep else (num_copies, 0),
    )


@dataclass(frozen=True)
class Case:
    """Edges and options."""

    num_nodes: int
    pairs: list[tuple[int, int]]
    weights: list[float] | None
    add_reverse: bool
    self_loops: Any
    duplicates: Any
    memory_bytes: int
    block: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Multigraphs with self loops, isolated nodes, parallel edges, hubs; weights agree within copies if they must."""
    num_nodes = draw(st.integers(1, 12))
    node = st.integers(0, num_nodes - 1)
    hub = st.sampled_from([0, num_nodes // 2])
    pairs = draw(st.lists(st.one_of(st.tuples(node, node), st.tuples(node, hub)), max_size=60))
    if draw(st.booleans()):
        pairs += [(d, s) for s, d in pairs]
    duplicates = draw(st.sampled_from(["drop", "keep", "sum"]))
    weights: list[float] | None = None
    if duplicates == "sum" or draw(st.booleans()):
        few = [-0.0, 0.0, 0.5, 1 / 3, 7.0]
        if duplicates == "drop":
            weights = [few[(s * 7 + d * 7 + s * d) % len(few)] for s, d in pairs]
        else:
            weights = draw(st.lists(st.sampled_from(few), min_size=len(pairs), max_size=len(pairs)))
    return Case(
        num_nodes,
        pairs,
        weights,
        draw(st.booleans()),
        draw(st.sampled_from(["drop", "keep"])),
        duplicates,
        draw(st.sampled_from([1, 200, 1200, 1 << 20])),
        draw(st.integers(1, 70)),
    )


def add_all(sort: EdgeSort | StoreBuilder, case: Case) -> None:
    add = sort.add if isinstance(sort, EdgeSort) else sort.add_edges
    for start in range(0, len(case.pairs), case.block):
        pairs = np.array(case.pairs[start : start + case.block])
        weight = None if case.weights is None else np.array(case.weights[start : start + case.block], dtype=np.float32)
        add(pairs[:, 0], pairs[:, 1], weight)


@settings(max_examples=120, deadline=None)
@given(case=cases())
def test_files_are_those_of_the_definition_whatever_blocks_and_memory(case: Case) -> None:
    want = expected(case)
    with tempfile.TemporaryDirectory(dir=SHARED_MEMORY) as name:
        one, two = Path(name) / "one", Path(name) / "two"
        one.mkdir()
        two.mkdir()
        sort = EdgeSort(
            one,
            case.num_nodes,
            weighted=case.weights is not None,
            add_reverse=case.add_reverse,
            directed=None,
            self_loops=case.self_loops,
            duplicates=case.duplicates,
            memory_bytes=case.memory_bytes,
        )
        add_all(sort, case)
        made = sort.write()
        arrays = {"indptr": np.array(want.indptr), "indices": np.array(want.indices, dtype=np.int64)}
        if want.weight is not None:
            arrays["edge_weight"] = np.array(want.weight, dtype=np.float32)
        entries = {f"{n}.arrow": write_columns(two / f"{n}.arrow", {n: values}) for n, values in arrays.items()}
        assert made.files == entries
        for file in entries:
            assert (one / file).read_bytes() == (two / file).read_bytes(), file
        assert sorted(entry.name for entry in one.iterdir()) == sorted(entries)
        assert (made.num_edges, made.directed) == (len(want.indices), want.directed)
        assert (made.self_loops.dropped, made.self_loops.kept) == want.loops
        assert (made.duplicates.dropped, made.duplicates.kept) == want.copies


@settings(max_examples=25, deadline=None)
@given(case=cases())
def test_a_builder_gives_the_store_that_arrays_give(case: Case) -> None:
    options: dict[str, Any] = {
        "name": "g",
        "num_nodes": case.num_nodes,
        "add_reverse": case.add_reverse,
        "self_loops": case.self_loops,
        "duplicates": case.duplicates,
    }
    features = np.arange(3 * case.num_nodes, dtype=np.float64).reshape(-1, 3)
    labels = np.arange(case.num_nodes) % 3 - 1
    with tempfile.TemporaryDirectory(dir=SHARED_MEMORY) as name:
        with StoreBuilder(
            f"{name}/one", weighted=case.weights is not None, memory_bytes=case.memory_bytes, **options
        ) as builder:
            add_all(builder, case)
            blocks = (features[start : start + case.block] for start in range(0, case.num_nodes, case.block))
            one = builder.finish(features=RowBlocks(3, blocks), labels=labels, num_classes=4)
        two = GraphStore.write(
            f"{name}/two",
            edge_index=np.array(case.pairs, dtype=np.int64).reshape(-1, 2).T,
            edge_weight=case.weights,
            features=features,
            labels=labels,
            num_classes=4,
            **options,
        )
        assert one.manifest == two.manifest
        assert one.verify() == []


def add_pairs(folder: Path, pairs: list[tuple[int, int]], num_nodes: int, **options: Any) -> edge_sort.Topology:
    defaults: dict[str, Any] = {
        "weighted": False,
        "add_reverse": False,
        "directed": None,
        "self_loops": "drop",
        "duplicates": "drop",
    }
    sort = EdgeSort(folder, num_nodes, **defaults | options)
    sort.add(*np.array(pairs).T, None)
    return sort.write()


def test_direction_is_measured_and_each_part_of_the_measure_is_needed(tmp_path: Path) -> None:
    """Cycles, the same with one edge moved, and graphs with as many edges up as down that are no mirror images."""

    def measure() -> None:
        for size in (4, 5, 9):
            cycle = [(v, (v + 1) % size) for v in range(size)]
            both = cycle + [(b, a) for a, b in cycle]
            moved = [*both[:-1], (both[-1][0], (both[-1][1] + 2) % size)]
            assert not add_pairs(tmp_path, both, size).directed
            assert add_pairs(tmp_path, cycle, size).directed
            assert add_pairs(tmp_path, moved, size).directed
        assert add_pairs(tmp_path, [(0, 1), (2, 0)], 3).directed
        assert add_pairs(tmp_path, [(0, 1), (0, 1), (1, 0), (2, 1), (1, 2), (1, 2)], 3, duplicates="keep").directed

    measure()
    symmetry = edge_sort._Symmetry
    assert_caught(measure, symmetry, "_add", lambda self, side, keys: None)
    assert_caught(measure, symmetry, "holds", lambda self: self._counts[0] == self._counts[1])


def test_an_edge_without_its_reverse_is_named(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    pairs = {(int(a), int(b)) for a, b in rng.integers(0, 50, (900, 2)) if a < b}
    both = sorted(pairs | {(b, a) for a, b in pairs})
    both.remove(min(pairs, key=lambda pair: (pair[0], pair[1])))
    both.remove(max(pairs))
    lonely = sorted({(b, a) for a, b in both} - set(both))
    first = min(((b, a) for a, b in lonely), key=lambda pair: (pair[1], pair[0]))
    for memory in (300, None):
        with pytest.raises(UserError, match=rf"but 2 of {len(both)} edges .* the first is {first[0]} -> {first[1]};"):
            add_pairs(tmp_path, both, 50, directed=False, memory_bytes=memory)
    with pytest.raises(UserError, match="more copies than their reverse"):
        add_pairs(tmp_path, [(0, 1), (0, 1), (1, 0)], 2, directed=False, duplicates="keep")


@settings(max_examples=60, deadline=None)
@given(
    keys=st.lists(st.integers(0, 2**62), max_size=80),
    blocks=st.integers(1, 40),
    memory=st.sampled_from([1, 160, 900, 1 << 20]),
    distinct=st.booleans(),
    merged=st.booleans(),
)
def test_keys_come_out_sorted_in_whole_groups(
    keys: list[int], blocks: int, memory: int, distinct: bool, merged: bool
) -> None:
    """With repeats, keys of any size, reading twice, and merging in between."""
    keys = keys + keys[::3] + keys[:1] * 20
    with (
        tempfile.TemporaryDirectory(dir=SHARED_MEMORY) as folder,
        KeySort(Path(folder), distinct=distinct, memory_bytes=memory) as sort,
    ):
        for start in range(0, len(keys), blocks):
            sort.add(np.array(keys[start : start + blocks], dtype=np.int64))
            if merged and start == blocks:
                count = sort.merge()
                so_far = keys[: start + blocks]
                assert count == (len(set(so_far)) if distinct else len(so_far))
        for _ in range(2):
            chunks = [chunk for chunk, _ in sort.chunks()]
            assert all(one[-1] < other[0] for one, other in itertools.pairwise(chunks))
            found = np.concatenate([*chunks, np.empty(0, np.int64)]).tolist()
            assert found == sorted(found)
            assert set(found) == set(keys)
            assert distinct or Counter(found) == Counter(keys)
        assert list(Path(folder).iterdir()) == []


def test_ranges_are_as_small_as_the_memory_says_even_within_a_hub(tmp_path: Path) -> None:
    """All keys in one narrow range, as the edges into one node are; and only copies of one key may exceed it."""
    rng = np.random.default_rng(0)
    capacity = 1000
    with KeySort(tmp_path, memory_bytes=capacity * 40) as sort:
        for _ in range(30):
            sort.add(10**12 + rng.integers(0, 10**4, 777))
        sizes = [len(keys) for keys, _ in sort.chunks()]
    assert sum(sizes) == 30 * 777
    assert max(sizes) <= capacity
    assert len(sizes) < 60


@pytest.mark.parametrize("largest", [1, 1 << 20, 1 << 53, 1 << 56, 1 << 62], ids=lambda largest: f"{largest:.0e}")
def test_weights_follow_their_keys(largest: int) -> None:
    """Also where key and position do not fit into one number, and where keys differ in their last bits only."""
    rng = np.random.default_rng(1)
    keys = rng.choice(np.concatenate([rng.integers(0, largest, 300), largest - rng.integers(0, 9, 300)]).clip(0), 2000)
    weights = rng.choice(np.array([0.0, 0.25, 3.5], dtype=np.float32), len(keys))
    pairs = sorted(zip(keys.tolist(), weights.tolist()))
    key_sort.sort_pairs(keys, weights)
    assert list(zip(keys.tolist(), weights.tolist())) == pairs


def rows(table: np.ndarray[Any, Any], *sizes: int) -> RowBlocks:
    """A table in blocks of the given sizes, which is an error to read twice."""

    def blocks() -> Iterator[np.ndarray[Any, Any]]:
        start = 0
        for size in sizes:
            yield table[start : start + size]
            start += size

    return RowBlocks(table.shape[1], blocks())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("given", [np.float64, np.float32, np.float16, np.int16, np.uint8, np.bool_])
def test_feature_types(tmp_path: Path, dtype: Any, given: Any) -> None:
    table = (np.random.default_rng(0).standard_normal((9, 5)) * 100).astype(given)
    with StoreBuilder(tmp_path / "g", num_nodes=9, feature_dtype=dtype) as builder:
        store = builder.finish(features=rows(table, 2, 0, 6, 1))
    want = torch.from_numpy(table).to(torch.float32 if dtype == "bfloat16" else getattr(torch, dtype))
    assert store.features.dtype == getattr(torch, dtype)
    assert store.features.equal(want.to(store.features.dtype))
    assert store.verify() == []
    assert describe(store)["feature_dtype"] == dtype
    again = GraphStore.write(
        tmp_path / "h", features=table, edge_index=np.zeros((2, 0), dtype=int), feature_dtype=dtype
    )
    assert again.digest == store.digest
    maps = Path("/proc/self/maps").read_text().splitlines()
    ranges = [line.split()[0].split("-") for line in maps if line.endswith("features.arrow")]
    assert any(int(low, 16) <= store.features.data_ptr() < int(high, 16) for low, high in ranges)


def test_other_programs_read_16_bit_features(tmp_path: Path) -> None:
    table = np.array([[1.0, -2.5], [0.0, 3.0]])
    for dtype, arrow in (("float16", pa.float16()), ("bfloat16", pa.uint16())):
        store = GraphStore.write(
            tmp_path / dtype,
            features=table,
            edge_index=[[0], [1]],
            feature_dtype=dtype,  # type: ignore[arg-type]
        )
        column = pa.ipc.open_file(store.path / "features.arrow").read_all()["features"]
        assert column.type.value_type == arrow
        bits = np.array(column.combine_chunks().to_pylist(), dtype=np.float32 if dtype == "float16" else np.uint32)
        values = bits if dtype == "float16" else (bits << 16).view(np.float32)
        assert np.array_equal(values, table)


@pytest.mark.parametrize(
    ("change", "dtype", "message"),
    [
        ({(1, 0): np.nan, (6, 2): np.inf}, "float32", "2 NaN .* node 1 column 0, node 6 column 2; replace"),
        ({(6, 2): 65_520.0}, "float16", "1 NaN .* as float16, the first at node 6 column 2; 1 of them are finite"),
        ({(0, 0): 1e39, (1, 1): np.nan}, "bfloat16", "2 NaN .* 1 of them are finite but beyond .* 3.39e"),
        ({(0, 0): 1e300}, "float32", "beyond the largest float32, 3.4e.*: scale or replace them$"),
        ({(5, k): np.nan for k in range(4)}, "float16", "4 NaN .* column 0, node 5 column 1, node 5 column 2;"),
    ],
)
def test_values_that_cannot_be_stored_are_counted_over_the_whole_table(
    tmp_path: Path, change: dict[tuple[int, int], float], dtype: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = np.ones((8, 4))
    for place, value in change.items():
        table[place] = value
    # The edges, which take long, are not sorted before.
    monkeypatch.setattr(EdgeSort, "write", lambda self: pytest.fail("edges were sorted first"))
    with (
        pytest.raises(UserError, match=message),
        StoreBuilder(tmp_path / "sub" / "g", num_nodes=8, feature_dtype=dtype) as builder,
    ):
        builder.finish(features=rows(table, 3, 3, 2))
    assert list(tmp_path.iterdir()) == []


def test_the_largest_numbers_that_fit_are_kept(tmp_path: Path) -> None:
    for dtype, largest in (("float16", 65_504.0), ("bfloat16", 3.3895313892515355e38)):
        store = GraphStore.write(
            tmp_path / dtype,
            features=[[largest]],
            edge_index=[[], []],
            feature_dtype=dtype,  # type: ignore[arg-type]
        )
        assert float(store.features[0, 0]) == largest


BAD_FEATURES: list[tuple[RowBlocks, str]] = [
    (rows(np.ones((7, 3)), 4, 3), "features have 7 rows but the graph has 8 nodes"),
    (rows(np.ones((9, 3)), 4, 5), "more than 8 rows but the graph has 8 nodes"),
    (RowBlocks(3, []), "features have 0 rows"),
    (RowBlocks(3, [np.ones((8, 4))]), r"block 0 has shape \(8, 4\)"),
    (RowBlocks(3, [np.ones((4, 3)), np.ones(4)]), r"block 1 has shape \(4,\)"),
    (RowBlocks(3, [np.full((8, 3), "1")]), "must be numbers"),
    (RowBlocks(3, [np.ones((8, 3), dtype=complex)]), "complex128"),
]


@pytest.mark.parametrize(("table", "message"), BAD_FEATURES)
def test_tables_of_another_shape_are_refused(tmp_path: Path, table: RowBlocks, message: str) -> None:
    with pytest.raises(UserError, match=message), StoreBuilder(tmp_path / "g", num_nodes=8) as builder:
        builder.finish(features=table)
    assert list(tmp_path.iterdir()) == []


IDS: list[tuple[Any, Any]] = [
    (np.array([5, 2**62, -3]), np.array([5, 2**62, -3])),
    (np.array([5, 2**31 + 7, 3], dtype=np.uint64), np.array([5, 2**31 + 7, 3])),
    (torch.tensor([9, 8, 7], dtype=torch.int32), np.array([9, 8, 7])),
    (pa.chunked_array([[1], [2**40, 0]]), np.array([1, 2**40, 0])),
    (["a", "", "long name ünï"], ["a", "", "long name ünï"]),
    (np.array(["x", "yy", "z"]), ["x", "yy", "z"]),
    (pa.array(["skipped", "p", "q", "r"]).slice(1), ["p", "q", "r"]),
    (pa.chunked_array([pa.array(["p"], pa.large_string()), pa.array(["q", "r"], pa.large_string())]), ["p", "q", "r"]),
]


@pytest.mark.parametrize(("given", "want"), IDS)
def test_node_ids_are_kept(tmp_path: Path, given: Any, want: Any) -> None:
    store = GraphStore.write(tmp_path / "g", edge_index=[[0], [1]], features=np.ones((3, 1)), node_ids=given)
    found = GraphStore.open(tmp_path / "g").node_ids
    if isinstance(want, np.ndarray):
        assert found.dtype == np.int64
        assert found.tolist() == want.tolist()
        assert store.ids_of(1, 3).type == pa.int64()
    else:
        assert found.type == pa.string()
        assert found.to_pylist() == want
    assert store.ids_of(1, 3).to_pylist() == list(want)[1:]
    assert store.ids_of(2, 2).to_pylist() == []
    assert describe(store)["node_ids"] == ("int64" if isinstance(want, np.ndarray) else "string")
    assert store.verify() == []
    again = GraphStore.write(tmp_path / "h", edge_index=[[0], [1]], features=np.ones((3, 1)), node_ids=list(want))
    assert again.digest == store.digest


def test_without_node_ids_they_are_the_numbers(tmp_path: Path) -> None:
    store = GraphStore.write(tmp_path / "g", edge_index=[[0], [1]], features=np.ones((4, 1)))
    assert store.node_ids is None
    assert store.ids_of(1, 4).equals(pa.array([1, 2, 3]))
    for first, last in ((-1, 2), (0, 5), (3, 2)):
        with pytest.raises(ValueError, match="not within 0 to 4"):
            store.ids_of(first, last)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([7, 8, 7], "7 for node 0 and again for node 2"),
        ([7, 8, 8, 7], "4 entries but the graph has 3"),
        (["b", "a", "a"], "'a' for node 1 and again for node 2"),
        (pa.array([2**40, 1, 2**40]), "1099511627776 for node 0 and again for node 2"),
        (pa.array(["a", None, "c"]), "no id for node 1"),
        ([1.0, 2.0, 3.0], "type double"),
        (np.ones(3), "type double"),
        (["a", 3, "c"], "mixes kinds of values"),
        (np.array([2**63, 1, 2], dtype=np.uint64), "beyond 64-bit"),
        (np.ones((3, 1), dtype=int), "one id a node"),
        ([2**70, 1, 2], "mixes|beyond"),
    ],
)
def test_bad_node_ids_are_refused(tmp_path: Path, given: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        GraphStore.write(tmp_path / "g", edge_index=[[0], [1]], features=np.ones((3, 1)), node_ids=given)
    assert list(tmp_path.iterdir()) == []


BAD_EDGES: list[tuple[tuple[Any, ...], str]] = [
    (([0, 5, 9], [1, 1, 1]), r"edge 101 \(counted from 0\) joins 5 -> 1 but .* numbered 0 to 4 \(2 such edges"),
    (([0, 0], [1, -1]), "edge 101 .* joins 0 -> -1"),
    ((np.array([2**63], dtype=np.uint64), [1]), "edge 100 .* joins 9223372036854775808 -> 1"),
    (([0.0], [1.0]), "source nodes .* dtype float64"),
    (([[0, 1]], [[1, 0]]), r"source nodes .* shape \(1, 2\)"),
    (([0], [1, 2]), "1 sources and 2 destinations"),
    (([0], [1], [0.5]), "weights though weighted=False"),
]


@pytest.mark.parametrize(("block", "message"), BAD_EDGES)
def test_the_first_bad_edge_is_named(tmp_path: Path, block: tuple[Any, ...], message: str) -> None:
    with StoreBuilder(tmp_path / "g", num_nodes=5) as builder:
        builder.add_edges(np.arange(100) % 5, np.arange(100) % 3)
        with pytest.raises(UserError, match=message):
            builder.add_edges(*block)
    assert list(tmp_path.iterdir()) == []


def test_weights_are_checked_with_the_number_of_the_edge(tmp_path: Path) -> None:
    with StoreBuilder(tmp_path / "g", num_nodes=5, weighted=True) as builder:
        builder.add_edges([0, 1, 2], [1, 2, 3], [1, 2, 3])
        with pytest.raises(UserError, match="1 edge weights are NaN or infinite, the first is that of edge 4;"):
            builder.add_edges([0, 1, 2], [1, 2, 3], [1, np.nan, 3])
        with pytest.raises(UserError, match="no weights though"):
            builder.add_edges([0], [1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_nodes": 0}, "num_nodes=0"),
        ({"num_nodes": 2**32}, "num_nodes=4294967296"),
        ({"feature_dtype": "float64"}, "float32, float16, bfloat16"),
        ({"duplicates": "sum"}, "needs edge weights"),
        ({"duplicates": "merge"}, "drop, sum, keep"),
        ({"directed": True, "add_reverse": True}, "contradicts"),
        ({"name": " "}, "is empty"),
    ],
)
def test_options_are_checked_first(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        StoreBuilder(tmp_path / "g", **{"num_nodes": 5, **options})


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_leaving_without_finish_leaves_nothing(tmp_path: Path, error: type[BaseException] | None) -> None:
    def leave() -> None:
        with StoreBuilder(tmp_path / "new" / "folder" / "g", num_nodes=5, memory_bytes=100) as builder:
            builder.add_edges(np.arange(100) % 5, np.arange(100) % 3)
            assert len(list((tmp_path / "new" / "folder").iterdir())) == 1
            if error is not None:
                raise error

    if error is None:
        leave()
    else:
        with pytest.raises(error):
            leave()
    assert list(tmp_path.iterdir()) == []


def test_a_builder_is_used_once_and_within_its_block(tmp_path: Path) -> None:
    builder = StoreBuilder(tmp_path / "g", num_nodes=5)
    with pytest.raises(RuntimeError, match="outside of its `with` block"):
        builder.add_edges([0], [1])
    with builder:
        builder.finish()
        with pytest.raises(RuntimeError, match="after finish"):
            builder.add_edges([0], [1])
    assert GraphStore.open(tmp_path / "g").num_edges == 0


def test_progress_tells_every_stage_to_its_end(tmp_path: Path) -> None:
    told: dict[str, list[tuple[int, int]]] = {}
    with StoreBuilder(
        tmp_path / "g", num_nodes=5, progress=lambda stage, *count: told.setdefault(stage, []).append(count)
    ) as builder:
        for _ in range(3):
            builder.add_edges([0, 1], [1, 2])
        builder.finish(features=rows(np.ones((5, 2)), 2, 3))
    assert told == {"edges": [(2, 0), (4, 0), (6, 0)], "features": [(2, 5), (5, 5)], "sorting": [(2, 2)]}


MEMORY = """
    import sys
    import numpy as np
    from pathlib import Path
    from dngd.graph import RowBlocks, StoreBuilder

    def status(field):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

    def build(path, num_nodes, num_edges, width, hub):
        rng = np.random.default_rng(0)
        with StoreBuilder(path, num_nodes=num_nodes, duplicates="keep") as builder:
            for _ in range(num_edges // 50_000):
                source, destination = rng.integers(0, num_nodes, (2, 50_000))
                builder.add_edges(source, np.where(rng.random(50_000) < hub, num_nodes // 3, destination))
            blocks = (np.full((500, width), 1.5, dtype=np.float32) for _ in range(num_nodes // 500))
            return builder.finish(features=RowBlocks(width, blocks), labels=np.arange(num_nodes) % 7)

    folder = Path(sys.argv[1])
    build(folder / "warm", 500, 50_000, 4, 0.0)
    for hub in (0.0, 0.9):
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        files = build(folder / str(hub), 100_000, 3_000_000, 512, hub).manifest.files
        topology = files["indptr.arrow"].bytes + files["indices.arrow"].bytes
        assert files["features.arrow"].bytes > 8 * topology
        print((status("VmHWM") - before) / topology)
"""


def test_memory_is_less_than_one_and_a_half_topologies(tmp_path: Path) -> None:
    """With features many times as large, and with nine tenths of the edges into one node."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of a process is known on Linux only")
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEMORY), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    ratios = [float(line) for line in result.stdout.split()]
    assert len(ratios) == 2
    assert max(ratios) < 1.5, ratios
