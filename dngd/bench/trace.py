"""How fast steps on a GPU are, samplers included, and how much of the copying to it is hidden behind its computing.

Steps are timed before a profiler traces the last ones, which slows them; the overlap is read off the trace.

A trace is a list of events in Chrome's format, which torch.profiler writes: kernels have the category "kernel", copies
"gpu_memcpy" and a name that tells their direction and the kind of host memory.
"""

from __future__ import annotations

import bisect
import json
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dngd.bench.device import wait_for
from dngd.bench.graphs import open_graph
from dngd.comm import LocalCommunicator
from dngd.config import TrainConfig
from dngd.errors import TrainingError, UserError
from dngd.train import TrainingLoop, prepare_run_folder
from dngd.train.plan import check_device
from dngd.train.progress import SilentReporter

Span = tuple[float, float]
"""From, to; microseconds."""

TO_DEVICE = "HtoD"
PAGEABLE = "Pageable"


@dataclass(frozen=True)
class Overlap:
    """Copies from the host to the device, and what the device computed meanwhile.

    copy_seconds: of all of them. hidden_seconds: of that, while a kernel ran. pageable_seconds: of that, from memory
    that is not page-locked, for which the host waits. kernel_seconds: time in which at least one kernel ran.
    window_seconds: from the first kernel's or copy's start to the last one's end.
    """

    copies: int
    copy_bytes: int
    copy_seconds: float
    hidden_seconds: float
    pageable_copies: int
    pageable_seconds: float
    kernel_seconds: float
    window_seconds: float

    @property
    def hidden_share(self) -> float | None:
        """The share of copy time that is hidden; None without copies."""
        return self.hidden_seconds / self.copy_seconds if self.copy_seconds else None

    @property
    def busy_share(self) -> float:
        """The share of the window in which a kernel ran; 0 without a window."""
        return self.kernel_seconds / self.window_seconds if self.window_seconds else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the numbers as plain data."""
        return asdict(self) | {"hidden_share": self.hidden_share, "busy_share": self.busy_share}


def overlap_of(events: Iterable[Mapping[str, Any]]) -> Overlap:
    """Return how copies to the device overlap kernels. events: of a trace in Chrome's format; others are ignored."""
    kernels: list[Span] = []
    copies: list[tuple[Span, str, int]] = []
    for event in events:
        if event.get("ph") != "X":
            continue
        category = str(event.get("cat", "")).lower()
        begin = float(event["ts"])
        span = (begin, begin + float(event.get("dur", 0.0)))
        if category == "kernel":
            kernels.append(span)
        elif category == "gpu_memcpy" and TO_DEVICE in event["name"]:
            copies.append((span, event["name"], int(event.get("args", {}).get("bytes", 0))))
    running = union(kernels)
    spans = [span for span, _, _ in copies]
    pageable = [span for span, name, _ in copies if PAGEABLE in name]
    ends = [*spans, *running]
    return Overlap(
        copies=len(copies),
        copy_bytes=sum(size for _, _, size in copies),
        copy_seconds=_seconds(spans),
        hidden_seconds=sum(common(span, running) for span in spans) * 1e-6,
        pageable_copies=len(pageable),
        pageable_seconds=_seconds(pageable),
        kernel_seconds=_seconds(running),
        window_seconds=(max(end for _, end in ends) - min(begin for begin, _ in ends)) * 1e-6 if ends else 0.0,
    )


def union(spans: Iterable[Span]) -> list[Span]:
    """Return disjoint spans in order that cover what the given ones do."""
    out: list[Span] = []
    for begin, end in sorted(spans):
        if out and begin <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], end))
        else:
            out.append((begin, end))
    return out


def common(span: Span, disjoint: Sequence[Span]) -> float:
    """Return how much of a span disjoint spans, which are in order, cover, in their unit."""
    begin, end = span
    covered = 0.0
    for other_begin, other_end in disjoint[bisect.bisect_right(disjoint, begin, key=lambda other: other[1]) :]:
        if other_begin >= end:
            break
        covered += min(end, other_end) - max(begin, other_begin)
    return covered


def _seconds(spans: Iterable[Span]) -> float:
    return sum(end - begin for begin, end in spans) * 1e-6


