"""dngd data partition: parts of a graph with few edges between them, and the graph reordered by them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dngd.cli.common import Json, out, print_json, told_as_flags
from dngd.errors import UserError
from dngd.paths import expanded

if TYPE_CHECKING:
    from dngd.graph import GraphStore, Partition


@told_as_flags("parts", "method", "slack", "passes", "seed")
def partition(
    store: Annotated[Path, typer.Argument(help="Store folder")],
    parts: Annotated[int, typer.Option(help="Number of parts; need not be the number of workers")],
    method: Annotated[
        str,
        typer.Option(
            help="auto, metis (holds the graph several times over in memory) or ldg (streams it); auto keeps what cuts "
            "fewer edges"
        ),
    ] = "auto",
    split: Annotated[
        str | None,
        typer.Option(help="Split whose training nodes are spread evenly (default: the store's masks, if one split)"),
    ] = None,
    slack: Annotated[float, typer.Option(help="A part holds up to (1 + SLACK) times an even share")] = 0.05,
    passes: Annotated[int, typer.Option(help="Of ldg over the edges")] = 10,
    seed: Annotated[int, typer.Option(help="Breaks ldg's ties; draws a random split")] = 0,
    reorder: Annotated[
        bool,
        typer.Option("--reorder", help="Leave STORE alone and write a copy, its nodes ordered by part, then by degree"),
    ] = False,
    new_store: Annotated[Path | None, typer.Option("--out", help="With --reorder: folder of the new store")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a partition in as many parts; with --reorder, a store at --out")
    ] = False,
    as_json: Json = False,
) -> None:
    """Divide a graph into parts of equal size with few edges between them, and keep the parts in its store."""
    from dngd.cli.progress import data_progress
    from dngd.graph import open_checked, order_by_partition, reorder_store, write_partition
    from dngd.graph.manifest import is_store_file
    from dngd.graph.partition import check_writable
    from dngd.graph.staging import check_target
    from dngd.sampling.partitioning import mask_training_nodes, partition_nodes

    if reorder != (new_store is not None):
        raise UserError("--reorder and --out go together: the reordered graph is a new store; give both or neither")
    opened = open_checked(store)
    if new_store is None:
        check_writable(opened, parts, overwrite=overwrite)
    else:
        new_store = expanded(new_store)
        if new_store.exists() and new_store.samefile(opened.path):
            raise UserError(f"--out {new_store} is the store that is read; give another path")
        check_target(new_store, overwrite, is_store_file)
    train = mask_training_nodes(opened) if split is None else opened.split(split, seed).train
    with data_progress() as progress:
        made = partition_nodes(
            opened,
            parts,
            method=method,  # type: ignore[arg-type]  # checked there
            balance=train,
            slack=slack,
            passes=passes,
            seed=seed,
            progress=progress,
        )
        if new_store is None:
            written = write_partition(opened, made, overwrite=overwrite, progress=progress)
        else:
            permutation = order_by_partition(opened, made.assignment, progress)
            written = reorder_store(
                opened,
                permutation,
                new_store,
                order=f"partition:{parts}",
                partition=made,
                overwrite=overwrite,
                progress=progress,
            )
    print_json(_described(written, made)) if as_json else _show(written, made)


def _described(store: GraphStore, made: Partition) -> dict[str, Any]:
    return {
        "store": str(store.path),
        "parts": made.parts,
        **made.info.model_dump(),
        "reason": made.reason,
        "num_moved": made.num_moved,
    }


def _show(store: GraphStore, made: Partition) -> None:
    info = made.info
    lines = [
        f"{store.path}: {made.parts} parts by {info.method}, {info.edge_cut:.2%} of the edges join two parts",
        f"nodes a part: {min(info.nodes):,} to {max(info.nodes):,}",
    ]
    if info.train_nodes is not None:
        lines.append(f"training nodes a part: {min(info.train_nodes):,} to {max(info.train_nodes):,}")
    elif store.manifest.num_labelled:
        lines.append("training nodes are not spread evenly: the store has no split, or several; give one by --split")
    if made.reason:
        lines.append(made.reason)
    if made.num_moved:
        lines.append(f"{made.num_moved:,} nodes were moved for balance")
    for line in lines:
        out.print(line, highlight=False, markup=False, soft_wrap=True)
