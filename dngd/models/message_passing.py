"""Aggregation over layer graphs: `M = Â H` as gather-and-sum, without building the gathered matrix.

Aggregation has no parameters; every weight sits in the `nn.Linear` behind it, so `M`'s rows are
exactly the input rows whose Kronecker factor K-FAC needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

Aggregation = Literal["gcn", "mean"]

_EDGES_AT_ONCE = 1 << 14


class LayerGraphLike(Protocol):
    """What coefficients are computed from; see dngd.sampling.LayerGraph."""

    @property
    def indptr(self) -> Tensor:
        """int64 [num_dst + 1]."""

    @property
    def indices(self) -> Tensor:
        """int64 [num_edges], source of each edge."""

    @property
    def degrees(self) -> Tensor:
        """int64 [num_dst], in-degree of each destination in the whole graph."""

    @property
    def edge_weight(self) -> Tensor | None:
        """float32 [num_edges], stored weights of the edges."""


@dataclass(frozen=True)
class Propagation:
    """One layer's sparse operator, from source rows to destination rows.

    indptr: int64 [num_dst + 1]. indices: int64 [num_edges], rows of the source table.
    edge_coefficients: [num_edges], or None for the plain mean over the edges.
    self_coefficients: [num_dst], GCN's self loops; None where self is kept apart (SAGE).
    destinations: int64 [num_dst], rows of the source table that are the destinations themselves; None
    when they are its first num_dst rows.
    """

    indptr: Tensor
    indices: Tensor
    edge_coefficients: Tensor | None
    self_coefficients: Tensor | None
    destinations: Tensor | None

    @property
    def num_dst(self) -> int:
        """Number of destination rows."""
        return self.indptr.numel() - 1

    def to(self, device: torch.device) -> Propagation:
        """Return the operator on a device."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return Propagation(
            self.indptr.to(device, non_blocking=True),
            self.indices.to(device, non_blocking=True),
            move(self.edge_coefficients),
            move(self.self_coefficients),
            move(self.destinations),
        )

    def of_rows(self, rows: Tensor) -> Propagation:
        """Return the operator of some destinations alone, from the same source table. rows: int64 [k]."""
        begins = self.indptr[rows]
        lengths = self.indptr[rows + 1] - begins
        indptr = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        edges = (begins - indptr[:-1]).repeat_interleave(lengths)
        edges += torch.arange(edges.numel(), device=edges.device)
        coefficients, selves = self.edge_coefficients, self.self_coefficients
        return Propagation(
            indptr,
            self.indices[edges],
            None if coefficients is None else coefficients[edges],
            None if selves is None else selves[rows],
            rows if self.destinations is None else self.destinations[rows],
        )

    def self_rows(self, table: Tensor) -> Tensor:
        """Return the destinations' own rows, [num_dst, d]; float32 from a 16-bit feature table."""
        rows = table[: self.num_dst] if self.destinations is None else table.index_select(0, self.destinations)
        return _widened(rows, table)

    def neighbour_rows(self, table: Tensor) -> Tensor:
        """Return `Σ_e c_e table[indices_e]` per destination (the mean without coefficients), [num_dst, d].

        A destination without edges gets zeros. Of a 16-bit feature table the coefficients are rounded to its type,
        the sums are taken in float32 and rounded to its type, and come back as float32; on a CPU those that float16
        does not hold (beyond 65,504) are summed anew in float32.
        """
        if self.num_dst == 0 or self.indices.numel() == 0:
            return _widened(table.new_zeros(self.num_dst, table.shape[1]), table)
        weights = self.edge_coefficients
        rows = F.embedding_bag(
            self.indices,
            table,
            self.indptr,
            mode="mean" if weights is None else "sum",
            per_sample_weights=None if weights is None else weights.to(table.dtype),
            include_last_offset=True,
        )
        rows = _widened(rows, table)
        if table.dtype == torch.float16 and rows.dtype == torch.float32 and rows.device.type == "cpu":
            self._sum_anew(rows, table)
        return rows

    def _sum_anew(self, rows: Tensor, table: Tensor) -> None:
        """Replace in place the sums that are infinite since float16 has no such numbers."""
        for row in rows.isinf().any(dim=1).nonzero()[:, 0].tolist():
            begin, end = int(self.indptr[row]), int(self.indptr[row + 1])
            weights = self.edge_coefficients
            shares = rows.new_full((end - begin,), 1 / (end - begin)) if weights is None else weights[begin:end].float()
            rows[row] = 0.0
            for first in range(0, end - begin, _EDGES_AT_ONCE):
                some = slice(first, first + _EDGES_AT_ONCE)
                rows[row] += shares[some] @ table.index_select(0, self.indices[begin:end][some]).float()


