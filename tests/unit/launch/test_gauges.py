"""What Ray's dashboard is given."""

from __future__ import annotations

from typing import Any

import pytest

from dngd.launch import gauges
from dngd.train import EvaluationRecord


def test_each_measurement_has_a_gauge_of_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: dict[tuple[str, str, str], float] = {}

    class Gauge:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            assert description
            assert tag_keys == ("run", "name")
            self.name = name

        def set(self, value: float, tags: dict[str, Any]) -> None:
            shown[self.name, tags["run"], tags["name"]] = value

    monkeypatch.setattr(gauges, "Gauge", Gauge)
    record = EvaluationRecord(1.0, 6, float("nan"), 0.5, 0.6, 0.7, 1.5)
    measurements = {"phase_ms/reduce": 3.0, "factor_health/layers.0.linear/staleness": 4.0, "dropped_steps": 1.0}
    gauges.Gauges("mine").set(record, measurements)
    assert shown["dngd_phase_ms", "mine", "reduce"] == 3.0
    assert shown["dngd_factor_health", "mine", "layers.0.linear/staleness"] == 4.0
    assert shown["dngd_dropped_steps", "mine", "dropped_steps"] == 1.0
    assert shown["dngd_evaluation", "mine", "val_accuracy"] == 0.6
    assert ("dngd_evaluation", "mine", "train_loss") not in shown, "Prometheus has no use for NaN"
