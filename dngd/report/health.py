"""The section on factor health: charts against steps and a table of the last numbers, from RUN/health.jsonl."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dngd.report.axes import Axis, linear_axis, value_axis
from dngd.report.charts import run_style
from dngd.report.run_files import RunFiles
from dngd.report.svg import Line, Point, drawable, line_chart, line_key
from dngd.report.tables import table
from dngd.report.text import NOTHING, escape, integer, number, percent, tick

Series = dict[int, float]
"""Step -> value."""


@dataclass(frozen=True)
class Measure:
    """What a chart shows: of A (solid) and of G (dashed), or of a layer, or of the whole run."""

    title: str
    keys: tuple[str, ...]
    note: str
    axis: Callable[[list[float]], Axis]
    format: Callable[[float], str]


_MEASURES = (
    Measure(
        "Damping share",
        ("a_damping_share", "g_damping_share"),
        "How much of the damped factor is damping: near 100% the layer takes plain gradient steps.",
        lambda values: linear_axis(values, bounds=(0.0, 1.0)),
        lambda value: f"{tick(round(100 * value, 6))}%",
    ),
    Measure(
        "Condition number",
        ("a_condition", "g_condition"),
        "Upper bound of the damped factor's.",
        value_axis,
        tick,
    ),
    Measure("Step scale ν", ("scale",), "1: neither KL clip nor norm constraint shortened the step.", value_axis, tick),
    Measure(
        "Staleness",
        ("staleness",),
        "Steps since the launch of the inverse in use, at each evaluation.",
        lambda values: linear_axis(values, from_zero=True),
        tick,
    ),
)

_COLUMNS = (
    ("damping share A", "a_damping_share", percent),
    ("damping share G", "g_damping_share", percent),
    ("condition A", "a_condition", number),
    ("condition G", "g_condition", number),
    ("staleness", "staleness", integer),
    ("more damping", "escalations", integer),
    ("failed inversions", "failed_inversions", integer),
    ("reused", "reused_inversions", integer),
)


def health_section(runs: Sequence[RunFiles]) -> str:
    """Return the charts and the table, or a sentence where no run kept a factor.

    One run has a line a layer. Several have a line a run, its largest value over layers: the worst for condition
    numbers and damping shares.
    """
    kept = [(number, run) for number, run in enumerate(runs) if run.health]
    if not kept:
        return '<div class="card"><p class="note">No factors: a first-order optimizer, or no evaluation yet.</p></div>'
    several = len(runs) > 1
    figures = [_figure(measure, kept, several=several) for measure in _MEASURES]
    legend = "" if several else _layer_legend(kept[0][1])
    return f'{legend}<div class="grid2">{"".join(figures)}</div><div class="card spaced">{_table(kept, several)}</div>'


def _figure(measure: Measure, runs: Sequence[tuple[int, RunFiles]], *, several: bool) -> str:
    lines = [line for number, run in runs for line in _lines(measure, number, run, several=several)]
    axis = measure.axis([point.y for line in lines for point in line.points])
    missing = sum(not drawable(point, axis) for line in lines for point in line.points)
    names = ", ".join(run.name for _, run in runs)
    chart = line_chart(
        lines,
        label=f"Line chart of {measure.title} against steps: {names}",
        x_title="steps",
        y_axis=axis,
        y_format=measure.format,
    )
    words = [measure.note]
    if several:
        words.append("The largest over layers.")
    if axis.log:
        words.append("Logarithmic scale.")
    if missing:
        words.append(f"{missing} values have no place on it.")
    legend = ""
    if len(measure.keys) > 1:
        items = [f"<li>{line_key('plain', None, dashed=bool(k))}{name}</li>" for k, name in enumerate(("A", "G"))]
        legend = f'<ul class="legend">{"".join(items)}</ul>'
    caption = f'<h3>{escape(measure.title)}</h3>{legend}<p class="note">{escape(" ".join(words))}</p>'
    return f'<figure class="card"><figcaption>{caption}</figcaption>{chart}</figure>'


def _lines(measure: Measure, number: int, run: RunFiles, *, several: bool) -> list[Line]:
    """Return a run's lines: one a layer and key, or the largest over layers."""
    out = []
    for second, key in enumerate(measure.keys):
        by_layer = {layer: _series(run, layer, key) for layer in _layers(run)}
        if several or key == "scale":  # the whole model's step has one scale
            steps = sorted({step for series in by_layer.values() for step in series})
            largest = {s: max(series[s] for series in by_layer.values() if s in series) for s in steps}
            by_layer = {"": largest}
        for position, (layer, series) in enumerate(by_layer.items()):
            colour, shape = run_style(number if several else position)
            name = " ".join(part for part in (run.name if several else layer, key.replace("_", " ")) if part)
            points = [
                Point(float(s), v, f"{name}\n{measure.format(v)} at step {integer(s)}") for s, v in series.items()
            ]
            if points:
                out.append(Line(points, colour, shape, dashed=bool(second)))
    return out


def _layers(run: RunFiles) -> list[str]:
    return list(dict.fromkeys(layer for _, layers in run.health for layer in layers))


def _series(run: RunFiles, layer: str, key: str) -> Series:
    """Return a layer's known values by step; -1, a staleness without an inverse, is none."""
    found = {}
    for step, layers in run.health:
        value = layers.get(layer, {}).get(key)
        if value is not None and not (key == "staleness" and value < 0):
            found[step] = value
    return found


def _layer_legend(run: RunFiles) -> str:
    items = [f"<li>{line_key(*run_style(position))}{escape(layer)}</li>" for position, layer in enumerate(_layers(run))]
    return f'<ul class="legend runs">{"".join(items)}</ul>'


def _table(runs: Sequence[tuple[int, RunFiles]], several: bool) -> str:
    """Return the numbers of the last evaluation, a row a layer."""
    rows = []
    for place, run in runs:
        step, layers = run.health[-1]
        for layer, values in layers.items():
            colour, shape = run_style(place if several else _layers(run).index(layer))
            name = f"{run.name}: {layer}" if several else layer
            cells = [
                escape(form(value)) if (value := values.get(key)) is not None else NOTHING for _, key, form in _COLUMNS
            ]
            rows.append([f"{line_key(colour, shape)}{escape(name)}", *cells])
    whole = []
    for _, run in runs:
        step, layers = run.health[-1]
        first = next(iter(layers.values()), {})
        dropped, broken = first.get("dropped_steps"), first.get("non_finite_statistics")
        name = f"{run.name}: " if several else ""
        whole.append(
            f"{name}at step {integer(step)}; steps dropped {integer(dropped)}, statistics not finite {integer(broken)}"
        )
    head = ["layer, last evaluation", *(escape(words) for words, *_ in _COLUMNS)]
    note = "; ".join(whole) + ". More damping: times that an inversion needed it."
    return table(head, rows, "Factor health by layer", "numeric runs-table") + f'<p class="note">{escape(note)}</p>'
