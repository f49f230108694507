"""Who takes part in `dngd bench pipeline`'s turns, and what each does in its child process.

A contender draws mini-batches up to the input of the first matmul, or takes whole training steps: DGL's example, the
same with a kept gather buffer and a tuned allocator, or dngd. `processes` are those beside the training process:
DataLoader workers there, sampler processes here; threads of the training process are the same for all.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import psutil
import torch

from dngd.allocator import keep_freed_memory
from dngd.bench.child import Message
from dngd.bench.learner import Batch, Learner, initial_model
from dngd.bench.optimizers import base_rate
from dngd.config import TrainConfig
from dngd.graph import GraphStore
from dngd.models import Aggregation, SparseRows
from dngd.sampling import MiniBatch, SamplerPipeline
from dngd.sampling.pipeline import INLINE_AHEAD
from dngd.train.batch import PropagationBuilder
from dngd.train.placement import PlacedFeatures, with_sparse
from dngd.train.plan import batch_size_of

Work = Literal["input", "sampling", "training"]
"""What a contender's batch is: up to the first matmul's input, sampling alone, or a training step."""

AGGREGATION: dict[str, Aggregation] = {"sage": "mean", "gcn": "gcn"}

DATALOADER_PREFETCH = 2
"""Batches that a DataLoader's worker may be ahead: torch's default."""

KEEP_MEMORY = {
    # No buffer gets a mapping of its own, which is given back when it is freed, and the heap is never trimmed: glibc
    # refuses mmap thresholds above 32 MiB, and a batch's features are ten times that.
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(64 << 20),
}
"""glibc's allocator, tuned to give no memory back to the kernel; read by a process when it starts."""


@dataclass(frozen=True)
class Entry:
    """One contender. who: dgl, tuned (DGL's loop, tuned) or dngd. processes: beside the training one."""

    name: str
    who: Literal["dgl", "tuned", "dngd"]
    how: str
    work: Work
    processes: int
    environment: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def queue(self, prefetch: int) -> int:
        """Return how many batches may be ready before they are asked for. prefetch: of dngd's sampler processes."""
        if self.who == "dngd":
            return min(prefetch, INLINE_AHEAD) if self.processes == 0 else prefetch * self.processes
        return DATALOADER_PREFETCH * self.processes

    def setup(self, common: Message) -> Message:
        """Return the first message to its child. common: what all share, see Contender."""
        return {
            "part": "contender",
            **common,
            "who": self.who,
            "work": self.work,
            "processes": self.processes,
            **self.options,
        }


def dgl_entries(work: Work, processes: Sequence[int]) -> list[Entry]:
    """Return DGL's documented ways, and the tuned loop, with each number of DataLoader workers."""
    entries = []
    for number in processes:
        ways: list[tuple[str, str, dict[str, Any]]] = [
            ("prefetch", "prefetch_node_feats", {"gather": "prefetch"}),
            ("index", "x[input_nodes]", {"gather": "index"}),
        ]
        if _affinity_works(number):
            # On top of the first, which the example itself has.
            ways.append(("affinity", "the same, enable_cpu_affinity", {"gather": "prefetch", "affinity": True}))
        for name, how, options in ways:
            entries.append(Entry(f"dgl-{name}:{number}", "dgl", how, work, number, options=options))
        entries.append(
            Entry(
                f"dgl-tuned:{number}",
                "tuned",
                "kept buffer, tuned malloc",
                work,
                number,
                KEEP_MEMORY,
                {"gather": "kept"},
            )
        )
    return entries


def own_entries(work: Work, processes: Sequence[int], name: str = "dngd", **options: Any) -> list[Entry]:
    """Return dngd with each number of sampler processes; 0 is a thread of the training process."""
    return [Entry(f"{name}:{number}", "dngd", "as shipped", work, number, options=options) for number in processes]


def _affinity_works(workers: int) -> bool:
    """Whether DGL's enable_cpu_affinity can be used: with workers, more cores than those, and all cores ours."""
    cores = psutil.cpu_count(logical=False)
    if not workers or cores is None or cores <= workers or not hasattr(os, "sched_getaffinity"):
        return False
    return os.sched_getaffinity(0) == set(range(psutil.cpu_count() or 0))


class Loop(Protocol):
    """Takes batches one by one."""

    @property
    def seconds(self) -> dict[str, float]:
        """Of each phase, summed up; may be set to zeros."""

    @property
    def loss(self) -> float | None:
        """The last one's, where it trains."""

    def step(self) -> dict[str, int]:
        """Take one batch; return its sizes."""


