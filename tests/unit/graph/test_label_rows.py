"""Several labels a node in the store: written, opened, checked, reordered, split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dngd.errors import UserError
from dngd.graph import GraphStore, describe, reorder_store, verify_store

ROWS = np.random.default_rng(0).integers(0, 2, (30, 4))
ROWS[25:] = -1


def write(path: Path, **changes: Any) -> GraphStore:
    fields: dict[str, Any] = {
        "edge_index": np.stack([np.arange(30), (np.arange(30) + 1) % 30]),
        "features": np.eye(30, 7),
        "labels": ROWS,
    }
    return GraphStore.write(path, **(fields | changes))


def test_rows_come_back(tmp_path: Path) -> None:
    store = write(tmp_path / "g")
    assert store.is_multilabel
    assert (store.num_classes, store.manifest.num_labelled, store.manifest.format_version) == (4, 25, 3)
    assert store.labels.dtype == torch.int8
    assert torch.equal(store.labels, torch.from_numpy(ROWS).to(torch.int8))
    assert torch.equal(store.labelled, torch.arange(30) < 25)
    assert store.verify() == []
    told = describe(store)
    assert (told["multilabel"], told["homophily"]) == (True, None)
    assert told["class_counts"] == (ROWS == 1).sum(axis=0).tolist()
    split = store.split("random:0.5/0.25/0.25")
    assert int(torch.cat([split.train, split.val, split.test]).max()) < 25


def test_floats_with_nan_and_booleans_are_the_same_rows(tmp_path: Path) -> None:
    wanted = write(tmp_path / "g").digest
    assert write(tmp_path / "nan", labels=np.where(ROWS < 0, np.nan, ROWS)).digest == wanted
    full = np.abs(ROWS)
    assert write(tmp_path / "a", labels=full.astype(bool)).digest == write(tmp_path / "b", labels=full).digest


def test_a_store_of_single_labels_is_of_the_version_that_it_was(tmp_path: Path) -> None:
    store = write(tmp_path / "g", labels=np.arange(30) % 3)
    assert store.manifest.format_version == 2
    assert not store.is_multilabel


def test_reordered_rows(tmp_path: Path) -> None:
    store = write(tmp_path / "g")
    turned = reorder_store(store, torch.arange(30).flip(0), tmp_path / "turned")
    assert torch.equal(turned.labels, store.labels.flip(0))
    assert turned.manifest.format_version == 3
    assert turned.verify() == []


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.where(np.arange(4) == 1, -1, np.abs(ROWS)), "node 0 are partly -1 .30 such nodes"),
        (np.abs(ROWS)[:29], "one row a node"),
        (np.eye(4)[np.arange(30) % 4], "one-hot rows of single labels"),
        (np.full((30, 2), "a"), "values other than 0 and 1"),
    ],
)
def test_bad_rows(tmp_path: Path, labels: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        write(tmp_path / "g", labels=labels)
    assert list(tmp_path.iterdir()) == []


def test_the_number_of_classes_has_a_bound(tmp_path: Path) -> None:
    """Beyond it labels are ids or times, and a model for them would fill the memory."""
    labels = np.arange(30)
    labels[7] = 65_535
    assert write(tmp_path / "g", labels=labels).num_classes == 65_536
    labels[7] = 65_536
    with pytest.raises(UserError, match=r"label 65536 of node 7 is beyond 65535, .*\(1 such labels\)"):
        write(tmp_path / "h", labels=labels)
    with pytest.raises(UserError, match="num_classes=65537 is above 65536"):
        write(tmp_path / "h", labels=np.arange(30), num_classes=65_537)
    assert [entry.name for entry in tmp_path.iterdir()] == ["g"]


def test_altered_rows_are_found(tmp_path: Path) -> None:
    store = write(tmp_path / "g")
    entry = store.manifest.files["labels.arrow"]
    path = store.path / "labels.arrow"
    data = bytearray(path.read_bytes())
    data[entry.data_offset + 1] = 7
    path.write_bytes(bytes(data))
    problems = "\n".join(verify_store(store.path))
    assert "from -1 to 7" in problems
    assert json.loads((store.path / "manifest.json").read_text())["format_version"] == 3
