"""The first layer's rows M in two parts: that of nodes whose feature rows a device keeps, and that of all others.

M is a sum over a destination's own row and its edges' source rows, each times a coefficient. Where a device cannot
hold the feature table but keeps its hottest rows, the host sums the rows that are not kept there, which spares it to
read the others, and the device sums those: both parts add up to M, to float tolerance.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dngd.models.message_passing import Aggregation, Propagation, aggregate_rows


@dataclass(frozen=True)
class CachedRows:
    """Feature rows that a device keeps.

    table: [num_rows + 1, F], on the device, zeros in the last row. positions: int32 [N], on the device: each node's row
    of the table, the last one where it is not kept. on_host: bool [N], on the CPU: whether a node is not kept.
    """

    table: Tensor
    positions: Tensor
    on_host: Tensor

    @property
    def num_rows(self) -> int:
        """Number of nodes whose rows are kept."""
        return self.table.shape[0] - 1

    def part(self, aggregation: Aggregation, operator: Propagation) -> Tensor:
        """Return the kept nodes' part of M. operator: the input layer's, on the device; its nodes are global ids."""
        assert operator.destinations is not None, "an operator from the table of all nodes"
        here = replace(operator, indices=self._rows(operator.indices), destinations=self._rows(operator.destinations))
        return aggregate_rows(aggregation, self.table, here)

    def _rows(self, nodes: Tensor) -> Tensor:
        return self.positions.index_select(0, nodes).long()


def host_part(
    aggregation: Aggregation, table: Tensor, operator: Propagation, on_host: Tensor, out: Tensor | None = None
) -> Tensor:
    """Return the part of M of nodes that no device keeps; no other row of the table is read.

    table: [N, F]. operator: the input layer's, from the table of all nodes. on_host: as CachedRows'.
    out: where to write it, of M's shape and type.
    """
    assert operator.destinations is not None, "an operator from the table of all nodes"
    num_dst, width = operator.num_dst, table.shape[1]
    nodes = torch.arange(num_dst + 1)
    own = _restricted(Propagation(nodes, operator.destinations, None, None, None), on_host).neighbour_rows(table)
    restricted = _restricted(operator, on_host)
    neighbours = restricted.neighbour_rows(table)
    if restricted.edge_coefficients is None:
        # neighbour_rows took the mean over the edges that are left.
        shares = restricted.indptr.diff() / operator.indptr.diff().clamp_min(1)
        neighbours *= shares.to(neighbours.dtype)[:, None]
    if aggregation == "gcn":
        assert operator.self_coefficients is not None
        return torch.add(own * operator.self_coefficients[:, None].to(own.dtype), neighbours, out=out)
    if out is None:
        out = own.new_empty(num_dst, 2 * width)
    return torch.cat([own, neighbours], dim=1, out=out)


def _restricted(operator: Propagation, on_host: Tensor) -> Propagation:
    """Return the operator without the edges from nodes that a device keeps.

    index_select and numpy's flatnonzero and cumsum: the same by masks takes ten times as long (58 k destinations,
    880 k edges, one thread: 5 ms).
    """
    stays = on_host.index_select(0, operator.indices).numpy()
    before = torch.zeros(stays.shape[0] + 1, dtype=torch.int64)
    np.cumsum(stays, out=before.numpy()[1:])
    edges = torch.from_numpy(np.flatnonzero(stays))
    coefficients = operator.edge_coefficients
    return Propagation(
        before.index_select(0, operator.indptr),
        operator.indices.index_select(0, edges),
        None if coefficients is None else coefficients.index_select(0, edges),
        None,
        None,
    )
