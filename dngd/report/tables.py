"""The tables of a page: comparison, phases, bytes, configuration, environment. Every cell is escaped here."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

from dngd.report.charts import BYTES, PHASES, phase_parts, phase_words, run_style, sent_bytes
from dngd.report.run_files import RunFiles
from dngd.report.settings import differing, setting, setting_names
from dngd.report.summary import Summary, first_at, has_lost, metrics_of
from dngd.report.svg import line_key, shorten, square_key
from dngd.report.text import (
    NOTHING,
    byte_size,
    duration,
    escape,
    integer,
    metric_value,
    metric_words,
    milliseconds,
    number,
    percent,
)

_LONGEST_NAME = 44
"""Characters of a run's name in a table's head; the comparison's rows, charts' tooltips and legends have it whole."""


def table(head: Sequence[str], rows: Sequence[Sequence[str]], label: str, css: str = "numeric") -> str:
    """Return a table of cells that are markup already. The first cell of a row is its header."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    header = f"<thead><tr>{top}</tr></thead>" if head else ""
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        for first, *cells in rows
    )
    name = escape(label)
    return (
        f'<div class="scroll" role="region" aria-label="{name}" tabindex="0">'
        f'<table class="{css}" aria-label="{name}">{header}<tbody>{body}</tbody></table></div>'
    )


def comparison_table(summaries: Sequence[Summary], target: float | None) -> str:
    """Return one row a run; the best value of a column that has a better end is marked.

    Each metric has columns of its own, which are empty for runs of another one.
    """
    columns: list[tuple[str, list[float | None], Callable[[float | None], str], int]] = []
    for metric in metrics_of([s.run for s in summaries]):
        own = [s.run.metric == metric for s in summaries]
        form, better = partial(metric_value, metric), 1 if sum(own) > 1 else 0
        best = [s.best_val_accuracy if is_own else None for s, is_own in zip(summaries, own)]
        test = [s.test_accuracy if is_own else None for s, is_own in zip(summaries, own)]
        columns.append((f"best val {metric_words(metric)}", best, form, better))
        columns.append((f"test {metric_words(metric)} there", test, form, better))
    if target is not None:
        shown = metric_value(summaries[0].run.metric, target)
        reached = [first_at(s.run, target) for s in summaries]
        seconds = [record.train_seconds if record else None for record in reached]
        steps = [record.step if record else None for record in reached]
        columns.append((f"time to {shown}", seconds, duration, -1))
        columns.append((f"steps to {shown}", steps, integer, -1))
    columns += [
        ("time to best val", [s.seconds_to_best_val for s in summaries], duration, 0),
        ("training time", [s.train_seconds for s in summaries], duration, 0),
        ("steps", [s.steps for s in summaries], integer, 0),
        ("step p50", [s.run.numbers("step_ms").get("p50") for s in summaries], milliseconds, 0),
        ("step p99", [s.run.numbers("step_ms").get("p99") for s in summaries], milliseconds, 0),
        ("seeds/s", [s.seeds_per_second for s in summaries], integer, 0),
        ("workers", [s.world_size for s in summaries], integer, 0),
    ]
    cells = [_marked(values, form, better) for _, values, form, better in columns]
    rows = [
        [f"{run_key(index)}{_whole_name(s.run)}{state(s.run)}<small>{escape(s.caption)}</small>", *row]
        for index, (s, row) in enumerate(zip(summaries, zip(*cells)))
    ]
    head = ["run", *(escape(name) for name, *_ in columns)]
    return table(head, rows, "Comparison of the runs", "numeric runs-table")


def phase_table(runs: Sequence[RunFiles]) -> str:
    """Return milliseconds of a step by phase; it is the phase chart's legend too.

    A phase with parts has a row for its sum, and its parts stand below it.
    """
    parts = [phase_parts(run) for run in runs]
    totals = [sum(part.values()) for part in parts]
    names = list(dict.fromkeys([*PHASES, *(name for part in parts for name in part)]))
    names = [name for name in names if any(name in part for part in parts)]
    rows, parents = [], set()
    for name in names:
        words, colour = phase_words(name)
        parent = name.partition(".")[0]
        family = [other for other in names if other.partition(".")[0] == parent]
        if len(family) == 1:
            rows.append([keyed(colour, words), *_milliseconds([name], parts, totals)])
            continue
        if parent not in parents:
            parents.add(parent)
            rows.append([escape(parent), *_milliseconds(family, parts, totals)])
        child = keyed(colour, words.removeprefix(f"{parent}: "), "keyed child")
        rows.append([child, *_milliseconds([name], parts, totals)])
    rows.append(["total", *_milliseconds(names, parts, totals)])
    return table(["mean ms a step", *map(_name, runs)], rows, "Milliseconds of a step by phase")


