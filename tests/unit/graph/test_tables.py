"""Graphs of Parquet, CSV and Arrow tables: the same store as of the arrays, and what tables must not be."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import csv

from dngd import cli
from dngd.errors import UserError
from dngd.graph import CsvStyle, GraphStore, TableColumns, describe, import_tables, table_readers, tables
from dngd.graph.id_map import IntegerIds
from dngd.train.link_predict import read_pairs
from tests.helpers.mutants import assert_caught
from tests.unit.graph.table_sets import FORMATS, edge_table, node_table, small_set, write_parts, write_table

INTEGERS = st.integers(-(2**63), 2**63 - 1) | st.integers(2**31, 2**33)
# Without line breaks, which CSV files hold only in quotes that pyarrow does not follow across blocks.
STRINGS = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Zl", "Zp"]), min_size=1, max_size=6)


@st.composite
def graphs(draw: st.DrawFn) -> dict[str, Any]:
    """Multi-edges, self loops and isolated nodes come by themselves."""
    num_nodes = draw(st.integers(1, 10))
    kind = draw(st.sampled_from(["int", "string", "rows"]))
    ids: list[Any] = list(range(num_nodes))
    if kind != "rows":
        values = INTEGERS if kind == "int" else STRINGS
        ids = draw(st.lists(values, min_size=num_nodes, max_size=num_nodes, unique=True))
    node = st.integers(0, num_nodes - 1)
    edges = draw(st.lists(st.tuples(node, node), max_size=25))
    generator = np.random.RandomState(draw(st.integers(0, 2**16)))
    part = generator.randint(0, 4, num_nodes)
    part[0] = 0
    labels = generator.randint(-1, 4, num_nodes)
    labels[0] = 2
    return {
        "ids": ids,
        "edges": np.array(edges, dtype=np.int64).reshape(-1, 2).T,
        "features": generator.standard_normal((num_nodes, draw(st.integers(0, 3)))).astype(np.float32),
        "labels": labels,
        "part": part,
        "weight": generator.rand(len(edges)).astype(np.float32) if draw(st.booleans()) else None,
        "format": draw(st.sampled_from(FORMATS)),
        "node_cuts": draw(st.lists(st.integers(0, num_nodes), max_size=3)),
        "edge_cuts": draw(st.lists(st.integers(0, len(edges)), max_size=3)),
    }


def from_arrays(graph: dict[str, Any], out: Path) -> GraphStore:
    rows = graph["ids"] == list(range(len(graph["ids"])))
    # Without the gaps between the numbers that occur.
    known, place = np.unique(np.append(graph["labels"], -1), return_inverse=True)
    assert known[0] == -1
    return GraphStore.write(
        out,
        overwrite=True,
        features=graph["features"],
        labels=place[:-1] - 1,
        edge_index=graph["edges"],
        edge_weight=graph["weight"],
        masks={name: graph["part"] == k for k, name in enumerate(("train", "val", "test"))},
        node_ids=None if rows else graph["ids"],
        duplicates="keep",
        self_loops="keep",
    )


def from_tables(graph: dict[str, Any], folder: Path, *, as_list: bool) -> GraphStore:
    width = graph["features"].shape[1]
    features = {f"f{k}": graph["features"][:, k] for k in range(width)}
    if as_list and width and graph["format"] != "csv":
        features = {"features": graph["features"]}
    split = [["train", "val", "test", None][k] for k in graph["part"]]
    nodes = node_table(graph["ids"], label=graph["labels"], split=pa.array(split, pa.string()), **features)
    ids = pa.array(graph["ids"])
    ends = [ids.take(pa.array(end)) for end in graph["edges"]]
    weight = {} if graph["weight"] is None else {"weight": graph["weight"]}
    write_parts(folder, "nodes", nodes, graph["format"], graph["node_cuts"])
    write_parts(folder, "edges", edge_table(*ends, **weight), graph["format"], graph["edge_cuts"])
    # In a CSV file, strings of digits look like numbers.
    kind = "string" if isinstance(graph["ids"][0], str) else "auto"
    return import_tables(
        folder,
        folder / "store",
        overwrite=True,
        columns=TableColumns(id_type=kind),
        duplicates="keep",
        self_loops="keep",
    )


PROPERTY = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.filterwarnings("ignore:.*so that there is nothing to learn")
@PROPERTY
@given(graph=graphs(), as_list=st.booleans())
def test_tables_give_the_store_of_the_arrays(
    tmp_path_factory: pytest.TempPathFactory, graph: dict[str, Any], as_list: bool
) -> None:
    folder = tmp_path_factory.mktemp("set")
    made = from_tables(graph, folder, as_list=as_list)
    assert made.manifest.files == from_arrays(graph, folder / "expected").manifest.files
    assert str(folder) not in made.manifest.to_text()


def test_batches_of_one_row_make_the_same_store(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    ids = generator.permutation(300)[:40] + 2**40
    ends = generator.integers(0, 40, (2, 200))
    nodes = node_table(ids, label=generator.integers(0, 3, 40), features=generator.standard_normal((40, 3)))
    whole = small_set(tmp_path, nodes, edge_table(ids[ends[0]], ids[ends[1]]))
    store = import_tables(whole, tmp_path / "whole")

    def law() -> None:
        assert import_tables(whole, tmp_path / "rows", overwrite=True).digest == store.digest

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dngd.graph.table_files._MAX_BATCH_ROWS", 1)
        # Numbered in the order of the ids instead of the table's.
        assert_caught(law, IntegerIds, "find", lambda self, wanted: np.searchsorted(np.sort(self.values), wanted))


def test_wide_row_groups_are_read_a_few_columns_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = np.random.default_rng(0).standard_normal((500, 40)).astype(np.float32)
    nodes = node_table(np.arange(500), **{f"f{k}": features[:, k] for k in range(40)})
    pq.write_table(nodes, tmp_path / "nodes.parquet", row_group_size=120)
    write_table(tmp_path / "edges.parquet", edge_table([0], [1]))
    monkeypatch.setattr(table_readers, "_GROUP_BYTES", 1)
    monkeypatch.setattr("dngd.graph.table_files._MAX_BATCH_ROWS", 50)
    assert np.array_equal(import_tables(tmp_path, tmp_path / "out").features.numpy(), features)


def test_without_a_node_table_nodes_are_those_of_the_edges(tmp_path: Path) -> None:
    path = write_table(tmp_path / "web.csv", edge_table([7, 2**40, -3], [2**40, 7, 7]))
    store = import_tables(path, tmp_path / "out")
    assert store.node_ids.tolist() == [-3, 7, 2**40]
    assert store.indices.tolist() == [0, 2, 1]
    assert (store.name, store.num_features, store.num_classes) == ("web", 0, 0)
    names = write_table(tmp_path / "names.parquet", edge_table(["b", "ä", "b"], ["a", "b", "B"]))
    assert import_tables(names, tmp_path / "named").node_ids.to_pylist() == ["B", "a", "b", "ä"]


def test_labels_by_name_are_numbered_in_their_order(tmp_path: Path) -> None:
    labels = pa.array(["cat", None, "ant", "", "bee", "cat"]).dictionary_encode()
    store = import_tables(small_set(tmp_path, node_table([10, 20, 30, 40, 5, 6], label=labels)), tmp_path / "out")
    assert store.labels.tolist() == [2, -1, 0, -1, 1, 2]
    assert store.num_classes == 3
    assert store.manifest.provenance.options["label_names"] == ["ant", "bee", "cat"]
    assert store.num_features == 0


@pytest.mark.parametrize("suffix", FORMATS)
def test_labels_that_are_missing_or_negative_are_unlabelled(tmp_path: Path, suffix: str) -> None:
    for k, labels in enumerate(([1, None, -1, 0], [1.0, float("nan"), None, 0.0])):
        folder = small_set(tmp_path / str(k), node_table([10, 20, 30, 40], label=labels), suffix=suffix)
        assert import_tables(folder, folder / "out").labels.tolist() == [1, -1, -1, 0]


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("kind", [pa.int64(), pa.uint8(), pa.float32()])
def test_whole_numbers_with_gaps_are_classes_without(tmp_path: Path, suffix: str, kind: pa.DataType) -> None:
    """An empty class would be an output that is never right, and more classes for default damping than there are."""
    labels = pa.array([30, 10, None, 20, 10], kind)
    nodes = node_table([1, 2, 3, 4, 5], label=labels, split=["train", "train", "val", "test", "test"])
    store = import_tables(small_set(tmp_path, nodes, edge_table([1], [2]), suffix), tmp_path / "out")
    assert store.labels.tolist() == [2, 0, -1, 1, 0]
    assert (store.num_classes, store.label_names) == (3, (10, 20, 30))
    assert store.manifest.provenance.options["label_names"] == [10, 20, 30]
    assert describe(store)["class_names"] == [10, 20, 30]
    assert store.verify() == []
    # Numbers from 0 are the class numbers that they were.
    plain = node_table([1, 2, 3], label=pa.array([2, 0, 1], kind))
    store = import_tables(
        small_set(tmp_path / "plain", plain, edge_table([1], [2]), suffix), tmp_path / "plain" / "out"
    )
    assert (store.labels.tolist(), store.label_names) == ([2, 0, 1], None)
    assert "label_names" not in store.manifest.provenance.options


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("kind", [pa.int64(), pa.uint64(), pa.float64()])
def test_codes_beyond_class_numbers_are_classes_where_nodes_share_them(
    tmp_path: Path, suffix: str, kind: pa.DataType
) -> None:
    """Half as many numbers as labelled nodes at most; more are ids or amounts, which are refused as they were."""
    labels = pa.array([8_010_000, 99, None, 8_010_000, 99, -1], kind if kind != pa.uint64() else pa.int64())
    if kind == pa.uint64():
        labels = pa.array([8_010_000, 99, None, 8_010_000, 99, None], kind)
    split = ["train", "train", "val", "test", "test", "test"]
    nodes = node_table([1, 2, 3, 4, 5, 6], label=labels, split=split)
    with pytest.warns(UserWarning, match="has 2 numbers up to 8010000, taken for classes"):
        store = import_tables(small_set(tmp_path, nodes, edge_table([1], [2]), suffix), tmp_path / "out")
    assert store.labels.tolist() == [1, 0, -1, 1, 0, -1]
    assert store.label_names == (99, 8_010_000)
    assert store.verify() == []
    amounts = node_table([1, 2, 3, 4], label=pa.array([8_010_000, 99, 99, 7], kind))
    with pytest.raises(UserError, match=r"label 8010000 of node 0 is beyond 65535.*ids, times or amounts"):
        import_tables(small_set(tmp_path / "amounts", amounts, edge_table([1], [2]), suffix), tmp_path / "no")


def test_a_node_table_alone_is_not_taken_for_edges(tmp_path: Path) -> None:
    folder = small_set(tmp_path, node_table([1, 2]), edge_table([1], [2]), "csv")
    with pytest.raises(
        UserError, match=r"nodes.csv alone would be the edges, .* a node table; give --nodes and --edges"
    ):
        import_tables(folder / "nodes.csv", tmp_path / "out")
    (folder / "edges.csv").rename(folder / "node_links.csv")
    assert import_tables(folder / "node_links.csv", tmp_path / "out").num_edges == 1


@pytest.mark.parametrize("suffix", FORMATS)
def test_booleans_are_classes_by_name(tmp_path: Path, suffix: str) -> None:
    nodes = node_table([1, 2, 3], label=pa.array([True, None, True]))
    store = import_tables(small_set(tmp_path, nodes, edge_table([1], [2]), suffix), tmp_path / "out")
    assert store.labels.tolist() == [1, -1, 1]
    assert store.label_names == ("false", "true")
    nodes = node_table([1, 2, 3], label=pa.array([None, None, None], pa.bool_()))
    store = import_tables(small_set(tmp_path / "none", nodes, edge_table([1], [2]), suffix), tmp_path / "none" / "out")
    assert (store.num_classes, store.label_names) == (0, None)


def test_one_class_and_minus_one_is_told(tmp_path: Path) -> None:
    """Two classes -1 and 1, say, of which -1 means no label."""
    folder = small_set(tmp_path, node_table([1, 2, 3], label=[1, -1, -1]), edge_table([1], [2]))
    with pytest.warns(UserWarning, match=r"gives all its 1 labelled nodes one label, 1, .* the other 2 have -1"):
        import_tables(folder, tmp_path / "out")


LABEL_ROWS = np.random.default_rng(3).integers(0, 2, (50, 4))
LABEL_ROWS[[7, 30, 31]] = -1


def label_arrays(kind: str) -> list[pa.Array]:
    """LABEL_ROWS by column, unlabelled nodes as nothing, as -1, or among floats and booleans."""
    missing = LABEL_ROWS < 0
    types = [pa.int8(), pa.float64(), pa.bool_(), pa.int64()] if kind == "mixed" else [pa.int64()] * 4
    return [
        pa.array(LABEL_ROWS[:, k], mask=None if kind == "negative" else missing[:, k]).cast(types[k]) for k in range(4)
    ]


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("kind", ["missing", "negative", "mixed"])
def test_several_labels_by_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, kind: str) -> None:
    features = np.random.default_rng(0).standard_normal((50, 2)).astype(np.float32)
    ends = np.random.default_rng(1).integers(0, 50, (2, 200))
    columns = dict(zip("dbca", label_arrays(kind)))
    nodes = node_table(np.arange(50), x=features[:, 0], **columns, y=features[:, 1])
    write_parts(tmp_path, "nodes", nodes, suffix, [0, 17, 40])
    write_parts(tmp_path, "edges", edge_table(*ends), suffix, [])
    monkeypatch.setattr("dngd.graph.table_files._MAX_BATCH_ROWS", 3)
    store = import_tables(tmp_path, tmp_path / "out", columns=TableColumns(labels=list("dbca")))
    expected = GraphStore.write(tmp_path / "expected", features=features, labels=LABEL_ROWS, edge_index=ends)
    assert store.digest == expected.digest
    assert store.is_multilabel
    assert store.label_names == tuple("dbca")
    assert describe(store)["class_names"] == list("dbca")
    assert describe(store)["columns"]["label"] == list("dbca")
    assert store.verify() == []


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize("is_fixed", [True, False])
def test_several_labels_as_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, is_fixed: bool) -> None:
    lists = [None if row[0] < 0 else row.tolist() for row in LABEL_ROWS]
    kind = pa.list_(pa.int8(), 4) if is_fixed else pa.list_(pa.float32())
    write_parts(tmp_path, "nodes", node_table(np.arange(50), label=pa.array(lists, kind)), suffix, [7, 20])
    write_table(tmp_path / f"edges.{suffix}", edge_table([0, 1], [1, 2]))
    monkeypatch.setattr("dngd.graph.table_files._MAX_BATCH_ROWS", 3)
    store = import_tables(tmp_path, tmp_path / "out")
    assert np.array_equal(store.labels.numpy(), LABEL_ROWS)
    assert store.num_classes == 4


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ([None, [], []], "label of .* has no list with entries; "),
        ([[1], [0], None], "label of .* has lists of one entry; "),
        ([[], [0, 1], [1, 1]], "has 0 labels in row 0 but 2 in the first list with any"),
    ],
)
def test_label_lists_that_are_none(tmp_path: Path, lists: list[list[int] | None], message: str) -> None:
    table = node_table([0, 1, 2], label=pa.array(lists, pa.list_(pa.int8())))
    with pytest.raises(UserError, match=message):
        import_tables(small_set(tmp_path, table), tmp_path / "out")


def test_label_columns_at_the_command_line(tmp_path: Path) -> None:
    nodes = node_table([10, 20, 30, 40], red=[0, 1, 1, None], green=[1, 1, 0, None], size=[1.0, 2.0, 3.0, 4.0])
    folder = small_set(tmp_path / "set", nodes, suffix="csv")
    with pytest.raises(SystemExit) as ended:
        cli.main(["data", "import", str(folder), "--out", str(tmp_path / "out"), "--label-columns", "red, green"])
    assert not ended.value.code
    store = GraphStore.open(tmp_path / "out")
    assert store.labels.tolist() == [[0, 1], [1, 1], [1, 0], [-1, -1]]
    assert store.num_features == 1


@pytest.mark.parametrize("suffix", ["parquet", "csv", "arrow"])
def test_masks_of_floats(tmp_path: Path, suffix: str) -> None:
    nodes = node_table([10, 20, 30, 40], train_mask=[1.0, 0.0, None, 1.0], x=[1.0, 2.0, 3.0, 4.0])
    store = import_tables(small_set(tmp_path / "set", nodes, suffix=suffix), tmp_path / "out")
    assert store.split_masks["train"].tolist() == [True, False, False, True]
    assert store.num_features == 1


def test_masks_by_column_and_columns_by_name(tmp_path: Path) -> None:
    nodes = node_table(
        [1, 2, 3],
        kind=[0, 1, 0],
        train_mask=[True, False, False],
        val_mask=[0, 1, None],
        title=["a", "b", "c"],
        size=pa.array([1, 2, 3], pa.uint8()),
        height=[0.5, 0.25, 2.0],
    )
    write_table(tmp_path / "n.parquet", nodes)
    write_table(tmp_path / "e.parquet", pa.table({"from": [1, 2], "to": [2, 3], "w": [1, 2]}))
    columns = TableColumns(label="kind", ignore=["title"], source="from", target="to", weight="w")
    files = {"nodes": tmp_path / "n.parquet", "edges": [tmp_path / "e.parquet"]}
    store = import_tables(None, tmp_path / "out", columns=columns, **files)
    assert store.features.tolist() == [[1.0, 0.5], [2.0, 0.25], [3.0, 2.0]]
    assert {name: mask.tolist() for name, mask in store.split_masks.items()} == {
        "train": [True, False, False],
        "val": [False, True, False],
    }
    assert store.edge_weight is not None
    assert store.edge_weight.tolist() == [1.0, 2.0]
    assert store.labels.tolist() == [0, 1, 0]
    chosen = TableColumns(label="kind", features=["height"], source="from", target="to", weight="w")
    assert import_tables(None, tmp_path / "two", columns=chosen, **files).features.tolist() == [[0.5], [0.25], [2.0]]


def import_csv(
    folder: Path, nodes: str | None, edges: str = "src,dst\n1,2\n", style: CsvStyle | None = None, **columns: Any
) -> GraphStore:
    """Write nodes.csv and edges.csv, and import them into folder/out."""
    folder.mkdir(exist_ok=True)
    for name, text in (("nodes", nodes), ("edges", edges)):
        if text is not None:
            (folder / f"{name}.csv").write_text(text)
    source = None if nodes is None else folder / "nodes.csv"
    return import_tables(
        None,
        folder / "out",
        nodes=source,
        edges=folder / "edges.csv",
        columns=TableColumns(**columns),
        style=style,
        overwrite=True,
    )


LEAKS = "id,label,topic,split,train_mask,x\n1,0,1,train,1,5\n2,1,0,val,0,6\n"


@pytest.mark.parametrize(
    ("nodes", "columns", "message"),
    [
        (
            "id,label,topic,x\n1,0,1,5\n2,1,0,6\n",
            {"label": "topic"},
            "labels? twice, by 'label' and by --label-column top",
        ),
        (
            "id,split,fold,x\n1,0,train,5\n2,1,val,6\n",
            {"split": "fold"},
            "split twice, by 'split' and by --split-column fo",
        ),
        (LEAKS, {"ignore": ["train_mask"], "features": ["label"]}, "'label' .* the label .* and as a feature"),
        (LEAKS, {"ignore": ["train_mask"], "features": ["x", "id"]}, "'id' .* the node ids .* and as a feature"),
        (LEAKS, {"ignore": ["split"], "features": ["train_mask"]}, "'train_mask' .* a mask and as a feature"),
        (LEAKS, {"ignore": ["x", "train_mask"], "features": ["x"]}, "'x' .* a feature .* and as left out"),
        (LEAKS, {"label": "id"}, "'id' .* the node ids .* and as the label"),
        (
            LEAKS,
            {"labels": ["topic", "x"], "ignore": ["label", "split"], "features": ["x"]},
            "'x' .* a label .* a feature",
        ),
        (LEAKS, {"ignore": ["split"], "features": ["x", "x"]}, "--feature-column names 'x' 2 times"),
        (LEAKS, {"source": "dst"}, "'dst' .* the source .* and as the target"),
        (LEAKS, {"weight": "dst"}, "'dst' .* the target .* and as the weight"),
        (
            "id,train_mask,val_mask,valid_mask\n1,1,0,0\n2,0,1,1\n",
            {},
            "by val_mask and valid_mask; .*--ignore-column val",
        ),
    ],
)
def test_a_column_has_one_use(tmp_path: Path, nodes: str, columns: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        import_csv(tmp_path, nodes, **columns)


def test_labels_do_not_leak_into_features(tmp_path: Path) -> None:
    nodes = "id,label,topic,x,train_mask,valid_mask\n1,0,1,5,1,0\n2,1,0,6,0,1\n"
    for columns in ({"ignore": ["label"]}, {"features": ["x"]}):
        store = import_csv(tmp_path, nodes, label="topic", **columns)
        assert store.features.tolist() == [[5.0], [6.0]]
        assert store.labels.tolist() == [1, 0]
        assert {name: mask.tolist() for name, mask in store.split_masks.items()} == {
            "train": [True, False],
            "val": [False, True],
        }


NOTHING = ["", "NA", "nan", "NaN", "null", "NULL", "N/A", "n/a", "#N/A", "-1"]


def test_names_of_csv_files_are_missing_as_numbers_are(tmp_path: Path) -> None:
    names = [*NOTHING, "cat", "ant"]
    nodes = "".join(f"{k},{name},{name if k < 10 else 'train'}\n" for k, name in enumerate(names) if name != "-1")
    store = import_csv(tmp_path, f"id,label,split\n{nodes}")
    assert store.labels.tolist() == [-1] * 9 + [1, 0]
    assert store.manifest.provenance.options["label_names"] == ["ant", "cat"]
    assert store.split_masks["train"].tolist() == [False] * 9 + [True] * 2
    store = import_csv(tmp_path, "id,label\n" + "".join(f"{k},{name}\n" for k, name in enumerate(names)))
    assert store.labels.tolist() == [-1] * 10 + [1, 0]
    # Elsewhere a missing value is stored as one, and these are names; -1 is none.
    table = node_table(np.arange(12), label=names)
    stored = import_tables(small_set(tmp_path / "set", table, edge_table([1], [2])), tmp_path / "stored")
    assert stored.manifest.provenance.options["label_names"] == sorted(set(names) - {"", "-1"})
    assert stored.labels.tolist()[0] == stored.labels.tolist()[9] == -1


ROWS_BEYOND_THE_FIRST_BLOCK = 200_000


@pytest.mark.parametrize("begin", ["", "0", "true", "0.0", "NA"])
def test_names_that_come_late_in_a_csv_file(tmp_path: Path, begin: str) -> None:
    rows = "".join(f"{k},{begin}\n" for k in range(ROWS_BEYOND_THE_FIRST_BLOCK))
    last = ROWS_BEYOND_THE_FIRST_BLOCK
    store = import_csv(tmp_path, f"id,label\n{rows}{last},chess\n{last + 1},go\n")
    classes = sorted({begin, "chess", "go"} - {"", "NA"})
    assert store.manifest.provenance.options["label_names"] == classes
    assert store.labels[-2:].tolist() == [classes.index("chess"), classes.index("go")]
    assert set(store.labels[:-2].tolist()) == {classes.index(begin) if begin in classes else -1}
    assert store.num_classes == len(classes)


@pytest.mark.parametrize(
    ("labels", "expected", "names"),
    [
        (["10", "9", "", "-1"], [1, 0, -1, -1], (9, 10)),
        (["1.0", "1", " 2", "0e0"], [1, 1, 2, 0], None),
        (["true", "FALSE", "1", "NA"], [1, 0, 1, -1], None),
        (["true", "FALSE", " True", "NA"], [1, 0, 1, -1], ("false", "true")),
        (["", "NA", "nan", "-1.0"], [-1, -1, -1, -1], None),
    ],
)
def test_numbers_as_labels_of_csv_files_stay_numbers(
    tmp_path: Path, labels: list[str], expected: list[int], names: tuple[Any, ...] | None
) -> None:
    store = import_csv(tmp_path, "id,label\n" + "".join(f"{k},{label}\n" for k, label in enumerate(labels)))
    assert store.labels.tolist() == expected
    assert store.label_names == names
    assert ("label_names" in store.manifest.provenance.options) == (names is not None)
    with pytest.raises(UserError, match=r"label 0\.5 in row 2 of .*nodes.csv is no whole number \(2 such"):
        import_csv(tmp_path, "id,label\n1,0\n2,1\n3,0.5\n4,inf\n")


@pytest.mark.parametrize(
    ("written", "expected", "names"),
    [
        (
            ["1234567890123456781", "1234567890123456789", "1.0"],
            [1, 2, 0],
            (1, 1234567890123456781, 1234567890123456789),
        ),
        (["01", "1", "02"], [0, 2, 1], ("01", "02", "1")),
        (["-01", "7", "-1"], [0, 1, -1], ("-01", "7")),
        (["0", "0.0", "10"], [0, 0, 1], (0, 10)),
    ],
)
def test_classes_of_csv_files_that_are_written_otherwise_stay_apart(
    tmp_path: Path, written: list[str], expected: list[int], names: tuple[Any, ...]
) -> None:
    """Neither codes that are one as floats, nor zeros in front, which are part of a code's name."""
    rows = [*enumerate(written), *enumerate(written, len(written))]
    store = import_csv(tmp_path, "id,label\n" + "".join(f"{k},{label}\n" for k, label in rows))
    assert (store.labels.tolist(), store.label_names) == (expected * 2, names)


