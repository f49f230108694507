"""The Grafana dashboard shows what runs export, by the names that Prometheus has; and the README lists those."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.request
from dataclasses import fields
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch

from dngd.launch.gauges import DESCRIPTIONS
from dngd.optim import KFACPreconditioner
from dngd.train import EvaluationRecord
from dngd.train.metrics import StepClock
from tests.helpers.ray_cluster import Cluster

CLUSTER = Path(__file__).parents[3] / "cluster"
DASHBOARD: dict[str, Any] = json.loads((CLUSTER / "grafana-dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]

EXPORTED = {f"ray_dngd_{group}" for group in DESCRIPTIONS}
"""What Ray makes of dngd's names; test_names_as_prometheus_has_them looks."""


def measured() -> dict[str, set[str]]:
    """The `name` labels of each metric whose names are known before a run."""
    model = torch.nn.Linear(2, 2)
    health = KFACPreconditioner(model).health()
    clock = StepClock()
    clock.step_seconds.append(1.0)
    return {
        "ray_dngd_evaluation": {field.name for field in fields(EvaluationRecord)},
        "ray_dngd_step_ms": set(clock.step_ms()),
        "ray_dngd_factor_health": {f"layer/{name}" for values in health.values() for name in values},
    }


def test_panels_show_exported_metrics_and_all_of_them() -> None:
    used = {name for query in QUERIES for name in re.findall(r"\b(?:ray_)?dngd_\w+", query)}
    assert used == EXPORTED
    variables = DASHBOARD["templating"]["list"]
    assert re.findall(r"ray_\w+", json.dumps(variables[1]["query"])) == ["ray_dngd_evaluation"]


@pytest.mark.parametrize("query", QUERIES)
def test_queries(query: str) -> None:
    """A metric, the chosen runs, and names that runs have: each alternative of a pattern matches one."""
    form = re.fullmatch(r'(ray_dngd_\w+)\{run=~"\$run"(?:, name=~"(.+)")?\}', query)
    assert form is not None
    metric, names = form.groups()
    if names is None:
        return
    known = measured()[metric]
    for alternative in alternatives(names):
        assert any(re.fullmatch(alternative, name) for name in known), alternative


def alternatives(pattern: str) -> list[str]:
    """Return `a` and `b` for `a|b`, `xa` and `xb` for `x(a|b)`."""
    parts = re.split(r"\(([^)]*)\)", pattern)  # every other one stood in parentheses
    if len(parts) == 1:
        return pattern.split("|")
    return ["".join(chosen) for chosen in product(*(p.split("|") if i % 2 else [p] for i, p in enumerate(parts)))]


def test_panels_lie_side_by_side_and_read_from_the_chosen_source() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    cells: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        own = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert max(x for x, _ in own) < 24
        assert not own & cells, panel["title"]
        cells |= own
    rows = sorted({y for _, y in cells})
    assert all(below - above == 1 for above, below in pairwise(rows)), "no gaps"
    for panel in PANELS:
        assert panel["description"]
        sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
        assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)


def test_the_readme_lists_the_metrics() -> None:
    listed = set(re.findall(r"^\| `(ray_dngd_\w+)` \|", (CLUSTER / "README.md").read_text(), flags=re.MULTILINE))
    assert listed == EXPORTED


SET = """
import sys
import ray
from dngd.launch.gauges import DESCRIPTIONS, Gauges
from dngd.train import EvaluationRecord
ray.init(address=sys.argv[1], log_to_driver=False)
measurements = {f"{group}/x": 1.5 for group in DESCRIPTIONS if group not in ("evaluation", "dropped_steps")}
Gauges("mine").set(EvaluationRecord(1.0, 6, 0.4, 0.5, 0.6, 0.7, 1.5), measurements | {"dropped_steps": 2.0})
print([node["MetricsExportPort"] for node in ray.nodes() if node["Alive"]][0], flush=True)
sys.stdin.readline()
"""


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_names_as_prometheus_has_them(cluster: Cluster) -> None:
    """On a real node's endpoint, while a process that set them lives."""
    process = subprocess.Popen(
        [sys.executable, "-c", SET, cluster.gcs_address],
        env=cluster.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        deadline = time.monotonic() + 90
        found: set[str] = set()
        while found != EXPORTED:
            assert time.monotonic() < deadline, found
            time.sleep(1)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
                lines = [line for line in answer.read().decode().splitlines() if "dngd_" in line]
            found = {line.partition("{")[0] for line in lines if not line.startswith("#")}
        samples = [line for line in lines if line.startswith("ray_dngd_evaluation{")]
        assert all('run="mine"' in line for line in samples)
        labels = set(re.findall(r'[,{]name="(\w+)"', "".join(samples)))
        assert labels == measured()["ray_dngd_evaluation"]
    finally:
        process.kill()
        process.wait(timeout=20)
