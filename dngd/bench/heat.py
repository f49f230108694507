"""One heat: several settings trained on one graph with one seed, in turns, each evaluated at the same steps.

Each setting has its own model (equal at the start), optimizer and batches drawn ahead; settings with one batch size see
the same batches. The clock runs while a setting has its turn, waits for its sampler included; exact evaluation (all
neighbours) is off it. Before a turn ends the sampler has drawn all it may, so that it does not work in another
setting's time: `prefetch` batches a turn, of each sampler, cost no wait, for all settings alike; the draw of a run's
first batch is on its clock. On a GPU, where a few sampler processes draw, that is most of them: what is compared there
is training, with sampling nearly free.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from torch import Tensor

from dngd.bench.competitors import Setting
from dngd.bench.device import features_on
from dngd.bench.graphs import open_graph
from dngd.bench.learner import Batch, Learner, initial_model
from dngd.bench.runs import Feed, FullFeed, GpuFeed, Run, RunRecord, SampledFeed, evaluation_steps, interleaved, slices
from dngd.bench.scoring import Metric, Scorer, choose_metric
from dngd.comm import LocalCommunicator
from dngd.config import TrainConfig
from dngd.graph import GraphStore, Split
from dngd.models import GNN, SparseRows
from dngd.sampling import BatchCoordinates, SamplerPipeline, steps_per_epoch
from dngd.train.batch import PropagationBuilder
from dngd.train.evaluation import ExactEvaluator
from dngd.train.full_batch import FullBatches
from dngd.train.optimizers import TrainingSet
from dngd.train.placement import PlacedFeatures, with_sparse
from dngd.train.plan import batch_size_of, device_of

LONGEST_TURN = 50
WARMUP_STEPS = 4
TIMED_DRAWS = 5
GPU_SAMPLERS = 4

Advance = Callable[[int, str], None]
"""Called after each turn with the steps taken and the setting's label."""


@dataclass(frozen=True)
class Track:
    """A graph, split by one seed, and a model: what a heat is run on."""

    config: TrainConfig
    store: GraphStore
    split: Split
    metric: Metric
    model: GNN
    builder: PropagationBuilder
    scorer: Scorer
    features: Tensor
    """Where it is trained: on the machine, or on the GPU."""
    sparse: SparseRows | None = None
    """The table's entries, where the first layer works on these alone, as in a run."""
    warm: set[tuple[str, int]] = field(default_factory=set)
    """Optimizers and batch sizes that have taken steps before: the first ones pay for what is set up but once."""
    draw_seconds: dict[int, float] = field(default_factory=dict)
    """Of one batch, by batch size; 0 for the full batch, which is not drawn."""

    @property
    def num_train(self) -> int:
        """The number of training nodes."""
        return int(self.split.train.numel())

    def own_config(self, setting: Setting) -> TrainConfig:
        """Return a setting's whole configuration."""
        return setting.config(self.config, self.config.seed)

    def batch_size(self, setting: Setting) -> int:
        """Return a setting's seeds a step."""
        return batch_size_of(self.own_config(setting), self.num_train)

    def steps_per_epoch(self, setting: Setting) -> int:
        """Return a setting's steps an epoch."""
        return steps_per_epoch(self.num_train, 1, self.batch_size(setting))

    def total_steps(self, setting: Setting) -> int:
        """Return a setting's steps."""
        own = self.own_config(setting)
        total = self.steps_per_epoch(setting) * own.epochs
        return min(total, own.max_steps or total)


def open_track(config: TrainConfig, metric: str = "auto", scale: float = 1.0) -> Track:
    """Open a configuration's graph, split it, and make the model. Raises UserError for what cannot be.

    metric: as of choose_metric. scale: of the graph products-shaped.
    """
    store = open_graph(config.dataset, config.data_root_in_use, config.cache_dir, scale)
    split = store.split(config.split, config.seed)
    model = initial_model(config, store)
    device = device_of(config)
    features = features_on(device, store)
    builder = PropagationBuilder(store, model.aggregation, device)
    sparse = with_sparse(PlacedFeatures("memory_map", features), config, store, model).sparse
    evaluator = ExactEvaluator(
        store, builder, LocalCommunicator(), rows=config.eval_rows, device=device, features=features, sparse=sparse
    )
    chosen = choose_metric(metric, store)
    scorer = Scorer(evaluator, store, split, chosen)
    return Track(config, store, split, chosen, model, builder, scorer, features, sparse)


