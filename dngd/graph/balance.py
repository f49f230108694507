"""How many nodes a part may hold, and making an assignment of nodes to parts keep to it.

A part is limited twice: in its nodes, and in its training nodes, because a worker's time goes with the
seeds it has and its memory with the nodes it keeps. Both limits can always be met together, with any
number of parts: see `enforce`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Int64Array = npt.NDArray[np.int64]
Int32Array = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]

BLOCK_EDGES = 1 << 22
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Limits:
    """The most nodes and the most training nodes that one of `parts` parts may hold."""

    parts: int
    nodes: int
    train: int

    @staticmethod
    def of(num_nodes: int, num_train: int, parts: int, slack: float) -> Limits:
        """Return max(⌈count / parts⌉, ⌊(1 + slack) · count / parts⌋) for both counts. slack >= 0, parts >= 1."""

        def limit(count: int) -> int:
            return max(-(-count // parts), math.floor((1 + slack) * count / parts + _ROUNDING))

        return Limits(parts, nodes=limit(num_nodes), train=limit(num_train))

    def met_by(self, part: Int32Array, train: BoolArray) -> bool:
        """Say whether an assignment, [num_nodes] in 0..parts-1, keeps to both limits."""
        nodes = np.bincount(part, minlength=self.parts)
        seeds = np.bincount(part[train], minlength=self.parts)
        return bool((nodes <= self.nodes).all() and (seeds <= self.train).all())


def node_blocks(indptr: Int64Array, max_nodes: int, max_edges: int = BLOCK_EDGES) -> Iterator[tuple[int, int]]:
    """Yield consecutive node ranges [start, end) of at most max_nodes nodes and max_edges in-edges, or of one node."""
    num_nodes, start = len(indptr) - 1, 0
    while start < num_nodes:
        end = int(np.searchsorted(indptr, indptr[start] + max_edges, side="right")) - 1
        end = max(start + 1, min(end, start + max_nodes, num_nodes))
        yield start, end
        start = end


def enforce(part: Int32Array, train: BoolArray, limits: Limits, indptr: Int64Array, indices: Array) -> int:
    """Move as few nodes as the limits ask for, those that lose the fewest edges within their part; return how many.

    part: [num_nodes] in 0..parts-1, changed in place. train: [num_nodes], the training nodes.
    First training nodes leave the parts with too many for parts with room. Then other nodes do: a part with too
    many nodes has others, as its training nodes are at most ⌈train/parts⌉ or that share of the slack, which is
    at most what it may hold of nodes; and there is room, as the parts may hold at least num_nodes in all.
    """
    moved = 0
    for movable, counted, limit in ((train, train, limits.train), (~train, None, limits.nodes)):
        sizes = np.bincount(part if counted is None else part[counted], minlength=limits.parts)
        excess = np.maximum(sizes - limit, 0)
        if not excess.any():
            continue
        leaving = _cheapest(part, np.flatnonzero(movable & (excess > 0)[part]), excess, indptr, indices)
        room = np.maximum(limit - sizes, 0)
        for node in leaving:
            # One by one: there are few, and each choice changes what room is left.
            neighbours = part[indices[indptr[node] : indptr[node + 1]]]
            wanted = np.where(room > 0, np.bincount(neighbours, minlength=limits.parts) + room / (room.max() + 1), -1)
            best = int(wanted.argmax())
            part[node] = best
            room[best] -= 1
        moved += len(leaving)
    return moved


def _cheapest(
    part: Int32Array, candidates: Int64Array, excess: Int64Array, indptr: Int64Array, indices: Array
) -> Int64Array:
    """Return excess[p] of the candidates in each part p: those with the fewest in-neighbours in their own part."""
    bound = np.zeros(len(candidates), dtype=np.int64)
    for start, end in node_blocks(indptr, len(part)):
        low, high = np.searchsorted(candidates, (start, end))
        mine = candidates[low:high]
        degrees = indptr[mine + 1] - indptr[mine]
        rows = np.repeat(np.arange(len(mine)), degrees)
        edges = np.arange(len(rows)) + (indptr[mine] - np.cumsum(degrees) + degrees)[rows]
        own = part[indices[edges]] == part[mine][rows]
        bound[low:high] = np.bincount(rows[own], minlength=len(mine))
    order = np.lexsort((bound, part[candidates]))
    ordered = part[candidates][order]
    rank = np.arange(len(order)) - np.searchsorted(ordered, ordered)
    return candidates[order[rank < excess[ordered]]]
