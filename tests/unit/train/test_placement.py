"""Where features lie: the decision, the rows that a device keeps, and runs that train alike. The CPU plays the GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dngd
from dngd import cli
from dngd.comm import LocalCommunicator
from dngd.errors import UserError
from dngd.graph import GraphStore
from dngd.train import TrainingLoop, hot_rows, loop, make_plan, placement, prepare_run_folder
from dngd.train.hot_rows import hottest_nodes, keep_rows, least_edge_share, rows_within, source_counts
from dngd.train.placement import Placement, choose_placement, place_features
from dngd.train.progress import SilentReporter

CPU = torch.device("cpu")
GIB = 2**30


def config(**changes: Any) -> dngd.TrainConfig:
    return dngd.TrainConfig(**({"dataset": "x", "engine": "local", "use_gpu": True} | changes))


@pytest.mark.parametrize(
    ("wanted", "cache", "table", "other", "expected"),
    [
        ("auto", None, 40, 10, Placement("device", 40 * GIB)),
        ("auto", None, 50, 50, Placement("device", 50 * GIB)),
        ("auto", None, 51, 10, Placement("pinned", 25 * GIB)),
        # It would fit, but for all else that the run needs.
        ("auto", None, 40, 61, Placement("pinned", 25 * GIB)),
        ("auto", None, 60, 90, Placement("pinned", 10 * GIB)),
        ("auto", None, 60, 120, Placement("pinned", 0)),
        ("auto", 3 * GIB, 51, 10, Placement("pinned", 3 * GIB)),
        ("auto", 0, 51, 10, Placement("pinned", 0)),
        ("auto", 3 * GIB, 40, 10, Placement("device", 40 * GIB)),
        ("device", None, 50, 10, Placement("device", 50 * GIB)),
        ("pinned", None, 40, 10, Placement("pinned", 0)),
        ("pinned", None, 51, 10, Placement("pinned", 25 * GIB)),
        ("pinned", 7 * GIB, 40, 10, Placement("pinned", 7 * GIB)),
        ("disk", None, 400, 10, Placement("disk", 25 * GIB)),
        ("disk", 50 * GIB, 400, 10, Placement("disk", 50 * GIB)),
    ],
)
def test_where_a_table_goes_on_a_gpu_with_100_gib_free(
    wanted: str, cache: int | None, table: int, other: int, expected: Placement
) -> None:
    chosen = config(feature_placement=wanted, feature_cache_bytes=cache)
    assert choose_placement(chosen, table * GIB, 100 * GIB, other * GIB) == expected


def test_where_a_table_goes_without_a_gpu() -> None:
    assert choose_placement(config(use_gpu=False), 5, 0, 0) == Placement("memory_map")
    assert choose_placement(config(use_gpu=False, feature_placement="disk"), 5, 0, 0) == Placement("disk")


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match=r"takes 51.0 GiB and the GPU has 100.0 GiB free.*--feature-placement pinned"):
        choose_placement(config(feature_placement="device"), 51 * GIB, 100 * GIB, 0)
    with pytest.raises(UserError, match=r"feature_cache_bytes=\d+ is above half .* 100.0 GiB"):
        choose_placement(config(feature_placement="pinned", feature_cache_bytes=51 * GIB), 60 * GIB, 100 * GIB, 0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_gpu": False, "feature_placement": "device"}, "feature_placement=device is about a GPU"),
        ({"use_gpu": False, "feature_placement": "pinned"}, "use --feature-placement auto"),
        ({"use_gpu": False, "feature_cache_bytes": 5}, "feature_cache_bytes=5 is of no use since use_gpu is off"),
        ({"feature_placement": "device", "feature_cache_bytes": 5}, "keeps the whole table"),
        ({"feature_cache_bytes": -1}, "feature_cache_bytes=-1"),
        ({"feature_placement": "ssd"}, "'device', 'pinned' or 'disk'"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        config(**changes)
    assert words in str(caught.value)


def test_the_command_line_refuses_before_it_reads_anything(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["train", "--dataset", "x", "--engine", "local", "--feature-placement", "pinned"])
    assert exit_info.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("dngd: feature_placement=pinned is about a GPU but use_gpu is off")
    assert said.count("\n") == 1


def test_the_plan_tells_the_tables_bytes(store: GraphStore) -> None:
    plan = make_plan(config(dataset=str(store.path), batch_size=50), store, store.split("masks"))
    assert plan.feature_bytes == store.num_nodes * store.num_features * 4
    others = plan.full_batch_bytes + max(plan.activation_bytes, plan.evaluation_bytes)
    assert plan.gpu_bytes == plan.model_bytes + plan.optimizer_bytes + plan.curvature_bytes + others
    assert plan.to_json()["feature_bytes"] == plan.feature_bytes


# --- the rows that a device keeps


@settings(max_examples=30, deadline=None)
@given(sources=st.lists(st.integers(0, 9), max_size=40), at_a_time=st.integers(1, 7))
def test_sources_are_counted_in_blocks(sources: list[int], at_a_time: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hot_rows, "EDGES_AT_A_TIME", at_a_time)
        counts = source_counts(torch.tensor(sources, dtype=torch.int64), 10)
    assert counts.tolist() == [sources.count(node) for node in range(10)]


def test_the_hottest_are_the_most_frequent_sources(store: GraphStore) -> None:
    counts = source_counts(store.indices, store.num_nodes)
    for number in (0, 1, 50, store.num_nodes):
        hottest = hottest_nodes(store, number)
        assert hottest.nodes.tolist() == sorted(set(hottest.nodes.tolist()))
        chosen = counts[hottest.nodes].sort().values
        assert torch.equal(chosen, counts.sort().values[store.num_nodes - number :])
        assert hottest.edge_share == pytest.approx(float(chosen.sum()) / store.num_edges)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_rows_are_the_tables(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hot_rows, "COPIED_BYTES", 64)
    features = torch.randn(20, 5).to(dtype)
    nodes = torch.tensor([0, 3, 4, 9, 10, 11, 19])
    kept = keep_rows(features, nodes, CPU)
    assert kept.num_rows == 7
    assert torch.equal(kept.table[:-1], features[nodes])
    assert kept.table[-1].tolist() == [0.0] * 5
    expected = [nodes.tolist().index(node) if node in nodes else 7 for node in range(20)]
    assert kept.positions.tolist() == expected
    assert kept.on_host.tolist() == [node not in nodes.tolist() for node in range(20)]


@pytest.mark.parametrize("num_bytes", [0, 80, 119, 120, 200, 10_000])
def test_a_cache_keeps_to_its_bytes(num_bytes: int) -> None:
    features = torch.randn(20, 5)
    rows = rows_within(num_bytes, features)
    assert 0 <= rows <= 20

    def size(count: int) -> int:
        kept = keep_rows(features, torch.arange(count), CPU)
        return kept.table.numel() * 4 + kept.positions.numel() * 4

    assert rows == 0 or size(rows) <= num_bytes
    assert rows == 20 or size(rows + 1) > num_bytes


def test_wide_rows_pay_earlier_and_those_on_a_disk_always() -> None:
    narrow, wide = torch.empty(0, 100), torch.empty(0, 1000)
    assert least_edge_share(narrow, on_disk=False) == pytest.approx(0.35)
    assert least_edge_share(wide, on_disk=False) == pytest.approx(0.035)
    assert least_edge_share(torch.empty(0, 3), on_disk=False) == 1.0
    assert least_edge_share(narrow, on_disk=True) == 0.0


# --- placing


def test_on_the_device_the_table_is_there_and_nothing_is_cached(store: GraphStore) -> None:
    placed = place_features(store, Placement("device", 1), CPU, sampled=True)
    assert (placed.where, placed.cache, placed.on_host) == ("device", None, False)
    assert torch.equal(placed.table, store.features)
    assert "on the GPU" in placed.note


def test_a_cache_is_made_where_it_pays(store: GraphStore, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 4 * store.num_nodes + store.num_features * 4 * 101
    # Rows of 64 bytes: telling them apart costs more than reading them.
    small = place_features(store, Placement("pinned", size), CPU, sampled=True)
    assert small.cache is None
    on_disk = place_features(store, Placement("disk", size), CPU, sampled=True)
    assert on_disk.cache is not None
    assert on_disk.cache.num_rows == 100
    assert on_disk.table is store.features
    share = hottest_nodes(store, 100).edge_share
    assert f"100 rows on the GPU, which {100 * share:.0f} % of the edges come from" in on_disk.note
    monkeypatch.setattr(hot_rows, "SPLIT_BYTES", 64 * share * 0.99)
    assert place_features(store, Placement("pinned", size), CPU, sampled=True).cache is not None
    assert place_features(store, Placement("pinned", size), CPU, sampled=False).cache is None
    assert place_features(store, Placement("pinned", 0), CPU, sampled=True).cache is None
    assert place_features(store, Placement("memory_map", size), CPU, sampled=True) == placement.PlacedFeatures(
        "memory_map", store.features
    )


def curve(store: GraphStore, run_dir: Path, **changes: Any) -> tuple[list[float], TrainingLoop]:
    fields: dict[str, Any] = {
        "dataset": str(store.path),
        "engine": "local",
        "num_layers": 2,
        "fanout": (5, 5),
        "hidden": 16,
        "batch_size": 60,
        "epochs": 2,
        "num_samplers": 0,
        "optimizer": "adam",
        "run_dir": run_dir,
    }
    made = TrainingLoop(
        prepare_run_folder(dngd.TrainConfig(**(fields | changes))), LocalCommunicator(), SilentReporter()
    )
    made.run()
    return [value for r in made.history for value in (r.train_loss, r.val_loss)], made


@pytest.mark.parametrize("model", ["gcn", "sage"])
def test_runs_train_alike_wherever_the_features_lie(
    store: GraphStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    """The whole table, part of it and nothing of it kept by a device that the CPU plays."""
    expected, _ = curve(store, tmp_path / "plain", model=model)
    on_disk, made = curve(store, tmp_path / "disk", model=model, feature_placement="disk")
    assert made.placed.where == "disk"
    assert on_disk == expected
    monkeypatch.setattr(hot_rows, "SPLIT_BYTES", 0)
    half = 4 * store.num_nodes + store.num_features * 4 * (store.num_nodes // 2)
    for placed in (Placement("device", 1), Placement("pinned", 0), Placement("pinned", half), Placement("disk", 10**9)):
        monkeypatch.setattr(loop, "choose_placement", lambda *_, placed=placed: placed)
        got, made = curve(store, tmp_path / f"{placed.where}-{placed.device_bytes}", model=model)
        assert made.placed.where == placed.where
        assert (made.placed.cache is not None) == (placed.device_bytes > 1)
        assert got == pytest.approx(expected, rel=1e-3)