class Contender:
    """A contender, in its process.

    setup: store (path), config (TrainConfig as JSON), threads, num_batches (that will be asked for at most), and the
    entry's who, work, processes, options; model: gcn or sage.
    """

    def __init__(self, setup: Message) -> None:
        torch.set_num_threads(setup["threads"])
        config = TrainConfig(**setup["config"])
        if setup["who"] == "dngd" and config.keep_memory:
            # As dngd's training loop does.
            keep_freed_memory()
        store = GraphStore.open(Path(setup["store"]))
        train_nodes = store.split(config.split, config.seed).train
        batch_size = batch_size_of(config, int(train_nodes.numel()))
        self._loop: Loop
        if setup["who"] == "dngd":
            if setup["work"] == "training":
                self._loop = OwnTraining(store, config, setup["processes"])
            else:
                self._loop = OwnInput(store, config, setup["processes"], rows=setup["work"] == "input")
            return
        from dngd.bench import dgl_example as dgl

        batches = dgl.DGLBatches(
            store,
            train_nodes,
            dgl.LoaderOptions(
                fanouts=config.fanouts,
                batch_size=batch_size,
                num_workers=setup["processes"],
                gather=setup["gather"],
                affinity=setup.get("affinity", False),
                threads=setup["threads"],
                seed=config.seed,
                num_batches=setup["num_batches"],
            ),
        )
        if setup["work"] == "training":
            widths = [store.num_features] + [config.hidden] * (config.num_layers - 1) + [store.num_classes]
            self._loop = dgl.TrainingLoop(batches, dgl.SAGE(widths, config.dropout))
        else:
            self._loop = dgl.InputLoop(batches, AGGREGATION[config.model])

    def answer(self, request: Message) -> Message:
        """Take `lead` batches off the clock and `batches` on it; return seconds and sizes."""
        for _ in range(request["lead"]):
            self._loop.step()
        self._loop.seconds.update(dict.fromkeys(self._loop.seconds, 0.0))
        sizes = []
        started = time.perf_counter()
        for _ in range(request["batches"]):
            sizes.append(self._loop.step())
        seconds = time.perf_counter() - started
        return {
            "seconds": seconds,
            "batches": len(sizes),
            "phase_seconds": dict(self._loop.seconds),
            **{key: sum(size[key] for size in sizes) for key in sizes[0]},
            **({} if self._loop.loss is None else {"loss": self._loop.loss}),
        }


class OwnInput:
    """dngd's input pipeline, to the input of the first matmul; rows: whether the first layer's are taken."""

    def __init__(self, store: GraphStore, config: TrainConfig, num_samplers: int, *, rows: bool) -> None:
        self.seconds = {"wait": 0.0}
        self.loss: float | None = None
        self._batches = whole_batches(store, config, num_samplers, AGGREGATION[config.model] if rows else None)

    def step(self) -> dict[str, int]:
        started = time.perf_counter()
        batch = next(self._batches)
        self.seconds["wait"] += time.perf_counter() - started
        return _sizes(batch)


class OwnTraining:
    """dngd's training step with Adam."""

    def __init__(self, store: GraphStore, config: TrainConfig, num_samplers: int) -> None:
        model = initial_model(config, store)
        builder = PropagationBuilder(store, model.aggregation, torch.device("cpu"))
        self._lr = base_rate("adam", config)
        self._learner = Learner("adam", config, self._lr, model, store.features, builder)
        sparse = with_sparse(PlacedFeatures("memory_map", store.features), config, store, model).sparse
        self._batches = whole_batches(store, config, num_samplers, model.aggregation, sparse)
        self.seconds = {"wait": 0.0, "train": 0.0}
        self.loss: float | None = None

    def step(self) -> dict[str, int]:
        started = time.perf_counter()
        batch = next(self._batches)
        drawn = time.perf_counter()
        sums = self._learner.step(Batch(batch, batch.coordinates), self._lr, alone=False)
        self.loss = sums.loss_sum / sums.num_seeds
        self.seconds["wait"] += drawn - started
        self.seconds["train"] += time.perf_counter() - drawn
        return _sizes(batch)


def whole_batches(
    store: GraphStore,
    config: TrainConfig,
    num_samplers: int,
    aggregation: Aggregation | None,
    sparse: SparseRows | None = None,
) -> Iterator[MiniBatch]:
    """Return dngd's mini-batches without each epoch's smaller last one. aggregation: of the rows they bring, from the
    table's entries where sparse has them."""
    train_nodes = store.split(config.split, config.seed).train
    batch_size = batch_size_of(config, int(train_nodes.numel()))
    pipeline = SamplerPipeline(
        store,
        train_nodes,
        config.fanouts,
        config.seed,
        1,
        batch_size,
        [0],
        num_samplers=num_samplers,
        prefetch=config.prefetch,
        timeout_seconds=config.collective_timeout_seconds,
        aggregation=aggregation,
        sparse=sparse,
    )
    return (batch for batch in pipeline if batch.seeds.numel() == batch_size)


def _sizes(batch: MiniBatch) -> dict[str, int]:
    first = batch.layers[0]
    return {
        "seeds": int(batch.seeds.numel()),
        "edges": batch.num_edges,
        "first_layer_edges": first.num_edges,
        "first_layer_rows": first.num_dst,
    }


def entry_description(entry: Entry) -> dict[str, Any]:
    """Return what a contender is, as plain data."""
    described = dataclasses.asdict(entry)
    return {key: described[key] for key in ("who", "how", "work", "processes", "environment")}
