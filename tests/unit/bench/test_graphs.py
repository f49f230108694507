"""products-shaped, at a thousandth of its size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dngd.bench.graphs import PRODUCTS_SHAPED, ShapeConfig, open_graph, write_shape
from dngd.errors import UserError
from dngd.graph import GraphStore, describe, verify_store


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> GraphStore:
    return write_shape(tmp_path_factory.mktemp("shaped") / "store", ShapeConfig().scaled(0.004))


def test_the_full_shape_is_ogbn_products() -> None:
    full = ShapeConfig().scaled(1.0)
    assert (full.num_nodes, full.num_edges, full.num_features, full.num_classes) == (2_449_029, 123_718_280, 100, 47)
    assert (full.num_train, full.num_val) == (196_615, 39_323)


def test_a_smaller_one_has_the_same_shape(small: GraphStore) -> None:
    assert (small.num_nodes, small.num_features, small.num_classes) == (9_796, 100, 47)
    assert small.num_edges == 494_874
    info = describe(small)
    assert not info["directed"]
    assert info["homophily"] > 0.6
    assert info["in_degree"]["max"] > 20 * info["in_degree"]["median"]
    split = small.split("masks")
    assert (len(split.train), len(split.val)) == (786, 157)
    assert len(split.train) + len(split.val) + len(split.test) == small.num_nodes
    assert verify_store(small.path) == []


def test_labels_can_be_learnt_from_features(small: GraphStore) -> None:
    x, y = small.features, small.labels
    means = torch.zeros(47, 100).index_add_(0, y, x) / torch.bincount(y, minlength=47)[:, None]
    guess = (x @ means.T - 0.5 * means.square().sum(1)).argmax(1)
    assert float((guess == y).float().mean()) > 3 / 47


def test_one_seed_one_graph(tmp_path: Path) -> None:
    config = ShapeConfig().scaled(0.001)
    one, two = (write_shape(tmp_path / name, config) for name in "ab")
    assert one.digest == two.digest
    assert np.all(np.diff(one.indptr.numpy()) >= 0)


def test_it_is_made_once_and_kept(tmp_path: Path) -> None:
    one = open_graph(PRODUCTS_SHAPED, None, tmp_path, 0.001)
    written = (one.path / "indices.arrow").stat().st_mtime_ns
    again = open_graph(PRODUCTS_SHAPED, None, tmp_path, 0.001)
    assert again.path == one.path
    assert again.path.parent == tmp_path
    assert (again.path / "indices.arrow").stat().st_mtime_ns == written
    assert open_graph(PRODUCTS_SHAPED, None, tmp_path, 0.002).path != one.path


@pytest.mark.parametrize("scale", [0.0, -1.0, 1.5, float("nan"), 1e-6])
def test_a_scale_out_of_range_is_refused(scale: float, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"give 0\.001 to 1"):
        open_graph(PRODUCTS_SHAPED, None, tmp_path, scale)


def test_only_products_shaped_has_a_scale(store: GraphStore) -> None:
    with pytest.raises(UserError, match="leave one out"):
        open_graph(str(store.path), scale=0.5)


def test_memory_is_checked_before_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory:
        available = 1 << 20

    monkeypatch.setattr("psutil.virtual_memory", Memory)
    with pytest.raises(UserError, match="--scale"):
        open_graph(PRODUCTS_SHAPED, None, tmp_path, 0.5)
