"""Telling a person how far an exact evaluation is: a bar on a terminal, a log line every ten seconds elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from dngd.train.evaluation import EvaluationProgress
from dngd.train.progress import LOG_PERIOD_SECONDS


@contextlib.contextmanager
def evaluation_progress(what: str, console: Console | None = None) -> Iterator[EvaluationProgress]:
    """Give a callback that shows progress on the console; default: standard error. what: e.g. "predicting"."""
    console = console or Console(stderr=True)
    started = time.monotonic()

    def rate(done: int) -> float:
        """Million edges a second."""
        return done / max(time.monotonic() - started, 1e-9) / 1e6

    if not console.is_terminal:
        last = started

        def log(done: int, total: int) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last < LOG_PERIOD_SECONDS:
                return
            last = now
            left = (now - started) * (total - done) / max(1, done)
            text = f"{what}: {done / max(1, total):.0%}, {rate(done):.1f} M edges/s, about {left:.0f} s left"
            console.print(Text(text), soft_wrap=True)

        yield log
        return
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )
    with bar:
        task = bar.add_task(what, total=None, rate="")
        yield lambda done, total: bar.update(task, completed=done, total=total, rate=f"{rate(done):.1f} M edges/s")
