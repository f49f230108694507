"""Commands about runs: train, evaluate, predict, export; and doctor."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from dngd.cli.common import (
    INTERRUPTED,
    TERMINATED,
    Interrupted,
    Json,
    field_help,
    flag_help,
    out,
    print_json,
    size_text,
)
from dngd.config import TrainConfig, address_of_run
from dngd.config_text import merge, parse_assignment, read_yaml
from dngd.errors import RunInterrupted, UserError
from dngd.paths import expanded, runs_inside_text
from dngd.report.run_files import flatten
from dngd.report.settings import value_text
from dngd.report.text import metric_words, since_last_start

RESUME_HINT = "interrupted; a run goes on from its newest checkpoint with dngd train --run-dir RUN --resume"


def train(
    dataset: Annotated[str | None, typer.Option(help=flag_help("dataset"))] = None,
    data_root: Annotated[Path | None, typer.Option(help=flag_help("data_root"))] = None,
    cache_dir: Annotated[Path | None, typer.Option(help=flag_help("cache_dir"))] = None,
    stage_dir: Annotated[Path | None, typer.Option(help=flag_help("stage_dir"))] = None,
    split: Annotated[str | None, typer.Option(help=flag_help("split"))] = None,
    engine: Annotated[str | None, typer.Option(help=flag_help("engine"))] = None,
    task: Annotated[str | None, typer.Option(help=flag_help("task"))] = None,
    link_split: Annotated[str | None, typer.Option(help=flag_help("link_split"))] = None,
    negatives: Annotated[int | None, typer.Option(help=flag_help("negatives"))] = None,
    num_workers: Annotated[int | None, typer.Option(help=flag_help("num_workers"))] = None,
    min_workers: Annotated[
        int | None,
        typer.Option(
            help="ray.min_workers: fewest workers that the run goes on with when nodes are lost (default: num_workers)"
        ),
    ] = None,
    num_shards: Annotated[int | None, typer.Option(help=flag_help("num_shards"))] = None,
    use_gpu: Annotated[bool | None, typer.Option("--use-gpu/--no-gpu", help=flag_help("use_gpu"))] = None,
    feature_placement: Annotated[str | None, typer.Option(help=flag_help("feature_placement"))] = None,
    address: Annotated[
        str | None,
        typer.Option(help="Ray cluster to connect to (default: $RAY_ADDRESS, else a local one is started)"),
    ] = None,
    model: Annotated[str | None, typer.Option(help=flag_help("model", "gcn or sage"))] = None,
    hidden: Annotated[int | None, typer.Option(help=flag_help("hidden"))] = None,
    num_layers: Annotated[int | None, typer.Option(help=flag_help("num_layers"))] = None,
    fanout: Annotated[str | None, typer.Option(help=flag_help("fanout"))] = None,
    dropout: Annotated[float | None, typer.Option(help=flag_help("dropout"))] = None,
    batch_size: Annotated[str | None, typer.Option(help=flag_help("batch_size"))] = None,
    semi: Annotated[str | None, typer.Option(help=flag_help("semi", "none, two_means or pooled"))] = None,
    semi_gamma: Annotated[float | None, typer.Option(help=flag_help("semi_gamma"))] = None,
    epochs: Annotated[int | None, typer.Option(help=flag_help("epochs"))] = None,
    max_steps: Annotated[int | None, typer.Option(help=flag_help("max_steps"))] = None,
    optimizer: Annotated[str | None, typer.Option(help=flag_help("optimizer", "kfac, adam, adamw or sgd"))] = None,
    metric: Annotated[
        str | None,
        typer.Option(help=flag_help("metric", "accuracy, macro_f1, roc_auc or average_precision")),
    ] = None,
    class_weights: Annotated[
        str | None, typer.Option(help="balanced, or one weight a class: 1,2.5,1 (default: all 1)")
    ] = None,
    patience: Annotated[int | None, typer.Option(help=flag_help("patience"))] = None,
    lr: Annotated[float | None, typer.Option(help=flag_help("lr"))] = None,
    lr_schedule: Annotated[
        str | None, typer.Option(help=flag_help("lr_schedule", "cosine, constant or hyperbolic"))
    ] = None,
    warmup_steps: Annotated[int | None, typer.Option(help=flag_help("warmup_steps"))] = None,
    weight_decay: Annotated[float | None, typer.Option(help=flag_help("weight_decay"))] = None,
    damping: Annotated[
        float | None,
        typer.Option(
            help="kfac.damping: λ, a share of the factors' traces (default: min(0.1, 1/classes)/√(training nodes))"
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help=flag_help("seed"))] = None,
    num_samplers: Annotated[int | None, typer.Option(help=flag_help("num_samplers"))] = None,
    run_dir: Annotated[Path | None, typer.Option(help=flag_help("run_dir"))] = None,
    loggers: Annotated[
        str | None,
        typer.Option(help="Where evaluations go too: tensorboard, mlflow, wandb, or several: tensorboard,wandb"),
    ] = None,
    resume: Annotated[bool | None, typer.Option("--resume", help=flag_help("resume"))] = None,
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
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, no table: warnings and errors alone")] = False,
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
    cluster = {"address": address, "min_workers": min_workers}
    if any(value is not None for value in cluster.values()):
        flags["ray"] = {name: value for name, value in cluster.items() if value is not None}
    from dngd.launch import Trainer  # imports torch: not for --help
    from dngd.train.interrupt import SigTerm
    from dngd.train.progress import QuietReporter

    for text in assignments or []:
        flags = merge(flags, parse_assignment(text))
    fields = merge(_base_fields(config, flags), flags)
    _check_names_a_graph(fields)
    trainer = Trainer(TrainConfig(**fields), reporter=QuietReporter(_warn) if quiet else None)
    _refuse_unused(trainer.config, flags)
    if dry_run:
        plan = trainer.plan()
        print_json(plan.to_json()) if as_json else _print_plan(plan.to_json(), trainer.config)
        return
    terminated = SigTerm()
    try:
        with terminated:
            result = trainer.fit()
    except KeyboardInterrupt as error:
        told = str(error) if isinstance(error, RunInterrupted) else RESUME_HINT
        raise Interrupted(told, TERMINATED if terminated.received else INTERRUPTED) from None
    if as_json:
        print_json(result.to_json())
    elif not quiet:
        _print_result(asdict(result))


def _refuse_unused(config: TrainConfig, flags: dict[str, Any]) -> None:
    """Raise UserError for a flag without effect. In a file such a field may stand: it may serve several runs."""
    usual = flatten(TrainConfig(dataset="").model_dump())
    used = flatten(config.model_dump())
    for key in flatten(flags):
        if used.get(key) != usual.get(key) and (why := config.why_unused(key)) is not None:
            raise UserError(f"{key}={used[key]} has no effect {why}")


def _base_fields(config: Path | None, flags: dict[str, Any]) -> dict[str, Any]:
    """Return what flags go on top of: the configuration file, or else the resumed run's own configuration."""
    if config is not None:
        return read_yaml(config)
    run_dir = flags.get("run_dir")
    if flags.get("resume") is not True or not isinstance(run_dir, str | Path):
        return {}
    from dngd.train.run_folder import saved_fields

    saved = saved_fields(Path(run_dir))
    if saved is None and "dataset" not in flags:
        address = address_of_run(Path(run_dir))
        if address is None and (inside := runs_inside_text(expanded(run_dir))):
            raise UserError(f"{run_dir} is no run itself{inside}; give one of them as --run-dir")
        raise UserError(
            f"there is no run at {address or run_dir} to go on with; check --run-dir, or start one there with --dataset"
        )
    return saved or {}


