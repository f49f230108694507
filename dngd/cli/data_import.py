"""dngd data import: from what users have to a store."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from dngd.cli.common import Json, told_as_flags
from dngd.errors import UserError
from dngd.paths import expanded

_TABLES = "Node and edge tables (parquet, csv, arrow)"

_FEW_REVERSED = 0.5
"""Share of edges with their reverse below which it is asked whether they are meant one way."""


@told_as_flags("name", "self_loops", "duplicates", "feature_dtype", "add_reverse")
def data_import(
    source: Annotated[
        str | None,
        typer.Argument(
            help="File or folder; s3:// or gs:// address of tables; or an OGB data set's name. A folder of tables has "
            "files or folders named nodes* and edges*"
        ),
    ] = None,
    *,
    store: Annotated[str, typer.Option("--out", help="Folder of the new store")],
    source_format: Annotated[
        str | None,
        typer.Option("--format", help="npz, planetoid, ogb, pyg, dgl, parquet, csv or arrow (default: told by SOURCE)"),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name kept in the store (default: the source's)")] = None,
    add_reverse: Annotated[
        bool | None,
        typer.Option(
            "--add-reverse/--no-add-reverse",
            help="Add the reverse of each edge (default: no; for OGB sets as OGB does)",
        ),
    ] = None,
    self_loops: Annotated[str, typer.Option(help="drop or keep")] = "drop",
    duplicates: Annotated[str, typer.Option(help="Copies of an edge: drop, sum (their weights) or keep")] = "drop",
    feature_dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16")] = "float32",
    order: Annotated[
        str,
        typer.Option(
            help="Of the nodes: original, degree (most read first) or partition:PARTS (part by part); ids stay with them"
        ),
    ] = "original",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a store that is already there")] = False,
    as_json: Json = False,
    nodes: Annotated[
        list[str] | None,
        typer.Option(help="Node table: file, folder, pattern or address; may be repeated", rich_help_panel=_TABLES),
    ] = None,
    edges: Annotated[
        list[str] | None, typer.Option(help="Edge table, likewise; instead of SOURCE", rich_help_panel=_TABLES)
    ] = None,
    id_column: Annotated[
        str | None, typer.Option(help="Node ids: whole numbers or strings (default: id)", rich_help_panel=_TABLES)
    ] = None,
    label_column: Annotated[
        str | None,
        typer.Option(
            help="Class numbers or names, or lists of 0 and 1 (default: label, if it is there)", rich_help_panel=_TABLES
        ),
    ] = None,
    label_columns: Annotated[
        str | None,
        typer.Option(
            help="Several labels a node: columns of 0 and 1, one a class, as a,b,c; instead of --label-column",
            rich_help_panel=_TABLES,
        ),
    ] = None,
    split_column: Annotated[
        str | None,
        typer.Option(
            help="train, val or test (default: split, or true/false train_mask, val_mask, test_mask)",
            rich_help_panel=_TABLES,
        ),
    ] = None,
    feature_column: Annotated[
        list[str] | None,
        typer.Option(
            help="A list column, or numbers; may be repeated (default: features, or all other columns)",
            rich_help_panel=_TABLES,
        ),
    ] = None,
    ignore_column: Annotated[
        list[str] | None,
        typer.Option(help="Node column that is not used; may be repeated", rich_help_panel=_TABLES),
    ] = None,
    source_column: Annotated[
        str | None, typer.Option(help="Where an edge begins (default: src)", rich_help_panel=_TABLES)
    ] = None,
    target_column: Annotated[
        str | None, typer.Option(help="Where an edge ends (default: dst)", rich_help_panel=_TABLES)
    ] = None,
    weight_column: Annotated[
        str | None,
        typer.Option(help="Edge weights (default: weight, if it is there; '': none)", rich_help_panel=_TABLES),
    ] = None,
    id_type: Annotated[
        str | None, typer.Option(help="Read ids as int or string (default: as they look)", rich_help_panel=_TABLES)
    ] = None,
    delimiter: Annotated[
        str | None, typer.Option(help="Of CSV files (default: tab in .tsv, else a comma)", rich_help_panel=_TABLES)
    ] = None,
    no_header: Annotated[
        bool,
        typer.Option("--no-header", help="CSV files begin with data; columns are f0, f1, ...", rich_help_panel=_TABLES),
    ] = False,
) -> None:
    """Turn a graph into a store: from npz, Planetoid, OGB, PyG and DGL files, or node and edge tables."""
    from dngd import graph
    from dngd.cli.data import show_store
    from dngd.cli.progress import data_progress
    from dngd.graph.filesystems import is_remote

    if source is not None:
        source = source.removeprefix("file://")
    columns = {
        "id": id_column,
        "label": label_column,
        "labels": None if label_columns is None else [name.strip() for name in label_columns.split(",")],
        "split": split_column,
        "features": feature_column,
        "ignore": ignore_column,
        "source": source_column,
        "target": target_column,
        "weight": weight_column,
        "id_type": id_type,
    }
    named: dict[str, Any] = {key: value for key, value in columns.items() if value or (key, value) == ("weight", "")}
    style = graph.CsvStyle(delimiter=delimiter, header=not no_header)
    if not is_remote(store):
        store = str(expanded(store))
    kind = _kind(source, source_format, tables=bool(nodes or edges))
    table_only = bool(named or nodes or edges) or style != graph.CsvStyle()
    if table_only and kind != "tables":
        raise UserError(
            f"--nodes, --edges and column options are for node and edge tables, not for {kind}; leave them out"
        )
    options: dict[str, Any] = {
        "name": name,
        "self_loops": self_loops,
        "duplicates": duplicates,
        "feature_dtype": feature_dtype,
        "overwrite": overwrite,
    }
    if add_reverse is not None:
        options["add_reverse"] = add_reverse

    def build(out: str | Path, settings: dict[str, Any]) -> Any:
        if kind != "tables":
            return _import(kind, str(source), out, settings)
        return graph.import_tables(
            source,
            out,
            nodes=nodes or None,
            edges=edges or None,
            columns=graph.TableColumns(**named),
            table_format=source_format,  # type: ignore[arg-type]  # checked by _kind
            style=style,
            **settings,
        )

    with warnings.catch_warnings(record=True) as caught, data_progress() as progress:
        options["progress"] = progress
        made = build(store, options) if order == "original" else _in_order(order, build, store, options)
    for sentence in dict.fromkeys(str(one.message) for one in caught if one.category is UserWarning):
        typer.echo(f"dngd: {sentence}", err=True)
    if add_reverse is None and kind != "ogb":
        _tell_of_one_way(made)
    show_store(made, as_json)


def _tell_of_one_way(store: Any) -> None:
    """Say of a graph with few reverse edges that messages go one way, which in a table of links is seldom meant."""
    from dngd.graph.describe import reversed_share

    share = reversed_share(store)
    if share is not None and share < _FEW_REVERSED:
        typer.echo(
            f"dngd: {share:.0%} of the edges have their reverse, so that nodes hear of their sources and not of their "
            "destinations; where an edge means both ways, import with --add-reverse (--no-add-reverse: not this note)",
            err=True,
        )


def _in_order(order: str, build: Callable[[Path, dict[str, Any]], Any], store: str, options: dict[str, Any]) -> Any:
    """Build the store in the original order beside its target, then write it to the target in the order asked for."""
    from dngd.graph.import_options import check_options
    from dngd.graph.staging import StagedFolder
    from dngd.sampling.partitioning import parse_order, reorder_by

    parse_order(order)
    check_options(store, cast(Any, options), weighted=True)
    overwrite = options["overwrite"]
    # A folder that is removed at the end, and by the next write of the same store if this one is killed.
    with StagedFolder(Path(store), overwrite) as beside:
        # In a folder of the same name, after which a graph may be called.
        unordered = build(beside.path / Path(store).absolute().name, {**options, "overwrite": False})
        return reorder_by(unordered, order, store, overwrite=overwrite, progress=options["progress"])


def _kind(source: str | None, source_format: str | None, *, tables: bool) -> str:
    """Return the importer: npz, planetoid, ogb, pyg, dgl or tables."""
    from dngd.graph.formats import FORMATS, TABLE_FORMATS, check_local, guess_format

    if source_format is not None and source_format not in FORMATS:
        raise UserError(f"--format {source_format!r} is unknown; use one of: {', '.join(FORMATS)}")
    if source is None:
        if not tables:
            raise UserError("no source is given; give a file, a folder or an address, or --edges and --nodes")
        if source_format not in (None, *TABLE_FORMATS):
            raise UserError(f"--format {source_format} needs a file or folder; give it instead of --edges and --nodes")
        return "tables"
    if not source.strip():
        raise UserError("SOURCE is empty; give a file, a folder or an address")
    if source_format is None:
        return guess_format(source)
    check_local(source, source_format)
    return "tables" if source_format in TABLE_FORMATS else source_format


def _import(kind: str, source: str, store: str | Path, options: dict[str, Any]) -> Any:
    from dngd import graph

    if kind == "dgl":
        from dngd.sampling.dgl_files import import_dgl_file

        return import_dgl_file(expanded(source), store, cast(graph.ImportOptions, options))
    importers: dict[str, Any] = {
        "npz": graph.import_npz,
        "planetoid": graph.import_planetoid,
        "ogb": graph.import_ogb,
        "pyg": graph.import_pyg,
    }
    return importers[kind](source if kind == "ogb" else expanded(source), store, **options)
