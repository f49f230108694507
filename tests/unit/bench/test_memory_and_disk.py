"""Memory of workers, the page cache, and training within a limit: what is read from the system, and a real worker."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from dngd.bench import cgroup, disk, memory
from dngd.bench.child import HungUpError, receive
from dngd.bench.disk import measure_disk, reads_a_step
from dngd.bench.memory import pss_of
from dngd.bench.opening import cached_bytes, cached_share, drop_cached
from dngd.bench.progress import BenchProgress
from dngd.bench.worker import Worker
from dngd.config import TrainConfig
from dngd.errors import TrainingError, UserError
from dngd.graph import GraphStore

SMAPS = """\
5613e070f000-5613e0711000 r--p 00000000 fe:00 260850                     /data/my store/features.arrow
Size:                  8 kB
Pss:                   4 kB
Pss_Anon:              1 kB
7f0000000000-7f0000002000 rw-s 00000000 00:01 77                         /memfd:dngd-slot-0 (deleted)
Pss:                 100 kB
VmFlags: rd wr mr
7f0000003000-7f0000004000 rw-p 00000000 00:00 0                          [heap]
Pss:                  30 kB
7f0000005000-7f0000006000 rw-p 00000000 00:00 0
Pss:                   7 kB
7f0000007000-7f0000008000 r-xp 00000000 fe:00 9                          /usr/lib/libx.so
Pss:                   2 kB
"""


def test_memory_maps_are_divided_by_what_they_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda path, **_: SMAPS)
    found = pss_of([1, 2], Path("/data/my store"))
    kib = {"graph": 4, "batch_slots": 100, "anonymous": 37, "other_files": 2, "total": 143}
    assert found == {part: 2 * 1024 * size for part, size in kib.items()}


def test_a_store_that_is_read_counts_as_graph(store: GraphStore, tmp_path: Path) -> None:
    copy = shutil.copytree(store.path, tmp_path / "copy")
    assert pss_of([os.getpid()], copy)["graph"] == 0
    mine = GraphStore.open(copy)
    float(mine.features.sum())
    assert pss_of([os.getpid()], copy)["graph"] >= mine.features.numel() * 4


def test_a_process_that_is_gone_is_told(store: GraphStore) -> None:
    with pytest.raises(TrainingError, match="cannot be read"):
        pss_of([2**22 + 1], store.path)


def test_what_a_worker_adds_is_divided_without_a_rest() -> None:
    parts = ("graph", "batch_slots", "anonymous", "other_files", "total")

    def count(*sizes: int) -> dict[str, int]:
        return dict(zip(parts, (*sizes, sum(sizes)), strict=True))

    full = [count(100, 50, 300, 20), count(104, 100, 700, 25)]
    small = [count(10, 1, 200, 20), count(18, 2, 330, 24)]
    worker = {"bytes": {"model": 3, "gradients": 3, "optimizer": 6}}
    (added,) = memory._added(full, small, [worker, worker])
    assert {part: added[part] for part in parts} == count(4, 50, 400, 5)
    assert added["model_gradients_and_optimizer"] == 12
    # Without its batches: 8 of the graph, and 1 + 130 + 4 of its own, the model among it.
    assert added["beyond_model_and_buffers"] == 8 + 135 - 12
    assert added["batch_buffers"] == 459 - 12 - 131


def test_what_a_sampler_adds_is_what_further_ones_add_each() -> None:
    """The first one's also brings the process that it is a copy of."""
    few = {"samplers": 1, **dict.fromkeys(memory.PARTS, 100), "total": 400}
    more = {"samplers": 4, "graph": 100, "batch_slots": 160, "anonymous": 130, "other_files": 97, "total": 487}
    assert memory._added_by_a_sampler([few, more]) == {
        "graph": 0, "batch_slots": 20, "anonymous": 10, "other_files": -1, "total": 29
    }  # fmt: skip


def test_the_whole_graph_is_mapped_before_workers_are_counted(store: GraphStore, tmp_path: Path) -> None:
    # Of the tests' common store, samplers of an earlier test may hold a share of the pages still.
    copy = shutil.copytree(store.path, tmp_path / "copy")
    kept = memory._map_whole(copy)
    size = sum(array.numel() * array.element_size() for array in kept)
    assert size > 10 * mmap.PAGESIZE
    # The system counts in kilobytes, of a page that two mappings share half in each.
    assert pss_of([os.getpid()], copy)["graph"] >= size // mmap.PAGESIZE * mmap.PAGESIZE


@pytest.mark.usefixtures("one_thread")  # which also puts back what the worker sets
def test_a_worker_holds_in_its_last_step_and_reports(store: GraphStore, tmp_path: Path) -> None:
    config = TrainConfig(
        dataset=str(store.path),
        **{"model": "sage", "num_layers": 2, "hidden": 8, "fanout": (3, 3), "batch_size": 50, "num_samplers": 0},
        **{"optimizer": "adam", "engine": "local", "run_dir": tmp_path, "max_steps": 3},
    )
    here, there = socket.socketpair()
    worker = Worker({"config": config.model_dump(mode="json"), "threads": 1}, there)
    ended: list[BaseException] = []

    def train() -> None:
        try:
            worker.answer({})
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    with here, there:
        report = receive(here)
        assert thread.is_alive()
        here.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert isinstance(ended[0], HungUpError)
    parameters = (2 * 16 * 8 + 8 + 2 * 8 * 5 + 5) * 4
    assert report["bytes"] == {"model": parameters, "gradients": parameters, "optimizer": 2 * parameters + 4 * 4}
    assert len(report["step_seconds"]) == 3
    assert report["reads"][-1]["step"] == 3
    assert 3 * 50 * 0.1 < float.fromhex(report["loss_sum"]) < 3 * 50 * 5
    digest = report["weights_sha256"]
    with torch.no_grad():
        next(worker._loop.model.parameters())[0, 0] += 1
    assert worker._report()["weights_sha256"] != digest
    assert not list(tmp_path.glob("*.json*")), "it ends before it evaluates"


