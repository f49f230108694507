"""One training run that can be paused: a competitor, its batches, its clock, its curve."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from dngd.bench.competitors import Setting
from dngd.bench.curves import LEAST_EVALUATIONS, Curve
from dngd.bench.device import wait_for
from dngd.bench.learner import Batch, Learner
from dngd.bench.scoring import Scored
from dngd.bench.timing import turn_order
from dngd.config import TrainConfig
from dngd.models import GNN
from dngd.optim import learning_rate
from dngd.sampling import BatchCoordinates, MiniBatch, SamplerPipeline
from dngd.train.batch import DeviceBatch, PropagationBuilder
from dngd.train.feeder import CudaCopyStream, DeviceFeeder
from dngd.train.metrics import StepClock
from dngd.train.optimizers import evaluated_weights
from dngd.train.page_lock import CudaHostRegistration, PageLockedMemory

SETTLE_POLL_SECONDS = 0.001
SETTLE_LIMIT_SECONDS = 60.0


class Feed(Protocol):
    """Where a run's batches come from."""

    def start(self) -> None:
        """Wait until batches are drawn ahead; the clock is not on."""

    def next(self, coordinates: BatchCoordinates) -> Batch:
        """Return the next batch, which must be the one at these coordinates."""

    def look_ahead(self) -> None:
        """Hear that a step on the batch handed out last has been given to the device: time for the next one."""

    def settle(self) -> None:
        """Wait until nothing works in others' time."""

    def close(self) -> None:
        """End what draws."""


class SampledFeed:
    """Batches drawn ahead of use: by the process's sampling thread, as dngd train does on a CPU, or, where that cannot
    be (DGL's generator was used in another thread before), by a sampler process."""

    def __init__(self, pipeline: SamplerPipeline) -> None:
        self._pipeline = pipeline
        self._first: MiniBatch | None = None

    def start(self) -> None:
        """Wait until the sampler has started, which the first batch tells, and has drawn ahead; the clock is not on."""
        self._first = next(self._pipeline)
        self.settle()

    def next(self, coordinates: BatchCoordinates) -> Batch:
        """Return the next batch, which must be the one at these coordinates."""
        mini_batch, self._first = self._first or next(self._pipeline), None
        assert mini_batch.coordinates == coordinates, f"{mini_batch.coordinates} is not {coordinates}"
        return Batch(mini_batch, coordinates)

    def look_ahead(self) -> None:
        """Nothing is copied."""

    def settle(self) -> None:
        """Wait until the sampler has drawn all that it may draw ahead, so that it does not work in others' time."""
        settle(self._pipeline)

    def close(self) -> None:
        """End the sampler process."""
        self._pipeline.close()


class GpuFeed:
    """Batches from sampler processes, copied to a GPU ahead of use, as dngd train does there.

    pipeline: makes the sampler's, given what page-locks its memory. builder: for the device.
    """

    def __init__(
        self,
        pipeline: Callable[[Callable[[Tensor], None]], SamplerPipeline],
        builder: PropagationBuilder,
        device: torch.device,
    ) -> None:
        self._stack = contextlib.ExitStack()
        self._first: DeviceBatch | None = None
        with contextlib.ExitStack() as stack:
            locked = stack.enter_context(PageLockedMemory(CudaHostRegistration(device)))
            self._pipeline = stack.enter_context(pipeline(locked.add))
            # What it waits for is on the run's clock.
            feeder = DeviceFeeder(self._pipeline, builder, StepClock(), CudaCopyStream(device))
            self._feeder = stack.enter_context(feeder)
            self._stack = stack.pop_all()

    def start(self) -> None:
        """Wait for the first batch, and until the samplers have drawn ahead."""
        self._first = self._feeder.batch(0, 0, 0)
        self.settle()

    def next(self, coordinates: BatchCoordinates) -> Batch:
        """Return the next batch, there once its copy, which the GPU waits for, has ended."""
        batch, self._first = self._first, None
        if batch is None:
            batch = self._feeder.batch(coordinates.epoch, coordinates.step, coordinates.shard)
        return Batch(batch, coordinates)

    def look_ahead(self) -> None:
        """Start copying the next batch, if it has been drawn."""
        self._feeder.look_ahead()

    def settle(self) -> None:
        """Wait until the samplers have drawn all that they may draw ahead."""
        settle(self._pipeline)

    def close(self) -> None:
        """End copies, then the samplers."""
        self._stack.close()


class FullFeed:
    """The one full batch, the same at every step."""

    def __init__(self, batch: DeviceBatch) -> None:
        self._batch = batch

    def start(self) -> None:
        """Nothing starts."""

    def next(self, coordinates: BatchCoordinates) -> Batch:
        """Return the batch."""
        return Batch(self._batch, coordinates)

    def look_ahead(self) -> None:
        """The next one is there."""

    def settle(self) -> None:
        """Nothing is drawn."""

    def close(self) -> None:
        """Nothing to end."""


