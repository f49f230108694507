"""What a run measures and leaves behind: metrics.jsonl, result.json, step times and phases."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import platform
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dngd.limits import usable_cpus
from dngd.train.checkpoint import replace_file

VERSIONED = ("torch", "dgl", "ray", "pyarrow", "torch-geometric", "numpy")


@dataclass(frozen=True)
class EvaluationRecord:
    """One line of metrics.jsonl. train_seconds is cumulative and excludes evaluation.

    val_accuracy and test_accuracy are the run's metric, which a line names where it is not accuracy.
    """

    epoch: float
    step: int
    train_loss: float
    val_loss: float
    val_accuracy: float
    test_accuracy: float
    train_seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return the values by name; JSON has no NaN (an epoch without a single kept step has that loss): null."""
        return {k: None if _is_undefined(v) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, read: dict[str, Any]) -> EvaluationRecord:
        """Return what `to_json` was made of. Raises TypeError for other names, or values that are no numbers."""
        values: dict[str, Any] = {k: math.nan if v is None else v for k, v in read.items()}
        if not isinstance(values.get("step"), int) or not all(isinstance(v, int | float) for v in values.values()):
            raise TypeError("a value is no number")
        return cls(**values)


@dataclass
class RunResult:
    """What `result.json` holds and `Trainer.fit` returns.

    metric: what best_val_accuracy and test_accuracy are. test_accuracy: at the best validation accuracy. seconds
    in train_seconds exclude evaluation.
    step_ms, phase_ms, seeds_per_second: of the steps after measured_from_step, those since the last start (0: of all
    steps; of runs of an earlier dngd it is not known). bytes: payload handed to collectives by rank 0 over those steps.
    peak_rss_bytes: of rank 0's process. recoveries: how often lost workers were started again, and steps_repeated how
    many steps were done again for it, since the driver was started. failed_checkpoints: checkpoints that could not be
    written, since the last start. failed_uploads: of a run at an address, how often other files could not be sent at
    once, since the last start.
    machine: rank 0's. resolved: by dotted name, what fields that the configuration leaves open stood for, and what
    follows of steps; empty in runs of an earlier dngd.
    """

    best_val_accuracy: float
    test_accuracy: float
    train_seconds: float
    seconds_to_best_val: float
    steps: int
    epochs: float
    world_size: int
    seeds_per_second: float
    step_ms: dict[str, float]
    phase_ms: dict[str, float]
    bytes: dict[str, int]
    peak_rss_bytes: int
    peak_gpu_bytes: int
    dropped_steps: int
    versions: dict[str, str]
    run_dir: str
    recoveries: int = 0
    steps_repeated: int = 0
    failed_checkpoints: int = 0
    failed_uploads: int = 0
    measured_from_step: int = 0
    metric: str = "accuracy"
    machine: dict[str, str] = field(default_factory=dict)
    resolved: dict[str, Any] = field(default_factory=dict)
    history: list[EvaluationRecord] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return the content of result.json (the history is metrics.jsonl's); JSON has no NaN: null."""
        out = asdict(self)
        out.pop("history")
        return {name: None if _is_undefined(value) else value for name, value in out.items()}


def read_result(path: Path) -> RunResult | None:
    """Return what a result.json holds; None if there is none, or one that is damaged or of another version."""
    try:
        read: dict[str, Any] = json.loads(path.read_bytes())
        fields: dict[str, Any] = {}
        for name, kind in _RESULT_KINDS.items():
            if name in read:
                fields[name] = _value_of(read[name], kind)
        if fields["step_ms"] and not fields["step_ms"].keys() >= {"mean", "p50", "p99"}:
            raise TypeError("step_ms lacks a number")
        return RunResult(**fields)
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return None


_RESULT_KINDS = {name: str(one.type) for name, one in RunResult.__dataclass_fields__.items() if name != "history"}
"""RunResult's fields and their types, as they are written there."""

_MOST_WHOLE = 2**63
_SCALARS: dict[str, type | tuple[type, ...]] = {"int": int, "float": (int, float), "str": str}
_MAPPING = "dict[str, "


def _value_of(value: Any, kind: str) -> Any:
    """Return a value of result.json, null as the number that is none. Raises TypeError if it is of another type."""
    if kind.startswith(_MAPPING) and isinstance(value, dict):
        of = kind.removeprefix(_MAPPING).removesuffix("]")
        return {name: item if of == "Any" else _value_of(item, of) for name, item in value.items()}
    if kind == "float" and value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, _SCALARS.get(kind, ())):
        raise TypeError(f"{value!r} is no {kind}")
    if isinstance(value, int) and abs(value) >= _MOST_WHOLE:
        raise TypeError("a number beyond any run's")
    return value


def mark_unfinished(path: Path) -> None:
    """Say in a result.json, if there is one, that its run goes on: its numbers stay, and are of the past."""
    try:
        read = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return
    if isinstance(read, dict):
        replace_file(path, json.dumps(read | {"finished": False}, indent=2).encode())


