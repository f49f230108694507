"""dngd data: graphs on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from dngd.cli.common import Json, out, print_json, told_as_flags
from dngd.cli.data_import import data_import
from dngd.cli.data_partition import partition
from dngd.errors import UserError

_NUM_SHOWN = 8

data_app = typer.Typer(help="Graphs on disk: import, make, describe, check and partition stores.", no_args_is_help=True)


data_app.command("import")(data_import)
data_app.command()(partition)


@data_app.command()
@told_as_flags(
    "name", "num_nodes", "num_edges", "num_classes", "num_features", "homophily", "label_noise", "scale", "seed"
)
def synth(
    store: Annotated[Path, typer.Option("--out", help="Folder of the new store")],
    like: Annotated[
        str | None,
        typer.Option(help="Take size, degrees and split of a public graph: ogbn-products or ogbn-papers100m"),
    ] = None,
    scale: Annotated[
        float | None, typer.Option(help="With --like: share of its nodes and edges, 0.001 to 1 (default: 1)")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name kept in the store (default: synthetic, or LIKE-like)")] = None,
    nodes: Annotated[int | None, typer.Option(help="Number of nodes (default: 60000)")] = None,
    edges: Annotated[
        int | None, typer.Option(help="Number of edges, both directions counted (default: 1500000)")
    ] = None,
    classes: Annotated[int | None, typer.Option(help="Number of classes (default: 47)")] = None,
    features: Annotated[int | None, typer.Option(help="Number of features (default: 100)")] = None,
    homophily: Annotated[float | None, typer.Option(help="Share of edges within a class (default: 0.8)")] = None,
    label_noise: Annotated[
        float | None, typer.Option(help="Share of labels that are another class (default: 0.06)")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed; equal seeds give equal graphs")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a store that is already there")] = False,
) -> None:
    """Make a synthetic graph with skewed degrees and learnable labels, of any size or that of a public graph."""
    from dngd import graph
    from dngd.cli.progress import data_progress

    shape = {
        "num_nodes": nodes,
        "num_edges": edges,
        "num_classes": classes,
        "num_features": features,
        "homophily": homophily,
        "label_noise": label_noise,
    }
    given: dict[str, Any] = {key: value for key, value in shape.items() if value is not None}
    if like is None:
        if scale is not None:
            raise UserError(f"--scale {scale:g} is a share of the graph that --like names; give --like, or --nodes")
        with data_progress() as progress:
            made = graph.write_synth(
                store, name=name or "synthetic", seed=seed, overwrite=overwrite, progress=progress, **given
            )
    else:
        if given:
            flag = "--" + next(iter(given)).removeprefix("num_").replace("_", "-")
            raise UserError(f"--like {like} sets the graph's shape, {flag} too; leave one of them out")
        config = graph.like_config(like, 1.0 if scale is None else scale, seed)
        with data_progress() as progress:
            made = graph.write_like(
                store, config, name=name or f"{like.lower()}-like", overwrite=overwrite, progress=progress
            )
    _print_store(graph.describe(made))


@data_app.command()
def info(store: Annotated[Path, typer.Argument(help="Store folder")], as_json: Json = False) -> None:
    """Describe a store."""
    from dngd import graph

    description = graph.describe(graph.open_checked(store))
    print_json(description) if as_json else _print_store(description)


@data_app.command()
def verify(store: Annotated[Path, typer.Argument(help="Store folder")]) -> None:
    """Check every byte of a store against its manifest, and that its content makes sense."""
    from dngd import graph
    from dngd.cli.progress import data_progress
    from dngd.graph.filesystems import is_remote

    with data_progress() as progress:
        problems = graph.verify_store(store, lambda _, done, total: progress("reading", done, total))
    if problems:
        raise UserError(("" if is_remote(store) else f"{store}: ") + "; ".join(problems))
    out.print(f"{store}: every file matches its manifest", highlight=False, soft_wrap=True)


def show_store(store: Any, as_json: bool) -> None:
    """Print what a store is, as a table or as JSON."""
    from dngd import graph

    description = graph.describe(store)
    print_json(description) if as_json else _print_store(description)


def _print_store(description: dict[str, Any]) -> None:
    table = Table(title=str(description.get("name", "")), show_header=False)
    for key, value in description.items():
        if key == "columns":
            if value is not None:
                table.add_row(key, columns_text(value, int(description["num_features"])))
            continue
        if key == "provenance":
            # Two of its options have rows of their own.
            options = {k: v for k, v in value["options"].items() if k not in ("label_names", "columns")}
            value = value | {"options": options}
        is_nested = isinstance(value, dict | list)
        table.add_row(key, json.dumps(value, ensure_ascii=False) if is_nested else str(value))
    out.print(table)


def columns_text(columns: dict[str, Any], num_features: int) -> str:
    """Return which column of the imported tables is what, a line each. columns: as `graph.describe` tells them."""
    lines = []
    if "id" in columns:
        labels, split, features = columns["label"], columns["split"], columns["features"]
        lines += [
            f"id: {columns['id']}",
            f"label: {_some(labels) if labels else 'none (--label-column gives one)'}",
            f"split: {_some(split)}",
        ]
        is_list = len(features) == 1 < num_features
        lines.append(
            f"features: {features[0]}, a list of {num_features}"
            if is_list
            else f"features: {num_features}{': ' if features else ''}{_some(features, num_features) if features else ''}"
        )
    lines.append(f"edges: {columns['source']} -> {columns['target']}, weight {_some(columns['weight'])}")
    for what in ("left_out", "edges_left_out"):
        reasons = columns.get(what) or {}
        if reasons:
            of = "of the edges " if what == "edges_left_out" else ""
            for why in dict.fromkeys(reasons.values()):
                names = [name for name, reason in reasons.items() if reason == why]
                lines.append(f"{of}not used: {_some(names)} ({why})")
    return "\n".join(lines)


def _some(names: list[str] | str | None, count: int = 0) -> str:
    """Return the first few names; count: how many there are, if more than are given."""
    if names is None or isinstance(names, str):
        return names or "none"
    more = max(count, len(names)) > _NUM_SHOWN
    return ", ".join(names[:_NUM_SHOWN]) + (", …" if more else "")
