"""Reads what a run left in its folder: config.yaml, metrics.jsonl, health.jsonl, result.json.

A run may be unfinished (no result.json yet) or resumed past its result.json; both are read, never refused.
Owns no judgement about the numbers: see summary.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from dngd.errors import UserError
from dngd.paths import RUN_FILES, expanded
from dngd.report.axes import plottable
from dngd.yaml_text import NOT_YAML, RefusedError, load

NOT_A_NUMBER = float("nan")

_T = TypeVar("_T")


@dataclass(frozen=True)
class Evaluation:
    """A line of metrics.jsonl; a value that is missing or null is NaN."""

    epoch: float
    step: float
    train_loss: float
    val_loss: float
    val_accuracy: float
    test_accuracy: float
    train_seconds: float


@dataclass(frozen=True)
class RunFiles:
    """A run folder's content. name: unique among the runs of a page; config: flat, dotted keys.

    metric: what the evaluations' accuracies are.

    health: a (step, {layer: {measure: value}}) an evaluation, without what is not known; empty without factors.

    graph_digest: of the graph's files, as the newest checkpoint that can be read has it; None without one.

    left_out: what was damaged and is not here, as words.
    """

    name: str
    path: Path
    config: dict[str, Any]
    evaluations: tuple[Evaluation, ...]
    result: dict[str, Any]
    health: tuple[tuple[int, dict[str, dict[str, float]]], ...] = ()
    metric: str = "accuracy"
    graph_digest: str | None = None
    left_out: tuple[str, ...] = ()

    @property
    def finished(self) -> bool:
        """Whether result.json is there and tells of the last evaluation and checkpoint."""
        return bool(self.result)

    def number(self, key: str) -> float | None:
        """Return a number of result.json, or None if it is not there."""
        return as_number(self.result.get(key))

    def numbers(self, key: str) -> dict[str, float]:
        """Return a mapping of result.json, e.g. phase_ms, with the numbers that can be drawn and added up."""
        mapping = self.result.get(key)
        if not isinstance(mapping, dict):
            return {}
        values = {str(name): as_number(value) for name, value in mapping.items()}
        return {name: value for name, value in values.items() if value is not None and plottable(value)}

    @property
    def resolved(self) -> dict[str, Any]:
        """The values in use of settings that the configuration leaves open, by dotted name; none of earlier runs."""
        found = self.result.get("resolved")
        return {str(key): value for key, value in found.items()} if isinstance(found, dict) else {}

    def texts(self, key: str) -> dict[str, str]:
        """Return a mapping of result.json, e.g. versions, as text."""
        mapping = self.result.get(key)
        return {str(k): str(v) for k, v in mapping.items()} if isinstance(mapping, dict) else {}


def read_runs(run_dirs: Sequence[Path]) -> list[RunFiles]:
    """Return the runs in the order given, each folder once.

    Raises UserError if there is none, or if a folder holds no run.
    """
    folders = list({expanded(path).resolve(): expanded(path) for path in run_dirs}.values())
    if not folders:
        raise UserError("no run folder was given; name at least one, e.g. dngd report runs/my-run")
    return [read_run(path, name) for path, name in zip(folders, unique_names(folders))]


def read_run(path: Path, name: str) -> RunFiles:
    """Return a run folder's content. Raises UserError if it holds no run or a file that cannot be read."""
    if not path.is_dir():
        what = "is a file, not a run folder" if path.exists() else "does not exist"
        raise UserError(f"run folder {path} {what}; give the folder that dngd train wrote (--run-dir)")
    files = [path / file for file in RUN_FILES]
    if not any(file.is_file() for file in files):
        raise UserError(
            f"folder {path} holds no run (no {', '.join(RUN_FILES[:-1])} or {RUN_FILES[-1]}), and no folders of runs; "
            "give a folder that dngd train wrote (--run-dir), or one that such folders are in"
        )
    config, result = _mapping(files[0]), _mapping(files[2])
    lines, lost_lines = _lines(files[1], _evaluation_line)
    evaluations, metric = tuple(map(_evaluation, lines)), _metric(config, lines, result)
    step, digest = _newest_checkpoint(path / "checkpoints")
    if _is_of_the_past(result, [*(evaluation.step for evaluation in evaluations), *([] if step is None else [step])]):
        result = {}
    try:
        flat = flatten(config)
    except RecursionError:
        raise UserError(f"{files[0]} is nested too deeply; mend or remove it") from None
    health, lost_health = _lines(path / "health.jsonl", _health_line)
    lost = tuple(text for text in (lost_lines, lost_health) if text is not None)
    return RunFiles(name, path, flat, evaluations, result, tuple(health), metric, digest, lost)


