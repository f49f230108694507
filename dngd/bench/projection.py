"""What the cost model says of many GPUs: step time, weak-scaling efficiency and the cheapest strategy. No measurement.

Every GPU has one shard of batch_size seeds whatever their number (weak scaling). Its compute is an input: measured
somewhere, or supposed, and labelled with its source. The network is an input too. Bytes are dngd's own plan of a run
(dngd.train.plan). Curvature is renewed once every inverse_update_period steps; of the three ways to share its work
(KAISA, Pauloski et al. 2021) the cheapest is told:

- replicate: factors are all-reduced; every rank inverts all;
- share_inverse: factors are all-reduced; each is inverted on one rank, which broadcasts the inverse;
- share_gradient: factors are all-reduced; one rank inverts a layer's and preconditions its gradient, which it
  broadcasts at every step.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dngd.bench.cost_model import NO_LOAD, Load, Network, all_reduce, broadcast
from dngd.comm import assign_owners
from dngd.config import TrainConfig
from dngd.errors import UserError
from dngd.graph import like_config, write_synth
from dngd.models import MODELS
from dngd.paths import expanded
from dngd.sampling import steps_per_epoch
from dngd.train.optimizers import factor_layout, training_set_of
from dngd.train.plan import make_plan

SHAPES = ("ogbn-products", "ogbn-papers100m")
GPUS = (8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Compute:
    """Seconds that one GPU computes, in a step unless said otherwise. source: where they come from, in words.

    step: Adam's step, communication left out. statistics: what K-FAC adds for the factors' sums, and for measured
    divergences. precondition: what it adds for all layers' gradients. inversion: of all factors, once.
    """

    source: str
    step: float
    statistics: float
    precondition: float
    inversion: float


@dataclass(frozen=True)
class Machines:
    """GPUs and what joins them. host_bytes_per_second: a host's link to the others, one direction;
    gpu_bytes_per_second: a GPU's link within its host. latency_seconds: of a round. efficiency: payload's share."""

    gpus_per_host: int = 8
    host_bytes_per_second: float = 100e9 / 8
    gpu_bytes_per_second: float = 200e9
    latency_seconds: float = 20e-6
    efficiency: float = 0.9


@dataclass(frozen=True)
class LayerWork:
    """One layer, as the model needs it. costs: of inverting A and G; precondition_cost: of its gradient; any unit."""

    name: str
    costs: Mapping[str, float]
    precondition_cost: float


@dataclass(frozen=True)
class Traffic:
    """Payload. gradient_bytes: a step's. factor_bytes, inverse_bytes: a refresh's of all layers."""

    gradient_bytes: float
    factor_bytes: float
    inverse_bytes: float
    layers: tuple[LayerWork, ...]
    period: int


def parse_compute(text: str) -> Compute:
    """Return the compute of "step_ms=20,statistics_ms=0.4,precondition_ms=0.5,inversion_ms=9", or of a JSON file with
    these names and, if it says so, "source". Raises UserError for anything else."""
    names = ("step_ms", "statistics_ms", "precondition_ms", "inversion_ms")
    example = "step_ms=20,statistics_ms=0.4,precondition_ms=0.5,inversion_ms=9"
    source = "given by the user"
    found: dict[str, Any]
    if "=" in text:
        found = dict((part.partition("=")[0].strip(), part.partition("=")[2]) for part in text.split(","))
    else:
        try:
            found = json.loads(expanded(text).read_text())
        except (OSError, ValueError) as error:
            raise UserError(
                f"--compute {text} is no JSON file that can be read ({error}); or write {example}"
            ) from None
        if not isinstance(found, dict):
            raise UserError(f"--compute {text} holds no mapping; it must have the names of {example}")
        source = str(found.pop("source", f"file {Path(text).name}"))
    if set(found) != set(names):
        raise UserError(f"--compute {text} must give {', '.join(names)} and nothing else, e.g. {example}")
    values = {}
    for name in names:
        try:
            values[name] = float(found[name])
        except (TypeError, ValueError):
            values[name] = math.nan
        if not (math.isfinite(values[name]) and values[name] >= 0) or (name == "step_ms" and values[name] == 0):
            raise UserError(f"--compute: {name}={found[name]!r} is no time in milliseconds; write e.g. {example}")
    return Compute(source, *(values[name] / 1e3 for name in names))


def traffic_of(config: TrainConfig, num_features: int, num_classes: int) -> Traffic:
    """Return what a K-FAC run with that many features and classes sends, by dngd's own plan of it."""
    config = TrainConfig(**(config.model_dump(exclude_unset=True) | {"optimizer": "kfac"}))
    with tempfile.TemporaryDirectory(prefix="dngd-bench-") as folder:
        # The plan wants a graph; only its widths matter for what is sent.
        nodes = 8 * num_classes
        store = write_synth(
            Path(folder) / "shape",
            num_nodes=nodes,
            num_edges=4 * nodes,
            num_classes=num_classes,
            num_features=num_features,
        )
        small = config.model_copy(update={"batch_size": 1, "num_workers": 1, "num_shards": 1, "fanout": None})
        split = store.split("masks")
        plan = make_plan(small, store, split)
        layout = factor_layout(small, training_set_of(small, int(split.train.numel()), num_classes))
    blocks = 2 if MODELS[config.model].aggregation == "mean" else 1
    layers = []
    for layer in plan.layers:
        width = (layer.d_a - 1) // blocks
        a = layout.input_structure(layer.d_a, (width, width + 1) if blocks == 2 else ())
        g = layout.output_structure(layer.d_out)
        layers.append(
            LayerWork(
                layer.name,
                {"A": a.inversion_cost, "G": g.inversion_cost},
                float(layer.d_out * layer.d_a * (layer.d_out + layer.d_a)),
            )
        )
    return Traffic(
        plan.gradient_bytes_per_step,
        plan.factor_bytes_per_refresh,
        plan.inverse_bytes_per_refresh,
        tuple(layers),
        config.kfac.inverse_update_period,
    )