def aggregate_rows(
    aggregation: Aggregation, table: Tensor, propagation: Propagation, out: Tensor | None = None
) -> Tensor:
    """Return M, the rows that enter a layer's `nn.Linear`, from its source rows [num_src, d].

    gcn: `m_v = Σ_u c_uv h_u + c_vv h_v`, [num_dst, d]. mean: `m_v = [h_v, mean_u h_u]`, [num_dst, 2 d].
    out: where to write it, of M's shape and type; only without gradients.
    """
    own, neighbours = propagation.self_rows(table), propagation.neighbour_rows(table)
    if aggregation == "mean":
        return torch.cat([own, neighbours], dim=1, out=out)
    assert propagation.self_coefficients is not None
    own = own * propagation.self_coefficients[:, None].to(own.dtype)
    return torch.add(own, neighbours, out=out)


def _widened(rows: Tensor, table: Tensor) -> Tensor:
    """Return rows as float32 where the table is one of 16-bit features; hidden rows under autocast stay as they are."""
    is_feature_table = table.dtype in (torch.float16, torch.bfloat16) and not table.requires_grad
    return rows.float() if is_feature_table else rows


def inverse_sqrt_degrees(in_degrees: Tensor, weighted_in_degrees: Tensor | None = None) -> Tensor:
    """Return `d_v^(-1/2)` with d_v = 1 + Σ_u w_uv (1 + in-degree without weights), float32 [N].

    The 1 is the self loop (Kipf & Welling 2017). Negative totals are refused by the caller.
    """
    degrees = in_degrees if weighted_in_degrees is None else weighted_in_degrees
    return (degrees.to(torch.float32) + 1.0).rsqrt()


def gcn_coefficients(graph: LayerGraphLike, source_norm: Tensor, destination_norm: Tensor) -> tuple[Tensor, Tensor]:
    """Return GCN's coefficients of a sampled layer graph: (edges [num_edges], selves [num_dst]).

    `c_uv = (deg_v / k_v) · w_uv · d_u^(-1/2) · d_v^(-1/2)` and `c_vv = 1 / d_v`, with d from the whole
    graph, k_v the number of sampled neighbours. Neighbours are drawn uniformly, so the sum is an
    unbiased estimate of `D^(-1/2)(A + I)D^(-1/2)H`, and equal to it when all are drawn. Where edges are left out after
    the draw, deg_v and k_v count those that stay: unbiased given that one of them was drawn, else they count as none.
    source_norm: d^(-1/2) of each edge's source, [num_edges]. destination_norm: [num_dst].
    """
    sampled = graph.indptr.diff()
    scale = destination_norm * graph.degrees.to(destination_norm.dtype) / sampled.clamp_min(1)
    coefficients = source_norm * torch.repeat_interleave(scale, sampled, output_size=source_norm.numel())
    if graph.edge_weight is not None:
        coefficients = coefficients * graph.edge_weight
    return coefficients, destination_norm.square()


def mean_coefficients(graph: LayerGraphLike) -> Tensor | None:
    """Return the coefficients of the weighted mean, `w_uv / Σ_u w_uv`; None for the plain mean."""
    if graph.edge_weight is None:
        return None
    sampled = graph.indptr.diff()
    owner = torch.repeat_interleave(torch.arange(sampled.numel()), sampled)
    totals = torch.zeros(sampled.numel()).index_add_(0, owner, graph.edge_weight)
    return graph.edge_weight / torch.where(totals == 0, 1.0, totals)[owner]
