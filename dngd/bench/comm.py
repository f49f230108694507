"""`dngd bench comm`: what K-FAC costs over Adam between real processes, in time and in bytes.

Each contestant is a world of its own: as many processes as ranks, joined by gloo, each drawing its own shard of the
same global batches. The worlds take turns of a few steps; whoever has no turn is stopped, background threads and
collectives included, so that nothing of one world's work falls into another's time, and what a step leaves for later
is paid for in the same world's next steps. Windows hold whole refresh periods.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dngd.allocator import keep_freed_memory
from dngd.bench.child import Message
from dngd.bench.children import RankGroup, ended_by_sigterm, take_turns
from dngd.bench.competitors import parse_variants
from dngd.bench.graphs import open_graph
from dngd.bench.machine import describe_machine
from dngd.bench.optimizers import BASELINE, with_optimizer
from dngd.bench.progress import BenchProgress
from dngd.bench.step import describe_config, describe_graph, enough_warmup, kfac_period
from dngd.bench.timing import summary_ms, whole_periods
from dngd.bench.traffic import GRADIENT, curvature_bytes, total_bytes
from dngd.config import TrainConfig
from dngd.config_text import merge
from dngd.errors import TrainingError, UserError
from dngd.graph import GraphStore
from dngd.sampling import steps_per_epoch
from dngd.train.plan import batch_size_of

TARGETS = {
    "step_over_adam": 1.05,
    "curvature_over_gradient": 0.03,
    "curvature_over_full_matrices": 0.1,
}
"""Most that K-FAC should take: mean step over Adam's; bytes of factors and inverses over those of the gradients, and
over those of reducing every factor as a full matrix at every step."""

MAX_PROCESSES = 64

LEAST_LIMIT_SECONDS = 600.0
"""Of a collective: one that is under way when its world is stopped waits for the others' turns too."""


@dataclass(frozen=True)
class CommOptions:
    """What to measure.

    config: data set, model, batches of a shard, K-FAC's settings, seed; its optimizer, learning rate, epochs (of the
    run whose bytes are told) and num_samplers matter, its numbers of workers and shards do not. processes: ranks of
    a world, at least 2. variants: further K-FAC settings, see competitors.parse_variants. steps: measured ones, rounded
    up to whole refresh periods. turn: steps of a turn, at most. warmup: steps before; None: enough. threads: of each
    process; None: the CPUs' share. scale: of products-shaped.
    """

    config: TrainConfig
    processes: int = 2
    variants: str | None = None
    steps: int = 100
    turn: int = 10
    warmup: int | None = None
    threads: int | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class Contestant:
    """A world: its optimizer and its ranks' configuration."""

    name: str
    optimizer: str
    config: TrainConfig


