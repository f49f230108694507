"""How many samplers feed a GPU where that is left open."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import dngd
from dngd import limits
from dngd.doctor import diagnose
from dngd.graph import GraphStore
from dngd.train import plan
from dngd.train.plan import CPUS_OF_TRAINING, MOST_SAMPLERS, RunPlan, make_plan, with_samplers


def config(store: GraphStore, **fields: Any) -> dngd.TrainConfig:
    return dngd.TrainConfig(**({"dataset": str(store.path), "use_gpu": True, "batch_size": 60} | fields))


def samplers(store: GraphStore, workers: int = 1, **fields: Any) -> int:
    given = config(store, **fields)
    planned, chosen = with_samplers(make_plan(given, store, store.split("masks")), given, workers)
    assert planned.samplers == (0 if given.constant_full_batch else chosen.samplers)
    return planned.samplers


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
    store: GraphStore, monkeypatch: pytest.MonkeyPatch, cpus: int, workers: int, expected: int
) -> None:
    monkeypatch.setattr(plan, "usable_cpus", lambda: cpus)
    monkeypatch.setattr(plan, "available_memory", lambda: 1 << 50)
    assert samplers(store, workers) == expected


@pytest.mark.parametrize(("reserved", "expected"), [(1.0, MOST_SAMPLERS), (6.0, 4), (100.0, MOST_SAMPLERS)])
def test_what_ray_reserves_bounds_them(
    store: GraphStore, monkeypatch: pytest.MonkeyPatch, reserved: float, expected: int
) -> None:
    """One CPU is what nobody asked for."""
    monkeypatch.setattr(plan, "usable_cpus", lambda: 64)
    monkeypatch.setattr(plan, "available_memory", lambda: 1 << 50)
    assert samplers(store, engine="ray", ray={"cpus_per_worker": reserved}) == expected


def test_memory_bounds_them_slots_included(store: GraphStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "usable_cpus", lambda: 64)
    one = make_plan(config(store, num_samplers=1), store, store.split("masks"))
    each = one.sampler_bytes - plan.PROCESS_BYTES
    assert each > plan.SAMPLER_BYTES
    three = plan.PROCESS_BYTES + 3 * each
    monkeypatch.setattr(plan, "available_memory", lambda: 4 * 2 * three)
    assert samplers(store, 2) == 3
    monkeypatch.setattr(plan, "available_memory", lambda: 4 * 2 * three - 1)
    assert samplers(store, 2) == 2
    monkeypatch.setattr(plan, "available_memory", lambda: 0)
    assert samplers(store, 2) == 1


def test_the_plan_tells_what_they_take(store: GraphStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "usable_cpus", lambda: 7)
    monkeypatch.setattr(plan, "available_memory", lambda: 1 << 50)
    given = config(store)
    before: RunPlan = make_plan(given, store, store.split("masks"))
    after, _ = with_samplers(before, given)
    each = (before.sampler_bytes - plan.PROCESS_BYTES) // before.samplers
    assert after == replace(before, samplers=5, sampler_bytes=plan.PROCESS_BYTES + 5 * each)


def test_what_was_said_stays_and_a_cpu_has_its_thread(store: GraphStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "usable_cpus", lambda: 64)
    assert samplers(store, num_samplers=3) == 3
    assert samplers(store, num_samplers=0) == 0
    assert samplers(store, use_gpu=False) == 0
    assert samplers(store, batch_size="full") == 0


@pytest.mark.parametrize(
    ("content", "expected"), [("400000 100000", 4), ("50000 100000", 1), ("max 100000", 64), ("", 64), (None, 64)]
)
def test_a_containers_quota_is_no_more_cpus_than_it_pays_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None, expected: int
) -> None:
    file = tmp_path / "cpu.max"
    if content is not None:
        file.write_text(content)
    monkeypatch.setattr(limits, "CPU_MAX", file)
    monkeypatch.setattr(limits.os, "sched_getaffinity", lambda pid: set(range(64)))
    assert limits.usable_cpus() == expected
    assert [one.found for one in diagnose().findings if one.name == "CPU cores"] == [str(expected)]
