"""dngd data synth, and the progress that data commands show."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from dngd import cli
from dngd.cli import progress as progress_module
from dngd.cli.progress import data_progress
from dngd.graph import GraphStore, synth


def run(*arguments: str) -> int:
    """Return the command line's exit code."""
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["data", *arguments])
    return int(exit_info.value.code or 0)


def test_a_graph_like_a_public_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "g"
    assert run("synth", "--like", "ogbn-Products", "--scale", "0.001", "--seed", "3", "--out", str(out)) == 0
    store = GraphStore.open(out)
    assert (store.name, store.num_nodes, store.num_edges) == ("ogbn-products-like", 2_449, 123_718)
    assert store.manifest.provenance.options["seed"] == 3
    capsys.readouterr()
    assert run("verify", str(out)) == 0
    assert run("info", str(out), "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["num_classes"] == 47


def test_the_defaults_are_the_built_in_graphs(tmp_path: Path) -> None:
    out = str(tmp_path / "g")
    assert run("synth", "--nodes", "500", "--edges", "3000", "--classes", "5", "--features", "4", "--out", out) == 0
    options = GraphStore.open(out).manifest.provenance.options
    assert options["label_noise"] == synth.PRODUCTS_MINI.label_noise
    assert options["homophily"] == synth.PRODUCTS_MINI.homophily
    assert GraphStore.open(out).name == "synthetic"


@pytest.mark.parametrize("credentials", ["", "id:secret@"])
def test_an_address_is_not_verified(credentials: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", f"s3://{credentials}bucket/graph") == 2
    said = capsys.readouterr().err
    assert said.startswith("dngd: s3://bucket/graph is an address, and what is verified is a folder; ")
    assert said.count("\n") == 1


def test_paths_and_names_that_are_not_utf8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Arrow writes and reads no such paths, and a manifest holds no such names."""
    small = ["--nodes", "400", "--edges", "1000", "--classes", "4", "--features", "5"]
    assert run("synth", *small, "--out", str(tmp_path / "\udcff")) == 2
    assert f"{tmp_path}/? is no path in UTF-8" in capsys.readouterr().err
    assert run("synth", *small, "--out", str(tmp_path / "g"), "--name", "a\udcff") == 2
    assert "--name 'a?' is no Unicode text; give" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert run("synth", *small, "--out", str(tmp_path / "g")) == 0
    moved = (tmp_path / "g").rename(tmp_path / "\udcff")
    assert run("info", str(moved)) == run("verify", str(moved)) == 0
    capsys.readouterr()
    assert run("partition", str(moved), "--parts", "2", "--method", "ldg") == 2
    assert f"{tmp_path}/? is no path in UTF-8" in capsys.readouterr().err
    (tmp_path / "tables\udcff").mkdir()
    (tmp_path / "tables\udcff" / "edges.csv").write_text("src,dst\n0,1\n")
    assert run("import", str(tmp_path / "tables\udcff"), "--out", str(tmp_path / "h")) == 2
    assert "is no path or address in UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--like", "cora"], ["'cora' is not known", "ogbn-products, ogbn-papers100m"]),
        (["--like", "ogbn-products", "--nodes", "100"], ["--like ogbn-products", "--nodes too"]),
        (["--like", "ogbn-products", "--label-noise", "0.1"], ["--label-noise too"]),
        (["--like", "ogbn-products", "--scale", "2"], ["--scale 2", "0.001 to 1"]),
        (["--scale", "0.5"], ["--scale 0.5", "--like"]),
    ],
)
def test_contradictions_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: list[str]
) -> None:
    assert run("synth", *flags, "--out", str(tmp_path / "g")) == 2
    err = capsys.readouterr().err
    assert err.startswith("dngd: ")
    assert err.count("\n") == 1
    for words in said:
        assert words in err
    assert list(tmp_path.iterdir()) == []


def shown(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=100, color_system=None)


def test_a_terminal_gets_a_bar_for_each_stage() -> None:
    console = shown(terminal=True)
    with data_progress(console) as progress:
        for done in (0, 1_000, 2_000):
            progress("edges [/x]", done, 0)
        for done in (0, 1_000, 4_000):
            progress("sorting", done, 4_000)
    assert isinstance(console.file, io.StringIO)
    last = console.file.getvalue().rsplit("\r", 1)[-1]
    assert "edges [/x]" in last
    assert "2,000" in last
    assert "4,000/4,000" in last


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.0, 4.0, 11.0, 12.0, 22.0, 30.0, 31.0, 31.5, 32.0])
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(clock))
    console = shown(terminal=False)
    with data_progress(console) as progress:
        for done in (0, 10, 20, 30, 40, 50):
            progress("features", done, 50)
        progress("sorting", 7, 0)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().splitlines() == [
        "features: 20 of 50 (40%), 11 s",
        "features: 40 of 50 (80%), 22 s",
        "features: 50 done, 32 s",
    ]


@pytest.mark.parametrize("terminal", [False, True])
def test_an_error_goes_through(terminal: bool) -> None:
    def fail() -> None:
        with data_progress(shown(terminal)) as progress:
            progress("edges", 1, 2)
            raise KeyError

    with pytest.raises(KeyError):
        fail()


def test_arrays_that_nothing_reads_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arrays = {"edge_index": np.array([[0, 1], [1, 0]]), "num_nodes": np.array(3)}
    np.savez(tmp_path / "other.npz", **arrays, features=np.ones((3, 2)), labels=np.zeros(3))
    assert run("import", str(tmp_path / "other.npz"), "--out", str(tmp_path / "g")) == 0
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"dngd: {tmp_path}/other.npz has no x and no y, and features, labels are not used: features are called x, "
        "labels y, splits train_mask, val_mask and test_mask"
    )
    np.savez(tmp_path / "bare.npz", **arrays)
    assert run("import", str(tmp_path / "bare.npz"), "--out", str(tmp_path / "bare")) == 0
    assert "not used" not in capsys.readouterr().err


def test_edges_without_their_weights(tmp_path: Path) -> None:
    (tmp_path / "edges.csv").write_text("src,dst,weight\n0,1,2\n1,0,3\n0,1,5\n")
    table = ("import", "--edges", str(tmp_path / "edges.csv"), "--out")
    assert run(*table, str(tmp_path / "weighted")) == 2, "one edge with two weights"
    assert run(*table, str(tmp_path / "plain"), "--weight-column", "") == 0
    store = GraphStore.open(tmp_path / "plain")
    assert (store.num_edges, store.edge_weight) == (2, None)
