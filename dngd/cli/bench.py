"""dngd bench: the benchmarks behind the README's numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from dngd.cli.bench_accuracy import bench_accuracy, bench_accuracy_overview
from dngd.cli.bench_loop import bench_loop
from dngd.cli.bench_network import bench_comm, bench_scale
from dngd.cli.bench_paper import bench_paper
from dngd.cli.common import Json, bench_fields, error_console, field_help, flag_help, out, output_file, print_json
from dngd.config import TrainConfig
from dngd.config_text import merge, parse_assignment

bench_app = typer.Typer(
    help="Measure optimizers, communication, and the input pipeline against DGL's, taken in turns.",
    no_args_is_help=True,
)
bench_app.command("accuracy")(bench_accuracy)
bench_app.command("accuracy-overview")(bench_accuracy_overview)
bench_app.command("comm")(bench_comm)
bench_app.command("loop")(bench_loop)
bench_app.command("paper")(bench_paper)
bench_app.command("scale")(bench_scale)


@bench_app.command("step")
def bench_step(
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
    batch_size: Annotated[str, typer.Option(help="Seeds a step, or full")] = "1024",
    optimizers: Annotated[
        str, typer.Option(help="Some of kfac, adam, adamw, sgd, soap, muon, shampoo, separated by commas")
    ] = "adam,kfac",
    steps: Annotated[int, typer.Option(help="Measured steps, rounded up to whole K-FAC inverse_update_periods")] = 200,
    warmup: Annotated[
        int | None, typer.Option(help="Steps before them (default: 60, more where K-FAC's start takes longer)")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of weights, splits, batches, sampling, dropout")] = 0,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="kfac.* (K-FAC's settings), dropout, weight_decay, momentum"),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="torch threads (default: torch's own choice)")] = None,
    use_gpu: Annotated[bool, typer.Option("--use-gpu", help="Train on a GPU, which holds the features")] = False,
    as_json: Json = False,
) -> None:
    """Time one training step of each optimizer, in turns on the same mini-batches."""
    from dngd.bench import StepOptions, progress_for, run_step_bench
    from dngd.bench.competitors import SETTABLE, parse_fields, parse_names
    from dngd.bench.tables import print_step

    flags = bench_fields(locals())
    fields = merge(flags, parse_fields(assignments or [], SETTABLE, "--set"))
    options = StepOptions(
        TrainConfig(**fields, dataset=dataset, seed=seed, engine="local", use_gpu=use_gpu),
        optimizers=parse_names(optimizers),
        steps=steps,
        warmup=warmup,
        threads=threads,
        scale=scale,
    )
    with progress_for(error_console()) as progress:
        result = run_step_bench(options, progress)
    print_json(result) if as_json else print_step(result, out)


@bench_app.command("pipeline")
def bench_pipeline(
    dataset: Annotated[
        str, typer.Option(help="Name or path; products-shaped: ogbn-products' shape, generated once and kept")
    ] = "products-shaped",
    data_root: Annotated[Path | None, typer.Option(help=field_help("data_root"))] = None,
    cache_dir: Annotated[Path | None, typer.Option(help=field_help("cache_dir"))] = None,
    split: Annotated[str, typer.Option(help=field_help("split"))] = "masks",
    scale: Annotated[float, typer.Option(help="Share of products-shaped's nodes and edges, 0.001 to 1")] = 1.0,
    rows: Annotated[
        str | None,
        typer.Option(
            help="Some of input, gcn, float16, training, memory, open, disk, roofline, separated by commas "
            "(default: all)"
        ),
    ] = None,
    processes: Annotated[
        str, typer.Option(help="Numbers of sampler processes, and of DGL's workers, separated by commas")
    ] = "0,1,2",
    num_layers: Annotated[int, typer.Option(help=field_help("num_layers"))] = 3,
    hidden: Annotated[int, typer.Option(help=field_help("hidden"))] = 256,
    fanout: Annotated[str | None, typer.Option(help=field_help("fanout"))] = None,
    batch_size: Annotated[str, typer.Option(help="Seeds a batch")] = "1024",
    batches: Annotated[int, typer.Option(help="Batches of a contender's turn")] = 6,
    rounds: Annotated[int, typer.Option(help="Turns of each contender, after one of warm-up")] = 5,
    steps: Annotated[int, typer.Option(help="Training steps of the rows memory and disk")] = 5,
    prefetch: Annotated[int | None, typer.Option(help=flag_help("prefetch"))] = None,
    seed: Annotated[int, typer.Option(help="Of weights, splits, batches, sampling, dropout")] = 0,
    threads: Annotated[
        int | None, typer.Option(help="torch threads of a training process (default: torch's own choice)")
    ] = None,
    output: Annotated[Path | None, typer.Option("--out", help="File that gets the JSON too")] = None,
    as_json: Json = False,
) -> None:
    """Measure the way from disk to mini-batch, and whole training steps, against DGL's example."""
    from dngd.bench import PipelineOptions, progress_for, run_pipeline_bench
    from dngd.bench.competitors import parse_counts, parse_names
    from dngd.bench.pipeline import ROWS
    from dngd.bench.tables import print_pipeline

    output = output_file(output)
    options = PipelineOptions(
        TrainConfig(**bench_fields(locals()), dataset=dataset, seed=seed, engine="local"),
        rows=ROWS if rows is None else parse_names(rows),
        processes=parse_counts(processes, "--processes"),
        batches=batches,
        rounds=rounds,
        steps=steps,
        threads=threads,
        scale=scale,
    )
    with progress_for(error_console()) as progress:
        result = run_pipeline_bench(options, progress)
    if output is not None:
        output.write_text(json.dumps(result) + "\n")
    print_json(result) if as_json else print_pipeline(result, out)


