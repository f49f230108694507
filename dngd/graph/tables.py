"""Importing a graph from node and edge tables: Parquet, CSV or Arrow files, on a disk or an object store.

    import_tables("s3://bucket/graph", "web.store")                                   # nodes* and edges* in a folder
    import_tables(None, "web.store", nodes="nodes.parquet", edges="edges-*.parquet")

Nodes are numbered in the order of the node table, and keep their own ids. Files are read in record batches: the
node table twice (its ids, labels and split, then its features), the edge table once, or twice without a node table.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import Unpack

from dngd.errors import UserError
from dngd.graph.builder import RowBlocks, StoreBuilder
from dngd.graph.canonical import MAX_CLASSES, canonical_labels, classes_met
from dngd.graph.filesystems import address_of, list_files, locate, shown_address
from dngd.graph.id_map import IdKind, IntegerIds, NodeIds, StringIds, distinct_integers, distinct_strings
from dngd.graph.import_options import ImportOptions, check_options, check_training_nodes, recorded
from dngd.graph.manifest import Provenance
from dngd.graph.store import GraphStore
from dngd.graph.table_columns import (
    EdgeColumns,
    NodeColumns,
    TableColumns,
    csv_types,
    edge_columns,
    id_kind,
    node_columns,
)
from dngd.graph.table_files import Table, make_table, open_table
from dngd.graph.table_readers import CsvStyle, TableFormat
from dngd.graph.table_values import (
    LeadingZeros,
    NodeValues,
    feature_blocks,
    feature_width,
    id_values,
    list_width,
    numbers,
)
from dngd.paths import expanded

_TABLE_WORD = re.compile(r"(?:^|[-_ ])(?:nodes?|edges?)(?=[-_ ]|$)", re.IGNORECASE)

Source = str | Path | Sequence[str | Path]

_NUM_LISTED = 8
_NUM_KEPT = 100
"""Names of columns in the provenance."""
_NUMBER_BYTES, _STRING_BYTES = 8, 64
"""About how much a value takes in a record batch."""


def import_tables(
    source: str | Path | None,
    out: str | Path,
    *,
    nodes: Source | None = None,
    edges: Source | None = None,
    columns: TableColumns | None = None,
    table_format: TableFormat | None = None,
    style: CsvStyle | None = None,
    **options: Unpack[ImportOptions],
) -> GraphStore:
    """Convert an edge table, and a node table if there is one, into a store at `out`.

    source: a folder that holds the tables: files or folders whose names begin with nodes and edges; or one file, an
        edge table. None: nodes and edges say where the tables are.
    nodes, edges: each a file, a folder, a pattern (`part-*.parquet`), an s3:// or gs:// address, or a list of these.
        Without nodes, the nodes are those that edges name, in ascending order of their ids.
    columns: what the columns are called. table_format, style: see `open_table`.
    Raises UserError if files or columns are missing or of other types, ids repeat, edges name missing nodes, features
    are not finite numbers of one width, or a split has no training nodes. Schemas are checked before rows are read,
    and nodes before edges. Nothing is left behind then.
    """
    names = columns or TableColumns()
    tables = _open_tables(source, nodes, edges, table_format, style or CsvStyle())
    plan = _plan(tables, names)
    check_options(out, options, weighted=plan.edge_columns.weight is not None)
    progress = options.get("progress") or (lambda stage, done, total: None)
    try:
        ids, values = _read_ids(plan, progress)
    except LeadingZeros:
        if not plan.is_csv:
            raise
        plan = replace(plan, kind="string")
        ids, values = _read_ids(plan, progress)
    return _build(plan, ids, values, out, options)


@dataclass(frozen=True)
class _Tables:
    nodes: Table | None
    edges: Table
    name: str | None
    """what the graph is called if nothing else is said; None: as the store's folder"""
    told: str
    """the source in the provenance: without folders"""


@dataclass(frozen=True)
class _Plan(_Tables):
    node_columns: NodeColumns
    edge_columns: EdgeColumns
    id_type: str
    """auto, int or string, as the user chose"""
    kind: IdKind
    num_features: int
    num_labels: int
    """length of the lists of labels; 0 where labels are no lists"""

    @property
    def id_bytes(self) -> int:
        return _NUMBER_BYTES if self.kind == "int" else _STRING_BYTES

    @property
    def is_csv(self) -> bool:
        """All tables are, so that no id is stored as a number."""
        return all(table is None or table.files[0].format == "csv" for table in (self.nodes, self.edges))


