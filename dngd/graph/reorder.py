"""The same graph with its nodes in another order, as a new store.

What is read together then lies together: nodes with many neighbours at the front, or each part's nodes in one
run. Labels, masks, weights, features, partitions and the users' node ids follow their nodes; where nodes had no
ids, their old numbers become their ids, so that predictions still name the users' nodes.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from dngd.errors import UserError
from dngd.graph import manifest as m
from dngd.graph.arrow_files import ColumnWriter, write_columns, write_labels
from dngd.graph.balance import BLOCK_EDGES, Array, Int64Array, node_blocks
from dngd.graph.builder import Progress
from dngd.graph.filesystems import address_of, is_remote, shown_address
from dngd.graph.partition import Partition
from dngd.graph.staging import StagedFolder, check_target
from dngd.graph.store import GraphStore
from dngd.paths import expanded

_BLOCK_BYTES = 1 << 26


def order_by_degree(store: GraphStore, progress: Progress | None = None) -> Tensor:
    """Return the nodes by how many edges leave them, most first: int64 [num_nodes], permutation[new] = old.

    That is how often sampling reads a node, and its in-degree where the graph is undirected. Equal nodes keep their
    order.
    """
    return torch.from_numpy(np.argsort(-_out_degrees(store, progress), kind="stable"))


def order_by_partition(store: GraphStore, assignment: Tensor, progress: Progress | None = None) -> Tensor:
    """Return the nodes part by part, inside a part by degree as `order_by_degree`: permutation[new] = old.

    assignment: integers [num_nodes], each node's part.
    """
    return torch.from_numpy(np.lexsort((-_out_degrees(store, progress), assignment.numpy())))


def reorder_store(
    store: GraphStore,
    permutation: Tensor,
    out: str | Path,
    *,
    order: str | None = None,
    name: str | None = None,
    partition: Partition | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> GraphStore:
    """Write the store with node `permutation[new]` as node `new` to `out`, and open it.

    permutation: int64 [num_nodes], each node once. order: what it is called in the provenance. name: default the
    store's. partition: of the store as it is, to be kept in the new one, besides those that the store has.
    overwrite: replace a store that is at `out`, which may be this one. progress: called with (stage, done, total).
    Memory: a few numbers a node, and blocks. Blocks are read in the order of the old numbers, so from a table that does
    not fit in memory as evenly as the permutation allows.
    Applying a permutation and then its inverse gives the files that there were, byte for byte.
    Raises UserError if permutation is none, or `out` cannot be written; leaves nothing behind then.
    """
    if is_remote(out):
        shown = shown_address(address_of(out))
        raise UserError(f"{shown} cannot be written to directly; give a local folder, then copy it there whole")
    target = expanded(out)
    check_target(target, overwrite, m.is_store_file)
    if isinstance(name, str) and not name.strip():
        raise UserError("name='' is empty; give the graph a name, or leave it out to keep the one it has")
    old = permutation.numpy()
    if old.dtype != np.int64 or old.shape != (store.num_nodes,):
        raise UserError(
            f"the permutation has dtype {old.dtype} and shape {old.shape} but must be int64 ({store.num_nodes},)"
        )
    new = _inverse(old)
    with StagedFolder(target, overwrite) as staged:
        files = _write_topology(store, old, new, staged.path, progress)
        del new
        files.update(_write_nodes(store, old, staged.path, progress))
        partitions = dict(store.manifest.partitions)
        assignments = {parts: store.partition(parts) for parts in store.partitions}
        if partition is not None:
            partitions[str(partition.parts)] = partition.info
            assignments[partition.parts] = partition.assignment
        for parts, assignment in sorted(assignments.items()):
            file = m.partition_file(parts)
            files[file] = write_columns(staged.path / file, {"part": assignment.numpy()[old]})
        provenance = store.manifest.provenance
        if order is not None and order != "original":
            provenance = provenance.model_copy(update={"options": {**provenance.options, "order": order}})
        manifest = store.manifest.model_copy(
            update={
                "format_version": max(store.manifest.format_version, m.PLAIN_VERSION),
                "name": name or store.name,
                "files": {
                    file: files[file]
                    for file in (*m.FILE_NAMES, *map(m.partition_file, sorted(assignments)))
                    if file in files
                },
                "partitions": {str(parts): partitions[str(parts)] for parts in sorted(assignments)},
                "provenance": provenance,
            }
        )
        with (staged.path / m.MANIFEST_NAME).open("w", encoding="utf-8", newline="\n") as text:
            text.write(manifest.to_text())
            text.flush()
            os.fsync(text.fileno())
        staged.commit()
    return GraphStore.open(target)


def _out_degrees(store: GraphStore, progress: Progress | None) -> Int64Array:
    if not store.manifest.directed:
        in_degrees: Int64Array = store.in_degrees().numpy()
        return in_degrees
    degrees = np.zeros(store.num_nodes, dtype=np.int64)
    indices = store.indices.numpy()
    block = max(BLOCK_EDGES, store.num_nodes)
    for start in range(0, len(indices), block):
        degrees += np.bincount(indices[start : start + block], minlength=store.num_nodes)
        if progress is not None:
            progress("counting degrees", min(start + block, len(indices)), len(indices))
    return degrees


def _inverse(old: Int64Array) -> Int64Array:
    new = np.full(len(old), -1, dtype=np.int64)
    inside = (old >= 0) & (old < len(old))
    new[old[inside]] = np.flatnonzero(inside)
    if not inside.all() or (new < 0).any():
        raise UserError(f"the permutation does not name each of the {len(old)} nodes once; make it of this graph")
    return new


def _write_topology(
    store: GraphStore, old: Int64Array, new: Int64Array, folder: Path, progress: Progress | None
) -> dict[str, m.FileEntry]:
    old_indptr, old_indices = store.indptr.numpy(), store.indices.numpy()
    indptr = np.zeros(len(old) + 1, dtype=np.int64)
    np.cumsum((old_indptr[1:] - old_indptr[:-1])[old], out=indptr[1:])
    files = {m.INDPTR: write_columns(folder / m.INDPTR, {"indptr": indptr})}
    old_weight = None if store.edge_weight is None else store.edge_weight.numpy()
    copies = store.manifest.duplicates.kept > 0
    writers = {m.INDICES: ColumnWriter(folder / m.INDICES, "indices", "int64", store.num_edges)}
    if old_weight is not None:
        writers[m.EDGE_WEIGHT] = ColumnWriter(folder / m.EDGE_WEIGHT, "edge_weight", "float32", store.num_edges)
    try:
        for start, end in node_blocks(indptr, len(old)):
            edges, row = _edges_of(old[start:end], old_indptr)
            key = row * np.int64(len(old)) + new[old_indices[edges]]
            if old_weight is None:
                key.sort()
            else:
                weight = old_weight[edges]
                # Copies of an edge lie in the order of their weights.
                by = np.lexsort((weight, key)) if copies else np.argsort(key)
                key = key[by]
                writers[m.EDGE_WEIGHT].append(weight[by])
            writers[m.INDICES].append(key % len(old))
            if progress is not None:
                progress("edges", int(indptr[end]), store.num_edges)
        files.update({file: writer.finish() for file, writer in writers.items()})
    finally:
        for writer in writers.values():
            writer.close()
    return files


def _edges_of(nodes: Int64Array, indptr: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Return the positions of the edges into nodes, ascending, and for each which of the nodes it leads into."""
    ascending = np.argsort(nodes)
    starts = indptr[nodes[ascending]]
    degrees = indptr[nodes[ascending] + 1] - starts
    first = np.cumsum(degrees) - degrees
    edges = np.arange(int(degrees.sum())) + np.repeat(starts - first, degrees)
    return edges, np.repeat(ascending, degrees)


