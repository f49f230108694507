"""The charts of a page: which values of the runs are drawn, how, and what their tooltips say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dngd.report.axes import linear_axis, value_axis
from dngd.report.run_files import Evaluation, RunFiles
from dngd.report.summary import Summary
from dngd.report.svg import SHAPES, Bar, Line, Point, Segment, drawable, line_chart, stacked_bars
from dngd.report.text import (
    METRICS,
    byte_size,
    duration,
    integer,
    metric_value,
    metric_words,
    milliseconds,
    number,
    tick,
)

NUM_COLOURS = 8

PHASES = {
    "sample_wait": ("sample wait", "c5"),
    "forward": ("forward", "c2"),
    "observe": ("draw the Fisher's labels", "c4"),
    "divergence": ("measure the step's divergence", "c1"),
    "backward": ("backward", "c0"),
    "reduce": ("reduce gradients", "c3"),
    "optimizer.commit": ("optimizer: commit factors", "o1"),
    "optimizer.refresh": ("optimizer: refresh inverses", "o2"),
    "optimizer.precondition": ("optimizer: precondition", "o3"),
    "optimizer": ("optimizer: rest", "o0"),
    "checkpoint": ("checkpoint", "c6"),
}
"""Phase -> (words, colour), in the order of a step. "optimizer" here is what its nested parts leave."""

OTHER = "outside any phase"
BYTES = {"gradient": "c0", "factor": "c4", "inverse": "c2"}


@dataclass(frozen=True)
class Measure:
    """One of the two lines that a chart draws for each run."""

    attribute: str
    words: str


VAL_ACCURACY = Measure("val_accuracy", "validation")
TEST_ACCURACY = Measure("test_accuracy", "test")
VAL_LOSS = Measure("val_loss", "validation")
TRAIN_LOSS = Measure("train_loss", "train")


def run_style(index: int) -> tuple[str, str]:
    """Return the colour and the marker of a run; 32 runs differ in one or the other."""
    return f"c{index % NUM_COLOURS}", SHAPES[(index + index // NUM_COLOURS) % len(SHAPES)]


def line_style(index: int, second: bool, num_runs: int) -> tuple[str, str]:
    """Return a line's colour and marker: a run has one colour, but two if it is alone on the page."""
    return run_style(1) if second and num_runs == 1 else run_style(index)


def curves(
    summaries: Sequence[Summary],
    measures: tuple[Measure, Measure],
    x: str,
    target: float | None = None,
    metric: str | None = None,
) -> tuple[str, str]:
    """Return a line chart of two measures of every run, solid and dashed, and a note on what it leaves out.

    x: "train_seconds" or "step". metric: what the measures are, where they are the runs' metric: runs of another one
    are left out, as one axis cannot be of two. None: losses.
    """
    drawn = [(index, s) for index, s in enumerate(summaries) if metric in (None, s.run.metric)]
    share = metric in METRICS
    by = "training seconds" if x == "train_seconds" else "steps"
    what = f"{measures[0].words} and {measures[1].words} {'loss' if metric is None else metric_words(metric)}"
    values = [
        float(getattr(record, measure.attribute))
        for _, summary in drawn
        for record in summary.run.evaluations
        for measure in measures
    ]
    axis = linear_axis(values, bounds=(0.0, 1.0)) if share else value_axis(values)
    lines = [
        _line(summary, measure, x, *line_style(index, dashed, len(summaries)), dashed=dashed)
        for dashed, measure in ((True, measures[1]), (False, measures[0]))
        for index, summary in drawn
    ]
    missing = sum(not drawable(point, axis) for line in lines for point in line.points)
    notes = ["logarithmic scale"] if axis.log else []
    if missing:
        notes.append(f"{missing} value{'s' if missing > 1 else ''} not finite, left out")
    names = ", ".join(summary.run.name for _, summary in drawn)
    chart = line_chart(
        lines,
        label=f"Line chart of {what} against {by}: {names}",
        x_title=by,
        y_axis=axis,
        y_format=_percent_tick if share else tick,
        guides=[] if target is None else [target],
    )
    return chart, "; ".join(notes)


