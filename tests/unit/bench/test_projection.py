"""Predictions for many GPUs: by hand where they can be, bounds where they cannot, and inputs that are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dngd.bench.projection import (
    GPUS,
    Compute,
    LayerWork,
    Machines,
    Traffic,
    adam_step,
    all_reduce_seconds,
    broadcast_seconds,
    busiest_share,
    kfac_steps,
    parse_compute,
    project,
    traffic_of,
)
from dngd.config import TrainConfig
from dngd.errors import UserError

COMPUTE = Compute("a test", step=0.02, statistics=1e-3, precondition=2e-3, inversion=0.05)
MACHINES = Machines(
    gpus_per_host=8, host_bytes_per_second=1e10, gpu_bytes_per_second=1e11, latency_seconds=1e-5, efficiency=1.0
)
LAYERS = (LayerWork("a", {"A": 3.0, "G": 1.0}, 6.0), LayerWork("b", {"A": 2.0, "G": 2.0}, 2.0))
TRAFFIC = Traffic(gradient_bytes=4e6, factor_bytes=2e6, inverse_bytes=1e6, layers=LAYERS, period=10)


def test_an_all_reduce_takes_the_shorter_of_ring_and_tree() -> None:
    # 16 GPUs on 2 hosts, 4 MB at 10 GB/s. Ring: 30 rounds and 7.5 MB; tree: 8 rounds and 8 MB.
    assert all_reduce_seconds(4e6, 16, MACHINES) == pytest.approx(8e-5 + 8e6 / 1e10)
    # Long buffers: the ring's bytes are fewer.
    assert all_reduce_seconds(4e9, 16, MACHINES) == pytest.approx(30e-5 + 7.5e9 / 1e10)
    # On one host by its own links: ring of 8, 14 rounds and 7 MB; tree 6 rounds and 8 MB.
    assert all_reduce_seconds(4e6, 8, MACHINES) == pytest.approx(6e-5 + 8e6 / 1e11)
    assert all_reduce_seconds(4e6, 1, MACHINES) == 0
    assert broadcast_seconds(4e6, 2, 16, MACHINES) == pytest.approx(8e-5 + 4e6 / 1e10)
    assert broadcast_seconds(4e6, 2, 1, MACHINES) == 0


def test_one_gpu_has_no_network_and_all_of_the_work() -> None:
    assert adam_step(TRAFFIC, COMPUTE, 1, MACHINES) == COMPUTE.step
    alone = 0.02 + 1e-3 + 2e-3 + 0.05 / 10
    assert kfac_steps(TRAFFIC, COMPUTE, 1, MACHINES) == pytest.approx(dict.fromkeys(_NAMES, alone))


_NAMES = ("replicate", "share_inverse", "share_gradient")


def test_strategies_by_hand() -> None:
    machines = replace(MACHINES, latency_seconds=0.0)
    found = kfac_steps(TRAFFIC, COMPUTE, 2, machines)
    # Two GPUs of a host, ring: B bytes a link at 100 GB/s. Of inversion costs 3, 1, 2, 2 the busiest rank has 4 of 8;
    # of the layers' own, 4 and 4, one each; of preconditioning 6 and 2, the busiest has 6 of 8.
    base = 0.02 + 4e6 / 1e11 + 1e-3
    assert found == pytest.approx(
        {
            "replicate": base + 2e-3 + (2e6 / 1e11 + 0.05) / 10,
            "share_inverse": base + 2e-3 + (2e6 / 1e11 + 0.025 + 1e6 / 1e11) / 10,
            "share_gradient": base + 1.5e-3 + 4e6 / 1e11 + (2e6 / 1e11 + 0.025) / 10,
        }
    )


def test_work_that_cannot_be_divided_evenly_takes_as_long_as_the_busiest_rank() -> None:
    free = replace(MACHINES, latency_seconds=0.0, gpu_bytes_per_second=1e30)
    found = kfac_steps(TRAFFIC, COMPUTE, 4, free)
    # Of inversions 3, 1, 2, 2 on four ranks the busiest has 3 of 8; of two layers of 4 and 4 one; of 6 and 2 the 6.
    assert found["share_inverse"] == pytest.approx(0.02 + 1e-3 + 2e-3 + 0.05 * 3 / 8 / 10)
    assert found["share_gradient"] == pytest.approx(0.02 + 1e-3 + 2e-3 * 6 / 8 + 0.05 / 2 / 10)
    assert found["replicate"] == pytest.approx(0.02 + 1e-3 + 2e-3 + 0.05 / 10)


@given(st.integers(1, 64))
def test_the_busiest_rank_has_at_least_an_even_share_and_the_largest_factor(ranks: int) -> None:
    costs = {(layer.name, which): cost for layer in LAYERS for which, cost in layer.costs.items()}
    share = busiest_share(costs, ranks)
    assert share >= max(1 / ranks, 3 / 8) - 1e-12
    assert (ranks < 4) or share == pytest.approx(3 / 8)
    assert busiest_share(costs, 1) == 1


def test_bytes_are_the_plans_of_dngd() -> None:
    config = TrainConfig(dataset="any", model="sage", hidden=256, engine="local")
    traffic = traffic_of(config, num_features=100, num_classes=47)
    # Three layers of SAGE: rows [self, neighbour, 1].
    parameters = 201 * 256 + 513 * 256 + 513 * 47
    assert traffic.gradient_bytes == 4 * (parameters + 3)
    assert [layer.name for layer in traffic.layers] == ["layers.0.linear", "layers.1.linear", "layers.2.linear"]
    # Blocks of 256 and 257 cost what they do by themselves.
    assert traffic.layers[1].costs == {"A": 256.0**3 + 257.0**3, "G": 256.0**3}
    # Triangles: well below the whole matrices, 4 Σ d².
    matrices = 4 * (100**2 + 101**2 + 2 * (256**2 + 257**2) + 2 * 256**2 + 47**2)
    assert 0 < traffic.inverse_bytes < 0.51 * matrices
    assert 0 < traffic.factor_bytes < 0.51 * matrices
    assert traffic_of(config, 128, 172).gradient_bytes > traffic.gradient_bytes


def test_predictions_are_labelled_and_lose_efficiency_with_gpus() -> None:
    config = TrainConfig(dataset="any", model="sage", hidden=64, engine="local")
    found = project(config, COMPUTE, MACHINES)
    assert found["label"] == "a model, not a measurement"
    assert found["compute"]["source"] == "a test"
    assert set(found["shapes"]) == {"ogbn-products", "ogbn-papers100m"}
    for shape in found["shapes"].values():
        rows = shape["rows"]
        assert [row["gpus"] for row in rows] == list(GPUS)
        assert [row["hosts"] for row in rows] == [1, 2, 4, 8, 16, 32, 64]
        for row in rows:
            assert row["kfac_step_ms"][row["best_strategy"]] == min(row["kfac_step_ms"].values())
            assert row["fits_training_set"] == (row["seeds_a_step"] <= shape["num_train"])
            assert 0 < row["adam_efficiency"] <= 1
        for name in ("adam_efficiency", "seeds_a_step"):
            values = [row[name] for row in rows]
            assert values == sorted(values, reverse=name == "adam_efficiency")
    # 512 x 1024 seeds are more than ogbn-products has.
    assert not found["shapes"]["ogbn-products"]["rows"][-1]["fits_training_set"]
    assert found["shapes"]["ogbn-papers100m"]["rows"][-1]["fits_training_set"]


def test_compute_is_read_from_text_and_from_a_file(tmp_path: Path) -> None:
    text = "step_ms=20,statistics_ms=0.4,precondition_ms=0.5,inversion_ms=9"
    assert parse_compute(text) == Compute("given by the user", 0.02, 0.4e-3, 0.5e-3, 9e-3)
    path = tmp_path / "gpu.json"
    fields = {"step_ms": 20, "statistics_ms": 0.4, "precondition_ms": 0.5, "inversion_ms": 9, "source": "one H100"}
    path.write_text(json.dumps(fields))
    assert parse_compute(str(path)) == replace(parse_compute(text), source="one H100")
    path.write_text("[1]")
    for bad in (
        text + ",x=1",
        "step_ms=20",
        text.replace("20", "0"),
        text.replace("9", "-9"),
        text.replace("9", "fast"),
        str(path),
        str(tmp_path / "none.json"),
    ):
        with pytest.raises(UserError, match="--compute"):
            parse_compute(bad)
