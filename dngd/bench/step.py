"""`dngd bench step`: the time of a training step, optimizer by optimizer, taken in turns on the same batches.

One stream of sampled mini-batches (an epoch's smaller last one is left out); on each of them every optimizer, with
its own copy of the same initial model, takes one step, in an order that rotates from batch to batch. What else the
machine does falls on all alike, which a run of one optimizer after the other cannot promise. Batches are drawn between
the timed steps, in this process. On a GPU, which holds the features, batches are put there between the timed steps too,
and a step's time ends when the GPU has done its work.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dngd.allocator import keep_freed_memory
from dngd.bench.device import features_on, wait_for
from dngd.bench.graphs import open_graph
from dngd.bench.learner import Batch, Learner, initial_model
from dngd.bench.machine import describe_machine, torch_threads
from dngd.bench.optimizers import BASELINE, base_rate, check_optimizers
from dngd.bench.progress import BenchProgress
from dngd.bench.timing import ratios_to, summary_ms, turn_order, whole_periods
from dngd.config import KFACConfig, TrainConfig
from dngd.errors import TrainingError, UserError
from dngd.graph import GraphStore, Split
from dngd.sampling import MiniBatch, SamplerPipeline
from dngd.train.batch import DeviceBatch, PropagationBuilder
from dngd.train.optimizers import TrainingSet
from dngd.train.plan import batch_size_of, device_of

LEAST_WARMUP = 60


@dataclass(frozen=True)
class StepOptions:
    """What to time.

    config: data set, model, batches, K-FAC settings, seed; its optimizer, learning rate and epochs do not matter.
    steps: measured ones, rounded up to whole periods (`kfac_period`). warmup: steps before them; None: enough.
    threads: of torch; None as they are. scale: of products-shaped.
    """

    config: TrainConfig
    optimizers: Sequence[str] = ("adam", "kfac")
    steps: int = 200
    warmup: int | None = None
    threads: int | None = None
    scale: float = 1.0


def enough_warmup(kfac: KFACConfig) -> int:
    """Return the steps before K-FAC's steady state: its first dense_steps steps all measure factors, and below the
    first inverse_update_period inverses are renewed at powers of two; never fewer than 60, in which also the
    feature table's pages are mapped and allocators and thread pools are warm."""
    return max(LEAST_WARMUP, kfac.dense_steps, kfac.inverse_update_period)


def kfac_period(config: TrainConfig) -> int:
    """Return the steps after which K-FAC's costly ones recur: new inverses, and measured divergences if there are (but
    for those at powers of two)."""
    subject = config.model_copy(update={"optimizer": "kfac"})
    inverses = config.kfac.inverse_update_period
    return inverses if subject.kl_bound is None else math.lcm(inverses, config.kfac.kl_bound_period)


def run_step_bench(options: StepOptions, progress: BenchProgress | None = None) -> dict[str, Any]:
    """Take the steps and return the measurements as plain data.

    Raises UserError for options that cannot be, TrainingError when an optimizer's gradients are not finite: a
    dropped step's time is not a step's.
    """
    progress = progress or BenchProgress()
    names = check_optimizers(options.optimizers)
    config = options.config
    warmup = enough_warmup(config.kfac) if options.warmup is None else options.warmup
    for flag, value, least in (("steps", options.steps, 1), ("warmup", warmup, 0)):
        if value < least:
            raise UserError(f"{flag}={value} is too small; give at least {least}")
    period = kfac_period(config)
    measured = whole_periods(options.steps, period)
    device = device_of(config)
    progress.message(f"opening {config.dataset} (a generated graph is made on first use and kept)")
    store = open_graph(config.dataset, config.data_root_in_use, config.cache_dir, options.scale)
    split = store.split(config.split, config.seed)
    with torch_threads(options.threads):
        machine = describe_machine(keeps_memory=keep_freed_memory(), device=device)
        learners = _learners(names, config, store)
        try:
            stream = _take_steps(learners, config, store, split, warmup, measured, progress)
            results = {learner.name: _result(learner) for learner in learners}
        finally:
            for learner in learners:
                learner.close()
    return {
        "benchmark": "step",
        "machine": machine,
        "graph": describe_graph(store, split),
        "config": describe_config(config) | {"learning_rates": {x.name: x.lr for x in learners}},
        "steps": {
            "asked": options.steps,
            "measured": measured,
            "whole_period": period,
            "warmup": warmup,
            "warmup_covers_start": warmup >= enough_warmup(config.kfac),
        },
        "stream": stream,
        "optimizers": results,
        "ratios_to_adam": ratios_to(BASELINE, results),
    }


