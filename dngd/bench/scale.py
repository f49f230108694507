"""`dngd bench scale`: training over links of limited rate, a cost model of it, and what that says of many GPUs.

Hosts are network namespaces whose links tc limits (dngd.bench.network), one rank each. As many hosts as there are CPUs
for run the real training step; of more hosts each computes next to nothing (a few seeds) and sleeps for the rest of
what the same step was measured to compute, while its collectives, and the optimizer that asks for them, are real.
Every setting is an optimizer, a width, a number of hosts and a rate. Compute, and the bytes and calls of collectives,
are measured on the same hosts without a limit; latency, rate and cost a byte are fitted on half of the settings; the
other half's step times are predicted.
"""

from __future__ import annotations

import itertools
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dngd.allocator import keep_freed_memory
from dngd.bench.child import Message
from dngd.bench.children import RankGroup, ended_by_sigterm
from dngd.bench.comm import mean_over_ranks
from dngd.bench.cost_model import (
    Load,
    Network,
    Observation,
    all_reduce,
    broadcast,
    fit_network,
    predict_step,
    relative_error,
)
from dngd.bench.graphs import open_graph
from dngd.bench.machine import describe_machine
from dngd.bench.network import INTERFACE, HostNetwork, check_tools, host_network
from dngd.bench.optimizers import IN_TRAIN, with_optimizer
from dngd.bench.progress import BenchProgress
from dngd.bench.projection import Compute, Machines, project
from dngd.bench.step import describe_config, describe_graph, enough_warmup
from dngd.bench.timing import whole_periods
from dngd.bench.traffic import SAME_ON_ALL, total_bytes
from dngd.config import TrainConfig
from dngd.errors import TrainingError, UserError
from dngd.graph import GraphStore
from dngd.train.plan import batch_size_of

TARGET_ERROR = 0.2
"""Of a predicted step time, relative to the measured one."""

FIRST_ORDER_WARMUP = 10
FLUSH_STEPS = 2
"""Untimed steps after a change of rate: what still waits in a queue leaves it."""

EMULATED_BATCH, EMULATED_FANOUT = 4, 2
"""Seeds and neighbours of a host whose compute is a sleep."""

MAX_HOSTS = 32
BITS_PER_MEGABIT = 1e6


@dataclass(frozen=True)
class ScaleOptions:
    """What to measure and what to predict.

    config: data set, batches of a host, K-FAC's settings, seed; hidden is the predictions' width. hosts, megabits
    (Mbit/s), optimizers, widths: their products are the settings. steps: of a first-order setting; K-FAC's takes whole
    refresh periods. threads: of a host. scale: of products-shaped. compute: of a GPU; None: this machine's CPU.
    """

    config: TrainConfig
    hosts: Sequence[int] = (2, 4)
    megabits: Sequence[float] = (1000.0, 100.0)
    optimizers: Sequence[str] = ("adam", "kfac")
    widths: Sequence[int] = (256, 512)
    steps: int = 20
    threads: int = 1
    scale: float = 0.02
    compute: Compute | None = None
    machines: Machines = field(default_factory=Machines)


@dataclass(frozen=True)
class Calibration:
    """A world without limits: what a step computes, slept_seconds of it asleep, and what its collectives carry."""

    compute_seconds: float
    step_seconds: float
    load: Load
    bytes_a_step: Mapping[str, float]
    slept_seconds: float


def run_scale_bench(options: ScaleOptions, progress: BenchProgress | None = None) -> dict[str, Any]:
    """Measure the settings, fit the model, predict, and return everything as plain data.

    Raises UserError for options that cannot be, and where hosts cannot be made; TrainingError when a rank fails.
    """
    progress = progress or BenchProgress()
    _check(options)
    check_tools()
    config = options.config
    progress.message(f"opening {config.dataset} (a generated graph is made on first use and kept)")
    store = open_graph(config.dataset, config.data_root_in_use, config.cache_dir, options.scale)
    split = store.split(config.split, config.seed)
    batch_size_of(_of_hosts(config, max(_real_hosts(options))), int(split.train.numel()))
    machine = describe_machine(keeps_memory=keep_freed_memory())
    with ended_by_sigterm(), tempfile.TemporaryDirectory(prefix="dngd-bench-") as folder:
        bench = _Bench(options, store, Path(folder), progress)
        compute = bench.measure_compute()
        settings = bench.measure_settings()
    fitted, predicted = predict_settings(settings)
    return {
        "benchmark": "scale",
        "machine": machine | {"threads": options.threads},
        "graph": describe_graph(store, split),
        "config": describe_config(config),
        "settings": predicted["settings"],
        "fit": asdict(fitted)
        | {
            "formula": "compute + latency * rounds + bytes / (efficiency * rate) + host_seconds_per_byte * bytes",
            "fitted_on": predicted["fitted_on"],
        },
        "prediction": predicted["errors"],
        "compute_of_this_machine": asdict(compute),
        "model": project(config, options.compute or compute, options.machines),
    }


