"""The part of a batch that is measured: the logits of its seeds are those in the whole batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dngd.config import TrainConfig
from dngd.graph import GraphStore
from dngd.models import build_model
from dngd.optim import KLTrustRegion, NaturalGradient
from dngd.sampling import SamplerPipeline
from dngd.train.batch import DeviceBatch, PropagationBuilder
from dngd.train.divergence import DivergenceMeter, some_seeds, takes_whole_batches
from dngd.train.optimizers import SecondOrder


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


def listened(optimizer: NaturalGradient, patch: pytest.MonkeyPatch) -> list[float]:
    """Return where the divergences that the optimizer is told of will stand."""
    told: list[float] = []
    adapt = optimizer.adapt_clip
    patch.setattr(optimizer, "adapt_clip", lambda before, after: told.append(adapt(before, after)))
    return told


@pytest.mark.parametrize("kind", ["gcn", "sage"])
def test_all_of_a_batch_tells_of_the_same_seeds(store: GraphStore, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """On a GPU all of it goes through: the measured divergence is that of the same seeds, not of all."""
    monkeypatch.setattr("dngd.train.divergence.MEASURED_SEEDS", 9)
    measured: dict[bool, list[float]] = {}
    for takes_all in (False, True):
        model, found = batches(store, kind, (4, 3))
        optimizer = NaturalGradient(model, lr=0.3, kl_clip=KLTrustRegion(0.1))
        rows_of: list[int] = []

        def forward(batch: DeviceBatch, model: Any = model, rows_of: list[int] = rows_of) -> torch.Tensor:
            logits: torch.Tensor = model(
                store.features, batch.propagations, batch.first_aggregation, batch.first_output
            )
            rows_of.append(logits.shape[0])
            return logits

        told = listened(optimizer, monkeypatch)
        meter = DivergenceMeter(SecondOrder(optimizer), model, forward, takes_all=takes_all)
        for batch in found:
            optimizer.zero_grad()
            with meter.watch(0):
                logits = forward(batch)
            meter.note(0, batch)
            torch.nn.functional.cross_entropy(logits, batch.labels).backward()
            optimizer.step(num_samples=40)
            meter.measure(finite=True)
        assert rows_of == [40, 40 if takes_all else 9, 40 if takes_all else 9] * 2
        measured[takes_all] = told
    assert len(measured[True]) == 2
    assert all(value > 0 for value in measured[True])
    assert measured[True] == pytest.approx(measured[False], rel=1e-3)


@pytest.mark.parametrize("takes_all", [False, True])
@pytest.mark.parametrize("kind", ["gcn", "sage"])
def test_the_first_layer_is_gone_through_once_more_and_without_dropout(
    store: GraphStore, monkeypatch: pytest.MonkeyPatch, kind: str, takes_all: bool
) -> None:
    """Before the step its output of the training pass serves, which no dropout has touched; after it, its rows do."""
    monkeypatch.setattr("dngd.train.divergence.MEASURED_SEEDS", 9)
    model, found = batches(store, kind, (4, 3))
    optimizer = NaturalGradient(model, lr=0.3, kl_clip=KLTrustRegion(0.1))
    calls: list[int] = []
    first: Any = model.graph_layers()[0]  # type: ignore[operator]
    first.linear.register_forward_hook(lambda module, inputs, output: calls.append(output.shape[0]))

    def forward(batch: DeviceBatch) -> torch.Tensor:
        logits: torch.Tensor = model(store.features, batch.propagations, batch.first_aggregation, batch.first_output)
        return logits

    compared: list[tuple[torch.Tensor, torch.Tensor]] = []
    monkeypatch.setattr(optimizer, "adapt_clip", lambda before, after: compared.append((before, after)))
    meter = DivergenceMeter(SecondOrder(optimizer), model, forward, takes_all=takes_all)
    places = torch.arange(9) * 40 // 9
    for batch in found:
        without_dropout = []
        model.eval()
        with torch.no_grad():
            without_dropout.append(forward(batch)[places])
        model.train()
        calls.clear()
        optimizer.zero_grad()
        with meter.watch(0):
            logits = forward(batch)
        meter.note(0, batch)
        torch.nn.functional.cross_entropy(logits, batch.labels).backward()
        assert len(calls) == 1
        optimizer.step(num_samples=40)
        meter.measure(finite=True)
        assert len(calls) == 2
        assert (calls[1] == calls[0]) == takes_all
        model.eval()
        with torch.no_grad():
            without_dropout.append(forward(batch)[places])
        for found_logits, expected in zip(compared.pop(), without_dropout):
            assert torch.allclose(found_logits, expected, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(*without_dropout, rtol=1e-3)


@pytest.mark.parametrize(
    ("device", "batch_size", "whole"), [("cuda", 64, True), ("cuda", "full", False), ("cpu", 64, False)]
)
def test_whole_batches_are_for_sampled_ones_on_a_gpu(device: str, batch_size: Any, whole: bool) -> None:
    fields = {"fanout": (-1, -1)} if batch_size == "full" else {}
    config = TrainConfig(dataset="any", num_layers=2, batch_size=batch_size, **fields)  # type: ignore[arg-type]
    assert takes_whole_batches(config, torch.device(device)) == whole
