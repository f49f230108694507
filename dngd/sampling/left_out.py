"""What a node loses where a batch leaves out some of the graph's edges: degrees must not tell of them either."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LeftOut:
    """Nodes with in-edges that a batch leaves out.

    nodes: int64 [k], ascending. counts: int64 [k], edges left out. kept: float64 [k], sums of the weights of those that
    stay, their number on a graph without weights.
    """

    nodes: Tensor
    counts: Tensor
    kept: Tensor

    def counts_of(self, nodes: Tensor) -> Tensor:
        """Return how many in-edges each node loses, int64, in the shape of nodes."""
        places, is_here = self._find(nodes)
        return torch.where(is_here, self.counts[places], self.counts.new_zeros(()))

    def kept_of(self, nodes: Tensor, whole: Tensor) -> Tensor:
        """Return each node's weighted in-degree without what it loses, float64: `whole` where it loses nothing."""
        places, is_here = self._find(nodes)
        return torch.where(is_here, self.kept[places], whole.double())

    def _find(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        places = torch.searchsorted(self.nodes, nodes).clamp(max=self.nodes.numel() - 1)
        return places, self.nodes[places] == nodes


def left_out_by(indptr: Tensor, edge_weight: Tensor | None, excluded: Tensor | None) -> LeftOut | None:
    """Return what leaving out entries takes from nodes; None if nothing. excluded: int64, of the graph's indices."""
    if excluded is None or excluded.numel() == 0:
        return None
    destinations = torch.searchsorted(indptr, excluded, right=True) - 1
    nodes, counts = torch.unique(destinations, return_counts=True)
    begins = indptr[nodes]
    degrees = indptr[nodes + 1] - begins
    if edge_weight is None:
        return LeftOut(nodes, counts, (degrees - counts).double())
    # Summed anew: a total less what is lost has the total's rounding, which may be more than all that stays.
    owners = torch.repeat_interleave(degrees)
    entries = torch.arange(owners.numel()) + (begins - degrees.cumsum(0) + degrees)[owners]
    weights = edge_weight[entries].double()
    weights[torch.searchsorted(entries, excluded)] = 0.0
    return LeftOut(nodes, counts, torch.zeros(nodes.numel(), dtype=torch.float64).index_add_(0, owners, weights))
