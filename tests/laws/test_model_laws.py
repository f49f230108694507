"""Aggregation against dense operators and PyG, exact evaluation against a full-graph forward, and mutants."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn import GCNConv, SAGEConv

from dngd.comm import LocalCommunicator
from dngd.graph import GraphStore
from dngd.models import GNN, build_model, message_passing
from dngd.optim import KFACPreconditioner
from dngd.sampling import BatchCoordinates, MiniBatch, NeighborSampler
from dngd.sampling import operators as operators_module
from dngd.train.batch import PropagationBuilder
from dngd.train.evaluation import ExactEvaluator
from tests.helpers.mutants import assert_caught

N, FEATURES, CLASSES = 40, 6, 3
CPU = torch.device("cpu")


def make_store(path: Path, *, weighted: bool) -> GraphStore:
    """A directed graph with a hub, isolated nodes (38, 39) and nodes without in-edges."""
    generator = torch.Generator().manual_seed(0)
    edges = torch.randint(0, N - 2, (2, 160), generator=generator)
    hub = torch.stack([torch.arange(1, 30), torch.zeros(29, dtype=torch.int64)])
    edge_index = torch.cat([edges, hub], dim=1)
    edge_index = torch.unique(edge_index[:, edge_index[0] != edge_index[1]], dim=1)
    weight = torch.rand(edge_index.shape[1], generator=generator) + 0.1 if weighted else None
    return GraphStore.write(
        path,
        name="tiny",
        edge_index=edge_index,
        edge_weight=weight,
        features=torch.randn(N, FEATURES, generator=generator),
        labels=torch.randint(CLASSES, (N,), generator=generator),
        num_classes=CLASSES,
    )


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "weighted"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> GraphStore:
    return make_store(tmp_path_factory.mktemp("tiny") / "store", weighted=request.param)


def edges_of(store: GraphStore) -> tuple[Tensor, Tensor]:
    """(edge_index [2, E], weights [E]) with source row first."""
    destinations = torch.repeat_interleave(torch.arange(N), store.indptr.diff())
    weights = torch.ones(store.num_edges) if store.edge_weight is None else store.edge_weight
    return torch.stack([store.indices, destinations]), weights.double()


def dense_operator(store: GraphStore, kind: str) -> Tensor:
    """Row v holds the coefficients with which v's aggregate takes its sources, float64 [N, N]."""
    (sources, destinations), weights = edges_of(store)
    adjacency = torch.zeros(N, N, dtype=torch.float64)
    adjacency[destinations, sources] = weights
    if kind == "sage":
        totals = adjacency.sum(dim=1, keepdim=True)
        return adjacency / torch.where(totals == 0, 1.0, totals)
    adjacency += torch.eye(N, dtype=torch.float64)
    norm = adjacency.sum(dim=1).rsqrt()
    return norm[:, None] * adjacency * norm[None, :]


def dense_forward(store: GraphStore, model: GNN, kind: str) -> Tensor:
    operator = dense_operator(store, kind)
    hidden = store.features.double()
    for i, layer in enumerate(model.graph_layers()):
        rows = operator @ hidden
        if kind == "sage":
            rows = torch.cat([hidden, rows], dim=1)
        hidden = rows @ layer.linear.weight.double().T + layer.linear.bias.double()
        if i + 1 < len(model.layers):
            hidden = F.relu(hidden)
    return hidden


def make_model(kind: str, num_layers: int = 3) -> GNN:
    torch.manual_seed(1)
    model = build_model(kind, in_features=FEATURES, hidden=8, out_features=CLASSES, num_layers=num_layers, dropout=0.5)
    for layer in model.graph_layers():
        nn.init.normal_(layer.linear.bias)
    return model


