"""`dngd bench scale`: training over links of limited rate, a cost model of it, and what that says of many GPUs.

Hosts are network namespaces whose links tc limits (dngd.bench.network), one rank each. As many hosts as there are CPUs
for run the real training step; of more hosts each computes next to nothing (a few seeds) and sleeps for the rest of
what the same step was measured to compute, while its collectives, and the optimizer that asks for them, are real.
Every setting is an optimizer, a width, a number of hosts and a rate. Compute, and the bytes and calls of collectives,
are measured on the same hosts without a limit, in turns with the rates; latency, rate and cost a byte are fitted on
half of the settings; the other half's step times are predicted (dngd.bench.scale_settings).
"""

from __future__ import annotations

import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dngd.allocator import keep_freed_memory
from dngd.bench.child import Message
from dngd.bench.children import RankGroup, ended_by_sigterm, take_turns
from dngd.bench.cost_model import Load
from dngd.bench.graphs import open_graph
from dngd.bench.machine import describe_machine
from dngd.bench.network import INTERFACE, HostNetwork, check_tools, host_network
from dngd.bench.optimizers import IN_TRAIN, with_optimizer
from dngd.bench.progress import BenchProgress
from dngd.bench.projection import Compute, Machines, project
from dngd.bench.scale_settings import (
    joined,
    mean_compute,
    mean_step,
    measured_load,
    predict_settings,
    turn_places,
)
from dngd.bench.step import describe_config, describe_graph, enough_warmup, kfac_period
from dngd.bench.timing import whole_periods
from dngd.bench.traffic import total_bytes
from dngd.config import TrainConfig
from dngd.errors import TrainingError, UserError
from dngd.graph import GraphStore
from dngd.train.plan import batch_size_of

FIRST_ORDER_WARMUP = 10
LONGEST_TURN = 10
SETTLE_SECONDS = 0.1
"""After a change of rate."""

EMULATED_BATCH, EMULATED_FANOUT = 4, 2
"""Seeds and neighbours of a host whose compute is a sleep."""

