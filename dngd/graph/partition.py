"""Partitions of a graph: what one is, how good it is, and how it is put beside the graph in its store.

    partition = partition_by_ldg(store, 8, train=store.split("masks").train)
    store = write_partition(store, partition)
    store.partition(8), store.partitions[8]

A partition is an addition to a store: the graph's files and digest stay as they are. METIS, which needs DGL,
and the choice between the two methods are `dngd.sampling.partition_nodes`.
"""

from __future__ import annotations

import errno
import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dngd.errors import UserError
from dngd.graph import manifest as m
from dngd.graph.arrow_files import write_columns
from dngd.graph.balance import BoolArray, Int32Array, Limits, enforce
from dngd.graph.builder import Progress
from dngd.graph.ldg import cut_share, ldg_assignment
from dngd.graph.lock import folder_lock
from dngd.graph.staging import check_utf8
from dngd.graph.store import GraphStore

MAX_PARTS = 1 << 16
_SEEDS = 2**64
_WAIT_SECONDS = 600.0


@dataclass(frozen=True)
class Partition:
    """An assignment of a graph's nodes to parts, and what it is like."""

    assignment: Tensor
    """int32 [num_nodes], in 0..parts-1"""
    info: m.PartitionInfo
    reason: str = ""
    """why this method was taken, in one sentence"""
    num_moved: int = 0
    """nodes that were moved to keep to the limits, of a method that does not keep to them by itself"""

    @property
    def parts(self) -> int:
        """Number of parts."""
        return len(self.info.nodes)


@dataclass(frozen=True)
class PartitionTask:
    """A checked request: the graph, the parts, and by which nodes they are balanced."""

    store: GraphStore
    parts: int
    train: BoolArray = field(repr=False)
    """[num_nodes], the training nodes; none set: only all nodes are balanced"""
    slack: float
    seed: int

    @staticmethod
    def of(store: GraphStore, parts: int, train: Tensor | None, slack: float, seed: int) -> PartitionTask:
        """Check arguments. train: int64 node numbers or None. Raises UserError."""
        if not 1 <= parts <= MAX_PARTS:
            raise UserError(f"parts={parts} is out of range; give 1 to {MAX_PARTS}")
        if not 0 <= slack <= 10:
            raise UserError(f"slack={slack:g} is out of range; give 0 to 10, such as 0.05 for 5 % above an even share")
        if not 0 <= seed < _SEEDS:
            raise UserError(f"seed={seed} is out of range; give a whole number from 0 up to 2**64 - 1")
        mask = np.zeros(store.num_nodes, dtype=np.bool_)
        if train is not None and train.numel():
            if train.dtype != torch.int64 or int(train.min()) < 0 or int(train.max()) >= store.num_nodes:
                raise UserError(f"the training nodes are not all node numbers from 0 to {store.num_nodes - 1}")
            mask[train.numpy()] = True
        return PartitionTask(store, parts, mask, slack, seed)

    @property
    def limits(self) -> Limits:
        return Limits.of(len(self.train), int(self.train.sum()), self.parts, self.slack)

    def finished(self, part: Int32Array, method: str, options: dict[str, Any]) -> Partition:
        """Return an assignment as a Partition; it is first made to keep to the limits, where it does not, in place."""
        indptr, indices = self.store.indptr.numpy(), self.store.indices.numpy()
        moved = enforce(part, self.train, self.limits, indptr, indices)
        seeds = np.bincount(part[self.train], minlength=self.parts).tolist() if self.train.any() else None
        info = m.PartitionInfo(
            method=method,
            edge_cut=cut_share(indptr, indices, part),
            nodes=np.bincount(part, minlength=self.parts).tolist(),
            train_nodes=seeds,
            options={"slack": self.slack, **options},
        )
        return Partition(torch.from_numpy(part), info, num_moved=moved)


def partition_by_ldg(
    store: GraphStore,
    parts: int,
    *,
    train: Tensor | None = None,
    slack: float = 0.05,
    passes: int = 10,
    seed: int = 0,
    progress: Progress | None = None,
) -> Partition:
    """Partition a graph of any size by restreamed linear deterministic greedy; see `ldg`.

    parts: at least 1. train: int64 node numbers, balanced besides all nodes; None: those alone.
    slack: no part holds more than max(⌈n / parts⌉, ⌊(1 + slack) · n / parts⌋) of the n nodes, nor of the n training
        nodes. passes: over the topology, which is read in blocks; memory is a few bytes a node.
    seed: breaks ties; equal arguments give equal partitions. progress: called with (stage, edges done, edges in all).
    Raises UserError if an argument is out of range.
    """
    return run_ldg(PartitionTask.of(store, parts, train, slack, seed), passes, progress)


def run_ldg(task: PartitionTask, passes: int, progress: Progress | None = None) -> Partition:
    """Do as `partition_by_ldg`, of a checked task."""
    if passes < 1:
        raise UserError(f"passes={passes} is out of range; give at least 1")

    def report(done: int, total: int) -> None:
        if progress is not None:
            progress("partitioning", done, total)

    indptr, indices = task.store.indptr.numpy(), task.store.indices.numpy()
    part = ldg_assignment(
        indptr, indices, task.parts, task.train, slack=task.slack, passes=passes, seed=task.seed, progress=report
    )
    return task.finished(part, "ldg", {"passes": passes, "seed": task.seed})