def sampled_forward(store: GraphStore, model: GNN, fanouts: tuple[int, ...], seeds: Tensor, rng_seed: int) -> Tensor:
    sampler = NeighborSampler(store.indptr, store.indices, store.edge_weight, fanouts)
    mini_batch = MiniBatch(seeds, tuple(sampler.sample(seeds, rng_seed)), BatchCoordinates(0, 0, 0))
    built = PropagationBuilder(store, model.aggregation, CPU).batch(mini_batch)
    return model(store.features, built.propagations)


def law_all_neighbours_is_the_full_graph(store: GraphStore, kind: str) -> None:
    """Full batch = one layer graph of fanout -1 with all seeds = the dense operator; isolated nodes too."""
    model = make_model(kind).eval()
    seeds = torch.randperm(N, generator=torch.Generator().manual_seed(2))
    found = sampled_forward(store, model, (-1, -1, -1), seeds, 0)
    assert torch.allclose(found.double(), dense_forward(store, model, kind)[seeds], rtol=1e-4, atol=1e-5)


def law_evaluation_is_exact(store: GraphStore, kind: str, rows: int) -> None:
    """Layer by layer, in chunks of any size, twice (the second time from the kept first rows)."""
    model = make_model(kind).train()
    builder = PropagationBuilder(store, model.aggregation, CPU)
    evaluator = ExactEvaluator(store, builder, LocalCommunicator(), rows=rows, device=CPU, features=store.features)
    expected = dense_forward(store, model, kind)
    for _ in range(2):
        assert torch.allclose(evaluator.logits(model).double(), expected, rtol=1e-4, atol=1e-5)
    assert model.training, "evaluation left the model in eval mode"


def law_sampling_is_unbiased(store: GraphStore) -> None:
    """The mean of GCN's sampled aggregate over many draws is the full aggregate, hubs included."""
    model = make_model("gcn", num_layers=1)
    layer = model.graph_layers()[0]
    seeds = torch.arange(N)
    sampler = NeighborSampler(store.indptr, store.indices, store.edge_weight, (3,))
    builder = PropagationBuilder(store, "gcn", CPU)
    draws = []
    for rng_seed in range(400):
        mini_batch = MiniBatch(seeds, tuple(sampler.sample(seeds, rng_seed)), BatchCoordinates(0, 0, 0))
        [propagation] = builder.batch(mini_batch).propagations
        draws.append(layer.aggregate(store.features, propagation).double())
    stacked = torch.stack(draws)
    expected = dense_operator(store, "gcn") @ store.features.double()
    standard_error = stacked.std(dim=0) / len(draws) ** 0.5
    # 240 comparisons at five standard errors: a chance of about 1e-4 in all, and the draws are fixed.
    assert bool(((stacked.mean(dim=0) - expected).abs() <= 5 * standard_error + 1e-5).all())


@pytest.mark.parametrize("kind", ["gcn", "sage"])
def test_all_neighbours_is_the_full_graph(tiny: GraphStore, kind: str) -> None:
    law_all_neighbours_is_the_full_graph(tiny, kind)


@pytest.mark.parametrize("kind", ["gcn", "sage"])
@pytest.mark.parametrize("rows", [1, 7, 40, 1000])
def test_evaluation_is_exact(tiny: GraphStore, kind: str, rows: int) -> None:
    law_evaluation_is_exact(tiny, kind, rows)


def test_sampling_is_unbiased(tiny: GraphStore) -> None:
    law_sampling_is_unbiased(tiny)


