"""The part of a batch that is measured: the logits of its seeds are those in the whole batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dngd.graph import GraphStore
from dngd.models import build_model
from dngd.sampling import SamplerPipeline
from dngd.train.batch import DeviceBatch, PropagationBuilder
from dngd.train.divergence import some_seeds


def batches(store: GraphStore, kind: str, fanout: tuple[int, ...]) -> tuple[torch.nn.Module, list[DeviceBatch]]:
    """A model, and one batch of it: with its first operator, and with the first layer's rows in its place."""
    torch.manual_seed(0)
    model = build_model(
        kind, in_features=store.num_features, hidden=8, out_features=5, num_layers=len(fanout), dropout=0.5
    ).eval()
    train = store.split("masks").train
    found = []
    for aggregation in (None, model.aggregation):
        with SamplerPipeline(store, train, fanout, 0, 1, 40, [0], num_samplers=0, aggregation=aggregation) as pipeline:
            found.append(PropagationBuilder(store, model.aggregation, store.labels.device).batch(next(pipeline)))
    assert found[0].first_aggregation is None
    assert found[1].first_aggregation is not None
    return model, found


@pytest.mark.parametrize("fanout", [(4,), (4, 3), (4, 3, 2), (-1, -1)])
@pytest.mark.parametrize("kind", ["gcn", "sage"])
def test_the_seeds_keep_their_logits(store: GraphStore, kind: str, fanout: tuple[int, ...]) -> None:
    model, found = batches(store, kind, fanout)
    for batch in found:
        whole = model(store.features, batch.propagations, batch.first_aggregation)
        for count in (1, 7, 39):
            part = some_seeds(batch, count)
            places = [place * 40 // count for place in range(count)]
            assert torch.equal(part.seeds, batch.seeds[places])
            assert torch.equal(part.labels, batch.labels[places])
            logits = model(store.features, part.propagations, part.first_aggregation)
            assert torch.allclose(logits, whole[places], rtol=1e-5, atol=1e-6)


def test_only_what_reaches_them_is_kept(store: GraphStore) -> None:
    _, (_, batch) = batches(store, "gcn", (4, 3))
    part = some_seeds(batch, 2)
    assert batch.first_aggregation is not None
    assert part.first_aggregation is not None
    last = batch.propagations[0]
    edges = [last.indices[int(last.indptr[row]) : int(last.indptr[row + 1])] for row in (0, 20)]
    reached = torch.cat([torch.tensor([0, 20]), *edges])
    assert part.first_aggregation.shape[0] == reached.unique().numel() < batch.first_aggregation.shape[0] / 3


def test_what_has_no_more_seeds_is_left_as_it_is(store: GraphStore) -> None:
    _, (batch, _) = batches(store, "sage", (4, 3))
    assert some_seeds(batch, batch.seeds.numel()) is batch
    linked = replace(batch, pairs=torch.zeros(3, 2, dtype=torch.int64))
    assert some_seeds(linked, 1) is linked
