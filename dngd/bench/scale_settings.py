"""From measured settings to a fit and predictions: pure functions on what ranks answered.

A setting is a number of hosts, a rate, an optimizer and a width, with the step's time there, what it computes, and what
its collectives carry.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from dngd.bench.child import Message
from dngd.bench.comm import mean_over_ranks
from dngd.bench.cost_model import (
    Load,
    Observation,
    all_reduce,
    broadcast,
    fit_network,
    half_all_reduce,
    predict_step,
    relative_error,
)
from dngd.bench.traffic import SAME_ON_ALL

TARGET_ERROR = 0.2
"""Of a predicted step time, relative to the measured one."""

FORMULA = "compute + latency * rounds + bytes / (efficiency * rate) + host_seconds_per_byte * bytes"

BITS_PER_MEGABIT = 1e6

WHOLE, HALVES = "all_reduce", ("exchange", "reduce_scatter", "all_gather")
"""Names of collectives: an all-reduce, and what half of one may be called."""

_AXES = ("hosts", "megabits", "optimizer", "width")


def turn_places(turns: int, places: int) -> list[int]:
    """Return which of `places` has each turn, so that each has `turns` of them, one at each point of a period.

    A period is that many turns: K-FAC's costly steps, at the same points of every period, fall on all alike.
    Turn k goes to `(k + shift · ⌊k / turns⌋) mod places`, with the least shift for which turns + shift and places have
    no common divisor.
    """
    shift = next(number for number in range(places) if math.gcd(turns + number, places) == 1)
    return [(k + shift * (k // turns)) % places for k in range(turns * places)]


def joined(answers: Sequence[Message]) -> Message:
    """Return several answers of the same ranks as one: times one after another, bytes and calls added up."""
    ranks = []
    for of in zip(*(answer["ranks"] for answer in answers)):
        times = {name: [value for one in of for value in one["seconds"][name]] for name in of[0]["seconds"]}
        counts: dict[str, Counter[str]] = {"bytes": Counter(), "calls": Counter()}
        for one in of:
            for name, counter in counts.items():
                counter.update(one[name])
        ranks.append({"seconds": times, **{name: dict(counter) for name, counter in counts.items()}})
    return {"ranks": ranks}


def mean_step(answer: Message) -> float:
    """Return the mean seconds of a step."""
    return statistics.mean(mean_over_ranks(rank["seconds"]["step"] for rank in answer["ranks"]))


def mean_compute(answer: Message) -> float:
    """Return the mean over steps of what the slowest rank spends outside of collectives: the others wait for it."""
    steps = zip(*(zip(rank["seconds"]["step"], rank["seconds"]["collective"]) for rank in answer["ranks"]))
    slowest: list[float] = [max(whole - waited for whole, waited in ranks) for ranks in steps]
    return statistics.mean(slowest)


def measured_load(by_kind: Mapping[str, int], calls: Mapping[str, int], ranks: int, steps: int) -> Load:
    """Return a step's load from counted bytes and calls.

    Kinds that every rank hands in are all-reduced, in one call or in two halves; the others, and calls of any other
    name, are taken for broadcasts.
    """
    reduced = sum(size for kind, size in by_kind.items() if kind in SAME_ON_ALL)
    others = sum(size for kind, size in by_kind.items() if kind not in SAME_ON_ALL)
    whole = calls.get(WHOLE, 0)
    halves = sum(calls.get(name, 0) for name in HALVES)
    total = (
        all_reduce(ranks, reduced, whole)
        + half_all_reduce(ranks, halves)
        + broadcast(ranks, others, sum(calls.values()) - whole - halves)
    )
    return total.times(1.0 / steps)


def predict_settings(settings: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Fit the network on half of the settings, predict all, and return {"settings", "fit", "prediction"}.

    The half is a checkerboard over hosts, rates, optimizers and widths, chosen before anything is measured: each
    value of each stands in both halves. Where the measured steps cannot be fitted (on a machine that did much else),
    fit is {"failed": why} and prediction None: what was measured is not lost.
    """
    places = [{value: i for i, value in enumerate(dict.fromkeys(s[name] for s in settings))} for name in _AXES]
    out: list[dict[str, Any]] = []
    for setting in settings:
        parity = sum(place[setting[name]] for place, name in zip(places, _AXES)) % 2
        out.append(setting | {"used_for": "prediction" if parity else "fit"})
    held_out = [setting for setting in out if setting["used_for"] == "prediction"]
    try:
        network = fit_network([_observed(setting) for setting in out if setting["used_for"] == "fit"])
    except ValueError as error:
        return {"settings": out, "fit": {"failed": str(error)}, "prediction": None}
    for setting in out:
        one = _observed(setting)
        setting["predicted_seconds"] = predict_step(one.compute_seconds, one.load, one.bytes_per_second, network)
        setting["error"] = relative_error(setting["predicted_seconds"], one.step_seconds)
        # What a model without any network would be off by: where this is small, a prediction says little.
        setting["error_of_compute_alone"] = relative_error(one.compute_seconds, one.step_seconds)
    worst = max(setting["error"] for setting in held_out)
    return {
        "settings": out,
        "fit": asdict(network) | {"formula": FORMULA, "fitted_on": len(out) - len(held_out)},
        "prediction": {
            "predicted": len(held_out),
            "mean_error": statistics.mean(setting["error"] for setting in held_out),
            "largest_error": worst,
            "mean_error_of_compute_alone": statistics.mean(setting["error_of_compute_alone"] for setting in held_out),
            "at_most": TARGET_ERROR,
            "within": sum(setting["error"] <= TARGET_ERROR for setting in held_out),
            "reached": worst <= TARGET_ERROR,
        },
    }


def _observed(setting: Mapping[str, Any]) -> Observation:
    rate = setting["megabits"] * BITS_PER_MEGABIT / 8
    return Observation(setting["compute_seconds"], Load(**setting["load"]), rate, setting["step_seconds"])
