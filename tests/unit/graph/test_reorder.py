"""Laws of reordering: the same graph under other node numbers, and back again byte for byte."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dngd.errors import UserError
from dngd.graph import (
    GraphStore,
    order_by_degree,
    order_by_partition,
    partition_by_ldg,
    reorder,
    reorder_store,
    write_partition,
)
from dngd.graph.balance import node_blocks
from tests.helpers.mutants import assert_caught


@pytest.fixture(autouse=True, scope="module")
def tiny_blocks() -> Any:
    """Blocks of a few rows and edges, so that small graphs have several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reorder, "_BLOCK_BYTES", 64)
        patch.setattr(reorder, "node_blocks", functools.partial(node_blocks, max_edges=7))
        yield


@st.composite
def arguments(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of GraphStore.write: any mix of what a store can hold."""
    num_nodes = draw(st.integers(1, 14))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    num_entries = draw(st.sampled_from([0, 5, 60]))
    ids: Any = {
        "none": None,
        "numbers": rng.permutation(num_nodes) + 2**40,
        "strings": [f"node {k}" * (k % 3 + 1) for k in rng.permutation(num_nodes)],
    }[draw(st.sampled_from(["none", "numbers", "strings"]))]
    mask_shape = draw(st.sampled_from([None, (num_nodes,), (3, num_nodes)]))
    return {
        "edge_index": rng.integers(0, num_nodes, (2, num_entries)),
        # Few values, so that copies of an edge have equal and unequal ones.
        "edge_weight": draw(st.sampled_from([None, rng.choice([0.0, 0.5, 1.5], num_entries)])),
        "features": draw(st.sampled_from([None, rng.standard_normal((num_nodes, 3))])),
        "num_nodes": num_nodes,
        "feature_dtype": draw(st.sampled_from(["float32", "float16", "bfloat16"])),
        "labels": rng.integers(-1, 4, num_nodes),
        "num_classes": 4,
        "masks": None if mask_shape is None else {"train": rng.random(mask_shape) < 0.5},
        "self_loops": "keep",
        "duplicates": "keep",
        "node_ids": ids,
        "name": "g",
    }


def entries(store: GraphStore, number: torch.Tensor) -> list[tuple[int, int, float]]:
    """Return the edges with nodes v called number[v], sorted."""
    destination = torch.repeat_interleave(torch.arange(store.num_nodes), store.in_degrees())
    weight = [0.0] * store.num_edges if store.edge_weight is None else store.edge_weight.tolist()
    return sorted(zip(number[store.indices].tolist(), number[destination].tolist(), weight))


def files(store: GraphStore) -> dict[str, bytes]:
    return {name: (store.path / name).read_bytes() for name in store.manifest.files}


def assert_same_graph(store: GraphStore, moved: GraphStore, permutation: torch.Tensor) -> None:
    """moved is store with node permutation[new] as node new."""
    assert moved.verify() == []
    assert entries(moved, permutation) == entries(store, torch.arange(store.num_nodes))
    assert torch.equal(moved.labels, store.labels[permutation])
    assert moved.features.dtype == store.features.dtype
    assert torch.equal(moved.features, store.features[permutation])
    assert set(moved.split_masks) == set(store.split_masks)
    for name, mask in store.split_masks.items():
        assert torch.equal(moved.split_masks[name], mask[..., permutation])
    names = store.ids_of(0, store.num_nodes).take(pa.array(permutation.numpy()))
    assert moved.ids_of(0, store.num_nodes).to_pylist() == names.to_pylist()
    for parts, info in store.partitions.items():
        assert torch.equal(moved.partition(parts), store.partition(parts)[permutation])
        assert moved.partitions[parts] == info
    kept = {"name", "directed", "self_loops", "duplicates", "num_classes", "num_labelled", "masks"}
    assert moved.manifest.model_dump(include=kept) == store.manifest.model_dump(include=kept)


@settings(max_examples=40, deadline=None)
@given(given_arguments=arguments(), seed=st.integers(0, 99))
def test_there_and_back_again(given_arguments: dict[str, Any], seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = GraphStore.write(Path(folder) / "g", **given_arguments)
        store = write_partition(store, partition_by_ldg(store, 2))
        permutation = torch.from_numpy(np.random.default_rng(seed).permutation(store.num_nodes))
        moved = reorder_store(store, permutation, Path(folder) / "moved")
        assert_same_graph(store, moved, permutation)
        back = reorder_store(moved, permutation.argsort(), Path(folder) / "back")
        assert files(back) == files(store)
        assert back.manifest == store.manifest


def test_the_law_catches_the_inverse_permutation(small: GraphStore, tmp_path: Path) -> None:
    permutation = torch.arange(30).roll(7)

    def law() -> None:
        moved = reorder_store(small, permutation, tmp_path / "moved", overwrite=True)
        assert_same_graph(small, moved, permutation)

    assert_caught(law, reorder, "_inverse", lambda old: old)


def test_old_numbers_become_ids_and_the_order_is_recorded(tmp_path: Path) -> None:
    store = GraphStore.write(tmp_path / "g", edge_index=[[0, 1], [1, 2]], features=np.eye(3))
    moved = reorder_store(store, torch.tensor([2, 0, 1]), tmp_path / "moved", order="degree", name="other")
    assert moved.node_ids.tolist() == [2, 0, 1]
    assert moved.name == "other"
    assert moved.manifest.provenance.options["order"] == "degree"
    assert "order" not in store.manifest.provenance.options


def test_a_store_can_be_reordered_in_its_own_place(small: GraphStore) -> None:
    permutation = torch.arange(30).flip(0)
    labels = small.labels[permutation]
    assert torch.equal(reorder_store(small, permutation, small.path, overwrite=True).labels, labels)


def test_a_partition_of_the_old_numbers_comes_along(small: GraphStore, tmp_path: Path) -> None:
    made = partition_by_ldg(small, 3)
    permutation = order_by_partition(small, made.assignment)
    moved = reorder_store(small, permutation, tmp_path / "moved", partition=made)
    assert torch.equal(moved.partition(3), made.assignment[permutation])
    assert moved.partitions[3] == made.info
    assert moved.verify() == []
    assert small.partitions == {}


@pytest.mark.parametrize("directed", [False, True])
def test_nodes_that_are_read_often_come_first(tmp_path: Path, directed: bool) -> None:
    rng = np.random.default_rng(0)
    edges = rng.integers(0, 40, (2, 300)) ** 2 // 40
    store = GraphStore.write(
        tmp_path / "g", edge_index=edges, features=None, num_nodes=45, add_reverse=not directed, duplicates="keep"
    )
    assert store.manifest.directed is directed
    read = store.indices.bincount(minlength=45)
    order = order_by_degree(store)
    assert order.sort().values.tolist() == list(range(45))
    assert (read[order].diff() <= 0).all()
    ties = read[order].diff() == 0
    assert (order.diff()[ties] > 0).all()
    part = torch.from_numpy(rng.integers(0, 4, 45).astype(np.int32))
    by_part = order_by_partition(store, part)
    assert by_part.sort().values.tolist() == list(range(45))
    assert (part[by_part].diff() >= 0).all()
    within = part[by_part].diff() == 0
    assert (read[by_part].diff()[within] <= 0).all()


@pytest.mark.parametrize(
    ("permutation", "said"),
    [
        (torch.arange(29), r"int64 \(30,\)"),
        (torch.arange(30).int(), r"int64 \(30,\)"),
        (torch.zeros(30, dtype=torch.int64), "each of the 30 nodes once"),
        (torch.arange(1, 31), "each of the 30 nodes once"),
        (torch.arange(-1, 29), "each of the 30 nodes once"),
    ],
)
def test_what_is_no_permutation_is_refused(
    small: GraphStore, tmp_path: Path, permutation: torch.Tensor, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        reorder_store(small, permutation, tmp_path / "moved")
    assert list(tmp_path.iterdir()) == [small.path]


def test_targets_are_checked_and_failures_leave_nothing(
    small: GraphStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="already exists"):
        reorder_store(small, torch.arange(30), small.path)
    with pytest.raises(UserError, match="cannot be written to directly"):
        reorder_store(small, torch.arange(30), "s3://bucket/store")

    def full(*arguments: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reorder, "_write_features", full)
    with pytest.raises(UserError, match="No space left"):
        reorder_store(small, torch.arange(30), tmp_path / "moved")
    assert list(tmp_path.iterdir()) == [small.path]