def test_long_codes_of_classes_may_be_missing(tmp_path: Path) -> None:
    codes = [2**60 + 1, 2**60 + 3, 2**60 + 1, 2**60 + 3, None, None]
    nodes = pa.table({"id": range(6), "label": pa.array(codes, pa.int64())})
    store = import_tables(small_set(tmp_path / "set", nodes, edge_table([1], [2]), "parquet"), tmp_path / "out")
    assert (store.labels.tolist(), store.label_names) == ([0, 1, 0, 1, -1, -1], (2**60 + 1, 2**60 + 3))


def test_a_long_number_beside_a_missing_one_in_a_feature_is_a_sentence(tmp_path: Path) -> None:
    nodes = pa.table({"id": range(2), "x": pa.array([2**60 + 1, None], pa.int64())})
    folder = small_set(tmp_path / "set", nodes, edge_table([0], [1]), "parquet")
    with pytest.raises(UserError, match="NaN"):
        import_tables(folder, tmp_path / "out")


def test_masks_of_csv_files_may_begin_blank_and_be_written_in_many_ways(tmp_path: Path) -> None:
    blank = "".join(f"{k},0,,\n" for k in range(200_000))
    store = import_csv(
        tmp_path, f"id,label,train_mask,val_mask\n{blank}200000,1, 1,NA\n200001,1,true,0\n200002,0,0.0,1.0\n"
    )
    masks = store.split_masks
    assert masks["train"].nonzero()[:, 0].tolist() == [200_000, 200_001]
    assert masks["val"].nonzero()[:, 0].tolist() == [200_002]
    with pytest.raises(UserError, match=r"'val_mask' of .*nodes.csv has maybe in row 200000; a mask is true"):
        import_csv(tmp_path / "other", f"id,label,train_mask,val_mask\n{blank}200000,1,1,maybe\n")


