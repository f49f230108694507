"""The benchmarks behind the README's numbers: contenders taken in turns, on the same work.

Importing it is cheap: a benchmark's child processes import what their part needs and no more.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dngd.bench.accuracy import AccuracyOptions, run_accuracy_bench
    from dngd.bench.comm import CommOptions, run_comm_bench
    from dngd.bench.competitors import Setting, make_settings
    from dngd.bench.graphs import PRODUCTS_SHAPED, open_graph
    from dngd.bench.loop import LoopOptions, run_loop_bench
    from dngd.bench.paper import PaperOptions, run_paper_bench
    from dngd.bench.pipeline import PipelineOptions, run_pipeline_bench
    from dngd.bench.progress import BenchProgress, progress_for
    from dngd.bench.scale import ScaleOptions, run_scale_bench
    from dngd.bench.step import StepOptions, run_step_bench

_HOME = {
    "AccuracyOptions": "accuracy",
    "BenchProgress": "progress",
    "CommOptions": "comm",
    "LoopOptions": "loop",
    "PRODUCTS_SHAPED": "graphs",
    "PaperOptions": "paper",
    "PipelineOptions": "pipeline",
    "ScaleOptions": "scale",
    "Setting": "competitors",
    "StepOptions": "step",
    "make_settings": "competitors",
    "open_graph": "graphs",
    "progress_for": "progress",
    "run_accuracy_bench": "accuracy",
    "run_comm_bench": "comm",
    "run_loop_bench": "loop",
    "run_paper_bench": "paper",
    "run_pipeline_bench": "pipeline",
    "run_scale_bench": "scale",
    "run_step_bench": "step",
}

__all__ = [
    "PRODUCTS_SHAPED",
    "AccuracyOptions",
    "BenchProgress",
    "CommOptions",
    "LoopOptions",
    "PaperOptions",
    "PipelineOptions",
    "ScaleOptions",
    "Setting",
    "StepOptions",
    "make_settings",
    "open_graph",
    "progress_for",
    "run_accuracy_bench",
    "run_comm_bench",
    "run_loop_bench",
    "run_paper_bench",
    "run_pipeline_bench",
    "run_scale_bench",
    "run_step_bench",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
