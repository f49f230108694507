"""How far a benchmark is: a bar on standard error where that is a terminal, a line every half minute otherwise."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.progress import TimeElapsedColumn as Elapsed
from rich.progress import TimeRemainingColumn as Remaining
from rich.text import Text

LINE_SECONDS = 30.0
"""Between two lines of a log."""


class BenchProgress:
    """Counts steps. The base class says nothing; a benchmark calls it outside of what it times."""

    def __enter__(self) -> BenchProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def message(self, text: str) -> None:
        """Tell of something that takes long or that a person should know."""

    def begin(self, total: int, text: str) -> None:
        """Start a count of `total` steps; it takes the place of one that is there."""

    def advance(self, steps: int, text: str) -> None:
        """Count steps as done; text: what is at work."""

    def skip(self, steps: int) -> None:
        """Count steps as not to be done: they were done before, and say nothing of the rate."""


class TerminalProgress(BenchProgress):
    """A bar drawn only when `advance` is called: a refreshing thread would run inside the timed steps."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._total = self._left_out = 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def message(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)

    def begin(self, total: int, text: str) -> None:
        if self._bar is None:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                _RateColumn(),
                Elapsed(),
                TextColumn("left"),
                Remaining(),
                console=self._console,
                auto_refresh=False,
            )
            self._bar.start()
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._total, self._left_out = total, 0
        self._task = self._bar.add_task(text, total=total)

    def advance(self, steps: int, text: str) -> None:
        assert self._bar is not None
        assert self._task is not None
        self._bar.update(self._task, advance=steps, description=text)
        self._bar.refresh()

    def skip(self, steps: int) -> None:
        assert self._bar is not None
        assert self._task is not None
        self._left_out += steps
        self._bar.update(self._task, total=self._total - self._left_out)


class LineProgress(BenchProgress):
    """Lines of a log, written only when `advance` is called and the last one is half a minute old: a short benchmark,
    or a mistake, has nothing else on standard error. clock: seconds.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._last_line = clock()
        self._began = self._last_line
        self._done = self._total = 0

    def begin(self, total: int, text: str) -> None:
        self._began, self._done, self._total = self._clock(), 0, total

    def advance(self, steps: int, text: str) -> None:
        self._done += steps
        now = self._clock()
        if now - self._last_line < LINE_SECONDS or self._done == 0:
            return
        self._last_line = now
        rate = self._done / max(now - self._began, 1e-9)
        left = (self._total - self._done) / rate
        line = f"{text}: {self._done} of {self._total}, {rate:.3g}/s, about {_duration(left)} left"
        self._console.print(Text(line), soft_wrap=True)

    def skip(self, steps: int) -> None:
        self._total -= steps


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.3g}/s")


def _duration(seconds: float) -> str:
    """Return seconds in words: "40 s", "12 min", "3.2 h"."""
    if seconds < 100:
        return f"{max(0.0, seconds):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def progress_for(console: Console) -> BenchProgress:
    """Return a bar for a terminal, lines of a log for anything else."""
    return TerminalProgress(console) if console.is_terminal else LineProgress(console)
