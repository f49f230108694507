"""Graphs from tables, OGB folders and an object store: round trips, and what is told of bad input."""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dngd.errors import UserError
from dngd.graph import GraphStore, ogb, resolve_dataset
from dngd.graph.ogb import import_ogb
from dngd.graph.tables import import_tables
from tests.helpers.object_store import ObjectStore, object_store

KEEP: dict[str, Any] = {"overwrite": True, "duplicates": "keep", "self_loops": "keep"}


@st.composite
def graphs(draw: st.DrawFn) -> dict[str, Any]:
    """Multi-edges, self loops and isolated nodes come by themselves; ids are large, negative or names."""
    num_nodes = draw(st.integers(1, 12))
    node = st.integers(0, num_nodes - 1)
    edges = draw(st.lists(st.tuples(node, node), min_size=1, max_size=30))
    generator = np.random.RandomState(draw(st.integers(0, 2**16)))
    numbers = generator.permutation(num_nodes) * 2**36 + generator.randint(-(2**35), 2**35, num_nodes)
    return {
        "ids": [f"node {k}" for k in numbers] if draw(st.booleans()) else numbers.tolist(),
        "edges": np.array(edges),
        "features": generator.standard_normal((num_nodes, 3)).astype(np.float32),
        "labels": generator.randint(0, 3, num_nodes),
        "split": ["train", *generator.choice(["train", "val", "test"], num_nodes - 1)],
        "weights": generator.rand(len(edges)).astype(np.float32) if draw(st.booleans()) else None,
    }


def node_table(graph: dict[str, Any], kind: str) -> pa.Table:
    columns = {"id": graph["ids"], "label": graph["labels"], "split": graph["split"]}
    if kind == "csv":
        columns |= {f"f{k}": graph["features"][:, k] for k in range(3)}
    else:
        flat = pa.array(graph["features"].reshape(-1))
        columns["features"] = pa.FixedSizeListArray.from_arrays(flat, 3)
    return pa.table(columns)


def edge_table(graph: dict[str, Any]) -> pa.Table:
    columns = {
        "src": [graph["ids"][k] for k in graph["edges"][:, 0]],
        "dst": [graph["ids"][k] for k in graph["edges"][:, 1]],
    }
    return pa.table(columns if graph["weights"] is None else columns | {"weight": graph["weights"]})


