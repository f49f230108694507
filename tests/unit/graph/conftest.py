"""Shared graphs for the tests of dngd.graph."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dngd.graph import GraphStore, resolve_dataset


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of the public graphs; skips the test, saying so, where there is none."""
    value = os.environ.get("DNGD_DATA_ROOT")
    if not value or not Path(value).is_dir():
        pytest.skip("DNGD_DATA_ROOT does not name the folder of the public graphs")
    return Path(value)


@pytest.fixture(scope="session")
def products_mini(tmp_path_factory: pytest.TempPathFactory) -> GraphStore:
    """The built-in graph, generated once."""
    return resolve_dataset("products-mini", cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture
def arrays() -> dict[str, Any]:
    """The arguments of a small graph that uses every file of a store."""
    rng = np.random.default_rng(0)
    num_nodes, num_edges = 30, 120
    masks = np.zeros((3, num_nodes), dtype=bool)
    masks[np.arange(num_nodes) % 3, np.arange(num_nodes)] = True
    pairs = rng.choice(num_nodes * num_nodes, num_edges, replace=False)
    return {
        "name": "small",
        "edge_index": np.stack([pairs // num_nodes, pairs % num_nodes]),
        "edge_weight": rng.random(num_edges, dtype=np.float32),
        "features": rng.standard_normal((num_nodes, 7)),
        "labels": rng.integers(-1, 4, num_nodes),
        "num_classes": 4,
        "masks": dict(zip(("train", "val", "test"), masks)),
        "node_ids": rng.permutation(num_nodes) + 2**40,
    }


@pytest.fixture
def small(arrays: dict[str, Any], tmp_path: Path) -> GraphStore:
    """The small graph as a store."""
    return GraphStore.write(tmp_path / "small", **arrays)
