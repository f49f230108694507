"""Training with the features on disk: the memory of a training process limited to half of the table beyond its needs.

Runs of the same steps, each on a private copy of the store that no page of is cached at its start, each in a control
group that its page cache is charged to: one without a limit, which tells what the process needs, then two with one,
with `feature_placement` disk, as is advised there, and with the plain memory map.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dngd.bench.cgroup import NotAllowedError, memory_group, remove_leftovers
from dngd.bench.children import Child
from dngd.bench.opening import cached_bytes, drop_cached
from dngd.bench.progress import BenchProgress
from dngd.config import TrainConfig
from dngd.errors import TrainingError, UserError
from dngd.graph import GraphStore

FEATURES_FILE = "features.arrow"
PLACEMENTS = ("disk", "auto")
COPY_NAME = "bench-disk"
MARGIN_BYTES = 32 << 20
"""On top of the limit: two runs' own needs differ by that much."""


def measure_disk(
    config: TrainConfig,
    store: GraphStore,
    scratch: Path,
    warmup: int,
    steps: int,
    threads: int,
    progress: BenchProgress,
) -> dict[str, Any]:
    """Return all runs and their ratios; {"not_allowed": why} on a machine that gives no such limit.

    same_result: whether the sum of all losses and all weights at the end are equal bit for bit.
    scratch: where the copy of the store is made and removed. Raises UserError where it does not fit there.
    """
    try:
        with _copy(store, scratch) as copy:
            own = config.model_copy(update={"dataset": str(copy)})
            in_ram = _run(own, copy, None, warmup, steps, threads)
            progress.advance(1, "features in memory")
            table = (copy / FEATURES_FILE).stat().st_size
            # What the process had beside the features' pages: heaps, libraries, the topology.
            needs = in_ram["peak_bytes"] - in_ram["feature_bytes_cached"]
            limit = needs + table // 2 + MARGIN_BYTES
            limited = {}
            for placement in PLACEMENTS:
                placed = own.model_copy(update={"feature_placement": placement})
                limited[placement] = _run(placed, copy, limit, warmup, steps, threads)
                progress.advance(1, f"features on disk, {placement}")
    except NotAllowedError as error:
        progress.advance(1 + len(PLACEMENTS), "features on disk: not allowed here")
        return {"not_allowed": str(error)}
    return {
        "feature_bytes": table,
        "own_needs_bytes": needs,
        "limit_bytes": limit,
        "warmup": warmup,
        "steps": steps,
        "in_memory": in_ram,
        "limited": limited,
        "slowdown": {name: run["median_seconds"] / in_ram["median_seconds"] for name, run in limited.items()},
        "same_result": all(
            run[key] == in_ram[key] for run in limited.values() for key in ("loss_sum", "weights_sha256")
        ),
    }


def _run(config: TrainConfig, copy: Path, limit: int | None, warmup: int, steps: int, threads: int) -> dict[str, Any]:
    """Train warmup + steps steps in a group; limit: its bytes, None for no limit."""
    with tempfile.TemporaryDirectory(prefix="dngd-bench-") as run_dir, memory_group("dngd-bench") as group:
        if limit is not None:
            group.limit(limit)
        drop_cached(copy)
        own = config.model_copy(update={"run_dir": Path(run_dir), "max_steps": warmup + steps}).model_dump(mode="json")
        setup = {"part": "worker", "config": own, "threads": threads}
        child = Child("the training process", setup, join=group.processes)
        try:
            child.wait_until_ready()
            report = child.ask({})
            # While it holds: a process's private pages and those of its samplers count too.
            cached = cached_bytes(copy / FEATURES_FILE)
        finally:
            child.close()
        return {
            "median_seconds": statistics.median(report["step_seconds"][warmup:]),
            "peak_bytes": group.peak_bytes(),
            "feature_bytes_cached": cached,
            **reads_a_step(report["reads"], warmup),
            **{key: report[key] for key in ("step_seconds", "loss_sum", "weights_sha256")},
        }


def reads_a_step(reads: Sequence[Mapping[str, int]], warmup: int) -> dict[str, float | None]:
    """Return major faults and bytes read a step, of the steps behind the warm-up that were reported.

    None where fewer than two were: the loop reports a few times a second.
    """
    reported = [read for read in reads if read["step"] >= warmup]
    count = reported[-1]["step"] - reported[0]["step"] if reported else 0
    return {
        f"{key}_a_step": (reported[-1][key] - reported[0][key]) / count if count else None
        for key in ("major_faults", "read_bytes")
    }


@contextlib.contextmanager
def _copy(store: GraphStore, scratch: Path) -> Iterator[Path]:
    free = shutil.disk_usage(scratch).free
    if free < store.nbytes * 1.1:
        raise UserError(
            f"the row disk copies the store, {store.nbytes / 2**30:.1f} GiB, to {scratch}, where "
            f"{free / 2**30:.1f} GiB are free; free some, or give another --cache-dir"
        )
    remove_leftovers(scratch, COPY_NAME, shutil.rmtree)
    copy = scratch / f"{COPY_NAME}-{os.getpid()}"
    try:
        try:
            shutil.copytree(store.path, copy)
        except OSError as error:
            raise TrainingError(f"the store cannot be copied to {copy}: {error}") from error
        yield copy
    finally:
        shutil.rmtree(copy, ignore_errors=True)
