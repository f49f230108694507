"""Linear deterministic greedy partitioning (LDG), restreamed: balanced parts with few edges between them.

Nodes are visited in their order, and each goes to the part p that maximises

    (in-neighbours in p) · (1 − size_p / (1.05 · limit_p))

among the parts with room (Stanton & Kliot 2012); further passes over the same stream start from the parts of the
last one (Nishimura & Ugander 2013). Training nodes and others are counted apart, each with its own size and limit,
which balances both.

Nodes are taken in blocks: a block's choices see the parts as they were before it, and go in the order of what
they gain until a part is full. So a pass is a few array operations an edge, reads the topology once from front
to back in blocks, and keeps a few bytes a node, however large the topology is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dngd.graph.balance import Array, BoolArray, Int32Array, Int64Array, Limits, node_blocks

_MAX_BLOCK_NODES = 1 << 15
_MIN_BLOCK_NODES = 64
_BLOCKS_A_PASS = 80
_BLOCKS_A_PART = 2
"""A block as large as a part chooses blindly: measured, edge cut .35 instead of .30 for 512 parts of a web graph."""
_MAX_ROUNDS = 8
_STRETCH = 1.05
"""Of the limits in the score alone. Measured over passes and graphs: with 1, a score that vanishes at the limit pushes
nodes about for differences in size that do not matter (edge cut .43 instead of .15 on four sorted communities); 1.5 is
worse where there are many parts (.34 instead of .30 on 100 communities in 64 parts)."""
_TIE = 1e-3
_SETTLED_SHARE = 2e-4
_NONE = -1


def ldg_assignment(
    indptr: Int64Array,
    indices: Array,
    parts: int,
    train: BoolArray,
    *,
    slack: float,
    passes: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> Int32Array:
    """Return each node's part, int32 [num_nodes] in 0..parts-1.

    Training nodes and other nodes each keep to `Limits.of` their number; all nodes together may be one above theirs
    in a part, which `balance.enforce` mends.
    indptr, indices: in-neighbours, compressed sparse columns; read in blocks. train: the training nodes.
    passes: over the topology, at least 1; fewer are made when nodes stop moving. seed: breaks ties; equal
    arguments give equal parts. progress: called with (edges done, edges of all passes).
    """
    stream = _Stream(indptr, indices, parts, train, slack, seed)
    total = passes * len(indices)
    for number in range(passes):
        moved = 0
        for start, end in node_blocks(indptr, stream.block_nodes):
            moved += stream.visit(start, end)
            if progress is not None:
                progress(number * len(indices) + int(indptr[end]), total)
        if number == 0:
            stream.restart_from_ranges_if_better()
        elif moved < _SETTLED_SHARE * len(train):
            break
    if progress is not None:
        progress(total, total)
    return stream.part


@dataclass(frozen=True)
class _Pairs:
    """For each node of a block and each bin that holds in-neighbours of it: how many, by node, then bin."""

    row: Int64Array
    bin: Int64Array
    count: Int64Array


class _Stream:
    """The parts so far. A bin is (class, part), class 1 being the training nodes: bin = class · parts + part."""

    def __init__(
        self, indptr: Int64Array, indices: Array, parts: int, train: BoolArray, slack: float, seed: int
    ) -> None:
        num_nodes, num_train = len(train), int(train.sum())
        self.indptr, self.indices, self.parts = indptr, indices, parts
        self.train = train
        self.part = np.full(num_nodes, _NONE, dtype=np.int32)
        self.block_nodes = max(
            _MIN_BLOCK_NODES,
            min(_MAX_BLOCK_NODES, num_nodes // _BLOCKS_A_PASS, num_nodes // (_BLOCKS_A_PART * parts)),
        )
        limits = [Limits.of(count, 0, parts, slack).nodes for count in (num_nodes - num_train, num_train)]
        self.limit = np.repeat(np.array(limits, dtype=np.int64), parts)
        self.size = np.zeros(2 * parts, dtype=np.int64)
        self._draws = np.random.PCG64(seed)

    def restart_from_ranges_if_better(self) -> None:
        """Take ranges of consecutive nodes instead of the parts so far where these cut more edges.

        Nodes that come sorted by community, as by a crawl or an earlier partition, are what a stream does worst on: the
        first of a community see no neighbour with a part.
        """
        part = np.empty_like(self.part)
        for c in (False, True):
            (nodes,) = np.nonzero(self.train == c)
            part[nodes] = np.arange(len(nodes)) * self.parts // max(len(nodes), 1)
        if cut_share(self.indptr, self.indices, part) < cut_share(self.indptr, self.indices, self.part):
            self.part = part
            self.size = np.bincount(self.train * self.parts + part, minlength=2 * self.parts)

    def visit(self, start: int, end: int) -> int:
        """Choose the parts of nodes start..end-1; return how many changed."""
        base = self.train[start:end].astype(np.int64) * self.parts
        pairs = self._pairs(start, end, base)
        before = np.where(self.part[start:end] == _NONE, _NONE, base + self.part[start:end])
        after = self._choose(pairs, before)
        for c in (0, 1):
            lost = np.flatnonzero((after == _NONE) & (base == c * self.parts))
            after[lost] = self._fill(c, len(lost))
        self.part[start:end] = after - base
        return int((after != before).sum())

    def _pairs(self, start: int, end: int, base: Int64Array) -> _Pairs:
        """Count the in-neighbours of each node by part, those without a part left out."""
        first, last = int(self.indptr[start]), int(self.indptr[end])
        neighbours = self.part[self.indices[first:last]]
        # Half the bytes sort in half the time.
        key_type = np.dtype(np.int32 if (end - start) * self.parts < 2**31 else np.int64)
        rows = np.arange(0, (end - start) * self.parts, self.parts, dtype=key_type)
        key = np.repeat(rows, np.diff(self.indptr[start : end + 1]))
        key += neighbours
        key = key[neighbours != _NONE]
        key.sort()
        starts = np.flatnonzero(np.diff(key, prepend=-1))
        count = np.diff(starts, append=len(key))
        row, part = np.divmod(key[starts].astype(np.int64), self.parts)
        return _Pairs(row, base[row] + part, count)

    def _choose(self, pairs: _Pairs, before: Int64Array) -> Int64Array:
        """Move each node to its best bin with room, those that gain most first; return the bins, -1 for none found."""
        after = before.copy()
        tie = (self._draws.random_raw(len(pairs.row)) >> np.uint64(11)).astype(np.float64) * (_TIE * 2.0**-53)
        open_share = 1 - self.size / np.maximum(_STRETCH * self.limit, 1)
        score = pairs.count * open_share[pairs.bin] + tie
        own = pairs.bin == before[pairs.row]
        own_score = np.zeros(len(before))
        own_score[pairs.row[own]] = score[own] + _TIE
        # Only what beats a node's own bin is left to choose from.
        better = ~own & (score > own_score[pairs.row])
        row, target, gain = pairs.row[better], pairs.bin[better], (score - own_score[pairs.row])[better]
        for _ in range(_MAX_ROUNDS):
            usable = self.size[target] < self.limit[target]
            row, target, gain = row[usable], target[usable], gain[usable]
            if not len(row):
                break
            best = _first_best(row, gain)
            taken = best[self._admitted(target[best], gain[best])]
            left = after[row[taken]]
            self.size += np.bincount(target[taken], minlength=len(self.size))
            self.size -= np.bincount(left[left != _NONE], minlength=len(self.size))
            after[row[taken]] = target[taken]
            done = np.zeros(len(before), dtype=np.bool_)
            done[row[taken]] = True
            rest = ~done[row]
            row, target, gain = row[rest], target[rest], gain[rest]
        return after

    def _admitted(self, target: Int64Array, gain: Array) -> Int64Array:
        """Return the positions of those that fit: in each bin the ones that gain most, as many as it has room for."""
        order = np.lexsort((-gain, target))
        ordered = target[order]
        rank = np.arange(len(order)) - np.searchsorted(ordered, ordered)
        return order[rank < (self.limit - self.size)[ordered]]

    def _fill(self, c: int, count: int) -> Int64Array:
        """Give `count` nodes of class c to its emptiest bins, in runs, which keeps what order the nodes have."""
        bins = np.arange(c * self.parts, (c + 1) * self.parts)
        given = level_fill(self.size[bins], self.limit[bins], count)
        self.size[bins] += given
        return np.repeat(bins, given)


def cut_share(indptr: Int64Array, indices: Array, part: Int32Array) -> float:
    """Return the share of the edges whose ends lie in different parts; 0 without edges."""
    cut = 0
    for start, end in node_blocks(indptr, len(part)):
        own = np.repeat(part[start:end], np.diff(indptr[start : end + 1]))
        cut += int(np.count_nonzero(part[indices[indptr[start] : indptr[end]]] != own))
    return cut / len(indices) if len(indices) else 0.0


def level_fill(size: Int64Array, limit: Int64Array, count: int) -> Int64Array:
    """Return how many of `count` to add to each size, so that the smallest grow to one level, none above its limit.

    count: at most Σ (limit − size).
    """
    low, high = int(size.min(initial=0)), int(limit.max(initial=0))
    while low < high:  # the lowest level that takes them all
        level = (low + high) // 2
        if int(np.maximum(np.minimum(level, limit) - size, 0).sum()) < count:
            low = level + 1
        else:
            high = level
    given: Int64Array = np.maximum(np.minimum(low, limit) - size, 0)
    surplus = int(given.sum()) - count
    top = np.flatnonzero((size + given == low) & (given > 0))
    given[top[:surplus]] -= 1
    return given


def _first_best(row: Int64Array, gain: Array) -> Int64Array:
    """Return for each distinct row, ascending, the position of its first largest gain."""
    starts = np.flatnonzero(np.diff(row, prepend=-1))
    largest = np.repeat(np.maximum.reduceat(gain, starts), np.diff(starts, append=len(row)))
    at = np.flatnonzero(gain == largest)
    found: Int64Array = at[np.diff(row[at], prepend=-1) != 0]
    return found
