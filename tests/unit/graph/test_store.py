"""Laws of the store: what is written is what is read, in canonical order, without copying."""

from __future__ import annotations

import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dngd.errors import UserError
from dngd.graph import GraphStore, describe


@st.composite
def graphs(draw: st.DrawFn) -> tuple[int, np.ndarray]:
    """A number of nodes and entries with repeats, self loops and isolated nodes."""
    num_nodes = draw(st.integers(1, 12))
    node = st.integers(0, num_nodes - 1)
    pairs = draw(st.lists(st.tuples(node, node), max_size=40))
    return num_nodes, np.array(pairs, dtype=np.int64).reshape(-1, 2).T


def entries_of(store: GraphStore) -> list[tuple[int, int]]:
    destination = torch.repeat_interleave(torch.arange(store.num_nodes), store.in_degrees())
    return list(zip(store.indices.tolist(), destination.tolist()))


def hashes(store: GraphStore) -> dict[str, str]:
    return {name: entry.sha256 for name, entry in store.manifest.files.items()}


@settings(max_examples=60, deadline=None)
@given(graph=graphs(), seed=st.integers(0, 9))
def test_round_trip_keeps_exactly_the_simple_edges(graph: tuple[int, np.ndarray], seed: int) -> None:
    num_nodes, edge_index = graph
    features = np.random.default_rng(seed).standard_normal((num_nodes, 3)).astype(np.float32)
    given_pairs = [tuple(pair) for pair in edge_index.T.tolist()]
    simple = {pair for pair in given_pairs if pair[0] != pair[1]}
    with tempfile.TemporaryDirectory() as folder:
        store = GraphStore.write(Path(folder) / "g", edge_index=edge_index, features=features)
        assert entries_of(store) == sorted(simple, key=lambda pair: (pair[1], pair[0]))
        assert np.array_equal(store.features.numpy(), features)
        num_loops = sum(a == b for a, b in given_pairs)
        assert store.manifest.self_loops.dropped == num_loops
        assert store.manifest.duplicates.dropped == len(given_pairs) - num_loops - len(simple)
        assert store.manifest.directed == ({(b, a) for a, b in simple} != simple)
        assert store.verify() == []


@settings(max_examples=40, deadline=None)
@given(graph=graphs(), seed=st.integers(0, 9), keep=st.booleans())
def test_files_do_not_depend_on_edge_order(graph: tuple[int, np.ndarray], seed: int, keep: bool) -> None:
    num_nodes, edge_index = graph
    rng = np.random.default_rng(seed)
    weight = rng.choice(np.array([-0.0, 0.0, 0.5, 1.5], dtype=np.float32), edge_index.shape[1])
    options: dict[str, Any] = {
        "features": np.ones((num_nodes, 2)),
        "duplicates": "keep" if keep else "sum",
        "self_loops": "keep",
    }
    order = rng.permutation(edge_index.shape[1])
    with tempfile.TemporaryDirectory() as folder:
        one = GraphStore.write(Path(folder) / "one", edge_index=edge_index, edge_weight=weight, name="g", **options)
        two = GraphStore.write(
            Path(folder) / "two", edge_index=edge_index[:, order], edge_weight=weight[order], name="g", **options
        )
        assert hashes(one) == hashes(two)
        assert one.manifest == two.manifest
        if keep:
            assert one.num_edges == edge_index.shape[1]
        # The total is kept whatever becomes of copies.
        assert one.edge_weight is not None
        assert float(one.edge_weight.sum()) == pytest.approx(float(weight.sum()))


def test_negative_zero_weights_do_not_betray_the_edge_order(tmp_path: Path) -> None:
    stores = [
        GraphStore.write(
            tmp_path / str(sign),
            edge_index=[[0, 0], [1, 1]],
            edge_weight=np.array([sign * 0.0, -sign * 0.0]),
            features=np.ones((2, 1)),
            duplicates="keep",
        )
        for sign in (1, -1)
    ]
    assert hashes(stores[0]) == hashes(stores[1])


def test_weights_follow_their_edges(arrays: dict[str, Any], small: GraphStore) -> None:
    expected = {
        (int(a), int(b)): float(w) for (a, b), w in zip(arrays["edge_index"].T, arrays["edge_weight"]) if a != b
    }
    assert small.edge_weight is not None
    assert dict(zip(entries_of(small), small.edge_weight.tolist())) == expected


def test_types_and_shapes(arrays: dict[str, Any], small: GraphStore) -> None:
    assert small.indptr.dtype == small.indices.dtype == small.labels.dtype == torch.int64
    assert small.features.dtype == torch.float32
    assert small.features.shape == (30, 7)
    assert small.features.is_contiguous()
    assert np.array_equal(small.features.numpy(), arrays["features"].astype(np.float32))
    assert np.array_equal(small.labels.numpy(), arrays["labels"])
    assert {name: mask.tolist() for name, mask in small.split_masks.items()} == {
        name: mask.tolist() for name, mask in arrays["masks"].items()
    }
    assert all(mask.dtype == torch.bool for mask in small.split_masks.values())
    assert small.nbytes == sum(f.stat().st_size for f in small.path.glob("*.arrow"))


def test_several_splits_and_no_features_and_no_edges(tmp_path: Path) -> None:
    masks = np.eye(4, 5, dtype=bool)
    store = GraphStore.write(
        tmp_path / "g", edge_index=np.zeros((2, 0), dtype=int), features=None, num_nodes=5, masks={"train": masks}
    )
    assert store.split_masks["train"].tolist() == masks.tolist()
    assert store.features.shape == (5, 0)
    assert store.num_edges == 0
    assert store.labels.tolist() == [-1] * 5
    assert store.verify() == []
    assert describe(store)["homophily"] is None


