"""`dngd bench comm` and `dngd bench scale` as tables for people; the same numbers as the JSON, rounded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

_TARGETS = {
    "step_over_adam": "mean step over Adam's",
    "curvature_over_gradient": "curvature bytes over gradient bytes",
    "curvature_over_full_matrices": "curvature bytes over full matrices at every step",
}


def print_comm(result: Mapping[str, Any], console: Console) -> None:
    """Print what run_comm_bench returned: an optimizer a column."""
    graph, steps, world = result["graph"], result["steps"], result["world"]
    optimizers: Mapping[str, Any] = result["optimizers"]
    table = Table(
        title=f"{world['processes']} processes, {graph['name']} ({graph['num_nodes']:,} nodes, "
        f"{graph['num_edges']:,} edges)",
        box=SIMPLE,
    )
    table.add_column("milliseconds", no_wrap=True)
    for name in optimizers:
        table.add_column(name, justify="right")

    def row(title: str, texts: Iterable[str]) -> None:
        table.add_row(title, *texts)

    each = list(optimizers.values())
    for title, key in (("mean step", "mean_ms"), ("p50", "p50_ms"), ("p99", "p99_ms")):
        row(title, (f"{of['step'][key]:.1f}" for of in each))
    row("mean without drawing", (f"{of['step_without_drawing']['mean_ms']:.1f}" for of in each))
    row("mean in collectives", (f"{of['collective_ms']:.2f}" for of in each))
    for phase in dict.fromkeys(phase for of in each for phase in of["kfac_phase_ms"]):
        row(
            f"  kfac {phase}",
            ("-" if phase not in of["kfac_phase_ms"] else f"{of['kfac_phase_ms'][phase]:.2f}" for of in each),
        )
    table.add_section()
    kinds = dict.fromkeys(kind for of in each for kind in of["bytes"])
    for kind in kinds:
        row(f"{kind}, MB a step", (f"{of['bytes'].get(kind, 0) / of['steps'] / 1e6:.4f}" for of in each))
    console.print(table)
    for name, of in result["comparison"].items():
        ratio, run = of["step_ratio"], of["traffic"]["run"]
        _line(
            console,
            f"{name}: a step takes {ratio['mean']:.3f} times Adam's (p99 {ratio['p99']:.3f}); what it adds, over "
            f"Adam's step without drawing: {ratio['added_over_step_without_drawing']:.3f}.",
        )
        _line(
            console,
            f"{name}: over a run of {run['steps']} steps {run['curvature_bytes'] / 1e6:.1f} MB of curvature, "
            f"{run['bytes']['gradient'] / 1e6:.1f} MB of gradients, {run['full_matrices_bytes'] / 1e6:.1f} MB for full "
            "matrices at every step.",
        )
        for target, found in of["targets"].items():
            verdict = "reached" if found["reached"] else "missed"
            _line(console, f"  {_TARGETS[target]}: {found['value']:.4f}, target {found['at_most']:g}: {verdict}.")
    _line(
        console,
        f"{steps['measured']} measured steps in turns of {steps['turn']} (whole periods of {steps['whole_period']}), "
        f"after {steps['warmup']} of warm-up; {result['machine']['threads']} thread(s) a process.",
    )
    if not steps["warmup_covers_start"]:
        _line(console, "The warm-up ends within K-FAC's first, denser phase: its figures are above its steady state.")
    print_machine(console, result["machine"])


def print_scale(result: Mapping[str, Any], console: Console) -> None:
    """Print what run_scale_bench returned: measured and predicted settings, then the model's predictions."""
    graph, fit, errors = result["graph"], result["fit"], result["prediction"]
    table = Table(title=f"Step over limited links, {graph['name']} ({graph['num_nodes']:,} nodes)", box=SIMPLE)
    table.add_column("optimizer")
    for column in ("hosts", "width", "Mbit/s", "compute", "step ms", "model ms", "error"):
        table.add_column(column, justify="right")
    table.add_column("used for", no_wrap=True)
    for of in result["settings"]:
        table.add_row(
            of["optimizer"],
            f"{of['hosts']}{'' if of['compute_is'] == 'real' else '*'}",
            str(of["width"]),
            f"{of['megabits']:g}",
            f"{1e3 * of['compute_seconds']:.1f}",
            f"{1e3 * of['step_seconds']:.1f}",
            "-" if errors is None else f"{1e3 * of['predicted_seconds']:.1f}",
            "-" if errors is None else f"{of['error']:.1%}",
            of["used_for"],
        )
    console.print(table)
    if any(of["compute_is"] != "real" for of in result["settings"]):
        _line(console, "* These hosts' compute is a sleep of its measured time; their collectives are real.")
    if errors is None:
        _line(console, f"The model was not fitted: {fit['failed']}.")
    else:
        _line(
            console,
            f"Fitted on {fit['fitted_on']} settings: {1e6 * fit['latency_seconds']:.0f} µs a round, "
            f"{fit['efficiency']:.0%} of the nominal rate, {1e9 * fit['host_seconds_per_byte']:.2f} ns a byte on the "
            "hosts.",
        )
        _line(
            console,
            f"Of the other {errors['predicted']}, {errors['within']} are predicted within {errors['at_most']:.0%}; "
            f"mean error {errors['mean_error']:.1%}, largest {errors['largest_error']:.1%} (of compute alone "
            f"{errors['mean_error_of_compute_alone']:.1%}): target {'reached' if errors['reached'] else 'missed'}.",
        )
    _projections(result["model"], console)
    print_machine(console, result["machine"])


