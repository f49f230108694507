"""What a run will need, worked out before it starts: memory, samplers, factors, bytes on the wire."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from dngd.comm.gradients import TRAILING
from dngd.config import BATCH_SIZE, TrainConfig
from dngd.errors import UserError
from dngd.graph import GraphStore, LinkSplit
from dngd.limits import available_memory, usable_cpus
from dngd.models import MODELS
from dngd.optim import Footprint, inverse_bytes_held, layer_footprint
from dngd.sampling import steps_per_epoch
from dngd.sampling.operators import check_weights
from dngd.sampling.pipeline import slots_of_sampler
from dngd.sampling.sparse_features import SparseShares
from dngd.train.evaluation_plan import LayerShape, block_rows, evaluation_bytes
from dngd.train.memory import private_memory
from dngd.train.objective import make_objective
from dngd.train.optimizers import TrainingSet, damping_in_use, factor_layout, training_set_of
from dngd.train.placement import choose_placement, free_gpu_bytes, sparse_shares, table_bytes
from dngd.train.resolved import settings_in_use
from dngd.train.task import TaskSplit, evaluated_nodes, graph_of, shape_of

FLOAT_BYTES = 4
NODE_BYTES = 8
PROCESS_BYTES = 350 * 1024 * 1024
"""Private memory of a process that has imported torch and dgl and taken a step (measured: 326 MB), rounded up."""

SAMPLER_BYTES = 128 * 1024 * 1024
"""Private memory of a sampler, a copy of a process as above, that has drawn batches of ogbn-products' shape (measured:
117 MB beside its slots), rounded up."""

MOST_SAMPLERS = 12
"""Sampler processes that feed one GPU, where their number is left open."""
CPUS_OF_TRAINING = 2
"""Left to the training process: one gives the GPU its work, one copies and inverts."""


@dataclass(frozen=True)
class LayerPlan:
    """One layer: sizes of its weight [d_out, d_a - 1] with bias, and what its factors A, [d_a, d_a], and G,
    [d_out, d_out], take."""

    name: str
    d_a: int
    d_out: int
    factors: Footprint

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return self.d_a * self.d_out


@dataclass(frozen=True)
class RunPlan:
    """Estimates, in bytes a worker unless said otherwise; upper bounds where sampling makes them vary.

    mode: whether steps are "sampled" or a "constant full batch". batch_size: most seeds of a shard (links, in link
    prediction, of which each brings negatives), of which at most unlabelled are outside the training set (of a
    semi-supervised loss). link_bytes: the training links, and the graph without the others. full_batch_bytes: what a
    constant full batch keeps from step to step, its shards' layer graphs and first aggregations. feature_bytes: the
    feature table, part of store_bytes. sparse_bytes: its entries, where these alone are worked on.
    evaluation_table_bytes: exact evaluation's tables, one copy a machine; they go to disk where memory is short.
    samplers: processes a worker, on a machine with this one's CPUs; 0: a thread.
    settings: see settings_in_use; and sparse_features, whether the run works on the features that are not zero alone.
    """

    mode: str
    batch_size: int
    unlabelled: int
    steps_per_epoch: int
    total_steps: int
    layers: tuple[LayerPlan, ...]
    store_bytes: int
    feature_bytes: int
    model_bytes: int
    optimizer_bytes: int
    curvature_bytes: int
    link_bytes: int
    full_batch_bytes: int
    sparse_bytes: int
    activation_bytes: int
    evaluation_bytes: int
    evaluation_table_bytes: int
    samplers: int
    sampler_bytes: int
    gradient_bytes_per_step: int
    factor_bytes_per_refresh: int
    inverse_bytes_per_refresh: int
    preconditioned_bytes_per_step: int
    settings: dict[str, Any]

    @property
    def resolved(self) -> dict[str, Any]:
        """What fields left open stand for, by dotted name, and what follows of steps; plain data."""
        return self.settings | {
            "batch_size": self.batch_size,
            "num_samplers": self.samplers,
            "seeds_per_step": self.batch_size * int(self.settings["num_shards"]),
            "steps_per_epoch": self.steps_per_epoch,
            "total_steps": self.total_steps,
        }

    def takes_fewer_seeds(self, config: TrainConfig) -> bool:
        """Whether a shard has fewer seeds than the configured number, see batch_size_of."""
        if config.batch_size == "full":
            return False
        return self.labelled < config.batch_size - config.unlabelled_of(config.batch_size)

    @property
    def labelled(self) -> int:
        """Most training nodes of a shard and step."""
        return self.batch_size - self.unlabelled

    @property
    def worker_bytes(self) -> int:
        """Private memory of one worker with its samplers; the store is one shared mapping on top."""
        return (
            PROCESS_BYTES
            + self.model_bytes
            + self.optimizer_bytes
            + self.curvature_bytes
            + self.link_bytes
            + self.full_batch_bytes
            + self.sparse_bytes
            + max(self.activation_bytes, self.evaluation_bytes)
            + self.sampler_bytes
        )

    @property
    def gpu_bytes(self) -> int:
        """GPU memory of one worker that trains there, beside its features."""
        kept = self.model_bytes + self.optimizer_bytes + self.curvature_bytes + self.full_batch_bytes
        return kept + max(self.activation_bytes, self.evaluation_bytes)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain data."""
        plain = asdict(self) | {"worker_bytes": self.worker_bytes, "resolved": self.resolved}
        plain.pop("settings")
        return plain


