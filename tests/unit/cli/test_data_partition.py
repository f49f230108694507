"""dngd data partition."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dngd import cli
from dngd.graph import GraphStore
from tests.helpers.graphs import small_store

LDG = ("--method", "ldg")


def run(*arguments: Any) -> int:
    """Return the command line's exit code."""
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["data", *map(str, arguments)])
    return int(exit_info.value.code or 0)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_store(tmp_path_factory.mktemp("graphs") / "g").path


def test_parts_are_made_shown_and_replaced_on_demand(graph: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("partition", graph, "--parts", 4, *LDG) == 0
    said = capsys.readouterr().out
    assert "4 parts by ldg" in said
    assert "of the edges join two parts" in said
    store = GraphStore.open(graph)
    info = store.partitions[4]
    assert info.train_nodes is not None
    assert sum(info.train_nodes) == int(store.split_masks["train"].sum())
    assert f"training nodes a part: {min(info.train_nodes):,} to {max(info.train_nodes):,}" in said
    assert run("partition", graph, "--parts", 4, *LDG) == 2
    assert "already" in capsys.readouterr().err
    assert run("partition", graph, "--parts", 4, *LDG, "--overwrite", "--slack", 0, "--seed", 3, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["nodes"] == [150] * 4
    assert told["options"] == {"slack": 0.0, "passes": 10, "seed": 3}
    assert told["parts"] == 4
    assert run("info", graph, "--json") == 0
    assert json.loads(capsys.readouterr().out)["partitions"]["4"]["nodes_a_part"] == [150, 150]
    assert run("verify", graph) == 0


def test_other_splits_can_be_balanced(graph: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("partition", graph, "--parts", 3, *LDG, "--split", "random:0.1/0.1/0.1", "--seed", 1, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    store = GraphStore.open(graph)
    train = store.split("random:0.1/0.1/0.1", seed=1).train
    assert told["train_nodes"] == store.partition(3)[train].bincount().tolist()


def test_a_reordered_copy(graph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name for path in graph.iterdir()}
    out = tmp_path / "new"
    assert run("partition", graph, "--parts", 5, *LDG, "--reorder", "--out", out) == 0
    assert str(out) in capsys.readouterr().out.replace("\n", "")
    assert {path.name for path in graph.iterdir()} == before
    old, new = GraphStore.open(graph), GraphStore.open(out)
    assert (new.partition(5).diff() >= 0).all()
    assert torch.equal(new.labels, old.labels[torch.from_numpy(new.node_ids)])
    assert new.verify() == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--parts", "4", "--reorder"], "--reorder and --out go together"),
        (["--parts", "4", "--out", "x"], "--reorder and --out go together"),
        (["--parts", "0"], "--parts 0"),
        (["--parts", "7", "--method", "best"], "--method best"),
        (["--parts", "7", "--split", "masks:9"], "masks:9"),
        (["--parts", "7", "--slack", "-1"], "--slack -1"),
        (["--parts", "7", "--passes", "0", "--method", "ldg"], "--passes 0"),
    ],
)
def test_mistakes_are_told_in_one_line(
    graph: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    assert run("partition", graph, *flags) == 2
    err = capsys.readouterr().err
    assert said in err
    assert len(err.strip().splitlines()) == 1
    assert 7 not in GraphStore.open(graph).partitions


def test_a_taken_target_is_told_before_the_work(
    graph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("dngd.sampling.partitioning.run_ldg", None)
    assert run("partition", graph, "--parts", "6", "--reorder", "--out", tmp_path, "--overwrite") == 2
    assert "holds other files too" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["g", "g/.", "h/../g", "link/g"])
def test_the_store_that_is_reordered_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """By whatever name --out calls it: what is written is a copy."""
    monkeypatch.chdir(tmp_path)
    small_store(Path("g"))
    Path("h").mkdir()
    Path("link").symlink_to(tmp_path)
    before = {path.name: path.read_bytes() for path in Path("g").iterdir()}
    for store, out in (("g", name), (name, "g")):
        assert run("partition", store, "--parts", 2, *LDG, "--reorder", "--out", out, "--overwrite") == 2
        said = capsys.readouterr().err
        assert f"--out {Path(out)} is the store that is read; give another path" in said
        assert {path.name: path.read_bytes() for path in Path("g").iterdir()} == before
