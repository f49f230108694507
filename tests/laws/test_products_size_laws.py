"""The sampling laws on a graph of ogbn-products' size, generated (or found in the cache): minutes, so slow.

DGL's fused sampler on an int32 graph passes them on its first batch here too, and fails them from the second on.
"""

from __future__ import annotations

import pytest
import torch

from dngd.bench.graphs import PRODUCTS_SHAPED, open_graph
from dngd.graph import GraphStore
from dngd.sampling.operators import FirstRows, LayerOperators
from dngd.sampling.sampler import NeighborSampler
from dngd.sampling.topology import Topology
from tests.laws.test_first_rows_laws import reference
from tests.laws.test_sampling_laws import (
    DGL_FUSED,
    law_batch_is_of_the_graph,
    law_neighbours_are_equally_likely,
    sampler_of,
)
from tests.unit.sampling.graphs import run_python

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
FANOUTS = (15, 10, 5)


@pytest.fixture(scope="module")
def store() -> GraphStore:
    return open_graph(PRODUCTS_SHAPED)


@pytest.fixture(scope="module")
def graph(store: GraphStore) -> Topology:
    return Topology(store.indptr, store.indices, None, store.features)


def seed_sets(count: int, size: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randperm(2_449_029, generator=generator)[:size] for _ in range(count)]


def test_it_has_the_size(store: GraphStore) -> None:
    assert (store.num_nodes, store.num_edges, store.num_features) == (2_449_029, 123_718_280, 100)


def test_batches_are_of_the_graph(graph: Topology) -> None:
    sample = NeighborSampler(graph.indptr, graph.indices, None, FANOUTS).sample
    law_batch_is_of_the_graph(graph, sample, FANOUTS, seed_sets(12, 60))


def test_neighbours_are_equally_likely(graph: Topology) -> None:
    """At the busiest nodes, at ordinary ones and at those with hardly more neighbours than are drawn."""
    degrees = graph.indptr.diff()
    order = degrees.argsort()
    nodes = torch.cat([order[-3:], order[len(order) // 2 :][:5], (degrees == 6).nonzero()[:5, 0]]).unique()
    law_neighbours_are_equally_likely(graph, sampler_of(graph, (5,)), 5, nodes)


@pytest.mark.parametrize("aggregation", ["mean", "gcn"])
def test_fused_first_layer_is_gather_then_aggregate(graph: Topology, aggregation: str) -> None:
    sampler = NeighborSampler(graph.indptr, graph.indices, None, FANOUTS)
    operators = LayerOperators(graph, aggregation)  # type: ignore[arg-type]
    for number, seeds in enumerate(seed_sets(2, 8)):
        layer = sampler.sample(seeds, number)[0]
        assert graph.features is not None
        rows = FirstRows(operators, graph.features).of(layer)
        expected = reference(graph, layer, aggregation, graph.features.double())  # type: ignore[arg-type]
        assert torch.allclose(rows.double(), expected, rtol=1e-4, atol=1e-4)


FUSED = """
import torch
from tests.laws import test_products_size_laws as at_size, test_sampling_laws as laws
from dngd.bench.graphs import open_graph
from dngd.sampling.topology import Topology
store = open_graph("products-shaped")
graph = Topology(store.indptr, store.indices)
sets = at_size.seed_sets(4, 60)
FANOUTS = at_size.FANOUTS
"""


def test_dgls_fused_int32_sampler_is_caught() -> None:
    fused = DGL_FUSED[DGL_FUSED.index("def fused") :]
    kept = fused.replace("400 if depth == 0", "graph.indptr.shape[0] - 1 if depth == 0")
    code = "\n".join(
        [
            FUSED,
            "from dngd.sampling import import_dgl",
            "from dngd.sampling.minibatch import LayerGraph",
            "from tests.laws.test_sampling_laws import law_batch_is_of_the_graph, sampler_of as any_sampler",
            "sampler_of = lambda graph: any_sampler(graph, FANOUTS)",
            "dgl = import_dgl()",
            "dgl.utils.set_num_threads(2)",
            kept,
        ]
    )
    done = run_python(code, OMP_NUM_THREADS="2")
    assert done.stdout.split() == ["True", "True", "False"], done.stdout + done.stderr
