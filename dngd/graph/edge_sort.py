"""From edges in any order to the topology files of a store, in bounded memory.

An edge source -> destination is the key destination · num_nodes + source: sorted keys are compressed sparse columns.
Self loops, copies of an edge and the symmetry of the graph are treated range by range as the sorted keys come by.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dngd.errors import UserError
from dngd.graph import manifest as m
from dngd.graph.arrow_files import ColumnWriter
from dngd.graph.canonical import Duplicates, Float32Array, Int64Array, SelfLoops
from dngd.graph.key_sort import KeySort, first_of_equal, keep_only

_PIECE_EDGES = 1 << 17
_PIECE_NODES = 1 << 20


@dataclass(frozen=True)
class Topology:
    """The topology files of a store and what became of the edges."""

    num_edges: int
    directed: bool
    self_loops: m.Dropped
    duplicates: m.Dropped
    files: dict[str, m.FileEntry]


class EdgeSort:
    """Collects checked edges, in blocks of any size and order, and writes them sorted."""

    def __init__(
        self,
        folder: Path,
        num_nodes: int,
        *,
        weighted: bool,
        add_reverse: bool,
        directed: bool | None,
        self_loops: SelfLoops,
        duplicates: Duplicates,
        memory_bytes: int | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        """folder: of the topology files, and of temporary files. The options are those of `StoreBuilder`."""
        self._folder, self._num_nodes = folder, num_nodes
        self._add_reverse, self._directed = add_reverse, directed
        self._self_loops, self._duplicates = self_loops, duplicates
        self._memory_bytes, self._progress = memory_bytes, progress
        self._weighted = weighted
        self._num_entries = 0
        self._num_loops = 0
        self._sort = KeySort(folder, weighted=weighted, distinct=duplicates == "drop", memory_bytes=memory_bytes)

    def close(self) -> None:
        """Give memory and temporary files back."""
        self._sort.close()

    def add(self, source: npt.NDArray[Any], destination: npt.NDArray[Any], weight: Float32Array | None) -> None:
        """Add edges source[e] -> destination[e]: integers [entries] in 0..num_nodes-1; weight float32 or None."""
        for start in range(0, len(source), _PIECE_EDGES):
            piece = slice(start, start + _PIECE_EDGES)
            one = source[piece].astype(np.int64, copy=False)
            other = destination[piece].astype(np.int64, copy=False)
            # + 0 turns -0.0 into 0.0, whose bytes would otherwise depend on the input order.
            values = None if weight is None else weight[piece] + np.float32(0)
            apart = one != other
            num_loops = len(one) - int(np.count_nonzero(apart))
            self._num_loops += num_loops
            if num_loops and self._self_loops == "drop":
                one, other = one[apart], other[apart]
                values = None if values is None else values[apart]
                apart = apart[apart]
            self._add_keys(other * self._num_nodes + one, values)
            if self._add_reverse:
                keys = one * self._num_nodes + other
                self._add_keys(keys[apart], None if values is None else values[apart])

    def write(self) -> Topology:
        """Sort the edges and write the topology files.

        Raises UserError if directed=False and an edge lacks its reverse, or if copies of an edge carry different
        weights under duplicates="drop".
        """
        with _TopologyFiles(self._folder, self._num_nodes, self._weighted) as files:
            symmetry = None if self._directed or self._add_reverse else _Symmetry(self._num_nodes)
            num_unique = num_loops = done = 0
            for keys, weight in self._sort.chunks():
                done += len(keys)
                first = first_of_equal(keys)
                num_unique += int(np.count_nonzero(first))
                keys, weight = self._merged(keys, weight, first)
                del first
                num_loops += files.append(keys, weight, symmetry)
                if self._progress is not None:
                    self._progress("sorting", done, self._sort.num_kept)
                del keys, weight
            directed = bool(self._directed) if symmetry is None else not symmetry.holds()
            if directed and self._directed is False:
                self._refuse_directed(files.num_edges)
            self.close()
            num_copies = self._num_entries - num_unique
            kept_copies = num_copies if self._duplicates == "keep" else 0
            dropped_loops = self._num_loops if self._self_loops == "drop" else 0
            return Topology(
                num_edges=files.num_edges,
                directed=directed,
                self_loops=m.Dropped(policy=self._self_loops, dropped=dropped_loops, kept=num_loops),
                duplicates=m.Dropped(policy=self._duplicates, dropped=num_copies - kept_copies, kept=kept_copies),
                files=files.finish(),
            )

    def _add_keys(self, keys: Int64Array, weight: Float32Array | None) -> None:
        self._num_entries += len(keys)
        self._sort.add(keys, weight)

    def _merged(
        self, keys: Int64Array, weight: Float32Array | None, first: npt.NDArray[np.bool_]
    ) -> tuple[Int64Array, Float32Array | None]:
        """Return sorted keys and their weights with copies treated as `duplicates` says."""
        if self._duplicates == "keep" or first.all():
            return keys, weight
        if weight is not None and self._duplicates == "sum":
            weight = np.add.reduceat(weight.astype(np.float64), np.flatnonzero(first)).astype(np.float32)
            return keys[: keep_only(first, keys)], weight
        if weight is not None:
            differs = np.flatnonzero(~first[1:] & (weight[1:] != weight[:-1]))
            if len(differs):
                at = int(differs[0])
                source, destination = self._ends(int(keys[at]))
                raise UserError(
                    f"edge {source} -> {destination} is given more than once with the weights {weight[at]:g} and "
                    f"{weight[at + 1]:g}; copies are dropped only when their weights agree: merge them, or give "
                    "duplicates='sum' or duplicates='keep'"
                )
        num_kept = keep_only(first, keys, weight)
        return keys[:num_kept], None if weight is None else weight[:num_kept]

    def _ends(self, key: int) -> tuple[int, int]:
        return key % self._num_nodes, key // self._num_nodes

    def _refuse_directed(self, num_edges: int) -> None:
        """Raise UserError with the number of edges that lack their reverse, and the first of them."""
        with KeySort(self._folder, distinct=True, memory_bytes=self._memory_bytes) as reverse:
            for keys, _ in self._sort.chunks():
                for start in range(0, len(keys), _PIECE_EDGES):
                    destination, source = np.divmod(keys[start : start + _PIECE_EDGES], self._num_nodes)
                    reverse.add(source * self._num_nodes + destination)
            num_lonely, example = _count_missing(_distinct(self._sort), _distinct(reverse))
        if example is None:
            raise UserError(
                "directed=False but some edges have more copies than their reverse has; give both as often, leave "
                "directed out, or pass duplicates='drop'"
            )
        one, other = self._ends(example)
        raise UserError(
            f"directed=False but {num_lonely} of {num_edges} edges lack their reverse, the first is {one} -> {other}; "
            "add each edge in both directions, or leave directed out"
        )


class _TopologyFiles:
    """Writes indptr, indices and edge weights from sorted keys; a context, which closes the files."""

    def __init__(self, folder: Path, num_nodes: int, weighted: bool) -> None:
        self._num_nodes = num_nodes
        self._writers = {
            m.INDPTR: ColumnWriter(folder / m.INDPTR, "indptr", "int64", num_nodes + 1),
            m.INDICES: ColumnWriter(folder / m.INDICES, "indices", "int64"),
        }
        if weighted:
            self._writers[m.EDGE_WEIGHT] = ColumnWriter(folder / m.EDGE_WEIGHT, "edge_weight", "float32")
        self._next_node = 0
        self.num_edges = 0

    def __enter__(self) -> _TopologyFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for writer in self._writers.values():
            writer.close()

    def append(self, keys: Int64Array, weight: Float32Array | None, symmetry: _Symmetry | None) -> int:
        """Write the next edges (keys ascending, beyond all before); return how many are self loops."""
        num_loops = 0
        for start in range(0, len(keys), _PIECE_EDGES):
            part = keys[start : start + _PIECE_EDGES]
            destination = part // self._num_nodes
            source = part - destination * self._num_nodes
            self._writers[m.INDICES].append(source)
            num_loops += int(np.count_nonzero(source == destination))
            if symmetry is not None:
                symmetry.add(part, source, destination)
        if weight is not None:
            self._writers[m.EDGE_WEIGHT].append(weight)
        if len(keys):
            self._append_pointers(keys, int(keys[-1]) // self._num_nodes + 1)
        self.num_edges += len(keys)
        return num_loops

    def finish(self) -> dict[str, m.FileEntry]:
        """Complete the files; return their entries."""
        self._append_pointers(np.empty(0, dtype=np.int64), self._num_nodes + 1)
        return {name: writer.finish() for name, writer in self._writers.items()}

    def _append_pointers(self, keys: Int64Array, stop: int) -> None:
        """Write where the edges into each node before `stop` begin, for the nodes not written yet."""
        for start in range(self._next_node, stop, _PIECE_NODES):
            nodes = np.arange(start, min(start + _PIECE_NODES, stop), dtype=np.int64)
            # num_nodes² fits, as builder.py checks.
            pointers = np.searchsorted(keys, nodes * self._num_nodes)
            self._writers[m.INDPTR].append(pointers + self.num_edges)
        self._next_node = max(self._next_node, stop)


class _Symmetry:
    """Says whether the edges from low to high nodes, turned round, are those from high to low.

    Compares the two multisets by a sum of 128-bit hashes of their elements, under a key drawn at random for each
    object: two that differ are taken for equal with probability 2^-128, for any graph.
    """

    def __init__(self, num_nodes: int) -> None:
        self._num_nodes = num_nodes
        self._keys = np.frombuffer(os.urandom(16), dtype=np.uint64)
        self._sums = [[0, 0], [0, 0]]
        self._counts = [0, 0]

    def add(self, keys: Int64Array, source: Int64Array, destination: Int64Array) -> None:
        upward = source > destination
        self._add(0, keys[upward])
        downward = source < destination
        self._add(1, source[downward] * self._num_nodes + destination[downward])

    def holds(self) -> bool:
        one, other = ([total % 2**64 for total in totals] for totals in self._sums)
        return self._counts[0] == self._counts[1] and one == other

    def _add(self, side: int, keys: Int64Array) -> None:
        self._counts[side] += len(keys)
        mixed = _mix(keys.view(np.uint64) + self._keys[0])
        self._sums[side][0] += int(mixed.sum(dtype=np.uint64))
        mixed += self._keys[1]
        self._sums[side][1] += int(_mix(mixed).sum(dtype=np.uint64))


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Scramble 64-bit numbers in place, one to one, and return them (Steele, Lea, Flood 2014: SplitMix64)."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        values ^= values >> np.uint64(shift)
        values *= np.uint64(factor)
    values ^= values >> np.uint64(31)
    return values


def _distinct(sort: KeySort) -> Iterator[Int64Array]:
    for keys, _ in sort.chunks():
        yield keys[: keep_only(first_of_equal(keys), keys)]


def _count_missing(keys: Iterator[Int64Array], others: Iterator[Int64Array]) -> tuple[int, int | None]:
    """Return (how many keys are not among the others, the first of these or None); both ascend, without copies."""
    num_missing, first = 0, None
    other = next(others, None)
    for part in keys:
        while len(part):
            while other is not None and not len(other):
                other = next(others, None)
            if other is None:
                missing, part = part, part[:0]
            else:
                limit = min(int(part[-1]), int(other[-1]))
                ends = [int(np.searchsorted(side, limit, side="right")) for side in (part, other)]
                missing = np.setdiff1d(part[: ends[0]], other[: ends[1]], assume_unique=True)
                part, other = part[ends[0] :], other[ends[1] :]
            if len(missing) and first is None:
                first = int(missing[0])
            num_missing += len(missing)
    return num_missing, first
