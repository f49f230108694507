"""What exact evaluation computes, in which order of operations, and which rank computes it. No arithmetic on features.

A layer either aggregates and then transforms, `Z = (Â H) Wᵀ + b`, or transforms and then aggregates,
`Z = Â (H Wᵀ) + b`: the same, since aggregation is linear, but what is gathered along the edges, the most expensive
part, is as wide as the layer's input in the one and as its output in the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from dngd.graph import GraphStore
from dngd.models import GNN
from dngd.train.neighbour_sums import edges_of, in_degrees_of
from dngd.train.tables import Rows

BLOCK_ROWS = 8192
"""Most rows of a block on a CPU: what a block makes stays in the processor's caches."""
GPU_BLOCK_ROWS = 65536
_LEAST_BLOCK_ROWS = 1024
_BLOCKS = 64
"""About so many blocks, at least, for a graph to be shared out between ranks."""
_FLOPS_A_BYTE = 12
"""Multiplications and additions of a matrix product in the time of a byte gathered (measured: 135 GFLOP/s, 11 GB/s)."""
_ROW_EDGES = 32
"""Edges that cost as much as a row does without its edges: 2 · 512 · 256 flops against 1 KiB an edge."""
_MOST_PRUNED = 0.75
"""Share of a layer's cost above which it is computed for all nodes: choosing costs something too."""
FLOAT_BYTES = 4
SMALL_TABLE_BYTES = 512 * 1024 * 1024


@dataclass(frozen=True)
class LayerShape:
    """One layer's widths. parts: rows of width d_in that enter its weight: 2 where self and neighbours are apart."""

    d_in: int
    d_out: int
    parts: int


@dataclass(frozen=True)
class LayerWork:
    """One layer: the nodes that it is computed for, and whether it transforms first."""

    rows: Rows
    transforms_first: bool


@dataclass(frozen=True)
class EvaluationWork:
    """All layers, input side first. inputs: the nodes whose features are read."""

    layers: tuple[LayerWork, ...]
    inputs: Rows


@dataclass(frozen=True)
class EvaluationBytes:
    """What an evaluation holds, in bytes. tables: most at a time, one copy a machine. kept: the first layer's
    aggregated rows, of all ranks together. block: a rank's buffers."""

    tables: int
    kept: int
    block: int