def _check_names_a_graph(fields: dict[str, Any]) -> None:
    """Raise UserError for a configuration without a data set whose run folder holds a run: of it more is to be said than
    what is missing."""
    run_dir = fields.get("run_dir")
    if "dataset" in fields:
        return
    if fields.get("resume") is True and run_dir is None:
        raise UserError("--resume needs --run-dir: say which run to go on with")
    if fields.get("resume") is True or not isinstance(run_dir, str | Path):
        return
    from dngd.train.run_folder import saved_fields

    if saved_fields(Path(run_dir)) is not None:
        raise UserError(
            f"run folder {address_of_run(Path(run_dir)) or run_dir} already holds a run; go on with --resume, or "
            "give --dataset and another --run-dir for a new one"
        )


def evaluate(
    run: Annotated[Path, typer.Argument(help="Run folder, or its s3:// or gs:// address")],
    data_root: Annotated[Path | None, typer.Option(help=field_help("data_root"))] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Folder of converted stores (default: the run's)")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Another graph, or where the run's graph is now (default: the run's)")
    ] = None,
    as_json: Json = False,
) -> None:
    """Evaluate a run's best model exactly, on all neighbours of all nodes."""
    from dngd.train.evaluate_run import evaluate_run
    from dngd.train.evaluation_progress import evaluation_progress

    told: list[str] = []
    with evaluation_progress("evaluating") as progress:
        scores = evaluate_run(
            run, data_root=data_root, cache_dir=cache_dir, dataset=dataset, progress=progress, tell=told.append
        )
    for text in told:
        _warn(text)
    if as_json:
        print_json(scores)
        return
    table = Table(title=f"{address_of_run(run) or run}: model of step {scores['step']}")
    metric = scores["metric"]
    for column in ("part", metric_words(metric), "loss"):
        table.add_column(column)
    for part in (part for part in ("train", "val", "test") if part in scores):
        table.add_row(part, f"{scores[part][metric]:.4f}", f"{scores[part]['loss']:.4f}")
    out.print(table)


def _warn(text: str) -> None:
    typer.echo(f"warning: {text}", err=True)


def predict(
    run: Annotated[Path, typer.Argument(help="Run folder, or its s3:// or gs:// address")],
    output: Annotated[Path, typer.Option("--out", help="Parquet file to write")],
    nodes: Annotated[
        str, typer.Option(help="Which nodes: all, train, val, test (of the run's split) or unlabelled")
    ] = "all",
    pairs: Annotated[
        Path | None,
        typer.Option(
            help="Link prediction: table with columns src and dst of node ids (default: all nodes' embeddings)"
        ),
    ] = None,
    data_root: Annotated[Path | None, typer.Option(help=field_help("data_root"))] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Folder of converted stores (default: the run's)")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Another graph, or where the run's graph is now (default: the run's)")
    ] = None,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Add a column with the probabilities of all classes")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is already there")] = False,
    as_json: Json = False,
) -> None:
    """Predict classes of nodes, or links, with a run's best model, on all neighbours, into a Parquet file."""
    from dngd.train.evaluation_progress import evaluation_progress
    from dngd.train.predict import predict_run

    told: list[str] = []
    with evaluation_progress("predicting") as progress:
        written = predict_run(
            run,
            expanded(output),
            nodes=nodes,
            pairs=None if pairs is None else expanded(pairs),
            data_root=data_root,
            cache_dir=cache_dir,
            dataset=dataset,
            probabilities=probabilities,
            overwrite=overwrite,
            progress=progress,
            tell=told.append,
        )
    for text in told:
        _warn(text)
    if as_json:
        print_json(written.to_json())
        return
    out.print(
        f"{written.path}: {written.rows:,} {'nodes' if pairs is None else 'pairs'} of {written.graph}, model of step {written.step}; columns "
        + ", ".join(written.columns),
        highlight=False,
        soft_wrap=True,
    )