def _milliseconds(names: list[str], parts: Sequence[dict[str, float]], totals: Sequence[float]) -> list[str]:
    """Return, for each run, the sum of some phases and its share."""
    sums = [[part[name] for name in names if name in part] for part in parts]
    return [
        f"{number(sum(own))} <small>{percent(sum(own) / (total or 1.0), 0)}</small>" if own else NOTHING
        for own, total in zip(sums, totals)
    ]


def bytes_table(runs: Sequence[RunFiles]) -> str:
    """Return bytes handed to collectives by kind; it is the bytes chart's legend too."""
    sent = [sent_bytes(run) for run in runs]
    kinds = list(dict.fromkeys(kind for one in sent for kind in one))
    keys = {kind: keyed(BYTES.get(kind, "c7"), kind) for kind in kinds}
    rows = [[keys[kind], *(byte_size(one.get(kind)) for one in sent)] for kind in kinds]
    rows.append(["total", *(byte_size(sum(one.values())) if one else NOTHING for one in sent)])
    return table(["sent by rank 0", *map(_name, runs)], rows, "Bytes handed to collectives by kind")


def configuration_tables(runs: Sequence[RunFiles]) -> str:
    """Return the settings: for several runs those that differ, and the others folded away."""
    keys = setting_names(runs)
    if not any(run.config for run in runs):
        return '<p class="note">no config.yaml</p>'
    differ = differing(runs)
    same = [key for key in keys if key not in differ]
    # Where some are of an earlier dngd, those that say what a default stood for.
    tells = {key: next((run for run in runs if key in run.resolved), runs[0]) for key in same}
    common = _pairs([(key, setting(tells[key], key)) for key in same])
    if len(runs) == 1:
        return common
    rows = [[_code(key), *(_code(setting(run, key)) for run in runs)] for key in differ]
    head = ["setting", *map(_name, runs)]
    different = '<p class="note">none differ</p>'
    if differ:
        different = table(head, rows, "Settings that differ", css="plain")
    summary = f"<summary>{len(same)} settings that all runs share</summary>"
    return f"{different}<details>{summary}{common}</details>"


def environment_table(runs: Sequence[RunFiles]) -> str:
    """Return the machine, versions and peak memory, one column a run."""
    names = list(dict.fromkeys(name for run in runs for name in _environment(run)))
    columns = [
        [
            *(_environment(run).get(name, NOTHING) for name in names),
            byte_size(run.number("peak_rss_bytes")),
            byte_size(run.number("peak_gpu_bytes")) if run.number("peak_gpu_bytes") else "none used",
        ]
        if run.finished
        else [NOTHING] * (len(names) + 2)
        for run in runs
    ]
    labels = [*names, "peak memory, rank 0", "peak GPU memory, rank 0"]
    rows = [[escape(label), *(escape(column[row]) for column in columns)] for row, label in enumerate(labels)]
    head = ["", *map(_name, runs)] if len(runs) > 1 else []
    return table(head, rows, "Machine, versions and memory", css="plain")


def _environment(run: RunFiles) -> dict[str, str]:
    return run.texts("machine") | run.texts("versions")


def run_key(index: int) -> str:
    """Return the legend key of a run."""
    colour, shape = run_style(index)
    return line_key(colour, shape)


def keyed(colour: str, words: str, css: str = "keyed") -> str:
    """Return a legend entry that is a row's header too."""
    return f'<span class="{css}">{square_key(colour)}<span>{escape(words)}</span></span>'


def state(run: RunFiles) -> str:
    """Return badges for a run that is not finished, or whose loss stopped being finite, else nothing."""
    badges = ["unfinished"] * (not run.finished) + ["loss not finite"] * has_lost(run)
    return "".join(f' <span class="badge">{badge}</span>' for badge in badges)


def _pairs(pairs: Sequence[tuple[str, str]]) -> str:
    rows = "".join(f"<div><dt>{_code(key)}</dt><dd>{_code(value)}</dd></div>" for key, value in pairs)
    return f'<dl class="settings">{rows}</dl>'


def _marked(values: Sequence[float | None], form: Callable[[float | None], str], better: int) -> list[str]:
    """Return a column's cells. better: 1 if more is, -1 if less is, 0 if neither."""
    finite = [better * value for value in values if better and value is not None and math.isfinite(value)]
    best = max(finite) if len(values) > 1 and finite else None
    return [
        f"<strong>{escape(form(value))}</strong>"
        if best is not None and value is not None and better * value == best
        else escape(form(value))
        for value in values
    ]


def _whole_name(run: RunFiles) -> str:
    return f'<span class="run">{escape(run.name)}</span>'


def _name(run: RunFiles) -> str:
    return f'<span class="run">{escape(shorten(run.name, _LONGEST_NAME))}</span>'


def _code(text: str) -> str:
    return f"<code>{escape(text)}</code>"