def write_table(table: pa.Table, folder: Path, kind: str, parts: int) -> None:
    folder.mkdir(parents=True)
    rows = -(-table.num_rows // parts)
    for number in range(parts):
        piece, file = table.slice(number * rows, rows), folder / f"part-{number}.{kind}"
        if kind == "parquet":
            pq.write_table(piece, file)
        elif kind == "csv":
            pa.csv.write_csv(piece, file)
        else:
            with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(piece)


def expected(graph: dict[str, Any], out: Path) -> GraphStore:
    split = np.array(graph["split"])
    masks = {part: split == part for part in ("train", "val", "test") if (split == part).any()}
    return GraphStore.write(
        out,
        features=graph["features"],
        labels=np.unique(graph["labels"], return_inverse=True)[1],
        edge_index=graph["edges"].T.copy(),
        edge_weight=graph["weights"],
        masks=masks,
        node_ids=graph["ids"],
        **KEEP,
    )


@pytest.mark.filterwarnings("ignore:.*so that there is nothing to learn")
@pytest.mark.parametrize("kind", ["parquet", "csv", "arrow"])
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(graph=graphs(), parts=st.integers(1, 3), number=st.integers(0, 10**9))
def test_tables_round_trip(tmp_path: Path, kind: str, graph: dict[str, Any], parts: int, number: int) -> None:
    source = tmp_path / f"{number}-{os.urandom(4).hex()}"
    write_table(node_table(graph, kind), source / "nodes", kind, parts)
    write_table(edge_table(graph), source / "edges", kind, parts)
    store = import_tables(source, tmp_path / "store", **KEEP)
    wanted = expected(graph, tmp_path / "expected")
    assert (
        list(store.node_ids if isinstance(store.node_ids, np.ndarray) else store.node_ids.to_pylist()) == graph["ids"]
    )
    for file in ("indptr.arrow", "indices.arrow", "labels.arrow", "features.arrow", "node_ids.arrow"):
        assert (store.path / file).read_bytes() == (wanted.path / file).read_bytes(), file
    if graph["weights"] is not None and kind != "csv":
        assert store.edge_weight is not None
        assert store.edge_weight.tolist() == wanted.edge_weight.tolist()  # type: ignore[union-attr]
    for part, mask in wanted.split_masks.items():
        assert store.split_masks[part].tolist() == mask.tolist()


IDS = [10, 20, 30]
GOOD_NODES = {"id": IDS, "label": [0, 1, 0], "split": ["train", "val", "test"], "x": [1.0, 2.0, 3.0]}
GOOD_EDGES = {"src": [10, 20], "dst": [20, 30]}


@pytest.mark.parametrize(
    ("nodes", "edges", "words"),
    [
        ({"id": [10, 10, 30]}, {}, "10"),
        ({"id": [1.5, 2.5, 3.5]}, {}, "id"),
        ({"x": ["a", "b", "c"]}, {}, "x"),
        ({"x": [1.0, float("nan"), float("inf")]}, {}, "2 "),
        ({"split": ["test"] * 3}, {}, "training nodes"),
        ({"split": ["train", "dev?", "test"]}, {}, "dev"),
        ({}, {"src": [10, 99]}, "99"),
        ({}, {"src": ["10", "x"]}, "src"),
        ({}, {"dst": None}, "dst"),
    ],
)
def test_bad_tables(tmp_path: Path, nodes: dict[str, Any], edges: dict[str, Any], words: str) -> None:
    for name, good, bad in (("nodes", GOOD_NODES, nodes), ("edges", GOOD_EDGES, edges)):
        columns = {key: value for key, value in {**good, **bad}.items() if value is not None}
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
    with pytest.raises(UserError, match=words):
        import_tables(tmp_path, tmp_path / "store")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["edges.parquet", "nodes.parquet"]


def test_a_missing_column_names_those_that_exist(tmp_path: Path) -> None:
    pq.write_table(pa.table({"key": IDS}), tmp_path / "nodes.parquet")
    pq.write_table(pa.table(GOOD_EDGES), tmp_path / "edges.parquet")
    with pytest.raises(UserError, match="key"):
        import_tables(tmp_path, tmp_path / "store")


# --- OGB


def raw_csv(folder: Path) -> None:
    """Three nodes in the form of ogbn-products."""
    files = {
        "raw/num-node-list.csv.gz": "3\n",
        "raw/num-edge-list.csv.gz": "2\n",
        "raw/edge.csv.gz": "0,1\n1,2\n",
        "raw/node-feat.csv.gz": "1.0,2.0\n3.0,4.0\n5.0,6.0\n",
        "raw/node-label.csv.gz": "1\n0\n1\n",
        "split/sales_ranking/train.csv.gz": "0\n",
        "split/sales_ranking/valid.csv.gz": "1\n",
        "split/sales_ranking/test.csv.gz": "2\n",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(gzip.compress(text.encode()))


def raw_npz(folder: Path) -> None:
    """The same in the form of ogbn-papers100M."""
    raw_csv(folder)
    for name in ("num-node-list", "num-edge-list", "edge", "node-feat", "node-label"):
        (folder / "raw" / f"{name}.csv.gz").unlink()
    np.savez_compressed(
        folder / "raw" / "data.npz",
        edge_index=np.array([[0, 1], [1, 2]]),
        node_feat=np.array([[1, 2], [3, 4], [5, 6]], dtype=np.float32),
        num_nodes_list=np.array([3]),
        num_edges_list=np.array([2]),
    )
    np.savez_compressed(folder / "raw" / "node-label.npz", node_label=np.array([[1.0], [0.0], [1.0]]))


@pytest.mark.parametrize("make", [raw_csv, raw_npz])
def test_ogb_folders(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "set")
    store = import_ogb(tmp_path / "set", tmp_path / "store", add_reverse=True)
    wanted = GraphStore.write(
        tmp_path / "wanted",
        features=[[1, 2], [3, 4], [5, 6]],
        labels=[1, 0, 1],
        edge_index=[[0, 1, 1, 2], [1, 2, 0, 1]],
        masks={"train": [True, False, False], "val": [False, True, False], "test": [False, False, True]},
    )
    assert store.digest == wanted.digest


def test_ogb_classes_without_a_node_are_told(tmp_path: Path) -> None:
    raw_csv(tmp_path / "set")
    (tmp_path / "set/raw/node-label.csv.gz").write_bytes(gzip.compress(b"3\n0\nnan\n"))
    with pytest.warns(UserWarning, match=r"^2 of the 4 classes of .*set have no node \(1, 2\); "):
        assert import_ogb(tmp_path / "set", tmp_path / "store").labels.tolist() == [3, 0, -1]


def test_bad_ogb_folders(tmp_path: Path) -> None:
    raw_csv(tmp_path / "set")
    (tmp_path / "set/raw/num-edge-list.csv.gz").write_bytes(gzip.compress(b"5\n"))
    with pytest.raises(UserError, match="2 edges but says 5"):
        import_ogb(tmp_path / "set", tmp_path / "store")
    with pytest.raises(UserError, match="features are of edges"):
        import_ogb("ogbn-proteins", tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_a_download_replaces_nothing_that_is_no_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str) -> None:
        raise AssertionError(name)

    monkeypatch.setattr(ogb, "_address", download)
    kept = tmp_path / "sets" / "ogbn_arxiv" / "notes.txt"
    kept.parent.mkdir(parents=True)
    kept.write_text("mine")
    with pytest.raises(UserError, match=r"ogbn_arxiv.* exists and holds no raw/edge.csv.gz.* download_dir"):
        import_ogb("ogbn-arxiv", tmp_path / "store", download_dir=tmp_path / "sets")
    assert kept.read_text() == "mine"
    kept.unlink()
    with pytest.raises(AssertionError, match="ogbn-arxiv"):  # an empty folder is in nobody's way
        import_ogb("ogbn-arxiv", tmp_path / "store", download_dir=tmp_path / "sets")


# --- an object store


@pytest.fixture(scope="module")
def bucket() -> Iterator[ObjectStore]:
    """A local S3 server with one bucket."""
    with object_store("graphs") as serving:
        yield serving


def test_a_store_on_s3_opens(tmp_path: Path, bucket: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DNGD_CACHE_DIR", str(tmp_path / "cache"))
    store = GraphStore.write(
        tmp_path / "store", features=np.eye(5), edge_index=[[0, 1, 2], [1, 2, 3]], labels=[0, 1, 0, 1, 0]
    )
    bucket.upload(store.path, "small")
    address = f"s3://{bucket.bucket}/small"
    assert GraphStore.open(address).digest == store.digest
    copies = list((tmp_path / "cache").glob("copy-*-v*"))
    assert resolve_dataset(address).digest == store.digest
    assert [p for p in (tmp_path / "cache").glob("copy-*-v*") if p.is_dir()] == [p for p in copies if p.is_dir()]
    # A copy that differs from its manifest is refused, and leaves nothing that opens.
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in store.path.iterdir():
        data = file.read_bytes()
        (broken / file.name).write_bytes(data[:-9] + b"x" + data[-8:] if file.name == "features.arrow" else data)
    bucket.upload(broken, "broken")
    monkeypatch.setenv("DNGD_CACHE_DIR", str(tmp_path / "other"))
    with pytest.raises(UserError, match=r"features\.arrow"):
        GraphStore.open(f"s3://{bucket.bucket}/broken")
    assert not [p for p in (tmp_path / "other").iterdir() if p.is_dir() and not p.name.startswith(".")]


def test_tables_on_s3_are_imported(tmp_path: Path, bucket: ObjectStore) -> None:
    source = tmp_path / "tables"
    source.mkdir()
    pq.write_table(pa.table(GOOD_NODES), source / "nodes.parquet")
    pq.write_table(pa.table(GOOD_EDGES), source / "edges.parquet")
    bucket.upload(source, "tables")
    local = import_tables(source, tmp_path / "local")
    remote = import_tables(f"s3://{bucket.bucket}/tables", tmp_path / "remote")
    assert remote.digest == local.digest
    assert list(remote.node_ids) == IDS
    text = (remote.path / "manifest.json").read_text()
    assert "testing-secret" not in text
    assert "127.0.0.1" not in text


@pytest.mark.parametrize(
    ("address", "words"),
    [("s3://graphs/nothing", "graphs/nothing"), ("s3://no-such-bucket/store", "no-such-bucket")],
)
def test_what_is_not_on_s3(bucket: ObjectStore, address: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        GraphStore.open(address)


def test_an_endpoint_that_nobody_answers(monkeypatch: pytest.MonkeyPatch, bucket: ObjectStore) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="s3://graphs/small") as caught:
        GraphStore.open("s3://graphs/small")
    assert "testing-secret" not in str(caught.value)
