"""dngd data import: its messages name what the user typed, and lead to something that works."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

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
        ("tab/nodes.csv", "has no column 'src'"),
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
