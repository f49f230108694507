"""What nodes keep of their in-edges where a batch leaves some out."""

from __future__ import annotations

import pytest
import torch

from dngd.sampling.left_out import left_out_by
from dngd.sampling.operators import LayerOperators
from dngd.sampling.topology import Topology
from tests.unit.sampling.graphs import skewed_graph


@pytest.mark.parametrize("scale", [None, 1.0, 1e7, 9e29])
def test_what_stays_is_summed_by_itself(scale: float | None) -> None:
    """However large what goes is: a node that loses all has a degree of 0, as if it never had any."""
    graph = skewed_graph()
    indptr, generator = graph.indptr, torch.Generator().manual_seed(0)
    num_edges = int(indptr[-1])
    weights = None if scale is None else scale * (0.1 + torch.rand(num_edges, generator=generator))
    gone = torch.rand(num_edges, generator=generator) < 0.3
    hub = int(indptr.diff().argmax())
    gone[indptr[hub] : indptr[hub + 1]] = True
    if weights is not None:
        weights[~gone] /= scale
    excluded = gone.nonzero()[:, 0]
    found = left_out_by(indptr, weights, excluded[torch.randperm(len(excluded), generator=generator)])
    assert found is not None
    ones = torch.ones(num_edges) if weights is None else weights
    nodes = torch.arange(len(indptr) - 1).flip(0)
    stays = [float(ones[a:b][~gone[a:b]].double().sum()) for a, b in zip(indptr[:-1], indptr[1:])]
    whole = torch.tensor([float(ones[a:b].double().sum()) for a, b in zip(indptr[:-1], indptr[1:])])
    wanted = torch.tensor(stays, dtype=torch.float64).flip(0)
    assert torch.allclose(found.kept_of(nodes, whole.flip(0)), wanted, rtol=1e-6, atol=0)
    assert found.counts_of(nodes).tolist() == [int(gone[a:b].sum()) for a, b in zip(indptr[:-1], indptr[1:])][::-1]
    operators = LayerOperators(Topology(indptr, graph.indices, weights), "gcn")
    norms = operators._norm_of(nodes, found)
    assert torch.allclose(norms, (1 + wanted).rsqrt().float(), rtol=1e-5)
    assert norms[nodes == hub].tolist() == [1.0]


def test_nothing_is_left_out_of_no_edges() -> None:
    assert left_out_by(torch.tensor([0, 1]), None, None) is None
    assert left_out_by(torch.tensor([0, 1]), None, torch.empty(0, dtype=torch.int64)) is None
