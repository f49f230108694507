"""Line charts and stacked bars as inline SVG. Colours are the page's classes (style.py); no script.

A chart is an image with a name (role=img, aria-label); its points and bars carry <title> tooltips. The
coordinates are those of the viewBox: the page scales a chart to its column.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dngd.report.axes import Axis, linear_axis, plottable
from dngd.report.text import escape, tick

WIDTH, HEIGHT = 480, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 16, 12, 44
_BAR, _ROW = 24, 52
_MOST_MARKERS = 40
_MOST_TOOLTIPS = 100
_CHARACTER = 7.3
"""Width of a character of the charts' text, generously."""

_WIDEST_CHARACTER = 8.4
"""The same in a narrow window, where the text is larger."""

SHAPES = ("circle", "square", "diamond", "triangle")


@dataclass(frozen=True)
class Point:
    """A point of a line and what its tooltip says."""

    x: float
    y: float
    title: str


@dataclass(frozen=True)
class Line:
    """A series. colour: a class of style.py, "c0".."c7"; shape: of its markers, one of SHAPES, or "" for none."""

    points: Sequence[Point]
    colour: str
    shape: str = "circle"
    dashed: bool = False
    best: int | None = None


@dataclass(frozen=True)
class Band:
    """An area between two curves at the same x. colour: as of Line."""

    x: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    colour: str


@dataclass(frozen=True)
class Place:
    """Where a chart stands within another picture, in its units."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Segment:
    """A part of a stacked bar. value >= 0; text: the value as the tooltip gives it."""

    label: str
    value: float
    colour: str
    text: str


@dataclass(frozen=True)
class Bar:
    """A row of stacked segments; text: what stands at its right above, e.g. the total."""

    label: str
    segments: Sequence[Segment]
    text: str


def line_chart(
    lines: Sequence[Line],
    *,
    label: str,
    x_title: str,
    y_axis: Axis,
    y_format: Callable[[float], str] = tick,
    guides: Sequence[float] = (),
    bands: Sequence[Band] = (),
    place: Place | None = None,
) -> str:
    """Return a line chart. Points that are not finite are left out and break their line.

    guides: heights of horizontal dotted lines. bands: drawn behind the lines, cut at the vertical axis' ends. place:
    where the chart is part of another picture.
    """
    x_axis = linear_axis((point.x for line in lines for point in line.points), from_zero=True, count=6)
    parts = [_frame(x_axis, x_title, y_axis, y_format)]
    parts += [_area(band, x_axis, y_axis) for band in bands]
    for guide in guides:
        y = _y(y_axis, guide)
        parts.append(f'<line class="guide" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    parts += [_path(line, x_axis, y_axis) for line in lines]
    parts += [_markers(line, x_axis, y_axis) for line in lines]
    if not any(drawable(point, y_axis) for line in lines for point in line.points):
        parts.append(_text(WIDTH / 2, HEIGHT / 2, "nothing to draw yet", "middle"))
    return _svg(label, HEIGHT, "".join(parts), place)


def stacked_bars(
    bars: Sequence[Bar], *, label: str, x_title: str, x_format: Callable[[float], str], unit: float = 1.0
) -> str:
    """Return a horizontal stacked bar a row, its name above it. unit: ticks stand at multiples of it."""
    totals = [sum(segment.value for segment in bar.segments) for bar in bars]
    in_units = linear_axis((total / unit for total in totals), from_zero=True, count=5)
    left, width, bottom = 4, WIDTH - 8, 8 + _ROW * len(bars)
    parts = []
    for value in in_units.ticks:
        x = left + width * in_units.share(value)
        anchor = "start" if value == 0 else "middle"
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{bottom}"/>')
        parts.append(_text(x, bottom + 17, x_format(value * unit), anchor))
    for row, bar in enumerate(bars):
        y = 8 + _ROW * row
        room = int(width / _WIDEST_CHARACTER) - len(bar.text) - 2
        parts.append(_text(left, y + 12, shorten(bar.label, room), css="strong"))
        parts.append(_text(left + width, y + 12, bar.text, "end"))
        parts.append(_bar(bar, left, y + 18, width / unit / (in_units.high - in_units.low)))
    parts.append(_text(left + width, bottom + 36, x_title, "end"))
    return _svg(label, bottom + 42, "".join(parts))


def square_key(colour: str) -> str:
    """Return a legend's filled square."""
    rect = f'<rect class="fill {colour}" width="12" height="12" rx="2"/>'
    return f'<svg class="key" viewBox="0 0 12 12" aria-hidden="true">{rect}</svg>'


