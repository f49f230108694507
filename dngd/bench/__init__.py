"""The benchmarks behind the README's numbers: step times, and time to accuracy, of optimizers taken in turns."""

from dngd.bench.accuracy import AccuracyOptions, run_accuracy_bench
from dngd.bench.competitors import Setting, make_settings
from dngd.bench.graphs import PRODUCTS_SHAPED, ShapeConfig, open_graph, write_shape
from dngd.bench.progress import BenchProgress, progress_for
from dngd.bench.step import StepOptions, run_step_bench

__all__ = [
    "PRODUCTS_SHAPED",
    "AccuracyOptions",
    "BenchProgress",
    "Setting",
    "ShapeConfig",
    "StepOptions",
    "make_settings",
    "open_graph",
    "progress_for",
    "run_accuracy_bench",
    "run_step_bench",
    "write_shape",
]
