"""A learner's step, its state, and what it asks of its optimizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dngd.bench.learner import Batch, Learner, initial_model
from dngd.bench.optimizers import KNOWN, base_rate, tensor_bytes
from dngd.config import TrainConfig
from dngd.graph import GraphStore
from dngd.sampling import SamplerPipeline
from dngd.train.batch import PropagationBuilder

CONFIG = TrainConfig(
    dataset="small", model="sage", num_layers=2, hidden=8, fanout=(4, 4), batch_size=32, engine="local"
)


@pytest.fixture(scope="module")
def batches(store: GraphStore) -> list[Batch]:
    train = store.split("masks").train
    with SamplerPipeline(store, train, CONFIG.fanouts, 0, 1, 32, [0], num_samplers=0) as pipeline:
        drawn = [next(pipeline) for _ in range(3)]
    return [Batch(mini_batch, mini_batch.coordinates) for mini_batch in drawn]


def learner(name: str, store: GraphStore) -> Learner:
    if name in ("soap", "shampoo"):
        pytest.importorskip("pytorch_optimizer")
    if name == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("torch has no Muon")
    model = initial_model(CONFIG, store)
    builder = PropagationBuilder(store, model.aggregation, torch.device("cpu"))
    return Learner(name, CONFIG, base_rate(name, CONFIG), model, store.features, builder)


@pytest.mark.parametrize("name", KNOWN)
def test_every_optimizer_trains_every_parameter_and_holds_state(
    name: str, store: GraphStore, batches: list[Batch]
) -> None:
    one = learner(name, store)
    before = [p.detach().clone() for p in one.model.parameters()]
    for batch in batches:
        assert one.step(batch, one.lr, alone=True).finite
    changed = [not torch.equal(p, old) for p, old in zip(one.model.parameters(), before)]
    assert all(changed)
    assert len(one.clock.step_seconds) == 3
    assert {"zero", "forward", "backward", "reduce", "optimizer"} <= set(one.clock.phase_ms())
    assert bool(one.kfac_phase_ms()) == (name == "kfac")
    # SOAP and Shampoo hold matrices besides the moments, K-FAC factors and inverses.
    at_least = {"sgd": 1, "muon": 1, "adam": 2, "adamw": 2}.get(name, 3) * one.parameter_bytes
    assert one.competitor.state_bytes() >= at_least
    assert one.competitor.settings()
    one.close()


def test_adams_state_is_two_moments_and_a_count_a_tensor(store: GraphStore, batches: list[Batch]) -> None:
    adam = learner("adam", store)
    adam.step(batches[0], adam.lr, alone=True)
    assert adam.competitor.state_bytes() == 2 * adam.parameter_bytes + 4 * len(list(adam.model.parameters()))


def test_equal_learners_stay_equal_whatever_steps_between(store: GraphStore, batches: list[Batch]) -> None:
    """Same initial weights, same dropout for the same batch: turns of others change nothing."""
    one, two, other = (learner("sgd", store) for _ in range(3))
    for batch in batches:
        one.step(batch, 0.1, alone=True)
        other.step(batch, 0.5, alone=True)
        torch.rand(5)
        two.step(batch, 0.1, alone=True)
    for a, b, c in zip(one.model.parameters(), two.model.parameters(), other.model.parameters()):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


def test_outputs_are_shown_to_an_optimizer_that_observes(
    store: GraphStore, batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[torch.Size, int, float]] = []
    one = learner("adam", store)

    def observe(logits: torch.Tensor, *, key: int, **_: Any) -> None:
        gradient = next(one.model.parameters()).grad
        assert gradient is not None
        seen.append((logits.shape, key, float(gradient.abs().sum())))

    monkeypatch.setattr(one.competitor.step_optimizer, "observe", observe, raising=False)
    one.step(batches[0], one.lr, alone=True)
    one.step(batches[1], one.lr, alone=True)
    assert seen == [(torch.Size([32, store.num_classes]), 0, 0.0)] * 2


def test_tensor_bytes_counts_each_tensor_once() -> None:
    a, b = torch.zeros(10), torch.zeros(3, dtype=torch.float64)
    assert tensor_bytes({"x": a, "y": [a, (b, 3, "text")]}) == 40 + 24
    assert tensor_bytes([a, b], exclude=[a]) == 24
