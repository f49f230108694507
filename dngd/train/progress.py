"""Telling a person how far the run is: a progress bar on a terminal, log lines elsewhere."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from dngd.train.metrics import EvaluationRecord

LOG_PERIOD_SECONDS = 10.0


@dataclass(frozen=True)
class StepRecord:
    """How far the run is. seeds_per_second: over the last second or so."""

    step: int
    total_steps: int
    epoch: int
    loss: float
    seeds_per_second: float


class Reporter(Protocol):
    """Hears of a run's progress; only rank 0 has one that does anything."""

    def step(self, record: StepRecord) -> None:
        """A step has ended; called at most a few times a second."""

    def evaluation(self, record: EvaluationRecord) -> None:
        """An evaluation has ended."""

    def message(self, text: str) -> None:
        """Something that a person who watches the run wants to know."""

    def warning(self, text: str) -> None:
        """Something that has gone wrong, or may: to be known to those too who do not watch."""


def warn(reporter: Reporter, text: str) -> None:
    """Hand a warning to a reporter; to a program's own that has messages alone, as one of these."""
    getattr(reporter, "warning", reporter.message)(text)


class SilentReporter:
    """Says nothing; warnings are messages."""

    def step(self, record: StepRecord) -> None:
        return None

    def evaluation(self, record: EvaluationRecord) -> None:
        return None

    def message(self, text: str) -> None:
        return None

    def warning(self, text: str) -> None:
        self.message(text)


class QuietReporter(SilentReporter):
    """Says warnings alone. say: how; None: by Python's warnings, as a program may want to filter them."""

    def __init__(self, say: Callable[[str], None] | None = None) -> None:
        self._say = say

    def warning(self, text: str) -> None:
        if self._say is None:
            warnings.warn(text, stacklevel=2)
        else:
            self._say(text)


class ConsoleReporter:
    """A rich progress bar on a terminal; otherwise a line every ten seconds and every evaluation.

    metric: what the evaluations' accuracies are, in words.
    """

    def __init__(self, console: Console, metric: str = "accuracy") -> None:
        self._console = console
        self._metric = "acc" if metric == "accuracy" else metric
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._last_line = time.monotonic()
        self._accuracy = f"val {self._metric} –"

    def __enter__(self) -> ConsoleReporter:
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("epoch {task.fields[epoch]}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn(
                    "loss {task.fields[loss]}  {task.fields[accuracy]}  {task.fields[rate]} seeds/s", markup=False
                ),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def step(self, record: StepRecord) -> None:
        fields: dict[str, Any] = {
            "epoch": record.epoch,
            "loss": f"{record.loss:.4f}",
            "accuracy": self._accuracy,
            "rate": f"{record.seeds_per_second:,.0f}",
        }
        if self._bar is not None:
            if self._task is None:
                self._task = self._bar.add_task("", total=record.total_steps, **fields)
            self._bar.update(self._task, completed=record.step, **fields)
        elif time.monotonic() - self._last_line >= LOG_PERIOD_SECONDS:
            self._last_line = time.monotonic()
            self.message(
                f"step {record.step}/{record.total_steps}  epoch {record.epoch}  loss {record.loss:.4f}  "
                f"{record.seeds_per_second:,.0f} seeds/s"
            )

    def evaluation(self, record: EvaluationRecord) -> None:
        self._accuracy = f"val {self._metric} {record.val_accuracy:.4f}"
        self.message(
            f"epoch {record.epoch:g}  step {record.step}  train loss {record.train_loss:.4f}  "
            f"val loss {record.val_loss:.4f}  val {self._metric} {record.val_accuracy:.4f}  "
            f"test {self._metric} {record.test_accuracy:.4f}  {record.train_seconds:.1f} s"
        )

    def message(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)

    def warning(self, text: str) -> None:
        self.message(f"warning: {text}")


def event(kind: str, payload: StepRecord | EvaluationRecord | str) -> dict[str, Any]:
    """Return a progress event as plain data, for a reporter in another process."""
    return {"kind": kind, "payload": payload if isinstance(payload, str) else asdict(payload)}


def deliver(reporter: Reporter, received: dict[str, Any]) -> None:
    """Hand an event made by `event` to a reporter."""
    kind, payload = received["kind"], received["payload"]
    if kind == "step":
        reporter.step(StepRecord(**payload))
    elif kind == "evaluation":
        reporter.evaluation(EvaluationRecord(**payload))
    elif kind == "warning":
        warn(reporter, payload)
    else:
        reporter.message(payload)
