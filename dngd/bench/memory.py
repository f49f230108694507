"""What one more worker on the same machine adds to memory: proportional set sizes (PSS) of real training processes.

PSS shares a page among the processes that map it, so that the sum over processes is what they take together, and the
difference between n + 1 and n workers is what one more adds. Each worker runs dngd's training loop on the same store,
with its own seeds and samplers, and is measured in its last step, its pipeline full.

The benchmark itself maps every page of the store first, as a machine that has trained for a while has: otherwise a
worker's few steps would be charged with pages of the one shared copy that they happened to be the first to read.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from dngd.bench.children import Child
from dngd.bench.progress import BenchProgress
from dngd.config import TrainConfig
from dngd.errors import TrainingError
from dngd.graph import GraphStore

PARTS = ("graph", "batch_slots", "anonymous", "other_files")
"""graph: pages of the store's files. batch_slots: memory in which sampler processes hand batches over. anonymous:
heaps, tensors, interpreters. other_files: libraries."""

SAMPLERS = (1, 4)
"""Sampler processes of the workers that tell what a sampler takes."""

SMALL_BATCH = 8
"""Seeds of a batch whose buffers are next to nothing."""

_SLOT_NAMES = ("/memfd:dngd-slot",)


def measure_memory(
    config: TrainConfig, store: Path, num_workers: int, steps: int, threads: int, progress: BenchProgress
) -> dict[str, Any]:
    """Return the memory of 1 to num_workers workers, all there at once, and what each one added.

    Batch buffers are what workers with their batches take more than workers with next to none: heaps keep freed
    memory, so that no count of tensors tells. What a sampler adds is told by one worker with few and with more of them,
    with the config's batches; the first brings the process that all of a worker's are copies of, too. progress:
    advanced 2 num_workers times, and once for each of SAMPLERS.
    """
    mapped = _map_whole(store)
    counts, workers = _start_workers(config, store, num_workers, steps, threads, progress)
    small = config.model_copy(update={"batch_size": SMALL_BATCH})
    small_counts, _ = _start_workers(small, store, num_workers, steps, threads, progress)
    samplers = [
        {"samplers": number, **_start_workers(own, store, 1, steps, threads, progress)[0][0]}
        for number in SAMPLERS
        for own in [config.model_copy(update={"num_samplers": number})]
    ]
    del mapped
    return {
        "steps": steps,
        "small_batch_size": SMALL_BATCH,
        "counts": counts,
        "counts_with_small_batches": small_counts,
        "workers": workers,
        "added": _added(counts, small_counts, workers),
        "samplers": samplers,
        "added_by_a_sampler": _added_by_a_sampler(samplers),
    }


def _start_workers(
    config: TrainConfig, store: Path, num_workers: int, steps: int, threads: int, progress: BenchProgress
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Start workers one by one; return the memory with each further one, and what each says of itself."""
    counts: list[dict[str, Any]] = []
    workers: list[dict[str, Any]] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dngd-bench-")))
        children: list[Child] = []
        for number in range(num_workers):
            run_dir = folder / str(number)
            run_dir.mkdir()
            changes = {"dataset": str(store), "seed": config.seed + number, "run_dir": run_dir, "max_steps": steps}
            own = config.model_copy(update=changes).model_dump(mode="json")
            children.append(Child(f"worker {number}", {"part": "worker", "config": own, "threads": threads}))
            stack.callback(children[-1].close)
            children[-1].wait_until_ready()
            workers.append(children[-1].ask({}))
            pids = [process.pid for child in children for process in child.tree()]
            pss = pss_of(pids, store)
            # The benchmark's share of each page: what the workers together do not account for.
            pss["graph"] += pss_of([os.getpid()], store)["graph"]
            pss["total"] = sum(pss[part] for part in PARTS)
            counts.append({"workers": number + 1, "processes": len(pids), **pss})
            progress.advance(1, f"{number + 1} workers, batches of {config.batch_size}")
    return counts, workers


def _map_whole(store: Path) -> list[Tensor]:
    """Map a store and read a value of every page; return what keeps the pages mapped."""
    graph = GraphStore.open(store)
    arrays = [array for array in (graph.indptr, graph.indices, graph.edge_weight, graph.features) if array is not None]
    for array in arrays:
        values = array.view(-1)
        values[:: mmap.PAGESIZE // array.element_size()].sum()
        values[-1:].sum()  # an array need not begin where a page does
    return arrays


def _added(
    counts: Sequence[dict[str, Any]], small_counts: Sequence[dict[str, Any]], workers: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return what the second and each further worker added: in all, and beyond its model and its batch buffers."""
    added = []
    for place in range(1, len(counts)):
        full, small = (
            {part: of[place][part] - of[place - 1][part] for part in (*PARTS, "total")} for of in (counts, small_counts)
        )
        model = sum(workers[place]["bytes"].values())
        beyond = small["total"] - model
        added.append(
            {
                "workers": place + 1,
                **full,
                "model_gradients_and_optimizer": model,
                "batch_buffers": full["total"] - model - beyond,
                "beyond_model_and_buffers": beyond,
            }
        )
    return added


def _added_by_a_sampler(samplers: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return what each sampler beyond the first adds, in all and by part."""
    few, more = samplers
    number = more["samplers"] - few["samplers"]
    return {part: (more[part] - few[part]) / number for part in (*PARTS, "total")}


def pss_of(pids: Iterable[int], store: Path) -> dict[str, int]:
    """Return the bytes that these processes take together, by part and as "total". Raises TrainingError off Linux."""
    sums = dict.fromkeys(PARTS, 0)
    for pid in pids:
        try:
            text = Path(f"/proc/{pid}/smaps").read_text(errors="replace")
        except OSError as error:
            raise TrainingError(f"memory maps of process {pid} cannot be read: {error.strerror}") from None
        for name, size in _mappings(text):
            sums[_part(name, str(store))] += size
    return sums | {"total": sum(sums.values())}


def _mappings(text: str) -> Iterable[tuple[str, int]]:
    """Yield (name of the mapped file, PSS in bytes) of each mapping in a /proc/PID/smaps."""
    name = ""
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key == "Pss":
            yield name, int(value.split()[0]) * 1024
        elif "-" in line.split(maxsplit=1)[0]:
            columns = line.split(maxsplit=5)
            name = columns[5] if len(columns) == 6 else ""


def _part(name: str, store: str) -> str:
    if name.startswith(store):
        return "graph"
    if name.startswith(_SLOT_NAMES):
        return "batch_slots"
    return "other_files" if name.startswith("/") else "anonymous"
