"""Where evaluations go: CSV always; TensorBoard, MLflow and W&B without a network, where they are installed."""

from __future__ import annotations

import csv
import json
import math
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import dngd
from dngd.errors import UserError
from dngd.graph import GraphStore
from dngd.train import loggers
from tests.end_to_end.test_local_runs import config

pytestmark = pytest.mark.usefixtures("one_thread")


def run_in_two_parts(store: GraphStore, run: Path, **changes: Any) -> list[dngd.train.EvaluationRecord]:
    """Train two epochs, then go on with a third; return the evaluations."""
    fields = config(store, run, optimizer="adam", lr=0.01, metric="macro_f1", **changes)
    dngd.Trainer(fields.model_copy(update={"epochs": 2}), quiet=True).fit()
    return dngd.Trainer(fields.model_copy(update={"resume": True}), quiet=True).fit().history


def test_csv_is_metrics_jsonl_as_a_table(store: GraphStore, tmp_path: Path) -> None:
    history = run_in_two_parts(store, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    rows = list(csv.DictReader((tmp_path / "run/metrics.csv").open()))
    assert len(rows) == len(history) == 3
    for row, line in zip(rows, lines):
        assert {name: float(value) for name, value in row.items()} == {k: v for k, v in line.items() if k != "metric"}


def test_values_that_are_not_finite_are_left_empty(tmp_path: Path) -> None:
    record = dngd.train.EvaluationRecord(1.0, 3, math.nan, 0.5, 0.5, 0.25, 1.0)
    state: Any = type("State", (), {"run_dir": tmp_path, "history": [record], "metric": "accuracy"})()
    loggers.CSVLogger().on_start(state)
    assert (tmp_path / "metrics.csv").read_text().splitlines()[1] == "1.0,3,,0.5,0.5,0.25,1.0"
    assert "train/loss" not in loggers.named_values(state, record)


def test_tensorboard(store: GraphStore, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    history = run_in_two_parts(store, tmp_path / "run", loggers=("tensorboard",), batch_size=20)
    written = EventAccumulator(str(tmp_path / "run/tensorboard"))
    written.Reload()
    shown = [(event.step, event.value) for event in written.Scalars("val/macro_f1")]
    assert shown == [(r.step, pytest.approx(r.val_accuracy)) for r in history]
    assert [event.step for event in written.Scalars("step/loss")] == list(range(10, history[-1].step + 1, 10))


def test_mlflow(store: GraphStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = tmp_path / "run"
    history = run_in_two_parts(store, run, loggers=("mlflow",))
    client = MlflowClient(tracking_uri=f"sqlite:///{run / 'mlflow.db'}")
    (found,) = client.search_runs([client.get_experiment_by_name("dngd").experiment_id])
    values = [(m.step, m.value) for m in client.get_metric_history(found.info.run_id, "val/macro_f1")]
    assert values == [(r.step, pytest.approx(r.val_accuracy)) for r in history]
    assert found.info.status == "FINISHED"
    assert (found.data.params["optimizer"], found.data.params["kfac.damping"]) == ("adam", "0.01")


def test_a_server_of_mlflow_that_is_away_is_soon_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str]] = []
    names = ("MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES")

    def client(tracking_uri: str) -> None:
        seen.append((os.environ[names[0]], os.environ[names[1]]))
        raise OSError("no server")

    tracking: Any = types.ModuleType("mlflow.tracking")
    tracking.MlflowClient = client
    monkeypatch.setitem(sys.modules, "mlflow", types.ModuleType("mlflow"))
    monkeypatch.setitem(sys.modules, "mlflow.tracking", tracking)
    state: Any = type("State", (), {"run_dir": tmp_path})()
    for given in ({}, {names[0]: "60"}):
        environment = {name: value for name, value in os.environ.items() if name not in names} | given
        monkeypatch.setattr(os, "environ", environment)
        with pytest.raises(OSError, match="no server"):
            loggers.MLflowLogger().on_start(state)
    assert seen == [("10", "1"), ("60", "1")]


def test_wandb(store: GraphStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    history = run_in_two_parts(store, run, loggers=("wandb",))
    stored = sorted(run.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(stored) == 2, "a run, and what was added when it was resumed"
    assert len({path.stem for path in stored}) == 1, "both of one identity"
    values = [row for path in stored for row in wandb_rows(path) if "val/macro_f1" in row]
    assert [row["step"] for row in values] == [r.step for r in history]
    assert [row["val/macro_f1"] for row in values] == [pytest.approx(r.val_accuracy) for r in history]


def wandb_rows(path: Path) -> list[dict[str, float]]:
    """The rows that were logged, from the file that `wandb sync` would send."""
    from wandb.proto import wandb_internal_pb2

    rows = []
    for data in log_records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def log_records(data: bytes) -> list[bytes]:
    """LevelDB's log format behind a header of 7 bytes: blocks of 32 KiB, of (crc, length, kind) and data."""
    block, place, parts, records = 32768, 7, b"", []
    while place + 7 <= len(data):
        if block - place % block < 7:
            place += block - place % block
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(parts)
            parts = b""
    return records


def test_a_package_that_is_not_installed_is_told_before_anything_is_made(
    store: GraphStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"logger wandb needs a package .* pip install 'dngd\[wandb\]'"):
        dngd.Trainer(config(store, tmp_path / "run", loggers=("wandb",)), quiet=True).fit()
    assert not (tmp_path / "run").exists()