@dataclass(frozen=True)
class RunRecord:
    """A finished run: its validation curve, test scores at the same steps, and everything as plain data."""

    label: str
    data: dict[str, Any]

    @property
    def curve(self) -> Curve:
        """The validation curve of the metric that is compared."""
        return Curve(*(tuple(self.data[key]) for key in ("step", "seconds", "val_score")))

    @property
    def test_scores(self) -> tuple[float, ...]:
        """The metric on the test nodes, by evaluation."""
        return tuple(self.data["test_score"])


@dataclass
class Run:
    """A setting's run with one seed. seconds: of training so far, the first batch's draw (given) and waits for the
    sampler included. idle_seconds: of the others, those that no thread of the process was on a processor: the machine
    was busy, or the process stopped."""

    setting: Setting
    config: TrainConfig
    learner: Learner
    feed: Feed
    steps_per_epoch: int
    step: int = 0
    seconds: float = 0.0
    wait_seconds: float = 0.0
    idle_seconds: float = 0.0
    evaluations: list[dict[str, Any]] = field(default_factory=list)

    def advance(self, last_step: int) -> None:
        """Take the steps up to last_step, on the clock, inversions on K-FAC's other thread waited for at the end."""
        started = time.perf_counter()
        while self.step < last_step:
            epoch, step = divmod(self.step, self.steps_per_epoch)
            lr = learning_rate(
                self.step,
                self.steps_per_epoch * self.config.epochs,
                self.config.learning_rate,
                self.config.schedule,
                self.config.warmup_steps,
                self.config.lr_half_steps,
            )
            waited = time.perf_counter()
            batch = self.feed.next(BatchCoordinates(epoch, step, 0))
            stepped, on_cpu = time.perf_counter(), time.process_time()
            self.wait_seconds += stepped - waited
            self.learner.step(batch, lr, alone=False)
            self.feed.look_ahead()
            self.idle_seconds += max(0.0, time.perf_counter() - stepped - (time.process_time() - on_cpu))
            self.step += 1
        self.learner.competitor.finish_background()
        wait_for(self.learner.device)
        self.seconds += time.perf_counter() - started

    def evaluate(self, scores: Callable[[GNN], dict[str, Scored]]) -> None:
        """Add a point to the curve, off the clock."""
        with evaluated_weights(self.learner.competitor.step_optimizer):
            found = scores(self.learner.model)
        val, test = found["val"], found["test"]
        self.evaluations.append(
            {
                "step": self.step,
                "seconds": self.seconds,
                "busy_seconds": self.seconds - self.idle_seconds,
                "val_score": val.score,
                "val_accuracy": val.accuracy,
                "val_loss": val.loss if math.isfinite(val.loss) else None,
                "test_score": test.score,
                "test_accuracy": test.accuracy,
            }
        )

    def record(self) -> RunRecord:
        """Return what is kept of the run when its model is gone."""
        columns = {key: [e[key] for e in self.evaluations] for key in self.evaluations[0]}
        data = {
            "seed": self.config.seed,
            **columns,
            "train_seconds": self.seconds,
            "sample_wait_seconds": self.wait_seconds,
            "idle_seconds": self.idle_seconds,
            "step_ms": self.learner.clock.step_ms(),
            "phase_ms": self.learner.clock.phase_ms(),
            "dropped_steps": self.learner.dropped_steps,
        }
        return RunRecord(self.setting.label, data)

    def close(self) -> None:
        """End the sampler and release the model."""
        self.feed.close()
        self.learner.close()


def settle(pipeline: SamplerPipeline) -> None:
    """Wait until a pipeline's samplers have drawn all that they may draw ahead; a minute at most."""
    give_up = time.monotonic() + SETTLE_LIMIT_SECONDS
    while not pipeline.is_idle and time.monotonic() < give_up:
        time.sleep(SETTLE_POLL_SECONDS)


def evaluation_steps(total_steps: int, every: int | None = None, density: int = LEAST_EVALUATIONS) -> list[int]:
    """Return the steps after which runs are evaluated, the last one always among them.

    every: at each of its multiples; None: after each of the first steps, then ever further apart, `max(1, step //
    density)`, so that each target has `density` evaluations before it unless it is reached in fewer steps, however long
    a run is. The points are the same for every run, up to its own end.
    """
    if every is not None:
        return sorted({*range(every, total_steps + 1, every), total_steps})
    points, step = [], 0
    while step < total_steps:
        step = min(total_steps, step + max(1, step // density))
        points.append(step)
    return points


def slices(points: Sequence[int], longest: int) -> list[int]:
    """Return the steps at which turns end: every evaluation point, and more where they lie far apart."""
    ends: list[int] = []
    before = 0
    for point in points:
        parts = -(-(point - before) // longest)
        ends += [before + (point - before) * k // parts for k in range(1, parts + 1)]
        before = point
    return ends


def interleaved(ends: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Return the turns of several runs as (run, step at which its turn ends), from each run's own ends, ascending.

    Runs advance by equal shares of their own length, so that a long one and a short one see the same hours of the
    machine. Those whose shares are equal go in an order that rotates from turn to turn.
    """
    count = len(ends)
    keyed = [
        (step / own[-1], turn_order(number, count, count).index(run), run, step)
        for run, own in enumerate(ends)
        for number, step in enumerate(own)
    ]
    return [(run, step) for _, _, run, step in sorted(keyed)]
