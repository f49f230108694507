"""dngd data: graphs on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from dngd.cli.common import Json, out, print_json
from dngd.errors import UserError

data_app = typer.Typer(help="Graphs on disk: import, make, describe and check stores.", no_args_is_help=True)


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
    print_json(description) if as_json else _print_store(description)


@data_app.command()
def verify(store: Annotated[Path, typer.Argument(help="Store folder")]) -> None:
    """Check every byte of a store against its manifest, and that its content makes sense."""
    from dngd import graph

    problems = graph.verify_store(store)
    if problems:
        raise UserError(f"{store}: " + "; ".join(problems))
    out.print(f"{store}: every file matches its manifest", highlight=False)


def _print_store(description: dict[str, Any]) -> None:
    table = Table(title=str(description.get("name", "")), show_header=False)
    for key, value in description.items():
        table.add_row(key, json.dumps(value) if isinstance(value, dict | list) else str(value))
    out.print(table)
