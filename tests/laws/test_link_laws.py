"""Link prediction: no batch sees its own links, and the Fisher of the pairs' loss is that of dense references.

With logits `s_k = ⟨z_u, z_v⟩` the loss's gradient at a node's row is `g_u = Σ_k (σ(s_k) - y_k) z_v` over its pairs; G
is `(1/n) Σ_u g_u g_uᵀ` for n pairs. Products between the two rows of one pair are no part of a Kronecker factor: where
one end's embedding is zero there are none, and A ⊗ G is the pair's whole Fisher.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dngd.comm import Communicator, FlatGradients, LocalCommunicator, shards_of_rank
from dngd.graph import GraphStore, split_links
from dngd.models import decoder
from dngd.models.message_passing import aggregate_rows
from dngd.optim import KFACPreconditioner, NaturalGradient, capture
from dngd.sampling import LinkSeeds, NeighborSampler, SamplerPipeline, epoch_permutation
from dngd.sampling.left_out import LeftOut
from dngd.sampling.minibatch import BatchCoordinates, MiniBatch
from dngd.sampling.operators import LayerOperators
from dngd.sampling.schedule import shard_bounds
from dngd.train import batch as batch_module
from dngd.train.module_batches import ModuleBatchBuilder
from tests.helpers.mutants import assert_caught
from tests.helpers.thread_world import run_threads
from tests.unit.graph.test_links import edges_of, write

F64 = torch.float64


def edges_of_batch(batch: MiniBatch) -> set[tuple[int, int]]:
    """All sampled edges as global ids, of all layers."""
    found = set()
    below: Tensor | None = None
    for layer in batch.layers:
        assert layer.global_indices or below is not None
        sources = layer.indices if below is None else below[layer.indices]
        destinations = torch.repeat_interleave(layer.dst_nodes, layer.indptr.diff())
        found |= set(zip(sources.tolist(), destinations.tolist()))
        below = layer.dst_nodes
    return found


def link_batches(store: GraphStore, fanouts: tuple[int, ...], **changes: Any) -> list[MiniBatch]:
    split = split_links(store, "0.8/0.1/0.1", 1)
    links = LinkSeeds(split.graph, 2, 5)
    arguments: dict[str, Any] = {"num_samplers": 0, "links": links} | changes
    with SamplerPipeline(split.graph, split.train, fanouts, 5, 2, 20, [0, 1], **arguments) as batches:
        return [next(batches) for _ in range(6)]


def own_links(batch: MiniBatch) -> set[tuple[int, int]]:
    """The batch's links, in both directions."""
    assert batch.pairs is not None
    links = batch.seeds[batch.pairs.rows[: batch.pairs.num_links]].tolist()
    return {pair for u, v in links for pair in ((u, v), (v, u))}


def law_of_batches(store: GraphStore, fanouts: tuple[int, ...]) -> None:
    split = split_links(store, "0.8/0.1/0.1", 1)
    seeds = LinkSeeds(split.graph, 2, 5)
    sampler = NeighborSampler(split.graph.indptr, split.graph.indices, split.graph.edge_weight, fanouts)
    kept = edges_of(split.graph)
    edges, held_out = set(kept), {tuple(pair) for part in (split.val, split.test) for pair in part.tolist()}
    for number, links in enumerate(epoch_permutation(split.train, 0, 0)[:120].split(20)):
        batch = seeds.batch(links, BatchCoordinates(0, number, 0))
        batch = replace(batch, layers=sampler.sample(batch.seeds, number, batch.excluded))
        assert batch.pairs is not None
        rows, n = batch.pairs.rows, batch.pairs.num_links
        pairs = [tuple(pair) for pair in batch.seeds[rows].tolist()]
        negatives = pairs[n:]
        assert (n, len(negatives)) == (20, 40)
        assert all((u, v) in edges or (v, u) in edges for u, v in pairs[:n])
        assert all(u != v for u, v in negatives)
        assert torch.unique(rows).numel() == batch.seeds.numel(), "every seed is an end of a pair"
        sampled = edges_of_batch(batch)
        own = own_links(batch)
        assert sampled <= edges
        assert not sampled & own, "a link that is to be predicted is an edge of its own batch"
        assert not {(min(pair), max(pair)) for pair in sampled} & held_out
        for layer, fanout in zip(batch.layers, fanouts):
            in_edges = [[e for e in kept if e[1] == v and e not in own] for v in layer.dst_nodes.tolist()]
            assert layer.degrees.tolist() == [len(e) for e in in_edges]
            if fanout == -1:
                assert layer.indptr.diff().tolist() == layer.degrees.tolist()


