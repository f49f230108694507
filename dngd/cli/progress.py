"""How far a data command is: bars on a terminal, a log line now and then otherwise. Both on standard error."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from dngd.cli.common import error_console

_LOG_SECONDS = 10.0

Callback = Callable[[str, int, int], None]
"""Called with (stage, done, total), in the units of the stage; total 0: not known."""


@contextmanager
def data_progress(console: Console | None = None) -> Iterator[Callback]:
    """Give a progress callback that shows each stage on the console; default: standard error."""
    console = console or error_console()
    if not console.is_terminal:
        log = _Log(console)
        yield log
        log.close()
        return
    bars = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[count]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        refresh_per_second=4,
    )
    with bars:
        shown = _Bars(bars)
        yield shown
        shown.close()


class _Bars:
    """A bar for each stage, in the order of their first call."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}
        self._current: str | None = None
        self._done = 0

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self._current:
            self.close()
            self._current = stage
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=None, count="")
        count = f"{done:,}/{total:,}" if total else f"{done:,}"
        self._bars.update(self._tasks[stage], completed=done, total=total or None, count=count)
        self._done = done

    def close(self) -> None:
        """Show a stage of unknown length as finished."""
        if self._current is not None and self._bars.tasks[self._tasks[self._current]].total is None:
            self._bars.update(self._tasks[self._current], total=self._done, completed=self._done)


class _Log:
    """A line when a stage has gone on for ten seconds, every ten seconds, and at the end of such a stage."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._stage: str | None = None
        self._last = (0, 0)
        self._began = self._told = time.monotonic()
        self._was_told = False

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage != self._stage:
            self.close()
            self._stage, self._began, self._told, self._was_told = stage, now, now, False
        self._last = (done, total)
        if now - self._told >= _LOG_SECONDS:
            self._told, self._was_told = now, True
            self._say(f"{done:,} of {total:,} ({done / total:.0%})" if total else f"{done:,}", now)

    def close(self) -> None:
        if self._stage is not None and self._was_told:
            self._say(f"{self._last[0]:,} done", time.monotonic())
        self._stage = None

    def _say(self, what: str, now: float) -> None:
        text = f"{self._stage}: {what}, {now - self._began:.0f} s"
        self._console.print(Text(text), soft_wrap=True)
