"""Constant full batch against a dense forward and backward pass; semi-supervised losses against their formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dngd.comm import FlatGradients, LocalCommunicator
from dngd.graph import GraphStore
from dngd.models import GNN
from dngd.train import full_batch, losses
from dngd.train.batch import PropagationBuilder
from dngd.train.full_batch import FullBatches
from tests.helpers.mutants import assert_caught
from tests.laws.test_model_laws import CPU, N, dense_forward, make_model, make_store

TRAIN = torch.tensor([3, 21, 38, 0, 7])
"""Unsorted; 0 is the hub, 38 has no edge."""

Stores = tuple[GraphStore, GraphStore]


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "weighted"])
def stores(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Stores:
    """One graph twice, with other features."""
    folder = tmp_path_factory.mktemp("full-batch")
    one = make_store(folder / "one", weighted=request.param)
    other = GraphStore.write(
        folder / "other",
        name="other",
        indptr=one.indptr,
        indices=one.indices,
        edge_weight=one.edge_weight,
        features=one.features.flip(0) * 2 + 1,
        labels=one.labels,
        num_classes=one.num_classes,
    )
    return one, other


def full_batch_step(store: GraphStore, model: GNN, num_shards: int, all_nodes: bool) -> tuple[Tensor, list[Tensor]]:
    """Return every node's logits (NaN where a node is no seed), and the gradients of the summed loss of TRAIN."""
    batches = FullBatches(
        store,
        PropagationBuilder(store, model.aggregation, CPU),
        model,
        store.features.double(),
        TRAIN,
        with_unlabelled=all_nodes,
        shards=range(num_shards),
        num_shards=num_shards,
        rows=7,
    )
    model.zero_grad()
    found = torch.full((N, store.num_classes), float("nan"), dtype=torch.float64)
    for shard in range(num_shards):
        batch = batches.batch(0, 0, shard)
        logits = model(store.features.double(), batch.propagations, batch.first_aggregation)
        assert bool(found[batch.seeds].isnan().all()), "a seed of two shards"
        found[batch.seeds] = logits.detach()
        F.cross_entropy(logits[: len(batch.labels)], batch.labels, reduction="sum").backward()
    return found, [p.grad.clone() for p in model.parameters() if p.grad is not None]


def law_full_batch_is_dense(stores: Stores, kind: str, num_shards: int, all_nodes: bool) -> None:
    """All-neighbour layer graphs with a kept first aggregation are the whole graph's operator."""
    for store in stores:
        model = make_model(kind).eval().double()
        found, gradients = full_batch_step(store, model, num_shards, all_nodes)
        model.zero_grad()
        dense = dense_forward(store, model, kind)
        F.cross_entropy(dense[TRAIN], store.labels[TRAIN], reduction="sum").backward()
        seeds = torch.arange(N) if all_nodes else TRAIN
        # The operators' coefficients are float32.
        assert torch.allclose(found[seeds], dense[seeds], rtol=1e-5, atol=1e-6)
        assert int(found.isnan().any(dim=1).sum()) == N - len(seeds)
        for mine, parameter in zip(gradients, model.parameters(), strict=True):
            assert parameter.grad is not None
            assert torch.allclose(mine, parameter.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["gcn", "sage"])
@pytest.mark.parametrize("num_shards", [1, 2, 5])
@pytest.mark.parametrize("all_nodes", [False, True])
def test_full_batch_is_dense(stores: Stores, kind: str, num_shards: int, all_nodes: bool) -> None:
    law_full_batch_is_dense(stores, kind, num_shards, all_nodes)


def test_mutant_aggregation_of_other_features_is_caught(stores: Stores) -> None:
    """A cache that does not ask whose features it holds."""
    original, kept = full_batch.first_aggregation, {}

    def cached(layer: Any, builder: Any, store: GraphStore, features: Tensor, nodes: Tensor, rows: int) -> Tensor:
        key = (tuple(nodes.tolist()), features.shape)
        if key not in kept:
            kept[key] = original(layer, builder, store, features, nodes, rows)
        return kept[key]

    assert_caught(lambda: law_full_batch_is_dense(stores, "gcn", 2, True), full_batch, "first_aggregation", cached)


