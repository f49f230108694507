"""What a person sees of an exact evaluation."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from dngd.train import evaluation_progress as module
from dngd.train.metrics import EvaluationRecord
from dngd.train.progress import ConsoleReporter, StepRecord


def test_a_bar_on_a_terminal() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100, force_interactive=True)
    with module.evaluation_progress("predicting", console) as progress:
        progress(25, 100)
        progress(100, 100)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "predicting" in shown
    assert "100%" in shown
    assert "M edges/s" in shown


def test_a_line_now_and_then_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    console = Console(file=io.StringIO(), width=200)
    with module.evaluation_progress("evaluating", console) as progress:
        for now in (9.0, 10.0, 19.0, 20.0):
            progress(int(now * 1e6), 40_000_000)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown.splitlines() == [
        "evaluating: 25%, 1.0 M edges/s, about 30 s left",
        "evaluating: 50%, 1.0 M edges/s, about 20 s left",
    ]


def test_a_runs_messages_are_printed_as_they_are() -> None:
    """Not as rich's markup."""
    for terminal in (False, True):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=200, color_system=None)
        with ConsoleReporter(console, "my [/x]") as reporter:
            reporter.message("reading [/x] [red] :x:")
            reporter.evaluation(EvaluationRecord(1.0, 2, 0.5, 0.5, 0.5, 0.5, 1.0))
            reporter.step(StepRecord(1, 2, 0, 0.5, 1.0))
        shown = console.file.getvalue()  # type: ignore[attr-defined]
        assert "reading [/x] [red] :x:" in shown
        assert "val my [/x] 0.5000" in shown
