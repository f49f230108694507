"""The command line: argument parsing and printing only.

Exit codes: 0 done; 1 training failed; 2 a mistake that the user can mend, told in one sentence.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dngd import __version__
from dngd.config import TrainConfig, merge, parse_assignment, read_yaml
from dngd.errors import TrainingError, UserError

app = typer.Typer(
    name="dngd",
    help="Train graph neural networks on large graphs with natural gradients (K-FAC), on Ray Train and DGL.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
data_app = typer.Typer(help="Graphs on disk: import, make, describe and check stores.", no_args_is_help=True)
app.add_typer(data_app, name="data")
bench_app = typer.Typer(help="Measure optimizers against each other, taken in turns.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")

out = Console()

INTERRUPTED = 130
RESUME_HINT = "interrupted; a run goes on from its newest checkpoint with dngd train --run-dir RUN --resume"

# Newer typer brings a click of its own, older ones use the installed one: the base class of either.
_UsageError: type[Exception] = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output, nothing else there.")]


def _field(name: str) -> str:
    """Return a configuration field's description with its default, for --help."""
    field = TrainConfig.model_fields[name]
    default = field.get_default(call_default_factory=True) if not field.is_required() else None
    shown = "" if default is None or default is False else f" [default: {default}]"
    return f"{field.description}{shown}"


@app.command()
def train(
    dataset: Annotated[str | None, typer.Option(help=_field("dataset"))] = None,
    data_root: Annotated[Path | None, typer.Option(help=_field("data_root"))] = None,
    cache_dir: Annotated[Path | None, typer.Option(help=_field("cache_dir"))] = None,
    split: Annotated[str | None, typer.Option(help=_field("split"))] = None,
    engine: Annotated[str | None, typer.Option(help=_field("engine"))] = None,
    num_workers: Annotated[int | None, typer.Option(help=_field("num_workers"))] = None,
    num_shards: Annotated[int | None, typer.Option(help=_field("num_shards"))] = None,
    use_gpu: Annotated[bool | None, typer.Option("--use-gpu/--no-gpu", help=_field("use_gpu"))] = None,
    address: Annotated[
        str | None,
        typer.Option(help="Ray cluster to connect to [default: $RAY_ADDRESS, else a local one is started]"),
    ] = None,
    model: Annotated[str | None, typer.Option(help=_field("model") + " (gcn or sage)")] = None,
    hidden: Annotated[int | None, typer.Option(help=_field("hidden"))] = None,
    num_layers: Annotated[int | None, typer.Option(help=_field("num_layers"))] = None,
    fanout: Annotated[str | None, typer.Option(help=_field("fanout"))] = None,
    dropout: Annotated[float | None, typer.Option(help=_field("dropout"))] = None,
    batch_size: Annotated[str | None, typer.Option(help=_field("batch_size"))] = None,
    semi: Annotated[str | None, typer.Option(help=_field("semi") + " (none, two_means or pooled)")] = None,
    semi_gamma: Annotated[float | None, typer.Option(help=_field("semi_gamma"))] = None,
    epochs: Annotated[int | None, typer.Option(help=_field("epochs"))] = None,
    max_steps: Annotated[int | None, typer.Option(help=_field("max_steps"))] = None,
    optimizer: Annotated[str | None, typer.Option(help=_field("optimizer") + " (kfac, adam, adamw or sgd)")] = None,
    lr: Annotated[float | None, typer.Option(help=_field("lr"))] = None,
    lr_schedule: Annotated[str | None, typer.Option(help=_field("lr_schedule") + " (cosine or constant)")] = None,
    warmup_steps: Annotated[int | None, typer.Option(help=_field("warmup_steps"))] = None,
    weight_decay: Annotated[float | None, typer.Option(help=_field("weight_decay"))] = None,
    damping: Annotated[
        float | None, typer.Option(help="kfac.damping: λ, a share of the factors' traces [default: 0.01]")
    ] = None,
    seed: Annotated[int | None, typer.Option(help=_field("seed"))] = None,
    num_samplers: Annotated[int | None, typer.Option(help=_field("num_samplers"))] = None,
    run_dir: Annotated[Path | None, typer.Option(help=_field("run_dir"))] = None,
    resume: Annotated[bool | None, typer.Option("--resume", help=_field("resume"))] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of configuration fields; flags and --set go on top")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Any configuration field, e.g. kfac.damping=0.01; may be repeated",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print what the run needs (memory, samplers, factors, bytes on the wire) and stop",
        ),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, no table")] = False,
    as_json: Json = False,
) -> None:
    """Train a model and leave a run folder."""
    flags: dict[str, Any] = {
        name: value
        for name, value in locals().items()
        if name in TrainConfig.model_fields and name != "config" and value is not None
    }
    if damping is not None:
        flags["kfac"] = {"damping": damping}
    if address is not None:
        flags["ray"] = {"address": address}
    from dngd.launch import Trainer  # imports torch: not for --help

    fields = merge(_base_fields(config, run_dir, bool(resume)), flags)
    for text in assignments or []:
        fields = merge(fields, parse_assignment(text))
    trainer = Trainer(TrainConfig(**fields), quiet=quiet)
    if dry_run:
        plan = trainer.plan()
        _print_json(plan.to_json()) if as_json else _print_plan(plan.to_json(), trainer.config)
        return
    result = trainer.fit()
    if as_json:
        _print_json(result.to_json())
    elif not quiet:
        _print_result(result.to_json())


