"""dngd bench comm and dngd bench scale: training over several processes and over limited networks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dngd.cli.common import Json, bench_fields, check_output, field_help, out, print_json
from dngd.config import TrainConfig, merge


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
        int | None, typer.Option(help="Steps before them [default: 60, more where K-FAC's start takes longer]")
    ] = None,
    epochs: Annotated[int, typer.Option(help="Of the run whose bytes are told")] = 10,
    num_samplers: Annotated[int, typer.Option(help="Sampler processes a rank; 0 draws within the step")] = 0,
    seed: Annotated[int, typer.Option(help="Of weights, splits, batches, sampling, dropout")] = 0,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="kfac.* (K-FAC's settings), dropout, weight_decay, momentum"),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="torch threads a process [default: the CPUs' share]")] = None,
    output: Annotated[Path | None, typer.Option("--out", help="File that gets the JSON too")] = None,
    as_json: Json = False,
) -> None:
    """Compare K-FAC with Adam between processes, in turns: time of a step, bytes of gradients and curvature."""
    from dngd.bench import CommOptions, progress_for, run_comm_bench
    from dngd.bench.competitors import SETTABLE, parse_fields
    from dngd.bench.network_tables import print_comm

    check_output(output)
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
    with progress_for(Console(stderr=True)) as progress:
        result = run_comm_bench(options, progress)
    if output is not None:
        output.write_text(json.dumps(result) + "\n")
    print_json(result) if as_json else print_comm(result, out)
