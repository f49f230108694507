"""The examples of dngd.Trainer run, small, and do what they say."""

from __future__ import annotations

import io
import os
import re
import runpy
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import dngd
from dngd import cli
from dngd.graph import GraphStore, like_config, write_like
from tests.helpers.job_server import job_server
from tests.helpers.ray_cluster import Cluster

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.usefixtures("one_thread")


def run(example: str, monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [example, *arguments])
    runpy.run_path(str(EXAMPLES / example), run_name="__main__")


def by_age(folders: Iterable[Path]) -> list[Path]:
    """Return folders in the order in which files were last added to them."""
    return sorted(folders, key=lambda folder: folder.stat().st_mtime_ns)


def test_own_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("own_parquet.py", monkeypatch, tmp_path, "--epochs", "1")
    run("own_parquet.py", monkeypatch, tmp_path, "--epochs", "4")  # on the tables that are there now
    said = capsys.readouterr().out.rpartition("macro-F1")
    said = said[1] + said[2]
    found = re.search(r"macro-F1 of nodes held out: ([\d.]+)", said)
    assert found is not None
    assert float(found[1]) > 0.8
    _, second = by_age((tmp_path / "own-data").glob("run-*"))
    predictions = pq.read_table(second / "predictions.parquet").to_pydict()
    people = pq.read_table(tmp_path / "own-data/nodes.parquet").to_pydict()
    unknown = {id_ for id_, label in zip(people["id"], people["label"]) if label is None}
    assert set(predictions["node_id"]) == unknown
    assert set(predictions["class_name"]) == {"chess", "rowing", "theatre"}


def test_custom_model(
    store: GraphStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.helpers.graphs import small_store

    graph = small_store(tmp_path / "graph", nodes=2000, edges=20000)
    run("custom_model.py", monkeypatch, tmp_path, "--dataset", str(graph.path), "--epochs", "4")
    said = capsys.readouterr().out
    accuracy = re.search(r"test accuracy ([\d.]+)", said)
    assert accuracy is not None
    assert float(accuracy[1]) > 0.5, "of five classes"
    assert said.count("attention") == 4


def test_whole_pyg_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.helpers.graphs import small_store

    graph = small_store(tmp_path / "graph", nodes=2000, edges=20000)
    run("whole_pyg_model.py", monkeypatch, tmp_path, "--dataset", str(graph.path), "--epochs", "8")
    said = capsys.readouterr().out
    accuracy = re.search(r"test accuracy ([\d.]+)", said)
    assert accuracy is not None
    assert float(accuracy[1]) > 0.5, "of five classes"
    assert "GraphSAGE on another graph: [3, 5]" in said


@pytest.mark.parametrize(("flags", "least"), [([], 0.5), (["--adam"], 0.2)])
def test_neighbor_loader(
    flags: list[str],
    least: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from tests.helpers.graphs import small_store

    graph = small_store(tmp_path / "graph", nodes=2000, edges=20000)
    sizes = ["--dataset", str(graph.path), "--epochs", "4", "--batch-size", "256"]
    run("neighbor_loader.py", monkeypatch, tmp_path, *sizes, *flags)
    said = re.findall(r"val accuracy ([\d.]+)", capsys.readouterr().out)
    assert len(said) == 4
    assert float(said[-1]) > least, "of five classes"


def test_cora_like_the_paper(
    store: GraphStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the tests' graph; the real one is the user's."""
    flags = ["--dataset", str(store.path), "--split", "masks", "--seeds", "2", "--epochs", "30"]
    run("cora_like_the_paper.py", monkeypatch, tmp_path, *flags)
    run("cora_like_the_paper.py", monkeypatch, tmp_path, *flags[:-4], "--seeds", "1", "--epochs", "1")
    said = capsys.readouterr().out
    found = re.search(r"test accuracy: ([\d.]+) ± [\d.]+ over 2 seeds; the paper: 82.84 ± 0.87", said)
    assert found is not None, said
    assert float(found[1]) > 60, "of five classes"
    assert said.count("validation") == 3, "of the second run too"
    first, _ = by_age((tmp_path / "runs/cora-like-the-paper").iterdir())
    kept = dngd.TrainConfig.from_yaml(first / "seed-1/config.yaml")
    assert (kept.optimizer, kept.constant_full_batch, kept.hidden, kept.num_layers) == ("kfac", True, 16, 2)


def test_products_on_a_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file's own commands: planned and trained on a generated graph of that kind, and sent to a job server."""
    name = "products_on_a_cluster.yaml"
    commands = [
        shlex.split(line.removeprefix("#"))[1:]
        for line in (EXAMPLES / name).read_text().splitlines()
        if line.startswith("#   dngd ")
    ]
    assert [command[0] for command in commands] == ["data", "train", "submit"]
    small = write_like(tmp_path / "small", like_config("ogbn-products", scale=0.001), name="small")
    here = ["--dataset", str(small.path), "--engine", "local", "--run-dir", str(tmp_path / "run")]
    monkeypatch.chdir(EXAMPLES.parent)

    def dngd_command(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            cli.main(list(arguments))
        said = capsys.readouterr()
        assert not ended.value.code, said.err
        return said.out

    assert "seeds a step" in dngd_command(*commands[1], *here, "--batch-size", "20")
    scaled = ["--batch-size", "20", "--hidden", "16", "--max-steps", "3", "--quiet"]
    dngd_command(*(part for part in commands[1] if part != "--dry-run"), *here, *scaled)
    assert (tmp_path / "run" / "report.html").exists()

    for variable in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with job_server() as server:
        dngd_command(*(server.address if "HEAD" in part else part for part in commands[2]))
    [sent] = server.submitted
    assert sent["entrypoint"].endswith(f"train --config {name}")
    [package] = server.packages.values()
    assert name in zipfile.ZipFile(io.BytesIO(package)).namelist()


@pytest.mark.slow
def test_tune(store: GraphStore, tmp_path: Path, cluster: Cluster) -> None:
    command = [sys.executable, str(EXAMPLES / "tune.py"), "--dataset", str(store.path), "--batch-size", "100"]
    done = subprocess.run(
        [*command, "--trials", "3", "--epochs", "3", "--storage", str(tmp_path)],
        env=cluster.environment | {"RAY_ADDRESS": cluster.gcs_address, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    assert "3 trials" in done.stdout
    best = re.search(r"best: val ([\d.]+), test there ([\d.]+), \{'lr'", done.stdout)
    assert best is not None, done.stdout
    assert len(list(tmp_path.glob("dngd-tune/*/run/model.safetensors"))) == 3
