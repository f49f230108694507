"""dngd data import: its messages name what the user typed, and lead to something that works."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from dngd import cli
from dngd.graph import GraphStore


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the one sentence with which the command line refuses."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["data", *arguments])
    told = capsys.readouterr().err
    assert ended.value.code == 2, told
    assert told.startswith("dngd: "), told
    assert told.count("\n") == 1, told
    return told


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of tables, tab, in a working folder whose own path looks like an option."""
    folder = tmp_path / "name=x" / "tab"
    folder.mkdir(parents=True)
    (folder / "nodes.csv").write_text("id,x\n1,1\n2,3\n")
    (folder / "edges.csv").write_text("src,dst\n1,2\n2,1\n")
    monkeypatch.chdir(folder.parent)
    return folder


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("import tab --duplicates sum", "--duplicates sum needs edge weights to sum; give them, or --duplicates drop"),
        ("import tab --duplicates max", "--duplicates max is not known; give one of drop, sum, keep"),
        ("import tab --self-loops add", "--self-loops add is not known; give one of drop, keep"),
        ("import tab --feature-dtype int8", "--feature-dtype int8 is not known; give one of float32"),
        ("import tab --feature-dtype int8 --order degree", "--feature-dtype int8 is not known"),
        ("import tab --name=", "--name '' is empty; give the graph a name"),
        ("import copies", "--duplicates sum or --duplicates keep"),
        ("synth --nodes 2", "--nodes 2 is too few for 47 classes"),
        ("synth --edges 3", "--edges 3 is not an even number"),
        ("synth --homophily 1.5", "--homophily 1.5 is out of range; with --label-noise 0.06 it can be"),
        ("synth --like ogbn-products --scale 2", "--scale 2 is out of range"),
        ("synth --like ogbn-products --seed -1", "--seed -1 is negative"),
    ],
)
def test_options_are_named_as_flags(
    tables: Path, capsys: pytest.CaptureFixture[str], arguments: str, told: str
) -> None:
    copies = tables.parent / "copies"
    copies.mkdir()
    (copies / "edges.csv").write_text("src,dst,weight\n1,2,3\n1,2,4\n")
    assert told in refused(capsys, *arguments.split(), "--out", "out")
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("tab --nodes x.csv", "tab is given besides --nodes or --edges"),
        ("tab --format parquet", "tab/nodes.csv is a csv file by its name; leave --format out, or"),
        ("two --format parquet", "dngd: two/nodes* has no parquet files; check --format, or the path of"),
        ("--edges tab/edges.csv --format parquet", "tab/edges.csv is a csv file by its name; leave --format out, or"),
        ("tab/nodes.csv", "tab/nodes.csv alone would be the edges, and is by its name and columns a node"),
        ("x=1/duplicates=sum/tab", "x=1/duplicates=sum/tab does not exist"),
        ("", "SOURCE is empty; give a file"),
        ("none", "none does not exist; give a file"),
        ("file:///none", "/none does not exist; give a file"),
    ],
)
def test_paths_are_named_as_they_are(
    tables: Path, capsys: pytest.CaptureFixture[str], arguments: str, told: str
) -> None:
    for part in ("nodes-1.csv", "nodes-2.csv", "edges.csv"):
        (tables.parent / "two").mkdir(exist_ok=True)
        (tables.parent / "two" / part).write_text("")
    sentence = refused(capsys, "import", *(arguments.split() or [""]), "--out", "out")
    assert told in sentence
    assert "tab://" not in sentence
    assert not Path("out").exists()


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, str]:
    """Return what a command prints on standard output, and on standard error."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["data", *arguments])
    assert not ended.value.code
    told = capsys.readouterr()
    return told.out, told.err


def test_which_columns_became_what_is_shown(
    tables: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the import, in its JSON, and by info later."""
    monkeypatch.setattr("dngd.cli.data.out", Console(width=200, markup=False, emoji=False))
    names = [f"x{k}" for k in range(12)]
    head, rows = ",".join(["id", "topic", "city", "day", *names]), ["1,30,Rome,5", "2,10,Oslo,6"]
    (tables / "nodes.csv").write_text("\n".join([head, *(f"{row}{',0' * 12}" for row in rows)]))
    (tables / "edges.csv").write_text("src,dst,since\n1,2,1999\n")
    flags = ["--label-column", "topic", "--ignore-column", "city", "--ignore-column", "day", "--overwrite"]
    found = [
        printed(capsys, "import", "tab", "--out", "out", *flags)[0],
        printed(capsys, "info", "out")[0],
    ]
    for text in found:
        for line in (
            "id: id",
            "label: topic",
            "split: none",
            "features: 12: x0, x1, x2, x3, x4, x5, x6, x7, …",
            "edges: src -> dst, weight none",
            "not used: city, day (--ignore-column)",
            "of the edges not used: since (only ends and a weight of edges are used)",
        ):
            assert f" {line} " in text
        assert "[10, 30]" in text
    for command in (("import", "tab", "--out", "out", *flags), ("info", "out")):
        told = json.loads(printed(capsys, *command, "--json")[0])
        assert told["columns"]["features"] == names
        assert told["columns"]["left_out"] == {"city": "--ignore-column", "day": "--ignore-column"}
        assert told["class_names"] == [10, 30]