MAX_HOSTS = 32


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
    steps: int = 30
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
    return {
        "benchmark": "scale",
        "machine": machine | {"threads": options.threads},
        "graph": describe_graph(store, split),
        "config": describe_config(config),
        **predict_settings(settings),
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
        progress.begin(3 + (1 + len(self._learners)) * len(options.hosts), "compute")

    def measure_compute(self) -> Compute:
        """Return this machine's own compute at the predictions' width: Adam and K-FAC in turns, one rank each, no
        network between them."""
        with ExitStack() as stack:
            groups = {name: self._start(stack, 1, None, name) for name in ("adam", "kfac")}
            for group in groups.values():
                group.pause()
            for name, group in groups.items():
                group.resume()
                self._learn(group, 1, name, self._options.config.hidden, emulated=False)
                group.pause()
            first = {name: {"do": "steps", "steps": self._warmup(name)} for name in groups}
            turns = self._measured("kfac") // self._turn("kfac")
            answers = take_turns(
                groups, turns, {"do": "steps", "steps": self._turn("kfac")}, first, _Counting(self._progress)
            )
        self._progress.advance(1, "compute measured")

        def mean_ms(phases: str, name: str) -> float:
            values: list[float] = [answer["ranks"][0][phases].get(name, 0.0) for answer in answers["kfac"][1:]]
            return statistics.mean(values)

        return Compute(
            source="measured on one rank on this machine's CPU, which is no GPU",
            step=mean_step(joined(answers["adam"][1:])),
            statistics=(
                mean_ms("kfac_phase_ms", "commit") + mean_ms("phase_ms", "observe") + mean_ms("phase_ms", "divergence")
            )
            / 1e3,
            precondition=mean_ms("kfac_phase_ms", "precondition") / 1e3,
            inversion=mean_ms("kfac_phase_ms", "refresh") / 1e3 * self._options.config.kfac.inverse_update_period,
        )

    def measure_settings(self) -> list[dict[str, Any]]:
        """Return every setting with its calibration and its measured step time."""
        settings: list[dict[str, Any]] = []
        computed: dict[tuple[str, int], float] = {}
        for hosts in sorted(self._options.hosts):
            emulated = hosts not in self._real
            with host_network(hosts) as network, ExitStack() as stack:
                group = self._start(stack, hosts, network, f"{hosts} hosts")
                for optimizer, width in self._learners:
                    self._learn(group, hosts, optimizer, width, emulated=emulated)
                    target = computed[optimizer, width] if emulated else None
                    calibration, step_seconds = self._measure(group, network, hosts, optimizer, target)
                    computed.setdefault((optimizer, width), calibration.compute_seconds)
                    for megabits, seconds in step_seconds.items():
                        settings.append(
                            {
                                "hosts": hosts,
                                "megabits": megabits,
                                "optimizer": optimizer,
                                "width": width,
                                "compute_is": "a sleep" if emulated else "real",
                                "steps": self._measured(optimizer),
                                "step_seconds": seconds,
                                "compute_seconds": calibration.compute_seconds,
                                "slept_seconds": calibration.slept_seconds,
                                "stands_for_seconds": target,
                                "unlimited_step_seconds": calibration.step_seconds,
                                "load": asdict(calibration.load),
                                "bytes_a_step": dict(calibration.bytes_a_step),
                            }
                        )
                    self._progress.advance(1, f"{hosts} hosts, {optimizer} {width}")
        return settings

    def _measure(
        self, group: RankGroup, network: HostNetwork, hosts: int, optimizer: str, target: float | None
    ) -> tuple[Calibration, dict[float, float]]:
        """Return a world's calibration, and its mean step at each rate. target: what a step is to compute, the
        difference being slept; None: as it is.

        No limit and the rates take turns of a few steps, so that what else the machine does falls on all alike.
        """
        network.limit(None)
        warm = self._steps(group, self._warmup(optimizer))
        losses = {rank["loss"] for rank in warm["ranks"]}
        if len(losses) > 1:
            raise TrainingError(f"ranks of one world report losses {sorted(losses)} of one step; they must be equal")
        slept = 0.0
        if target is not None:
            # Where even a few seeds take longer, the step computes more than it stands for; what it does is measured.
            slept = max(0.0, target - mean_compute(self._steps(group, self._measured(optimizer))))
        rates: list[float | None] = [None, *self._options.megabits]
        answers: list[list[Message]] = [[] for _ in rates]
        turn, steps = self._turn(optimizer), self._measured(optimizer)
        for place in turn_places(steps // turn, len(rates)):
            network.limit(rates[place])
            # All collectives have ended; what still waits in a queue leaves it.
            time.sleep(SETTLE_SECONDS)
            answers[place].append(self._steps(group, turn, slept))
        found = [joined(own) for own in answers]
        by_kind = total_bytes([rank["bytes"] for rank in found[0]["ranks"]])
        calibration = Calibration(
            compute_seconds=mean_compute(found[0]),
            step_seconds=mean_step(found[0]),
            load=measured_load(by_kind, found[0]["ranks"][0]["calls"], hosts, steps),
            bytes_a_step={kind: size / steps for kind, size in by_kind.items()},
            slept_seconds=slept,
        )
        return calibration, {rate: mean_step(own) for rate, own in zip(self._options.megabits, found[1:])}

    def _start(self, stack: ExitStack, hosts: int, network: HostNetwork | None, name: str) -> RankGroup:
        options = self._options
        config = _of_hosts(options.config, hosts).model_dump(mode="json")
        setups = [
            {
                "part": "rank",
                "rank": rank,
                "world_size": hosts,
                "rendezvous": str(self._folder / f"rendezvous-{name.replace(' ', '-')}"),
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
        group = RankGroup(name, setups, environment, prefixes)
        stack.callback(group.close)
        group.wait_until_ready()
        self._progress.advance(1, f"{name} started")
        return group

    def _learn(self, group: RankGroup, hosts: int, optimizer: str, width: int, *, emulated: bool) -> None:
        config = with_optimizer(_of_hosts(self._options.config, hosts), optimizer, None)
        changes: dict[str, Any] = {"hidden": width}
        if emulated:
            changes |= {"batch_size": EMULATED_BATCH, "fanout": (EMULATED_FANOUT,) * config.num_layers}
        config = config.model_copy(update=changes)
        group.ask({"do": "learn", "optimizer": optimizer, "config": config.model_dump(mode="json")})

    def _steps(self, group: RankGroup, steps: int, sleep_seconds: float = 0.0) -> Message:
        return group.ask({"do": "steps", "steps": steps, "sleep_seconds": sleep_seconds})

    def _warmup(self, optimizer: str) -> int:
        return enough_warmup(self._options.config.kfac) if optimizer == "kfac" else FIRST_ORDER_WARMUP

    def _measured(self, optimizer: str) -> int:
        steps = self._options.steps
        return whole_periods(steps, kfac_period(self._options.config)) if optimizer == "kfac" else steps

    def _turn(self, optimizer: str) -> int:
        steps = self._measured(optimizer)
        return max(size for size in range(1, LONGEST_TURN + 1) if steps % size == 0)


class _Counting(BenchProgress):
    """Draws what is at work without counting it: turns are one step of the whole."""

    def __init__(self, whole: BenchProgress) -> None:
        self._whole = whole

    def advance(self, steps: int, text: str) -> None:
        self._whole.advance(0, text)

    def skip(self, steps: int) -> None:
        return None