def _check(options: ScaleOptions) -> None:
    """Raise UserError for options that cannot be."""
    for name, values in (("hosts", options.hosts), ("mbits", options.megabits), ("widths", options.widths)):
        if not values or len(set(values)) < len(values) or min(values) <= 0:
            raise UserError(f"--{name} {','.join(map(str, values))} must be distinct numbers above 0")
    if min(options.hosts) < 2 or max(options.hosts) > MAX_HOSTS:
        raise UserError(f"--hosts {','.join(map(str, options.hosts))} must be numbers from 2 to {MAX_HOSTS}")
    for name in options.optimizers:
        if name not in IN_TRAIN:
            raise UserError(f"--optimizers names {name!r}; dngd train's own are: " + ", ".join(IN_TRAIN))
    if not options.optimizers or len(set(options.optimizers)) < len(options.optimizers):
        raise UserError("--optimizers must name each optimizer once, e.g. adam,kfac")
    for flag, value in (("steps", options.steps), ("threads", options.threads)):
        if value < 1:
            raise UserError(f"{flag}={value} is too small; give at least 1")
    if not isinstance(options.config.batch_size, int):
        raise UserError("batch_size=full has no mini-batches to draw; give a number")
    number = len(options.hosts) * len(options.megabits) * len(options.optimizers) * len(options.widths)
    if number < 6:
        raise UserError(
            f"{number} settings (hosts x mbits x optimizers x widths) are too few to fit three unknowns on half of "
            "them; give at least 6"
        )
    if len(options.megabits) < 2:
        raise UserError("--mbits must give at least 2 rates, or the links' share of a step cannot be told")
    _real_hosts(options)