@bench_app.command("trace")
def bench_trace(
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
    batch_size: Annotated[str, typer.Option(help="Seeds a step")] = "1024",
    optimizer: Annotated[str, typer.Option(help="kfac, adam, adamw or sgd")] = "adam",
    feature_placement: Annotated[str, typer.Option(help=field_help("feature_placement"))] = "auto",
    num_samplers: Annotated[int | None, typer.Option(help=field_help("num_samplers"))] = None,
    steps: Annotated[int, typer.Option(help="Traced steps")] = 20,
    warmup: Annotated[int, typer.Option(help="Steps before them, of which the second half is timed")] = 100,
    seed: Annotated[int, typer.Option(help="Of weights, splits, batches, sampling, dropout")] = 0,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any other field of dngd train, e.g. feature_cache_bytes=0"),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--out", help="File that keeps the trace, for Perfetto or chrome://tracing")
    ] = None,
    as_json: Json = False,
) -> None:
    """Time training steps on a GPU, samplers included, and trace some; tell how much of the copying to it runs while it computes."""
    from dngd.bench.trace import trace_training

    output = output_file(output)
    fields: dict[str, Any] = bench_fields(locals()) | {
        "dataset": dataset,
        "optimizer": optimizer,
        "feature_placement": feature_placement,
        "num_samplers": num_samplers,
        "seed": seed,
        "engine": "local",
        "use_gpu": True,
    }
    for text in assignments or []:
        fields = merge(fields, parse_assignment(text))
    result = trace_training(TrainConfig(**fields), steps, warmup, output, scale)
    if as_json:
        print_json(result)
        return
    if result["step_ms"] is not None:
        out.print(
            f"{result['step_ms']:.1f} ms a step, sampling and copies included ({result['timed_steps']} steps, "
            f"{result['samplers']} sampler processes)",
            highlight=False,
        )
    out.print(
        f"{result['traced_step_ms']:.1f} ms while traced, {100 * result['busy_share']:.0f} % of it with a kernel running",
        highlight=False,
    )
    hidden_share = result["hidden_share"]
    if hidden_share is None:
        out.print("nothing was copied to the GPU", highlight=False)
        return
    out.print(
        f"{100 * hidden_share:.0f} % of {1e3 * result['copy_seconds'] / steps:.2f} ms of copies a step ran while the GPU "
        f"computed ({result['device']}; features: {result['feature_placement']}; {result['pageable_copies']} of "
        f"{result['copies']} copies came from memory that is not page-locked)",
        highlight=False,
    )
