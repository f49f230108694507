"""From step times to a summary: pure functions on numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def whole_periods(steps: int, period: int) -> int:
    """Return the smallest multiple of period that is at least steps; both at least 1.

    K-FAC's costly steps recur every period: any window of whole periods holds each of them equally often.
    """
    return -(-steps // period) * period


def turn_order(batch: int, count: int, period: int) -> list[int]:
    """Return in which order `count` competitors take batch number `batch`.

    First is `(batch + batch // period) mod count`, then the others in turn. The second term moves the order on
    between K-FAC's periods: without it, its costly steps (same batch number modulo the period) would have the
    same place every time, first onto cold caches say, where count divides the period.
    """
    first = batch + batch // period
    return [(first + place) % count for place in range(count)]


def summary_ms(seconds: Sequence[float]) -> dict[str, float]:
    """Return mean, p50, p99 (linear between order statistics), max in milliseconds, and p99/p50."""
    values = np.asarray(seconds, dtype=np.float64) * 1e3
    p50, p99 = (float(np.percentile(values, q)) for q in (50, 99))
    return {
        "mean_ms": float(values.mean()),
        "p50_ms": p50,
        "p99_ms": p99,
        "max_ms": float(values.max()),
        "p99_over_p50": p99 / p50 if p50 > 0 else math.inf,
    }


def ratios_to(baseline: str, summaries: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]] | None:
    """Return {name: {"mean", "p99_over_p50"}}, each a competitor's value over the baseline's.

    None where the baseline did not take part.
    """
    if baseline not in summaries:
        return None
    base = summaries[baseline]
    return {
        name: {
            "mean": summary["mean_ms"] / base["mean_ms"],
            "p99_over_p50": summary["p99_over_p50"] / base["p99_over_p50"],
        }
        for name, summary in summaries.items()
    }