def _real_hosts(options: ScaleOptions) -> list[int]:
    """Return the numbers of hosts that each have CPUs of their own. Raises UserError if there are none."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    real = [number for number in options.hosts if number * options.threads <= cpus]
    if not real:
        raise UserError(
            f"{min(options.hosts)} hosts of {options.threads} thread(s) need more than this machine's {cpus} CPU(s), "
            "and a sleep can only stand in for compute that was measured; use a machine with more, or fewer --threads"
        )
    return real


def _of_hosts(config: TrainConfig, hosts: int) -> TrainConfig:
    return TrainConfig(
        **(config.model_dump(exclude_unset=True) | {"engine": "local", "num_workers": hosts, "num_shards": hosts})
    )


class _Bench:
    """One run's measurements."""

    def __init__(self, options: ScaleOptions, store: GraphStore, folder: Path, progress: BenchProgress) -> None:
        self._options = options
        self._store = store
        self._folder = folder
        self._progress = progress
        self._learners = list(itertools.product(options.optimizers, options.widths))
        self._real = _real_hosts(options)
        per_world = 2 + len(self._learners) * (1 + len(options.megabits))
        progress.begin(3 + per_world * len(options.hosts), "compute")

    def measure_compute(self) -> Compute:
        """Return this machine's own compute, on one rank without a network, at the predictions' width."""
        found: dict[str, Message] = {}
        with ExitStack() as stack:
            group = self._start(stack, 1, None)
            for optimizer in ("adam", "kfac"):
                self._learn(group, 1, optimizer, self._options.config.hidden, emulated=False)
                self._steps(group, self._warmup(optimizer))
                found[optimizer] = self._steps(group, self._measured(optimizer))["ranks"][0]
                self._progress.advance(1, f"compute of {optimizer}")
        kfac, adam = found["kfac"], found["adam"]
        phases = kfac["kfac_phase_ms"]
        return Compute(
            source="measured on one rank on this machine's CPU, which is no GPU",
            step=statistics.mean(adam["seconds"]["step"]),
            statistics=(phases.get("commit", 0.0) + kfac["phase_ms"].get("observe", 0.0)) / 1e3,
            precondition=phases.get("precondition", 0.0) / 1e3,
            inversion=phases.get("refresh", 0.0) / 1e3 * self._options.config.kfac.inverse_update_period,
        )

    def measure_settings(self) -> list[dict[str, Any]]:
        """Return every setting with its calibration and its measured step time."""
        settings: list[dict[str, Any]] = []
        measured: dict[tuple[str, int], float] = {}
        for hosts in sorted(self._options.hosts):
            with host_network(hosts) as network, ExitStack() as stack:
                group = self._start(stack, hosts, network)
                for optimizer, width in self._learners:
                    emulated = hosts not in self._real
                    network.limit(None)
                    self._learn(group, hosts, optimizer, width, emulated=emulated)
                    target = measured[optimizer, width] if emulated else None
                    calibration = self._calibrate(group, hosts, optimizer, target)
                    if not emulated:
                        measured[optimizer, width] = calibration.compute_seconds
                    self._progress.advance(1, f"{hosts} hosts, {optimizer} {width}, no limit")
                    for megabits in self._options.megabits:
                        network.limit(megabits)
                        self._steps(group, FLUSH_STEPS, calibration.slept_seconds)
                        answer = self._steps(group, self._measured(optimizer), calibration.slept_seconds)
                        settings.append(
                            {
                                "hosts": hosts,
                                "megabits": megabits,
                                "optimizer": optimizer,
                                "width": width,
                                "compute_is": "a sleep" if emulated else "real",
                                "steps": self._measured(optimizer),
                                "step_seconds": mean_step(answer),
                                "compute_seconds": calibration.compute_seconds,
                                "slept_seconds": calibration.slept_seconds,
                                "stands_for_seconds": target,
                                "unlimited_step_seconds": calibration.step_seconds,
                                "load": asdict(calibration.load),
                                "bytes_a_step": dict(calibration.bytes_a_step),
                            }
                        )
                        self._progress.advance(1, f"{hosts} hosts, {optimizer} {width}, {megabits:g} Mbit/s")
        return settings

    def _start(self, stack: ExitStack, hosts: int, network: HostNetwork | None) -> RankGroup:
        options = self._options
        config = _of_hosts(options.config, hosts).model_dump(mode="json")
        setups = [
            {
                "part": "rank",
                "rank": rank,
                "world_size": hosts,
                "rendezvous": str(self._folder / f"rendezvous-{hosts}"),
                "threads": options.threads,
                "store": str(self._store.path),
                "config": config,
            }
            for rank in range(hosts)
        ]
        environment = {"OMP_NUM_THREADS": str(options.threads)}
        if network is not None:
            environment["GLOO_SOCKET_IFNAME"] = INTERFACE
        prefixes = None if network is None else [network.prefix(host) for host in range(hosts)]
        group = RankGroup(f"{hosts} hosts" if hosts > 1 else "one rank", setups, environment, prefixes)
        stack.callback(group.close)
        group.wait_until_ready()
        if network is not None:
            self._progress.advance(2, f"{hosts} hosts started")
        else:
            self._progress.advance(1, "started")
        return group

    def _learn(self, group: RankGroup, hosts: int, optimizer: str, width: int, *, emulated: bool) -> None:
        config = with_optimizer(_of_hosts(self._options.config, hosts), optimizer, None)
        changes: dict[str, Any] = {"hidden": width}
        if emulated:
            changes |= {"batch_size": EMULATED_BATCH, "fanout": (EMULATED_FANOUT,) * config.num_layers}
        config = config.model_copy(update=changes)
        group.ask({"do": "learn", "optimizer": optimizer, "config": config.model_dump(mode="json")})

    def _calibrate(self, group: RankGroup, hosts: int, optimizer: str, target: float | None) -> Calibration:
        """Measure a world without limits. target: what a step is to compute, the difference being slept; None: as it
        is."""
        warm = self._steps(group, self._warmup(optimizer))
        slept = 0.0
        if target is not None:
            # Where even a few seeds take longer, the step computes more than it stands for; what it does is measured.
            slept = max(0.0, target - mean_compute(self._steps(group, self._measured(optimizer))))
        answer = self._steps(group, self._measured(optimizer), slept)
        losses = {rank["loss"] for rank in warm["ranks"]}
        if len(losses) > 1:
            raise TrainingError(f"ranks of one world report losses {sorted(losses)} of one step; they must be equal")
        steps = self._measured(optimizer)
        by_kind = total_bytes([rank["bytes"] for rank in answer["ranks"]])
        return Calibration(
            compute_seconds=mean_compute(answer),
            step_seconds=mean_step(answer),
            load=measured_load(by_kind, answer["ranks"][0]["calls"], hosts, steps),
            bytes_a_step={kind: size / steps for kind, size in by_kind.items()},
            slept_seconds=slept,
        )

    def _steps(self, group: RankGroup, steps: int, sleep_seconds: float = 0.0) -> Message:
        return group.ask({"do": "steps", "steps": steps, "sleep_seconds": sleep_seconds})

    def _warmup(self, optimizer: str) -> int:
        return enough_warmup(self._options.config.kfac) if optimizer == "kfac" else FIRST_ORDER_WARMUP

    def _measured(self, optimizer: str) -> int:
        steps = self._options.steps
        return whole_periods(steps, self._options.config.kfac.inverse_update_period) if optimizer == "kfac" else steps


