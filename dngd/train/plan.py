"""What a run will need, worked out before it starts: memory, samplers, factors, bytes on the wire."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch

from dngd.comm import triangle_size
from dngd.config import TrainConfig
from dngd.errors import UserError
from dngd.graph import GraphStore, Split
from dngd.models import MODELS
from dngd.sampling import steps_per_epoch

FLOAT_BYTES = 4
PROCESS_BYTES = 500 * 1024 * 1024
"""Resident memory of a process that has imported torch and dgl, rounded up."""


@dataclass(frozen=True)
class LayerPlan:
    """One layer: sizes of its weight [d_out, d_a - 1] with bias, and of its factors A [d_a, d_a], G [d_out, d_out]."""

    name: str
    d_a: int
    d_out: int

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return self.d_a * self.d_out

    @property
    def triangle_bytes(self) -> int:
        """Bytes of both factors as triangles: one reduction, or one share of inverses."""
        return (triangle_size(self.d_a) + triangle_size(self.d_out)) * FLOAT_BYTES


@dataclass(frozen=True)
class RunPlan:
    """Estimates, in bytes a worker unless said otherwise; upper bounds where sampling makes them vary."""

    batch_size: int
    steps_per_epoch: int
    total_steps: int
    layers: tuple[LayerPlan, ...]
    store_bytes: int
    model_bytes: int
    optimizer_bytes: int
    curvature_bytes: int
    activation_bytes: int
    evaluation_bytes: int
    sampler_bytes: int
    gradient_bytes_per_step: int
    factor_bytes_per_refresh: int
    inverse_bytes_per_refresh: int

    @property
    def worker_bytes(self) -> int:
        """Private memory of one worker with its samplers; the store is one shared mapping on top."""
        return (
            PROCESS_BYTES
            + self.model_bytes
            + self.optimizer_bytes
            + self.curvature_bytes
            + max(self.activation_bytes, self.evaluation_bytes)
            + self.sampler_bytes
        )

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain data."""
        return asdict(self) | {"worker_bytes": self.worker_bytes}


def batch_size_of(config: TrainConfig, num_train: int) -> int:
    """Return the seeds a shard and step: the configured number, or for "full" all of them over the shards.

    Raises UserError for a global batch larger than the training set.
    """
    if config.batch_size == "full":
        return math.ceil(num_train / config.shards)
    assert isinstance(config.batch_size, int)
    if config.batch_size * config.shards > num_train:
        largest = num_train // config.shards
        fix = f"use --batch-size {largest} or less, or --batch-size full" if largest else "use fewer shards"
        raise UserError(
            f"a step of {config.shards} x {config.batch_size} seeds (shards x batch_size) is larger than the training "
            f"set of {num_train} nodes; {fix}"
        )
    return config.batch_size


def make_plan(config: TrainConfig, store: GraphStore, split: Split) -> RunPlan:
    """Return the plan of a run. Raises UserError for a batch larger than the training set."""
    num_train = int(split.train.numel())
    batch_size = batch_size_of(config, num_train)
    per_epoch = steps_per_epoch(num_train, config.shards, batch_size)
    total = per_epoch * config.epochs
    widths = [store.num_features] + [config.hidden] * (config.num_layers - 1) + [store.num_classes]
    fan_in = 2 if MODELS[config.model].aggregation == "mean" else 1
    layers = tuple(
        LayerPlan(f"layers.{i}.linear", fan_in * a + 1, b) for i, (a, b) in enumerate(zip(widths, widths[1:]))
    )
    parameters = sum(layer.parameters for layer in layers)
    copies = {"kfac": 1, "sgd": 1, "adam": 2, "adamw": 2}[config.optimizer]
    triangles = sum(layer.triangle_bytes for layer in layers)
    squares = sum((layer.d_a**2 + layer.d_out**2) * FLOAT_BYTES for layer in layers)
    rows, row_bytes, most_edges = batch_size, 0, 0
    for layer, fanout in zip(reversed(layers), reversed(config.fanouts)):
        # Forward, gradient, and the aggregated rows that the weight's gradient needs.
        row_bytes += rows * (layer.d_a + 2 * layer.d_out) * FLOAT_BYTES
        drawn = store.num_edges if fanout == -1 else min(store.num_edges, rows * fanout)
        most_edges += drawn
        rows = min(store.num_nodes, rows + drawn)
    edge_bytes = most_edges * 3 * 8
    kfac = config.optimizer == "kfac"
    chunk = min(config.eval_rows, store.num_nodes)
    hidden_table = store.num_nodes * (config.hidden if config.num_layers > 1 else store.num_classes) * FLOAT_BYTES
    return RunPlan(
        batch_size=batch_size,
        steps_per_epoch=per_epoch,
        total_steps=min(total, config.max_steps or total),
        layers=layers,
        store_bytes=store.nbytes,
        model_bytes=2 * parameters * FLOAT_BYTES,
        optimizer_bytes=copies * parameters * FLOAT_BYTES,
        # unfolded, folded, inverses, and one step's pending statistics
        curvature_bytes=4 * squares if kfac else 0,
        activation_bytes=row_bytes + edge_bytes,
        evaluation_bytes=2 * hidden_table + chunk * layers[0].d_a * FLOAT_BYTES,
        sampler_bytes=config.num_samplers * (PROCESS_BYTES + config.prefetch * edge_bytes),
        gradient_bytes_per_step=(parameters + 2) * FLOAT_BYTES,
        factor_bytes_per_refresh=triangles if kfac else 0,
        inverse_bytes_per_refresh=triangles if kfac else 0,
    )


def check_device(config: TrainConfig) -> None:
    """Raise UserError if the run wants a GPU and this process sees none."""
    if config.use_gpu and not torch.cuda.is_available():
        raise UserError(
            "--use-gpu was given but torch sees no CUDA device here; leave it out to train on the CPU, or install a "
            "CUDA build of torch on a machine with a GPU (dngd doctor tells)"
        )


def check_fits(plan: RunPlan, config: TrainConfig, workers_here: int) -> None:
    """Raise UserError if this machine's free memory cannot hold its workers."""
    free = psutil.virtual_memory().available
    needed = plan.worker_bytes * workers_here
    if needed > free:
        parts = {
            "curvature": plan.curvature_bytes,
            "activations": plan.activation_bytes,
            "evaluation": plan.evaluation_bytes,
            "samplers": plan.sampler_bytes,
        }
        largest = max(parts, key=lambda name: parts[name])
        fix = {
            "curvature": "use a first-order --optimizer or a graph with fewer features",
            "activations": "use a smaller --batch-size or --fanout",
            "evaluation": "use a smaller --hidden or --set eval_rows=N",
            "samplers": "use fewer --num-samplers",
        }[largest]
        raise UserError(
            f"{workers_here} worker(s) need about {needed / 2**30:.1f} GiB (largest part: {largest}, "
            f"{parts[largest] / 2**30:.1f} GiB each) but {free / 2**30:.1f} GiB are free; {fix}"
        )
    if config.use_gpu and torch.cuda.is_available():
        gpu_free, _ = torch.cuda.mem_get_info()
        on_gpu = plan.model_bytes + plan.optimizer_bytes + plan.curvature_bytes
        on_gpu += max(plan.activation_bytes, plan.evaluation_bytes)
        if on_gpu > gpu_free:
            raise UserError(
                f"a worker needs about {on_gpu / 2**30:.1f} GiB of GPU memory but {gpu_free / 2**30:.1f} GiB are free; "
                "use a smaller --batch-size, --fanout or --hidden"
            )
