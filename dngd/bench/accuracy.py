"""`dngd bench accuracy`: seconds and steps to a validation accuracy, optimizer by optimizer, taken in turns.

All settings of one data set and seed train side by side in short turns of steps, in an order that rotates, each
with its own model (equal at the start), optimizer and sampler process; every one sees the same batches. The clock
runs while a setting has its turn, waits for its sampler included; exact evaluation (all neighbours, all at the same
steps) and the samplers' start are off it. Before a turn the samplers have drawn all they may, so that none works in
another setting's time: `prefetch` batches a turn cost no wait, for all settings alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from dngd.allocator import keep_freed_memory
from dngd.bench.competitors import Setting, make_settings
from dngd.bench.curves import Curve, compare_groups, default_targets, first_reach, mean_curve, spread
from dngd.bench.graphs import open_graph
from dngd.bench.learner import Batch, Learner, initial_model
from dngd.bench.machine import describe_machine, torch_threads
from dngd.bench.optimizers import BASELINE
from dngd.bench.progress import BenchProgress
from dngd.bench.runs import FullFeed, Run, RunRecord, SampledFeed, evaluation_steps, slices
from dngd.bench.step import describe_config, describe_graph
from dngd.bench.timing import turn_order
from dngd.comm import LocalCommunicator
from dngd.config import TrainConfig
from dngd.errors import UserError
from dngd.graph import GraphStore, Split
from dngd.models import GNN
from dngd.sampling import BatchCoordinates, SamplerPipeline, steps_per_epoch
from dngd.train.batch import PropagationBuilder
from dngd.train.evaluation import ExactEvaluator
from dngd.train.full_batch import FullBatches
from dngd.train.plan import batch_size_of

LEAST_EVALUATIONS = 20
LONGEST_TURN = 50
WARMUP_STEPS = 2


@dataclass(frozen=True)
class AccuracyOptions:
    """What to compare.

    config: everything that the settings share; its dataset, seed, optimizer and learning rate do not matter.
    rates: "adam=1e-3,3e-3;kfac=0.1". variants: "name:kfac.key=value,...;...". eval_steps: steps between evaluations;
    None: 20 evaluations a run. targets: validation accuracies; None: the best of Adam, and 0.005 below.
    """

    config: TrainConfig
    datasets: Sequence[str]
    optimizers: Sequence[str] = ("kfac", "adam")
    seeds: Sequence[int] = (0, 1, 2)
    rates: str | None = None
    variants: str | None = None
    eval_steps: int | None = None
    targets: Sequence[float] | None = None
    threads: int | None = None


@dataclass(frozen=True)
class _Work:
    """One data set and seed, ready to be trained on."""

    config: TrainConfig
    store: GraphStore
    split: Split
    batch_size: int
    per_epoch: int
    total_steps: int


def run_accuracy_bench(options: AccuracyOptions, progress: BenchProgress | None = None) -> dict[str, Any]:
    """Train every setting on every data set and return curves, targets and comparisons as plain data.

    Raises UserError for options that cannot be, before anything is trained.
    """
    progress = progress or BenchProgress()
    settings = make_settings(options.config, options.optimizers, options.rates, options.variants)
    if options.targets is None and all(setting.group != BASELINE for setting in settings):
        raise UserError(
            f"targets come from {BASELINE}'s best accuracy, which takes no part; give --targets, or add {BASELINE}"
        )
    if not options.datasets:
        raise UserError("no data set is named; give --datasets, e.g. --datasets products-mini")
    works = {name: [_prepare(options, name, seed) for seed in options.seeds] for name in options.datasets}
    every = {name: _eval_steps(options, work[0].total_steps) for name, work in works.items()}
    datasets = {}
    with torch_threads(options.threads):
        machine = describe_machine(keeps_memory=keep_freed_memory())
        total = sum(work.total_steps for name in works for work in works[name]) * len(settings)
        progress.begin(total, "starting")
        for name, of_seeds in works.items():
            runs = [run for work in of_seeds for run in _train(work, settings, every[name], progress)]
            datasets[name] = {
                "graph": describe_graph(of_seeds[0].store, of_seeds[0].split),
                "batch_size": of_seeds[0].batch_size,
                "steps_per_epoch": of_seeds[0].per_epoch,
                "total_steps": of_seeds[0].total_steps,
                "eval_steps": every[name],
                **_summary(settings, runs, options.targets),
            }
    shared = {k: v for k, v in describe_config(options.config).items() if k not in ("dataset", "seed")}
    schedule = {
        k: getattr(options.config, k) for k in ("epochs", "max_steps", "lr_schedule", "warmup_steps", "prefetch")
    }
    return {
        "benchmark": "accuracy",
        "machine": machine,
        "config": shared | schedule | {"seeds": list(options.seeds), "datasets": list(options.datasets)},
        "datasets": datasets,
    }


def _prepare(options: AccuracyOptions, dataset: str, seed: int) -> _Work:
    config = options.config.model_copy(update={"dataset": dataset, "seed": seed})
    store = open_graph(dataset, config.data_root_in_use, config.cache_dir)
    split = store.split(config.split, seed)
    batch_size = batch_size_of(config, int(split.train.numel()))
    per_epoch = steps_per_epoch(int(split.train.numel()), 1, batch_size)
    total = min(per_epoch * config.epochs, config.max_steps or per_epoch * config.epochs)
    return _Work(config, store, split, batch_size, per_epoch, total)


def _eval_steps(options: AccuracyOptions, total_steps: int) -> int:
    every = options.eval_steps
    if every is None:
        return max(1, total_steps // LEAST_EVALUATIONS)
    if not 1 <= every <= total_steps:
        raise UserError(f"eval_steps={every} is out of range; a run has {total_steps} steps: give 1 to {total_steps}")
    return every


def _train(work: _Work, settings: Sequence[Setting], every: int, progress: BenchProgress) -> list[RunRecord]:
    """Train all settings of one data set and seed in turns; return the finished runs' records."""
    store, config = work.store, work.config
    model = initial_model(config, store)
    builder = PropagationBuilder(store, model.aggregation, store.labels.device)
    evaluator = ExactEvaluator(
        store, builder, LocalCommunicator(), rows=config.eval_rows, device=store.labels.device, features=store.features
    )
    full = _full_batch(work, model, builder) if config.constant_full_batch else None
    _warm_up(work, settings, model, builder, full)
    points = set(evaluation_steps(work.total_steps, every))
    with ExitStack() as stack:
        runs: list[Run] = []
        for setting in settings:
            own = setting.config(config, config.seed)
            feed = full or SampledFeed(_pipeline(work, num_samplers=1))
            learner = Learner(
                setting.optimizer,
                own,
                setting.lr,
                model,
                store.features,
                builder,
                num_training_nodes=int(work.split.train.numel()),
            )
            runs.append(Run(setting, own, learner, feed, work.per_epoch))
            stack.callback(runs[-1].close)

        def evaluate(run: Run) -> None:
            run.evaluate(lambda learner: evaluator.scores(learner.model, work.split))

        for run in runs:
            evaluate(run)
            run.feed.start()
        for number, last_step in enumerate(slices(sorted(points), LONGEST_TURN)):
            for place in turn_order(number, len(runs), len(runs)):
                run = runs[place]
                taken = last_step - run.step
                run.advance(last_step)
                run.feed.settle()
                if last_step in points:
                    evaluate(run)
                progress.advance(taken, f"{store.name} seed {config.seed} {run.setting.label}")
        return [run.record() for run in runs]


