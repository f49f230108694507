"""dngd bench paper."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from dngd.cli.common import Json, error_console, expanded_or_none, field_help, out, print_json
from dngd.config import TrainConfig


def bench_paper(
    datasets: Annotated[str, typer.Option(help="Some of cora, citeseer, pubmed")] = "cora,citeseer,pubmed",
    splits: Annotated[str, typer.Option(help="public, complete or both")] = "public,complete",
    parts: Annotated[
        str,
        typer.Option(
            help="tuned: this project's best at the paper's architecture; alike: Adam with all else of it; wide: the "
            "best of any width; table: the paper's optimizers with its factors and this project's; seconds: of 200 "
            "epochs, in turns"
        ),
    ] = "tuned,alike,wide,table,seconds",
    num_seeds: Annotated[int, typer.Option(help="Seeds of what is reported")] = 10,
    grid_seeds: Annotated[int, typer.Option(help="The first of them that hyperparameters are chosen with")] = 3,
    rounds: Annotated[int, typer.Option(help="Turns of each optimizer in the part seconds")] = 3,
    processes: Annotated[int, typer.Option(help="Trainings at a time, each in a process of one torch thread")] = 2,
    threads: Annotated[int, typer.Option(help="torch threads of the part seconds, and of --processes 1")] = 1,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few epochs, one recipe a row: does everything work?")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--out", help="Folder that keeps finished trainings, for going on, and result.json")
    ] = None,
    data_root: Annotated[Path | None, typer.Option(help=field_help("data_root"))] = None,
    cache_dir: Annotated[Path | None, typer.Option(help=field_help("cache_dir"))] = None,
    as_json: Json = False,
) -> None:
    """Train the table of arXiv 2008.09624 (K-FAC for graph convolutions) and set it beside the paper's figures."""
    from dngd.bench import PaperOptions, progress_for, run_paper_bench
    from dngd.bench.competitors import parse_names
    from dngd.bench.paper_table import print_paper

    output = expanded_or_none(output)
    options = PaperOptions(
        datasets=parse_names(datasets),
        splits=parse_names(splits),
        parts=parse_names(parts),
        num_seeds=num_seeds,
        grid_seeds=grid_seeds,
        rounds=rounds,
        processes=processes,
        threads=threads,
        quick=quick,
        folder=output,
        data_root=TrainConfig(dataset="cora", data_root=data_root).data_root_in_use,
        cache_dir=cache_dir,
    )
    with progress_for(error_console()) as progress:
        result = run_paper_bench(options, progress)
    if output is not None:
        (output / "result.json").write_text(json.dumps(result) + "\n")
    print_json(result) if as_json else print_paper(result, out)
