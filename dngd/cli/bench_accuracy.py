"""dngd bench accuracy: time to accuracy, tuned baselines against K-FAC's one setting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from dngd.cli.common import Json, bench_fields, error_console, expanded_or_none, field_help, out, print_json
from dngd.config import TrainConfig
from dngd.config_text import merge
from dngd.errors import UserError
from dngd.paths import expanded

MODELS = "gcn:2,sage:3"
GIVEN_EPOCHS = 30


def bench_accuracy(
    datasets: Annotated[
        str, typer.Option(help="Names or paths, separated by commas; NAME@SPLIT has a split of its own")
    ] = "products-mini",
    data_root: Annotated[Path | None, typer.Option(help=field_help("data_root"))] = None,
    cache_dir: Annotated[Path | None, typer.Option(help=field_help("cache_dir"))] = None,
    split: Annotated[str, typer.Option(help="masks, public, ...; random ones differ from seed to seed")] = (
        "random:0.5/0.25/0.25"
    ),
    scale: Annotated[float, typer.Option(help="Share of products-shaped's nodes and edges, 0.001 to 1")] = 1.0,
    protocol: Annotated[
        str,
        typer.Option(
            help="full: Adam, AdamW, SGD searched over 5 learning rates, 2 schedules, 3 batch sizes, lengths until "
            "validation stops improving, 5 seeds; quick: over 3 learning rates, 3 seeds; given: what the flags say, no search"
        ),
    ] = "full",
    models: Annotated[str | None, typer.Option(help=f"KIND:LAYERS, separated by commas (default: {MODELS})")] = None,
    model: Annotated[str | None, typer.Option(help="One model instead: its layer kind (gcn or sage)")] = None,
    num_layers: Annotated[int, typer.Option(help="Of --model")] = 2,
    hidden: Annotated[int, typer.Option(help=field_help("hidden"))] = 256,
    fanout: Annotated[str | None, typer.Option(help=field_help("fanout"))] = None,
    batch_size: Annotated[str, typer.Option(help="Seeds a step, or full: all training nodes, all neighbours")] = "512",
    epochs: Annotated[
        int | None,
        typer.Option(
            help="K-FAC's epochs (default: dngd train's); with --protocol given of all settings (default: 30)"
        ),
    ] = None,
    first_epochs: Annotated[
        int | None, typer.Option(help="Baselines' first length, doubled and halved while that helps (default: 5)")
    ] = None,
    max_epochs: Annotated[
        int | None, typer.Option(help="Baselines' longest length (default: 160, with --protocol quick 40)")
    ] = None,
    optimizers: Annotated[
        str, typer.Option(help="Some of kfac, adam, adamw, sgd, soap, muon, shampoo, separated by commas")
    ] = "kfac,adam,adamw,sgd",
    seeds: Annotated[
        str | None,
        typer.Option(help="Run seeds, separated by commas; curves are averaged over them (default: 0,1,2,3,4)"),
    ] = None,
    rates: Annotated[
        str | None, typer.Option("--lrs", help="Learning rates instead of the protocol's, 'adam=3e-3,1e-2;kfac=0.1'")
    ] = None,
    variants: Annotated[
        str | None,
        typer.Option(
            help="Further K-FAC settings, 'NAME:kfac.KEY=VALUE,...;NAME:...' (lr, weight_decay and average_share too)"
        ),
    ] = None,
    eval_steps: Annotated[
        int | None,
        typer.Option(help="Steps between evaluations (default: 1 up to step 20, then a twentieth of the steps so far)"),
    ] = None,
    targets: Annotated[
        str | None, typer.Option(help="Validation scores (default: Adam's best less 0.005, and its best)")
    ] = None,
    metric: Annotated[
        str,
        typer.Option(help="accuracy, roc_auc, or auto: roc_auc for two classes of which one has less than a third"),
    ] = "auto",
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="For all: kfac.*, dropout, weight_decay, lr_schedule, ..."),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="torch threads (default: torch's own choice)")] = None,
    use_gpu: Annotated[bool, typer.Option("--use-gpu", help="Train on a GPU, which holds the features")] = False,
    output: Annotated[
        Path | None,
        typer.Option("--out", help="Folder that keeps finished trainings, to go on from, and gets result.json"),
    ] = None,
    search_only: Annotated[
        bool,
        typer.Option(
            "--search-only", help="Leave the finals to the same command without this flag; searches may run in parallel"
        ),
    ] = False,
    finals_of: Annotated[
        Path | None,
        typer.Option(help="Result of the same command whose search is taken over: its finals alone are run anew"),
    ] = None,
    page: Annotated[Path | None, typer.Option("--report", help="HTML file that gets a page with plots")] = None,
    picture: Annotated[Path | None, typer.Option("--svg", help="SVG file that gets the main plot")] = None,
    as_json: Json = False,
) -> None:
    """Train optimizers in turns; tell the seconds and steps that each needs to reach a validation score."""
    from dngd.bench import AccuracyOptions, progress_for, run_accuracy_bench
    from dngd.bench.accuracy import GIVEN
    from dngd.bench.accuracy_tables import print_accuracy, print_searches
    from dngd.bench.competitors import (
        SETTABLE_IN_RUNS,
        parse_datasets,
        parse_fields,
        parse_models,
        parse_names,
        parse_seeds,
        parse_targets,
    )
    from dngd.report import check_file, check_page, write_accuracy_page, write_accuracy_svg

    if models is not None and model is not None:
        raise UserError("--models and --model are both given; leave one out")
    output, page, picture, finals_of = map(expanded_or_none, (output, page, picture, finals_of))
    if output is not None and output.exists() and not output.is_dir():
        raise UserError(f"--out {output} is a file; give a folder, which keeps finished trainings")
    for path in (page, picture):
        if path is not None:
            check_file(path)
    if page is not None:
        check_page(page, "--report")
    chosen = parse_models(models or MODELS) if model is None else ((model, num_layers),)
    flags = bench_fields(locals() | {"model": chosen[0][0], "num_layers": chosen[0][1]})
    if epochs is not None or protocol == GIVEN:
        flags["epochs"] = GIVEN_EPOCHS if epochs is None else epochs
    fields = merge(flags, parse_fields(assignments or [], SETTABLE_IN_RUNS, "--set"))
    options = AccuracyOptions(
        TrainConfig(**fields, dataset="", engine="local", use_gpu=use_gpu),
        parse_datasets(datasets, split),
        chosen,
        optimizers=parse_names(optimizers),
        protocol=protocol,
        seeds=None if seeds is None else parse_seeds(seeds),
        first_epochs=first_epochs,
        max_epochs=max_epochs,
        rates=rates,
        variants=variants,
        eval_steps=eval_steps,
        targets=None if targets is None else parse_targets(targets),
        metric=metric,
        scale=scale,
        threads=threads,
        folder=output,
        search_only=search_only,
        finals_of=finals_of,
    )
    with progress_for(error_console()) as progress:
        result = run_accuracy_bench(options, progress)
    if search_only:
        print_json(result) if as_json else print_searches(result, out)
        return
    if output is not None:
        (output / "result.json").write_text(json.dumps(result) + "\n")
    if page is not None:
        write_accuracy_page(result, page)
    if picture is not None:
        write_accuracy_svg(result, picture)
    print_json(result) if as_json else print_accuracy(result, out)


def bench_accuracy_overview(
    results: Annotated[list[Path], typer.Argument(help="Files that dngd bench accuracy --json wrote")],
    picture: Annotated[Path | None, typer.Option("--svg", help="SVG file that gets a plot a graph")] = None,
    best_tuned: Annotated[
        bool, typer.Option(help="Results of both protocols; of each graph that whose Adam was tuned more")
    ] = False,
    as_json: Json = False,
) -> None:
    """Put results of dngd bench accuracy together: one table of ratios and one picture of all their graphs."""
    from dngd.bench.accuracy_files import combine_results
    from dngd.bench.accuracy_tables import print_overview
    from dngd.report import check_file, write_accuracy_svg

    picture = expanded_or_none(picture)
    if picture is not None:
        check_file(picture)
    result = combine_results([expanded(path) for path in results], best_tuned=best_tuned)
    if picture is not None:
        write_accuracy_svg(result, picture)
    print_json(result) if as_json else print_overview(result, out)