def busiest_share(costs: Mapping[tuple[str, str], float], ranks: int) -> float:
    """Return the busiest rank's share of all costs, as dngd assigns them (most costly first); 1 on one rank."""
    owners = assign_owners(costs, ranks)
    loads = [0.0] * ranks
    for factor, owner in owners.items():
        loads[owner] += costs[factor]
    return max(loads) / sum(loads)


def all_reduce_seconds(payload_bytes: float, gpus: int, machines: Machines) -> float:
    """Return the time of an all-reduce among GPUs: the shorter of a ring and a tree, as NCCL chooses between them.

    The ring passes every host's link once: 2(n-1) rounds, 2(n-1)/n · B. A tree of n ranks: 2⌈log₂ n⌉ rounds, 2 B.
    """
    ring = all_reduce(gpus, payload_bytes)
    tree = Load(2 * (gpus - 1).bit_length(), 2 * payload_bytes if gpus > 1 else 0.0)
    return min(_seconds(ring, gpus, machines), _seconds(tree, gpus, machines))


def broadcast_seconds(payload_bytes: float, calls: float, gpus: int, machines: Machines) -> float:
    """Return the time of broadcasting payload_bytes in that many calls: pipelined along a tree, B bytes a link."""
    if gpus == 1:
        return _seconds(NO_LOAD, gpus, machines)
    return _seconds(Load(broadcast(gpus, 0.0, calls).rounds, payload_bytes), gpus, machines)


def _seconds(load: Load, gpus: int, machines: Machines) -> float:
    on_one_host = gpus <= machines.gpus_per_host
    rate = machines.gpu_bytes_per_second if on_one_host else machines.host_bytes_per_second
    return Network(machines.latency_seconds, machines.efficiency).seconds(load, rate)