@pytest.mark.parametrize("values", [[0, 5_000_000_000, 1], [0, 1e30, 1], pa.array([0, 2**64 - 1, 65_536], pa.uint64())])
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_ids_and_times_are_no_classes(tmp_path: Path, values: Any, suffix: str) -> None:
    folder = small_set(tmp_path / "set", node_table([1, 2, 3], label=values), edge_table([1], [2]), suffix)
    with pytest.raises(UserError, match=r"label \d+ .*is beyond"):
        import_tables(folder, tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["set"]
    many = "".join(f"{k},{k * 7}\n" for k in range(70_000))
    with pytest.raises(UserError, match=r"'label' has more than 65536 different values.*--label-column"):
        import_csv(tmp_path / "many", f"id,label\n{many}")


@pytest.mark.parametrize(
    "ids", [["1e5", "2e5"], ["2020-01-01", "2021-01-01"], ["18446744073709551615", "7"], ["True", "False"], ["1", "2"]]
)
def test_ids_of_csv_files_as_they_are_written(tmp_path: Path, ids: list[str]) -> None:
    nodes, edges = f"id,x\n{ids[0]},1\n{ids[1]},2\n", f"src,dst\n{ids[0]},{ids[1]}\n"
    assert import_csv(tmp_path, nodes, edges, id_type="string").node_ids.to_pylist() == ids
    if ids[0][0] in "2T":
        assert import_csv(tmp_path, nodes, edges).node_ids.to_pylist() == ids
    elif ids[0] != "1":
        with pytest.raises(UserError, match=r"has type double.*--id-type string"):
            import_csv(tmp_path, nodes, edges)


def test_zeros_in_front_of_ids_are_kept(tmp_path: Path) -> None:
    edges = "src,dst\n007,7\n7,08\n"
    assert import_csv(tmp_path, None, edges).node_ids.to_pylist() == ["007", "08", "7"]
    assert import_csv(tmp_path, None, edges, id_type="int").node_ids.tolist() == [7, 8]
    # Also where the first block does not show it, and in a node table.
    late = "".join(f"{k},{k + 1}\n" for k in range(200_000))
    assert import_csv(tmp_path, None, f"src,dst\n{late}00,0\n").num_nodes == 200_002
    assert import_csv(tmp_path, "id,x\n7,1\n007,2\n", "src,dst\n007,7\n").node_ids.to_pylist() == ["7", "007"]
    # Where the ids are numbers already, it is the user who knows what 007 is.
    with pytest.raises(UserError, match=r"'src' of .*edges.csv .* '007', .*--id-type string .*--id-type int"):
        import_csv(tmp_path, "id,x\n7,1\n8,2\n", "src,dst\n007,8\n")
    assert import_csv(tmp_path, "id,x\n7,1\n8,2\n", "src,dst\n007,8\n", id_type="int").num_edges == 1
    # Blanks around numbers do not count, zeros alone are no zeros in front, and nothing is no id.
    assert import_csv(tmp_path, "id,x\n 0,1\n-8 ,2\n", "src,dst\n0, -8\n").node_ids.tolist() == [0, -8]
    with pytest.raises(UserError, match="has no id in 2 rows, the first is row 1"):
        import_csv(tmp_path, "id,x\n0,1\n,2\nNA,3\n")


@pytest.mark.parametrize(
    ("nodes", "edges", "where"),
    [
        ("id,x\na,1\n,2\n", "src,dst\na,a\n", "column 'id' .* row 1;"),
        ("id,x\na,1\nb,2\n", "src,dst\na,b\n,b\n", "column 'src' .* row 1;"),
        (None, 'src,dst\na,b\na,""\n', "column 'dst' .* row 1;"),
        ("id,x\n1,1\n,2\n", "src,dst\n1,1\n", "column 'id' .* row 1;"),
    ],
)
def test_an_empty_id_is_a_missing_one(tmp_path: Path, nodes: str | None, edges: str, where: str) -> None:
    """All edges without an end would meet in one node."""
    with pytest.raises(UserError, match=f"{where} give each row one"):
        import_csv(tmp_path, nodes, edges)
    columns = {"id": ["a", "", "c"], "x": [1.0, 2.0, 3.0]}
    with pytest.raises(UserError, match=r"column 'id' .* row 1; give each row one"):
        import_tables(small_set(tmp_path / "set", pa.table(columns), edge_table(["a"], ["c"])), tmp_path / "out")


def test_which_column_is_what_is_kept(tmp_path: Path) -> None:
    columns = {"emb": np.ones((2, 3)), "label": ["a", "b"], "when": [1, 2], "train_mask": [True, False]}
    nodes = node_table([1, 2], **columns, features=np.ones((2, 2)), split=["train", "val"])
    folder = small_set(tmp_path, nodes, edge_table([1], [2], since=[3], weight=[1.0]))
    chosen = TableColumns(split="split", ignore=["when"])
    assert describe(import_tables(folder, tmp_path / "out", columns=chosen))["columns"] == {
        "id": "id",
        "label": "label",
        "split": "split",
        "features": ["features"],
        "left_out": {
            "emb": "the features are in 'features'",
            "when": "--ignore-column",
            "train_mask": "the split is in 'split'",
        },
        "source": "src",
        "target": "dst",
        "weight": "weight",
        "edges_left_out": {"since": "only ends and a weight of edges are used"},
    }
    chosen = TableColumns(ignore=["split", "label"], features=["when"])
    told = describe(import_tables(folder, tmp_path / "chosen", columns=chosen))["columns"]
    assert (told["label"], told["split"], told["features"]) == (None, ["train_mask"], ["when"])


def test_of_very_many_columns_the_first_are_kept(tmp_path: Path) -> None:
    nodes = node_table([1], **{f"f{k}": [k] for k in range(300)}, **{f"x{k}": [k] for k in range(300)})
    chosen = TableColumns(features=[f"f{k}" for k in range(300)])
    folder = small_set(tmp_path, nodes, edge_table([1], [1]))
    told = describe(import_tables(folder, tmp_path / "out", columns=chosen))["columns"]
    assert told["features"] == [f"f{k}" for k in range(100)]
    assert (len(told["left_out"]), told["left_out"]["…"]) == (101, "200 more")


@pytest.mark.parametrize(
    ("nodes", "edges", "name"),
    [
        ("nodes.csv", "edges.csv", "store"),
        ("web-nodes.csv", "web-edges.csv", "web"),
        ("nodes_web.csv", "web_edges.csv", "web"),
        ("people.csv", "likes.csv", "store"),
        (None, "edges.csv", "store"),
        (None, "likes.csv", "likes"),
        (None, "knowledges.csv", "knowledges"),
    ],
)
def test_a_graph_of_two_files_is_named_by_both_or_by_its_store(
    tmp_path: Path, nodes: str | None, edges: str, name: str
) -> None:
    given = None if nodes is None else write_table(tmp_path / nodes, node_table([1, 2]))
    write_table(tmp_path / edges, edge_table([1], [2]))
    assert import_tables(None, tmp_path / "store", nodes=given, edges=tmp_path / edges).name == name
    if nodes is None:
        assert import_tables(tmp_path / edges, tmp_path / "store", overwrite=True).name == name


def test_all_columns_that_are_no_numbers_are_named_at_once(tmp_path: Path) -> None:
    """With the options that leave them out."""
    nodes = "id,x,city,day,two words\n1,1,Rome,2020-01-02,a\n2,,Oslo,2021-01-02,b\n"
    with pytest.raises(UserError) as refused:
        import_csv(tmp_path, nodes)
    assert str(refused.value) == (
        f"columns 'city' (string), 'day' (date32[day]), 'two words' (string) of {tmp_path}/nodes.csv hold no numbers, "
        "as features are: leave them out by --ignore-column city --ignore-column day --ignore-column 'two words', or "
        "choose the features by --feature-column, and the label by --label-column if it is among them"
    )
    lists = node_table([1, 2], label=[0, 1], city=["Rome", "Oslo"], emb=np.ones((2, 2)))
    with pytest.raises(UserError, match=r"or take a list alone as features by --feature-column emb$"):
        import_tables(small_set(tmp_path / "lists", lists), tmp_path / "out")
    topic = node_table([1, 2], topic=["a", "b"])
    with pytest.raises(UserError, match=r"--feature-column, and the label by --label-column if it is this one$"):
        import_tables(small_set(tmp_path / "topic", topic), tmp_path / "out")
    with pytest.raises(UserError, match=r"the first at node 1 column 'x'; replace .* \(missing ones by the column's"):
        import_csv(tmp_path, nodes, ignore=["city", "day", "two words"])


@pytest.mark.parametrize("name", ["", "Unnamed: 0", "__index_level_0__"])
@pytest.mark.parametrize("suffix", ["csv", "parquet", "arrow"])
def test_row_numbers_of_pandas_are_no_feature_unless_they_are_chosen(tmp_path: Path, name: str, suffix: str) -> None:
    nodes = pa.table({name: [0, 1, 2], "id": [5, 6, 7], "x": [1.0, 2.0, 3.0]})
    folder = small_set(tmp_path / "set", nodes, edge_table([5], [6]), suffix)
    with pytest.raises(UserError, match=rf"column '{name}' .*row numbers.*--ignore-column '{name}', or choose"):
        import_tables(folder, tmp_path / "out")
    store = import_tables(folder, tmp_path / "out", columns=TableColumns(ignore=[name]))
    assert store.features.tolist() == [[1], [2], [3]]
    chosen = TableColumns(features=[name, "x"])
    assert import_tables(folder, tmp_path / "both", columns=chosen).features.tolist() == [[0, 1], [1, 2], [2, 3]]


def test_edges_in_a_file_of_no_bytes(tmp_path: Path) -> None:
    """A failed export is no graph without edges; a header alone is one."""
    with pytest.raises(UserError, match=r"edges\.csv is empty.*a header line alone"):
        import_csv(tmp_path / "none", "id,x\n1,1\n", "")
    assert import_csv(tmp_path / "header", "id,x\n1,1\n", "src,dst\n").num_edges == 0


@pytest.mark.parametrize("delimiter", [";", "\t", "|", " "])
def test_the_delimiter_is_guessed_in_the_message(tmp_path: Path, delimiter: str) -> None:
    edges = f"src{delimiter}dst\n1{delimiter}2\n"
    shown = "'\\t'" if delimiter == "\t" else repr(delimiter)
    with pytest.raises(UserError, match="has no column 'src'") as refused:
        import_csv(tmp_path, None, edges)
    assert str(refused.value).endswith(f"give --delimiter {shown} if that is between its values")


@pytest.mark.parametrize(
    ("begin", "kind"),
    [
        (b"PAR1\x15", "Parquet"),
        (b"PK\x03\x04", "zip"),
        (b"\x1f\x8b", "gzip"),
        (b"ARROW1\0", "Feather"),
        (b"\xff\xfe", "UTF-8"),
    ],
)
def test_a_csv_file_that_is_none(tmp_path: Path, begin: bytes, kind: str) -> None:
    (tmp_path / "edges.csv").write_bytes(begin + bytes(range(256)) * 4)
    with pytest.raises(
        UserError, match=rf"edges\.csv (is a {kind} file by its first bytes, not text; |is not in {kind},)"
    ):
        import_tables(tmp_path / "edges.csv", tmp_path / "out")
    (tmp_path / "edges.csv").write_text("PAR1,ARROW1\n1,2\n")
    columns = TableColumns(source="PAR1", target="ARROW1")
    assert import_tables(tmp_path / "edges.csv", tmp_path / "text", columns=columns).num_edges == 1


def test_delimiters(tmp_path: Path) -> None:
    tabs = import_csv(tmp_path, None, "src\tdst\n1\t2\n", style=CsvStyle(delimiter="\\t"))
    assert tabs.num_edges == 1
    for wrong in ("ab", "ü", "", '"', "\n"):
        with pytest.raises(UserError, match=r"--delimiter .* is not one ASCII character"):
            CsvStyle(delimiter=wrong)


@pytest.mark.parametrize("content", ["id,größe\n1,2\n", "id,label\n1,größe\n", "größe,x\nä,1\n"])
def test_csv_files_in_another_encoding(tmp_path: Path, content: str) -> None:
    late = "id,label\n" + "".join(f"{k},a\n" for k in range(200_000)) + "x,größe\n"
    for text in (content, late):
        (tmp_path / "nodes.csv").write_bytes(text.encode("latin-1"))
        write_table(tmp_path / "edges.csv", edge_table([1], [1]))
        with pytest.raises(UserError, match=r"nodes.csv is not in UTF-8, .* iconv -f LATIN1 -t UTF-8"):
            import_tables(tmp_path, tmp_path / "out", columns=TableColumns(id="größe" if text[0] == "g" else "id"))


def test_pairs_to_predict_are_told_of_no_option_that_they_lack(tmp_path: Path, small: GraphStore) -> None:
    """Pairs are read as tables are, but dngd predict has no --id-type."""
    for suffix in ("csv", "parquet"):
        path = write_table(tmp_path / f"pairs.{suffix}", edge_table(["a"], ["b"]))
        with pytest.raises(UserError, match=r"pairs\.(csv|parquet) .*; (mend the lines|give the ids)") as refused:
            read_pairs(path, small)
        assert "--id-type" not in str(refused.value)


def test_files_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for k in range(11):
        write_table(tmp_path / "nodes" / f"part.{k}.parquet", node_table([100 - k]))
    (tmp_path / "nodes" / "_SUCCESS").write_text("")
    (tmp_path / "nodes" / ".part.0.parquet.crc").write_text("")
    write_table(tmp_path / "edges.parquet", edge_table([100], [90]))
    assert import_tables(tmp_path, tmp_path / "out").node_ids.tolist() == list(range(100, 89, -1))
    some = import_tables(tmp_path / "edges.parquet", tmp_path / "edges")
    with pytest.raises(UserError, match="1 edges name nodes"):
        import_tables(
            None, tmp_path / "few", nodes=f"{tmp_path}/nod*/part.[1-9].parquet", edges=tmp_path / "edges.parquet"
        )
    assert some.node_ids.tolist() == [90, 100]


def test_csv_in_its_styles(tmp_path: Path) -> None:
    (tmp_path / "a.tsv.gz").write_bytes(gzip.compress(b"src\tdst\n1\t2\n2\t3\n"))
    store = import_tables(tmp_path / "a.tsv.gz", tmp_path / "a")
    (tmp_path / "b.csv").write_text("1;2\n2;3\n")
    bare = TableColumns(source="f0", target="f1")
    style = CsvStyle(delimiter=";", header=False)
    assert import_tables(tmp_path / "b.csv", tmp_path / "b", columns=bare, style=style).digest == store.digest
    # Ids that look like numbers in one file and not in the other are strings in both, zeros and all.
    (tmp_path / "nodes.csv").write_text("id,x\n007,1\n7,2\n")
    (tmp_path / "edges.csv").write_text("src,dst\n7,x7\n")
    (tmp_path / "nodes-2.csv").write_text("id,x\nx7,3\n")
    parts = [tmp_path / "nodes.csv", tmp_path / "nodes-2.csv"]
    mixed = import_tables(None, tmp_path / "m", nodes=parts, edges=tmp_path / "edges.csv")
    assert mixed.node_ids.to_pylist() == ["007", "7", "x7"]
    assert mixed.indices.tolist() == [1]
    # A file of no bytes, as some tools write for an empty part, and values that look whole at first.
    (tmp_path / "nodes-3.csv").write_text("")
    (tmp_path / "nodes-2.csv").write_text("id,x\nx7,.5\n")
    again = import_tables(
        None, tmp_path / "m", nodes=[*parts, tmp_path / "nodes-3.csv"], edges=tmp_path / "edges.csv", overwrite=True
    )
    assert again.features.tolist() == [[1.0], [2.0], [0.5]]


def test_a_stream_of_arrow_batches(tmp_path: Path) -> None:
    table = edge_table([1, 2], [2, 3])
    with pa.ipc.new_stream(str(tmp_path / "edges.arrow"), table.schema) as writer:
        writer.write_table(table)
    assert import_tables(tmp_path / "edges.arrow", tmp_path / "out").num_edges == 2


def test_options_reach_the_store(tmp_path: Path) -> None:
    edges = edge_table([10, 10, 20, 30], [20, 20, 20, 40], weight=[1.0, 2.0, 1.0, 3.0])
    store = import_tables(
        small_set(tmp_path, edges=edges),
        tmp_path / "out",
        name="four",
        add_reverse=True,
        self_loops="keep",
        duplicates="sum",
        feature_dtype="bfloat16",
    )
    assert (store.name, store.num_edges, store.manifest.directed) == ("four", 5, False)
    assert store.edge_weight is not None
    assert sorted(store.edge_weight.tolist()) == [1.0, 3.0, 3.0, 3.0, 3.0]
    assert str(store.features.dtype) == "torch.bfloat16"
    assert store.manifest.provenance.options["add_reverse"] is True


NODES = [10, 20, 30, 40]
NAN = float("nan")


@pytest.mark.parametrize(
    ("nodes", "edges", "message"),
    [
        (node_table([10.0, 20.0]), None, r"column 'id' of .*nodes\.parquet has type double.* whole numbers or strings"),
        (node_table([10, None, 20]), None, "has no id in 1 rows, the first is row 1"),
        (node_table([10, 20, 10, 30, 20]), None, r"repeats node ids in 2 rows, the first again at 10 \(row 2\), 20"),
        (node_table(["a", "b", "a"]), edge_table(["a"], ["b"]), r"repeats node ids in 1 rows.* 'a' \(row 2\)"),
        (node_table(["10", "20"]), None, "column 'src' of .*edges.* int64 but column 'id' of .*nodes.* string"),
        (pa.table({"key": NODES, "x": NODES}), None, r"has no column 'id' \(it has: key, x\); .*--id-column"),
        (node_table(NODES, title=["a"] * 4), None, "column 'title' of .* type string; features are numbers.*--ignore-"),
        (node_table(NODES, features=[[1.0], [2.0, 3.0], [1.0], []]), None, r"has 2 numbers in row 1 but 1 .*\(2 such"),
        (
            node_table(NODES, features=[[1.0], None, [1.0], [1.0]]),
            None,
            "no list in row 1 but 1 in the first .*a list of 1",
        ),
        (node_table(NODES, features=[["a"], ["b"], ["c"], ["d"]]), None, "features are lists of numbers"),
        (node_table(NODES, x=[1.0, NAN, None, np.inf]), None, "3 NaN or infinite values.* node 1 column 'x', node 2"),
        (node_table(NODES, label=[0.5, 1, 1, 1]), None, "label 0.5 in row 0 .* is no whole number"),
        (node_table(NODES, label=[0, -2, 1, 1]), None, "label -2 of node 1 is out of range"),
        (node_table(NODES, label=[["a"], ["b"], ["a"], ["b"]]), None, "labels are lists of 0 and 1, one entry a class"),
        (node_table(NODES, label=[[0, 1], [1, 2], [3, 0], None]), None, r"'label' .* has 2 in row 1 \(2 such values"),
        (node_table(NODES, label=[[0, 1], [1], [3, 0, 1], None]), None, r"has 1 labels in row 1 but 2 .*\(2 such rows"),
        (node_table(NODES, label=[[1, 1], None, [None, 0], [0, 0]]), None, "has no label in row 2, where others have"),
        (node_table(NODES, label=pa.array([0, 1, 0, 1], pa.date32())), None, "a label is a number or name.*string say"),
        (node_table(NODES, split=["train", "test", "dev", "val"]), None, "split 'dev' in row 2 .* is not known"),
        (node_table(NODES, split=["val", "test", "", None]), None, "a split without training nodes"),
        (node_table(NODES, split=["train"] + ["val"] * 3, label=[-1, 0, 1, 0]), None, "none of them has a label"),
        (node_table(NODES, split=[0, 1, 2, 2]), None, "column 'split' .* a split is train, val or test"),
        (node_table(NODES, split=["train"] * 4, train_mask=[True] * 4), None, "tells its split twice"),
        (node_table(NODES, train_mask=[1.0, 0.5, 0.0, 1.0]), None, "column 'train_mask' .* has 0.5 in row 1"),
        (node_table(NODES, train_mask=[2, 0, 0, 0]), None, "column 'train_mask' .* has 2.* in row 0"),
        (node_table(NODES).slice(0, 0), None, "has no rows"),
        (
            None,
            edge_table([10, 11, 12], [20, 20, 11]),
            r"2 edges name nodes .* the first is node 11 in row 1 of .*edges",
        ),
        (None, edge_table([10.0], [20.0]), "column 'src' .* type double"),
        (None, edge_table([10], [None]), "column 'dst' .* has no id in 1 rows"),
        (None, pa.table({"src": [1], "target": [2]}), r"no column 'dst' \(it has: src, target\); .*--target-column"),
        (None, edge_table([10], [20], weight=["heavy"]), "column 'weight' .* a weight is one number"),
        (None, edge_table([10, 10], [20, 30], weight=[1.0, None]), "1 edge weights are NaN .* that of edge 1"),
    ],
)
def test_bad_tables(tmp_path: Path, nodes: pa.Table | None, edges: pa.Table | None, message: str) -> None:
    folder = small_set(tmp_path / "set", nodes, edges)
    with pytest.raises(UserError, match=message):
        import_tables(folder, tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nodes": node_table(NODES).drop_columns(["id"]).append_column("id", pa.array([None] * 4))}, "has no id"),
        ({"id": "other"}, "no column 'other'"),
        ({"label": "class"}, "no column 'class'.*--label-column"),
        ({"features": ["x", "z"]}, "no column 'z'.*--feature-column"),
        ({"ignore": ["z"]}, "no column 'z'.*--ignore-column"),
        ({"weight": "w"}, "no column 'w'.*--weight-column"),
        ({"labels": ["x", "z"]}, "no column 'z'.*--label-columns"),
        ({"labels": ["x"]}, "--label-columns names 'x' alone, .*--label-column"),
        ({"labels": ["x", "y", "x"]}, "--label-columns names 'x' 2 times"),
        ({"labels": ["x", "y"]}, "tells its labels twice, by 'label' and by --label-columns.*--ignore-column label"),
        ({"labels": ["x", "y"], "label": "label"}, "--label-column label and --label-columns are both given"),
        ({"labels": ["x", "y"], "ignore": ["label"]}, r"column 'x' of .*nodes.parquet has 2 in row 2 \(3 such"),
        ({"id_type": "float"}, "--id-type 'float' is not known"),
    ],
)
def test_bad_column_names(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = small_set(tmp_path, change.pop("nodes", None))
    with pytest.raises(UserError, match=message):
        import_tables(folder, tmp_path / "out", columns=TableColumns(**change))


def test_files_that_do_not_fit_together(tmp_path: Path) -> None:
    files = [
        write_table(tmp_path / f"n{k}.parquet", table)
        for k, table in enumerate(
            [
                node_table([1], x=[1.0]),
                node_table([2], x=[1.0], z=[2.0]),
                node_table([3]),
                node_table([4], x=["a"]),
                node_table([5], x=np.ones((1, 2))),
                node_table([6], x=np.ones((1, 3))),
            ]
        )
    ]
    edges = write_table(tmp_path / "e.parquet", edge_table([1], [1]))
    for chosen, message in (
        ([0, 1], "n1.parquet has the column 'z' that .*n0.parquet lacks"),
        ([0, 2], "n2.parquet has no column 'x'"),
        ([0, 3], "column 'x' of .*n3.parquet has type string"),
        ([0, 4], "column 'x' of .*n0.parquet has type double; features are one list in each file"),
        ([4, 5], "column 'x' has 2 numbers a row in .*n4.parquet but 3 in .*n5.parquet"),
    ):
        names = TableColumns(features=["x"]) if chosen[1] > 3 else None
        with pytest.raises(UserError, match=message):
            import_tables(None, tmp_path / "out", nodes=[files[k] for k in chosen], edges=edges, columns=names)


def test_sources_that_are_no_tables(tmp_path: Path) -> None:
    def refused(message: str, source: Any = None, **given: Any) -> None:
        with pytest.raises(UserError, match=message):
            import_tables(source, tmp_path / "out", **given)

    folder = tmp_path / "set"
    refused("does not exist", folder)
    folder.mkdir()
    refused("holds no files", folder)
    write_table(folder / "links.parquet", edge_table([1], [2]))
    refused(r"no files or folder named edges\* \(it has: links.parquet\)", folder)
    refused("no file matches", None, edges=f"{folder}/*.csv")
    refused("no edge table is given", None, nodes=folder)
    refused("given besides --nodes or --edges", folder, nodes=folder)
    (folder / "edges.csv").write_text("src,dst\n1,2\n")
    refused("mixes formats", None, edges=folder)
    assert import_tables(None, tmp_path / "one", edges=folder, table_format="csv").num_edges == 1
    (folder / "edges.dat").write_text("src,dst\n1,2\n")
    refused("does not tell its format by its name", None, edges=folder / "edges.dat")
    assert import_tables(None, tmp_path / "two", edges=folder / "edges.dat", table_format="csv").num_edges == 1
    for suffix in ("parquet", "arrow"):
        (folder / f"broken.{suffix}").write_bytes(b"ARROW1 and nothing that follows")
        refused(f"broken.{suffix} cannot be read as {suffix}", folder / f"broken.{suffix}")
    (folder / "ragged.csv").write_text("src,dst\n1,2\n3\n")
    refused("ragged.csv cannot be read as csv .*--delimiter", folder / "ragged.csv")
    late = "".join(f"{k},{k}\n" for k in range(200_000))
    (folder / "late.csv").write_text(f"src,dst\n{late}a,b\n")
    refused("late.csv .*--id-type string", folder / "late.csv")
    (folder / "cut.csv.gz").write_bytes(gzip.compress(b"src,dst\n1,2\n" * 100)[:-20])
    refused("cut.csv.gz cannot be read", folder / "cut.csv.gz")


def test_what_is_wrong_is_said_before_rows_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Types and options are checked with the schemas, and nodes before edges."""
    monkeypatch.setattr(tables, "_add_edges", lambda *_: pytest.fail("edges were read"))
    folder = small_set(tmp_path / "ids", node_table([10, 10]))
    with pytest.raises(UserError, match="repeats"):
        import_tables(folder, tmp_path / "out")
    monkeypatch.setattr(tables, "_read_nodes", lambda *_: pytest.fail("rows were read"))
    folder = small_set(tmp_path / "set")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("")
    for out, message, options in (
        ("taken", "already exists", {}),
        ("taken", "holds other files", {"overwrite": True}),
        ("out", "duplicates='sum' needs edge weights", {"duplicates": "sum"}),
        ("out", "feature_dtype='int8' is not known", {"feature_dtype": "int8"}),
        ("out", "name='' is empty", {"name": ""}),
    ):
        with pytest.raises(UserError, match=message):
            import_tables(folder, tmp_path / out, **options)
    monkeypatch.undo()
    write_table(folder / "edges.parquet", edge_table(["10"], ["20"]))
    with pytest.raises(UserError, match="give all node ids one type"):
        import_tables(folder, tmp_path / "out")


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_columns_in_the_names_of_folders(tmp_path: Path, suffix: str) -> None:
    """As Spark's partitionBy and pyarrow's partition_cols write them; a folder that all files share names none."""
    table = pa.table(
        {
            "id": range(12),
            "x": [float(k) for k in range(12)],
            "label": ["a b", "c", None] * 4,
            "split": ["train", "val", "test", None] * 3,
        }
    )
    folder = tmp_path / "run=3"
    pads.write_dataset(
        table,
        folder / "nodes",
        format=suffix,
        partitioning=["label", "split"],
        partitioning_flavor="hive",
    )
    (folder / "nodes" / "_SUCCESS").touch()
    edges = edge_table([0, 1], [1, 2])
    (pq.write_table if suffix == "parquet" else csv.write_csv)(edges, folder / f"edges.{suffix}")
    store = import_tables(folder, tmp_path / "out")
    by_id = {int(k): place for place, k in enumerate(store.node_ids if store.node_ids is not None else range(12))}
    rows = [by_id[k] for k in range(12)]
    assert store.label_names == ("a b", "c")
    assert store.labels[rows].tolist() == [0, 1, -1] * 4
    assert store.features[rows, 0].tolist() == list(range(12))
    assert store.num_features == 1
    assert store.split_masks["train"][rows].nonzero()[:, 0].tolist() == [0, 4, 8]
    assert store.split_masks["test"][rows].nonzero()[:, 0].tolist() == [2, 6, 10]