def test_the_page_cache_is_told_and_dropped(store: GraphStore, tmp_path: Path) -> None:
    file = tmp_path / "folder" / "file"
    file.parent.mkdir()
    file.write_bytes(os.urandom(1 << 20))
    (file.parent / "empty").touch()
    assert cached_bytes(file) == 1 << 20
    assert cached_share(file.parent) == 1
    drop_cached(file.parent)
    if cached_bytes(file) == 1 << 20:
        pytest.skip("this file system keeps all pages")
    assert cached_share(file.parent) < 0.5


def test_reads_are_counted_behind_the_warm_up() -> None:
    reads = [{"step": s, "major_faults": 100 * s, "read_bytes": 7 * s * s} for s in (1, 2, 4, 8)]
    assert reads_a_step(reads, warmup=2) == {"major_faults_a_step": 100, "read_bytes_a_step": 70}
    assert reads_a_step(reads, warmup=8) == {"major_faults_a_step": None, "read_bytes_a_step": None}
    assert reads_a_step([], warmup=0) == {"major_faults_a_step": None, "read_bytes_a_step": None}


def run(losses: str, seconds: float) -> dict[str, Any]:
    return {
        "median_seconds": seconds,
        "peak_bytes": 10**9,
        "feature_bytes_cached": 4 * 10**8,
        "loss_sum": losses,
        "weights_sha256": "w",
    }


@pytest.mark.parametrize(("losses", "same"), [("0x1p+1", True), ("0x1.1p+1", False)])
def test_the_limit_is_half_of_the_table_beyond_the_needs(
    store: GraphStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, losses: str, same: bool
) -> None:
    limits: list[tuple[int | None, str]] = []

    def fake(config: TrainConfig, copy: Path, limit: int | None, *_: Any) -> dict[str, Any]:
        assert GraphStore.open(config.dataset).digest == store.digest
        assert copy != store.path
        limits.append((limit, config.feature_placement))
        if limit is None:
            return run("0x1p+1", 0.5)
        return run(losses if config.feature_placement == "auto" else "0x1p+1", 2.0)

    monkeypatch.setattr(disk, "_run", fake)
    config = TrainConfig(dataset=str(store.path), engine="local")
    found = measure_disk(config, store, tmp_path, 1, 2, 1, BenchProgress())
    table = (store.path / disk.FEATURES_FILE).stat().st_size
    assert limits == [(None, "auto"), (limit := 6 * 10**8 + table // 2 + disk.MARGIN_BYTES, "disk"), (limit, "auto")]
    assert (found["slowdown"], found["same_result"]) == ({"disk": 4.0, "auto": 4.0}, same)
    assert not list(tmp_path.iterdir())
    json.dumps(found)


def test_a_machine_without_limits_is_told(store: GraphStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "PROC", tmp_path / "none")
    config = TrainConfig(dataset=str(store.path), engine="local")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    found = measure_disk(config, store, scratch, 1, 2, 1, BenchProgress())
    assert found == {"not_allowed": "this system has no control groups (Linux has)"}
    assert not list(scratch.iterdir())


def test_a_copy_that_fails_is_told_and_removed(
    store: GraphStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half_a_copy(source: Path, copy: Path) -> None:
        copy.mkdir()
        (copy / "half").touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk.shutil, "copytree", half_a_copy)
    config = TrainConfig(dataset=str(store.path), engine="local")
    with pytest.raises(TrainingError, match="cannot be copied"):
        measure_disk(config, store, tmp_path, 1, 2, 1, BenchProgress())
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told_before_the_copy(
    store: GraphStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: _Usage())
    config = TrainConfig(dataset=str(store.path), engine="local")
    with pytest.raises(UserError, match="the row disk copies the store"):
        measure_disk(config, store, tmp_path, 1, 2, 1, BenchProgress())
    assert not list(tmp_path.iterdir())


class _Usage:
    free = 1000


@pytest.mark.slow
def test_training_within_a_limit(store: GraphStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both runs as processes in groups of their own; the small table leaves nothing to be slow about."""
    # Half of a table of kilobytes leaves no room between what a run took and what it asks for, rounded up.
    monkeypatch.setattr(disk, "MARGIN_BYTES", 128 << 20)
    config = TrainConfig(
        dataset=str(store.path),
        **{"model": "sage", "num_layers": 2, "hidden": 8, "fanout": (3, 3), "batch_size": 50, "optimizer": "adam"},
        engine="local",
    )
    found = measure_disk(config, store, tmp_path, 1, 4, 1, BenchProgress())
    if "not_allowed" in found:
        pytest.skip(found["not_allowed"])
    assert found["same_result"]
    assert all(run["peak_bytes"] <= found["limit_bytes"] for run in found["limited"].values())
