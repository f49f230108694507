"""Benchmark results as tables for people; the same numbers as the JSON, rounded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from dngd.bench.optimizers import BASELINE

NEVER = "never"


def print_step(result: Mapping[str, Any], console: Console) -> None:
    """Print what run_step_bench returned: an optimizer a column."""
    config, steps, graph = result["config"], result["steps"], result["graph"]
    optimizers: Mapping[str, Any] = result["optimizers"]
    table = Table(
        title=f"One training step, {graph['name']} ({graph['num_nodes']:,} nodes, {graph['num_edges']:,} edges)",
        box=SIMPLE,
    )
    table.add_column("milliseconds", no_wrap=True)
    for name in optimizers:
        table.add_column(name, justify="right")

    def row(title: str, texts: Iterable[str]) -> None:
        table.add_row(title, *texts)

    each = list(optimizers.values())
    for title, key in (("mean", "mean_ms"), ("p50", "p50_ms"), ("p99", "p99_ms"), ("largest", "max_ms")):
        row(title, (f"{of[key]:.1f}" for of in each))
    row("p99/p50", (f"{of['p99_over_p50']:.3f}" for of in each))
    if result["ratios_to_adam"] is not None:
        ratios = [result["ratios_to_adam"][name] for name in optimizers]
        row(f"mean / {BASELINE}'s", (f"{ratio['mean']:.3f}" for ratio in ratios))
        row(f"p99/p50 / {BASELINE}'s", (f"{ratio['p99_over_p50']:.3f}" for ratio in ratios))
    table.add_section()
    for phase in dict.fromkeys(phase for of in each for phase in of["phase_ms"]):
        row(f"mean {phase}", (_ms(of["phase_ms"].get(phase)) for of in each))
    for phase in dict.fromkeys(phase for of in each for phase in of["kfac_phase_ms"]):
        row(f"  kfac {phase}", (_ms(of["kfac_phase_ms"].get(phase)) for of in each))
    table.add_section()
    row("state, MiB", (f"{of['state_bytes'] / 2**20:.2f}" for of in each))
    row("state / parameters", (f"{of['state_over_parameters']:.2f}" for of in each))
    console.print(table)
    measured, period = steps["measured"], steps["inverse_update_period"]
    _line(
        console,
        f"{config['model']}, {config['num_layers']} layers, hidden {config['hidden']}; batch {config['batch_size']}, "
        f"fanout {','.join(map(str, config['fanout']))}: {result['stream']['mean_edges']:,.0f} edges a batch.",
    )
    _line(
        console,
        f"{measured} measured steps ({steps['asked']} asked, rounded up to whole periods of {period} steps, K-FAC's "
        f"inverse_update_period) after {steps['warmup']} of warm-up.",
    )
    if not steps["warmup_covers_start"]:
        _line(console, "The warm-up ends within K-FAC's first, denser phase: its times are above its steady state.")
    _line(console, f"Sampling: {result['stream']['sampling']}.")
    _machine(console, result["machine"])


def print_accuracy(result: Mapping[str, Any], console: Console) -> None:
    """Print what run_accuracy_bench returned."""
    num_seeds = len(result["config"]["seeds"])
    for name, found in result["datasets"].items():
        table = Table(
            title=f"{name}: validation accuracy, mean of {num_seeds} seed(s); batch {found['batch_size']}, "
            f"{found['total_steps']} steps, evaluated every {found['eval_steps']}",
            box=SIMPLE,
        )
        table.add_column("setting")
        for column in ("best", "final", "test at best", "train s"):
            table.add_column(column, justify="right")
        for target in found["targets"]:
            table.add_column(f"to {target:.4f}", justify="right")
        for label, of in found["settings"].items():
            table.add_row(
                label,
                *(_spread(of[key]) for key in ("best", "final", "test_at_best")),
                f"{of['train_seconds']['mean']:.1f}",
                *(_reach(reached) for reached in of["targets"]),
            )
        console.print(table)
        for compared in found["comparison"]:
            for group, of in compared["groups"].items():
                if group != BASELINE:
                    _line(console, _sentence(compared["target"], group, of))
    _machine(console, result["machine"])


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _sentence(target: float, group: str, of: Mapping[str, Any]) -> str:
    if of["seconds"] is None:
        return f"To {target:.4f}: {group} never gets there."
    if of["seconds_ratio"] is None:
        return f"To {target:.4f}: {group} in {of['seconds']:.2f} s and {of['steps']:.0f} steps; {BASELINE} has no time."
    return (
        f"To {target:.4f}: {group} in {of['seconds']:.2f} s and {of['steps']:.0f} steps; {BASELINE}'s best setting "
        f"takes {of['seconds_ratio']:.2f} times as many seconds, {_times(of['steps_ratio'])} as many steps."
    )


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f} times"


def _spread(value: Mapping[str, float | None]) -> str:
    mean, std = value["mean"], value["std"]
    return f"{mean:.4f}" if std is None else f"{mean:.4f}\n±{std:.4f}"


def _reach(reached: Mapping[str, Any]) -> str:
    return NEVER if reached["seconds"] is None else f"{reached['seconds']:.2f} s\n{reached['steps']:.0f} steps"


def _machine(console: Console, machine: Mapping[str, Any]) -> None:
    _line(
        console,
        f"{machine['cpu']}, {machine['cpus']} CPUs, {machine['threads']} threads, load {machine['load_average']:.1f} "
        f"before; torch {machine['versions']['torch']}, dngd {machine['versions']['dngd']}.",
    )


def _line(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=False)
