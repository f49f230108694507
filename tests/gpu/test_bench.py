"""Benchmarks that train on a GPU; run by `pytest -m gpu` on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dngd.bench import AccuracyOptions, LoopOptions, StepOptions, run_accuracy_bench, run_loop_bench, run_step_bench
from dngd.config import TrainConfig
from tests.helpers.graphs import small_store

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here"),
]

FIELDS: dict[str, Any] = {"engine": "local", "num_layers": 2, "hidden": 32, "fanout": (5, 5), "batch_size": 64}


def test_steps_are_timed_on_the_gpu(tmp_path: Path) -> None:
    store = small_store(tmp_path / "store")
    config = TrainConfig(dataset=str(store.path), use_gpu=True, model="sage", **FIELDS)
    result = run_step_bench(StepOptions(config, steps=100, warmup=2))
    assert result["machine"]["device"] == torch.cuda.get_device_name()
    for name in ("adam", "kfac"):
        of = result["optimizers"][name]
        assert 0 < of["p50_ms"] < 1000
        assert of["state_bytes"] > of["parameter_bytes"]


@pytest.mark.parametrize("batch_size", [64, "full"])
def test_curves_on_the_gpu_are_those_on_the_cpu(tmp_path: Path, batch_size: Any) -> None:
    """Off the clock there is nothing but the device between them; dropout draws differ there, so that there is none."""
    store = small_store(tmp_path / "store")
    curves = {}
    for use_gpu in (False, True):
        fields = FIELDS | {"batch_size": batch_size, "dropout": 0.0, "epochs": 2, "use_gpu": use_gpu}
        fields["fanout"] = (-1, -1) if batch_size == "full" else (5, 5)
        options = AccuracyOptions(
            TrainConfig(dataset="", **fields),
            [(str(store.path), "masks")],
            [("gcn", 2)],
            optimizers=("kfac", "adam"),
            protocol="given",
            seeds=(0,),
        )
        panel = run_accuracy_bench(options)["panels"][0]
        for label, setting in panel["settings"].items():
            assert setting["runs"][0]["train_seconds"] > 0
            curves[use_gpu, label] = setting["runs"][0]["val_loss"]
    labels = {label for _, label in curves}
    assert {label.split()[0] for label in labels} == {"kfac", "adam"}
    for label in labels:
        assert curves[True, label] == pytest.approx(curves[False, label], rel=1e-2)


@pytest.mark.parametrize("kind", ["gcn", "sage"])
def test_a_plain_loop_on_the_gpu_is_the_one_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """PyG's layers, full batch: accuracies differ by what rounding moves over a border, at most."""
    monkeypatch.setattr("dngd.bench.loop.DROPOUT", 0.0)
    store = small_store(tmp_path / "store")
    curves: dict[bool, dict[str, list[float]]] = {}
    for use_gpu in (False, True):
        options = LoopOptions([(str(store.path), "masks")], [(kind, 2)], hidden=16, steps=20, use_gpu=use_gpu)
        result = run_loop_bench(options)
        assert result["machine"]["device"] == (torch.cuda.get_device_name() if use_gpu else "cpu")
        settings = result["panels"][0]["settings"]
        curves[use_gpu] = {label: setting["runs"][0]["val_score"] for label, setting in settings.items()}
    assert len(curves[True]) == 6
    for label, curve in curves[True].items():
        assert curve == pytest.approx(curves[False][label], abs=0.03), label
        assert len(set(curve)) > 3
