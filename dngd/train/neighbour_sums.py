"""Sums over all in-neighbours of some nodes, straight from the store's columns, without building what is gathered."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from dngd.graph import GraphStore
from dngd.models import Aggregation

MOST_EDGES = 4 * 1024 * 1024
"""Most edges taken at a time where the edges of chosen nodes are copied together; a node with more is taken alone."""
WIDENED_EDGES = 8192
"""Edges whose 16-bit source rows are widened at a time: both copies stay in the processor's cache."""

DENSE = 0.75
"""Share of the nodes from a block's first to its last from which all are summed for: cheaper than copying edges."""

Edges = tuple[Tensor, Tensor, Tensor | None]
"""Offsets int64 [n + 1] from 0; sources int64 [num_edges]; weights float32 [num_edges] or None."""


def in_degrees_of(store: GraphStore, where: slice | Tensor) -> Tensor:
    """Return the in-degrees of nodes, int64 [n]."""
    if isinstance(where, slice):
        return store.indptr[where.start : where.stop + 1].diff()
    return store.indptr[where + 1] - store.indptr[where]


def edges_of(store: GraphStore, where: slice | Tensor) -> Iterator[Edges]:
    """Yield the in-edges of nodes in the nodes' order, a run of nodes at a time.

    A slice's are views of the store, in one run; those of int64 ids are copied, at most MOST_EDGES a run.
    """
    if isinstance(where, slice):
        offsets = store.indptr[where.start : where.stop + 1]
        begin, end = int(offsets[0]), int(offsets[-1])
        weights = None if store.edge_weight is None else store.edge_weight[begin:end]
        yield offsets - begin, store.indices[begin:end], weights
        return
    degrees = in_degrees_of(store, where)
    ends = degrees.cumsum(0)
    first = 0
    while first < where.numel():
        before = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(torch.searchsorted(ends, before + MOST_EDGES, right=True)))
        if last == first + 1:
            node = int(where[first])
            yield from edges_of(store, slice(node, node + 1))
        else:
            offsets = torch.cat([ends.new_zeros(1), ends[first:last] - before])
            shifts = store.indptr[where[first:last]] - offsets[:-1]
            edge_ids = torch.arange(int(offsets[-1]))
            edge_ids += torch.repeat_interleave(shifts, degrees[first:last], output_size=edge_ids.numel())
            weights = None if store.edge_weight is None else store.edge_weight[edge_ids]
            yield offsets, store.indices[edge_ids], weights
        first = last


class NeighbourSums:
    """What a layer's aggregation is made of: sums over in-neighbours, and the scales before and behind them.

    mean: `(Σ_u w_uv h_u) / Σ_u w_uv`, 0 without neighbours. gcn: `n_v (Σ_u w_uv n_u h_u + n_v h_v)` with
    n = d^(-1/2); norm: that n, float32 [N], for gcn alone. w is 1 in a graph without weights.
    """

    def __init__(self, store: GraphStore, aggregation: Aggregation, norm: Tensor | None) -> None:
        assert (norm is not None) == (aggregation == "gcn")
        self._store = store
        self._norm = norm
        self._totals: Tensor | None = None

    def sums(self, table: Tensor, where: slice | Tensor, dtype: torch.dtype, *, scale_sources: bool = False) -> Tensor:
        """Return `Σ_u w_uv table_u` for nodes v, [n, width] on the table's device, in dtype.

        scale_sources: `Σ_u w_uv n_u table_u` for gcn; where a table holds n_u h_u already, leave it out. A table of
        another type than dtype is widened before anything is added.
        """
        if isinstance(where, Tensor) and where.numel():
            span = slice(int(where[0]), int(where[-1]) + 1)
            if where.numel() >= DENSE * (span.stop - span.start):
                sums = self.sums(table, span, dtype, scale_sources=scale_sources)
                return sums.index_select(0, (where - span.start).to(sums.device))
        parts = []
        for offsets, sources, weights in edges_of(self._store, where):
            if scale_sources and self._norm is not None:
                norm = self._norm[sources]
                weights = norm if weights is None else weights * norm
            if table.dtype != dtype:
                parts.append(_widened_sums(table, offsets, sources, weights, dtype))
            else:
                parts.append(_sums(table, offsets, sources, weights))
        if not parts:
            return table.new_empty(0, table.shape[1], dtype=dtype)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def norm(self, where: slice | Tensor, like: Tensor) -> Tensor:
        """Return n_v for gcn, [n, 1], of the type and on the device of `like`."""
        assert self._norm is not None
        return self._norm[where].to(like)[:, None]

    def to_mean_(self, sums: Tensor, where: slice | Tensor) -> Tensor:
        """Divide sums [n, width] by the nodes' in-degrees, or summed weights, in place."""
        if self._store.edge_weight is None:
            divisors = in_degrees_of(self._store, where).clamp_min(1)
        else:
            totals = self._weight_totals()[where]
            divisors = torch.where(totals == 0, 1.0, totals)
        return sums.div_(divisors.to(sums)[:, None])

    def _weight_totals(self) -> Tensor:
        if self._totals is None:
            store = self._store
            assert store.edge_weight is not None
            self._totals = torch.empty(store.num_nodes, dtype=torch.float64)
            for first in range(0, store.num_nodes, WIDENED_EDGES):
                where = slice(first, min(first + WIDENED_EDGES, store.num_nodes))
                for offsets, _, weights in edges_of(store, where):
                    assert weights is not None
                    self._totals[where] = torch.segment_reduce(weights.double(), "sum", offsets=offsets, axis=0)
        return self._totals


def _sums(table: Tensor, offsets: Tensor, sources: Tensor, weights: Tensor | None) -> Tensor:
    if sources.numel() == 0:
        return table.new_zeros(offsets.numel() - 1, table.shape[1])
    return F.embedding_bag(
        sources.to(table.device),
        table,
        offsets.to(table.device),
        mode="sum",  # the mean's own kernel makes an index an edge first, and is half as fast
        per_sample_weights=None if weights is None else weights.to(table),
        include_last_offset=True,
    )


def _widened_sums(
    table: Tensor, offsets: Tensor, sources: Tensor, weights: Tensor | None, dtype: torch.dtype
) -> Tensor:
    out = torch.zeros(offsets.numel() - 1, table.shape[1], dtype=dtype, device=table.device)
    for begin in range(0, sources.numel(), WIDENED_EDGES):
        end = min(begin + WIDENED_EDGES, sources.numel())
        gathered = table.index_select(0, sources[begin:end].to(table.device)).to(dtype)
        # The nodes that these edges go to; the outermost may have others.
        first = int(torch.searchsorted(offsets, begin, right=True)) - 1
        last = int(torch.searchsorted(offsets, end))
        within = (offsets[first : last + 1] - begin).clamp(0, end - begin)
        rows = torch.arange(end - begin)
        out[first:last] += _sums(gathered, within, rows, None if weights is None else weights[begin:end])
    return out