def adam_step(traffic: Traffic, compute: Compute, gpus: int, machines: Machines) -> float:
    """Return the model's time of Adam's step: compute and the gradients' all-reduce."""
    return compute.step + all_reduce_seconds(traffic.gradient_bytes, gpus, machines)


def kfac_steps(traffic: Traffic, compute: Compute, gpus: int, machines: Machines) -> dict[str, float]:
    """Return the model's mean time of K-FAC's step over a period, by strategy."""
    inversions = {(layer.name, which): cost for layer in traffic.layers for which, cost in layer.costs.items()}
    whole_layers = {(layer.name, "A"): sum(layer.costs.values()) for layer in traffic.layers}
    preconditioning = {(layer.name, "A"): layer.precondition_cost for layer in traffic.layers}
    period, calls = traffic.period, len(traffic.layers)
    base = adam_step(traffic, compute, gpus, machines) + compute.statistics
    reduced = sum(all_reduce_seconds(traffic.factor_bytes / calls, gpus, machines) for _ in range(calls))
    shared = broadcast_seconds(traffic.inverse_bytes, 2 * calls, gpus, machines)
    return {
        "replicate": base + compute.precondition + (reduced + compute.inversion) / period,
        "share_inverse": base
        + compute.precondition
        + (reduced + compute.inversion * busiest_share(inversions, gpus) + shared) / period,
        "share_gradient": base
        + compute.precondition * busiest_share(preconditioning, gpus)
        + broadcast_seconds(traffic.gradient_bytes, calls, gpus, machines)
        + (reduced + compute.inversion * busiest_share(whole_layers, gpus)) / period,
    }


def project(config: TrainConfig, compute: Compute, machines: Machines, gpus: Sequence[int] = GPUS) -> dict[str, Any]:
    """Return the model's predictions for the public graphs' shapes, as plain data, labelled as what they are."""
    return {
        "label": "a model, not a measurement",
        "compute": asdict(compute),
        "machines": asdict(machines),
        "batch_size": config.batch_size,
        "hidden": config.hidden,
        "inverse_update_period": config.kfac.inverse_update_period,
        "shapes": {shape: _project_shape(shape, config, compute, machines, gpus) for shape in SHAPES},
    }


def _project_shape(
    shape: str, config: TrainConfig, compute: Compute, machines: Machines, gpus: Sequence[int]
) -> dict[str, Any]:
    graph = like_config(shape)
    traffic = traffic_of(config, graph.num_features, graph.num_classes)
    assert isinstance(config.batch_size, int)
    alone = replace(machines, gpus_per_host=1)
    alone_adam = adam_step(traffic, compute, 1, alone)
    alone_kfac = min(kfac_steps(traffic, compute, 1, alone).values())
    rows = []
    for number in gpus:
        strategies = kfac_steps(traffic, compute, number, machines)
        best = min(strategies, key=lambda name: strategies[name])
        adam = adam_step(traffic, compute, number, machines)
        seeds = number * config.batch_size
        fits = seeds <= graph.num_train
        rows.append(
            {
                "gpus": number,
                "hosts": math.ceil(number / machines.gpus_per_host),
                "seeds_a_step": seeds,
                # A step of more seeds than there are training nodes is refused by dngd train.
                "fits_training_set": fits,
                "steps_an_epoch": steps_per_epoch(graph.num_train, number, config.batch_size) if fits else None,
                "adam_step_ms": 1e3 * adam,
                "adam_efficiency": alone_adam / adam,
                "kfac_step_ms": {name: 1e3 * seconds for name, seconds in strategies.items()},
                "best_strategy": best,
                "kfac_efficiency": alone_kfac / strategies[best],
                "kfac_over_adam": strategies[best] / adam,
            }
        )
    return {
        "num_features": graph.num_features,
        "num_classes": graph.num_classes,
        "num_train": graph.num_train,
        "gradient_bytes_a_step": traffic.gradient_bytes,
        "factor_bytes_a_refresh": traffic.factor_bytes,
        "inverse_bytes_a_refresh": traffic.inverse_bytes,
        "rows": rows,
    }
