"""dngd bench loop: a loop of one's own over PyG's layers, Adam against NaturalGradient's defaults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from dngd.cli.common import Json, error_console, field_help, out, output_file, print_json
from dngd.config import TrainConfig
from dngd.errors import UserError


def bench_loop(
    datasets: Annotated[
        str, typer.Option(help="Names or paths, separated by commas; NAME@SPLIT has a split of its own")
    ] = "products-mini@masks",
    data_root: Annotated[Path | None, typer.Option(help=field_help("data_root"))] = None,
    cache_dir: Annotated[Path | None, typer.Option(help=field_help("cache_dir"))] = None,
    split: Annotated[str, typer.Option(help="masks, public, ...; random ones differ from seed to seed")] = (
        "random:0.5/0.25/0.25"
    ),
    models: Annotated[str, typer.Option(help="KIND:LAYERS, separated by commas; gcn: GCNConv, sage: SAGEConv")] = (
        "gcn:2"
    ),
    hidden: Annotated[int, typer.Option(help=field_help("hidden"))] = 64,
    steps: Annotated[int, typer.Option(help="Of every setting")] = 200,
    num_neighbors: Annotated[
        str | None,
        typer.Option(help="Sampled batches: neighbours at each hop, nearest first, as 10,10 (default: full batches)"),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Seeds of a sampled batch, with --num-neighbors (default: 512)")
    ] = None,
    rates: Annotated[str, typer.Option("--lrs", help="Adam's learning rates, separated by commas")] = "1e-2,3e-2,1e-1",
    seeds: Annotated[str, typer.Option(help="Run seeds, separated by commas; curves are averaged over them")] = "0,1,2",
    threads: Annotated[int | None, typer.Option(help="torch threads (default: torch's own choice)")] = None,
    use_gpu: Annotated[bool, typer.Option("--use-gpu", help="Train on a GPU, which holds the graph")] = False,
    output: Annotated[Path | None, typer.Option("--out", help="File that gets the JSON too")] = None,
    as_json: Json = False,
) -> None:
    """Train PyG's layers in a plain loop, full-batch or sampled: Adam at several rates, and NaturalGradient as it comes."""
    from dngd.bench import LoopOptions, progress_for, run_loop_bench
    from dngd.bench.accuracy_tables import print_loop
    from dngd.bench.competitors import parse_datasets, parse_models, parse_rates, parse_seeds

    output = output_file(output)
    if "=" in rates or ";" in rates:
        raise UserError(f"--lrs {rates!r} has a name; here it is Adam's rates alone, e.g. --lrs 3e-3,1e-2")
    if batch_size is not None and num_neighbors is None:
        raise UserError(
            f"--batch-size {batch_size} is of sampled batches, and these are full; add --num-neighbors, as 10,10, or leave "
            "it out"
        )
    options = LoopOptions(
        parse_datasets(datasets, split),
        parse_models(models),
        hidden=hidden,
        steps=steps,
        rates=parse_rates(f"adam={rates}")["adam"],
        seeds=parse_seeds(seeds),
        num_neighbors=None if num_neighbors is None else _numbers(num_neighbors),
        batch_size=LoopOptions.batch_size if batch_size is None else batch_size,
        threads=threads,
        use_gpu=use_gpu,
        data_root=TrainConfig(dataset="cora", data_root=data_root).data_root_in_use,
        cache_dir=cache_dir,
    )
    with progress_for(error_console()) as progress:
        result = run_loop_bench(options, progress)
    if output is not None:
        output.write_text(json.dumps(result) + "\n")
    print_json(result) if as_json else print_loop(result, out)


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"--num-neighbors {text!r} is not valid; give whole numbers with commas, as 10,10") from None
