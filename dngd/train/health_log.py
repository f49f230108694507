"""RUN/health.jsonl: how the curvature does, one line an evaluation; dngd.optim.health says what the numbers mean."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from pathlib import Path

from dngd.train.checkpoint import replace_file


class HealthLog:
    """Lines of {"step": ..., "layers": {layer: {measure: number or null}}}; null is not known, or not finite."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, step: int, health: Mapping[str, Mapping[str, float]]) -> None:
        """Add a line."""
        layers = {
            layer: {name: value if math.isfinite(value) else None for name, value in measures.items()}
            for layer, measures in health.items()
        }
        with open(self._path, "a") as file:
            file.write(json.dumps({"step": step, "layers": layers}) + "\n")

    def keep_up_to(self, step: int) -> None:
        """Drop what a resumed run writes again: lines after a step; and damaged ones, as a killed process leaves."""
        if not self._path.exists():
            return
        kept = []
        for line in self._path.read_bytes().splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                if json.loads(line)["step"] <= step:
                    kept.append(line + b"\n")
        replace_file(self._path, b"".join(kept))