def test_mutant_overlapping_shards_are_caught(stores: Stores) -> None:
    def overlapping(nodes: Tensor, shard: int, num_shards: int) -> Tensor:
        return nodes.sort().values[: -(-len(nodes) // num_shards)]

    assert_caught(lambda: law_full_batch_is_dense(stores, "gcn", 2, False), full_batch, "part", overlapping)


def test_mutant_sorted_sources_are_caught(stores: Stores) -> None:
    """Destinations must be the first rows of their sources."""
    original = full_batch.layer_graph

    def misplaced(store: GraphStore, nodes: Tensor) -> tuple[Any, Tensor]:
        graph, sources = original(store, nodes)
        return graph, sources.sort().values

    assert_caught(lambda: law_full_batch_is_dense(stores, "sage", 1, False), full_batch, "layer_graph", misplaced)


SEMI = ("two_means", "pooled")


def direct_loss(semi: str, share: float, logits: Tensor, labels: Tensor) -> Tensor:
    """The formula itself. labels: of the first rows."""
    labelled = F.cross_entropy(logits[: len(labels)], labels, reduction="none")
    others = logits[len(labels) :]
    unlabelled = F.cross_entropy(others, others.detach().argmax(dim=1), reduction="none")
    if semi == "two_means":
        return labelled.mean() + share * unlabelled.mean()
    return (labelled.sum() + share * unlabelled.sum()) / (len(labelled) + share * len(unlabelled))


def law_semi_supervised_loss(semi: Any, share: float, num_shards: int) -> None:
    """Any number of uneven shards gives the formula's value and gradient."""
    generator = torch.Generator().manual_seed(0)
    num_labelled, num_unlabelled = 7, 24
    logits = torch.randn(num_labelled + num_unlabelled, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(4, (num_labelled,), generator=generator)
    expected = nn.Parameter(logits.clone())
    direct = direct_loss(semi, share, expected, labels)
    direct.backward()
    value = float(direct.detach())

    table = nn.Parameter(logits.clone())
    gradients = FlatGradients([table])
    gradients.zero_()
    rule = losses.unlabelled_weight(semi, share, num_labelled, num_unlabelled)
    # Shards with another share of labelled seeds each.
    rows, others = torch.arange(num_labelled), torch.arange(num_labelled, num_labelled + num_unlabelled)
    parts = zip(rows.tensor_split([5])[:num_shards], others.tensor_split([3])[:num_shards])
    if num_shards == 1:
        parts = zip([rows], [others])
    for labelled, unlabelled in parts:
        loss = losses.shard_loss(table[torch.cat([labelled, unlabelled])], labels[labelled], rule)
        loss.loss_sum.backward()
        gradients.add_loss_(loss.loss_sum, loss.divisor)
        assert loss.weights is not None
        assert loss.weights.tolist() == [1.0] * len(labelled) + [rule.weight] * len(unlabelled)
    sums = gradients.reduce_(LocalCommunicator())
    assert sums.loss_sum / sums.num_seeds == pytest.approx(value, rel=1e-12)
    assert table.grad is not None
    assert expected.grad is not None
    assert torch.allclose(table.grad, expected.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("semi", SEMI)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("num_shards", [1, 2])
def test_semi_supervised_loss(semi: str, share: float, num_shards: int) -> None:
    law_semi_supervised_loss(semi, share, num_shards)


def test_mutants_of_the_weights_are_caught() -> None:
    """One loss's rule for the other; a weight or a divisor without its factor."""
    original = losses.unlabelled_weight

    def swapped(semi: str, share: float, labelled: int, unlabelled: int) -> losses.UnlabelledWeight:
        return original("pooled" if semi == "two_means" else "two_means", share, labelled, unlabelled)

    def no_counts(semi: str, share: float, labelled: int, unlabelled: int) -> losses.UnlabelledWeight:
        return losses.UnlabelledWeight(share, original(semi, share, labelled, unlabelled).divisor)

    def all_count(semi: str, share: float, labelled: int, unlabelled: int) -> losses.UnlabelledWeight:
        return losses.UnlabelledWeight(original(semi, share, labelled, unlabelled).weight, 1.0)

    for semi, mutants in (("two_means", (swapped, no_counts, all_count)), ("pooled", (swapped, all_count))):
        for replacement in mutants:
            law = lambda semi=semi: law_semi_supervised_loss(semi, 0.5, 2)  # noqa: E731
            assert_caught(law, losses, "unlabelled_weight", replacement)


@pytest.mark.parametrize("semi", SEMI)
def test_mutant_means_of_each_shard_are_caught(semi: Any) -> None:
    original = losses.shard_loss

    def per_shard(logits: Tensor, labels: Tensor, rule: losses.UnlabelledWeight) -> losses.ShardLoss:
        own = losses.unlabelled_weight(semi, 0.5, len(labels), len(logits) - len(labels))
        loss = original(logits, labels, own)
        return losses.ShardLoss(loss.loss_sum / loss.divisor, 1.0, original(logits, labels, rule).weights)

    assert_caught(lambda: law_semi_supervised_loss(semi, 0.5, 2), losses, "shard_loss", per_shard)


@pytest.mark.parametrize("semi", SEMI)
def test_mutant_labels_that_are_no_constants_are_caught(semi: Any) -> None:
    """Entropy instead of cross-entropy with the arg-max: the same idea, another gradient."""
    original = losses.shard_loss

    def entropy(logits: Tensor, labels: Tensor, rule: losses.UnlabelledWeight) -> losses.ShardLoss:
        loss = original(logits, labels, rule)
        others = logits[len(labels) :]
        total = -(others.softmax(1) * others.log_softmax(1)).sum() * rule.weight
        labelled = F.cross_entropy(logits[: len(labels)], labels, reduction="sum")
        return losses.ShardLoss(labelled + total, loss.divisor, loss.weights)

    assert_caught(lambda: law_semi_supervised_loss(semi, 0.5, 1), losses, "shard_loss", entropy)
