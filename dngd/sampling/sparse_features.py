"""A feature table of which few entries are not zero, such as the words of a text, as its entries alone.

The first layer's rows, sums of a few rows of such a table, have few entries as well: as dngd.models.SparseRows they
take a fraction of the time and memory of dense rows, from the sampler's sums to the products with the weight.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from dngd.models import SparseRows
from dngd.sampling.minibatch import LayerGraph
from dngd.sampling.operators import LayerOperators

LEAST_WIDTH = 256
"""Columns below which a dense product takes no time worth sparing."""
MOST_OF_ROWS = 0.2
"""Share of the first layer's rows that is not zero, at most: above it dense products are as fast on one core (PubMed's
are .35)."""
LOOKED_AT = 1024
"""Rows by which a table is judged, evenly spaced."""
_BLOCK = 1 << 19
"""Entries looked through at a time: a block and its mask stay in the processor's cache."""


def share_of_first_rows(features: Tensor, fanout: int, mean_degree: float) -> float | None:
    """Return which share of the first layer's rows is likely not to be zero, where it is small enough for SparseRows
    to pay; else None.

    features: [N, F], on the CPU. fanout: of the input layer, -1 for all neighbours. mean_degree: edges a node. Alike
    on all ranks: told by LOOKED_AT rows of the table, and by how many rows are summed.
    """
    num_nodes, width = features.shape
    if width < LEAST_WIDTH or num_nodes == 0:
        return None
    rows = torch.arange(min(LOOKED_AT, num_nodes)) * num_nodes // min(LOOKED_AT, num_nodes)
    share = float((features[rows] != 0).float().mean())
    share *= 1 + (mean_degree if fanout == -1 else min(fanout, mean_degree))
    return share if share <= MOST_OF_ROWS else None


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
    index_type = np.int32 if indptr[-1] <= np.iinfo(np.int32).max else np.int64
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

    table: [N, F]. With T = table for gcn, and for the mean T = [table, 0; 0, table], which keeps a node's own row
    apart, `M = C T`, where C has a row of coefficients a destination: its own, and those of its edges.
    """

    def __init__(self, operators: LayerOperators, table: SparseRows) -> None:
        self._operators = operators
        own = table.scipy()
        self._num_nodes = own.shape[0]
        self._is_mean = operators.aggregation == "mean"
        self._table = scipy.sparse.block_diag([own, own], format="csr") if self._is_mean else own

    def of(self, layer: LayerGraph) -> SparseRows:
        """Return M of an input layer graph, [num_dst, F], twice the width for the mean."""
        propagation = self._operators.first(layer)
        starts, sources = propagation.indptr.numpy(), propagation.indices.numpy()
        own, destinations = propagation.self_coefficients, layer.dst_nodes.numpy()
        edges = propagation.edge_coefficients
        if edges is None:  # the plain mean
            counts = np.diff(starts)
            shares = np.repeat((1.0 / np.maximum(counts, 1)).astype(np.float32), counts)
        else:
            shares = edges.numpy()
        selves = np.ones(layer.num_dst, dtype=np.float32) if own is None else own.numpy()
        if self._is_mean:
            sources = sources + self._num_nodes
        matrix = scipy.sparse.csr_matrix(
            (
                np.insert(shares, starts[:-1], selves),
                np.insert(sources, starts[:-1], destinations),
                starts + np.arange(layer.num_dst + 1),
            ),
            shape=(layer.num_dst, self._table.shape[0]),
        )
        return SparseRows.of(matrix @ self._table)
