"""The page about run folders: which sections it has, and the headline numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dngd.report.charts import (
    TEST_ACCURACY,
    TRAIN_LOSS,
    VAL_ACCURACY,
    VAL_LOSS,
    Measure,
    bytes_chart,
    curves,
    line_style,
    phase_chart,
    phase_parts,
    sent_bytes,
)
from dngd.report.document import card, card_list, document, section, write_file
from dngd.report.health import health_section
from dngd.report.run_files import RunFiles, read_runs
from dngd.report.summary import (
    Summary,
    common_target,
    dataset_name,
    first_at,
    measured,
    metrics_of,
    same_nodes,
    same_task,
    summarise,
)
from dngd.report.svg import guide_key, line_key
from dngd.report.tables import (
    bytes_table,
    comparison_table,
    configuration_tables,
    environment_table,
    phase_table,
    run_key,
    state,
)
from dngd.report.text import capitalised, duration, escape, integer, metric_value, metric_words, number


def write_report(run_dirs: Sequence[Path], out: Path) -> Path:
    """Write one self-contained HTML page about one or several runs and return its path.

    run_dirs: run folders, finished or not; a folder given twice counts once. out: the file; it is written
    whole or not at all. Raises UserError if a folder holds no run, or if the page cannot be written.
    """
    return write_page(read_runs(run_dirs), out)


def write_page(runs: Sequence[RunFiles], out: Path) -> Path:
    """Write the page about runs that were read; see write_report."""
    return write_file(out, render(runs))


def render(runs: Sequence[RunFiles]) -> str:
    """Return the page as HTML."""
    summaries = [summarise(run) for run in runs]
    target = common_target(summaries)
    several = len(runs) > 1
    title = f"{len(runs)} runs compared" if several else runs[0].name
    parts = [
        _header(summaries, title),
        _comparison_cards(summaries, target) if several else _cards(summaries[0]),
        section("Comparison", card(comparison_table(summaries, target) + _measured(runs))) if several else "",
        section("Learning", _learning(summaries, target)),
        section("Cost of a step", _cost(runs)),
        section("Factor health", health_section(runs)),
        section("Configuration", card(configuration_tables(runs))),
        section("Environment", card(environment_table(runs))),
    ]
    return document(title, [*parts, _footer(runs)])


def _footer(runs: Sequence[RunFiles]) -> str:
    metrics = metrics_of(runs)
    words = metric_words(metrics[0]) if len(metrics) == 1 else "metric"
    return (
        f"<footer>Training time leaves evaluation out. The test {escape(words)} is that of the evaluation with the "
        f"best validation {escape(words)}, the ringed point. Point at a marker or a bar for its values.</footer>\n"
    )


def _header(summaries: Sequence[Summary], title: str) -> str:
    runs = [summary.run for summary in summaries]
    badge = state(runs[0]) if len(runs) == 1 else ""
    caption = _one_run_caption(summaries[0]) if len(runs) == 1 else _datasets(runs)
    metrics = [metric_words(metric) for metric in metrics_of(runs)]
    warnings = []
    if not same_nodes(runs):
        scored = metrics[0] if len(metrics) == 1 else "metrics"
        warnings.append(f"These runs differ in data set, task or split: their {scored} and losses do not compare.")
    if len(metrics) > 1:
        warnings.append(
            f"These runs have different metrics ({', '.join(metrics)}), which do not compare: each has charts and "
            "columns of its own."
        )
    for run in runs:
        if run.left_out:
            whose = f" of {run.name}" if len(runs) > 1 else ""
            warnings.append(f"Left out{whose}: {' and '.join(run.left_out)}.")
    return (
        f'<header><p class="eyebrow">dngd training report</p><h1>{escape(title)}{badge}</h1>'
        f'<p class="caption">{escape(caption)}</p></header>'
        + "".join(f'<p class="warning">{escape(text)}</p>' for text in warnings)
    )


def _one_run_caption(summary: Summary) -> str:
    config = summary.run.config
    words = [summary.caption] if summary.caption else []
    if "num_layers" in config and "hidden" in config:
        words.append(f"{config['num_layers']} layers of {config['hidden']}")
    words += [f"{key.replace('_', ' ')} {config[key]}" for key in ("batch_size", "seed") if key in config]
    return " · ".join(words)


def _datasets(runs: Sequence[RunFiles]) -> str:
    return " · ".join(dict.fromkeys(name for run in runs if (name := dataset_name(run.config)) is not None))


def _cards(summary: Summary) -> str:
    """Return the headline numbers of a single run."""
    epochs = f"epochs: {number(summary.epochs)}" if summary.epochs is not None else ""
    steps = summary.run.numbers("step_ms")
    pace = f"{number(steps['p50'])} ms each (p50)" if "p50" in steps else ""
    of_some = "" if (part := measured(summary.run)) is None else f", {part}"
    dropped = summary.dropped_steps
    dropped_note = f"{integer(dropped)} dropped as not finite" if dropped else ""
    recoveries = summary.run.number("recoveries")
    recovered_note = f"{integer(recoveries)} recoveries from lost ones" if recoveries else ""
    metric, words = summary.run.metric, metric_words(summary.run.metric)
    to_best = f"best after {duration(summary.seconds_to_best_val)}" if summary.best is not None else ""
    return card_list(
        [
            (f"Best val {words}", metric_value(metric, summary.best_val_accuracy), to_best),
            (f"Test {words}", metric_value(metric, summary.test_accuracy), "at best validation"),
            ("Training time", duration(summary.train_seconds), epochs),
            ("Steps", integer(summary.steps), dropped_note or (pace and pace + of_some)),
            ("Seeds a second", integer(summary.seeds_per_second), f"all workers{of_some}"),
            ("Workers", integer(summary.world_size), recovered_note or "world size"),
        ]
    )


def _comparison_cards(summaries: Sequence[Summary], target: float | None) -> str:
    """Return the headline numbers of several runs: the best of each, and whose it is."""
    cards = []
    metric = summaries[0].run.metric
    scored = [s for s in summaries if s.best is not None]
    if scored and same_task([s.run for s in summaries]):
        best = max(scored, key=lambda s: s.run.evaluations[s.best or 0].val_accuracy)
        metric_name = metric_words(metric)
        cards.append((f"Best val {metric_name}", metric_value(metric, best.best_val_accuracy), best.run.name))
        cards.append((f"Its test {metric_name}", metric_value(metric, best.test_accuracy), best.run.name))
    if target is not None:
        reached = [(record, s) for s in summaries if (record := first_at(s.run, target)) is not None]
        for words, attribute, form in (
            ("Least time", "train_seconds", duration),
            ("Fewest steps", "step", integer),
        ):
            ranked = sorted(reached, key=lambda pair: float(getattr(pair[0], attribute)))
            first, last = (float(getattr(ranked[end][0], attribute)) for end in (0, -1))
            ratio = f"; the last took {number(last / first, 2)}×" if 0 < first < last else ""
            name = ranked[0][1].run.name
            cards.append((f"{words} to {metric_value(metric, target, 1)}", form(first), f"{name}{ratio}"))
    paced = [s for s in summaries if s.seeds_per_second is not None]
    if paced:
        top = max(paced, key=lambda s: s.seeds_per_second or 0.0)
        of_some = "" if (part := measured(top.run)) is None else f", {part}"
        cards.append(("Most seeds a second", integer(top.seeds_per_second), top.run.name + of_some))
    return card_list(cards)


def _learning(summaries: Sequence[Summary], target: float | None) -> str:
    figures = []
    for metric in (*metrics_of([s.run for s in summaries]), None):
        measures = (VAL_LOSS, TRAIN_LOSS) if metric is None else (VAL_ACCURACY, TEST_ACCURACY)
        words = "loss" if metric is None else metric_words(metric)
        guide = None if metric is None or target is None else metric_value(metric, target)
        for x, by in (("train_seconds", "training seconds"), ("step", "steps")):
            chart, note = curves(summaries, measures, x, None if guide is None else target, metric)
            more = f'<p class="note">{escape(note)}</p>' if note else ""
            legend = _line_legend(measures, len(summaries), guide)
            title = f"{capitalised(words)} against {by}"
            caption = f"<figcaption><h3>{escape(title)}</h3>{legend}{more}</figcaption>"
            figures.append(f'<figure class="card">{caption}{chart}</figure>')
    runs = ""
    if len(summaries) > 1:
        items = "".join(f"<li>{run_key(i)}{escape(s.run.name)}</li>" for i, s in enumerate(summaries))
        runs = f'<ul class="legend runs">{items}</ul>'
    return f'{runs}<div class="grid2">{"".join(figures)}</div>'


def _line_legend(measures: tuple[Measure, Measure], num_runs: int, guide: str | None) -> str:
    items = []
    for second, measure in enumerate(measures):
        colour, shape = line_style(0, bool(second), num_runs) if num_runs == 1 else ("plain", None)
        items.append(f"<li>{line_key(colour, shape, dashed=bool(second))}{escape(measure.words)}</li>")
    if guide is not None:
        items.append(f"<li>{guide_key()}{escape(guide)}, reached by all</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def _measured(runs: Sequence[RunFiles]) -> str:
    """Return notes on the runs whose measured numbers are of a part of their steps."""
    told = [(run.name if len(runs) > 1 else "", words) for run in runs if (words := measured(run)) is not None]
    text = "Milliseconds, seeds a second and bytes{} are {}."
    lines = (text.format(f" of {name}" if name else "", words) for name, words in told)
    return "".join(f'<p class="note">{escape(line)}</p>' for line in lines)


def _cost(runs: Sequence[RunFiles]) -> str:
    phases = '<p class="note">Known when a run has finished.</p>'
    traffic = phases
    if any(phase_parts(run) for run in runs):
        phases = phase_chart(runs) + phase_table(runs)
    if any(sent_bytes(run) for run in runs):
        alone = all(run.number("world_size") == 1 for run in runs if run.finished)
        traffic = f'<p class="note">{"None: a single process sends nothing" if alone else "Nothing was sent"}.</p>'
        if any(sum(sent_bytes(run).values()) > 0 for run in runs):
            traffic = bytes_chart(runs) + bytes_table(runs)
    return (
        f'{_measured(runs)}<div class="grid2 uneven"><div class="card"><h3>Where a step’s time goes</h3>{phases}</div>'
        f'<div class="card"><h3>Bytes on the wire</h3>{traffic}</div></div>'
    )