def unique_names(folders: Sequence[Path]) -> list[str]:
    """Return each folder's last parts, as few as tell the folders apart: run | a/run, b/run."""
    parts = [path.resolve().parts for path in folders]
    longest = max(len(part) for part in parts)
    names = []
    for own in parts:
        depth = 1
        while depth < longest and sum(other[-depth:] == own[-depth:] for other in parts) > 1:
            depth += 1
        names.append("/".join(part.strip("/") for part in own[-depth:]) or "/")
    return names


def flatten(mapping: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return `{"kfac.damping": 0.01}` for {"kfac": {"damping": 0.01}}."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def as_number(value: object) -> float | None:
    """Return a JSON number as a float, else None. An integer beyond a float's range is infinite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _metric(config: dict[str, Any], lines: Sequence[dict[str, Any]], result: dict[str, Any]) -> str:
    """Return a run's metric. One's own is not in the configuration, but evaluations and result name it."""
    evaluated = lines[-1].get("metric", "accuracy") if lines else None
    found = (result.get("metric"), evaluated, config.get("metric"))
    usual = "roc_auc" if config.get("task") == "link" else "accuracy"
    return next((metric for metric in found if isinstance(metric, str)), usual)


def _evaluation(values: dict[str, Any]) -> Evaluation:
    numbers = {name: as_number(values.get(name)) for name in Evaluation.__dataclass_fields__}
    return Evaluation(**{k: NOT_A_NUMBER if v is None else v for k, v in numbers.items()})


def _lines(path: Path, read: Callable[[Any], _T]) -> tuple[list[_T], str | None]:
    """Return what `read` makes of each line of a JSON file, and what is to be said of those left out, which are no JSON
    or of which it raises ValueError, KeyError, TypeError, AttributeError or OverflowError.

    A last line that a killed process cut short is no damage: it is left out without a word.
    """
    found: list[_T] = []
    damaged, torn = 0, False
    for line in _bytes(path).splitlines():
        damaged, torn = damaged + torn, False
        try:
            found.append(read(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            torn = True
    if not damaged:
        return found, None
    return found, f"{damaged} damaged line{'s' if damaged > 1 else ''} of {path.name}"


def _evaluation_line(values: dict[str, Any]) -> dict[str, Any]:
    """Return a line of metrics.jsonl. Raises ValueError for a value that is no number, or no step."""
    for name in Evaluation.__dataclass_fields__:
        if values.get(name) is not None and as_number(values[name]) is None:
            raise ValueError(f"{name} is no number")
    if not math.isfinite(values["step"]):
        raise ValueError("no step")
    return values


def _health_line(read: dict[str, Any]) -> tuple[int, dict[str, dict[str, float]]]:
    """Return a line of health.jsonl, with the values that can be drawn."""
    known = {}
    for layer, measures in dict(read["layers"]).items():
        pairs = measures.items() if isinstance(measures, dict) else ()
        numbers = {str(name): as_number(value) for name, value in pairs}
        known[str(layer)] = {name: v for name, v in numbers.items() if v is not None and plottable(v)}
    step = as_number(read["step"])
    if step is None or not plottable(step):
        raise ValueError("no step")
    return int(step), known


def _is_of_the_past(result: dict[str, Any], reached: Sequence[float]) -> bool:
    """Whether a run was gone on with after its result.json: it says so, or evaluations or checkpoints are further."""
    steps = as_number(result.get("steps"))
    return result.get("finished") is False or (steps is not None and any(step > steps for step in reached))


def _newest_checkpoint(checkpoints: Path) -> tuple[float | None, str | None]:
    """Return the newest checkpoint's step, and what the newest one that tells of the graph says of it; ones that cannot
    be read are passed over."""
    reached: float | None = None
    try:
        states = sorted(checkpoints.glob("step-*/state.json"), reverse=True)
    except OSError:
        return None, None
    for state in states:
        try:
            read = json.loads(state.read_text(encoding="utf-8"))
            step, digest = as_number(read["step"]), read["position"]["graph_digest"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
        reached = step if reached is None else reached
        if isinstance(digest, str) and digest:
            return reached, digest
    return reached, None


def _mapping(path: Path) -> dict[str, Any]:
    """Return a YAML or JSON file's mapping; empty if there is no such file."""
    text = _text(path)
    if not text.strip():
        return {}
    kind = "JSON" if path.suffix == ".json" else "YAML"
    try:
        data = json.loads(text) if kind == "JSON" else load(text)
    except RefusedError as error:
        raise UserError(f"{path} {error}, or remove it") from None
    except NOT_YAML as error:
        raise UserError(f"{path} is not {kind}: {' '.join(str(error).split())}; mend or remove it") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} holds a {type(data).__name__}, not a mapping; mend or remove it")
    return data


def _text(path: Path) -> str:
    try:
        return _bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path} cannot be read: it is not UTF-8 text; mend or remove it") from None


def _bytes(path: Path) -> bytes:
    if not path.is_file():
        return b""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; mend or remove it") from None