def _open_tables(
    source: str | Path | None,
    nodes: Source | None,
    edges: Source | None,
    table_format: TableFormat | None,
    style: CsvStyle,
) -> _Tables:
    if source is None:
        if edges is None:
            raise UserError("no edge table is given; give --edges, or a folder with files named nodes* and edges*")
        edge_table = open_table(edges, "edge", table_format=table_format, style=style)
        node_table = None if nodes is None else open_table(nodes, "node", table_format=table_format, style=style)
        told = edge_table.name if node_table is None else f"{node_table.name}, {edge_table.name}"
        names = {_plain_name(table.name) for table in (node_table, edge_table) if table is not None}
        return _Tables(node_table, edge_table, names.pop() if len(names) == 1 else None, told)
    if nodes is not None or edges is not None:
        raise UserError(
            f"{shown_address(address_of(source))} is given besides --nodes or --edges; leave it out, or "
            "give a folder with both tables in their place"
        )
    root = locate(source)
    files = list_files(source)
    if not all(file.path.startswith(root.path.rstrip("/") + "/") for file in files):
        # No folder: one file, or a pattern.
        return _Tables(
            None, make_table(files, "edge", root.shown, table_format, style), _plain_name(root.name), root.name
        )
    begin = len(root.path.rstrip("/")) + 1
    parts = {
        kind: [file for file in files if file.path[begin:].lower().startswith(kind)] for kind in ("nodes", "edges")
    }
    if not parts["edges"]:
        listed = ", ".join(sorted({file.path[begin:].partition("/")[0] for file in files})[:_NUM_LISTED])
        raise UserError(
            f"{root.shown} has no files or folder named edges* (it has: {listed}); rename them, or give --nodes "
            "and --edges"
        )
    folder = root.shown.rstrip("/")
    made = {
        kind: make_table(parts[kind], kind[:-1], f"{folder}/{kind}*", table_format, style) if parts[kind] else None
        for kind in parts
    }
    assert made["edges"] is not None
    return _Tables(made["nodes"], made["edges"], root.name or "graph", root.name)


def _plain_name(file: str) -> str | None:
    """Return what a file's name or pattern says besides suffixes, wildcards and which table it is; None for nothing."""
    return _TABLE_WORD.sub("", file.partition(".")[0].rstrip("*?-_ ")).strip("-_ ") or None


def _plan(tables: _Tables, names: TableColumns) -> _Plan:
    if all(schema is None for schema in tables.edges.schemas()):
        raise UserError(
            f"{tables.edges.shown} is empty; give edges, or a header line alone for a graph of nodes without any"
        )
    try:
        edges = edge_columns(tables.edges, names)
    except UserError:
        if tables.nodes is not None or not tables.told.lower().startswith("node"):
            raise
        raise UserError(
            f"{tables.edges.shown} alone would be the edges, and is by its name and columns a node table; give --nodes "
            "and --edges, or the folder with both"
        ) from None
    ids = [(tables.edges, edges.source), (tables.edges, edges.target)]
    nodes = NodeColumns(names.id)
    if tables.nodes is not None:
        nodes = node_columns(tables.nodes, names)
        ids.insert(0, (tables.nodes, nodes.id))
    kind = id_kind(ids, names.id_type)
    width = num_labels = 0
    if tables.nodes is not None:
        types = csv_types(tables.nodes, nodes)
        width = feature_width(nodes, tables.nodes.batches(nodes.features, _NUMBER_BYTES << 10, types))
        if nodes.label is not None and nodes.label_is_list:
            num_labels = list_width(nodes.label, tables.nodes.batches([nodes.label], _NUMBER_BYTES << 10))
            if num_labels < 2:
                found = "no list with entries" if num_labels == 0 else "lists of one entry"
                raise UserError(
                    f"column {nodes.label} of {tables.nodes.shown} has {found}; give a list of 0 and 1 with an entry a "
                    "class, a class number in the place of lists, or no such column for a graph without labels"
                )
    shown = (tables.nodes, tables.edges, tables.name, tables.told)
    return _Plan(*shown, nodes, edges, names.id_type, kind, width, num_labels)


def _read_ids(plan: _Plan, progress: Any) -> tuple[NodeIds, NodeValues | None]:
    """Return the ids of all nodes, and all of a node table but its features, if there is one."""
    if plan.nodes is None:
        return _ids_of_edges(plan, progress), None
    values = _read_nodes(plan.nodes, plan, progress)
    return _ids(values.ids(), plan.kind, f"column {plan.node_columns.id!r} of {plan.nodes.shown}"), values


