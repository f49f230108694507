"""Results of several runs of the accuracy benchmark as one: all their graphs, and ratios over all of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dngd.bench.optimizers import SUBJECT
from dngd.bench.verdict import aggregate
from dngd.errors import UserError
from dngd.train.run_folder import BEFORE_THEY_CAME

ALIKE = ("protocol", "seeds", "hidden", "dropout", "batch_size", "weight_decay", "target_margin", "smoothing")
"""Fields of the configuration without which ratios of two results say nothing together."""

TUNING = ("quick", "full")
"""Protocols by how much the baselines are tuned; their results have other seeds, too."""

COMPARED = {
    "epochs": "K-FAC's length in epochs",
    "max_steps": "K-FAC's max_steps",
    "lr_schedule": "K-FAC's rate schedule",
    "lr_half_steps": "K-FAC's lr_half_steps",
    "warmup_steps": "K-FAC's warmup_steps",
    "average_share": "K-FAC's average_share",
}
"""Further fields, with words for them: where they differ it is told."""


def combine_results(paths: Sequence[Path], *, best_tuned: bool = False) -> dict[str, Any]:
    """Return {benchmark, config, panels, summary, remarks} of files that `dngd bench accuracy --json` wrote, in order.

    config: what they share. remarks: where K-FAC's settings, lengths or fanouts are not the same in all. best_tuned:
    whether results of both protocols may go together, of which each graph and model counts once, with the one whose
    baselines are tuned more. Raises UserError for a file that is no such result, or has no K-FAC or Adam, for a graph
    and model that occur twice in one protocol, and for results measured in different ways (ALIKE).
    """
    if not paths:
        raise UserError("no result is named; give files that dngd bench accuracy --json wrote")
    results = [read_result(path) for path in paths]
    panels: list[Mapping[str, Any]] = []
    if best_tuned:
        paths, results = _best_tuned(paths, results)
    alike = [name for name in ALIKE if not (best_tuned and name in ("protocol", "seeds"))]
    shared = {name: results[0]["config"].get(name) for name in alike}
    for path, result in zip(paths, results):
        for name, value in shared.items():
            own = result["config"].get(name)
            if own != value:
                raise UserError(
                    f"{path} was measured with {name}={own}, {paths[0]} with {value}; combine results of one way alone"
                )
        for panel in result["panels"]:
            if panel["name"] in {other["name"] for other in panels}:
                raise UserError(f"{path} holds {panel['name']} for the second time; leave one of its results out")
            panels.append(panel)
    return {
        "benchmark": "accuracy",
        "config": shared,
        "panels": panels,
        "summary": aggregate(panels, SUBJECT),
        "remarks": _differences(paths, [_compared(result) for result in results]),
    }


def _best_tuned(paths: Sequence[Path], results: Sequence[dict[str, Any]]) -> tuple[list[Path], list[dict[str, Any]]]:
    """Return the results without panels that another of a more thorough protocol has, and of these those left."""
    thoroughness = [
        TUNING.index(protocol) if (protocol := result["config"].get("protocol")) in TUNING else -1 for result in results
    ]
    most: dict[str, int] = {}
    for rank, result in zip(thoroughness, results):
        for panel in result["panels"]:
            most[panel["name"]] = max(rank, most.get(panel["name"], rank))
    kept = []
    for path, rank, result in zip(paths, thoroughness, results):
        panels = [panel for panel in result["panels"] if most[panel["name"]] == rank]
        if panels:
            kept.append((path, result | {"panels": panels}))
    return [path for path, _ in kept], [result for _, result in kept]


def _compared(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ratios depend on, by words for it. A file that does not say is from before it could: it is left out,
    or what it was then."""
    config, grid = result["config"], result["config"].get("grid") or {}
    kfac = config.get(SUBJECT)
    out = {f"K-FAC's {name}": value for name, value in (BEFORE_THEY_CAME | kfac if kfac else {}).items()}
    out |= {words: config[name] for name, words in (COMPARED | {"protocol": "the protocol"}).items() if name in config}
    if "max_epochs" in grid:
        out["the baselines' range of epochs"] = f"{grid.get('first_epochs')} to {grid['max_epochs']}"
    for panel in result["panels"]:
        if "fanout" in panel:
            out[f"the fanout of {panel['num_layers']} layers"] = panel["fanout"]
    return out


def _differences(paths: Sequence[Path], settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a sentence for each setting with several values; a file without it is from before there was one."""
    out = []
    for name in dict.fromkeys(name for own in settings for name in own):
        values = {str(path): own[name] for path, own in zip(paths, settings) if name in own}
        if any(value != next(iter(values.values())) for value in values.values()):
            told = ", ".join(f"{value} in {file}" for file, value in values.items())
            out.append(f"{name} is not the same in all: {told}")
    return out


def read_result(path: Path) -> dict[str, Any]:
    """Return a result's content, checked as far as it is used. Raises UserError for a file that is none."""
    fix = "give a file that dngd bench accuracy --json wrote"
    try:
        result = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; {fix}") from None
    except ValueError:
        raise UserError(f"{path} holds no JSON; {fix}") from None
    try:
        is_result = result["benchmark"] == "accuracy" and aggregate(result["panels"], SUBJECT) is not None
        is_result = is_result and isinstance(result["config"], dict)
    except (KeyError, TypeError, IndexError, ValueError):
        is_result = False
    if not is_result:
        raise UserError(f"{path} is no result of K-FAC and Adam on some graph; {fix}")
    return dict(result)
