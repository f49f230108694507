"""The accuracy benchmark's result as one HTML page, and its main plot as an SVG file. Reads plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dngd.report.accuracy_curves import (
    BASELINE,
    SUBJECT,
    legend_words,
    panel_chart,
    shown_settings,
    validation_metric,
)
from dngd.report.document import card, card_list, document, section, write_file
from dngd.report.style import picture_style
from dngd.report.svg import HEIGHT, WIDTH, Place, guide_key, line_key, shorten
from dngd.report.tables import table
from dngd.report.text import NOTHING, capitalised, duration, escape, integer, number, percent

WORDS = ("primary", "secondary")
_COLUMNS = 3
_GAP, _HEAD = 20, 44


def write_accuracy_page(result: Mapping[str, Any], out: Path) -> Path:
    """Write the page of what run_accuracy_bench returned; raises UserError if it cannot be written."""
    return write_file(out, render_accuracy(result))


def write_accuracy_svg(result: Mapping[str, Any], out: Path) -> Path:
    """Write accuracy against seconds, a small chart a panel; raises UserError if it cannot be written."""
    return write_file(out, render_picture(result))


def render_accuracy(result: Mapping[str, Any]) -> str:
    """Return the page as HTML."""
    panels: Sequence[Mapping[str, Any]] = result["panels"]
    parts = [
        _header(result),
        _cards(result),
        section("All graphs", card(_summary_table(result))) if result["summary"] else "",
        *(section(panel["name"], _panel(panel)) for panel in panels),
        section("How it was measured", card(_configuration(result))),
    ]
    return document("Time to accuracy", parts)


def render_picture(result: Mapping[str, Any]) -> str:
    """Return the picture as SVG, in a file of its own."""
    panels = result["panels"]
    columns = min(_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    cell = HEIGHT + _HEAD + _GAP
    width = columns * (WIDTH + _GAP) + _GAP
    colours = {one.group: one.colour for panel in panels for one in shown_settings(panel)}
    parts, above = _legend(colours, width)
    height = above + rows * cell
    for at, panel in enumerate(panels):
        left, top = _GAP + (at % columns) * (WIDTH + _GAP), above + (at // columns) * cell
        title, ratio = shorten(panel["name"], 40), _ratio_words(panel)
        parts.append(f'<text class="strong title" x="{left + 4}" y="{top + 16}">{escape(title)}</text>')
        parts.append(f'<text class="label" x="{left + 4}" y="{top + 35}">{escape(ratio)}</text>')
        parts.append(panel_chart(panel, "seconds", Place(left, top + _HEAD, WIDTH, HEIGHT)))
    style = f"{picture_style()}\n.title{{font-weight:600;font-size:15px}}\n.ground{{fill:var(--card)}}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-label="Validation score against training seconds, K-FAC and tuned baselines">'
        f'<style>\n{style}\n</style><rect class="ground" width="{width:g}" height="{height:g}"/>'
        f"{''.join(parts)}</svg>\n"
    )


def _legend(colours: Mapping[str, str], width: float) -> tuple[list[str], float]:
    """Return the picture's legend, in as many rows as it takes, and its height. colours: by group."""
    parts, x, y = [], float(_GAP), 24.0
    for group, colour in colours.items():
        name = {SUBJECT: "K-FAC, one setting", BASELINE: "Adam and AdamW, tuned"}.get(group, f"{group}, tuned")
        length = 46 + 8.2 * len(name)
        if x > _GAP and x + length > width:
            x, y = float(_GAP), y + 24
        parts.append(f'<path class="line {colour}" d="M{x:g} {y:g}h30"/>')
        parts.append(f'<text class="strong" x="{x + 38:g}" y="{y + 5:g}">{escape(name)}</text>')
        x += length + 24
    return parts, y + 22


def _ratio_words(panel: Mapping[str, Any]) -> str:
    """Return in how many times K-FAC's seconds the baseline reaches each target."""
    words = []
    for word, compared in zip(WORDS, panel["comparison"]):
        mine, theirs = compared["groups"].get(SUBJECT), compared["groups"].get(BASELINE)
        if mine is None or theirs is None:
            continue
        if mine["seconds"] is None:
            words.append(f"{word}: never")
        elif mine["seconds_ratio"] is not None:
            words.append(f"{word}: {mine['seconds_ratio']:.2f}×")
    return f"Adam's seconds over K-FAC's, {', '.join(words)}" if words else ""


def _header(result: Mapping[str, Any]) -> str:
    config, machine = result["config"], result["machine"]
    caption = (
        f"protocol {config['protocol']} · seeds {', '.join(map(str, config['seeds']))} · hidden {config['hidden']} · "
        f"{machine['cpu']}, torch threads: {machine['threads']}"
    )
    return (
        '<header><p class="eyebrow">dngd bench accuracy</p><h1>Time to accuracy</h1>'
        f'<p class="caption">{escape(caption)}</p></header>'
    )


def _cards(result: Mapping[str, Any]) -> str:
    if not result["summary"]:
        return ""
    cards = []
    for word, of in zip(WORDS, result["summary"]):
        ratio = of["seconds_ratio"]
        if ratio is not None:
            worst = "never reached" if ratio["worst"] == 0 else f"{ratio['worst']:.2f}×"
            cards.append(
                (f"Adam's time over K-FAC's, {word} target", f"{ratio['median']:.2f}×", f"median; worst {worst}")
            )
    first = result["summary"][0]
    for word, key in (("Best validation", "best_difference"), ("Test at best", "test_difference")):
        cards.append(
            (f"{word}, K-FAC less Adam", _points(first[key]["median"]), f"median; worst {_points(first[key]['worst'])}")
        )
    return card_list(cards)