def mean_step(answer: Message) -> float:
    """Return the mean seconds of a step."""
    return statistics.mean(mean_over_ranks(rank["seconds"]["step"] for rank in answer["ranks"]))


def mean_compute(answer: Message) -> float:
    """Return the mean over steps of what the slowest rank spends outside of collectives: the others wait for it."""
    steps = zip(*(zip(rank["seconds"]["step"], rank["seconds"]["collective"]) for rank in answer["ranks"]))
    slowest: list[float] = [max(whole - waited for whole, waited in ranks) for ranks in steps]
    return statistics.mean(slowest)


def measured_load(by_kind: Mapping[str, int], calls: Mapping[str, int], ranks: int, steps: int) -> Load:
    """Return a step's load from counted bytes and calls. Kinds that every rank hands in are all-reduced; the others,
    and calls of any other name, are taken for broadcasts."""
    reduced = sum(size for kind, size in by_kind.items() if kind in SAME_ON_ALL)
    others = sum(size for kind, size in by_kind.items() if kind not in SAME_ON_ALL)
    reductions = calls.get("all_reduce", 0)
    total = all_reduce(ranks, reduced, reductions) + broadcast(ranks, others, sum(calls.values()) - reductions)
    return total.times(1.0 / steps)


def predict_settings(settings: Sequence[dict[str, Any]]) -> tuple[Network, dict[str, Any]]:
    """Fit the network on half of the settings and predict all; return it, and settings with errors.

    The half is a checkerboard over hosts, rates, optimizers and widths, chosen before anything is measured: each
    value of each stands in both halves.
    """
    places = [
        {value: place for place, value in enumerate(dict.fromkeys(setting[name] for setting in settings))}
        for name in ("hosts", "megabits", "optimizer", "width")
    ]
    out = []
    for setting in settings:
        where = [place[setting[name]] for place, name in zip(places, ("hosts", "megabits", "optimizer", "width"))]
        out.append(setting | {"used_for": "fit" if sum(where) % 2 == 0 else "prediction"})

    def observed(setting: Mapping[str, Any]) -> Observation:
        rate = setting["megabits"] * BITS_PER_MEGABIT / 8
        return Observation(setting["compute_seconds"], Load(**setting["load"]), rate, setting["step_seconds"])

    try:
        network = fit_network([observed(setting) for setting in out if setting["used_for"] == "fit"])
    except ValueError as error:
        raise TrainingError(f"the cost model cannot be fitted to what was measured: {error}") from None
    for setting in out:
        one = observed(setting)
        setting["predicted_seconds"] = predict_step(one.compute_seconds, one.load, one.bytes_per_second, network)
        setting["error"] = relative_error(setting["predicted_seconds"], one.step_seconds)
        # What a model without any network would be off by: where this is small, a prediction says little.
        setting["error_of_compute_alone"] = relative_error(one.compute_seconds, one.step_seconds)
    held_out = [setting for setting in out if setting["used_for"] == "prediction"]
    worst = max(setting["error"] for setting in held_out)
    return network, {
        "settings": out,
        "fitted_on": len(out) - len(held_out),
        "errors": {
            "predicted": len(held_out),
            "mean_error": statistics.mean(setting["error"] for setting in held_out),
            "largest_error": worst,
            "mean_error_of_compute_alone": statistics.mean(setting["error_of_compute_alone"] for setting in held_out),
            "at_most": TARGET_ERROR,
            "within": sum(setting["error"] <= TARGET_ERROR for setting in held_out),
            "reached": worst <= TARGET_ERROR,
        },
    }
