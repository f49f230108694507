"""Ranks that set up alone, for longer than a collective may last, on real processes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from dngd.graph import GraphStore
from tests.helpers.ranks import run_ranks
from tests.multiprocess.together import LIMIT_SECONDS

CASES: dict[str, dict[str, Any]] = {
    "slow": {"sleep": 1.5 * LIMIT_SECONDS},
    "user": {"sleep": 0.2, "error": "user"},
    "other": {"sleep": 0.2, "error": "other"},
    "late": {"sleep": 2.0, "limit": 1.0},
    "mutant": {"sleep": 1.5 * LIMIT_SECONDS, "mutant": True},
}


@pytest.fixture(scope="module")
def met() -> dict[str, list[dict[str, Any]]]:
    """What ranks 0 and 1 got in each case."""
    return dict(zip(CASES, run_ranks("tests.multiprocess.together:meet", 2, list(CASES.values()))))


def test_a_rank_that_takes_longer_than_a_collective_may(met: dict[str, list[dict[str, Any]]]) -> None:
    assert [item["result"] for item in met["slow"]] == ["graph of rank 0", "graph of rank 1"]
    assert all(item["seconds"] > LIMIT_SECONDS for item in met["slow"]), "nobody goes on alone"


def test_one_ranks_failure_is_every_ranks(met: dict[str, list[dict[str, Any]]]) -> None:
    assert [item["error"] for item in met["user"]] == ["UserError: no such graph; give another"] * 2
    assert [item["error"] for item in met["other"]] == [
        "TrainingError: rank 1: no such graph; give another",
        "ValueError: no such graph; give another",
    ]


def test_the_wait_has_a_limit(met: dict[str, list[dict[str, Any]]]) -> None:
    for item in met["late"]:
        assert item["error"].startswith("UserError: 1 of 2 workers have the graph; rank 1 is copying: 25 % after 1 s; ")
        assert "stage_timeout_seconds" in item["error"]


def test_mutant_that_waits_in_one_collective_is_caught(met: dict[str, list[dict[str, Any]]]) -> None:
    assert met["mutant"][0]["error"].startswith("TrainingError: rank 0 of 2: all-reduce of state failed")


def test_ranks_that_read_different_graphs_end_together(store: GraphStore, tmp_path: Path) -> None:
    """Of one name and shape; the same graph may lie at another path."""
    one, copy, other = (tmp_path / name / "graph" for name in ("one", "copy", "other"))
    for path in (one, copy):
        shutil.copytree(store.path, path)
    changed = {"indptr": store.indptr, "indices": store.indices, "features": store.features * 2}
    other.parent.mkdir()
    GraphStore.write(other, **changed, labels=store.labels, masks=store.split_masks)
    (tmp_path / "run").mkdir()
    config = {"dataset": "graph", "engine": "local", "num_layers": 2, "fanout": [4, 4], "hidden": 8, "batch_size": 60}
    config |= {"num_shards": 2, "num_samplers": 0, "run_dir": str(tmp_path / "run")}
    worlds = [{"roots": [str(one.parent), str(path.parent)], "config": config} for path in (other, copy)]
    different, same = run_ranks("tests.multiprocess.together:set_up", 2, worlds)
    host = os.uname().nodename
    said = (
        f"UserError: the workers read different graphs: rank 1 ({other} on {host}) and rank 0 ({one} on {host}) have "
        "files of other content; put the same files on every node, whose own $DNGD_DATA_ROOT comes before the driver's"
    )
    assert different == [said] * 2
    assert same == ["set up"] * 2