def _read_nodes(table: Table, plan: _Plan, progress: Any) -> NodeValues:
    """Read all of a node table but its features, and check its split."""
    columns = plan.node_columns
    values = NodeValues(columns, plan.kind, plan.num_labels, plan.id_type)
    row_bytes = plan.id_bytes + _STRING_BYTES * len(columns.small) + _NUMBER_BYTES * plan.num_labels
    for file, first_row, batch in table.batches(columns.small, row_bytes, csv_types(table, columns)):
        values.add(file, first_row, batch)
        progress("nodes", values.num_rows, 0)
    if not values.num_rows:
        raise UserError(f"{table.shown} has no rows; give a node table with one row for each node")
    return values


def _ids(values: Any, kind: IdKind, what: str) -> NodeIds:
    return IntegerIds(values, what) if kind == "int" else StringIds(values, what)


def _ids_of_edges(plan: _Plan, progress: Any) -> NodeIds:
    def batches() -> Iterator[Any]:
        done = 0
        for source, target, _, _, _ in _edge_batches(plan):
            yield source
            yield target
            done += len(source)
            progress("ids", done, 0)

    found = distinct_integers(batches()) if plan.kind == "int" else distinct_strings(batches())
    if not len(found):
        raise UserError(f"{plan.edges.shown} has no rows, so that it names no nodes; give --nodes, or edges")
    return _ids(found, plan.kind, plan.edges.shown)


def _edge_batches(plan: _Plan) -> Iterator[tuple[Any, Any, npt.NDArray[Any] | None, str, int]]:
    """Yield (source ids, target ids, weights or None, the file as messages name it, number of the first row)."""
    columns = plan.edge_columns
    row_bytes = 2 * plan.id_bytes + _NUMBER_BYTES
    types = csv_types(plan.edges, columns)
    for file, first_row, batch in plan.edges.batches(columns.all, row_bytes, types):
        ends = []
        for name in (columns.source, columns.target):
            where = f"column {name!r} of {file.shown} from row {first_row} on"
            ends.append(id_values(batch.column(name), plan.kind, where, id_type=plan.id_type))
        weight = None if columns.weight is None else numbers(batch.column(columns.weight))
        yield ends[0], ends[1], weight, file.shown, first_row


def _build(plan: _Plan, ids: NodeIds, values: NodeValues | None, out: str | Path, options: ImportOptions) -> GraphStore:
    label_names: Sequence[str | int] | None
    labels, label_names = (None, None) if values is None else values.labels()
    masks = None if values is None else values.masks()
    classes = num_classes = None
    if plan.nodes is not None:
        if label_names is None and labels is not None:
            labels, label_names = _renumbered_if_large(labels)
            if label_names is not None:
                warnings.warn(
                    f"column {plan.node_columns.label!r} of {plan.nodes.shown} has {len(label_names)} numbers "
                    f"up to {label_names[-1]}, taken for classes; if they are amounts or times, choose another column",
                    stacklevel=3,
                )
        num_classes = None if label_names is None else len(label_names)
        # Checked now, not after the edges are read.
        classes, num_classes = canonical_labels(labels, len(ids), num_classes)
        check_training_nodes(masks, None if labels is None else classes, plan.nodes.shown)
        if label_names is None and classes.ndim == 1:
            classes, label_names = _without_gaps(classes, num_classes)
            num_classes = num_classes if label_names is None else len(label_names)
        if classes.ndim == 1 and num_classes == 1:
            _warn_of_one_class(plan, classes, label_names)
    weighted = plan.edge_columns.weight is not None
    settings = ImportOptions(**{**options, "name": options.get("name") or plan.name})
    with StoreBuilder(out, num_nodes=len(ids), weighted=weighted, **settings) as builder:
        _add_edges(builder, plan, ids)
        return builder.finish(
            features=_features(plan, expanded(out).absolute().parent),
            labels=classes,
            num_classes=num_classes,
            masks=masks,
            node_ids=ids.kept(),
            provenance=_provenance(plan, label_names, options),
        )


def _renumbered_if_large(labels: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], list[int] | None]:
    """Return labels that are beyond class numbers numbered from 0, and the numbers that they were, ascending, where
    these are a category's codes: few enough, and met twice on average. Else labels as they are, and None.

    labels: [nodes], whole numbers, below 0 or NaN unlabelled; of several labels a node as they are.
    """
    if labels.ndim != 1 or not len(labels) or labels.dtype.kind not in "iuf":
        return labels, None
    known = np.flatnonzero(labels >= 0)
    found = labels[known]
    if not len(known) or found.max() < MAX_CLASSES or ((labels < 0) & (labels != -1)).any():
        return labels, None
    numbers, places = np.unique(found, return_inverse=True)
    is_category = len(numbers) <= MAX_CLASSES and 2 * len(numbers) <= len(known)
    if not is_category or numbers[-1] >= 2**63 or (numbers != np.trunc(numbers)).any():
        return labels, None
    classes = np.full(len(labels), -1, dtype=np.int64)
    classes[known] = places
    return classes, [int(number) for number in numbers]


