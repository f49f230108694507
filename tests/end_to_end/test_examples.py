"""The examples of dngd.Trainer run, small, and do what they say."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from dngd.graph import GraphStore
from tests.helpers.ray_cluster import Cluster

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.usefixtures("one_thread")


def run(example: str, monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [example, *arguments])
    runpy.run_path(str(EXAMPLES / example), run_name="__main__")


def test_own_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("own_parquet.py", monkeypatch, tmp_path, "--epochs", "4")
    said = capsys.readouterr().out
    found = re.search(r"macro-F1 of nodes held out: ([\d.]+)", said)
    assert found is not None
    assert float(found[1]) > 0.8
    predictions = pq.read_table(tmp_path / "own-data/predictions.parquet").to_pydict()
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