def _base_fields(config: Path | None, run_dir: Path | None, resume: bool) -> dict[str, Any]:
    """Return what flags go on top of: the configuration file, or else the resumed run's own configuration."""
    if config is not None:
        return read_yaml(config)
    from dngd.train import RunFolder

    if resume and run_dir is not None and RunFolder(run_dir).config.exists():
        return read_yaml(RunFolder(run_dir).config)
    return {}


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="Run folder")],
    data_root: Annotated[Path | None, typer.Option(help=_field("data_root"))] = None,
    as_json: Json = False,
) -> None:
    """Evaluate a run's best model exactly, on all neighbours of all nodes."""
    from dngd.train.evaluate_run import evaluate_run

    scores = evaluate_run(run, data_root=data_root)
    if as_json:
        _print_json(scores)
        return
    table = Table(title=f"{run}: model of step {scores['step']}")
    for column in ("nodes", "accuracy", "loss"):
        table.add_column(column)
    for part in ("train", "val", "test"):
        table.add_row(part, f"{scores[part]['accuracy']:.4f}", f"{scores[part]['loss']:.4f}")
    out.print(table)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders")],
    output: Annotated[Path, typer.Option("--out", help="HTML file to write")] = Path("report.html"),
) -> None:
    """Write one self-contained HTML page about one or several runs."""
    from dngd.report import write_report

    if output.exists() and (output.is_dir() or b"dngd" not in output.read_bytes()[:4096]):
        raise UserError(f"--out {output} exists and is no dngd report; give another path")
    out.print(str(write_report(runs, output)), highlight=False)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check versions, devices and threads; say what is missing or untested, and the fix. Exit code 0 or 1."""
    from dngd.doctor import diagnose

    diagnosis = diagnose()
    if as_json:
        sys.stdout.write(diagnosis.to_json() + "\n")
    else:
        diagnosis.render(out)
    raise typer.Exit(diagnosis.exit_code)


@data_app.command("import")
def data_import(
    source: Annotated[Path, typer.Argument(help="npz file, or Planetoid folder (with raw/ind.NAME.*)")],
    store: Annotated[Path, typer.Option("--out", help="Folder of the new store")],
    source_format: Annotated[str, typer.Option("--format", help="npz or planetoid")] = "npz",
    name: Annotated[str | None, typer.Option(help="Name kept in the store")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a store that is already there")] = False,
) -> None:
    """Turn a graph into a store."""
    from dngd import graph

    importers: dict[str, Any] = {"npz": graph.import_npz, "planetoid": graph.import_planetoid}
    if source_format not in importers:
        raise UserError(f"--format {source_format!r} is unknown; use one of: " + ", ".join(importers))
    _print_store(graph.describe(importers[source_format](source, store, name=name, overwrite=overwrite)))


@data_app.command()
def synth(
    store: Annotated[Path, typer.Option("--out", help="Folder of the new store")],
    name: Annotated[str, typer.Option(help="Name kept in the store")] = "synthetic",
    nodes: Annotated[int, typer.Option(help="Number of nodes")] = 60_000,
    edges: Annotated[int, typer.Option(help="Number of edges, both directions counted")] = 1_500_000,
    classes: Annotated[int, typer.Option(help="Number of classes")] = 47,
    features: Annotated[int, typer.Option(help="Number of features")] = 100,
    homophily: Annotated[float, typer.Option(help="Share of edges within a class")] = 0.8,
    label_noise: Annotated[float, typer.Option(help="Share of labels drawn at random")] = 0.07,
    seed: Annotated[int, typer.Option(help="Seed; equal seeds give equal graphs")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a store that is already there")] = False,
) -> None:
    """Make a synthetic graph with skewed degrees and learnable labels."""
    from dngd import graph

    made = graph.write_synth(
        store,
        name=name,
        num_nodes=nodes,
        num_edges=edges,
        num_classes=classes,
        num_features=features,
        homophily=homophily,
        label_noise=label_noise,
        seed=seed,
        overwrite=overwrite,
    )
    _print_store(graph.describe(made))


@data_app.command()
def info(store: Annotated[Path, typer.Argument(help="Store folder")], as_json: Json = False) -> None:
    """Describe a store."""
    from dngd import graph

    description = graph.describe(graph.GraphStore.open(store))
    _print_json(description) if as_json else _print_store(description)


@data_app.command()
def verify(store: Annotated[Path, typer.Argument(help="Store folder")]) -> None:
    """Check every byte of a store against its manifest, and that its content makes sense."""
    from dngd import graph

    problems = graph.verify_store(store)
    if problems:
        raise UserError(f"{store}: " + "; ".join(problems))
    out.print(f"{store}: every file matches its manifest", highlight=False)


@bench_app.command("step")
def bench_step(
    dataset: Annotated[
        str, typer.Option(help="Name or path; products-shaped: ogbn-products' shape, generated once and kept")
    ] = "products-shaped",
    data_root: Annotated[Path | None, typer.Option(help=_field("data_root"))] = None,
    cache_dir: Annotated[Path | None, typer.Option(help=_field("cache_dir"))] = None,
    split: Annotated[str, typer.Option(help=_field("split"))] = "masks",
    scale: Annotated[float, typer.Option(help="Share of products-shaped's nodes and edges, 0.001 to 1")] = 1.0,
    model: Annotated[str, typer.Option(help="Layer kind (gcn or sage)")] = "sage",
    num_layers: Annotated[int, typer.Option(help=_field("num_layers"))] = 3,
    hidden: Annotated[int, typer.Option(help=_field("hidden"))] = 256,
    fanout: Annotated[str | None, typer.Option(help=_field("fanout"))] = None,
    batch_size: Annotated[str, typer.Option(help="Seeds a step, or full")] = "1024",
    optimizers: Annotated[
        str, typer.Option(help="Some of kfac, adam, adamw, sgd, soap, muon, shampoo, separated by commas")
    ] = "adam,kfac",
    steps: Annotated[int, typer.Option(help="Measured steps, rounded up to whole K-FAC inverse_update_periods")] = 200,
    warmup: Annotated[
        int | None, typer.Option(help="Steps before them [default: 60, more where K-FAC's start takes longer]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of weights, splits, batches, sampling, dropout")] = 0,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="kfac.* (K-FAC's settings), dropout, weight_decay, momentum"),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="torch threads [default: torch's own choice]")] = None,
    as_json: Json = False,
) -> None:
    """Time one training step of each optimizer, in turns on the same mini-batches."""
    from dngd.bench import StepOptions, progress_for, run_step_bench
    from dngd.bench.competitors import SETTABLE, parse_fields, parse_names
    from dngd.bench.tables import print_step

    flags = _bench_fields(locals())
    fields = merge(flags, parse_fields(assignments or [], SETTABLE, "--set"))
    options = StepOptions(
        TrainConfig(**fields, dataset=dataset, seed=seed, engine="local"),
        optimizers=parse_names(optimizers),
        steps=steps,
        warmup=warmup,
        threads=threads,
        scale=scale,
    )
    with progress_for(Console(stderr=True)) as progress:
        result = run_step_bench(options, progress)
    _print_json(result) if as_json else print_step(result, out)


@bench_app.command("accuracy")
def bench_accuracy(
    datasets: Annotated[str, typer.Option(help="Names or paths, separated by commas")] = "products-mini",
    data_root: Annotated[Path | None, typer.Option(help=_field("data_root"))] = None,
    cache_dir: Annotated[Path | None, typer.Option(help=_field("cache_dir"))] = None,
    split: Annotated[str, typer.Option(help=_field("split"))] = "masks",
    model: Annotated[str, typer.Option(help="Layer kind (gcn or sage)")] = "sage",
    num_layers: Annotated[int, typer.Option(help=_field("num_layers"))] = 2,
    hidden: Annotated[int, typer.Option(help=_field("hidden"))] = 256,
    fanout: Annotated[str | None, typer.Option(help=_field("fanout"))] = None,
    batch_size: Annotated[str, typer.Option(help="Seeds a step, or full: all training nodes, all neighbours")] = "512",
    epochs: Annotated[int, typer.Option(help="Passes over the training nodes, and length of the cosine schedule")] = 30,
    optimizers: Annotated[
        str, typer.Option(help="Some of kfac, adam, adamw, sgd, soap, muon, shampoo, separated by commas")
    ] = "kfac,adam",
    seeds: Annotated[str, typer.Option(help="Run seeds, separated by commas; curves are averaged over them")] = "0,1,2",
    rates: Annotated[
        str | None,
        typer.Option("--lrs", help="Learning rates tried, 'adam=3e-3,1e-2;kfac=0.1' [default: adam=3e-3,1e-2,2e-2]"),
    ] = None,
    variants: Annotated[
        str | None,
        typer.Option(help="Further K-FAC settings, 'NAME:kfac.KEY=VALUE,...;NAME:...' (lr and weight_decay too)"),
    ] = None,
    eval_steps: Annotated[
        int | None, typer.Option(help="Steps between evaluations [default: at least 20 evaluations a run]")
    ] = None,
    targets: Annotated[
        str | None, typer.Option(help="Validation accuracies [default: Adam's best seed mean, and 0.005 below it]")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="For all: kfac.*, dropout, weight_decay, lr_schedule, ..."),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="torch threads [default: torch's own choice]")] = None,
    output: Annotated[Path | None, typer.Option("--out", help="File that gets the JSON too")] = None,
    as_json: Json = False,
) -> None:
    """Train optimizers in turns; tell the seconds and steps that each needs to reach a validation accuracy."""
    from dngd.bench import AccuracyOptions, progress_for, run_accuracy_bench
    from dngd.bench.competitors import SETTABLE_IN_RUNS, parse_fields, parse_names, parse_seeds, parse_targets
    from dngd.bench.tables import print_accuracy

    if output is not None and (output.is_dir() or not output.absolute().parent.is_dir()):
        raise UserError(f"--out {output} is a folder or lies in none that exists; give the path of a file")
    flags = _bench_fields(locals()) | {"epochs": epochs}
    fields = merge(flags, parse_fields(assignments or [], SETTABLE_IN_RUNS, "--set"))
    options = AccuracyOptions(
        TrainConfig(**fields, dataset="", engine="local"),
        parse_names(datasets),
        optimizers=parse_names(optimizers),
        seeds=parse_seeds(seeds),
        rates=rates,
        variants=variants,
        eval_steps=eval_steps,
        targets=None if targets is None else parse_targets(targets),
        threads=threads,
    )
    with progress_for(Console(stderr=True)) as progress:
        result = run_accuracy_bench(options, progress)
    if output is not None:
        output.write_text(json.dumps(result) + "\n")
    _print_json(result) if as_json else print_accuracy(result, out)


def _bench_fields(flags: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration fields among a benchmark's flags."""
    names = ("data_root", "cache_dir", "split", "model", "num_layers", "hidden", "fanout", "batch_size")
    return {name: flags[name] for name in names if flags[name] is not None}