def batch_size_of(config: TrainConfig, num_train: int) -> int:
    """Return the training nodes a shard and step: the configured number without its unlabelled seeds, or for "full",
    and for the default number where there are fewer, all of them over the shards.

    Raises UserError for another number that is larger than the training set, or for more shards than it has nodes.
    """
    if config.batch_size == "full":
        if config.shards > num_train:
            raise UserError(
                f"num_shards={config.shards} is above the number of training nodes, {num_train}, so that a shard would "
                f"have no seed; use at most {num_train} shards"
            )
        return math.ceil(num_train / config.shards)
    assert isinstance(config.batch_size, int)
    labelled = config.batch_size - config.unlabelled_of(config.batch_size)
    if labelled * config.shards > num_train:
        if config.batch_size == BATCH_SIZE and config.shards <= num_train:
            return math.ceil(num_train / config.shards)
        share = 1.0 if config.semi == "none" else 1 - config.semi_share
        largest = math.floor(num_train // config.shards / share)
        fix = f"use --batch-size {largest} or less" if largest else "use fewer shards"
        if largest and config.task == "node":
            fix += ", or --batch-size full"
        kind = "seeds (shards x batch_size)" if config.semi == "none" else "labelled seeds (shards x their share)"
        raise UserError(
            f"a step of {config.shards} x {labelled} {kind} is larger than the training set of {num_train} "
            f"{config.task}s; {fix}"
        )
    return labelled


def make_plan(config: TrainConfig, store: GraphStore, split: TaskSplit, module: nn.Module | None = None) -> RunPlan:
    """Return the plan of a run. store: the whole graph. module: of one's own, whose activations are taken for those of
    `hidden` wide layers.

    Raises UserError for a batch_size larger than the training set, a semi-supervised loss without unlabelled nodes, a
    loss that the graph's labels do not allow, or edge weights beyond 32-bit floats.
    """
    make_objective(config, store, split.train)
    check_weights(store)
    graph = graph_of(store, split)
    num_train = int(split.train.numel())
    labelled = batch_size_of(config, num_train)
    per_epoch = steps_per_epoch(num_train, config.shards, labelled)
    unlabelled = 0
    if config.semi != "none":
        num_others = store.num_nodes - num_train
        if num_others == 0:
            raise UserError(
                f"semi={config.semi} is about nodes outside the training set, but split {config.split} trains on all "
                f"{num_train} nodes of {store.name}; use --semi none, or a --split that leaves nodes out"
            )
        unlabelled = math.ceil(num_others / config.shards)
        if config.batch_size != "full":
            unlabelled = min(unlabelled, config.unlabelled_of(config.batch_size))
    batch_size = labelled + unlabelled
    total = per_epoch * config.epochs
    outputs = shape_of(config, store).num_classes
    widths = [store.num_features] + [config.hidden] * (config.num_layers - 1) + [outputs]
    training_set = training_set_of(config, num_train, store.num_classes)
    fan_in = 2 if config.model != "custom" and MODELS[config.model].aggregation == "mean" else 1
    layers = tuple(
        _layer_plan(config, i, a, b, fan_in, training_set) for i, (a, b) in enumerate(zip(widths, widths[1:]))
    )
    num_pairs = (1 + config.negatives) * batch_size if config.task == "link" else 0
    sparse = sparse_shares(config, graph, module)
    num_seeds = min(2 * num_pairs or batch_size, store.num_nodes)
    batch = _batch_bytes(config, graph, layers, num_seeds, None if sparse is None else sparse.rows)
    pair_bytes = num_pairs * 2 * (NODE_BYTES + outputs * FLOAT_BYTES)  # the ends' numbers, and rows to multiply
    if module is not None:
        layers = _module_layers(config, module, training_set)
    parameters = sum(layer.parameters for layer in layers) if module is None else _num_parameters(module)
    copies = {"kfac": 1, "sgd": 1, "adam": 2, "adamw": 2, "custom": 2}[config.optimizer] + (config.average_share > 0)
    statistics = sum(layer.factors.statistics for layer in layers)
    kfac = config.optimizer == "kfac"
    samplers = 0 if config.constant_full_batch else config.samplers
    ranks = config.num_workers if config.engine == "ray" else 1
    shapes = [LayerShape(a, b, fan_in) for a, b in zip(widths, widths[1:])]
    block = block_rows(store.num_nodes, config.eval_rows, on_gpu=config.use_gpu)
    evaluation = evaluation_bytes(graph, shapes, evaluated_nodes(split), block, is_sparse=sparse is not None)
    embeddings = store.num_nodes * outputs * FLOAT_BYTES if config.task == "link" else 0
    return RunPlan(
        mode="constant full batch" if config.constant_full_batch else "sampled",
        batch_size=batch_size,
        unlabelled=unlabelled,
        steps_per_epoch=per_epoch,
        total_steps=min(total, config.max_steps or total),
        layers=layers,
        store_bytes=store.nbytes,
        feature_bytes=table_bytes(store.features),
        model_bytes=2 * parameters * FLOAT_BYTES,
        optimizer_bytes=copies * parameters * FLOAT_BYTES,
        # folded, one step's pending statistics, with several ranks the unfolded and those on their way; inverses
        curvature_bytes=(
            (2 if ranks == 1 else 4) * statistics
            + inverse_bytes_held({layer.name: layer.factors for layer in layers}, config.kfac.strategy, ranks)
            if kfac
            else 0
        ),
        link_bytes=_link_bytes(config, split),
        full_batch_bytes=math.ceil(config.shards / ranks) * batch.kept,
        sparse_bytes=_sparse_bytes(sparse, store, samplers),
        activation_bytes=batch.activation + pair_bytes,
        evaluation_bytes=evaluation.block,
        evaluation_table_bytes=evaluation.tables + evaluation.kept + embeddings,
        samplers=samplers,
        sampler_bytes=_bytes_of_samplers(
            samplers,
            SAMPLER_BYTES
            + slots_of_sampler(config.prefetch) * (batch.edges + batch.first_rows + num_pairs * 2 * NODE_BYTES),
        ),
        gradient_bytes_per_step=(parameters + TRAILING) * FLOAT_BYTES,
        factor_bytes_per_refresh=sum(layer.factors.statistics_sent for layer in layers) if kfac else 0,
        inverse_bytes_per_refresh=sum(layer.factors.inverses_sent for layer in layers)
        if kfac and config.kfac.strategy in ("auto", "share_inverse")
        else 0,
        preconditioned_bytes_per_step=parameters * FLOAT_BYTES
        if kfac and config.kfac.strategy == "share_gradient"
        else 0,
        settings=settings_in_use(config, training_set) | {"sparse_features": sparse is not None},
    )


def _link_bytes(config: TrainConfig, split: TaskSplit) -> int:
    """Return what a worker keeps of its links, and the graph whose edges it may see, which is no file."""
    if not isinstance(split, LinkSplit):
        return 0
    graph = split.graph
    edges = sum(tensor.nbytes for tensor in (graph.indptr, graph.indices, graph.edge_weight) if tensor is not None)
    copies = 2 if config.samplers else 1  # sampler processes share one
    return copies * edges + 2 * split.train.nbytes  # once more in an epoch's order


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def _module_layers(config: TrainConfig, module: nn.Module, training_set: TrainingSet) -> tuple[LayerPlan, ...]:
    """Return a plan for each weight matrix of a module, [d_out, d_in], as if it were a layer with a bias."""
    eigenbasis = config.kfac.method == "ekfac" or config.kfac.update == "adam_eigenbasis"
    layout, kfac = factor_layout(config, training_set), config.kfac
    plans = []
    for name, weight in module.named_parameters():
        if weight.requires_grad and weight.dim() == 2:
            d_out, d_a = weight.shape[0], weight.shape[1] + 1
            footprint = layer_footprint(
                d_a,
                d_out,
                (),
                layout,
                kfac.inverse_precision,
                eigenbasis=eigenbasis,
                factor_wire=kfac.factor_wire,
                shares=_damping_shares(config, training_set),
            )
            plans.append(LayerPlan(name.removesuffix(".weight"), d_a, d_out, footprint))
    return tuple(plans)


def _damping_shares(config: TrainConfig, training_set: TrainingSet) -> tuple[float, float] | None:
    """Return λ of A and G as shares of their traces; None where that depends on the factors."""
    if config.damping_mode != "relative":
        return None
    damping, g_ratio = damping_in_use(config, training_set)
    return damping, g_ratio * damping


def _layer_plan(
    config: TrainConfig, index: int, width_in: int, width_out: int, fan_in: int, training_set: TrainingSet
) -> LayerPlan:
    """Return layer `index`'s plan; its rows are fan_in parts of width_in and a 1."""
    d_a = fan_in * width_in + 1
    parts = (width_in, width_in + 1) if fan_in == 2 else ()
    eigenbasis = config.kfac.method == "ekfac" or config.kfac.update == "adam_eigenbasis"
    layout, precision = factor_layout(config, training_set), config.kfac.inverse_precision
    footprint = layer_footprint(
        d_a,
        width_out,
        parts,
        layout,
        precision,
        eigenbasis=eigenbasis,
        factor_wire=config.kfac.factor_wire,
        shares=_damping_shares(config, training_set),
    )
    return LayerPlan(f"layers.{index}.linear", d_a, width_out, footprint)


@dataclass(frozen=True)
class _BatchBytes:
    """Most bytes of one shard's part of a step: while it is worked on, its edges alone, what is kept for all steps, and
    the first layer's rows, which sampler processes lay out."""

    activation: int
    edges: int
    kept: int
    first_rows: int


def _sparse_bytes(sparse: SparseShares | None, store: GraphStore, samplers: int) -> int:
    """Return the bytes of a table's entries, each with its column, in the trainer, and in a copy for its samplers."""
    if sparse is None:
        return 0
    return int((2 if samplers else 1) * 2 * FLOAT_BYTES * sparse.table * store.num_nodes * store.num_features)


def _batch_bytes(
    config: TrainConfig,
    store: GraphStore,
    layers: tuple[LayerPlan, ...],
    num_seeds: int,
    sparse_share: float | None,
) -> _BatchBytes:
    """sparse_share: of the first layer's rows that is kept, each entry with its column; None of dense rows."""
    num_rows, rows, edges, kept, aggregated = num_seeds, 0, 0, 0, 0
    for i, (layer, fanout) in reversed(list(enumerate(zip(layers, config.fanouts)))):
        drawn = store.num_edges if fanout == -1 else min(store.num_edges, num_rows * fanout)
        # Forward, gradient, and the aggregated rows that the weight's gradient needs.
        aggregated = num_rows * layer.d_a * FLOAT_BYTES
        if i == 0 and sparse_share is not None:
            aggregated = int(aggregated * 2 * sparse_share)
        rows += 2 * num_rows * layer.d_out * FLOAT_BYTES
        if config.constant_full_batch and i == 0:
            kept += aggregated
        else:
            rows += aggregated
        if config.constant_full_batch:
            edges = max(edges, drawn * 5 * 8)
            kept += (drawn + num_rows) * (8 + FLOAT_BYTES) if i > 0 else 0
        else:
            edges += drawn * 3 * 8
        num_rows = min(store.num_nodes, num_rows + drawn)
    # A constant batch's edges are made before the first step, one layer after the other.
    return _BatchBytes(max(rows, edges) if config.constant_full_batch else rows + edges, edges, kept, aggregated)


def with_samplers(plan: RunPlan, config: TrainConfig, workers_here: int = 1) -> tuple[RunPlan, TrainConfig]:
    """Return both with the number of samplers, where that is left open and a GPU is to be fed; else as they are.

    A GPU takes a batch in a fraction of the time that one core draws it in: 61 ms a step with one sampler, 18 with four
    and 7.6 with eight (three layers of GraphSAGE at ogbn-products' shape, an H100, 16 cores; docs/measured.md). So each
    worker has its share of this machine's CPUs, or what Ray reserves for it where that is more than one, less two;
    twelve at most, in no more than a quarter of the free memory. plan: of config. workers_here: of the run, on this
    machine.
    """
    if config.num_samplers is not None or not config.use_gpu or not plan.samplers:
        return plan, config
    cpus = usable_cpus() // workers_here
    if config.engine == "ray" and config.ray.cpus_per_worker > 1:
        cpus = min(cpus, int(config.ray.cpus_per_worker))
    each = (plan.sampler_bytes - PROCESS_BYTES) // plan.samplers
    by_memory = (available_memory() // 4 // workers_here - PROCESS_BYTES) // each
    number = max(1, min(MOST_SAMPLERS, cpus - CPUS_OF_TRAINING, by_memory))
    return (
        replace(plan, samplers=number, sampler_bytes=_bytes_of_samplers(number, each)),
        config.model_copy(update={"num_samplers": number}),
    )


def _bytes_of_samplers(samplers: int, each: int) -> int:
    """Return the memory of a worker's samplers, and of the process that they are copies of."""
    return PROCESS_BYTES + samplers * each if samplers else 0


def check_device(config: TrainConfig) -> None:
    """Raise UserError if the run wants a GPU and this process sees none."""
    if config.use_gpu and not torch.cuda.is_available():
        raise UserError(
            "--use-gpu was given but torch sees no CUDA device here; leave it out to train on the CPU, or install a "
            "CUDA build of torch on a machine with a GPU (dngd doctor tells)"
        )


def device_of(config: TrainConfig) -> torch.device:
    """Return where a run trains in this process. Raises UserError if it wants a GPU and there is none."""
    if not config.use_gpu:
        return torch.device("cpu")
    check_device(config)
    return torch.device("cuda", torch.cuda.current_device())


def check_fits(plan: RunPlan, config: TrainConfig, workers_here: int, *, is_worker: bool = False) -> None:
    """Raise UserError if this machine's free memory cannot hold its workers.

    is_worker: whether this process is one of them; what it has taken already is then not wanted once more.
    """
    free = available_memory()
    # Evaluation's tables go to disk where they would not fit, unless they were given the memory.
    tables = min(plan.evaluation_table_bytes, config.eval_memory_bytes or 0)
    taken = min(PROCESS_BYTES, private_memory()) if is_worker else 0
    needed = (plan.worker_bytes - taken) * workers_here + tables
    if needed > free:
        parts = {
            "weights": plan.model_bytes + plan.optimizer_bytes,
            "curvature": plan.curvature_bytes,
            "links": plan.link_bytes,
            "full batch": plan.full_batch_bytes,
            "sparse features": plan.sparse_bytes,
            "activations": plan.activation_bytes,
            "evaluation": max(plan.evaluation_bytes, tables),
            "samplers": plan.sampler_bytes,
        }
        largest = max(parts, key=lambda name: parts[name])
        constant = config.constant_full_batch
        fix = {
            "weights": "use a smaller --hidden",
            "curvature": "use a first-order --optimizer or a graph with fewer features",
            "sparse features": "use --set sparse_features=false, or a machine with more memory",
            "links": "use a machine with more memory, or fewer workers a machine",
            "full batch": "use a number as --batch-size with a --fanout, which samples",
            "activations": "use more --num-shards, or a number as --batch-size with a --fanout"
            if constant
            else f"use a smaller --batch-size{', --negatives' if config.task == 'link' else ''} or --fanout",
            "evaluation": "use a smaller --hidden, --set eval_rows=N or --set eval_memory_bytes=N",
            "samplers": "use fewer --num-samplers",
        }[largest]
        raise UserError(
            f"{workers_here} worker(s) need about {needed / 2**30:.1f} GiB (largest part: {largest}, "
            f"{parts[largest] / 2**30:.1f} GiB each) but {free / 2**30:.1f} GiB are free; {fix}"
        )
    if config.use_gpu and torch.cuda.is_available():
        gpu_free = int(free_gpu_bytes(torch.device("cuda", torch.cuda.current_device())) * config.gpu_share)
        placement = choose_placement(config, plan.feature_bytes, gpu_free, plan.gpu_bytes)
        on_gpu = plan.gpu_bytes + placement.device_bytes
        if on_gpu > gpu_free:
            pinned = ", or --feature-placement pinned" if placement.where == "device" else ""
            raise UserError(
                f"a worker needs about {on_gpu / 2**30:.1f} GiB of GPU memory but {gpu_free / 2**30:.1f} GiB are free; "
                f"use a smaller --batch-size, --fanout or --hidden{pinned}"
            )
