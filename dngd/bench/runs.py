"""One training run that can be paused: a competitor, its batches, its clock, its curve."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil

from dngd.bench.competitors import Setting
from dngd.bench.curves import Curve
from dngd.bench.learner import Batch, Learner
from dngd.config import TrainConfig
from dngd.optim import learning_rate
from dngd.sampling import BatchCoordinates, MiniBatch, SamplerPipeline
from dngd.train.batch import DeviceBatch
from dngd.train.scoring import Scores

SETTLE_SECONDS = 0.03
SETTLE_LIMIT_SECONDS = 60.0


class SampledFeed:
    """Batches from a run's own sampler process, which draws config.prefetch batches ahead."""

    def __init__(self, pipeline: SamplerPipeline) -> None:
        self._pipeline = pipeline
        self._first: MiniBatch | None = None

    def start(self) -> None:
        """Wait until the sampler has started, which the first batch tells, and has drawn ahead."""
        self._first = next(self._pipeline)
        self.settle()

    def next(self, coordinates: BatchCoordinates) -> Batch:
        """Return the next batch, which must be the one at these coordinates."""
        mini_batch, self._first = self._first or next(self._pipeline), None
        assert mini_batch.coordinates == coordinates, f"{mini_batch.coordinates} is not {coordinates}"
        return Batch(mini_batch, coordinates)

    def settle(self) -> None:
        """Wait until the sampler has drawn all that it may draw ahead, so that it does not work in others' time."""
        started = time.monotonic()
        used = _cpu_seconds(self._pipeline.pids)
        while time.monotonic() - started < SETTLE_LIMIT_SECONDS:
            time.sleep(SETTLE_SECONDS)
            before, used = used, _cpu_seconds(self._pipeline.pids)
            if used == before:
                return

    def close(self) -> None:
        """End the sampler process."""
        self._pipeline.close()


class FullFeed:
    """The one full batch, the same at every step."""

    def __init__(self, batch: DeviceBatch) -> None:
        self._batch = batch

    def start(self) -> None:
        """Nothing starts."""

    def next(self, coordinates: BatchCoordinates) -> Batch:
        """Return the batch."""
        return Batch(self._batch, coordinates)

    def settle(self) -> None:
        """Nothing is drawn."""

    def close(self) -> None:
        """Nothing to end."""


@dataclass(frozen=True)
class RunRecord:
    """A finished run: its validation curve, test accuracies at the same steps, and everything as plain data."""

    label: str
    curve: Curve
    test_accuracy: tuple[float, ...]
    data: dict[str, Any]


@dataclass
class Run:
    """A setting's run with one seed. seconds: of training so far, waits for the sampler included."""

    setting: Setting
    config: TrainConfig
    learner: Learner
    feed: SampledFeed | FullFeed
    steps_per_epoch: int
    step: int = 0
    seconds: float = 0.0
    wait_seconds: float = 0.0
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
                self.config.lr_schedule,
                self.config.warmup_steps,
            )
            waited = time.perf_counter()
            batch = self.feed.next(BatchCoordinates(epoch, step, 0))
            self.wait_seconds += time.perf_counter() - waited
            self.learner.step(batch, lr, alone=False)
            self.step += 1
        self.learner.competitor.finish_background()
        self.seconds += time.perf_counter() - started

    def evaluate(self, scores: Callable[[Learner], dict[str, Scores]]) -> None:
        """Add a point to the curve, off the clock."""
        found = scores(self.learner)
        self.evaluations.append(
            {
                "step": self.step,
                "seconds": self.seconds,
                "val_accuracy": found["val"].accuracy,
                "val_loss": found["val"].loss if math.isfinite(found["val"].loss) else None,
                "test_accuracy": found["test"].accuracy,
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
            "step_ms": self.learner.clock.step_ms(),
            "phase_ms": self.learner.clock.phase_ms(),
            "dropped_steps": self.learner.dropped_steps,
        }
        curve = Curve(tuple(columns["step"]), tuple(columns["seconds"]), tuple(columns["val_accuracy"]))
        return RunRecord(self.setting.label, curve, tuple(columns["test_accuracy"]), data)

    def close(self) -> None:
        """End the sampler and release the model."""
        self.feed.close()
        self.learner.close()


def evaluation_steps(total_steps: int, every: int) -> list[int]:
    """Return the steps after which runs are evaluated: each multiple of `every`, and the last step."""
    return sorted({*range(every, total_steps + 1, every), total_steps})


def slices(points: Sequence[int], longest: int) -> list[int]:
    """Return the steps at which turns end: every evaluation point, and more where they lie far apart."""
    ends: list[int] = []
    before = 0
    for point in points:
        parts = -(-(point - before) // longest)
        ends += [before + (point - before) * k // parts for k in range(1, parts + 1)]
        before = point
    return ends


def _cpu_seconds(pids: Sequence[int]) -> float:
    total = 0.0
    for pid in pids:
        times = psutil.Process(pid).cpu_times()
        total += times.user + times.system
    return total
