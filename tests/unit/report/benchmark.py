"""A result of the accuracy benchmark, as `dngd bench accuracy --json` prints it, of curves with known answers."""

from __future__ import annotations

from typing import Any

from dngd.bench.competitors import Setting
from dngd.bench.runs import RunRecord
from dngd.bench.verdict import aggregate, judge, remarks

SETTINGS = (
    Setting("kfac", "kfac", 0.1),
    Setting("adam", "adam", 0.01, {}, "cosine, batch 512, 20 epochs"),
    Setting("adam", "adamw", 0.003, {}, "constant, batch 256, 160 epochs"),
    Setting("sgd", "sgd", 0.3, {}, "cosine, batch 512, 40 epochs"),
)


def rising(setting: Setting, seed: int, best: float, half_life: int, steps: int) -> RunRecord:
    """A run that gets half of the way to `best` in each half_life steps, a little higher with each seed."""
    at = [step for step in range(0, steps + 1, 2)]
    scores = [(best + 0.004 * seed) * (1 - 0.5 ** (step / half_life)) for step in at]
    seconds = [0.05 * step for step in at]
    data = {"seed": seed, "step": at, "seconds": seconds, "busy_seconds": seconds, "val_score": scores}
    data |= {"test_score": scores, "train_seconds": seconds[-1], "idle_seconds": 0.0}
    return RunRecord(setting.label, data)


def panel(name: str, *, kfac_best: float = 0.9, adamw_best: float = 0.905, metric: str = "accuracy") -> dict[str, Any]:
    """A graph where K-FAC is about three times as fast as Adam, unless it is given a lower best."""
    shapes = ((kfac_best, 10, 120), (0.9, 30, 300), (adamw_best, 60, 600), (0.89, 50, 400))
    runs = [rising(s, seed, *shape) for s, shape in zip(SETTINGS, shapes) for seed in range(3)]
    found: dict[str, Any] = {
        "name": name,
        "dataset": name,
        "model": "gcn",
        "num_layers": 2,
        "metric": metric,
        "graph": {"num_nodes": 2708, "num_edges": 10556, "num_classes": 7, "split": "random:0.5/0.25/0.25"},
        **judge(SETTINGS, runs, None, ["adam", "sgd"]),
    }
    return found | {"remarks": remarks(found, "kfac")}


def result(*panels: dict[str, Any]) -> dict[str, Any]:
    """The whole result."""
    return {
        "benchmark": "accuracy",
        "machine": {"cpu": "a processor", "cpus": 2, "threads": 1, "versions": {"torch": "2.13.0"}},
        "config": {"protocol": "full", "seeds": [0, 1, 2], "hidden": 256, "grid": {"rates": {"adam": [0.01]}}},
        "panels": list(panels),
        "summary": aggregate(panels, "kfac"),
    }