def guide_key() -> str:
    """Return a legend's piece of dotted guide."""
    line = '<path class="guide" d="M1 6H31"/>'
    return f'<svg class="key wide" viewBox="0 0 32 12" aria-hidden="true">{line}</svg>'


def line_key(colour: str, shape: str | None, *, dashed: bool = False) -> str:
    """Return a legend's piece of line, with its marker if it has a shape."""
    dash = " dashed" if dashed else ""
    marker = "" if shape is None else _marker(shape, 16, 6, 4, f"dot {colour}")
    path = f'<path class="line {colour}{dash}" d="M1 6H31"/>'
    return f'<svg class="key wide" viewBox="0 0 32 12" aria-hidden="true">{path}{marker}</svg>'


def shorten(text: str, length: int) -> str:
    """Return text of at most `length` characters, its middle left out."""
    if len(text) <= length:
        return text
    keep = max(2, length - 1)
    return f"{text[: keep - keep // 2]}…{text[len(text) - keep // 2 :]}"


def drawable(point: Point, y_axis: Axis) -> bool:
    """Whether a point has a place in a chart with this axis."""
    return plottable(point.x) and plottable(point.y) and (point.y > 0 or not y_axis.log)


def _svg(label: str, height: float, content: str, place: Place | None = None) -> str:
    attributes = f'class="chart" viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(label)}"'
    if place is not None:
        attributes += f' x="{place.x:g}" y="{place.y:g}" width="{place.width:g}" height="{place.height:g}"'
    return f"<svg {attributes}>{content}</svg>"


def _text(x: float, y: float, text: str, anchor: str = "start", css: str = "label") -> str:
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _frame(x_axis: Axis, x_title: str, y_axis: Axis, y_format: Callable[[float], str]) -> str:
    bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
    parts = []
    for value in y_axis.ticks:
        y = _y(y_axis, value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(_LEFT - 8, y + 4.5, y_format(value), "end"))
    for value in x_axis.ticks:
        x = _x(x_axis, value)
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(_text(x, bottom + 18, tick(value), "middle"))
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(_text(right, HEIGHT - 7, x_title, "end"))
    return "".join(parts)


def _area(band: Band, x_axis: Axis, y_axis: Axis) -> str:
    there = [(_x(x_axis, x), _y(y_axis, high)) for x, high in zip(band.x, band.high)]
    back = [(_x(x_axis, x), _y(y_axis, low)) for x, low in zip(band.x, band.low)]
    corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in [*there, *reversed(back)])
    return f'<polygon class="band {band.colour}" points="{corners}"/>'


def _path(line: Line, x_axis: Axis, y_axis: Axis) -> str:
    """Return a line's drawable stretches; a stretch of one point is left to its marker."""
    stretches: list[list[tuple[float, float]]] = [[]]
    for point in line.points:
        if drawable(point, y_axis):
            stretches[-1].append((_x(x_axis, point.x), _y(y_axis, point.y)))
        elif stretches[-1]:
            stretches.append([])
    commands = "".join(
        f"{'L' if place else 'M'}{x:.1f} {y:.1f}"
        for stretch in stretches
        for place, (x, y) in enumerate(_visible(stretch))
    )
    dash = " dashed" if line.dashed else ""
    return f'<path class="line {line.colour}{dash}" d="{commands}"/>' if commands else ""


