"""What a benchmark says while it runs."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from dngd.bench.progress import LINE_SECONDS, BenchProgress, LineProgress, TerminalProgress, progress_for


def console(*, terminal: bool) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=terminal, width=200), out


def test_a_log_gets_a_line_every_half_minute() -> None:
    quiet, out = console(terminal=False)
    now = 0.0
    progress = LineProgress(quiet, lambda: now)
    progress.begin(100, "search")
    for _ in range(10):
        now += LINE_SECONDS / 4
        progress.advance(2, "[cora] adam lr=0.01")
    assert out.getvalue().splitlines() == [
        "[cora] adam lr=0.01: 8 of 100, 0.267/s, about 6 min left",
        "[cora] adam lr=0.01: 16 of 100, 0.267/s, about 5 min left",
    ]


def test_what_was_done_before_says_nothing_of_the_rate() -> None:
    quiet, out = console(terminal=False)
    now = 0.0
    progress = LineProgress(quiet, lambda: now)
    progress.begin(1000, "finals")
    progress.skip(880)
    now = 31.0
    progress.advance(0, "kfac")
    progress.advance(31, "kfac")
    now = 70.0
    progress.begin(70_000, "more")
    now = 80.0
    progress.advance(10, "adam")
    assert out.getvalue().splitlines() == [
        "kfac: 31 of 120, 1/s, about 89 s left",
        "adam: 10 of 70000, 1/s, about 19.4 h left",
    ]


def test_a_terminal_gets_a_bar_with_its_rate() -> None:
    live, out = console(terminal=True)
    with progress_for(live) as progress:
        assert isinstance(progress, TerminalProgress)
        progress.begin(50, "search")
        progress.skip(20)
        progress.advance(5, "adam lr=0.01")
        progress.advance(5, "kfac lr=0.3")
    assert "kfac lr=0.3" in out.getvalue()
    assert "10/30" in out.getvalue()
    assert "/s" in out.getvalue()


def test_a_short_benchmark_is_silent_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    quiet, out = console(terminal=False)
    for progress in (BenchProgress(), progress_for(quiet)):
        with progress:
            progress.message("opening cora")
            progress.begin(2, "steps")
            progress.advance(2, "adam")
            progress.skip(0)
    assert out.getvalue() == ""
    assert capsys.readouterr() == ("", "")