def _print_json(data: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(data) + "\n")


def _print_store(description: dict[str, Any]) -> None:
    table = Table(title=str(description.get("name", "")), show_header=False)
    for key, value in description.items():
        table.add_row(key, json.dumps(value) if isinstance(value, dict | list) else str(value))
    out.print(table)


def _print_result(result: dict[str, Any]) -> None:
    table = Table(title="Result", show_header=False)
    table.add_row("best validation accuracy", f"{result['best_val_accuracy']:.4f}")
    table.add_row("test accuracy there", f"{result['test_accuracy']:.4f}")
    table.add_row(
        "training time",
        f"{result['train_seconds']:.1f} s, of which to the best {result['seconds_to_best_val']:.1f} s",
    )
    table.add_row("steps, epochs, workers", f"{result['steps']}, {result['epochs']:g}, {result['world_size']}")
    if result["step_ms"]:
        table.add_row("step, median and p99", f"{result['step_ms']['p50']:.1f} ms, {result['step_ms']['p99']:.1f} ms")
    table.add_row("seeds per second", f"{result['seeds_per_second']:,.0f}")
    sent = result["bytes"]
    table.add_row("sent by rank 0", ", ".join(f"{kind} {_size(size)}" for kind, size in sent.items()))
    table.add_row("peak memory of rank 0", _size(result["peak_rss_bytes"]))
    out.print(table)
    # Below the table: a path cut to a column's width is of no use.
    out.print(f"run folder  {result['run_dir']}", highlight=False, soft_wrap=True)
    out.print(f"report      {Path(result['run_dir']) / 'report.html'}", highlight=False, soft_wrap=True)