def run_comm_bench(options: CommOptions, progress: BenchProgress | None = None) -> dict[str, Any]:
    """Let the worlds take turns and return the measurements as plain data.

    Raises UserError for options that cannot be, TrainingError when a rank fails, or ranks of a world disagree.
    """
    progress = progress or BenchProgress()
    contestants = _contestants(options)
    period = math.lcm(*(kfac_period(x.config) for x in contestants if x.optimizer == "kfac"))
    measured = whole_periods(options.steps, period)
    turn = max(size for size in range(1, options.turn + 1) if measured % size == 0)
    enough = max(enough_warmup(x.config.kfac) for x in contestants)
    warmup = enough if options.warmup is None else options.warmup
    config = options.config
    progress.message(f"opening {config.dataset} (a generated graph is made on first use and kept)")
    store = open_graph(config.dataset, config.data_root_in_use, config.cache_dir, options.scale)
    split = store.split(config.split, config.seed)
    batch_size = batch_size_of(contestants[0].config, int(split.train.numel()))
    threads = options.threads or max(1, torch.get_num_threads() // options.processes)
    machine = describe_machine(keeps_memory=keep_freed_memory())
    with ended_by_sigterm():
        answers = _take_turns(contestants, options.processes, store, threads, warmup, measured // turn, turn, progress)
    results = {x.name: _result(answers[x.name]) for x in contestants}
    epoch_steps = steps_per_epoch(int(split.train.numel()), options.processes, batch_size)
    run_steps = config.epochs * epoch_steps
    return {
        "benchmark": "comm",
        "machine": machine | {"threads": threads},
        "graph": describe_graph(store, split),
        "config": describe_config(config) | {"num_samplers": config.samplers, "variants": options.variants},
        "world": {"processes": options.processes, "backend": "gloo", "shards": options.processes},
        "steps": {
            "asked": options.steps,
            "measured": measured,
            "whole_period": period,
            "turn": turn,
            "warmup": warmup,
            "warmup_covers_start": warmup >= enough,
        },
        "optimizers": {x.name: results[x.name] | {"optimizer": x.optimizer} for x in contestants},
        "comparison": {
            x.name: compare(results[x.name], results[BASELINE], run_steps) for x in contestants if x.optimizer == "kfac"
        },
    }


def _contestants(options: CommOptions) -> list[Contestant]:
    """Return the worlds, Adam's first. Raises UserError for options that cannot be."""
    for flag, value, least in (
        ("processes", options.processes, 2),
        ("steps", options.steps, 1),
        ("turn", options.turn, 1),
        ("warmup", 0 if options.warmup is None else options.warmup, 0),
        ("threads", 1 if options.threads is None else options.threads, 1),
    ):
        if value < least:
            raise UserError(f"{flag}={value} is too small; give at least {least}")
    if options.processes > MAX_PROCESSES:
        raise UserError(f"processes={options.processes} is above {MAX_PROCESSES}; all of them run on this machine")
    changes = {
        "engine": "local",
        "num_workers": options.processes,
        "num_shards": options.processes,
        "collective_timeout_seconds": max(LEAST_LIMIT_SECONDS, options.config.collective_timeout_seconds),
    }
    base = TrainConfig(**merge(options.config.model_dump(exclude_unset=True), changes))
    variants = parse_variants(options.variants or "", taken=(BASELINE, "kfac"))
    made = [Contestant(BASELINE, BASELINE, with_optimizer(base, BASELINE, None))]
    for name, overrides in {"kfac": {}, **variants}.items():
        fields = merge(base.model_dump(exclude_unset=True), dict(overrides))
        rate = fields.pop("lr", None)
        made.append(Contestant(name, "kfac", with_optimizer(TrainConfig(**fields), "kfac", rate)))
    return made


def _take_turns(
    contestants: Sequence[Contestant],
    processes: int,
    store: GraphStore,
    threads: int,
    warmup: int,
    rounds: int,
    turn: int,
    progress: BenchProgress,
) -> dict[str, list[Message]]:
    """Start the worlds, each stopped once it is there, and give them turns; the first answers are the warm-up's."""
    progress.begin(len(contestants) * (rounds + 2), "starting")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dngd-bench-")))
        groups: dict[str, RankGroup] = {}
        for contestant in contestants:
            setups = [
                {
                    "part": "rank",
                    "rank": rank,
                    "world_size": processes,
                    "rendezvous": str(folder / f"rendezvous-{len(groups)}"),
                    "threads": threads,
                    "store": str(store.path),
                    "optimizer": contestant.optimizer,
                    "config": contestant.config.model_dump(mode="json"),
                }
                for rank in range(processes)
            ]
            group = RankGroup(contestant.name, setups, {"OMP_NUM_THREADS": str(threads)})
            stack.callback(group.close)
            groups[contestant.name] = group
        for group in groups.values():
            group.wait_until_ready()
            group.pause()
            progress.advance(1, f"starting {group.name}")
        first = {name: {"do": "steps", "steps": warmup} for name in groups}
        return take_turns(groups, rounds, {"do": "steps", "steps": turn}, first, progress)


def _result(answers: Sequence[Message]) -> dict[str, Any]:
    """Return one world's measurements; the first answer is the warm-up's. Raises TrainingError if ranks disagree."""
    for answer in answers:
        losses = {rank["loss"] for rank in answer["ranks"]}
        if len(losses) > 1:
            raise TrainingError(
                f"ranks of one world report losses {sorted(losses)} of the same step; they must be equal"
            )
    turns = [answer["ranks"] for answer in answers[1:]]
    steps = sum(len(ranks[0]["seconds"]["step"]) for ranks in turns)
    step = [value for ranks in turns for value in mean_over_ranks(rank["seconds"]["step"] for rank in ranks)]
    draw = [value for ranks in turns for value in mean_over_ranks(rank["seconds"]["draw"] for rank in ranks)]
    start = _bytes(answers[:1])
    measured = _bytes(answers[1:])
    last = turns[-1][0]
    return {
        "step": summary_ms(step),
        "step_without_drawing": summary_ms([whole - part for whole, part in zip(step, draw)]),
        "collective_ms": 1e3
        * statistics.mean(s for ranks in turns for rank in ranks for s in rank["seconds"]["collective"]),
        "draw_ms": statistics.mean(draw) * 1e3,
        "phase_ms": _mean_phases(turns, "phase_ms"),
        "kfac_phase_ms": _mean_phases(turns, "kfac_phase_ms"),
        "turn_mean_ms": [
            1e3 * statistics.mean(mean_over_ranks(rank["seconds"]["step"] for rank in ranks)) for ranks in turns
        ],
        "steps": steps,
        "bytes": measured,
        "warmup_steps": len(answers[0]["ranks"][0]["seconds"]["step"]),
        "warmup_bytes": start,
        "full_matrix_bytes_a_step": last["full_matrix_bytes"],
        "parameter_bytes": last["parameter_bytes"],
        "mean_edges_a_step": sum(rank["edges"] for ranks in turns for rank in ranks) / steps,
        "last_loss": last["loss"],
    }


def mean_over_ranks(seconds: Iterable[Sequence[float]]) -> list[float]:
    """Return each step's mean over the ranks, which the collectives hold together: its sum is the time that passed."""
    return [statistics.mean(of) for of in zip(*seconds)]


def _mean_phases(turns: Sequence[Sequence[Message]], key: str) -> dict[str, float]:
    """Return the mean of each phase over ranks and turns, which all have as many steps."""
    means = [rank[key] for ranks in turns for rank in ranks]
    return {phase: statistics.mean(of.get(phase, 0.0) for of in means) for phase in means[0]}


def _bytes(answers: Sequence[Message]) -> dict[str, int]:
    """Return the bytes of all collectives' buffers by kind over some answers."""
    sums: dict[str, int] = {}
    for answer in answers:
        for kind, size in total_bytes([rank["bytes"] for rank in answer["ranks"]]).items():
            sums[kind] = sums.get(kind, 0) + size
    return sums


def compare(kfac: Mapping[str, Any], adam: Mapping[str, Any], run_steps: int) -> dict[str, Any]:
    """Return how K-FAC compares with Adam, and the targets.

    Of two step ratios the larger is held against the target: that of whole steps, batches drawn included, and that of
    all that K-FAC adds to a whole step over Adam's step without drawing (nothing hides behind the drawing then).
    Bytes are told over the measured whole periods, and over a run of run_steps steps: those of the start, when inverses
    are renewed more often, as measured, and the measured rate from there on. The run's are held against the targets.
    """
    whole = kfac["step"]["mean_ms"] / adam["step"]["mean_ms"]
    added = kfac["step"]["mean_ms"] - adam["step"]["mean_ms"]
    strict = 1 + added / adam["step_without_drawing"]["mean_ms"]
    later = max(0, run_steps - kfac["warmup_steps"]) / kfac["steps"]
    kinds = {*kfac["bytes"], *kfac["warmup_bytes"]}
    start = kfac["warmup_bytes"]
    run = {kind: start.get(kind, 0) + later * kfac["bytes"].get(kind, 0) for kind in kinds}
    if run_steps < kfac["warmup_steps"]:
        run_steps = kfac["warmup_steps"]
    full = kfac["full_matrix_bytes_a_step"]
    traffic = {
        "measured_steps": _traffic(kfac["bytes"], full * kfac["steps"]) | {"steps": kfac["steps"]},
        "run": _traffic(run, full * run_steps) | {"steps": run_steps},
    }
    values = {
        "step_over_adam": max(whole, strict),
        "curvature_over_gradient": traffic["run"]["curvature_over_gradient"],
        "curvature_over_full_matrices": traffic["run"]["curvature_over_full_matrices"],
    }
    return {
        "step_ratio": {
            "mean": whole,
            "p50": kfac["step"]["p50_ms"] / adam["step"]["p50_ms"],
            "p99": kfac["step"]["p99_ms"] / adam["step"]["p99_ms"],
            "added_over_step_without_drawing": strict,
        },
        "traffic": traffic,
        "targets": {
            name: {"value": values[name], "at_most": limit, "reached": values[name] <= limit}
            for name, limit in TARGETS.items()
        },
    }


def _traffic(by_kind: Mapping[str, float], full_matrices: float) -> dict[str, Any]:
    curvature = curvature_bytes(by_kind)
    return {
        "bytes": {kind: round(size) for kind, size in sorted(by_kind.items())},
        "curvature_bytes": round(curvature),
        "full_matrices_bytes": round(full_matrices),
        "curvature_over_gradient": curvature / by_kind[GRADIENT],
        "curvature_over_full_matrices": curvature / full_matrices,
    }