def test_topology_as_csc_and_sparse_features(arrays: dict[str, Any], small: GraphStore, tmp_path: Path) -> None:
    again = GraphStore.write(
        tmp_path / "again",
        **{
            **arrays,
            "edge_index": None,
            "indptr": small.indptr,
            "indices": small.indices,
            "edge_weight": small.edge_weight,
            "features": scipy.sparse.csr_matrix(arrays["features"]),
        },
    )
    assert hashes(again) == hashes(small)


def test_tensors_view_the_mapped_files(small: GraphStore) -> None:
    maps = Path("/proc/self/maps").read_text().splitlines()
    for name, tensor in (("features", small.features), ("indices", small.indices), ("labels", small.labels)):
        ranges = [line.split()[0].split("-") for line in maps if line.endswith(str(small.path / f"{name}.arrow"))]
        assert any(int(low, 16) <= tensor.data_ptr() < int(high, 16) for low, high in ranges), name


def test_a_change_in_the_file_is_seen_and_a_change_in_memory_stays_there(small: GraphStore) -> None:
    entry = small.manifest.files["labels.arrow"]
    file = small.path / "labels.arrow"
    before = file.read_bytes()
    with file.open("r+b") as handle:
        handle.seek(entry.data_offset)
        handle.write((3).to_bytes(8, "little"))
    assert int(small.labels[0]) == 3
    file.write_bytes(before)
    small.features.zero_()
    again = GraphStore.open(small.path)
    assert float(again.features.abs().sum()) > 0
    assert again.verify() == []


def test_opening_warns_of_nothing_and_pickles_as_a_path(small: GraphStore) -> None:
    code = f"import dngd.graph as g; print(float(g.GraphStore.open({str(small.path)!r}).features.sum()))"
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) == pytest.approx(float(small.features.sum()))
    data = pickle.dumps(small)
    assert len(data) < 1000
    assert pickle.loads(data).features.equal(small.features)  # noqa: S301  (this test's own bytes)


def test_describe(small: GraphStore) -> None:
    info = describe(small)
    destination = torch.repeat_interleave(torch.arange(30), small.in_degrees())
    one, other = small.labels[small.indices], small.labels[destination]
    both = (one >= 0) & (other >= 0)
    assert info["homophily"] == pytest.approx(float((one == other)[both].float().mean()))
    assert sum(info["class_counts"]) == info["num_labelled"] == int((small.labels >= 0).sum())
    assert info["in_degree"]["max"] == int(small.in_degrees().max())


BAD: list[tuple[dict[str, Any], str]] = [
    ({"features": np.ones((29, 7)), "num_nodes": 30}, "29 rows but the graph has 30"),
    ({"features": np.ones((20, 7))}, "names node .* but the graph has 20 nodes"),
    ({"features": np.ones(30)}, "table of numbers"),
    ({"features": np.zeros((0, 7))}, "no nodes"),
    ({"features": [[1.0], [1.0, 2.0]]}, "rectangular"),
    ({"features": np.where(np.eye(30, 7) > 0, np.nan, 1.0)}, "7 NaN or infinite .* node 0 column 0, node 1 column 1"),
    ({"features": scipy.sparse.csr_matrix(np.where(np.eye(30, 7) > 0, np.inf, 0))}, "7 NaN or infinite"),
    ({"features": np.full((30, 7), 1e300)}, "210 NaN or infinite values as float32"),
    ({"edge_index": np.array([[0, -1], [1, 1]])}, "names node -1"),
    ({"edge_index": np.array([[0], [30]])}, "names node 30"),
    ({"edge_index": np.array([[0.0], [1.0]])}, "float64"),
    ({"edge_index": np.zeros((5, 2), dtype=int)}, "transpose"),
    ({"edge_index": None}, "topology"),
    ({"edge_weight": np.full(120, np.nan)}, "120 edge weights are NaN"),
    ({"edge_weight": np.ones(3)}, "one number for each"),
    ({"labels": np.full(30, 4)}, "label 4 of node 0 is out of range"),
    ({"labels": np.full(30, -2)}, "label -2 of node 0 is out of range"),
    ({"labels": np.full((30, 4), 0.5)}, "values other than 0 and 1"),
    ({"labels": np.zeros(29, dtype=int)}, "give one a node"),
    ({"labels": np.full(30, 0.5)}, "label 0.5 of node 0 is no whole number"),
    ({"masks": {"train": np.ones(29, dtype=bool)}}, "train mask has shape"),
    ({"masks": {"train": np.ones((30, 2), dtype=bool)}}, "transpose"),
    ({"masks": {"train": np.arange(30)}}, "booleans"),
    ({"masks": {"validation": np.ones(30, dtype=bool)}}, "'validation' is not known"),
    ({"directed": False}, "lack their reverse"),
    ({"duplicates": "merge"}, "drop, sum, keep"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input_is_refused_before_anything_is_written(
    arrays: dict[str, Any], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    if "edge_index" in change and "edge_weight" not in change:
        change = {**change, "edge_weight": None}
    with pytest.raises(UserError, match=message):
        GraphStore.write(tmp_path / "sub" / "store", **{**arrays, **change})
    assert list(tmp_path.iterdir()) == []


def test_copies_with_different_weights_are_not_dropped_silently(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"edge 0 -> 1 .* weights 1 and 2"):
        GraphStore.write(tmp_path / "g", edge_index=[[0, 0], [1, 1]], edge_weight=[1.0, 2.0], features=np.ones((2, 1)))