def _write_nodes(store: GraphStore, old: Int64Array, folder: Path, progress: Progress | None) -> dict[str, m.FileEntry]:
    files: dict[str, m.FileEntry] = {}
    if store.num_features:
        files[m.FEATURES] = _write_features(store, old, folder / m.FEATURES, progress)
    files[m.LABELS] = write_labels(folder / m.LABELS, store.labels.numpy()[old])
    masks: dict[str, Array] = {}
    for mask, splits in store.manifest.masks.items():
        values = store.split_masks[mask].view(torch.uint8).numpy().reshape(-1, store.num_nodes)
        masks.update((column, row[old]) for column, row in zip(m.mask_columns(mask, splits), values))
    if masks:
        files[m.SPLITS] = write_columns(folder / m.SPLITS, masks)
    names = _names(store.node_ids, old)
    if names is not None:
        files[m.NODE_IDS] = write_columns(folder / m.NODE_IDS, {"node_ids": names})
    return files


def _names(names: Any, old: Int64Array) -> Any:
    """Return the ids in the new order; None where they are 0, 1, 2, ..., which a store need not hold."""
    if isinstance(names, pa.Array):
        return names.take(pa.array(old))
    moved = old if names is None else names[old]
    return None if np.array_equal(moved, np.arange(len(moved))) else moved


def _write_features(store: GraphStore, old: Int64Array, path: Path, progress: Progress | None) -> m.FileEntry:
    kind = store.manifest.feature_dtype
    table = store.features
    values = table.view(torch.int16).numpy().view(np.uint16) if kind == "bfloat16" else table.numpy()
    rows = max(1, _BLOCK_BYTES // (values.itemsize * store.num_features))
    with ColumnWriter(path, "features", f"{kind}[{store.num_features}]", store.num_nodes) as file:
        for start in range(0, len(old), rows):
            nodes = old[start : start + rows]
            ascending = np.argsort(nodes)
            block = np.empty((len(nodes), store.num_features), dtype=values.dtype)
            block[ascending] = values[nodes[ascending]]
            file.append(block)
            if progress is not None:
                progress("features", start + len(nodes), len(old))
        return file.finish()