def _print_plan(plan: dict[str, Any], config: TrainConfig) -> None:
    table = Table(title="Plan", show_header=False)
    table.add_row("steps", f"{plan['total_steps']} ({plan['steps_per_epoch']} an epoch)")
    table.add_row("seeds a step", f"{config.shards} shards x {plan['batch_size']}")
    if config.constant_full_batch:
        table.add_row("mode", "constant full batch: all neighbours, the same layer graphs in each step, no sampler")
    else:
        table.add_row("samplers a worker", str(config.num_samplers))
    parts = ("model", "optimizer", "curvature", "full_batch", "activation", "evaluation", "sampler")
    unused = {"sampler"} if config.constant_full_batch else {"full_batch"}
    for name in ("store", "worker", *(name for name in parts if name not in unused)):
        note = {"store": " (one shared mapping)", "worker": " (sum of the below)"}.get(name, "")
        table.add_row(f"memory: {name.replace('_', ' ')}", _size(plan[f"{name}_bytes"]) + note)
    for layer in plan["layers"]:
        d_a, d_out, kept = layer["d_a"], layer["d_out"], layer["factors"]
        factors = f"A {kept['a']}, G {kept['g']}" if config.optimizer == "kfac" else "no factors"
        table.add_row(layer["name"], f"weight and bias {d_out} x {d_a}; {factors}")
    table.add_row("wire: gradient a step", _size(plan["gradient_bytes_per_step"]))
    table.add_row("wire: factors a refresh", _size(plan["factor_bytes_per_refresh"]))
    table.add_row("wire: inverses a refresh", _size(plan["inverse_bytes_per_refresh"]))
    out.print(table)


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def _version(show: bool) -> None:
    if show:
        out.print(f"dngd {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Log what goes on inside.")] = False,
) -> None:
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; the `dngd` script."""
    try:
        code = app(args=list(arguments) if arguments is not None else None, standalone_mode=False)
    except UserError as error:
        _fail(str(error), 2)
    except TrainingError as error:
        _fail(str(error), 1)
    except _UsageError as error:
        if not (sentence := _sentence(error)):
            sys.exit(2)  # no command at all: the help is on the screen already
        _fail(f"{sentence} (see dngd --help)", 2)
    except (KeyboardInterrupt, typer.Abort):
        _fail(RESUME_HINT, INTERRUPTED)
    except MemoryError as error:
        _fail(f"out of memory ({error or 'no details'}); ask for less, or use a machine with more", 1)
    else:
        if code == INTERRUPTED:  # typer turns Ctrl-C into this code
            _fail(RESUME_HINT, INTERRUPTED)
        sys.exit(code if isinstance(code, int) else 0)


def _sentence(error: Exception) -> str:
    """Return a parser's complaint on one line, with the option that it is about."""
    format_message = getattr(error, "format_message", None)
    text = str(format_message() if format_message else error)
    return " ".join(text.split())


def _fail(message: str, code: int) -> None:
    sys.stderr.write(f"dngd: {message}\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
