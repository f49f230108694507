"""The accuracy benchmark's result for people: a table a panel, what must be known of it, and one of all panels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from dngd.bench.network_tables import print_machine
from dngd.bench.optimizers import BASELINE

NEVER = "never"
METRIC_WORDS = {"accuracy": "validation accuracy", "roc_auc": "validation ROC-AUC"}


def print_accuracy(result: Mapping[str, Any], console: Console) -> None:
    """Print what run_accuracy_bench returned."""
    _panels(result, console)
    _line(console, f"Curves: {result['config']['smoothing']}; evaluation is in no time.")
    if result["summary"] is not None:
        _summary(result, console)
    print_machine(console, result["machine"])


def print_loop(result: Mapping[str, Any], console: Console) -> None:
    """Print what run_loop_bench returned."""
    _panels(result, console)
    for group, summary in result["summary"].items():
        for word, of in zip(("primary", "secondary"), summary):
            seconds, steps = of["seconds_ratio"], of["steps_ratio"]
            if seconds is not None and steps is not None:
                _line(
                    console,
                    f"{group} to target {word}, {BASELINE}'s least over its own in {len(of['panels'])} panels: in the "
                    f"median {_ratio(seconds['median'])} in seconds and {_ratio(steps['median'])} in steps, at the "
                    f"worst {_ratio(seconds['worst'])} and {_ratio(steps['worst'])}.",
                )
    print_machine(console, result["machine"])


def print_overview(result: Mapping[str, Any], console: Console) -> None:
    """Print the ratios over all graphs of what combine_results returned, and what each graph's own table warns of."""
    _line(console, f"Curves: {result['config']['smoothing']}; evaluation is in no time.")
    _summary(result, console)
    for panel in result["panels"]:
        for remark in panel["remarks"]:
            _line(console, f"{panel['name']}: {remark}.")
    for remark in result["remarks"]:
        _line(console, f"Mind: {remark}.")


def print_searches(result: Mapping[str, Any], console: Console) -> None:
    """Print what run_accuracy_bench returned for a search without finals."""
    for panel in result["searches"]:
        for family, found in panel["search"].items():
            of = found["settings"]
            best = max(of, key=lambda setting: float(setting["best"]))
            _line(
                console,
                f"{panel['name']}: {len(of)} settings of {family}, {sum(s['final'] for s in of)} for the finals; best "
                f"so far {best['best']:.4f}, {best['label']}.",
            )
    _line(console, "The same command without --search-only runs the finals.")


def _panels(result: Mapping[str, Any], console: Console) -> None:
    seeds = len(result["config"]["seeds"])
    for panel in result["panels"]:
        console.print(_settings_table(panel, seeds))
        for compared in panel["comparison"]:
            for group, of in compared["groups"].items():
                if group != BASELINE:
                    _line(console, _sentence(compared["target"], group, of))
        for remark in panel["remarks"]:
            _line(console, f"Mind: {remark}.")


def _settings_table(panel: Mapping[str, Any], seeds: int) -> Table:
    graph = panel["graph"]
    table = Table(
        title=f"{panel['name']} ({graph['split']}): {METRIC_WORDS[panel['metric']]}, mean of {seeds} seed(s), smoothed",
        box=SIMPLE,
    )
    table.add_column("setting", overflow="fold")
    for column in ("best", "test there", "final", "ms a step"):
        table.add_column(column, justify="right")
    for target in panel["targets"]:
        table.add_column(f"to {target:.4f}", justify="right")
    for label, of in panel["settings"].items():
        table.add_row(
            label,
            *(_spread(of[key]) for key in ("best", "test_at_best", "final")),
            f"{of['step_ms']['mean']:.1f}",
            *(_reach(reached) for reached in of["targets"]),
        )
    return table


def _summary(result: Mapping[str, Any], console: Console) -> None:
    words = ("primary", "secondary") if len(result["summary"]) == 2 else ()
    for number, of in enumerate(result["summary"]):
        word = words[number] if words else f"number {number + 1}"
        table = Table(
            title=f"K-FAC to target {word}: {BASELINE}'s least over K-FAC's (above 1: K-FAC needs less)", box=SIMPLE
        )
        table.add_column("panel")
        for column in ("seconds", "steps", "seconds, any first order", "best validation, K-FAC less Adam", "test"):
            table.add_column(column, justify="right")
        for row in of["panels"]:
            table.add_row(
                row["panel"] + ("" if row["is_dense"] else " *"),
                *(_ratio(row[key]) for key in ("seconds_ratio", "steps_ratio", "seconds_ratio_to_first_order")),
                *(f"{100 * row[key]:+.2f} pt" for key in ("best_difference", "test_difference")),
            )
        table.add_section()
        for name in ("median", "worst"):
            table.add_row(
                name,
                *(
                    "-" if of[key] is None else _ratio(of[key][name])
                    for key in ("seconds_ratio", "steps_ratio", "seconds_ratio_to_first_order")
                ),
                *(f"{100 * of[key][name]:+.2f} pt" for key in ("best_difference", "test_difference")),
            )
        console.print(table)
        if of["never"]:
            _line(console, f"K-FAC never reaches it on {of['never']} of {len(of['panels'])} panels; those count as 0.")
        if not all(row["is_dense"] for row in of["panels"]):
            _line(console, "* fewer than 20 evaluations before the target: the time is rough.")


def _ratio(ratio: float | None) -> str:
    return "-" if ratio is None else NEVER if ratio == 0 else f"{ratio:.2f}"


def _sentence(target: float, group: str, of: Mapping[str, Any]) -> str:
    if of["seconds"] is None:
        return f"To {target:.4f}: {group} never gets there."
    if of["seconds_ratio"] is None:
        return f"To {target:.4f}: {group} in {of['seconds']:.2f} s and {of['steps']:.0f} steps; {BASELINE} has no time."
    return (
        f"To {target:.4f}: {group} in {of['seconds']:.2f} s and {of['steps']:.0f} steps; {BASELINE}'s best setting "
        f"takes {of['seconds_ratio']:.2f} times as many seconds{_seeds(of)}, {_times(of['steps_ratio'])} as many steps."
    )


def _seeds(of: Mapping[str, Any]) -> str:
    ratios = of["seconds_ratios_of_seeds"]
    if not ratios:
        return ""
    each = f"{ratios[0]:.2f}" if len(ratios) == 1 else f"{min(ratios):.2f} to {max(ratios):.2f}"
    return f" (seed by seed {each}, where both get there: {len(ratios)})"


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f} times"


def _spread(value: Mapping[str, float | None]) -> str:
    mean, std = value["mean"], value["std"]
    return f"{mean:.4f}" if std is None else f"{mean:.4f}\n±{std:.4f}"


def _reach(reached: Mapping[str, Any]) -> str:
    return NEVER if reached["seconds"] is None else f"{reached['seconds']:.2f} s\n{reached['steps']:.0f} steps"


def _line(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=False)