def _pipeline(work: _Work, num_samplers: int) -> SamplerPipeline:
    config = work.config
    return SamplerPipeline(
        work.store,
        work.split.train,
        config.fanouts,
        config.seed,
        1,
        work.batch_size,
        [0],
        num_samplers=num_samplers,
        # Without a process of its own sampling must not go on while a step is timed.
        prefetch=config.prefetch if num_samplers else 0,
        timeout_seconds=config.collective_timeout_seconds,
    )


def _full_batch(work: _Work, model: GNN, builder: PropagationBuilder) -> FullFeed:
    batches = FullBatches(
        work.store,
        builder,
        model,
        work.store.features,
        work.split.train,
        with_unlabelled=False,
        shards=[0],
        num_shards=1,
        rows=work.config.eval_rows,
    )
    return FullFeed(batches.batch(0, 0, 0))


def _warm_up(
    work: _Work, settings: Sequence[Setting], model: GNN, builder: PropagationBuilder, full: FullFeed | None
) -> None:
    """Take two steps of each setting on throw-away copies: the first run would pay for what is set up but once."""
    if full is not None:
        batches = [full.next(BatchCoordinates(0, 0, 0))] * WARMUP_STEPS
    else:
        with _pipeline(work, num_samplers=0) as pipeline:
            drawn = [next(pipeline) for _ in range(WARMUP_STEPS)]
        batches = [Batch(mini_batch, mini_batch.coordinates) for mini_batch in drawn]
    for setting in settings:
        own = setting.config(work.config, work.config.seed)
        learner = Learner(setting.optimizer, own, setting.lr, model, work.store.features, builder)
        for batch in batches:
            learner.step(batch, setting.lr, alone=True)
        learner.close()


def _summary(settings: Sequence[Setting], runs: Sequence[RunRecord], targets: Sequence[float] | None) -> dict[str, Any]:
    """Return a data set's settings, targets and comparison."""
    of_setting = {s.label: [run for run in runs if run.label == s.label] for s in settings}
    means = {label: mean_curve([run.curve for run in own]) for label, own in of_setting.items()}
    groups: dict[str, dict[str, Curve]] = {}
    for setting in settings:
        groups.setdefault(setting.group, {})[setting.label] = means[setting.label]
    if targets is None:
        targets = default_targets(list(groups[BASELINE].values()))
    return {
        "targets": list(targets),
        "comparison": compare_groups(groups, targets, BASELINE),
        "settings": {s.label: _setting_summary(s, of_setting[s.label], means[s.label], targets) for s in settings},
    }


def _setting_summary(
    setting: Setting, runs: Sequence[RunRecord], mean: Curve, targets: Sequence[float]
) -> dict[str, Any]:
    best = max(range(len(mean.accuracy)), key=lambda i: mean.accuracy[i])
    reached = []
    for target in targets:
        reach = first_reach(mean, target)
        reached.append(
            {
                "target": target,
                "seconds": reach and reach.seconds,
                "steps": reach and reach.steps,
                "first_evaluation_at_or_above": reach and reach.evaluation_step,
                "seeds_that_reach_it": sum(first_reach(run.curve, target) is not None for run in runs),
            }
        )
    return {
        "group": setting.group,
        "optimizer": setting.optimizer,
        "lr": setting.lr,
        "overrides": dict(setting.overrides),
        "final": spread([run.curve.accuracy[-1] for run in runs]),
        "best": spread([run.curve.accuracy[best] for run in runs]) | {"step": mean.steps[best]},
        "test_at_best": spread([run.test_accuracy[best] for run in runs]),
        "train_seconds": spread([run.curve.seconds[-1] for run in runs]),
        "targets": reached,
        "mean_curve": {"step": list(mean.steps), "seconds": list(mean.seconds), "val_accuracy": list(mean.accuracy)},
        "runs": [run.data for run in runs],
    }
