"""`dngd bench pipeline`: the path from disk to mini-batch against DGL's, and whole training steps with it.

Rows (what is measured):
    input     to the input of the first matmul, 3-layer GraphSAGE: DGL's example, the same tuned, dngd
    gcn       the same for GCN's normalised sum
    float16   dngd on a 16-bit feature table, beside `input`
    training  whole steps with Adam, sampling included
    memory    what one more worker on this machine adds
    open      GraphStore.open, against a store a hundred times smaller
    disk      features on disk, with the memory limited
    roofline  this machine's bandwidths, a batch's bytes, and the draw alone

Contenders of a row are processes of their own that take turns (see children): a round gives each a chunk of batches,
the order rotates, and whoever has no turn is stopped. Times are medians over chunks; ratios are those of medians.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dngd.allocator import keep_freed_memory
from dngd.bench.children import ended_by_sigterm, stopped_children, take_turns
from dngd.bench.contenders import Entry, Work, dgl_entries, entry_description, own_entries
from dngd.bench.disk import PLACEMENTS, measure_disk
from dngd.bench.graphs import PRODUCTS_SHAPED, open_graph
from dngd.bench.machine import describe_machine, torch_threads
from dngd.bench.memory import SAMPLERS, measure_memory
from dngd.bench.opening import measure_open
from dngd.bench.progress import BenchProgress
from dngd.bench.roofline import measure_roofline
from dngd.bench.step import describe_config, describe_graph
from dngd.bench.timing import whole_periods
from dngd.config import TrainConfig
from dngd.errors import TrainingError, UserError
from dngd.graph import GraphStore, cache_folder, open_or_build
from dngd.graph.synth_like import MIN_SCALE
from dngd.train.plan import batch_size_of

ROWS = ("input", "gcn", "float16", "training", "memory", "open", "disk", "roofline")

RATIO_TARGETS = {"input": {"dgl": 5.0, "tuned": 2.0}, "training": {"dgl": 2.5}}
"""How many times DGL's seeds a second are aimed at."""
LIMITS = {"added_bytes_a_worker": 400e6, "open_seconds": 0.5}
"""What is aimed at, at most."""

SMALL_SCALE = 0.01
MEMORY_WORKERS = 3
DISK_WARMUP = 1
SAME_WORK_TOLERANCE = 0.1


@dataclass(frozen=True)
class PipelineOptions:
    """What to measure.

    config: data set, batches, layers, widths, seed, prefetch; its model and optimizer do not matter. rows: of ROWS.
    processes: numbers of DataLoader workers and of sampler processes. batches: of a chunk, rounded up to a whole
    number for each process. rounds: chunks of each contender. steps: of the rows memory and disk. scale: of
    products-shaped. threads: of each training process; None: torch's choice.
    """

    config: TrainConfig
    rows: Sequence[str] = ROWS
    processes: Sequence[int] = (0, 1, 2)
    batches: int = 6
    rounds: int = 5
    steps: int = 5
    threads: int | None = None
    scale: float = 1.0


def run_pipeline_bench(options: PipelineOptions, progress: BenchProgress | None = None) -> dict[str, Any]:
    """Measure the rows and return everything as plain data.

    Raises UserError for options that cannot be, before anything is measured; TrainingError when a contender fails,
    or when contenders did not do the same work.
    """
    progress = progress or BenchProgress()
    _check(options)
    config = options.config
    progress.message(f"opening {config.dataset} (a generated graph is made on first use and kept)")
    store = open_graph(config.dataset, config.data_root_in_use, config.cache_dir, options.scale)
    split = store.split(config.split, config.seed)
    batch_size = batch_size_of(config, int(split.train.numel()))
    if batch_size == split.train.numel():
        raise UserError(f"a batch of {batch_size} seeds is the whole training set; give a smaller --batch-size")
    with ended_by_sigterm(), torch_threads(options.threads) as threads:
        bench = _Bench(options, store, threads, progress)
        machine = describe_machine(keeps_memory=keep_freed_memory())
        measured = {row: bench.rows[row]() for row in ROWS if row in options.rows and row in bench.rows}
    return {
        "benchmark": "pipeline",
        "machine": machine,
        "graph": describe_graph(store, split),
        "config": {k: v for k, v in describe_config(config).items() if k != "kfac"}
        | {"prefetch": config.prefetch, "batch_size": batch_size},
        "turns": {
            "rounds": options.rounds,
            "batches": bench.chunk,
            "processes": list(options.processes),
            "threads": threads,
        },
        "targets": {"ratios": RATIO_TARGETS, "limits": LIMITS},
        "rows": measured,
    }


