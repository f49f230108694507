"""dngd report: a page about runs, and several of them as a table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from dngd.cli.common import Json, out, print_json
from dngd.config import address_of_run
from dngd.paths import expanded
from dngd.report.text import NOTHING, duration, metric_value, metric_words, milliseconds

WIDEST = 10_000
"""Columns of a table in a file or a pipe, where no line is to be broken."""
MOST_DIFFERENCES = 6
"""Settings of a run that its row shows."""


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Run folders, or folders of such, for all runs in them; s3:// or gs:// addresses too"),
    ],
    output: Annotated[Path, typer.Option("--out", help="HTML file to write")] = Path("report.html"),
    as_json: Json = False,
) -> None:
    """Write one self-contained HTML page about one or several runs; of several, print a table too."""
    from dngd.report import check_page, compare, read_runs, write_page
    from dngd.train.remote_run import readable_folder, runs_of
    from dngd.train.run_folder import check_output

    output = expanded(output)
    check_page(output)
    taken: list[Path] = []
    told: list[str] = []
    for given in runs:
        found = runs_of(given)
        taken += found
        if found != [given]:
            names = ", ".join(_shown(run).rstrip("/").rpartition("/")[2] for run in found)
            told.append(f"{_shown(given)}: {len(found)} run{'s' if len(found) > 1 else ''}, {names}")
    check_output(output, [expanded(run) for run in taken], page="report.html")
    folders = [readable_folder(run) for run in taken]
    read = read_runs([folder.path for folder in folders])
    page = write_page(read, output)
    compared = compare(read)
    if as_json:
        print_json({"page": str(page), **compared})
        return
    for text in told:
        out.print(text, highlight=False, soft_wrap=True)
    if len(read) > 1:
        _print_table(compared)
    out.print(str(page), highlight=False, soft_wrap=True)


def _shown(given: Path) -> str:
    """Return a folder as it was given, an address without its options."""
    address = address_of_run(given)
    return str(given) if address is None else address.partition("?")[0]


def _print_table(compared: dict[str, Any]) -> None:
    """Print one row a run, on a terminal without what differs if that has no room there: it then stands below."""
    table = _table(compared, differences=True)
    if not out.is_terminal:
        Console(markup=False, emoji=False, width=WIDEST).print(table)
    elif Measurement.get(out, out.options.update(max_width=WIDEST), table).maximum <= out.width:
        out.print(table)
    else:
        out.print(_table(compared, differences=False))
        for row in compared["runs"]:
            if row["differs"]:
                out.print(f"{row['name']}: {_differences(row['differs'])}", highlight=False)
    for row in compared["runs"]:
        if row["measured"] is not None:
            out.print(f"{row['name']}: milliseconds {row['measured']}", highlight=False, soft_wrap=True)


def _table(compared: dict[str, Any], *, differences: bool) -> Table:
    """Return one row a run. compared: of dngd.report.compare."""
    rows, target = compared["runs"], compared["target"]
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    words = metric_words(metrics[0]) if len(metrics) == 1 else "metric"
    table = Table(box=None, pad_edge=False)
    for name in ("run", "state", "model", "optimizer", *(["differs in"] if differences else [])):
        table.add_column(name, overflow="fold")
    timed = [] if target is None else [f"time to\n{metric_value(metrics[0], target)}"]
    for name in (f"best val\n{words}", f"test {words}\nthere", "training\ntime", *timed, "step"):
        table.add_column(name, justify="right")
    for row in rows:
        named = "" if len(metrics) == 1 else f" {metric_words(row['metric'])}"
        scores = [metric_value(row["metric"], row[key]) + named for key in ("best_val_accuracy", "test_accuracy")]
        seconds = [duration(row["train_seconds"])] + ([] if target is None else [duration(row["seconds_to_target"])])
        kinds = [NOTHING if row[key] is None else str(row[key]) for key in ("model", "optimizer")]
        differs = [_differences(row["differs"])] if differences else []
        table.add_row(row["name"], row["state"], *kinds, *differs, *scores, *seconds, milliseconds(row["step_ms"]))
    return table


def _differences(differs: dict[str, str]) -> str:
    texts = [f"{name}={value}" for name, value in differs.items()]
    more = len(texts) - MOST_DIFFERENCES
    return ", ".join(texts[:MOST_DIFFERENCES]) + (f", {more} more" if more > 0 else "") or NOTHING