@pytest.mark.parametrize("order", ["original", "degree"])
def test_a_graph_is_named_by_its_folder_or_its_store(
    tables: Path, capsys: pytest.CaptureFixture[str], order: str
) -> None:
    names = []
    for source in (["tab"], ["--nodes", "tab/nodes.csv", "--edges", "tab/edges.csv"], ["tab/edges.csv"]):
        printed(capsys, "import", *source, "--out", "web.store", "--overwrite", "--order", order)
        names.append(GraphStore.open("web.store").name)
    assert names == ["tab", "web.store", "web.store"]


def test_classes_without_a_node_are_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(
        tmp_path / "g.npz", edge_index=np.array([[0, 1], [1, 0]]), num_nodes=3, x=np.ones((3, 1)), y=np.array([0, 3, 1])
    )
    told = printed(capsys, "import", str(tmp_path / "g.npz"), "--out", str(tmp_path / "out"))[1]
    assert told.startswith(f"dngd: 1 of the 4 classes of {tmp_path / 'g.npz'} have no node (2); ")
    assert told.count("\n") == 1


def test_a_file_address_is_a_path(tables: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["data", "import", f"file://{tables}", "--out", "out"])
    assert not ended.value.code
    assert GraphStore.open("out").num_edges == 2


@pytest.mark.parametrize(
    ("features", "told"),
    [
        (np.ones((3, 2, 4)), "has shape (3, 2, 4)"),
        (np.ones(3), "has shape (3,)"),
        (np.full((3, 2), "1.5"), "dtype <U3"),
    ],
)
def test_the_fix_for_features_of_another_shape_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], features: np.ndarray, told: str
) -> None:
    """The expression after `give` makes features that are taken."""
    arrays = {"edge_index": np.array([[0], [1]]), "num_nodes": 3}
    np.savez(tmp_path / "g.npz", x=features, **arrays)
    sentence = refused(capsys, "import", str(tmp_path / "g.npz"), "--out", str(tmp_path / "out"))
    assert told in sentence
    mended = eval(sentence.strip().rpartition("give ")[2], {"x": features})
    np.savez(tmp_path / "g.npz", x=mended, **arrays)
    with pytest.raises(SystemExit) as ended:
        cli.main(["data", "import", str(tmp_path / "g.npz"), "--out", str(tmp_path / "out")])
    assert not ended.value.code
    assert GraphStore.open(tmp_path / "out").num_features == features.size // 3


@pytest.mark.parametrize(
    ("edges", "flags", "said"),
    [
        ("1,2\n2,3\n3,1\n1,1\n", [], "0% of the edges have their reverse"),
        ("1,2\n2,3\n3,1\n2,1\n3,2\n", [], None),  # four of five have it
        ("1,2\n2,3\n3,1\n", ["--add-reverse"], None),
        ("1,2\n2,3\n3,1\n", ["--no-add-reverse"], None),
        ("1,1\n", ["--self-loops", "keep"], None),
    ],
)
def test_edges_of_one_way_are_said(
    tables: Path, capsys: pytest.CaptureFixture[str], edges: str, flags: list[str], said: str | None
) -> None:
    (tables / "nodes.csv").write_text("id,x\n1,1\n2,3\n3,2\n")
    (tables / "edges.csv").write_text("src,dst\n" + edges)
    shown, told = printed(capsys, "import", "tab", "--out", "s", "--json", *flags)
    assert (told == "") if said is None else (said in told and "--add-reverse" in told)
    described = json.loads(shown)["reversed_share"]
    assert described == (
        0.8 if "3,2" in edges else 1.0 if "--add-reverse" in flags else None if "keep" in flags else 0.0
    )