def shapes_of(model: GNN) -> tuple[LayerShape, ...]:
    """Return the widths of a model's layers, input side first."""
    parts = 2 if model.aggregation == "mean" else 1
    return tuple(
        LayerShape(layer.linear.in_features // parts, layer.linear.out_features, parts)
        for layer in model.graph_layers()
    )


def block_rows(num_nodes: int, most: int, *, on_gpu: bool) -> int:
    """Return the rows of a block: a function of the graph and of `most` alone, so that blocks are the same
    whatever the number of ranks."""
    largest = GPU_BLOCK_ROWS if on_gpu else BLOCK_ROWS
    return min(most, max(_LEAST_BLOCK_ROWS, min(largest, -(-num_nodes // _BLOCKS))))


def plan_work(
    store: GraphStore, shapes: Sequence[LayerShape], nodes: Tensor | None, *, keeps_first: bool, is_sparse: bool = False
) -> EvaluationWork:
    """Return the work that gives the logits of some nodes.

    nodes: int64 [n], ascending and distinct, or None for all. keeps_first: whether the first layer's aggregated rows
    are kept for later evaluations. is_sparse: whether the features are SparseRows, which the first layer transforms
    first: that costs a product of their entries alone.
    """
    rows = Rows(None if nodes is None or nodes.numel() == store.num_nodes else nodes, store.num_nodes)
    if nodes is not None:
        rows = Rows(rows.ids, nodes.numel())
    layers: list[LayerWork] = []
    for i in reversed(range(len(shapes))):
        sources = _sources(store, rows)
        transforms = (is_sparse and i == 0) or _transforms_first(
            i, shapes[i], store.num_nodes, _edges(store, rows), rows, sources, keeps_first
        )
        layers.insert(0, LayerWork(rows, transforms))
        rows = sources
    return EvaluationWork(tuple(layers), rows)


def bounds_of(store: GraphStore, rows: Rows, block: int, world_size: int) -> list[int]:
    """Return where each rank's part of `rows` begins, and the end: [world_size + 1], whole blocks.

    The parts cost about the same: a block costs its edges and so much a row.
    """
    starts = torch.arange(0, rows.count, block)
    ends = (starts + block).clamp_max(rows.count)
    if rows.ids is None:
        edges = store.indptr[ends] - store.indptr[starts]
    else:
        counts = torch.cat([rows.ids.new_zeros(1), in_degrees_of(store, rows.ids).cumsum(0)])
        edges = counts[ends] - counts[starts]
    cost = (edges + _ROW_EDGES * (ends - starts)).cumsum(0)
    total = int(cost[-1]) if cost.numel() else 0
    wanted = torch.tensor([total * rank / world_size for rank in range(1, world_size)], dtype=torch.float64)
    # A rank ends with the block whose middle is nearest to its share.
    middles = cost.double() - cost.diff(prepend=cost.new_zeros(1)).double() / 2
    cuts = torch.searchsorted(middles, wanted) * block
    return [0, *(min(int(cut), rows.count) for cut in cuts), rows.count]


def blocks_between(bounds: Sequence[int], rank: int, block: int) -> list[tuple[int, int]]:
    """Return a rank's blocks as (first, last) numbers of rows."""
    first, last = bounds[rank], bounds[rank + 1]
    return [(a, min(a + block, last)) for a in range(first, last, block)]


def evaluation_bytes(
    store: GraphStore, shapes: Sequence[LayerShape], nodes: Tensor | None, rows: int, *, is_sparse: bool = False
) -> EvaluationBytes:
    """Return what an evaluation in float32 holds at most, without looking at the graph's edges.

    nodes: those whose logits are wanted, int64 [n], or None for all. rows: of a block. is_sparse: see plan_work.
    """
    n, everything = store.num_nodes, Rows(None, store.num_nodes)
    targets = everything if nodes is None else Rows(nodes, nodes.numel())
    num_target_edges = _edges(store, targets)
    widths = []
    for i, shape in enumerate(shapes):
        is_last = i + 1 == len(shapes)
        edges, wanted = (num_target_edges, targets) if is_last else (store.num_edges, everything)
        # More sources than these, or fewer rows behind pruned ones, could make it aggregate first.
        may_aggregate = not _transforms_first(i, shape, n, edges, wanted, everything, keeps_first=True)
        may_aggregate |= not is_last and not _is_most(store, targets.count, num_target_edges)
        may_transform = (is_sparse and i == 0) or _transforms_first(
            i, shape, n, store.num_edges, everything, everything, keeps_first=False
        )
        aggregated = shape.d_in if i > 0 and may_aggregate else 0  # the first layer's is the feature table
        widths.append(max(aggregated, shape.parts * shape.d_out if may_transform else 0))
    most = max(a + b for a, b in pairwise([*widths, 0]))
    dense = shapes[1:] if is_sparse else shapes  # of sparse features a block is its entries
    widest = max(shape.parts * shape.d_in + 2 * shape.d_out for shape in dense or shapes)
    return EvaluationBytes(
        tables=most * n * FLOAT_BYTES,
        kept=0 if is_sparse else n * shapes[0].d_in * FLOAT_BYTES,
        block=min(rows, n) * widest * FLOAT_BYTES,
    )


def _transforms_first(
    index: int, shape: LayerShape, num_nodes: int, num_edges: int, rows: Rows, sources: Rows, keeps_first: bool
) -> bool:
    is_small = num_nodes * shape.d_in * FLOAT_BYTES <= SMALL_TABLE_BYTES
    if index == 0 and (is_small or (keeps_first and shape.d_in <= 4 * shape.d_out)):
        return False  # aggregated once for all; and small graphs' later evaluations agree with it to the last bit
    gathered = FLOAT_BYTES * num_edges * (shape.d_in - shape.d_out)
    # Sources that are no destinations would be transformed in vain.
    more = 2 * shape.d_in * shape.d_out * (sources.count - rows.count)
    return gathered > more / _FLOPS_A_BYTE


def _sources(store: GraphStore, rows: Rows) -> Rows:
    """Return the nodes that the rows' edges come from, and the rows themselves; all, where that spares little."""
    everything = Rows(None, store.num_nodes)
    if rows.ids is None or _is_most(store, rows.count, _edges(store, rows)):
        return everything
    found = torch.zeros(store.num_nodes, dtype=torch.bool)
    found[rows.ids] = True
    for first in range(0, rows.count, _LEAST_BLOCK_ROWS):
        for _, sources, _ in edges_of(store, rows.piece(first, first + _LEAST_BLOCK_ROWS)):
            found[sources] = True
    ids = found.nonzero()[:, 0]
    chosen = Rows(ids, ids.numel())
    return everything if _is_most(store, chosen.count, _edges(store, chosen)) else chosen


def _is_most(store: GraphStore, num_rows: int, num_edges: int) -> bool:
    cost = num_edges + _ROW_EDGES * num_rows
    return cost > _MOST_PRUNED * (store.num_edges + _ROW_EDGES * store.num_nodes)


def _edges(store: GraphStore, rows: Rows) -> int:
    return store.num_edges if rows.ids is None else int(in_degrees_of(store, rows.ids).sum())