def _check(options: PipelineOptions) -> None:
    """Raise UserError for options that cannot be."""
    for row in options.rows:
        if row not in ROWS:
            raise UserError(f"--rows names {row!r}, which is none; give some of: " + ", ".join(ROWS))
    if not options.rows:
        raise UserError("--rows is empty; give some of: " + ", ".join(ROWS))
    if "float16" in options.rows and "input" not in options.rows:
        raise UserError("--rows float16 is compared within the row input; name both")
    if not options.processes or min(options.processes) < 0 or len(set(options.processes)) < len(options.processes):
        raise UserError(
            f"--processes {','.join(map(str, options.processes))} must be distinct whole numbers from 0, e.g. 0,1,2"
        )
    for flag, value in (("batches", options.batches), ("rounds", options.rounds), ("steps", options.steps)):
        if value < 1:
            raise UserError(f"{flag}={value} is too small; give at least 1")


class _Bench:
    """One run's rows. chunk: batches of a turn."""

    def __init__(self, options: PipelineOptions, store: GraphStore, threads: int, progress: BenchProgress) -> None:
        self._options = options
        self._store = store
        self._threads = threads
        self._progress = progress
        self._config = options.config.model_copy(update={"dataset": str(store.path), "model": "sage"})
        self._adam = self._config.model_copy(update={"optimizer": "adam", "lr": None})
        self._cache = cache_folder(options.config.cache_dir)
        self._input_seconds: dict[str, float] = {}
        # A multiple of each number of processes, which hand out their batches in turns.
        self.chunk = options.batches
        while any(self.chunk % max(1, number) for number in options.processes):
            self.chunk = whole_periods(self.chunk + 1, max(options.processes))
        self.rows: dict[str, Callable[[], Any]] = {
            "input": self._input,
            "gcn": self._gcn,
            "training": self._training,
            "memory": self._memory,
            "open": self._open,
            "disk": self._disk,
            "roofline": self._roofline,
        }

    def _input(self) -> dict[str, Any]:
        processes = self._options.processes
        entries = [*dgl_entries("input", processes), *own_entries("input", processes)]
        if "roofline" in self._options.rows:
            # Sampling alone is the other half of the bound.
            entries += own_entries("sampling", (0,), "dngd-sampling")
        if "float16" in self._options.rows:
            half = _half_features(self._store, self._options.config.cache_dir)
            entries += own_entries("input", processes, "dngd-float16", store=str(half.path))
        result = self._compare(entries, "input", RATIO_TARGETS["input"], self._config)
        if "roofline" in self._options.rows:
            self._input_seconds = {name: one["seconds_a_batch"] for name, one in result["contenders"].items()}
        return result

    def _gcn(self) -> dict[str, Any]:
        processes = self._options.processes
        entries = [*dgl_entries("input", processes), *own_entries("input", processes)]
        return self._compare(entries, "input", {}, self._config.model_copy(update={"model": "gcn"}))

    def _training(self) -> dict[str, Any]:
        processes = self._options.processes
        entries = [*dgl_entries("training", processes), *own_entries("training", processes)]
        return self._compare(entries, "training", RATIO_TARGETS["training"], self._config)

    def _memory(self) -> dict[str, Any]:
        steps = self._options.steps
        self._progress.begin(2 * MEMORY_WORKERS + len(SAMPLERS), "memory")
        return measure_memory(self._adam, self._store.path, MEMORY_WORKERS, steps, self._threads, self._progress)

    def _open(self) -> dict[str, Any]:
        stores = {"store": self._store.path}
        config = self._options.config
        if config.dataset == PRODUCTS_SHAPED:
            scale = max(MIN_SCALE, self._options.scale * SMALL_SCALE)
            stores["small"] = open_graph(PRODUCTS_SHAPED, cache_dir=config.cache_dir, scale=scale).path
        repeats = self._options.rounds
        self._progress.begin(repeats * len(stores), "opening")
        return measure_open(stores, repeats, self._progress)

    def _disk(self) -> dict[str, Any]:
        steps = self._options.steps
        self._progress.begin(1 + len(PLACEMENTS), "features on disk")
        return measure_disk(self._adam, self._store, self._cache, DISK_WARMUP, steps, self._threads, self._progress)

    def _roofline(self) -> dict[str, Any]:
        measured = measure_roofline(self._store, self._config)
        if self._input_seconds:
            draw = self._input_seconds["dngd-sampling:0"]
            rows = measured["seconds"]["gather_and_mean"]
            measured["bound"] = input_bound(draw, rows, self._threads, self._input_seconds)
        return measured

    def _compare(
        self, entries: Sequence[Entry], work: Work, targets: Mapping[str, float], config: TrainConfig
    ) -> dict[str, Any]:
        """Let the contenders take turns; return each one's times, and how dngd compares."""
        rounds, chunk = self._options.rounds, self.chunk
        common = {
            "store": str(self._store.path),
            "config": config.model_dump(mode="json"),
            "threads": self._threads,
        }
        threads = {"OMP_NUM_THREADS": str(self._threads)}
        # What is ready at the start is drained before the first chunk: later ones begin where the one before ended.
        leads = {entry.name: 1 + entry.queue(config.prefetch) for entry in entries}
        setups = {
            entry.name: (
                entry.setup(common | {"num_batches": leads[entry.name] + chunk + rounds * (1 + chunk)}),
                threads | dict(entry.environment),
            )
            for entry in entries
        }
        self._progress.begin(len(entries) * (rounds + 2), work)
        with stopped_children(setups, self._progress) as children:
            answers = take_turns(
                children,
                rounds,
                {"lead": 1, "batches": chunk},
                {name: {"lead": lead, "batches": chunk} for name, lead in leads.items()},
                self._progress,
            )
        check_same_work({entry.name: answers[entry.name] for entry in entries})
        results = {entry.name: entry_description(entry) | _summary(answers[entry.name]) for entry in entries}
        return {"contenders": results, "comparison": compare(results, targets)}


