"""products-shaped: made once by dngd.graph's generator, kept in the cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dngd.bench import graphs
from dngd.bench.graphs import PRODUCTS_SHAPED, open_graph
from dngd.errors import UserError
from dngd.graph import GraphStore, like_config


def test_the_full_graph_keeps_its_place_in_the_cache() -> None:
    """Its content is that of the committed figures, so that a graph made before is found."""
    assert graphs._cache_key(like_config("ogbn-products")) == "products-shaped-2449029-808bc571acaeac54"


def test_it_is_made_once_and_kept(tmp_path: Path) -> None:
    one = open_graph(PRODUCTS_SHAPED, None, tmp_path, 0.001)
    assert (one.name, one.num_nodes, one.num_edges) == (PRODUCTS_SHAPED, 2_449, 123_718)
    written = (one.path / "indices.arrow").stat().st_mtime_ns
    again = open_graph(PRODUCTS_SHAPED, None, tmp_path, 0.001)
    assert again.path == one.path
    assert again.path.parent == tmp_path
    assert (again.path / "indices.arrow").stat().st_mtime_ns == written
    assert open_graph(PRODUCTS_SHAPED, None, tmp_path, 0.002).path != one.path


@pytest.mark.parametrize("scale", [0.0, 1.5])
def test_a_scale_out_of_range_is_refused(scale: float, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"give 0\.001 to 1"):
        open_graph(PRODUCTS_SHAPED, None, tmp_path, scale)


def test_only_products_shaped_has_a_scale(store: GraphStore) -> None:
    with pytest.raises(UserError, match="leave one out"):
        open_graph(str(store.path), scale=0.5)


def test_several_labels_a_node_are_refused_where_they_cannot_be_trained(tmp_path: Path) -> None:
    labels = torch.zeros(4, 2, dtype=torch.int8)
    parts = {"indptr": torch.tensor([0, 1, 2, 3, 4]), "indices": torch.tensor([1, 0, 3, 2])}
    made = GraphStore.write(tmp_path / "several", **parts, features=torch.eye(4), labels=labels)
    with pytest.raises(UserError, match="several labels a node"):
        open_graph(str(made.path))
    assert open_graph(str(made.path), takes_multilabel=True).is_multilabel


def test_memory_is_checked_before_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory:
        available = 1 << 20

    monkeypatch.setattr("psutil.virtual_memory", Memory)
    with pytest.raises(UserError, match="--scale"):
        open_graph(PRODUCTS_SHAPED, None, tmp_path, 0.5)
