"""A feature table of which few entries are not zero, such as the words of a text, as its entries alone.

The first layer's rows, sums of a few rows of such a table, have few entries as well: as dngd.models.SparseRows they
take a fraction of the time and memory of dense rows, from the sampler's sums to the products with the weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from dngd.models import SparseRows
from dngd.sampling.minibatch import LayerGraph
from dngd.sampling.operators import LayerOperators
from dngd.sampling.topology import HasTopology

LEAST_WIDTH = 256
"""Columns below which a dense product takes no time worth sparing."""
MOST_OF_ROWS = 0.2
"""Share of the first layer's rows that is not zero, at most: above it dense products are as fast on one core (PubMed's
are .35)."""
LOOKED_AT = 1024
"""Edges by whose sources a table is judged."""
MOST_INT32 = 2**31 - 1
_BLOCK = 1 << 19
"""Entries looked through at a time: a block and its mask stay in the processor's cache."""


class SparseShares(NamedTuple):
    """Which share of a feature table, and of the first layer's rows, is likely not to be zero."""

    table: float
    rows: float


def shares_of(features: Tensor, graph: HasTopology, fanout: int) -> SparseShares | None:
    """Return the shares where that of the first layer's rows is small enough for SparseRows to pay; else None.

    features: [N, F], on the CPU. fanout: of the input layer, -1 for all neighbours. Alike on all ranks: told by
    LOOKED_AT edges, evenly spaced, whose sources are what first rows are made of and for.
    """
    num_nodes, width = features.shape
    num_edges = graph.indices.numel()
    if width < LEAST_WIDTH or num_nodes == 0:
        return None
    count = min(LOOKED_AT, num_edges)
    nodes = graph.indices[torch.arange(count) * num_edges // max(1, count)].long()
    if count == 0:
        nodes = torch.arange(min(LOOKED_AT, num_nodes)) * num_nodes // min(LOOKED_AT, num_nodes)
    table = float((features[nodes] != 0).float().mean())
    degrees = graph.indptr[nodes + 1] - graph.indptr[nodes]
    summed = 1.0 + float((degrees if fanout == -1 else degrees.clamp_max(fanout)).float().mean())
    return SparseShares(table, table * summed) if table * summed <= MOST_OF_ROWS else None


def sparse_table(features: Tensor) -> SparseRows:
    """Return a table [N, F] on the CPU as its entries that are not zero, float32; read once, block by block."""
    num_nodes, width = features.shape
    step = max(1, _BLOCK // max(1, width))
    counts, columns, values = [np.zeros(1, dtype=np.int64)], [np.zeros(0, np.int32)], [np.zeros(0, np.float32)]
    for first in range(0, num_nodes, step):
        block = features[first : first + step]
        table = (block.float() if block.element_size() < 4 else block).numpy()
        # Of a mask numpy finds the entries ten times as fast as of the numbers themselves.
        places = np.flatnonzero(table != 0)
        rows, here = np.divmod(places, max(1, width))
        counts.append(np.bincount(rows, minlength=len(table)))
        columns.append(here.astype(np.int32))
        values.append(table.reshape(-1)[places].astype(np.float32))
    indptr = np.concatenate(counts).cumsum()
    index_type = np.int32 if indptr[-1] <= MOST_INT32 else np.int64
    joined = np.concatenate(columns).astype(index_type, copy=False)
    return SparseRows.of_arrays(indptr.astype(index_type), joined, np.concatenate(values), width)


def arrays_of(table: SparseRows) -> dict[str, Tensor]:
    """Return a table's arrays by name, for another process; see from_arrays."""
    return {f"sparse_{name}": getattr(table, name) for name in ("indptr", "columns", "values")}


def from_arrays(arrays: Mapping[str, Tensor], width: int) -> SparseRows:
    """Inverse of arrays_of."""
    return SparseRows(arrays["sparse_indptr"], arrays["sparse_columns"], arrays["sparse_values"], width)


class SparseFirstRows:
    """Takes the input layer's rows M from a table's entries, as SparseRows; what FirstRows does for a dense table.

    table: X, [N, F]. gcn: `M = C X`, where C has a row of coefficients a destination: its own, and those of its edges.
    mean: `M = [X_v, C X]`, C with those of the edges.
    """

    def __init__(self, operators: LayerOperators, table: SparseRows) -> None:
        self._operators = operators
        self._table = table
        self._matrix = table.scipy()

    def of(self, layer: LayerGraph) -> SparseRows:
        """Return M of an input layer graph, [num_dst, F], twice the width for the mean."""
        propagation = self._operators.first(layer)
        starts, sources = propagation.indptr.numpy(), propagation.indices.numpy()
        edges, selves = propagation.edge_coefficients, propagation.self_coefficients
        if edges is None:  # the plain mean
            counts = np.diff(starts)
            shares = np.repeat((1.0 / np.maximum(counts, 1)).astype(np.float32), counts)
        else:
            shares = edges.numpy()
        if selves is not None:
            shares = np.insert(shares, starts[:-1], selves.numpy())
            sources = np.insert(sources, starts[:-1], layer.dst_nodes.numpy())
            starts = starts + np.arange(layer.num_dst + 1)
        matrix = scipy.sparse.csr_matrix((shares, sources, starts), shape=(layer.num_dst, self._matrix.shape[0]))
        summed = SparseRows.of(matrix @ self._matrix)
        return summed if selves is not None else beside(self._table[layer.dst_nodes], summed)


def beside(left: SparseRows, right: SparseRows) -> SparseRows:
    """Return the matrix [left, right], of matrices with as many rows."""
    starts = [part.indptr.numpy().astype(np.int64) for part in (left, right)]
    indptr = starts[0] + starts[1]
    columns = np.empty(int(indptr[-1]), dtype=np.int64 if indptr[-1] > MOST_INT32 else np.int32)
    values = np.empty(int(indptr[-1]), dtype=np.float32)
    firsts = indptr[:-1], indptr[:-1] + np.diff(starts[0])  # where each part's entries of each row begin
    for part, own, first, shift in zip((left, right), starts, firsts, (0, left.width)):
        places = np.arange(int(own[-1])) + np.repeat(first - own[:-1], np.diff(own))
        columns[places] = part.columns.numpy() + shift
        values[places] = part.values.numpy()
    return SparseRows.of_arrays(indptr.astype(columns.dtype), columns, values, left.width + right.width)
