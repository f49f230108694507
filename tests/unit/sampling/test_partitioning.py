"""METIS and LDG behind one function: which is taken, what is promised of either, what happens when METIS fails."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from dngd.errors import UserError
from dngd.graph import GraphStore, Partition, PartitionInfo, write_partition
from dngd.graph.partition import PartitionTask
from dngd.sampling import metis, parse_order, partition_nodes, partitioning, reorder_by


def ring(path: Path, num_nodes: int = 600, *, directed: bool = False) -> GraphStore:
    """Each node joined to its 8 nearest on a ring, numbered at random: the best cut is plain to see."""
    number = np.random.default_rng(0).permutation(num_nodes)
    one = np.repeat(np.arange(num_nodes), 4)
    other = (one + np.tile(np.arange(1, 5), num_nodes)) % num_nodes
    edges = np.stack([number[one], number[other]])
    train = np.zeros(num_nodes, dtype=np.bool_)
    train[number[: num_nodes // 6]] = True  # one arc of the ring
    return GraphStore.write(
        path,
        edge_index=edges,
        features=np.ones((num_nodes, 2)),
        labels=np.zeros(num_nodes),
        add_reverse=not directed,
        masks={"train": train},
    )


def fake_metis(edge_cut: float) -> Any:
    def run(task: PartitionTask, progress: Any = None) -> Partition:
        info = PartitionInfo(method="metis", edge_cut=edge_cut, nodes=[task.store.num_nodes], train_nodes=None)
        return Partition(torch.zeros(task.store.num_nodes, dtype=torch.int32), info)

    return run


def test_metis_finds_the_arcs_and_keeps_the_limits(tmp_path: Path) -> None:
    store = ring(tmp_path / "g")
    train = store.split_masks["train"].nonzero()[:, 0]
    seen: list[str] = []
    made = partition_nodes(
        store, 4, method="metis", balance=train, slack=0.0, progress=lambda stage, done, total: seen.append(stage)
    )
    assert made.info.method == "metis"
    assert made.assignment.dtype == torch.int32
    # Exactly even, which METIS alone does not give; cuts beside the arc of training nodes split that into four.
    assert made.info.nodes == [150] * 4
    assert made.info.train_nodes == [25] * 4
    assert made.info.edge_cut < 0.15
    assert set(seen) == {"METIS"}


@pytest.mark.parametrize("directed", [False, True])
def test_metis_takes_directed_graphs_and_no_training_nodes(tmp_path: Path, directed: bool) -> None:
    store = ring(tmp_path / "g", directed=directed)
    assert store.manifest.directed is directed
    train, result = tmp_path / "train.npy", tmp_path / "part.npy"
    np.save(train, np.zeros(600, dtype=np.bool_))
    asked = {"store": str(store.path), "digest": store.digest, "parts": 4, "train": str(train)}
    metis._child({**asked, "result": str(result), "directed": directed})
    part = torch.from_numpy(np.load(result))
    assert part.bincount(minlength=4).max() <= 1.04 * 150
    destination = torch.repeat_interleave(torch.arange(600), store.in_degrees())
    assert (part[store.indices] != part[destination]).double().mean() < 0.1


def test_metis_ends_with_its_parent() -> None:
    """Also where the parent has no time to end it."""
    child = "import os, time; from dngd.sampling.metis import _end_with; _end_with(os.getppid()); "
    child += "print(os.getpid(), flush=True); time.sleep(300)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None
        below = psutil.Process(int(started.stdout.readline()))
        started.kill()
        assert psutil.wait_procs([below], timeout=30)[1] == []


def test_auto_keeps_what_cuts_less_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ring(tmp_path / "g")
    streamed = partition_nodes(store, 4, method="ldg")
    for cut, method in ((0.0, "metis"), (1.0, "ldg")):
        monkeypatch.setattr(partitioning, "run_metis", fake_metis(cut))
        made = partition_nodes(store, 4)
        assert made.info.method == method
        assert f"METIS cuts {cut:.2%} of the edges, LDG {streamed.info.edge_cut:.2%}" in made.reason
    assert torch.equal(made.assignment, streamed.assignment)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("directed", "directed"),
        ("one part", "one part"),
        ("many parts", "8 nodes a part: there are 600 for 100"),
        ("no memory", r"about 0\.\d GiB of memory and 0\.0 GiB are free"),
        ("many edges", "4,800 edges"),
        ("metis dies", "METIS exited with code 1"),
    ],
)
def test_auto_streams_where_metis_does_not_suit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, reason: str
) -> None:
    store = ring(tmp_path / "g", directed=case == "directed")
    parts = {"one part": 1, "many parts": 100}.get(case, 4)
    if case == "no memory":
        monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    elif case == "many edges":
        monkeypatch.setattr(partitioning, "_MAX_AUTO_EDGES", 4799)
    elif case == "metis dies":
        monkeypatch.setattr(metis.sys, "executable", "/bin/false")
    else:
        monkeypatch.setattr(partitioning, "run_metis", None)  # not asked
    made = partition_nodes(store, parts)
    assert made.info.method == "ldg"
    assert re.search(reason, made.reason), made.reason


@pytest.mark.parametrize("code", ["kill -9 $$", "echo no luck; exit 3"])
def test_a_metis_that_dies_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{code}\n")
    program.chmod(0o755)
    monkeypatch.setattr(metis.sys, "executable", str(program))
    with pytest.raises(UserError, match="memory ran out" if "kill" in code else r"code 3; use --method ldg.*no luck"):
        partition_nodes(ring(tmp_path / "g"), 4, method="metis")


def test_an_interrupt_ends_metis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nexec sleep 100\n")
    program.chmod(0o755)
    monkeypatch.setattr(metis.sys, "executable", str(program))
    started: list[subprocess.Popen[bytes]] = []
    real_wait = subprocess.Popen.wait

    def interrupted(self: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        started.append(self)
        if len(started) == 1:
            raise KeyboardInterrupt
        return real_wait(self, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        partition_nodes(ring(tmp_path / "g"), 4, method="metis")
    assert started[0].returncode is not None
    assert not os.path.exists(f"/proc/{started[0].pid}")


def test_bad_requests_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ring(tmp_path / "g")
    with pytest.raises(UserError, match="method='best' is not known; give one of auto, metis, ldg"):
        partition_nodes(store, 4, method="best")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"METIS needs edges.*--method ldg"):
        partition_nodes(store, 100, method="metis")
    for text in ("partition", "partition:0", "partition:x", "Degree", ""):
        with pytest.raises(UserError, match="original, degree or partition:PARTS"):
            parse_order(text)


def test_reordering_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partitioning, "run_metis", fake_metis(1.0))
    store = ring(tmp_path / "g")
    same = reorder_by(store, "original", tmp_path / "same")
    assert same.digest == store.digest
    assert same.node_ids is None
    by_degree = reorder_by(store, "degree", tmp_path / "degree")
    assert by_degree.manifest.provenance.options["order"] == "degree"
    moved = reorder_by(store, "partition:4", tmp_path / "parts", name="other")
    assert moved.name == "other"
    part = moved.partition(4)
    assert (part.diff() >= 0).all()
    # Balanced by the masks' training nodes.
    assert moved.partitions[4].train_nodes == part[moved.split_masks["train"]].bincount().tolist()
    assert moved.partitions[4].train_nodes is not None
    assert max(moved.partitions[4].train_nodes) <= 26


def test_a_partition_that_is_there_is_taken(tmp_path: Path) -> None:
    store = ring(tmp_path / "g")
    halves = torch.arange(600).fmod(2).int()
    info = PartitionInfo(method="given", edge_cut=0.5, nodes=[300, 300], train_nodes=None)
    store = write_partition(store, Partition(halves, info))
    moved = reorder_by(store, "partition:2", tmp_path / "moved")
    assert moved.partitions[2] == info
    assert json.loads((moved.path / "manifest.json").read_text())["partitions"]["2"]["method"] == "given"
    assert (moved.node_ids[:300] % 2 == 0).all()
