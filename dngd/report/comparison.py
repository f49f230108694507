"""Several runs as rows of plain values, for a terminal and for JSON: the numbers of the page's comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from dngd.report.run_files import RunFiles
from dngd.report.settings import given_differently, setting, value_text
from dngd.report.summary import Summary, common_target, dataset_name, first_at, has_lost, measured, summarise
from dngd.report.text import number

_SHOWN_ANYWAY = ("model", "optimizer")
_OF_THE_PLACE = ("run_dir", "resume", "data_root", "cache_dir", "stage_dir", "loggers")
"""Settings that say where a run was, and not what it did."""


def compare(runs: Sequence[RunFiles]) -> dict[str, Any]:
    """Return {"target": ..., "runs": [...]}: what every run reached, None where there is none, and a row a run.

    differs: the settings that the configurations do not share, as text, but for model and optimizer. measured: of
    which steps step_ms is, in words, where it is not of all. Of an unfinished run the numbers are those so far; None:
    not known.
    """
    summaries = [summarise(run) for run in runs]
    target = common_target(summaries)
    names = [name for name in given_differently(runs) if name not in (*_SHOWN_ANYWAY, *_OF_THE_PLACE)]
    if len({dataset_name(run.config) for run in runs}) == 1:
        names = [name for name in names if name != "dataset"]  # one graph, wherever it lay
    return {"target": target, "runs": [_row(summary, target, names) for summary in summaries]}


def _row(summary: Summary, target: float | None, names: Sequence[str]) -> dict[str, Any]:
    run = summary.run
    reached = None if target is None else first_at(run, target)
    return {
        "name": run.name,
        "state": state_words(summary),
        "finished": run.finished,
        **{name: _text(run.config.get(name)) for name in _SHOWN_ANYWAY},
        "differs": {name: _short(run, name) for name in names},
        "metric": run.metric,
        "best_val_accuracy": summary.best_val_accuracy,
        "test_accuracy": summary.test_accuracy,
        "train_seconds": summary.train_seconds,
        "seconds_to_best_val": summary.seconds_to_best_val,
        "seconds_to_target": None if reached is None else reached.train_seconds,
        "steps_to_target": None if reached is None else _count(reached.step),
        "steps": _count(summary.steps),
        "epochs": summary.epochs,
        "step_ms": run.numbers("step_ms").get("p50"),
        "measured": measured(run),
    }


def state_words(summary: Summary) -> str:
    """Return `finished`, or how far a run is: `epoch 2 of 10`, `begun`."""
    run = summary.run
    words = "finished"
    if not run.finished:
        last, of = run.evaluations[-1:], run.config.get("epochs")
        words = f"epoch {number(last[0].epoch)}" + ("" if of is None else f" of {of}") if last else "begun"
    return f"{words}, loss not finite" if has_lost(run) else words


def _count(value: float | None) -> int | None:
    return None if value is None or not math.isfinite(value) else int(value)


def _text(value: Any) -> str | None:
    return None if value is None else value_text(value)


def _short(run: RunFiles, name: str) -> str:
    return str(dataset_name(run.config)) if name == "dataset" else setting(run, name)
