"""One graph layer's arithmetic on blocks of rows, in either order; see dngd.train.evaluation_plan.

With n = d^(-1/2) for GCN (Kipf & Welling 2017), and the weight [W_self, W_neighbours] for GraphSAGE-mean:

    gcn   aggregate first   Z_v = (n_v (Σ_u w_uv n_u h_u + n_v h_v)) Wᵀ + b      gathered: n_u h_u
          transform first   Z_v =  n_v (Σ_u w_uv y_u + y_v) + b                  gathered: y_u = n_u h_u Wᵀ
    mean  aggregate first   Z_v = h_v W_selfᵀ + mean_u(h_u) W_neighboursᵀ + b    gathered: h_u
          transform first   Z_v = s_v + mean_u(y_u)                              gathered: y_u = h_u W_neighboursᵀ
                                                                                 own: s_v = h_v W_selfᵀ + b
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dngd.models import GraphLayer, SparseRows
from dngd.train.evaluation_plan import LayerShape
from dngd.train.neighbour_sums import NeighbourSums
from dngd.train.tables import pick


@dataclass(frozen=True)
class LayerSource:
    """What a layer reads. gathered: [N, d], what it sums over neighbours. own: [N, d_out], s of the table above.

    is_features: `gathered` is the feature table itself, of any type, not yet scaled by n.
    """

    gathered: Tensor
    own: Tensor | None = None
    is_features: bool = False


class LayerArithmetic:
    """A layer's output, on `device`, from what lies in tables anywhere."""

    def __init__(
        self,
        layer: GraphLayer,
        shape: LayerShape,
        neighbours: NeighbourSums,
        device: torch.device,
        *,
        transforms_first: bool,
    ) -> None:
        self.shape = shape
        self.transforms_first = transforms_first
        self._neighbours = neighbours
        self._device = device
        self._is_mean = layer.aggregation == "mean"
        weight = layer.linear.weight.detach()
        self.dtype = weight.dtype
        self._bias = layer.linear.bias.detach()
        self._own_weight = weight[:, : shape.d_in].t()
        self._weight = weight[:, -shape.d_in :].t()

    @property
    def widths(self) -> list[int]:
        """Widths of the tables that the layer reads: what is gathered, and the own parts where they are kept apart."""
        if not self.transforms_first:
            return [self.shape.d_in]
        return [self.shape.d_out] * (2 if self._is_mean else 1)

    def prepare(self, hidden: Tensor | SparseRows, where: slice | Tensor) -> tuple[Tensor, Tensor | None]:
        """Return what goes into this layer's tables for nodes with inputs hidden [n, d_in]: (gathered, own).

        SparseRows are multiplied before they are scaled; they are of a layer that transforms first.
        """
        if isinstance(hidden, SparseRows):
            gathered = hidden.times(self._weight)
            if self._is_mean:
                return gathered, hidden.times(self._own_weight).add_(self._bias)
            return gathered.mul_(self._neighbours.norm(where, gathered)), None
        if not self._is_mean:
            hidden = hidden * self._neighbours.norm(where, hidden)
        if not self.transforms_first:
            return hidden, None
        own = torch.addmm(self._bias, hidden, self._own_weight) if self._is_mean else None
        return hidden @ self._weight, own

    def aggregate(self, source: LayerSource, where: slice | Tensor) -> Tensor:
        """Return the rows that meet the weight, where the layer aggregates first: [n, d_in], without the mean's own."""
        assert not self.transforms_first
        return self._aggregate(source, where)

    def transform(self, aggregated: Tensor, source: LayerSource, where: slice | Tensor) -> Tensor:
        """Return Z, [n, d_out], from aggregated rows."""
        z = torch.addmm(self._bias, aggregated.to(self._device), self._weight)
        if self._is_mean:
            z.addmm_(self.rows(source, where), self._own_weight)
        return z

    def output(self, source: LayerSource, where: slice | Tensor) -> Tensor:
        """Return Z, [n, d_out]."""
        if not self.transforms_first:
            return self.transform(self.aggregate(source, where), source, where)
        aggregated = self._aggregate(source, where)
        if not self._is_mean:
            return aggregated + self._bias
        assert source.own is not None
        return aggregated.add_(pick(source.own, where).to(self._device))

    def rows(self, source: LayerSource, where: slice | Tensor) -> Tensor:
        """Return nodes' own rows of what is gathered, on the device."""
        return pick(source.gathered, where).to(self._device, self.dtype)

    def _aggregate(self, source: LayerSource, where: slice | Tensor) -> Tensor:
        """Return mean_u or n_v (Σ_u + own) of what is gathered, on the device."""
        sums = self._neighbours.sums(source.gathered, where, self.dtype, scale_sources=source.is_features)
        sums = sums.to(self._device)
        if self._is_mean:
            return self._neighbours.to_mean_(sums, where)
        own, norm = self.rows(source, where), self._neighbours.norm(where, sums)
        return sums.add_(own * norm if source.is_features else own).mul_(norm)
