"""Which feature rows a device keeps where it cannot hold the table: those of the most frequent sources.

Neighbours are drawn uniformly, so that how often a node is a source in the graph tells, about, how often it is one in
the batches. Few nodes make up much: of the products-shaped graph a tenth of the nodes are the sources of 46 % of the
edges, and of as many of the edges that are drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dngd.graph import GraphStore
from dngd.sampling.cached_rows import CachedRows

EDGES_AT_A_TIME = 2**24
COPIED_BYTES = 64 * 1024 * 1024
"""Of the table, taken to the device at a time."""
POSITION_BYTES = 4
"""A node's entry in CachedRows.positions."""
SPLIT_BYTES = 140
"""Bytes that a host gathers in the time in which it tells one edge of a kept row from others (measured on the
products-shaped graph, one thread, 100 features of 4 bytes: a cache pays from a share of .35 on)."""


@dataclass(frozen=True)
class HottestNodes:
    """nodes: int64 [n], ascending. edge_share: how many of the graph's edges come from them, 0 to 1."""

    nodes: Tensor
    edge_share: float


def source_counts(indices: Tensor, num_nodes: int) -> Tensor:
    """Return how many edges come from each node, int64 [num_nodes]. indices: int64 [num_edges], read in blocks."""
    counts = torch.zeros(num_nodes, dtype=torch.int64)
    for first in range(0, indices.numel(), EDGES_AT_A_TIME):
        counts += torch.bincount(indices[first : first + EDGES_AT_A_TIME], minlength=num_nodes)
    return counts


def hottest_nodes(store: GraphStore, num_nodes: int) -> HottestNodes:
    """Return the num_nodes most frequent sources; among equals those of lower ids."""
    counts = source_counts(store.indices, store.num_nodes)
    nodes = torch.sort(counts, descending=True, stable=True).indices[:num_nodes]
    return HottestNodes(nodes.sort().values, float(counts[nodes].sum()) / max(1, store.num_edges))


def rows_within(num_bytes: int, features: Tensor) -> int:
    """Return how many rows of the table a cache of so many bytes holds, at most all."""
    left = num_bytes - features.shape[0] * POSITION_BYTES
    # One more: the row of zeros.
    return max(0, min(features.shape[0], left // _row_bytes(features) - 1))


def least_edge_share(features: Tensor, *, on_disk: bool) -> float:
    """Return the share of edges from which on a cache pays.

    Below it the host loses more by telling apart which rows a device keeps than it gains by not reading those. A row on
    a disk costs so much more that any share pays.
    """
    return 0.0 if on_disk else min(1.0, SPLIT_BYTES / _row_bytes(features))


def keep_rows(features: Tensor, nodes: Tensor, device: torch.device) -> CachedRows:
    """Take nodes' rows to a device. features: [N, F], on the CPU. nodes: int64 [n], ascending and distinct."""
    num_nodes, num_rows = features.shape[0], nodes.numel()
    table = torch.zeros(num_rows + 1, features.shape[1], dtype=features.dtype, device=device)
    step = max(1, COPIED_BYTES // _row_bytes(features))
    for first in range(0, num_rows, step):
        last = min(first + step, num_rows)
        table[first:last].copy_(features.index_select(0, nodes[first:last]))
    positions = torch.full((num_nodes,), num_rows, dtype=torch.int32)
    positions[nodes] = torch.arange(num_rows, dtype=torch.int32)
    on_host = torch.ones(num_nodes, dtype=torch.bool)
    on_host[nodes] = False
    return CachedRows(table, positions.to(device), on_host)


def _row_bytes(features: Tensor) -> int:
    return max(1, features.shape[1] * features.element_size())
