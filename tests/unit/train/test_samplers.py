"""How many samplers feed a GPU where that is left open."""

from __future__ import annotations

from typing import Any

import pytest

import dngd
from dngd.train import plan
from dngd.train.plan import CPUS_OF_TRAINING, MOST_SAMPLERS, PROCESS_BYTES, with_samplers


def config(**fields: Any) -> dngd.TrainConfig:
    return dngd.TrainConfig(**({"dataset": "cora", "use_gpu": True} | fields))


@pytest.mark.parametrize(
    ("cpus", "workers", "expected"),
    [
        (64, 1, MOST_SAMPLERS),
        (64, 8, 64 // 8 - CPUS_OF_TRAINING),
        (16, 1, MOST_SAMPLERS),
        (8, 1, 6),
        (4, 1, 2),
        (2, 1, 1),
        (4, 8, 1),
    ],
)
def test_each_worker_has_its_share_of_the_cpus(
    monkeypatch: pytest.MonkeyPatch, cpus: int, workers: int, expected: int
) -> None:
    monkeypatch.setattr(plan, "usable_cpus", lambda: cpus)
    monkeypatch.setattr(plan, "available_memory", lambda: 1 << 40)
    assert with_samplers(config(), workers).samplers == expected


def test_memory_bounds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "usable_cpus", lambda: 64)
    monkeypatch.setattr(plan, "available_memory", lambda: 4 * 2 * 3 * PROCESS_BYTES)
    assert with_samplers(config(), 2).samplers == 3
    monkeypatch.setattr(plan, "available_memory", lambda: 0)
    assert with_samplers(config(), 2).samplers == 1


def test_what_was_said_stays_and_a_cpu_has_its_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "usable_cpus", lambda: 64)
    assert with_samplers(config(num_samplers=3)).samplers == 3
    assert with_samplers(config(num_samplers=0)).samplers == 0
    assert with_samplers(config(use_gpu=False)).samplers == 0