def _projections(model: Mapping[str, Any], console: Console) -> None:
    compute, machines = model["compute"], model["machines"]
    for shape, of in model["shapes"].items():
        table = Table(title=f"A MODEL, not a measurement: {shape}'s shape, hidden {model['hidden']}", box=SIMPLE)
        for column in ("GPUs", "hosts", "Adam ms", "effic.", "K-FAC ms", "effic.", "ratio"):
            table.add_column(column, justify="right")
        table.add_column("cheapest", no_wrap=True)
        for row in of["rows"]:
            table.add_row(
                f"{row['gpus']}{'' if row['fits_training_set'] else '*'}",
                str(row["hosts"]),
                f"{row['adam_step_ms']:.2f}",
                f"{row['adam_efficiency']:.1%}",
                f"{row['kfac_step_ms'][row['best_strategy']]:.2f}",
                f"{row['kfac_efficiency']:.1%}",
                f"{row['kfac_over_adam']:.3f}",
                row["best_strategy"],
            )
        console.print(table)
        if not all(row["fits_training_set"] for row in of["rows"]):
            _line(console, f"* a step of that many GPUs has more seeds than the {of['num_train']:,} training nodes.")
    _line(
        console,
        f"Model's inputs: compute {1e3 * compute['step']:.1f} ms a step, {1e3 * compute['statistics']:.2f} ms "
        f"statistics, {1e3 * compute['precondition']:.2f} ms preconditioning, {1e3 * compute['inversion']:.1f} ms all "
        "inversions "
        f"({compute['source']}); hosts of {machines['gpus_per_host']} GPUs, "
        f"{machines['host_bytes_per_second'] * 8e-9:g} Gbit/s between hosts, "
        f"{machines['gpu_bytes_per_second'] * 1e-9:g} GB/s within, "
        f"{1e6 * machines['latency_seconds']:g} µs a round (supposed, unless given).",
    )


def print_machine(console: Console, machine: Mapping[str, Any]) -> None:
    """Print what a measurement was made on."""
    _line(
        console,
        f"{machine['cpu']}, {machine['cpus']} CPUs, load {machine['load_average']:.1f} before; torch "
        f"{machine['versions']['torch']}, dngd {machine['versions']['dngd']}.",
    )


def _line(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=False)
