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


def print_machine(console: Console, machine: Mapping[str, Any]) -> None:
    """Print what a measurement was made on."""
    _line(
        console,
        f"{machine['cpu']}, {machine['cpus']} CPUs, load {machine['load_average']:.1f} before; torch "
        f"{machine['versions']['torch']}, dngd {machine['versions']['dngd']}.",
    )


def _line(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=False)
