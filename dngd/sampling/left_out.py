"""What a node loses where a batch leaves out some of the graph's edges: degrees must not tell of them either."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LeftOut:
    """Nodes with in-edges that a batch leaves out.

    nodes: int64 [k], ascending. counts: int64 [k], edges left out. weights: float64 [k], sums of their weights;
    the counts on a graph without weights.
    """

    nodes: Tensor
    counts: Tensor
    weights: Tensor

    def counts_of(self, nodes: Tensor) -> Tensor:
        """Return how many in-edges each node loses, int64, in the shape of nodes."""
        return self._of(nodes, self.counts)

    def weights_of(self, nodes: Tensor) -> Tensor:
        """Return what each node's weighted in-degree loses, float64."""
        return self._of(nodes, self.weights)

    def _of(self, nodes: Tensor, values: Tensor) -> Tensor:
        places = torch.searchsorted(self.nodes, nodes).clamp(max=self.nodes.numel() - 1)
        return torch.where(self.nodes[places] == nodes, values[places], values.new_zeros(()))


def left_out_by(indptr: Tensor, edge_weight: Tensor | None, excluded: Tensor | None) -> LeftOut | None:
    """Return what leaving out entries takes from nodes; None if nothing. excluded: int64, of the graph's indices."""
    if excluded is None or excluded.numel() == 0:
        return None
    destinations = torch.searchsorted(indptr, excluded, right=True) - 1
    nodes, place, counts = torch.unique(destinations, return_inverse=True, return_counts=True)
    if edge_weight is None:
        return LeftOut(nodes, counts, counts.double())
    weights = torch.zeros(nodes.numel(), dtype=torch.float64).index_add_(0, place, edge_weight[excluded].double())
    return LeftOut(nodes, counts, weights)
