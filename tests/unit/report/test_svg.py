"""Line charts: what of a long line is drawn."""

from __future__ import annotations

import math
import re

from dngd.report.axes import linear_axis
from dngd.report.svg import Line, Point, line_chart


def drawn(values: list[float]) -> list[tuple[float, float]]:
    """Return the places of a line's path."""
    points = [Point(float(step), value, "") for step, value in enumerate(values)]
    axis = linear_axis([0.0, 1.0], count=5)
    chart = line_chart([Line(points, "c0", "")], label="x", x_title="step", y_axis=axis)
    (commands,) = re.findall(r'<path class="line c0" d="([^"]*)"', chart)
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", commands)]


def test_a_short_line_is_drawn_whole() -> None:
    assert len(drawn([0.1, 0.9, 0.2, 0.8])) == 4


def test_a_long_line_keeps_what_is_seen() -> None:
    """One step that stands out, its ends, and no more places than the chart has room for."""
    values = [0.5 + 0.01 * math.sin(step) for step in range(100_000)]
    values[77_777] = 0.95
    values[33_333] = 0.05
    places = drawn(values)
    assert len(places) <= 4 * 480
    heights = [y for _, y in places]
    short = drawn([0.95, 0.05])
    assert (min(heights), max(heights)) == (short[0][1], short[1][1])
    few = drawn([values[0], values[-1]])
    assert (places[0][1], places[-1][1]) == (few[0][1], few[1][1])


def test_a_gap_stays_a_gap() -> None:
    points = [Point(float(step), math.nan if step == 5 else 0.5, "") for step in range(10)]
    axis = linear_axis([0.0, 1.0], count=5)
    chart = line_chart([Line(points, "c0", "")], label="x", x_title="step", y_axis=axis)
    (commands,) = re.findall(r'<path class="line c0" d="([^"]*)"', chart)
    assert commands.count("M") == 2