def run_heat(
    track: Track, settings: Sequence[Setting], every: int | None, density: int, advance: Advance
) -> list[RunRecord]:
    """Train all settings in turns; return the finished runs' records, in the settings' order.

    every, density: as of evaluation_steps.
    """
    full = _full_batch(track) if track.config.constant_full_batch else None
    _warm_up(track, settings, full)
    points = [evaluation_steps(track.total_steps(setting), every, density) for setting in settings]
    evaluated = [set(own) for own in points]
    with ExitStack() as stack:
        runs: list[Run] = []
        for setting in settings:
            own = track.own_config(setting)
            feed = full or _feed(track, setting)
            learner = _learner(track, setting, own)
            first_draw = track.draw_seconds[track.batch_size(setting)]
            runs.append(Run(setting, own, learner, feed, track.steps_per_epoch(setting), seconds=first_draw))
            stack.callback(runs[-1].close)
        for run in runs:
            run.evaluate(track.scorer)
            run.feed.start()
        for place, last_step in interleaved([slices(own, LONGEST_TURN) for own in points]):
            run = runs[place]
            taken = last_step - run.step
            run.advance(last_step)
            run.feed.settle()
            if last_step in evaluated[place]:
                run.evaluate(track.scorer)
            advance(taken, run.setting.label)
        return [run.record() for run in runs]


def _pipeline(
    track: Track, setting: Setting, *, ahead: bool, on_mapped: Callable[[Tensor], None] | None = None
) -> SamplerPipeline:
    config = track.config
    return SamplerPipeline(
        track.store,
        track.split.train,
        config.fanouts,
        config.seed,
        1,
        track.batch_size(setting),
        [0],
        num_samplers=samplers_of(config) if ahead else 0,
        prefetch=config.prefetch if ahead else 0,
        timeout_seconds=config.collective_timeout_seconds,
        # On a GPU that holds the table, the first rows are taken there.
        aggregation=track.model.aggregation if track.features.device.type == "cpu" else None,
        on_mapped=on_mapped,
        sparse=track.sparse,
    )


def samplers_of(config: TrainConfig) -> int:
    """Return the samplers of each setting: those asked for, or a thread on a CPU and a few processes on a GPU, which
    all settings of a heat have at once."""
    return GPU_SAMPLERS if config.use_gpu and config.num_samplers is None else config.samplers


def _feed(track: Track, setting: Setting) -> Feed:
    device = track.features.device
    if device.type == "cpu":
        return SampledFeed(_pipeline(track, setting, ahead=True))
    return GpuFeed(lambda on_mapped: _pipeline(track, setting, ahead=True, on_mapped=on_mapped), track.builder, device)


def _full_batch(track: Track) -> FullFeed:
    batches = FullBatches(
        track.store,
        track.builder,
        track.model,
        track.features,
        track.split.train,
        with_unlabelled=False,
        shards=[0],
        num_shards=1,
        rows=track.config.eval_rows,
        device=track.features.device,
        sparse=track.sparse,
    )
    return FullFeed(batches.batch(0, 0, 0))


def _learner(track: Track, setting: Setting, own: TrainConfig) -> Learner:
    return Learner(
        setting.optimizer,
        own,
        setting.lr,
        track.model,
        track.features,
        track.builder,
        training_set=TrainingSet(track.num_train, track.store.num_classes),
    )


def _warm_up(track: Track, settings: Sequence[Setting], full: FullFeed | None) -> None:
    """Take a few steps of each new optimizer and batch size on throw-away copies, off any clock, and time draws."""
    for setting in settings:
        kind = (setting.optimizer, track.batch_size(setting))
        if kind in track.warm:
            continue
        track.warm.add(kind)
        if full is not None:
            batches = [full.next(BatchCoordinates(0, 0, 0))] * WARMUP_STEPS
            track.draw_seconds[kind[1]] = 0.0
        else:
            with _pipeline(track, setting, ahead=False) as pipeline:
                drawn = [next(pipeline) for _ in range(WARMUP_STEPS)]
                if kind[1] not in track.draw_seconds:
                    track.draw_seconds[kind[1]] = statistics.median(_draw_seconds(pipeline) for _ in range(TIMED_DRAWS))
            batches = [Batch(mini_batch, mini_batch.coordinates) for mini_batch in drawn]
        own = track.own_config(setting)
        learner = _learner(track, setting, own)
        for batch in batches:
            learner.step(batch, setting.lr, alone=True)
        learner.close()


def _draw_seconds(pipeline: SamplerPipeline) -> float:
    started = time.perf_counter()
    next(pipeline)
    return time.perf_counter() - started