def test_layers_equal_pygs(tiny: GraphStore) -> None:
    """GCNConv (symmetric graphs only agree on d; its d is the in-degree, as here) and SAGEConv(mean)."""
    edge_index, weights = edges_of(tiny)
    x = tiny.features
    gcn = make_model("gcn", 1).eval()
    convolution = GCNConv(FEATURES, CLASSES)
    with torch.no_grad():
        convolution.lin.weight.copy_(gcn.graph_layers()[0].linear.weight)
        convolution.bias.copy_(gcn.graph_layers()[0].linear.bias)
    found = sampled_forward(tiny, gcn, (-1,), torch.arange(N), 0)
    assert torch.allclose(found, convolution(x, edge_index, weights.float()), rtol=1e-4, atol=1e-5)
    if tiny.edge_weight is None:
        sage = make_model("sage", 1).eval()
        linear = sage.graph_layers()[0].linear
        convolution = SAGEConv(FEATURES, CLASSES)
        with torch.no_grad():
            convolution.lin_r.weight.copy_(linear.weight[:, :FEATURES])
            convolution.lin_l.weight.copy_(linear.weight[:, FEATURES:])
            convolution.lin_l.bias.copy_(linear.bias)
        found = sampled_forward(tiny, sage, (-1,), torch.arange(N), 0)
        assert torch.allclose(found, convolution(x, edge_index), rtol=1e-4, atol=1e-5)


def test_mutant_no_self_loop_is_caught(tiny: GraphStore) -> None:
    original = message_passing.gcn_coefficients

    def without(graph: object, source: Tensor, destination: Tensor) -> tuple[Tensor, Tensor]:
        edges, selves = original(graph, source, destination)  # type: ignore[arg-type]
        return edges, torch.zeros_like(selves)

    law = lambda: law_all_neighbours_is_the_full_graph(tiny, "gcn")  # noqa: E731
    assert_caught(law, operators_module, "gcn_coefficients", without)


def test_mutant_no_scale_for_undrawn_neighbours_is_caught(tiny: GraphStore) -> None:
    original = message_passing.gcn_coefficients

    def unscaled(graph: object, source: Tensor, destination: Tensor) -> tuple[Tensor, Tensor]:
        edges, selves = original(graph, source, destination)  # type: ignore[arg-type]
        sampled = graph.indptr.diff()  # type: ignore[attr-defined]
        scale = sampled / graph.degrees.clamp_min(1)  # type: ignore[attr-defined]
        return edges * torch.repeat_interleave(scale, sampled), selves

    assert_caught(lambda: law_sampling_is_unbiased(tiny), operators_module, "gcn_coefficients", unscaled)


def test_mutant_swapped_halves_are_caught(tiny: GraphStore) -> None:
    from dngd.models.layers import SAGELayer

    def swapped(self: SAGELayer, table: Tensor, propagation: message_passing.Propagation) -> Tensor:
        return torch.cat([propagation.neighbour_rows(table), propagation.self_rows(table)], dim=1)

    assert_caught(lambda: law_all_neighbours_is_the_full_graph(tiny, "sage"), SAGELayer, "aggregate", swapped)


def law_disjoint_layer_graphs(store: GraphStore, kind: str) -> None:
    """Repeating a mini-batch as disjoint layer graphs changes no factor and no natural gradient."""
    seeds = torch.arange(0, N, 3)
    sampler = NeighborSampler(store.indptr, store.indices, store.edge_weight, (3, 3))
    layers = tuple(sampler.sample(seeds, 5))
    found = []
    for copies in (1, 3):
        model = make_model(kind, 2).eval().double()
        builder = PropagationBuilder(store, model.aggregation, CPU)
        built = builder.batch(MiniBatch(seeds, layers, BatchCoordinates(0, 0, 0)))
        pre = KFACPreconditioner(model, damping=0.05, loss_reduction="sum")
        for _ in range(copies):
            logits = model(store.features.double(), built.propagations)
            F.cross_entropy(logits, built.labels, reduction="sum").backward()
        pre.step(num_samples=copies * len(seeds))
        found.append([t for pair in pre.factors().values() for t in pair] + [p.grad for p in model.parameters()])
        pre.close()
    for once, repeated in zip(*found):
        assert torch.allclose(once, repeated, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["gcn", "sage"])
def test_disjoint_layer_graphs(tiny: GraphStore, kind: str) -> None:
    law_disjoint_layer_graphs(tiny, kind)
