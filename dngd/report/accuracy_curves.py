"""Which curves of the accuracy benchmark's result are drawn, over which part of the axes, and in which style."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dngd.report.axes import Axis, linear_axis
from dngd.report.svg import Band, Line, Place, Point, line_chart
from dngd.report.text import duration, escape, integer, metric_words, percent, tick

Unit = Literal["seconds", "step"]

SUBJECT, BASELINE = "kfac", "adam"
COLOURS = {SUBJECT: "c1", BASELINE: "c0"}
OTHERS = ("c2", "c3", "c4", "c5", "c6", "c7")
SHAPES = ("circle", "square", "diamond", "triangle")
WINDOW = 0.12
"""Of the metric, below the primary target: the part of the vertical axis that is drawn."""
BEYOND = 1.2
"""The horizontal axis ends so many times the baseline's least time to the last target, or after K-FAC's run."""


@dataclass(frozen=True)
class Shown:
    """A setting that is drawn. dashed: the most accurate of its group, where another is the fastest."""

    label: str
    group: str
    colour: str
    shape: str
    dashed: bool


def shown_settings(panel: Mapping[str, Any]) -> list[Shown]:
    """Return what is drawn of a panel: each group's fastest setting to the primary target, and its most accurate."""
    settings: Mapping[str, Any] = panel["settings"]
    groups = list(dict.fromkeys(of["group"] for of in settings.values()))
    spare = iter(OTHERS * len(groups))
    out = []
    for number, group in enumerate(groups):
        colour = COLOURS.get(group) or next(spare)
        own = [label for label, of in settings.items() if of["group"] == group]
        accurate: str = max(own, key=lambda label: float(settings[label]["best"]["mean"]))
        fastest = panel["comparison"][0]["groups"][group]["seconds_setting"] or accurate
        shape = SHAPES[number % len(SHAPES)]
        out.append(Shown(fastest, group, colour, shape, dashed=False))
        if accurate != fastest:
            out.append(Shown(accurate, group, colour, shape, dashed=True))
    return out


def panel_chart(panel: Mapping[str, Any], unit: Unit, place: Place | None = None) -> str:
    """Return a panel's line chart against seconds or steps, with bands over seeds and the targets as dotted lines."""
    shown = shown_settings(panel)
    end, low = _end(panel, shown, unit), _low(panel)
    lines, bands, heights = [], [], [low]
    for one in shown:
        curve = panel["settings"][one.label]["mean_curve"]
        first, last = _part(curve, unit, end, low)
        x = curve[unit][first:last]
        if not x:
            continue
        points = [_point(one.label, curve, at) for at in range(first, last)]
        lines.append(Line([Point(float(at), y, text) for at, (y, text) in zip(x, points)], one.colour, "", one.dashed))
        if not one.dashed:
            bands.append(Band(x, curve["low"][first:last], curve["high"][first:last], one.colour))
            heights += [max(curve["high"][first:last])]
        heights += [max(curve["val_score"][first:last])]
    words = "training seconds" if unit == "seconds" else "steps"
    names = ", ".join(one.label for one in shown)
    top = max([*heights, *panel["targets"]])
    axis = linear_axis([low, top], bounds=(0.0, 1.0), count=9)
    return line_chart(
        lines,
        label=f"Line chart of {validation_metric(panel)} against {words}, {panel['name']}: {names}",
        x_title=words,
        y_axis=Axis(low, axis.high, tuple(value for value in axis.ticks if value >= low)),
        y_format=lambda value: f"{tick(round(100 * value, 6))}%",
        guides=panel["targets"],
        bands=bands,
        place=place,
    )


def validation_metric(panel: Mapping[str, Any]) -> str:
    """Return a panel's metric in words."""
    return f"validation {metric_words(str(panel['metric']))}"


def _end(panel: Mapping[str, Any], shown: Sequence[Shown], unit: Unit) -> float:
    """Return where the horizontal axis ends: after all of K-FAC's run, and the baseline's least times to the targets.

    Where there is neither, after the longest run.
    """
    wholes = {one: float(panel["settings"][one.label]["mean_curve"][unit][-1]) for one in shown}
    ends = [whole for one, whole in wholes.items() if one.group == SUBJECT]
    for compared in panel["comparison"]:
        least = compared["groups"].get(BASELINE, {}).get("seconds" if unit == "seconds" else "steps")
        if least is not None:
            ends.append(BEYOND * float(least))
    return max(ends or wholes.values())


def _low(panel: Mapping[str, Any]) -> float:
    return max(0.0, float(min(panel["targets"])) - WINDOW)


def _part(curve: Mapping[str, Any], unit: Unit, end: float, low: float) -> tuple[int, int]:
    """Return which evaluations lie within the axes: from the first at least `low` high, up to `end`."""
    scores, places = curve["val_score"], curve[unit]
    first = next((i for i, score in enumerate(scores) if score >= low), len(scores))
    last = next((i for i, place in enumerate(places) if place > end), len(places))
    return first, max(first, last)


def _point(label: str, curve: Mapping[str, Any], at: int) -> tuple[float, str]:
    score = float(curve["val_score"][at])
    text = f"{label}\n{percent(score)} after {duration(curve['seconds'][at])}, step {integer(curve['step'][at])}"
    return score, text


def legend_words(one: Shown, panel: Mapping[str, Any]) -> str:
    """Return what a legend says of a line, as markup."""
    names = {SUBJECT: "K-FAC", BASELINE: "Adam"}
    name = names.get(one.group, one.group)
    several = sum(of["group"] == one.group for of in panel["settings"].values()) > 1
    role = "" if not several else ", most accurate" if one.dashed else ", fastest"
    return f"{escape(name + role)} <small>{escape(one.label)}</small>"