def describe_graph(store: GraphStore, split: Split) -> dict[str, Any]:
    """Return what the graph is, as plain data."""
    parts = {"train": split.train, "val": split.val, "test": split.test}
    return {
        "name": store.name,
        "digest": store.digest,
        "num_nodes": store.num_nodes,
        "num_edges": store.num_edges,
        "num_features": store.num_features,
        "num_classes": store.num_classes,
        "split": split.spec,
        "split_sizes": {name: int(nodes.numel()) for name, nodes in parts.items()},
    }


def describe_config(config: TrainConfig) -> dict[str, Any]:
    """Return the fields that a benchmark's work depends on, as plain data; K-FAC's damping and bound as in use."""
    names = ("dataset", "split", "model", "hidden", "num_layers", "dropout", "batch_size", "seed", "weight_decay")
    dumped = config.model_dump(mode="json")
    subject = config.model_copy(update={"optimizer": "kfac"})
    in_use = {"damping_mode": subject.damping_mode, "kl_bound": subject.kl_bound, "kl_clip": subject.kl_clip}
    kfac = dumped["kfac"] | in_use
    return {name: dumped[name] for name in names} | {"fanout": list(config.fanouts), "kfac": kfac}


def _learners(names: Sequence[str], config: TrainConfig, store: GraphStore) -> list[Learner]:
    model = initial_model(config, store)
    learners: list[Learner] = []
    features = features_on(device_of(config), store)
    training_set = TrainingSet(int(store.split(config.split, config.seed).train.numel()), store.num_classes)
    for name in names:
        # The operators come from the whole graph's degrees, which are read once for all.
        builder = learners[0].builder if learners else PropagationBuilder(store, model.aggregation, features.device)
        rate = base_rate(name, config)
        learners.append(Learner(name, config, rate, model, features, builder, training_set=training_set))
    return learners


def _take_steps(
    learners: Sequence[Learner],
    config: TrainConfig,
    store: GraphStore,
    split: Split,
    warmup: int,
    measured: int,
    progress: BenchProgress,
) -> dict[str, Any]:
    """Let every learner step on every batch; return what the stream of batches was like."""
    period = kfac_period(config)
    num_seeds, num_edges, num_input_rows = [], [], []
    batch_size = batch_size_of(config, int(split.train.numel()))
    device = device_of(config)
    progress.begin(warmup + measured, "warm-up")
    with SamplerPipeline(
        store, split.train, config.fanouts, config.seed, 1, batch_size, [0], num_samplers=0, prefetch=0
    ) as pipeline:
        # An epoch's last batch may hold a few seeds only: its time is not that of a step.
        batches = (batch for batch in pipeline if batch.seeds.numel() == batch_size)
        for number in range(warmup + measured):
            if number == warmup:
                for learner in learners:
                    learner.start_clock()
            mini_batch = next(batches)
            content: MiniBatch | DeviceBatch = mini_batch
            if device.type == "cuda":
                content = learners[0].builder.batch(mini_batch)
                wait_for(device)
            for place in turn_order(number, len(learners), period):
                learner = learners[place]
                learner.step(Batch(content, mini_batch.coordinates), learner.lr, alone=True)
                if learner.dropped_steps:
                    raise TrainingError(
                        f"{learner.name} had non-finite gradients at step {number}, so that it cannot be timed; its "
                        f"learning rate is {learner.lr:g}: check its settings and the features (dngd data verify)"
                    )
            if number >= warmup:
                num_seeds.append(int(mini_batch.seeds.numel()))
                num_edges.append(mini_batch.num_edges)
                num_input_rows.append(mini_batch.layers[0].num_dst)
            progress.advance(1, "warm-up" if number < warmup else "measuring")
        drawn_here = not pipeline.pids
    return {
        "sampling": "in this process, between the timed steps"
        if drawn_here
        else "in a child process, also while steps are timed: DGL was in use in this process before",
        "mean_seeds": sum(num_seeds) / measured,
        "mean_edges": sum(num_edges) / measured,
        "mean_first_layer_rows": sum(num_input_rows) / measured,
    }


def _result(learner: Learner) -> dict[str, Any]:
    state = learner.competitor.state_bytes()
    return {
        **summary_ms(learner.clock.step_seconds),
        "phase_ms": learner.clock.phase_ms(),
        "kfac_phase_ms": learner.kfac_phase_ms(),
        "state_bytes": state,
        "parameter_bytes": learner.parameter_bytes,
        "state_over_parameters": state / learner.parameter_bytes,
        "learning_rate": learner.lr,
        "settings": learner.competitor.settings(),
        "step_ms": [round(seconds * 1e3, 4) for seconds in learner.clock.step_seconds],
    }