def _half_features(store: GraphStore, cache_dir: Path | None) -> GraphStore:
    """Return the same graph with its features as float16: made once, kept in the cache folder."""

    def build(out: Path) -> GraphStore:
        return GraphStore.write(
            out,
            name=store.name,
            indptr=store.indptr,
            indices=store.indices,
            edge_weight=store.edge_weight,
            features=store.features,
            feature_dtype="float16",
            labels=store.labels,
            num_classes=store.num_classes,
            masks=store.split_masks,
            directed=store.manifest.directed,
            self_loops="keep",
            duplicates="keep",
            overwrite=True,
        )

    key = f"{store.name}-{store.num_nodes}-float16-{store.digest[:16]}"
    return open_or_build(key, build, f"converting {store.name}'s features to float16", cache_dir)


def check_same_work(answers: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Raise TrainingError unless all contenders sampled alike: edges, rows of the first layer, input nodes a seed.

    A sampler that returns another graph than was asked for (see DESIGN: DGL's int32) would otherwise win.
    """
    for key in ("edges", "first_layer_edges", "first_layer_rows", "input_nodes"):
        a_seed = {
            name: sum(answer[key] for answer in own) / sum(answer["seeds"] for answer in own)
            for name, own in answers.items()
            if key in own[0]
        }
        middle = statistics.median(a_seed.values()) if a_seed else 0.0
        for name, value in a_seed.items():
            if abs(value - middle) > SAME_WORK_TOLERANCE * middle:
                raise TrainingError(
                    f"{name} drew {value:.1f} {key.replace('_', ' ')} a seed where the others drew {middle:.1f}: its "
                    "work is another, so that times cannot be compared"
                )


def input_bound(draw: float, rows: float, threads: int, input_seconds: Mapping[str, float]) -> dict[str, Any]:
    """Return the fewest seconds a batch that `threads` cores allow, and how many times each peer's rate that would be.

    DGL's draw alone takes `draw` seconds of one core, the first layer's rows alone `rows` seconds of all: with both at
    full speed all the time, and nothing else to do, a batch takes `max(draw, (draw + threads·rows) / threads)`.
    input_seconds: of a batch, by contender.
    """
    least = max(draw, (draw + threads * rows) / threads)
    peers = {name: seconds for name, seconds in input_seconds.items() if name.startswith("dgl-")}
    return {
        "draw_seconds": draw,
        "rows_seconds": rows,
        "least_seconds_a_batch": least,
        "highest_ratio": {name: seconds / least for name, seconds in peers.items()},
    }


def _summary(answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return one contender's times; the first answer is of the warm-up."""
    chunks = answers[1:]
    seconds = [chunk["seconds"] / chunk["batches"] for chunk in chunks]
    a_batch = statistics.median(seconds)
    seeds = chunks[0]["seeds"] / chunks[0]["batches"]
    sizes = [key for key in ("edges", "first_layer_edges", "first_layer_rows", "input_nodes") if key in chunks[0]]
    batches = sum(chunk["batches"] for chunk in chunks)
    return {
        "seconds_a_batch": a_batch,
        "seeds_per_second": seeds / a_batch,
        "phase_seconds_a_batch": {
            phase: statistics.median(chunk["phase_seconds"][phase] / chunk["batches"] for chunk in chunks)
            for phase in chunks[0]["phase_seconds"]
        },
        "mean_sizes": {key: sum(chunk[key] for chunk in chunks) / batches for key in sizes},
        "chunk_seconds": [chunk["seconds"] for chunk in chunks],
        "chunk_batches": chunks[0]["batches"],
        **({"last_loss": chunks[-1]["loss"]} if "loss" in chunks[-1] else {}),
    }


def compare(results: Mapping[str, Mapping[str, Any]], targets: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return how many times a peer's seeds a second dngd does: at each number of processes, and best against best.

    The peer is its group's fastest documented way there. range: the ratio's least and largest over the rounds.
    """
    found = []
    numbers = sorted({result["processes"] for result in results.values()})
    for who in ("dgl", "tuned"):
        for number in [*numbers, None]:
            own = _fastest(results, "dngd", number)
            peer = _fastest(results, who, number)
            if own is None or peer is None:
                continue
            rounds = [
                (b / results[peer]["chunk_batches"]) / (a / results[own]["chunk_batches"])
                for a, b in zip(results[own]["chunk_seconds"], results[peer]["chunk_seconds"])
            ]
            ratio = results[peer]["seconds_a_batch"] / results[own]["seconds_a_batch"]
            target = targets.get(who)
            found.append(
                {
                    "against": who,
                    "processes": number,
                    "dngd": own,
                    "peer": peer,
                    "ratio": ratio,
                    "range": [min(rounds), max(rounds)],
                    "target": target,
                    "reached": None if target is None else ratio >= target,
                }
            )
    return found


def _fastest(results: Mapping[str, Mapping[str, Any]], who: str, processes: int | None) -> str | None:
    """Return the fastest of a group with that many processes (None: any); dngd as shipped, on the store's own table."""
    names = [
        name
        for name, result in results.items()
        if result["who"] == who
        and result["work"] != "sampling"
        and not name.startswith("dngd-")
        and processes in (None, result["processes"])
    ]
    return min(names, key=lambda name: results[name]["seconds_a_batch"], default=None)