def _without_gaps(classes: npt.NDArray[Any], num_classes: int) -> tuple[npt.NDArray[Any], list[int] | None]:
    """Return labels numbered from 0 without gaps, and the numbers that they were, ascending; None if there is no gap.

    classes: [nodes], -1 unlabelled, below num_classes.
    """
    numbers = np.flatnonzero(classes_met(classes, num_classes))
    if len(numbers) == num_classes:
        return classes, None
    # The last place is that of the unlabelled.
    place = np.full(num_classes + 1, -1, dtype=np.int64)
    place[numbers] = np.arange(len(numbers))
    return place[classes], [int(number) for number in numbers]


def _warn_of_one_class(plan: _Plan, classes: npt.NDArray[Any], names: Sequence[str | int] | None) -> None:
    num_other = int(np.count_nonzero(classes < 0))
    rest = f"; the other {num_other} have -1 or nothing, which is no label: number their class otherwise, if it is one"
    assert plan.nodes is not None
    warnings.warn(
        f"column {plan.node_columns.label!r} of {plan.nodes.shown} gives all its {len(classes) - num_other} labelled "
        f"nodes one label, {(names or [0])[0]!r}, so that there is nothing to learn" + (rest if num_other else ""),
        stacklevel=3,
    )


def _add_edges(builder: StoreBuilder, plan: _Plan, ids: NodeIds) -> None:
    num_missing, first_missing = 0, ""
    for source, target, weight, file, first_row in _edge_batches(plan):
        ends = ids.find(source), ids.find(target)
        bad = (ends[0] < 0) | (ends[1] < 0)
        if bad.any():
            at = int(np.flatnonzero(bad)[0])
            if not num_missing:
                missing = source[at] if ends[0][at] < 0 else target[at]
                shown = int(missing) if plan.kind == "int" else repr(missing.as_py())
                first_missing = f"node {shown} in row {first_row + at} of {file}"
            num_missing += int(bad.sum())
        # Once the table is known to be wrong, it is only counted how wrong.
        if not num_missing:
            builder.add_edges(*ends, weight)
    if num_missing:
        raise UserError(
            f"{num_missing} edges name nodes that the node table lacks, the first is {first_missing}; add these nodes "
            "to the table, or remove the edges"
        )


def _features(plan: _Plan, scratch: Path) -> RowBlocks | None:
    if plan.nodes is None or not plan.num_features:
        return None
    columns = plan.node_columns
    types = csv_types(plan.nodes, columns)
    batches = plan.nodes.batches(columns.features, _NUMBER_BYTES * plan.num_features, types, scratch)
    names = () if columns.is_list else columns.features
    return RowBlocks(plan.num_features, feature_blocks(columns, plan.num_features, batches), names)


def _provenance(plan: _Plan, label_names: Sequence[str | int] | None, options: ImportOptions) -> Provenance:
    tables = [table for table in (plan.nodes, plan.edges) if table is not None]
    told = recorded(plan.edges.files[0].format, options)
    told["files"] = sum(len(table.files) for table in tables)
    told["columns"] = _columns(plan)
    if label_names is not None:
        told["label_names"] = list(label_names)
    return Provenance(source=plan.told, options=told)


def _columns(plan: _Plan) -> dict[str, Any]:
    """Return which column is what, and why others are not used; of very many features and others the first."""
    nodes, edges = plan.node_columns, plan.edge_columns
    of_nodes: dict[str, Any] = {}
    if plan.nodes is not None:
        of_nodes = {
            "id": nodes.id,
            "label": nodes.labels or nodes.label,
            "split": nodes.split or list(nodes.masks.values()) or None,
            "features": nodes.features[:_NUM_KEPT],
            "left_out": _first(nodes.left_out),
        }
    of_edges = {
        "source": edges.source,
        "target": edges.target,
        "weight": edges.weight,
        "edges_left_out": _first(edges.left_out),
    }
    return of_nodes | of_edges


def _first(reasons: dict[str, str]) -> dict[str, str]:
    kept = dict(list(reasons.items())[:_NUM_KEPT])
    return kept | ({"…": f"{len(reasons) - len(kept)} more"} if len(reasons) > len(kept) else {})