def check_writable(store: GraphStore, parts: int, *, overwrite: bool) -> None:
    """Raise UserError if a partition cannot be put into the store: before it is computed, which may take minutes."""
    check_utf8(store.path)
    _check_absent(store.manifest, store.path, parts, overwrite)
    try:
        probe = _temporary(store.path)
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise _write_error(store.path, error) from error


def write_partition(
    store: GraphStore, partition: Partition, *, overwrite: bool = False, progress: Progress | None = None
) -> GraphStore:
    """Put a partition into the store and return the store opened anew.

    overwrite: replace a partition in as many parts. A process killed at any moment leaves a sound store, with
    the graph as it was and the partition whole or absent. Writers of one store wait for each other, ten minutes
    at most; readers that have it open keep what they opened. progress: hears of such a wait.
    Raises UserError if there is such a partition already, it is not one of this graph, the wait is too long, or the
    store cannot be written.
    """
    folder, parts = store.path, partition.parts
    check_utf8(folder)
    part = partition.assignment.numpy()
    if part.dtype != np.int32 or part.shape != (store.num_nodes,):
        raise UserError(
            f"the assignment has dtype {part.dtype} and shape {part.shape} but the graph's nodes need int32 "
            f"({store.num_nodes},); make it of this graph"
        )
    if np.bincount(part, minlength=parts).tolist() != partition.info.nodes:
        raise UserError("the assignment's parts have other sizes than its info says; make it again")
    made: list[Path] = []
    try:
        purpose = f"writing a partition into {folder}"
        on_wait = None if progress is None else lambda text: progress(text, 0, 0)
        with folder_lock(folder, purpose=purpose, wait_seconds=_WAIT_SECONDS, on_wait=on_wait):
            _remove_leftovers(folder)
            manifest = m.read_manifest(folder)
            if manifest.num_nodes != store.num_nodes or GraphStore.open(folder).digest != store.digest:
                raise UserError(f"{folder} holds another graph by now; make the partition again")
            _check_absent(manifest, folder, parts, overwrite)
            file = _new(folder, made)
            entry = write_columns(file, {"part": part})
            # All is on the disk before anything changes, so that a full disk changes nothing.
            with_it = _written(_new(folder, made), _with(manifest, parts, entry, partition.info))
            if str(parts) in manifest.partitions:
                without = _written(_new(folder, made), _with(manifest, parts, None, None))
                _replace(without, folder / m.MANIFEST_NAME)
            _replace(file, folder / m.partition_file(parts))
            _replace(with_it, folder / m.MANIFEST_NAME)
    except OSError as error:
        raise _write_error(folder, error) from error
    finally:
        for path in made:
            path.unlink(missing_ok=True)
    return GraphStore.open(folder)


def _with(manifest: m.Manifest, parts: int, entry: m.FileEntry | None, info: m.PartitionInfo | None) -> m.Manifest:
    """Return the manifest with a partition, or without it."""
    infos = {key: value for key, value in manifest.partitions.items() if key != str(parts)}
    files = {name: value for name, value in manifest.files.items() if name != m.partition_file(parts)}
    if entry is not None and info is not None:
        infos[str(parts)] = info
        files[m.partition_file(parts)] = entry
    return manifest.model_copy(
        update={
            "format_version": max(manifest.format_version, m.PLAIN_VERSION),
            "files": files,
            "partitions": dict(sorted(infos.items(), key=lambda item: int(item[0]))),
        }
    )


def _written(path: Path, manifest: m.Manifest) -> Path:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(manifest.to_text())
        file.flush()
        os.fsync(file.fileno())
    return path


def _replace(source: Path, target: Path) -> None:
    """Rename, and wait until the disk knows it: the next rename must not overtake this one."""
    source.replace(target)
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary(folder: Path) -> Path:
    return folder / f"{m.PARTITION_TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}"


def _new(folder: Path, made: list[Path]) -> Path:
    made.append(_temporary(folder))
    return made[-1]


def _remove_leftovers(folder: Path) -> None:
    """Remove what a killed write of a partition left. The caller holds the lock."""
    listed = m.read_manifest(folder).files
    for path in folder.iterdir():
        if m.is_partition_file(path.name) and path.name not in listed:
            path.unlink(missing_ok=True)


def _check_absent(manifest: m.Manifest, folder: Path, parts: int, overwrite: bool) -> None:
    info = manifest.partitions.get(str(parts))
    if info is not None and not overwrite:
        raise UserError(
            f"{folder} has a partition in {parts} parts already (by {info.method}, {info.edge_cut:.1%} of the edges "
            "cut); use it, or replace it with --overwrite"
        )


def _write_error(folder: Path, error: OSError) -> UserError:
    reason = os.strerror(error.errno) if error.errno else str(error)
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    fix = "free some space" if full else "check the folder's permissions"
    return UserError(
        f"the partition cannot be written into {folder} ({reason}); {fix}, or write a reordered copy that has it with "
        "--reorder --out NEWSTORE"
    )
