"""The overlap of copies with kernels, of traces written by hand and of one that the profiler writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dngd
from dngd.bench import trace
from dngd.bench.trace import common, overlap_of, read_trace, record_steps, trace_training, union
from dngd.errors import UserError
from dngd.graph import GraphStore

spans = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 10)).map(lambda s: (s[0], s[0] + s[1])), max_size=8)


def event(category: str, name: str, begin: float, duration: float, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": begin, "dur": duration, "args": args}


@settings(max_examples=100, deadline=None)
@given(spans=spans, one=st.tuples(st.integers(0, 40), st.integers(0, 12)))
def test_what_spans_cover(spans: list[tuple[int, int]], one: tuple[int, int]) -> None:
    covered = {unit for begin, end in spans for unit in range(begin, end)}
    joined = union(spans)
    assert all(first[1] < second[0] for first, second in zip(joined, joined[1:]))
    assert sum(end - begin for begin, end in joined) == len(covered)
    span = (one[0], one[0] + one[1])
    assert common(span, joined) == len(covered & set(range(*span)))


def test_overlap_of_a_trace_written_by_hand() -> None:
    overlap = overlap_of(
        [
            event("kernel", "gemm", 100, 50),
            event("kernel", "bag", 130, 40),
            event("kernel", "relu", 200, 10),
            event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 90, 40, bytes=4000),
            event("gpu_memcpy", "Memcpy HtoD (Pageable -> Device)", 165, 20, bytes=500),
            event("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)", 100, 50, bytes=7),
            event("gpu_memset", "Memset (Device)", 100, 50),
            event("cpu_op", "aten::mm", 0, 500),
            {"ph": "i", "cat": "kernel", "name": "mark", "ts": 1.0},
            {"ph": "M", "name": "process_name"},
        ]
    )
    assert overlap.copies == 2
    assert overlap.copy_bytes == 4500
    assert overlap.copy_seconds == pytest.approx(60e-6)
    # 100 to 130, and 165 to 170.
    assert overlap.hidden_seconds == pytest.approx(35e-6)
    assert overlap.hidden_share == pytest.approx(35 / 60)
    assert (overlap.pageable_copies, overlap.pageable_seconds) == (1, pytest.approx(20e-6))
    assert overlap.kernel_seconds == pytest.approx(80e-6)
    assert overlap.window_seconds == pytest.approx(120e-6)
    assert overlap.to_json()["hidden_share"] == overlap.hidden_share


def test_a_trace_without_copies_has_no_share() -> None:
    assert overlap_of([event("kernel", "gemm", 0, 5)]).hidden_share is None
    assert overlap_of([]).window_seconds == 0.0


@pytest.mark.parametrize("content", ["{", "{}", '{"traceEvents": 3}', "7"])
def test_a_file_that_is_no_trace(tmp_path: Path, content: str) -> None:
    (tmp_path / "trace.json").write_text(content)
    with pytest.raises(UserError, match=r"trace\.json is no trace that torch\.profiler wrote"):
        read_trace(tmp_path / "trace.json")


def config(store: GraphStore, **changes: Any) -> dngd.TrainConfig:
    fields: dict[str, Any] = {
        "dataset": str(store.path),
        "engine": "local",
        "num_layers": 2,
        "fanout": (3, 3),
        "hidden": 8,
        "batch_size": 60,
        "epochs": 3,
        "num_samplers": 0,
        "optimizer": "sgd",
    }
    return dngd.TrainConfig(**(fields | changes))


def test_the_profiler_records_the_steps_asked_for(store: GraphStore, tmp_path: Path) -> None:
    """On a CPU there are no kernels; the steps are marked all the same, and an epoch's end does not evaluate."""
    path = tmp_path / "trace.json"
    loop = record_steps(config(store), 5, 3, path, [torch.profiler.ProfilerActivity.CPU])
    assert loop.step == 8
    assert [record.step for record in loop.history] == [8]
    names = {str(event.get("name")) for event in read_trace(path)}
    assert {name for name in names if name.startswith("ProfilerStep#")} == {f"ProfilerStep#{n}" for n in range(3, 8)}
    assert "aten::addmm" in names
    assert overlap_of(read_trace(path)).kernel_seconds == 0
    assert json.loads(path.read_text())["traceEvents"]
    with pytest.raises(UserError, match="the run has 12 steps but 20 are to be taken"):
        record_steps(config(store), 10, 10, path, [torch.profiler.ProfilerActivity.CPU])


def test_without_a_gpu_there_is_nothing_to_trace(store: GraphStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="add --use-gpu"):
        trace_training(config(store), 5)
    with pytest.raises(UserError, match="steps=0"):
        trace_training(config(store, use_gpu=True), 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA device"):
        trace_training(config(store, use_gpu=True), 5)


@pytest.mark.parametrize(("warmup", "timed"), [(1, 0), (2, 0), (3, 1), (7, 3), (12, 5)])
def test_steps_before_the_trace_are_timed(
    store: GraphStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warmup: int, timed: int
) -> None:
    """The second half of those before it, but for the one in which the profiler warms up; no checkpoint among them."""
    loop_of: list[trace.TracedLoop] = []
    monkeypatch.setattr(trace.time, "perf_counter", lambda: 0.25 * loop_of[0].step if loop_of else 0.0)
    written: list[int] = []
    checkpoint = trace.TracedLoop._checkpoint

    class Watched(trace.TracedLoop):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            loop_of.append(self)

        def _checkpoint(self) -> None:
            written.append(self.step)
            checkpoint(self)

    monkeypatch.setattr(trace, "TracedLoop", Watched)
    loop = record_steps(
        config(store, epochs=9), 2, warmup, tmp_path / "trace.json", [torch.profiler.ProfilerActivity.CPU]
    )
    assert loop.timed_steps == timed
    assert loop.step_ms == (250.0 if timed else None)
    assert all(step > warmup + 1 for step in written)
