"""How far a benchmark is: a bar on standard error where that is a terminal, nothing otherwise."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as Remaining
from rich.text import Text


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


class TerminalProgress(BenchProgress):
    """A bar drawn only when `advance` is called: a refreshing thread would run inside the timed steps."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Progress | None = None
        self._task: TaskID | None = None

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
                TimeElapsedColumn(),
                TextColumn("left"),
                Remaining(),
                console=self._console,
                auto_refresh=False,
            )
            self._bar.start()
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(text, total=total)

    def advance(self, steps: int, text: str) -> None:
        assert self._bar is not None
        assert self._task is not None
        self._bar.update(self._task, advance=steps, description=text)
        self._bar.refresh()


def progress_for(console: Console) -> BenchProgress:
    """Return a bar for a terminal, silence for anything else."""
    return TerminalProgress(console) if console.is_terminal else BenchProgress()
