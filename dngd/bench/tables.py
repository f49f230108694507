"""Benchmark results as tables for people; the same numbers as the JSON, rounded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dngd.bench.optimizers import BASELINE


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
    measured, period = steps["measured"], steps["whole_period"]
    _line(
        console,
        f"{config['model']}, {config['num_layers']} layers, hidden {config['hidden']}; batch {config['batch_size']}, "
        f"fanout {','.join(map(str, config['fanout']))}: {result['stream']['mean_edges']:,.0f} edges a batch.",
    )
    _line(
        console,
        f"{measured} measured steps ({steps['asked']} asked, rounded up to whole periods of {period} steps, after "
        f"which K-FAC's costly ones recur) after {steps['warmup']} of warm-up.",
    )
    if not steps["warmup_covers_start"]:
        _line(console, "The warm-up ends within K-FAC's first, denser phase: its times are above its steady state.")
    _line(console, f"Sampling: {result['stream']['sampling']}.")
    _machine(console, result["machine"])


def print_pipeline(result: Mapping[str, Any], console: Console) -> None:
    """Print what run_pipeline_bench returned, row by row."""
    graph, turns = result["graph"], result["turns"]
    _line(
        console,
        f"{graph['name']}: {graph['num_nodes']:,} nodes, {graph['num_edges']:,} edges, {graph['num_features']} "
        f"features; batch {result['config']['batch_size']}, fanout {','.join(map(str, result['config']['fanout']))}; "
        f"{turns['threads']} threads in each training process; medians of {turns['rounds']} turns of "
        f"{turns['batches']} batches.",
    )
    titles = {
        "input": "Sampling and features, to the input of the first matmul (mean of neighbours)",
        "gcn": "The same for GCN's normalised sum",
        "training": "Whole training steps, Adam, sampling included",
    }
    for row, found in result["rows"].items():
        if row in titles:
            _contenders(console, titles[row], found)
        else:
            _PRINTERS[row](console, found)
    _machine(console, result["machine"])


def _contenders(console: Console, title: str, found: Mapping[str, Any]) -> None:
    table = Table(title=title, box=SIMPLE)
    for column in ("", "how"):
        table.add_column(column)
    for column in ("processes", "ms a batch", "seeds/s"):
        table.add_column(column, justify="right")
    for name, of in found["contenders"].items():
        table.add_row(
            name.partition(":")[0],
            Text(of["how"]),
            str(of["processes"]),
            f"{1e3 * of['seconds_a_batch']:.1f}",
            f"{of['seeds_per_second']:,.0f}",
        )
    console.print(table)
    for of in found["comparison"]:
        peer = "DGL's example" if of["against"] == "dgl" else "the tuned loop"
        where = (
            "best against best" if of["processes"] is None else f"{of['processes']} processes beside the training one"
        )
        target = "" if of["target"] is None else f", target {of['target']:g}: {'yes' if of['reached'] else 'no'}"
        low, high = of["range"]
        _line(
            console,
            f"{of['dngd']} does {of['ratio']:.2f} times the seeds a second of {peer} ({of['peer']}; {where}; "
            f"{low:.2f} to {high:.2f} over the turns){target}.",
        )


def _memory_row(console: Console, found: Mapping[str, Any]) -> None:
    parts = ("graph", "batch_slots", "anonymous", "other_files", "total")
    table = Table(title=f"Memory of training workers on one store (PSS after {found['steps']} steps), MB", box=SIMPLE)
    for column in ("workers", "processes", *(part.replace("_", " ") for part in parts)):
        table.add_column(column, justify="right")
    for of in found["counts"]:
        table.add_row(str(of["workers"]), str(of["processes"]), *(f"{of[part] / 1e6:.0f}" for part in parts))
    console.print(table)
    for of in found["added"]:
        _line(
            console,
            f"Worker {of['workers']} added {of['total'] / 1e6:.0f} MB, {of['beyond_model_and_buffers'] / 1e6:.0f} MB "
            f"of it beyond its model, gradients, optimizer state ({of['model_gradients_and_optimizer'] / 1e6:.0f} MB) "
            f"and batch buffers ({of['batch_buffers'] / 1e6:.0f} MB).",
        )
    few, more = found["samplers"]
    by_one = found["added_by_a_sampler"]
    _line(
        console,
        f"A worker with {few['samplers']} sampler process takes {few['total'] / 1e6:.0f} MB, with {more['samplers']} "
        f"{more['total'] / 1e6:.0f} MB: {by_one['total'] / 1e6:.0f} MB a sampler, {by_one['batch_slots'] / 1e6:.0f} MB "
        "of it for its batches.",
    )


def _open_row(console: Console, found: Mapping[str, Any]) -> None:
    for name, of in found.items():
        _line(
            console,
            f"GraphStore.open, {name} of {of['bytes'] / 1e6:,.0f} MB: {1e3 * of['warm_seconds']:.1f} ms; with "
            f"{of['cached_share_when_cold']:.0%} of its files cached {1e3 * of['cold_seconds']:.1f} ms.",
        )


def _disk_row(console: Console, found: Mapping[str, Any]) -> None:
    if "not_allowed" in found:
        _line(console, f"Features on disk: not allowed on this machine ({found['not_allowed']}).")
        return
    ram = found["in_memory"]
    _line(
        console,
        f"Features on disk, memory limited to {found['limit_bytes'] / 1e6:,.0f} MB (own needs "
        f"{found['own_needs_bytes'] / 1e6:,.0f} MB and half of the {found['feature_bytes'] / 1e6:,.0f} MB table); in "
        f"memory {1e3 * ram['median_seconds']:,.0f} ms a step; losses and weights "
        f"{'equal bit for bit' if found['same_result'] else 'DIFFER'}.",
    )
    for placement, run in found["limited"].items():
        _line(
            console,
            f"  feature_placement {placement}: {1e3 * run['median_seconds']:,.0f} ms a step, "
            f"{found['slowdown'][placement]:.1f} times; {_megabytes(run['read_bytes_a_step'])} read and "
            f"{_count(run['major_faults_a_step'])} major faults a step.",
        )


def _megabytes(size: float | None) -> str:
    return "-" if size is None else f"{size / 1e6:,.0f} MB"


def _count(number: float | None) -> str:
    return "-" if number is None else f"{number:,.0f}"


def _roofline_row(console: Console, found: Mapping[str, Any]) -> None:
    speeds, moved = found["bytes_per_second"], found["feature_bytes_a_batch"]
    _line(
        console,
        f"Bandwidth: copy {speeds['copy'] / 1e9:.1f} GB/s, random rows into a kept buffer "
        f"{speeds['random_gather'] / 1e9:.1f} GB/s, rows read and averaged {speeds['gather_and_mean'] / 1e9:.1f} GB/s "
        f"({1e3 * found['seconds']['gather_and_mean']:.1f} ms a batch). Features of a batch: "
        f"{moved['gathered'] / 1e6:,.0f} MB by gather and average, {moved['fused'] / 1e6:,.0f} MB in one.",
    )
    if "bound" in found:
        bound = found["bound"]
        _line(
            console,
            f"DGL's draw alone takes {1e3 * bound['draw_seconds']:.1f} ms of one core, the rows alone "
            f"{1e3 * bound['rows_seconds']:.1f} ms of all: no batch below {1e3 * bound['least_seconds_a_batch']:.1f} "
            f"ms. That would be "
            + ", ".join(f"{ratio:.1f} times {name}" for name, ratio in bound["highest_ratio"].items())
            + ".",
        )


_PRINTERS = {"memory": _memory_row, "open": _open_row, "disk": _disk_row, "roofline": _roofline_row}


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _machine(console: Console, machine: Mapping[str, Any]) -> None:
    _line(
        console,
        f"{machine['cpu']}, {machine['cpus']} CPUs, {machine['threads']} threads, load {machine['load_average']:.1f} "
        f"before; torch {machine['versions']['torch']}, dngd {machine['versions']['dngd']}.",
    )


def _line(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=False)
