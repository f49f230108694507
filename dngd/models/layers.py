"""Graph layers: aggregate, then transform with one `nn.Linear`."""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor, nn

from dngd.models.message_passing import Aggregation, Propagation, aggregate_rows
from dngd.models.sparse_rows import RowsLinear


class GraphLayer(nn.Module):
    """`Z = M Wᵀ + b` with M the aggregated rows; subclasses say how M is made."""

    aggregation: ClassVar[Aggregation]

    def __init__(self, in_rows: int, out_features: int) -> None:
        super().__init__()
        self.linear = RowsLinear(in_rows, out_features)
        # Glorot, as in Kipf & Welling 2017; the bias starts at zero.
        bound = math.sqrt(6.0 / (in_rows + out_features))
        nn.init.uniform_(self.linear.weight, -bound, bound)
        nn.init.zeros_(self.linear.bias)

    def aggregate(self, table: Tensor, propagation: Propagation) -> Tensor:
        """Return M, [num_dst, in_rows], from source rows [num_src, in_features]."""
        return aggregate_rows(self.aggregation, table, propagation)

    def forward(self, table: Tensor, propagation: Propagation) -> Tensor:
        """Return Z, [num_dst, out_features]."""
        out: Tensor = self.linear(self.aggregate(table, propagation))
        return out


class GCNLayer(GraphLayer):
    """Graph convolution of Kipf & Welling 2017: `m_v = Σ_u c_uv h_u + c_vv h_v`, symmetric normalisation."""

    aggregation: ClassVar[Aggregation] = "gcn"

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)


class SAGELayer(GraphLayer):
    """GraphSAGE-mean of Hamilton et al. 2017: `m_v = [h_v, mean_u h_u]`, one weight [d_out, 2 d_in].

    The Kronecker factor A is that of the concatenated row, [2 d_in + 1, 2 d_in + 1]; `input_parts` tells the
    curvature that the row has two parts, so that it may keep a block each (FactorLayout.split_inputs).
    """

    aggregation: ClassVar[Aggregation] = "mean"

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(2 * in_features, out_features)
        object.__setattr__(self.linear, "input_parts", (in_features, in_features))
