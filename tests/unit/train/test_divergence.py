"""The part of a batch that is measured: its first seeds' logits are those of the whole batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dngd.graph import GraphStore
from dngd.models import build_model
from dngd.sampling import SamplerPipeline
from dngd.train.batch import DeviceBatch, PropagationBuilder
from dngd.train.divergence import first_seeds


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
def test_the_first_seeds_keep_their_logits(store: GraphStore, kind: str, fanout: tuple[int, ...]) -> None:
    model, found = batches(store, kind, fanout)
    for batch in found:
        whole = model(store.features, batch.propagations, batch.first_aggregation)
        for count in (1, 7, 39):
            part = first_seeds(batch, count)
            assert torch.equal(part.seeds, batch.seeds[:count])
            assert torch.equal(part.labels, batch.labels[:count])
            logits = model(store.features, part.propagations, part.first_aggregation)
            assert torch.allclose(logits, whole[:count], rtol=1e-5, atol=1e-6)


def test_only_what_reaches_them_is_kept(store: GraphStore) -> None:
    _, (_, batch) = batches(store, "gcn", (4, 3))
    part = first_seeds(batch, 2)
    assert batch.first_aggregation is not None
    assert part.first_aggregation is not None
    reached = torch.cat([torch.arange(2), batch.propagations[0].indices[: int(batch.propagations[0].indptr[2])]])
    assert part.first_aggregation.shape[0] == reached.unique().numel() < batch.first_aggregation.shape[0] / 3


def test_what_has_no_more_seeds_is_left_as_it_is(store: GraphStore) -> None:
    _, (batch, _) = batches(store, "sage", (4, 3))
    assert first_seeds(batch, batch.seeds.numel()) is batch
    linked = replace(batch, pairs=torch.zeros(3, 2, dtype=torch.int64))
    assert first_seeds(linked, 1) is linked
