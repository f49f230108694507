"""Writing a store so that it is either whole or not there.

Arrays are checked first, then written into a hidden sibling folder, synced to the disk, and renamed
into place. A process killed at any point leaves at most a folder whose name `open` refuses.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from dngd.errors import UserError
from dngd.graph import manifest as m
from dngd.graph.arrow_files import write_columns, write_rows
from dngd.graph.canonical import (
    CanonicalEdges,
    Duplicates,
    FeatureTable,
    SelfLoops,
    canonical_edges,
    canonical_labels,
    canonical_masks,
    csc_pair,
    edge_pair,
    edge_weights,
)

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total), in bytes of the stage's file."""

_TEMPORARY_MARK = ".tmp-"


def write_store(
    path: str | Path,
    *,
    features: Any,
    labels: Any = None,
    edge_index: Any = None,
    indptr: Any = None,
    indices: Any = None,
    name: str | None = None,
    num_nodes: int | None = None,
    num_classes: int | None = None,
    edge_weight: Any = None,
    masks: Mapping[str, Any] | None = None,
    directed: bool | None = None,
    self_loops: SelfLoops = "drop",
    duplicates: Duplicates = "drop",
    provenance: m.Provenance | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Check the arrays and write them as a store at `path`; return the path. See `GraphStore.write`."""
    target = Path(path)
    if isinstance(name, str) and not name.strip():
        raise UserError("name='' is empty; give the graph a name, or leave it out to take the folder's")
    _check_target(target, overwrite)
    table = FeatureTable(features, num_nodes)
    nodes = table.shape[0]
    edges = _edges(
        nodes,
        edge_index=edge_index,
        indptr=indptr,
        indices=indices,
        edge_weight=edge_weight,
        directed=directed,
        self_loops=self_loops,
        duplicates=duplicates,
    )
    classes, num_classes = canonical_labels(labels, nodes, num_classes)
    split_masks = canonical_masks(masks, nodes)
    table.check_finite()
    with _folder_in_place(target, overwrite) as folder:
        files = {
            m.INDPTR: write_columns(folder / m.INDPTR, {"indptr": edges.indptr}),
            m.INDICES: write_columns(folder / m.INDICES, {"indices": edges.indices}),
            m.LABELS: write_columns(folder / m.LABELS, {"labels": classes}),
        }
        if edges.weight is not None:
            files[m.EDGE_WEIGHT] = write_columns(folder / m.EDGE_WEIGHT, {"edge_weight": edges.weight})
        if table.shape[1]:
            blocks = _reported(table, progress)
            files[m.FEATURES] = write_rows(folder / m.FEATURES, "features", nodes, table.shape[1], blocks)
        if split_masks:
            columns: dict[str, Any] = {}
            for mask, values in split_masks.items():
                names = m.mask_columns(mask, 0 if values.ndim == 1 else len(values))
                columns.update(zip(names, values.reshape(-1, nodes).astype(np.uint8)))
            files[m.SPLITS] = write_columns(folder / m.SPLITS, columns)
        manifest = m.Manifest(
            name=name or target.name,
            num_nodes=nodes,
            num_edges=len(edges.indices),
            num_features=table.shape[1],
            num_classes=num_classes,
            num_labelled=int((classes >= 0).sum()),
            directed=edges.directed,
            self_loops=edges.self_loops,
            duplicates=edges.duplicates,
            masks={mask: 0 if v.ndim == 1 else len(v) for mask, v in split_masks.items()},
            files={file: files[file] for file in m.FILE_NAMES if file in files},
            provenance=provenance or m.Provenance(),
        )
        with (folder / m.MANIFEST_NAME).open("w", encoding="utf-8", newline="\n") as file:
            file.write(manifest.to_text())
            file.flush()
            os.fsync(file.fileno())
    return target


def is_temporary(path: Path) -> bool:
    """Say whether a folder's name is that of an unfinished write."""
    return path.name.startswith(".") and _TEMPORARY_MARK in path.name


def remove_unfinished(target: Path) -> None:
    """Remove what killed writes to `target` left beside it. The caller must be its only writer."""
    for leftover in target.parent.glob(f".{target.name}{_TEMPORARY_MARK}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _edges(
    num_nodes: int,
    *,
    edge_index: Any,
    indptr: Any,
    indices: Any,
    edge_weight: Any,
    directed: bool | None,
    self_loops: SelfLoops,
    duplicates: Duplicates,
) -> CanonicalEdges:
    if edge_index is not None and indptr is None and indices is None:
        source, destination = edge_pair(edge_index, num_nodes)
    elif edge_index is None and indptr is not None and indices is not None:
        source, destination = csc_pair(indptr, indices, num_nodes)
    else:
        given = [n for n, v in (("edge_index", edge_index), ("indptr", indptr), ("indices", indices)) if v is not None]
        raise UserError(f"the topology is given as {given or 'nothing'}; give edge_index, or indptr and indices")
    weight = None if edge_weight is None else edge_weights(edge_weight, len(source))
    return canonical_edges(
        source,
        destination,
        num_nodes,
        weight=weight,
        directed=directed,
        self_loops=self_loops,
        duplicates=duplicates,
    )


def _reported(table: FeatureTable, progress: Progress | None) -> Iterator[Any]:
    total, done = table.shape[0] * table.shape[1] * 4, 0
    for block in table.blocks():
        yield block
        done += block.nbytes
        if progress is not None:
            progress("features", done, total)


def _check_target(target: Path, overwrite: bool) -> None:
    if is_temporary(target) or not target.name:
        raise UserError(f"{target} cannot be the name of a store; choose a folder name without '{_TEMPORARY_MARK}'")
    if not target.exists() and not target.is_symlink():
        return
    if not overwrite:
        raise UserError(f"{target} already exists and is not overwritten; choose another path, or --overwrite")
    foreign = not target.is_dir() or target.is_symlink()
    if not foreign:
        foreign = bool({entry.name for entry in target.iterdir()} - {m.MANIFEST_NAME, *m.FILE_NAMES})
    if foreign:
        raise UserError(
            f"{target} is not a graph store, or holds other files too, so that it is not overwritten; "
            "choose another path or remove it yourself"
        )


@contextmanager
def _folder_in_place(target: Path, overwrite: bool) -> Iterator[Path]:
    """Give a temporary folder to fill; rename it to `target` on success, remove it on any error."""
    temporary = target.parent / f".{target.name}{_TEMPORARY_MARK}{os.getpid()}-{secrets.token_hex(4)}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        _sync_folder(temporary)
        _rename(temporary, target, overwrite)
        _sync_folder(target.parent)
    except OSError as error:
        reason = error.strerror or str(error)
        fix = "free some space" if error.errno == errno.ENOSPC else "check the folder's permissions and disk"
        raise UserError(f"the store {target} cannot be written ({reason}); {fix}, or choose another path") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _rename(temporary: Path, target: Path, overwrite: bool) -> None:
    retired = temporary.with_name(temporary.name + "-old")
    if overwrite and target.exists():
        target.rename(retired)
    try:
        temporary.rename(target)
    except OSError as error:
        if retired.exists():
            retired.rename(target)
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise UserError(
                f"{target} was created meanwhile by another process; use it, or choose another path"
            ) from error
        raise
    shutil.rmtree(retired, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
