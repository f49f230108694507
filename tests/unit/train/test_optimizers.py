"""What the configured optimizer is made with where settings are left open."""

from __future__ import annotations

import pytest
from torch import nn

from dngd.comm import LocalCommunicator
from dngd.config import TrainConfig
from dngd.optim import value_at
from dngd.train.optimizers import build_optimizer, damping_in_use, kl_clip_in_use


def kfac(**settings: object) -> TrainConfig:
    return TrainConfig(dataset="products-mini", kfac=settings)


@pytest.mark.parametrize(
    ("settings", "num_nodes", "expected"),
    [
        ({}, 2500, 2e-3),
        ({}, 250000, 2e-4),
        ({}, None, 1e-3),
        ({"damping": 0.05}, 2500, 0.05),
        ({"damping_mode": "tikhonov"}, 2500, 1e-2),
    ],
)
def test_damping(settings: dict[str, object], num_nodes: int | None, expected: float) -> None:
    assert damping_in_use(kfac(**settings).kfac, num_nodes) == pytest.approx(expected)


def test_optimizer_takes_the_damping_of_its_training_set_and_a_falling_clip() -> None:
    optimizer = build_optimizer(kfac(), nn.Linear(3, 2), LocalCommunicator(), num_training_nodes=2500)
    pre = optimizer.preconditioner
    assert pre is not None
    assert pre.kl_clip is not None
    assert value_at(pre.damping, 0) == pytest.approx(2e-3)
    assert [value_at(pre.kl_clip, step) for step in (0, 10, 30)] == pytest.approx([3e-2, 1.5e-2, 7.5e-3])
    assert optimizer.torch_optimizer.param_groups[0]["momentum"] == 0.8
    pre.close()


@pytest.mark.parametrize(
    ("batch_size", "expected"), [(1, "empirical"), (1024, "empirical"), (1025, "monte_carlo"), ("full", "monte_carlo")]
)
def test_fisher_depends_on_how_many_seeds_share_nodes(batch_size: object, expected: str) -> None:
    config = TrainConfig(dataset="products-mini", batch_size=batch_size)
    assert config.fisher == expected
    assert config.identity()["kfac.fisher"] == expected


def test_clip_that_stays_and_none() -> None:
    assert kl_clip_in_use(kfac(kl_clip=0.5, kl_clip_steps=None).kfac) == 0.5
    assert kl_clip_in_use(kfac(kl_clip=None).kfac) is None


def test_adam_in_the_eigenbasis_keeps_its_momentum() -> None:
    optimizer = build_optimizer(
        kfac(update="adam_eigenbasis"), nn.Linear(3, 2), LocalCommunicator(), num_training_nodes=2500
    )
    assert optimizer.torch_optimizer.param_groups[0]["momentum"] == 0.9
    assert optimizer.preconditioner is not None
    optimizer.preconditioner.close()