def phase_parts(run: RunFiles) -> dict[str, float]:
    """Return a step's mean milliseconds by phase, without counting any twice.

    A key "optimizer.x" is a part of "optimizer", which keeps what its parts leave. OTHER is what the mean
    step takes beyond its phases; the checkpoint's time is outside the step.
    """
    phases = {name: value for name, value in run.numbers("phase_ms").items() if value >= 0}
    parts = dict(phases)
    for name, value in phases.items():
        parent = name.rpartition(".")[0]
        if parent in phases:
            parts[parent] = max(0.0, parts[parent] - value)
    known = {name: parts.pop(name) for name in PHASES if name in parts}
    inside = sum(value for name, value in (known | parts).items() if name != "checkpoint")
    mean = run.numbers("step_ms").get("mean", 0.0)
    rest = {OTHER: mean - inside} if phases and mean > 1.005 * inside else {}
    return known | parts | rest


def phase_words(name: str) -> tuple[str, str]:
    """Return a phase in words, and its colour."""
    return PHASES.get(name, (name.replace("_", " ").replace(".", ": "), "c7"))


def phase_chart(runs: Sequence[RunFiles]) -> str:
    """Return one stacked bar of step phases a run."""
    bars = []
    for run in runs:
        parts = phase_parts(run)
        segments = [_segment(*phase_words(name), value, milliseconds) for name, value in parts.items()]
        bars.append(Bar(run.name, segments, milliseconds(sum(parts.values())) if parts else "not measured"))
    totals = ", ".join(f"{bar.label} {bar.text}" for bar in bars)
    return stacked_bars(
        bars, label=f"Bar chart of the phases of a step: {totals}", x_title="mean ms a step", x_format=tick
    )


def bytes_chart(runs: Sequence[RunFiles]) -> str:
    """Return one stacked bar of bytes handed to collectives a run."""
    bars = []
    for run in runs:
        sent = sent_bytes(run)
        segments = [_segment(kind, BYTES.get(kind, "c7"), value, byte_size) for kind, value in sent.items()]
        bars.append(Bar(run.name, segments, byte_size(sum(sent.values())) if sent else "not measured"))
    most = max((sum(sent_bytes(run).values()) for run in runs), default=0.0)
    unit = 1.0
    while most / unit >= 1024 and unit < 1024**4:
        unit *= 1024
    totals = ", ".join(f"{bar.label} {bar.text}" for bar in bars)
    return stacked_bars(
        bars,
        label=f"Bar chart of bytes handed to collectives: {totals}",
        x_title="sent by rank 0",
        x_format=byte_size,
        unit=unit,
    )


def sent_bytes(run: RunFiles) -> dict[str, float]:
    """Return a run's bytes by kind; empty if it is unfinished."""
    return {kind: value for kind, value in run.numbers("bytes").items() if value >= 0}


def _segment(words: str, colour: str, value: float, text: Callable[[float], str]) -> Segment:
    return Segment(words.removeprefix("optimizer: "), value, colour, text(value))


def _line(summary: Summary, measure: Measure, x: str, colour: str, shape: str, *, dashed: bool) -> Line:
    points = [
        Point(
            float(getattr(record, x)),
            float(getattr(record, measure.attribute)),
            _tooltip(summary.run, record, measure),
        )
        for record in summary.run.evaluations
    ]
    best = summary.best if measure is VAL_ACCURACY else None
    return Line(points, colour, shape, dashed, best)


def _tooltip(run: RunFiles, record: Evaluation, measure: Measure) -> str:
    value = getattr(record, measure.attribute)
    is_loss = measure.attribute.endswith("loss")
    shown = number(value, 4) if is_loss else metric_value(run.metric, value)
    kind = "loss" if is_loss else metric_words(run.metric)
    return (
        f"{run.name}\n{measure.words} {kind} {shown}\n"
        f"epoch {number(record.epoch, 4)}, step {integer(record.step)}, {duration(record.train_seconds)}"
    )


def _percent_tick(value: float) -> str:
    return f"{100 * value:.6g}%"