def read_trace(path: Path) -> list[dict[str, Any]]:
    """Return the events of a trace file. Raises UserError if it is none."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no trace that torch.profiler wrote ({error}); give another file") from error
    events = content.get("traceEvents") if isinstance(content, dict) else content
    if not isinstance(events, list):
        raise UserError(f"{path} is no trace that torch.profiler wrote (it has no traceEvents); give another file")
    return events


class TracedLoop(TrainingLoop):
    """A training loop that times the second half of its first `warmup` steps, and traces its last ones."""

    profiler: torch.profiler.profile | None = None
    warmup = 0
    timed_seconds = 0.0
    timed_steps = 0

    def _after_step(self) -> None:
        begin, end = self.warmup // 2, self.warmup - 1  # in the last one the profiler warms up
        if self.step in (begin, end) and begin < end:
            wait_for(self.device)
            self.timed_seconds = time.perf_counter() - (self.timed_seconds if self.step == end else 0.0)
            self.timed_steps = end - begin
        if self.profiler is not None:
            self.profiler.step()
        super()._after_step()

    @property
    def step_ms(self) -> float | None:
        """The mean time of the timed steps; None where there was none."""
        return self.timed_seconds / self.timed_steps * 1e3 if self.timed_steps else None


def trace_training(
    config: TrainConfig, steps: int, warmup: int = 100, output: Path | None = None, scale: float = 1.0
) -> dict[str, Any]:
    """Train `warmup + steps` steps on this machine's GPU and return the overlap in the last `steps`, as plain data.

    output: file that keeps the trace, for chrome://tracing or Perfetto. scale: of a products-shaped graph.
    Raises UserError without a GPU, and where the run would have fewer steps; TrainingError if no kernel was recorded.
    """
    if not config.use_gpu:
        raise UserError("a trace shows copies to a GPU; add --use-gpu")
    if steps < 1 or warmup < 1:
        raise UserError(f"steps={steps} and warmup={warmup} must both be at least 1")
    check_device(config)
    store = open_graph(config.dataset, config.data_root_in_use, config.cache_dir, scale, takes_multilabel=True)
    config = config.model_copy(update={"dataset": str(store.path)})
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with tempfile.TemporaryDirectory(prefix="dngd-trace-") as folder:
        path = Path(folder) / "trace.json" if output is None else output
        loop = record_steps(config, steps, warmup, path, activities)
        overlap = overlap_of(read_trace(path))
    if overlap.kernel_seconds == 0:
        raise TrainingError("the profiler recorded no kernel; check that this user may profile the GPU (CUPTI)")
    return {
        "steps": steps,
        "feature_placement": loop.placed.where,
        "cached_rows": 0 if loop.placed.cache is None else loop.placed.cache.num_rows,
        "samplers": loop.config.samplers,
        "step_ms": loop.step_ms,
        "timed_steps": loop.timed_steps,
        "traced_step_ms": overlap.window_seconds / steps * 1e3,
        "device": torch.cuda.get_device_name(loop.device),
        **overlap.to_json(),
    }


def record_steps(
    config: TrainConfig, steps: int, warmup: int, path: Path, activities: Sequence[torch.profiler.ProfilerActivity]
) -> TracedLoop:
    """Train `warmup + steps` steps and write a trace of the last `steps` to a file; return the loop.

    Raises UserError where the run would have fewer steps.
    """
    assert warmup >= 1, warmup
    with tempfile.TemporaryDirectory(prefix="dngd-trace-") as folder:
        changes = {"engine": "local", "run_dir": Path(folder) / "run", "max_steps": warmup + steps, "resume": False}
        # No evaluation among the steps, and no checkpoint.
        after = warmup + steps + 1
        checkpoint = config.checkpoint.model_copy(update={"period_steps": after, "period_minutes": None})
        run = config.model_copy(update=changes | {"eval_period": after, "checkpoint": checkpoint})
        loop = TracedLoop(prepare_run_folder(run), LocalCommunicator(), SilentReporter())
        loop.warmup = warmup
        if loop.plan.total_steps < warmup + steps:
            raise UserError(
                f"the run has {loop.plan.total_steps} steps but {warmup + steps} are to be taken; give --set epochs=N, "
                "or trace fewer steps"
            )
        with torch.profiler.profile(
            activities=activities,
            schedule=torch.profiler.schedule(wait=warmup - 1, warmup=1, active=steps, repeat=1),
            on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
        ) as profiler:
            loop.profiler = profiler
            loop.run()
    return loop