def _summary_table(result: Mapping[str, Any]) -> str:
    columns = (
        ("seconds", "seconds_ratio"),
        ("steps", "steps_ratio"),
        ("seconds, any first order", "seconds_ratio_to_first_order"),
    )
    summary = result["summary"]
    words = [
        word if len(summary) <= len(WORDS) else f"target {n}"
        for n, word in enumerate((*WORDS, *[""] * len(summary)), 1)
    ]
    head = ["Adam's least over K-FAC's"]
    head += [escape(f"{text}, {word}") for word, _ in zip(words, summary) for text, _ in columns]
    head += ["best validation, K-FAC less Adam", "test there"]
    rows = []
    for at, panel in enumerate(result["panels"]):
        cells = [
            _ratio(of["panels"][at][key], dense=of["panels"][at]["is_dense"]) for of in summary for _, key in columns
        ]
        differences = [_points(summary[0]["panels"][at][key]) for key in ("best_difference", "test_difference")]
        rows.append([escape(panel["name"]), *cells, *differences])
    for name in ("median", "worst"):
        cells = [_ratio(of[key] and of[key][name], dense=True) for of in summary for _, key in columns]
        rows.append([name, *cells, *(_points(summary[0][key][name]) for key in ("best_difference", "test_difference"))])
    note = (
        '<p class="note">Above 1: K-FAC needs less. Where K-FAC never reaches a target it counts as 0. * fewer than 20 '
        "evaluations before the target.</p>"
    )
    return table(head, rows, "Ratios of all graphs") + note


def _panel(panel: Mapping[str, Any]) -> str:
    shown = shown_settings(panel)
    items = [f"<li>{line_key(one.colour, None, dashed=one.dashed)}{legend_words(one, panel)}</li>" for one in shown]
    items.append(f"<li>{guide_key()}targets {', '.join(percent(target) for target in panel['targets'])}</li>")
    legend = f'<ul class="legend">{"".join(items)}</ul>'
    figures = []
    for title, unit in (("seconds", "seconds"), ("steps", "step")):
        caption = f"<figcaption><h3>{escape(capitalised(validation_metric(panel)))} against {title}</h3></figcaption>"
        chart = panel_chart(panel, "seconds" if unit == "seconds" else "step")
        figures.append(f'<figure class="card">{caption}{chart}</figure>')
    remarks = "".join(f"<li>{escape(remark)}</li>" for remark in panel["remarks"])
    told = f'<ul class="remarks">{remarks}</ul>' if remarks else ""
    graph = panel["graph"]
    caption = (
        f"{integer(graph['num_nodes'])} nodes, {integer(graph['num_edges'])} edges, {integer(graph['num_classes'])} "
        f"classes, split {graph['split']}; {_ratio_words(panel)}"
    )
    return (
        f'<p class="note">{escape(caption)}</p><div class="card legend-card">{legend}</div>'
        f'<div class="grid2">{"".join(figures)}</div>{told}<details><summary>all settings</summary>'
        f"{card(_settings_table(panel))}</details>"
    )


def _settings_table(panel: Mapping[str, Any]) -> str:
    head = ["setting", "best validation", "test there", "ms a step"]
    head += [f"time to {percent(target)}" for target in panel["targets"]]
    rows = []
    for label, of in panel["settings"].items():
        reached = [_reached(found, seeds=len(of["runs"])) for found in of["targets"]]
        scores = [_spread(of[key]) for key in ("best", "test_at_best")]
        rows.append([escape(label), *scores, number(of["step_ms"]["mean"]), *reached])
    return table(head, rows, f"Settings of {panel['name']}", "numeric runs-table")


def _reached(found: Mapping[str, Any], seeds: int) -> str:
    some = f"<small>{found['seeds_that_reach_it']} of {seeds} seeds</small>"
    if found["seconds"] is None:
        return f"never {some}"
    return f"{escape(duration(found['seconds']))}, {integer(found['steps'])} steps {some}"


def _spread(value: Mapping[str, float | None]) -> str:
    deviation = "" if value["std"] is None else f" <small>±{number(100 * value['std'], 2)}</small>"
    return f"{percent(value['mean'])}{deviation}"


def _ratio(value: float | None, *, dense: bool) -> str:
    if value is None:
        return NOTHING
    text = "never" if value == 0 else f"{value:.2f}"
    mark = "" if dense else " *"
    return f"<strong>{text}</strong>{mark}" if value > 1 else f"{text}{mark}"


def _points(value: float) -> str:
    return f"{100 * value:+.2f} pt"


def _configuration(result: Mapping[str, Any]) -> str:
    flat: dict[str, object] = {}
    for source in (result["config"], result["machine"]):
        for key, value in source.items():
            inner = value.items() if isinstance(value, dict) else [("", value)]
            flat |= {f"{key}.{name}" if name else key: found for name, found in inner}
    pairs = "".join(
        f"<div><dt><code>{escape(key)}</code></dt><dd><code>{escape(_plain(value))}</code></dd></div>"
        for key, value in flat.items()
    )
    return f'<dl class="settings">{pairs}</dl>'


def _plain(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(" ".join(map(str, item)) if isinstance(item, list | tuple) else str(item) for item in value)
    return "null" if value is None else str(value)