def _is_undefined(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


class MetricsLog:
    """RUN/metrics.jsonl: one line an evaluation. metric: what its accuracies are. shown: what messages call it."""

    def __init__(self, path: Path, metric: str = "accuracy", shown: str | None = None) -> None:
        self._path = path
        self._metric = metric
        self._shown = shown or str(path)

    def append(self, record: EvaluationRecord) -> None:
        """Add a line."""
        with open(self._path, "a") as file:
            file.write(self._line(record))

    def keep_up_to(
        self, step: int, best: EvaluationRecord | None = None, tell: Callable[[str], None] = lambda text: None
    ) -> list[EvaluationRecord]:
        """Drop lines after a step (a resumed run writes them again) and return the others.

        best: the evaluation that the checkpoint of that step holds as the best, which is among the others whether or
        not its line is there. tell: hears once of lines that are lost, but for a last one that was cut short.
        """
        found, damaged, torn = _read_lines(self._path)
        records = [record for record in found if record.step <= step]
        if best is not None:
            is_lost = all(record.step != best.step for record in records)
            records = sorted([r for r in records if r.step != best.step] + [best], key=lambda record: record.step)
            if damaged or (is_lost and not torn):
                what = f"{damaged} damaged line{'s' if damaged > 1 else ''}" if damaged else "lines lost"
                tell(
                    f"{self._shown} had {what}, which the run goes on without; its best evaluation, of step "
                    f"{best.step} with validation {self._metric} {best.val_accuracy:.4f}, is the checkpoint's"
                )
        lines = "".join(self._line(record) for record in records)
        replace_file(self._path, lines.encode())
        return records

    def _line(self, record: EvaluationRecord) -> str:
        values = record.to_json()
        if self._metric != "accuracy":
            values["metric"] = self._metric
        return json.dumps(values) + "\n"


def read_metrics(path: Path) -> list[EvaluationRecord]:
    """Return metrics.jsonl's records; damaged lines, as a last one cut short by a killed process, are left out."""
    return _read_lines(path)[0]


def _read_lines(path: Path) -> tuple[list[EvaluationRecord], int, bool]:
    """Return the records, the number of damaged lines before the last, and whether the last is damaged."""
    if not path.exists():
        return [], 0, False
    records: list[EvaluationRecord] = []
    damaged, torn = 0, False
    for line in path.read_bytes().splitlines():
        damaged, torn = damaged + torn, False
        try:
            read: dict[str, Any] = json.loads(line)
            read.pop("metric", None)
            records.append(EvaluationRecord.from_json(read))
        except (ValueError, TypeError, AttributeError, RecursionError):
            torn = True
    return records, damaged, torn


@dataclass(frozen=True)
class Activity:
    """What a process is at: phase, number of steps done, and since when (time.monotonic)."""

    phase: str
    step: int
    since: float


class StepClock:
    """Wall time of steps and of their phases, in this process, and what it is at just now.

    `activity` may be read from another thread. An exception leaves it as it was, so that it says where.
    on_activity: called with each, in the thread that trains.
    """

    def __init__(self) -> None:
        self.on_activity: Callable[[Activity], None] | None = None
        self.step_seconds: list[float] = []
        self.phase_seconds: dict[str, float] = defaultdict(float)
        self.activity = Activity("setup", 0, time.monotonic())

    def at_step(self, step: int) -> None:
        """Say that so many steps are done, and the next one begins."""
        self._be(Activity("step", step, time.monotonic()))

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of a block to a phase."""
        start = time.perf_counter()
        try:
            with self.inside(name):
                yield
        finally:
            self.phase_seconds[name] += time.perf_counter() - start

    @contextlib.contextmanager
    def inside(self, name: str) -> Iterator[None]:
        """Say that the process is in a phase while the block runs, without adding up its time."""
        outer = self.activity
        self._be(Activity(name, outer.step, time.monotonic()))
        yield
        # The block may have gone on with a run, at its step.
        self._be(Activity(outer.phase, self.activity.step, time.monotonic()))

    def _be(self, activity: Activity) -> None:
        self.activity = activity
        if self.on_activity is not None:
            self.on_activity(activity)

    def step_ms(self) -> dict[str, float]:
        """Return {"mean", "p50", "p99"} in milliseconds; empty before the first step."""
        if not self.step_seconds:
            return {}
        values = np.asarray(self.step_seconds) * 1e3
        return {
            "mean": float(values.mean()),
            "p50": float(np.percentile(values, 50)),
            "p99": float(np.percentile(values, 99)),
        }

    def phase_ms(self) -> dict[str, float]:
        """Return each phase's mean milliseconds a step."""
        steps = max(1, len(self.step_seconds))
        return {name: seconds * 1e3 / steps for name, seconds in self.phase_seconds.items()}


def versions() -> dict[str, str]:
    """Return the versions of python, dngd and the packages it rests on."""
    out = {"python": platform.python_version()}
    for package in ("dngd", *VERSIONED):
        try:
            out[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            out[package] = "not installed"
    return out


def cpu_name() -> str:
    """Return the processor's name, or what kind it is where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def machine(device: torch.device) -> dict[str, str]:
    """Return what rank 0 ran on, as words for people."""
    on_gpu = {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    return {
        "system": platform.platform(),
        "cpu": cpu_name(),
        "cpus": str(usable_cpus()),
        "torch threads": str(torch.get_num_threads()),
        **on_gpu,
    }


def peak_rss_bytes() -> int:
    """Return this process's peak resident memory."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_gpu_bytes(device: torch.device) -> int:
    """Return the peak memory allocated on a CUDA device; 0 on the CPU."""
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else 0