def _visible(places: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the places of a stretch that are seen: of those in one unit of x the ends, the highest and the lowest.

    The line of a run of many evaluations looks alike, and its page stays small.
    """
    out: list[tuple[float, float]] = []
    for _, column in itertools.groupby(places, key=lambda place: int(place[0])):
        own = list(column)
        heights = [y for _, y in own]
        kept = {0, heights.index(min(heights)), heights.index(max(heights)), len(own) - 1}
        out += [own[place] for place in sorted(kept)]
    return out


def _markers(line: Line, x_axis: Axis, y_axis: Axis) -> str:
    """Return markers, wide invisible targets for their tooltips, and a ring around the best point.

    A dashed line shows only the markers it needs: its last, and those with no neighbour to be joined to. A
    long line has fewer markers and tooltips: the page stays small and the curve visible.
    """
    drawn = [drawable(point, y_axis) for point in line.points]
    shown = [index for index, is_drawn in enumerate(drawn) if is_drawn]
    tooltip_stride = math.ceil(len(shown) / _MOST_TOOLTIPS) or 1
    every = len(shown) <= _MOST_MARKERS and not line.dashed
    parts = []
    for position, index in enumerate(shown):
        point, best = line.points[index], index == line.best
        alone = not any(drawn[max(0, index - 1) : index] + drawn[index + 1 : index + 2])
        needed = alone or best or index == shown[-1]
        if position % tooltip_stride and not needed:
            continue
        x, y = _x(x_axis, point.x), _y(y_axis, point.y)
        if best:
            parts.append(f'<circle class="ring {line.colour}" cx="{x:.1f}" cy="{y:.1f}" r="7"/>')
        marker = _marker(line.shape, x, y, 3, f"dot {line.colour}") if line.shape and (every or needed) else ""
        target = f'<circle class="target" cx="{x:.1f}" cy="{y:.1f}" r="7"/>'
        parts.append(f"<g>{marker}{target}<title>{escape(point.title)}</title></g>")
    return "".join(parts)


def _marker(shape: str, x: float, y: float, r: float, css: str) -> str:
    if shape == "square":
        return f'<rect class="{css}" x="{x - r:.1f}" y="{y - r:.1f}" width="{2 * r:g}" height="{2 * r:g}"/>'
    if shape == "diamond":
        s = 1.35 * r
        return f'<path class="{css}" d="M{x:.1f} {y - s:.1f}l{s:g} {s:g}l{-s:g} {s:g}l{-s:g} {-s:g}z"/>'
    if shape == "triangle":
        s = 1.25 * r
        return f'<path class="{css}" d="M{x:.1f} {y - s:.1f}l{s:.2f} {2 * s:.2f}h{-2 * s:.2f}z"/>'
    return f'<circle class="{css}" cx="{x:.1f}" cy="{y:.1f}" r="{r:g}"/>'


def _bar(bar: Bar, left: float, y: float, scale: float) -> str:
    parts, x = [], left
    for segment in bar.segments:
        width = segment.value * scale
        if width <= 0:
            continue
        box = f'x="{x:.2f}" y="{y}" width="{width:.2f}" height="{_BAR}"'
        rect = f'<rect class="fill {segment.colour}" {box}/>'
        title = f"{bar.label}: {segment.label} {segment.text}"
        text = ""
        if len(segment.label) * _CHARACTER + 10 < width:
            text = _text(x + width / 2, y + 16.5, segment.label, "middle", f"inside {segment.colour}")
        parts.append(f"<g>{rect}{text}<title>{escape(title)}</title></g>")
        x += width
    return "".join(parts)


def _x(axis: Axis, value: float) -> float:
    return _LEFT + (WIDTH - _LEFT - _RIGHT) * axis.share(value)


def _y(axis: Axis, value: float) -> float:
    return _TOP + (HEIGHT - _TOP - _BOTTOM) * (1 - axis.share(value))