def export(
    run: Annotated[Path, typer.Argument(help="Run folder")],
    output: Annotated[Path, typer.Option("--out", help="File (safetensors) or folder (pyg) to write")],
    format: Annotated[
        str, typer.Option(help="safetensors: the weights; pyg: a plain PyG module with them, which needs no dngd")
    ] = "safetensors",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is already there")] = False,
) -> None:
    """Export a run's best model for use without dngd."""
    from dngd.train.export import export_run

    written = export_run(run, output, format=format, overwrite=overwrite)
    out.print(str(written), highlight=False, soft_wrap=True)


def doctor(
    address: Annotated[
        str | None,
        typer.Option(help="Look at a Ray cluster too: its dashboard, http://HOST:8265, or its head, HOST:6379"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check versions, devices and threads, and a cluster; say what is missing or untested, and the fix.

    Exit code 0 or 1; 2 if the cluster cannot be reached or refuses.
    """
    from dngd.doctor import Diagnosis, Finding, diagnose

    cluster = []
    if address is not None:
        from dngd.launch.cluster_check import check_cluster  # importing Ray takes seconds

        for line in check_cluster(address):
            status: Literal["ok", "untested", "missing"] = "missing"
            if line.works:
                status = "untested" if line.fix else "ok"
            cluster.append(Finding(line.name, line.found, status, True, line.fix))
    diagnosis = Diagnosis((*diagnose().findings, *cluster))
    if as_json:
        sys.stdout.write(diagnosis.to_json() + "\n")
    else:
        diagnosis.render(out)
    raise typer.Exit(diagnosis.exit_code)


def _print_result(result: dict[str, Any]) -> None:
    table = Table(title="Result", show_header=False)
    metric = metric_words(result["metric"])
    table.add_row(f"best validation {metric}", f"{result['best_val_accuracy']:.4f}")
    table.add_row(f"test {metric} there", f"{result['test_accuracy']:.4f}")
    table.add_row(
        "training time",
        f"{result['train_seconds']:.1f} s, of which to the best {result['seconds_to_best_val']:.1f} s",
    )
    table.add_row("steps, epochs, workers", f"{result['steps']}, {result['epochs']:g}, {result['world_size']}")
    if result["step_ms"]:
        table.add_row("step, median and p99", f"{result['step_ms']['p50']:.1f} ms, {result['step_ms']['p99']:.1f} ms")
    if result["recoveries"]:
        table.add_row(
            "recoveries", f"{result['recoveries']}, for which {result['steps_repeated']} steps were done again"
        )
    if result["failed_checkpoints"]:
        table.add_row("checkpoints not written", str(result["failed_checkpoints"]))
    table.add_row("seeds per second", f"{result['seeds_per_second']:,.0f}")
    sent = {kind: size for kind, size in result["bytes"].items() if size}
    if sent:
        table.add_row("sent by rank 0", ", ".join(f"{kind} {size_text(size)}" for kind, size in sent.items()))
    if 0 < result["measured_from_step"] < result["steps"]:
        of_some = since_last_start(result["measured_from_step"], result["steps"])
        table.add_row("milliseconds, seeds, bytes", of_some)
    whose = " of rank 0" if result["world_size"] > 1 else ""
    table.add_row(f"peak memory{whose}", size_text(result["peak_rss_bytes"]))
    out.print(table)
    # Below the table: a path cut to a column's width is of no use.
    out.print(f"run folder  {result['run_dir']}", highlight=False, soft_wrap=True)
    out.print(f"report      {result['run_dir']}/report.html", highlight=False, soft_wrap=True)


_FEATURE_PLACES = {
    ("auto", False): "read from its map",
    ("disk", False): "read from its map",
    ("auto", True): "on the GPU if it fits there, else in the machine's memory",
    ("device", True): "on the GPU",
    ("pinned", True): "in the machine's memory",
    ("disk", True): "on the disk",
}
"""Where features lie, by feature_placement and use_gpu."""


def _print_plan(plan: dict[str, Any], config: TrainConfig) -> None:
    table = Table(title="Plan", show_header=False)
    table.add_row("steps", f"{plan['total_steps']} ({plan['steps_per_epoch']} an epoch)")
    table.add_row("seeds a step", f"{config.shards} shards x {plan['batch_size']}")
    if config.constant_full_batch:
        table.add_row("mode", "constant full batch: all neighbours, the same layer graphs in each step, no sampler")
    else:
        table.add_row("samplers a worker", str(plan["samplers"]) if plan["samplers"] else "a thread")
    parts = ("model", "optimizer", "curvature", "link", "sparse", "full_batch", "activation", "evaluation", "sampler")
    unused = {"sampler"} if config.constant_full_batch else {"full_batch"}
    unused |= {"link"} if config.task == "node" else set()
    unused |= set() if plan["sparse_bytes"] else {"sparse"}
    notes = {
        "store": " (one shared mapping)",
        "feature": f" (of the store; {_FEATURE_PLACES[config.feature_placement, config.use_gpu]})",
        "worker": " (sum of the below)",
        "evaluation_table": " (one copy a machine; on its disk where memory is short)",
    }
    if plan["resolved"]["sparse_features"]:
        notes["feature"] += ", of which only what is not zero is worked on"
    for name in ("store", "feature", "evaluation_table", "worker", *(name for name in parts if name not in unused)):
        note = notes.get(name, "")
        table.add_row(f"memory: {name.replace('_', ' ')}", size_text(plan[f"{name}_bytes"]) + note)
    for layer in plan["layers"]:
        d_a, d_out, kept = layer["d_a"], layer["d_out"], layer["factors"]
        factors = f"A {kept['a']}, G {kept['g']}" if config.optimizer == "kfac" else "no factors"
        table.add_row(layer["name"], f"weight and bias {d_out} x {d_a}; {factors}")
    if config.engine == "local" or config.num_workers == 1:
        table.add_row("wire", "nothing: it is one process")
    else:
        sent = {
            "gradient a step": "gradient_bytes_per_step",
            "factors a refresh": "factor_bytes_per_refresh",
            "inverses a refresh, at most": "inverse_bytes_per_refresh",
            "preconditioned gradients a step": "preconditioned_bytes_per_step",
        }
        for name, key in sent.items():
            if plan[key]:
                table.add_row(f"wire: {name}", size_text(plan[key]))
    given = flatten(config.model_dump())
    for name, value in plan["resolved"].items():
        if name in given and given[name] in (None, "auto") and name != "num_samplers":
            table.add_row(f"default: {name}", "none" if value is None else value_text(value, short=True))
    out.print(table)
