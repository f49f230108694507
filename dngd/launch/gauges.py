"""A run's measurements as gauges of Ray, which its dashboard's metrics and Prometheus show beside the machines' own.

Prometheus has them as `ray_dngd_GROUP`: Ray puts its prefix before every name. cluster/README.md lists them, and
cluster/grafana-dashboard.json shows them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ray.util.metrics import Gauge

from dngd.train import EvaluationRecord

DESCRIPTIONS = {
    "evaluation": "the last evaluation: losses, accuracies, step, training seconds",
    "step_ms": "milliseconds of a step",
    "phase_ms": "mean milliseconds of a step's phase",
    "bytes": "payload handed to collectives, by kind, since the worker started",
    "factor_health": "staleness, conditioning and damping of the factors, LAYER/MEASURE",
    "dropped_steps": "steps with gradients that were not finite",
}


class Gauges:
    """Sets `dngd_GROUP{run, name}` for a measurement called GROUP/NAME; a measurement that is not finite is left out.

    run: tells several runs on a cluster apart.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauges: dict[str, Any] = {}

    def set(self, record: EvaluationRecord, measurements: Mapping[str, float]) -> None:
        """Show an evaluation and what was measured with it."""
        evaluation = {f"evaluation/{name}": value for name, value in asdict(record).items()}
        for full_name, value in (evaluation | dict(measurements)).items():
            group, _, name = full_name.partition("/")
            if not math.isfinite(value):
                continue
            if group not in self._gauges:
                self._gauges[group] = Gauge(f"dngd_{group}", DESCRIPTIONS.get(group, ""), ("run", "name"))
            self._gauges[group].set(value, {"run": self._run, "name": name or group})
