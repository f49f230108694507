"""dngd bench comm and dngd bench scale: training over several processes and over limited networks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from dngd.cli.common import Json, bench_fields, error_console, field_help, out, output_file, print_json
from dngd.config import TrainConfig
from dngd.config_text import merge
from dngd.errors import UserError


def bench_comm(
    dataset: Annotated[
        str, typer.Option(help="Name or path; products-shaped: ogbn-products' shape, generated once and kept")
    ] = "products-shaped",
    data_root: Annotated[Path | None, typer.Option(help=field_help("data_root"))] = None,
    cache_dir: Annotated[Path | None, typer.Option(help=field_help("cache_dir"))] = None,
    split: Annotated[str, typer.Option(help=field_help("split"))] = "masks",
    scale: Annotated[float, typer.Option(help="Share of products-shaped's nodes and edges, 0.001 to 1")] = 1.0,
    model: Annotated[str, typer.Option(help="Layer kind (gcn or sage)")] = "sage",
    num_layers: Annotated[int, typer.Option(help=field_help("num_layers"))] = 3,
    hidden: Annotated[int, typer.Option(help=field_help("hidden"))] = 256,
    fanout: Annotated[str | None, typer.Option(help=field_help("fanout"))] = None,
    batch_size: Annotated[str, typer.Option(help="Seeds a shard and step")] = "1024",
    processes: Annotated[int, typer.Option(help="Ranks of each world, on this machine")] = 2,
    variants: Annotated[
        str | None,
        typer.Option(help="Further K-FAC settings, 'NAME:kfac.KEY=VALUE,...;NAME:...', each a world of its own"),
    ] = None,
    steps: Annotated[int, typer.Option(help="Measured steps, rounded up to whole K-FAC inverse_update_periods")] = 100,
    turn: Annotated[int, typer.Option(help="Steps of a turn, at most")] = 10,
    warmup: Annotated[
        int | None, typer.Option(help="Steps before them (default: 60, more where K-FAC's start takes longer)")
    ] = None,
    epochs: Annotated[int, typer.Option(help="Of the run whose bytes are told")] = 10,
    num_samplers: Annotated[int, typer.Option(help="Sampler processes a rank; 0 draws within the step")] = 0,
    seed: Annotated[int, typer.Option(help="Of weights, splits, batches, sampling, dropout")] = 0,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="kfac.* (K-FAC's settings), dropout, weight_decay, momentum"),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="torch threads a process (default: the CPUs' share)")] = None,
    output: Annotated[Path | None, typer.Option("--out", help="File that gets the JSON too")] = None,
    as_json: Json = False,
) -> None:
    """Compare K-FAC with Adam between processes, in turns: time of a step, bytes of gradients and curvature."""
    from dngd.bench import CommOptions, progress_for, run_comm_bench
    from dngd.bench.competitors import SETTABLE, parse_fields
    from dngd.bench.network_tables import print_comm

    output = output_file(output)
    flags = bench_fields(locals()) | {"epochs": epochs, "num_samplers": num_samplers}
    fields = merge(flags, parse_fields(assignments or [], SETTABLE, "--set"))
    options = CommOptions(
        TrainConfig(**fields, dataset=dataset, seed=seed, engine="local"),
        processes=processes,
        variants=variants,
        steps=steps,
        turn=turn,
        warmup=warmup,
        threads=threads,
        scale=scale,
    )
    with progress_for(error_console()) as progress:
        result = run_comm_bench(options, progress)
    if output is not None:
        output.write_text(json.dumps(result) + "\n")
    print_json(result) if as_json else print_comm(result, out)


def bench_scale(
    dataset: Annotated[
        str, typer.Option(help="Name or path; products-shaped: ogbn-products' shape, generated once and kept")
    ] = "products-shaped",
    data_root: Annotated[Path | None, typer.Option(help=field_help("data_root"))] = None,
    cache_dir: Annotated[Path | None, typer.Option(help=field_help("cache_dir"))] = None,
    split: Annotated[str, typer.Option(help=field_help("split"))] = "masks",
    scale: Annotated[float, typer.Option(help="Share of products-shaped's nodes and edges, 0.001 to 1")] = 0.02,
    model: Annotated[str, typer.Option(help="Layer kind (gcn or sage)")] = "sage",
    num_layers: Annotated[int, typer.Option(help=field_help("num_layers"))] = 3,
    hidden: Annotated[int, typer.Option(help="Width of the model that is predicted for many GPUs")] = 256,
    fanout: Annotated[str | None, typer.Option(help=field_help("fanout"))] = None,
    batch_size: Annotated[str, typer.Option(help="Seeds a host and step")] = "128",
    hosts: Annotated[str, typer.Option(help="Numbers of hosts, separated by commas")] = "2,4",
    mbits: Annotated[str, typer.Option(help="Rates of a host's link, Mbit/s, separated by commas")] = "1000,100",
    optimizers: Annotated[str, typer.Option(help="Some of adam, kfac, adamw, sgd, separated by commas")] = "adam,kfac",
    widths: Annotated[str, typer.Option(help="Widths of the hidden layers, separated by commas")] = "256,512",
    steps: Annotated[int, typer.Option(help="Steps of a setting; K-FAC takes whole inverse_update_periods")] = 30,
    compute: Annotated[
        str | None,
        typer.Option(
            help="A GPU's compute for the predictions, 'step_ms=..,statistics_ms=..,precondition_ms=..,inversion_ms=..', or "
            "a JSON file with these (default: this machine's CPU, measured)"
        ),
    ] = None,
    gpus_per_host: Annotated[int, typer.Option(help="Of the predictions")] = 8,
    gbits: Annotated[float, typer.Option(help="Between hosts, of the predictions, Gbit/s")] = 100.0,
    gpu_gbytes: Annotated[float, typer.Option(help="Between GPUs of a host, of the predictions, GB/s")] = 200.0,
    latency_us: Annotated[float, typer.Option(help="Of a round, of the predictions, microseconds")] = 20.0,
    seed: Annotated[int, typer.Option(help="Of weights, splits, batches, sampling, dropout")] = 0,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="kfac.* (K-FAC's settings), dropout, weight_decay, momentum"),
    ] = None,
    threads: Annotated[int, typer.Option(help="torch threads of a host")] = 1,
    output: Annotated[Path | None, typer.Option("--out", help="File that gets the JSON too")] = None,
    as_json: Json = False,
) -> None:
    """Train between network namespaces with limited links (as root, Linux); fit a cost model, predict many GPUs."""
    from dngd.bench import ScaleOptions, progress_for, run_scale_bench
    from dngd.bench.competitors import SETTABLE, parse_counts, parse_fields, parse_names
    from dngd.bench.network_tables import print_scale
    from dngd.bench.projection import Machines, parse_compute

    output = output_file(output)
    flags = bench_fields(locals()) | {"num_samplers": 0}
    fields = merge(flags, parse_fields(assignments or [], SETTABLE, "--set"))
    for name, value in (("gpus-per-host", gpus_per_host), ("gbits", gbits), ("gpu-gbytes", gpu_gbytes)):
        if value <= 0:
            raise UserError(f"--{name} {value:g} must be above 0")
    if latency_us < 0:
        raise UserError(f"--latency-us {latency_us:g} must be at least 0")
    options = ScaleOptions(
        TrainConfig(**fields, dataset=dataset, seed=seed, engine="local"),
        hosts=parse_counts(hosts, "--hosts"),
        megabits=tuple(map(float, parse_counts(mbits, "--mbits"))),
        optimizers=parse_names(optimizers),
        widths=parse_counts(widths, "--widths"),
        steps=steps,
        threads=threads,
        scale=scale,
        compute=None if compute is None else parse_compute(compute),
        machines=Machines(gpus_per_host, gbits * 1e9 / 8, gpu_gbytes * 1e9, latency_us / 1e6),
    )
    with progress_for(error_console()) as progress:
        result = run_scale_bench(options, progress)
    if output is not None:
        output.write_text(json.dumps(result) + "\n")
    print_json(result) if as_json else print_scale(result, out)