@pytest.mark.parametrize("fanouts", [(3, 4), (-1, -1)])
@pytest.mark.parametrize("is_directed", [True, False])
def test_no_batch_sees_its_own_links(tmp_path: Path, fanouts: tuple[int, ...], is_directed: bool) -> None:
    """Hubs, loops, copies of edges, and links of one direction among them."""
    generator = np.random.default_rng(0)
    edges = np.minimum(generator.geometric(0.05, (500, 2)) - 1, 59)
    store = write(tmp_path / "g", edges, 60, add_reverse=not is_directed)
    assert_caught(
        lambda: law_of_batches(store, fanouts), NeighborSampler, "_without", lambda self, excluded, *drawn: drawn
    )
    original = LinkSeeds._entries_of
    one_way = lambda self, pairs: original(self, pairs)[: len(pairs)]  # noqa: E731
    assert_caught(lambda: law_of_batches(store, fanouts), LinkSeeds, "_entries_of", one_way)


def law_of_coefficients(graph: GraphStore, num_samplers: int, store: GraphStore) -> None:
    """A batch's first and second aggregation are those of a GCN on the graph without the batch's links."""
    num_nodes = graph.num_nodes
    features = torch.randn(num_nodes, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    operators, modules = LayerOperators(graph, "gcn"), ModuleBatchBuilder(graph, features, torch.device("cpu"))
    links, train = LinkSeeds(graph, 2, 5), split_links(store, "0.8/0.1/0.1", 1).train
    with SamplerPipeline(
        graph,
        train,
        (-1, -1),
        5,
        1,
        20,
        [0],
        num_samplers=num_samplers,
        links=links,
    ) as batches:
        for batch in (next(batches) for _ in range(4)):
            own = own_links(batch)
            dense = torch.eye(num_nodes, dtype=torch.float64)
            for u, v in edges_of(graph):
                dense[v, u] += (u, v) not in own
            norm = dense.sum(dim=1).rsqrt()
            hidden = norm[:, None] * dense * norm[None, :] @ features
            wanted = (norm[:, None] * dense * norm[None, :] @ hidden)[batch.seeds]
            first, second = operators.of_layers(batch.layers)
            rows = aggregate_rows("gcn", features, first)
            assert torch.allclose(rows, hidden[batch.layers[0].dst_nodes], rtol=1e-5, atol=1e-6)
            assert torch.allclose(aggregate_rows("gcn", rows, second), wanted, rtol=1e-5, atol=1e-6)
            assert torch.equal(operators.behind(batch.layers)[0].edge_coefficients, second.edge_coefficients)
            graph_batch = modules.batch(batch).graph
            assert graph_batch is not None
            rows = graph_batch.x
            for layer in graph_batch.layers:
                (source, destination), coefficients = layer.gcn()
                out = rows.new_zeros(layer.num_dst, 5)
                rows = out.index_add_(0, destination, rows[source] * coefficients[:, None])
            assert torch.allclose(rows, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("num_samplers", "is_directed"), [(0, True), (0, False), (1, False)])
def test_degrees_do_not_tell_of_the_links_either(tmp_path: Path, num_samplers: int, is_directed: bool) -> None:
    generator = np.random.default_rng(0)
    edges = np.minimum(generator.geometric(0.08, (300, 2)) - 1, 39)
    store = write(tmp_path / "g", edges, 40, add_reverse=not is_directed)
    graph = split_links(store, "0.8/0.1/0.1", 1).graph
    law = lambda: law_of_coefficients(graph, num_samplers, store)  # noqa: E731
    unchanged = lambda self, nodes: torch.zeros_like(nodes)  # noqa: E731
    assert_caught(law, LeftOut, "kept_of", lambda self, nodes, whole: whole.double().expand(nodes.shape))
    assert_caught(law, LeftOut, "counts_of", unchanged)


def test_batches_are_the_same_for_any_number_of_samplers_and_start(store: GraphStore) -> None:
    wanted = link_batches(store, (4, 4))
    for other in (link_batches(store, (4, 4), num_samplers=1), [None] * 2 + link_batches(store, (4, 4), start=(0, 1))):
        for one, two in zip(wanted, other):
            if two is None:
                continue
            assert not edges_of_batch(two) & own_links(two)
            assert (one.coordinates, one.pairs is None, two.pairs is None) == (two.coordinates, False, False)
            assert torch.equal(one.seeds, two.seeds)
            assert one.pairs is not None
            assert two.pairs is not None
            assert torch.equal(one.pairs.rows, two.pairs.rows)
            for a, b in zip(one.layers, two.layers):
                assert torch.equal(a.indptr, b.indptr)
                assert torch.equal(a.indices, b.indices)


def test_an_epoch_has_each_link_once(store: GraphStore) -> None:
    split = split_links(store, "0.8/0.1/0.1", 1)
    seeds, found = LinkSeeds(split.graph, 1, 0), []
    order = epoch_permutation(split.train, 0, 3)
    for step in range(3):
        bounds = shard_bounds(len(order), step, 2, len(order) // 5)
        for shard in (0, 1):
            batch = seeds.batch(order[bounds[shard] : bounds[shard + 1]], BatchCoordinates(3, step, shard))
            assert batch.pairs is not None
            found += [tuple(pair) for pair in batch.seeds[batch.pairs.rows[: batch.pairs.num_links]].tolist()]
    assert len(found) == len(set(found)) == len(split.train)


# The Fisher


class Encoder(nn.Module):
    """One layer: z = W m + b of aggregated rows m."""

    def __init__(self, d_in: int, d_out: int, *, bias: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(d_in, d_out, bias=bias)

    def forward(self, rows: Tensor) -> Tensor:
        out: Tensor = self.linear(rows)
        return out


def factors(
    net: Encoder, rows: Tensor, pairs: Tensor, labels: Tensor, fisher: str = "empirical", shards: int = 1
) -> tuple[Tensor, Tensor]:
    """(A, G) as the loop measures them, from summed losses of the pairs in so many shards."""
    pre = KFACPreconditioner(net, loss="binary_cross_entropy", loss_reduction="sum", fisher=fisher)  # type: ignore[arg-type]
    net.zero_grad()
    for k, (some, y) in enumerate(zip(pairs.tensor_split(shards), labels.tensor_split(shards))):
        nodes, places = torch.unique(some, return_inverse=True)
        logits = decoder.pair_logits(net(rows[nodes]), places)
        pre.observe(logits, key=k)
        F.binary_cross_entropy_with_logits(logits, y[:, None], reduction="sum").backward()
    assert pre.step(num_samples=len(pairs))
    found = pre.factors()["linear"]
    pre.close()
    return found.A, found.G


def dense_rows(rows: Tensor, bias: bool) -> Tensor:
    return torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1) if bias else rows


def dense_g(net: Encoder, rows: Tensor, pairs: Tensor, labels: Tensor) -> Tensor:
    """(1/n) Σ_u g_u g_uᵀ with g_u written out, one pair after the other."""
    z = net(rows).detach()
    g = torch.zeros_like(z)
    for (u, v), y in zip(pairs.tolist(), labels.tolist()):
        residual = torch.sigmoid(z[u] @ z[v]) - y
        g[u] += residual * z[v]
        g[v] += residual * z[u]
    return g.T @ g / len(pairs)


def same(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= 1e-9 * max(1e-12, float(expected.abs().max()))


def example(seed: int, num_nodes: int, num_pairs: int, *, disjoint: bool) -> tuple[Encoder, Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    net = Encoder(4, 3).double()
    rows = torch.randn(num_nodes, 4, dtype=F64)
    if disjoint:
        pairs = torch.randperm(num_nodes)[: 2 * num_pairs].view(num_pairs, 2)
    else:
        first = torch.randint(num_nodes, (num_pairs,))
        pairs = torch.stack([first, (first + torch.randint(1, num_nodes, (num_pairs,))) % num_nodes], dim=1)
    return net, rows, pairs, torch.randint(2, (num_pairs,)).double()


def half_detached(embeddings: Tensor, pairs: Tensor) -> Tensor:
    return (embeddings[pairs[:, 0]] * embeddings[pairs[:, 1]].detach()).sum(dim=1, keepdim=True)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1000), num_pairs=st.integers(1, 12))
def test_empirical_factors_of_any_pairs(seed: int, num_pairs: int) -> None:
    net, rows, pairs, labels = example(seed, 7, num_pairs, disjoint=False)

    def law() -> None:
        a, g = factors(net, rows, pairs, labels)
        reached = dense_rows(rows[torch.unique(pairs)], bias=True)
        same(a, reached.T @ reached / len(reached))
        same(g, dense_g(net, rows, pairs, labels))

    assert_caught(law, decoder, "pair_logits", half_detached)


@pytest.mark.parametrize("num_pairs", [1, 3])
def test_sampled_labels_are_each_pairs_bernoulli(monkeypatch: pytest.MonkeyPatch, num_pairs: int) -> None:
    """Over all labels, weighed by their probability, its G is GGN's: `(1/n) Σ_k p(1-p)(z_v z_vᵀ + z_u z_uᵀ)`."""
    net, rows, pairs, labels = example(3, 8, num_pairs, disjoint=True)
    z = net(rows).detach()
    u, v = z[pairs[:, 0]], z[pairs[:, 1]]
    p = torch.sigmoid((u * v).sum(dim=1))
    weight = (p * (1 - p))[:, None]
    expected = ((weight * u).T @ u + (weight * v).T @ v) / num_pairs
    same(factors(net, rows, pairs, labels, "ggn")[1], expected)
    total = torch.zeros_like(expected)
    for drawn in product((0.0, 1.0), repeat=num_pairs):
        y = torch.tensor(drawn, dtype=F64)
        monkeypatch.setattr(capture, "sampled_gradient", lambda out, *_, y=y: out.detach().sigmoid() - y[:, None])
        total += torch.where(y > 0, p, 1 - p).prod() * factors(net, rows, pairs, labels, "monte_carlo")[1]
    same(total, expected)


@pytest.mark.parametrize("fisher", ["ggn", "monte_carlo"])
def test_the_block_is_the_whole_fisher_where_one_end_is_zero(fisher: str) -> None:
    """Disjoint pairs (u_k, v_k) with one input row for all v_k, which W maps to zero exactly: then
    `F = (1/n) Σ_k p(1-p) ∇s_k ∇s_kᵀ`, of autograd's gradients of the logits, is A ⊗ G."""
    torch.manual_seed(0)
    net = Encoder(4, 3, bias=False).double()
    with torch.no_grad():
        net.linear.weight[:, 0] = 0
    rows = torch.randn(10, 4, dtype=F64)
    rows[5:] = torch.tensor([1.5, 0.0, 0.0, 0.0])
    pairs = torch.arange(10).view(2, 5).T

    def law() -> None:
        dense = torch.zeros(12, 12, dtype=F64)
        for pair in pairs:
            logit = decoder.pair_logits(net(rows), pair[None])[0, 0]
            (gradient,) = torch.autograd.grad(logit, net.linear.weight)
            probability = torch.sigmoid(logit.detach())
            flat = gradient.T.reshape(-1)
            dense += probability * (1 - probability) * torch.outer(flat, flat) / len(pairs)
        a, g = factors(net, rows, pairs, torch.zeros(5, dtype=F64), fisher)
        same(torch.kron(a, g), dense)

    # σ(0) = 1/2: either label has the same square, so that sampled labels are exact too.
    wrong = KFACPreconditioner.step
    assert_caught(law, KFACPreconditioner, "step", lambda self, num_samples: wrong(self, num_samples=2 * num_samples))


@pytest.mark.parametrize("fisher", ["empirical", "ggn"])
def test_repeating_a_batch_changes_no_factor(fisher: str) -> None:
    """As disjoint layer graphs: shards of the same pairs, each with rows of its own."""
    net, rows, pairs, labels = example(4, 9, 4, disjoint=fisher == "ggn")
    once = factors(net, rows, pairs, labels, fisher)
    for found, expected in zip(factors(net, rows, pairs.repeat(3, 1), labels.repeat(3), fisher, shards=3), once):
        same(found, expected)


# Worlds


def train(comm: Communicator, store: GraphStore, fisher: str) -> dict[str, Any]:
    """A few steps of four shards of links in float64, whoever runs them."""
    split = split_links(store, "0.8/0.1/0.1", 1)
    seeds = LinkSeeds(split.graph, 1, 7)
    net: Any = nn.Sequential(nn.Linear(store.num_features, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    with torch.no_grad():
        for k, p in enumerate(net.parameters()):  # threads share torch's random stream
            p.copy_(torch.from_numpy(np.random.RandomState(k).uniform(-0.5, 0.5, p.shape)))
    options: dict[str, Any] = {"damping": 0.05, "factor_update_period": 2, "inverse_update_period": 3}
    optimizer = NaturalGradient(
        net, 0.1, loss="binary_cross_entropy", loss_reduction="sum", fisher=fisher, communicator=comm, **options
    )
    gradients, losses = FlatGradients(net.parameters()), []
    for step in range(5):
        gradients.zero_()
        here = 0.0
        order = epoch_permutation(split.train, 7, 0)
        bounds = shard_bounds(len(order), step, 4, 11)
        for shard in shards_of_rank(4, comm.rank, comm.world_size):
            batch = seeds.batch(order[bounds[shard] : bounds[shard + 1]], BatchCoordinates(0, step, shard))
            labels, pairs = batch_module.targets(store, batch, lambda tensor: tensor)
            assert pairs is not None
            logits = decoder.pair_logits(net(store.features[batch.seeds].double()), pairs)
            optimizer.observe(logits, key=shard)
            loss = F.binary_cross_entropy_with_logits(logits, labels.double(), reduction="sum")
            loss.backward()  # type: ignore[no-untyped-call]
            gradients.add_loss_(loss, len(labels))
            here += len(labels)
        sums = gradients.reduce_(comm)
        assert sums.num_seeds == 4 * 11 * 2, "a pair is a seed of the loss, a link or not"
        optimizer.step(num_samples=here, finite=sums.finite, mean_gradients=True)
        losses.append(sums.loss_sum / sums.num_seeds)
    found = {name: [pair.A, pair.G] for name, pair in optimizer.preconditioner.factors().items()}
    return {"losses": losses, "weights": [p.detach().clone() for p in net.parameters()], "factors": found}


@pytest.mark.parametrize("fisher", ["empirical", "monte_carlo", "ggn"])
def test_four_shards_are_the_same_run_at_any_world_size(store: GraphStore, fisher: str) -> None:
    alone = train(LocalCommunicator(), store, fisher)
    for world_size in (2, 3):
        for result in run_threads(world_size, lambda comm: train(comm, store, fisher)):
            np.testing.assert_allclose(result["losses"], alone["losses"], rtol=1e-10)
            for mine, theirs in zip(result["weights"], alone["weights"]):
                same(mine, theirs)
            for name, pair in alone["factors"].items():
                for mine, theirs in zip(result["factors"][name], pair):
                    same(mine, theirs)
