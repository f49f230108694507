"""The configuration of a training run: pydantic models, one line a field; YAML in and out.

A field marked `identity` defines the run: a resumed run may not change it, since its curve would no
longer be the one it would have had. The others (workers, samplers, epochs, ...) may change.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_validator,
)
from pydantic.config import JsonDict
from pydantic_core import PydanticCustomError

from dngd.config_text import explain, merge, read_yaml
from dngd.config_uses import Use
from dngd.errors import UserError

IDENTITY: JsonDict = {"identity": True}

_CREDENTIALS_FIX = "leave them out and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or ~/.aws), for gs:// GOOGLE_APPLICATION_CREDENTIALS"

_ADDRESS = re.compile(r"([a-z0-9][a-z0-9+.-]+):/+(.*)", re.DOTALL | re.IGNORECASE)
"""A scheme, of two letters at least (C:/x is a path), and what follows; a Path has eaten a slash of it."""

_PLACES = ("s3", "s3a", "gs", "gcs")
"""Schemes of addresses."""

_SCIENTIFIC = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+")
"""A number that YAML 1.1 takes for a text: 1e9."""

KL_BOUND = 0.1
"""δ where it is left open, nats a seed."""
KL_CLIP = 3e-2
"""κ where it is left open and steps are not measured."""

BATCH_SIZE = 1024
"""The default, which stands for fewer where there are fewer to train on."""

MOST_SEEDS_EMPIRICAL = 1024
"""Seeds a shard up to which the empirical Fisher is the default."""


MAX_WIDTH = 65_536
"""Of hidden layers and embeddings; a layer's weight between two of these has 16 GiB."""

MOST_COUNT = 10**12
"""Of steps, epochs, rows, columns: beyond any run, and what its 64-bit numbers and products bear."""

MOST_BYTES = 10**18
MOST_SECONDS = 1e9
"""31 years; timers fail above a few hundred."""

LARGEST = 1e30
"""Of what 32-bit floats, which end at 3.4e38, are multiplied with."""

LearningRateKind = Literal["constant", "cosine", "hyperbolic"]


def _items(value: object) -> list[object]:
    """Return what a list or mapping holds; else the value itself."""
    if isinstance(value, list | tuple):
        return list(value)
    return list(value.values()) if isinstance(value, dict) else [value]


def _with_numbers(value: object) -> object:
    """Return a value, or a list or mapping of such, with numbers in place of texts such as 1e9."""
    if isinstance(value, list | tuple):
        return [_with_numbers(item) for item in value]
    if isinstance(value, dict):
        return {key: _with_numbers(item) for key, item in value.items()}
    return float(value) if isinstance(value, str) and _SCIENTIFIC.fullmatch(value.strip()) else value


def _takes_numbers(annotation: object) -> bool:
    """Whether a field's type, or what is in it, is a number."""
    return annotation in (int, float) or any(map(_takes_numbers, get_args(annotation)))


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: object, info: ValidationInfo) -> object:
        """Refuse true where a number belongs: to Python it is 1."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        held = _items(value) if _takes_numbers(annotation) else [value]
        if any(isinstance(item, bool) for item in held) and annotation is not bool:
            raise PydanticCustomError("truth", "input should be something else than true or false")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _scientific(cls, value: object, info: ValidationInfo) -> object:
        """Take a text such as 1e9 for the number, where one belongs; in a field of texts it stays as it is."""
        return _with_numbers(value) if _takes_numbers(cls.model_fields[str(info.field_name)].annotation) else value


# fmt: off
# one line a field, however long
class KFACConfig(_Section):
    """Natural gradient (`optimizer: kfac`); see dngd.optim.NaturalGradient for the formulas."""

    update: Literal["mean_gradient", "momentum", "adam_eigenbasis"] = Field("mean_gradient", description="natural gradient of the gradients' running mean, momentum on the natural gradient, or Adam in the factors' eigenbasis (lr 0.01 by default)", json_schema_extra=IDENTITY)
    method: Literal["kfac", "ekfac"] = Field("kfac", description="damped inverses, or eigenvalue-corrected", json_schema_extra=IDENTITY)
    fisher: Literal["empirical", "monte_carlo", "ggn"] | None = Field(None, description="labels behind G: the true ones, sampled ones, or the exact Gauss-Newton matrix (one backward a class); null: monte_carlo for batches above 1,024 seeds, in full batch, and where seeds are weighed, else empirical, also for the paper's variant", json_schema_extra=IDENTITY)
    variant: Literal["dngd", "paper"] = Field("dngd", description="paper: the factors of arXiv 2008.09624's code (gradients of the mean loss times the layer's width), for reproduction", json_schema_extra=IDENTITY)
    damping: float | None = Field(None, gt=0, le=LARGEST, description="λ; a share of tr A in relative mode, in units of the Fisher in tikhonov mode; null: min(0.1, 1/classes)/√(training nodes) in relative mode, else 0.01", json_schema_extra=IDENTITY)
    damping_mode: Literal["relative", "tikhonov", "even"] | None = Field(None, description="relative: λ·tr A and ratio·λ·tr G; tikhonov: √λ·π and √λ/π; even: √λ each; null: relative for task node, tikhonov for link", json_schema_extra=IDENTITY)
    damping_g_ratio: float | None = Field(None, gt=0, le=LARGEST, description="relative mode: G's share over A's; null: G's share is 0.5/classes, 30 times A's where these are unknown", json_schema_extra=IDENTITY)
    factor_decay: float = Field(0.95, ge=0, lt=1, description="ρ of the running averages, per factor step", json_schema_extra=IDENTITY)
    factor_update_period: int = Field(10, ge=1, le=MOST_COUNT, description="steps between factor steps", json_schema_extra=IDENTITY)
    inverse_update_period: int = Field(50, ge=1, le=MOST_COUNT, description="steps between two refreshes of a layer", json_schema_extra=IDENTITY)
    eigenvalue_update_period: int = Field(10, ge=1, le=MOST_COUNT, description="ekfac: steps between two corrections of the eigenvalues", json_schema_extra=IDENTITY)
    dense_steps: int = Field(1, ge=0, le=MOST_COUNT, description="first steps that are all factor steps; above 0, also those at powers of two, with new inverses from there on, in the first period", json_schema_extra=IDENTITY)
    inverse_delay: int = Field(0, ge=0, le=MOST_COUNT, description="steps from a refresh's launch to its adoption; 0 waits at once", json_schema_extra=IDENTITY)
    change_threshold: float = Field(0.0, ge=0, le=LARGEST, description="a factor whose relative change since its inversion is at most this is not inverted again", json_schema_extra=IDENTITY)
    kl_clip: Annotated[float, Field(gt=0, le=LARGEST)] | Literal["auto"] | None = Field("auto", description="κ > 0, bound of η²·⟨natural gradient, gradient⟩, twice a step's predicted KL; null for none; auto: none where kl_bound is in use, else 0.03", json_schema_extra=IDENTITY)
    kl_clip_steps: float | None = Field(10.0, ge=1e-6, le=MOST_COUNT, description="T of κ/(1 + step/T)², so that steps that the clip binds fall as 1/t; null: κ stays; with another value than this, or of kl_clip_power, kl_clip=auto is 0.03", json_schema_extra=IDENTITY)
    kl_clip_power: float = Field(2.0, ge=0, le=16, description="power of that fall; 1: κ/(1 + step/T)", json_schema_extra=IDENTITY)
    kl_bound: float | None = Field(None, gt=0, le=LARGEST, description="δ, in place of kl_clip: bound of a step's KL divergence, nats a seed, as measured now and then; goes with update=mean_gradient, variant dngd, task node, no semi and the built-in loss; null: 0.1 where it goes and kl_clip is auto, but for class_weights and modules of one's own; else kl_clip bounds the predicted one", json_schema_extra=IDENTITY)
    kl_bound_steps: float | None = Field(5.0, ge=1e-6, le=MOST_COUNT, description="T of δ/(1 + step/T)²; null: δ stays", json_schema_extra=IDENTITY)
    kl_bound_period: int = Field(20, ge=1, le=MOST_COUNT, description="steps between two measurements of the divergence, two more forward passes of 64 seeds of one shard (of all its seeds with a module of one's own); also at powers of two", json_schema_extra=IDENTITY)
    norm_constraint: float | None = Field(None, gt=0, le=LARGEST, description="bound of a step's length η‖v‖ before momentum; null for none", json_schema_extra=IDENTITY)
    momentum: float | None = Field(None, ge=0, lt=1, description="μ, of the gradients' mean, or of the natural gradients; null: 0.8 for mean_gradient, else 0.9", json_schema_extra=IDENTITY)
    max_rows: int | None = Field(512, ge=1, le=MOST_COUNT, description="rows of a layer and shard that are measured at most, an unbiased draw; null for all", json_schema_extra=IDENTITY)
    max_dimension: int | None = Field(None, ge=1, le=MOST_COUNT, description="widest factor that is kept dense; null: 640, and 400 for an A that becomes low_rank", json_schema_extra=IDENTITY)
    wide_inputs: Literal["low_rank", "block_diagonal", "diagonal", "dense"] = Field("low_rank", description="what a wider A becomes", json_schema_extra=IDENTITY)
    rank: int | None = Field(None, ge=1, le=MOST_COUNT, description="of low_rank; null: 64, and 128 for factors wider than 4096", json_schema_extra=IDENTITY)
    output_rank: int | None = Field(None, ge=0, le=MOST_COUNT, description="columns of a low-rank G, for layers at least four times as wide, with damped inverses; 0: none is; null: 1/(G's share), by default 2·classes, rounded up to 16s, but 0 unless damping is relative, wide_inputs low_rank and variant dngd", json_schema_extra=IDENTITY)
    inverse_rank: int | None = Field(None, ge=0, le=MOST_COUNT, description="columns of the inverse of a low-rank A wider than 4096, its largest directions; 0: all of rank; null: 64 where A's damping is at least 5e-4 of its trace, else all", json_schema_extra=IDENTITY)
    split_inputs: bool = Field(True, description="GraphSAGE: a block of A each for self and neighbour rows", json_schema_extra=IDENTITY)
    inverse_precision: Literal["float16", "bfloat16", "full"] = Field("float16", description="in which inverses are kept and sent", json_schema_extra=IDENTITY)

    factor_wire: Literal["float32", "bfloat16"] = Field("float32", description="in which statistics travel; bfloat16: what rounding leaves over is sent with the next ones, and factors that could not bear it travel in float32", json_schema_extra=IDENTITY)
    strategy: Literal["auto", "replicate", "share_inverse", "share_gradient"] = Field("auto", description="every rank inverts, owners send inverses, owners send preconditioned gradients, or what agreed measurements favour for each layer")
    traffic_budget: float = Field(0.03, ge=0, le=LARGEST, description="strategy auto: a layer's inverses are sent only where they and its statistics send at most this share of its gradient's bytes a step, else every rank inverts; share_gradient needs 1")
    refresh_budget_seconds: float | None = Field(None, gt=0, le=MOST_SECONDS, description="most seconds of inversions that a step starts, as measured; further layers wait for the next step; null for no limit", json_schema_extra=IDENTITY)
    cuda_graph: bool = Field(True, description="on a GPU, a step's preconditioning is replayed as a CUDA graph, with method kfac; the numbers are the same")

    @property
    def has_usual_clip_schedule(self) -> bool:
        """Whether how the clip falls was left as it is by default."""
        return all(getattr(self, name) == type(self).model_fields[name].default for name in ("kl_clip_steps", "kl_clip_power"))

    @model_validator(mode="after")
    def _delay_below_period(self) -> KFACConfig:
        if self.inverse_delay >= self.inverse_update_period:
            raise ValueError(f"inverse_delay={self.inverse_delay} must be below inverse_update_period={self.inverse_update_period}")
        if self.strategy == "share_gradient" and (self.method != "kfac" or self.update == "adam_eigenbasis"):
            raise ValueError("strategy=share_gradient leaves a layer's factors with one rank, but ekfac and adam_eigenbasis need their eigenbases on every rank; use --set kfac.strategy=share_inverse")
        return self


class CheckpointConfig(_Section):
    """Checkpoints in RUN/checkpoints."""

    period_steps: int | None = Field(None, ge=1, le=MOST_COUNT, description="steps between checkpoints; null: at the end of each epoch, in constant full batch every 50")
    period_minutes: float | None = Field(5.0, gt=0, le=MOST_SECONDS, description="a checkpoint also after about this many minutes without one, minutes; null: never for that reason")
    keep: int = Field(3, ge=1, le=MOST_COUNT, description="newest checkpoints kept")
    write_timeout_seconds: float = Field(600.0, gt=0, le=MOST_SECONDS, description="limit of the wait for a checkpoint that is still being written, when the next is due or the run ends, seconds")


class RayConfig(_Section):
    """Ray Train (`engine: ray`)."""

    address: str | None = Field(None, description="cluster to connect to; null: $RAY_ADDRESS, else this machine's, else a local one is started")
    cpus_per_worker: float = Field(1.0, gt=0, le=MOST_COUNT, description="CPUs reserved for a worker")
    gpus_per_worker: float = Field(1.0, gt=0, le=MOST_COUNT, description="GPUs reserved for a worker with use_gpu; below 1 workers share one")
    resources_per_worker: dict[str, Annotated[float, Field(ge=0, le=MOST_BYTES)]] = Field(default_factory=dict, description="other Ray resources reserved for a worker, e.g. {memory: 8e9}")
    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = Field("PACK", description="workers on as few nodes as possible, on as many, on one alone, or each on a node of its own")
    backend: Literal["auto", "nccl", "gloo"] = Field("auto", description="collectives; auto: nccl where each worker has a GPU of its own, else gloo")
    min_workers: int | None = Field(None, ge=1, le=MOST_COUNT, description="fewest workers that the run goes on with when nodes are lost; null: num_workers, which is the most")
    resize_period_seconds: float = Field(60.0, gt=0, le=MOST_SECONDS, description="with min_workers: time between two looks at whether the cluster has room for more workers, seconds")
    start_timeout_seconds: float | None = Field(None, gt=0, le=MOST_SECONDS, description="limit for the cluster to offer what is asked, seconds; null: 45, or 900 where it has an autoscaler, which is asked for it")
    max_failures: int = Field(5, ge=0, le=MOST_COUNT, description="losses of workers in a row, without a newer checkpoint between them, that the run recovers from")
    stall_timeout_seconds: float = Field(60.0, gt=0, le=MOST_SECONDS, description="a worker that is silent, or keeps the others waiting, for this long is killed and started again, seconds")
    recovery_timeout_seconds: float = Field(600.0, gt=0, le=MOST_SECONDS, description="limit for workers to run, at the start and again after a loss, seconds; more where nodes take longer to be replaced")


class TrainConfig(_Section):
    """Everything that a run is made of. Raises UserError, with the fix, for an unknown key or a bad value."""

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise UserError(explain(error, type(self))) from None

    dataset: str = Field(description="name (DATA_ROOT/NAME.npz or built-in), path of a store or npz file, or s3:// or gs:// address of a store")
    data_root: Path | None = Field(None, description="folder of data sets; null: $DNGD_DATA_ROOT")
    cache_dir: Path | None = Field(None, description="folder of converted stores, and of copies; null: $DNGD_CACHE_DIR or ~/.cache/dngd")
    stage_dir: Path | None = Field(None, description="folder on each node's own disk where stores on s3:// or gs:// are kept, and a store folder (on a shared file system, say) is copied too, once a node; null: cache_dir, and a store folder is opened where it lies")
    stage_timeout_seconds: float = Field(3600.0, gt=0, le=MOST_SECONDS, description="limit for all nodes to have the graph, copied or converted, seconds")
    split: str = Field("masks", description="masks | masks:K | public | complete | random:TRAIN/VAL/TEST", json_schema_extra=IDENTITY)
    task: Literal["node", "link"] = Field("node", description="what is predicted; node: labels of nodes; link: whether two nodes are linked, by the inner product of their embeddings", json_schema_extra=IDENTITY)
    link_split: str = Field("0.8/0.1/0.1", description="task link: shares TRAIN/VAL/TEST of the links, by a hash of the seed and the two nodes; validation and test links are no edges of the graph that is trained on", json_schema_extra=IDENTITY)
    negatives: int = Field(1, ge=1, le=MOST_COUNT, description="task link: pairs of nodes drawn uniformly a training link and step, as examples of no link", json_schema_extra=IDENTITY)
    embedding: int | None = Field(None, ge=1, le=MAX_WIDTH, description="task link: width of a node's embedding, the model's output; null: hidden", json_schema_extra=IDENTITY)
    model: Literal["gcn", "sage", "custom"] = Field("gcn", description="layer kind; custom: a module given to dngd.Trainer", json_schema_extra=IDENTITY)
    hidden: int = Field(256, ge=1, le=MAX_WIDTH, description="width of the hidden layers", json_schema_extra=IDENTITY)
    num_layers: int = Field(3, ge=1, le=16, description="number of graph layers", json_schema_extra=IDENTITY)
    fanout: tuple[Annotated[int, Field(le=MOST_COUNT)], ...] | None = Field(None, description="neighbours drawn per layer, input side first, -1 for all; null: 15,10,5 cut or repeated to num_layers, or with batch_size full all", json_schema_extra=IDENTITY)
    dropout: float = Field(0.5, ge=0, lt=1, description="between layers", json_schema_extra=IDENTITY)
    batch_size: Annotated[int, Field(le=MOST_COUNT)] | Literal["full"] = Field(BATCH_SIZE, description=f"seeds a shard and step, training nodes or links ({BATCH_SIZE} stands for all of them, over the shards, where there are fewer); full: all training nodes in one step, all neighbours unless fanout says otherwise", json_schema_extra=IDENTITY)
    semi: Literal["none", "two_means", "pooled"] = Field("none", description="loss of the nodes outside the training set, their own prediction as label, weight λ_u = semi_weight·(epoch/epochs)^semi_gamma; two_means: mean(labelled) + λ_u·mean(others); pooled: one weighted mean", json_schema_extra=IDENTITY)
    semi_gamma: float = Field(1.0, gt=0, le=LARGEST, description="γ of λ_u, a number above 0; larger keeps the others out longer", json_schema_extra=IDENTITY)
    semi_weight: float = Field(1.0, gt=0, le=LARGEST, description="λ_u in the last epoch", json_schema_extra=IDENTITY)
    semi_labels: Literal["argmax", "soft"] = Field("argmax", description="their labels; argmax: of the step's own pass, as in arXiv 2008.09624; soft: p^(1/semi_temperature), normalised, of the prediction p without dropout before the step", json_schema_extra=IDENTITY)
    semi_temperature: float = Field(0.5, ge=1e-6, le=1, description="of soft labels; 1 leaves the prediction as it is, towards 0 it becomes the arg-max", json_schema_extra=IDENTITY)
    semi_share: float = Field(0.5, gt=0, lt=1, description="share of batch_size that is drawn from the nodes outside the training set; batch_size full takes all of them in each step", json_schema_extra=IDENTITY)
    epochs: int = Field(10, ge=1, le=MOST_COUNT, description="passes over the training nodes; another number on resuming also bends a cosine schedule and λ_u")
    max_steps: int | None = Field(None, ge=1, le=MOST_COUNT, description="stop after this many steps")
    optimizer: Literal["kfac", "adam", "adamw", "sgd", "custom"] = Field("kfac", description="kfac: natural gradient; custom: one given to dngd.Trainer, which brings its rates and weight decay", json_schema_extra=IDENTITY)
    lr: float | None = Field(None, gt=0, le=1e38, description="peak learning rate; null: 0.3 kfac with its falling schedule, else 0.1, 0.01 adam and adamw, 0.1 sgd", json_schema_extra=IDENTITY)
    lr_schedule: LearningRateKind | None = Field(None, description="cosine: to 0 over all steps of the run; hyperbolic: lr/(1 + step/lr_half_steps), however long the run; null: hyperbolic for kfac with update=mean_gradient and task node, else cosine", json_schema_extra=IDENTITY)
    lr_half_steps: float = Field(20.0, gt=0, le=MOST_COUNT, description="hyperbolic: steps after which the rate is halved", json_schema_extra=IDENTITY)
    warmup_steps: int = Field(0, ge=0, le=MOST_COUNT, description="steps of linear warm-up", json_schema_extra=IDENTITY)
    metric: Literal["accuracy", "macro_f1", "roc_auc", "average_precision"] | None = Field(None, description="what the best model is chosen by, on validation nodes or links; the run's files hold it as val_accuracy and test_accuracy; null: accuracy for task node, roc_auc for link", json_schema_extra=IDENTITY)
    class_weights: Literal["balanced"] | tuple[Annotated[float, Field(allow_inf_nan=True)], ...] | None = Field(None, description="weights of the classes' losses, one a class; balanced: nodes / (classes · nodes of the class), of the training set; null: all 1", json_schema_extra=IDENTITY)
    patience: int | None = Field(None, ge=1, le=MOST_COUNT, description="evaluations in a row without a better validation metric after which the run ends; null: never")
    weight_decay: float = Field(0.0, ge=0, le=LARGEST, description="decoupled for kfac and adamw, L2 for adam and sgd", json_schema_extra=IDENTITY)
    momentum: float = Field(0.9, ge=0, lt=1, description="of sgd", json_schema_extra=IDENTITY)
    average_share: float = Field(0.0, ge=0, le=1, description="the weights that are evaluated and kept are the mean of those of about this last share of the steps, 0.3, say; 0: the last step's", json_schema_extra=IDENTITY)
    kfac: KFACConfig = Field(default_factory=lambda: KFACConfig(), description="natural-gradient settings")
    seed: int = Field(0, ge=0, lt=2**31, description="of weights, splits, batches, sampling, dropout", json_schema_extra=IDENTITY)
    engine: Literal["local", "ray"] = Field("ray", description="ray: Ray Train workers; local: this process")
    num_workers: int = Field(1, ge=1, le=MOST_COUNT, description="Ray Train workers; with engine local: the number of shards run here")
    num_shards: int | None = Field(None, ge=1, le=MOST_COUNT, description="S, logical shards of a step; null: num_workers", json_schema_extra=IDENTITY)
    use_gpu: bool = Field(False, description="one GPU a worker")
    feature_placement: Literal["auto", "device", "pinned", "disk"] = Field("auto", description="where the feature table lies; device: on the GPU; pinned: in the machine's memory, one copy for its workers; disk: there, for a table larger than memory; auto: device if it fits in half of the GPU's free memory, else pinned, and on a CPU the store's map as it is")
    feature_cache_bytes: int | None = Field(None, ge=0, le=MOST_BYTES, description="GPU memory for the features of the most frequent sources where the table is not there, bytes; null: a quarter of the GPU's free memory if the table does not fit, else 0")
    sparse_features: bool = Field(True, description="on a CPU, for --model gcn and sage: a table of at least 256 features of which few are not zero (words of a text) is worked on as its entries alone, where the first layer's sums of neighbours are at most a fifth full; false: as a dense table")
    num_samplers: int | None = Field(None, ge=0, le=64, description="sampler processes a worker; 0: a thread of the training process; null: 0 on a CPU, with use_gpu the worker's share of the machine's CPUs (or ray.cpus_per_worker, above 1), less two, 12 at most")
    prefetch: int = Field(2, ge=1, le=64, description="batches that each sampler may be ahead")
    keep_memory: bool = Field(True, description="on a CPU: memory that a step frees stays with the process for the next one, instead of going back to the system; faster, and the process keeps the most that it ever used")
    loggers: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = Field((), description="where evaluations and step losses go beside metrics.jsonl and metrics.csv: tensorboard, mlflow, wandb, each an extra of dngd")
    eval_period: int = Field(1, ge=1, le=MOST_COUNT, description="epochs between evaluations; the last epoch is always evaluated")
    eval_rows: int = Field(65536, ge=1, le=MOST_COUNT, description="most rows worked on at a time in exact evaluation; a smaller block may be chosen for the caches' sake")
    eval_memory_bytes: int | None = Field(None, ge=0, le=MOST_BYTES, description="memory that a machine may hold exact evaluation's tables in, bytes; what goes beyond lies in unnamed files below cache_dir or the run folder; null: half of what is available")
    collective_timeout_seconds: float = Field(120.0, gt=0, le=MOST_SECONDS, description="limit of every wait for another rank, seconds")
    max_dropped_steps: int = Field(10, ge=1, le=MOST_COUNT, description="non-finite steps in a row after which training stops")
    checkpoint: CheckpointConfig = Field(default_factory=lambda: CheckpointConfig(), description="checkpoints")
    ray: RayConfig = Field(default_factory=lambda: RayConfig(), description="cluster")
    run_dir: Path | None = Field(None, description="run folder, or its s3:// or gs:// address; null: runs/DATASET-MODEL-OPTIMIZER-TIME")
    resume: bool = Field(False, description="go on from run_dir's newest good checkpoint; a folder without a run starts one")

    # fmt: on
    @field_validator("dataset", mode="before")
    @classmethod
    def _dataset_text(cls, value: object) -> object:
        if hasattr(value, "edge_index"):
            raise ValueError(f"dataset is a {type(value).__name__} object, and a path or name is wanted; write it as a store: dngd.graph.import_pyg(data, 'my.store'), then dataset='my.store'")
        return str(value) if isinstance(value, Path) else value

    @field_validator("dataset", mode="after")
    @classmethod
    def _no_credentials(cls, value: str) -> str:
        scheme, mark, rest = value.partition("://")
        if not mark and (found := _ADDRESS.match(value)) and found[1].lower() in _PLACES:
            scheme, mark, rest = found[1], ":/", found[2]
        if mark and _holds_credentials(rest):
            # The value is not repeated: it would reach logs, and the run's config.yaml.
            raise ValueError(f"the {scheme}:// address of dataset holds credentials before an @; {_CREDENTIALS_FIX}")
        return value

    @field_validator("run_dir", mode="before")
    @classmethod
    def _run_dir_is_a_place(cls, value: object) -> object:
        found = _ADDRESS.match(str(value)) if isinstance(value, str | Path) else None
        if found and found[1].lower() not in _PLACES:
            raise ValueError(f"run_dir={found[1]}://… is no place for a run; give a folder, or an s3:// or gs:// address")
        if found and _holds_credentials(found[2]):
            raise ValueError(f"the {found[1]}:// address of run_dir holds credentials before an @; {_CREDENTIALS_FIX}")
        return value

    @field_serializer("run_dir", when_used="json")
    def _run_dir_text(self, value: Path | None) -> str | None:
        return self.run_address or (None if value is None else str(value))

    @field_validator("fanout", mode="before")
    @classmethod
    def _fanout_text(cls, value: object) -> object:
        if isinstance(value, str):
            try:
                return tuple(part if _SCIENTIFIC.fullmatch(part.strip()) else int(part) for part in value.split(","))
            except ValueError:
                raise ValueError(f"fanout={value!r} is not a list of whole numbers; write e.g. 15,10,5") from None
        return (value,) if isinstance(value, int) else value

    @field_validator("loggers", mode="before")
    @classmethod
    def _loggers_text(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value

    @field_validator("loggers", mode="after")
    @classmethod
    def _loggers_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError(f"loggers={','.join(value)} names one twice; leave the second out")
        return value

    @field_validator("class_weights", mode="before")
    @classmethod
    def _class_weights_text(cls, value: object) -> object:
        if isinstance(value, str) and value != "balanced":
            try:
                return tuple(float(part) for part in value.split(","))
            except ValueError:
                raise ValueError(f"class_weights={value!r} is neither balanced nor a list of numbers; write e.g. 1,2.5,1") from None
        return (value,) if isinstance(value, int | float) else value

    @field_validator("batch_size", mode="after")
    @classmethod
    def _batch_size_positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError(f"batch_size={value} must be at least 1, or full")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.fanout is not None:
            if len(self.fanout) != self.num_layers:
                raise ValueError(f"fanout={self.fanout} has {len(self.fanout)} entries but num_layers={self.num_layers}; give one per layer, input side first")
            if any(entry == 0 or entry < -1 for entry in self.fanout):
                raise ValueError(f"fanout={self.fanout} has an entry that is neither positive nor -1 (all neighbours)")
        if self.semi != "none" and self.batch_size != "full" and not 0 < self.unlabelled_of(self.batch_size) < self.batch_size:
            raise ValueError(f"semi_share={self.semi_share} of batch_size={self.batch_size} leaves a shard without a labelled or without an unlabelled seed; use a larger --batch-size, or another --set semi_share=X")
        if self.optimizer == "kfac" and self.semi != "none" and self.fisher == "empirical" and self.kfac.variant != "paper":
            raise ValueError(f"semi={self.semi} weighs its seeds unequally, which the empirical Fisher cannot do; leave kfac.fisher away, or use --set kfac.fisher=monte_carlo")
        if isinstance(self.class_weights, tuple) and not all(0 < weight <= LARGEST for weight in self.class_weights):
            raise ValueError(f"class_weights={self.class_weights} has an entry that is no number above 0, up to {LARGEST:g}")
        if self.class_weights is not None and self.semi != "none":
            raise ValueError(f"class_weights and semi={self.semi} both weigh the seeds; leave one out")
        if self.class_weights is not None and self.optimizer == "kfac" and self.fisher == "empirical":
            raise ValueError("class_weights weigh the seeds unequally, which the empirical Fisher cannot do; leave kfac.fisher away, or use --set kfac.fisher=monte_carlo")
        if self.optimizer == "kfac" and self.kfac.kl_bound is not None:
            for name, goes, why in self._with_kl_bound():
                if not goes:
                    value = getattr(self.kfac if name.startswith("kfac.") else self, name.removeprefix("kfac."))
                    raise ValueError(f"kfac.kl_bound={self.kfac.kl_bound} does not go with {name}={value}: {why}")
        if self.task == "link":
            for name, off, why in (
                ("batch_size", self.batch_size != "full", "a step's own links are no edges of its messages, and full leaves none; use a number"),
                ("semi", self.semi == "none", "it is about labels of nodes; leave it out"),
                ("class_weights", self.class_weights is None, "it is about labels of nodes; leave it out"),
                ("metric", self.metric != "macro_f1", "it is about classes of nodes; use --metric roc_auc, average_precision or accuracy"),
            ):
                if not off:
                    raise ValueError(f"{name}={getattr(self, name)} does not go with task=link: {why}")
        if self.optimizer == "custom" and (self.lr is not None or self.weight_decay):
            raise ValueError("optimizer=custom brings its own learning rate and weight decay; leave lr and weight_decay out, and set them where the optimizer is made")
        if not self.use_gpu and self.feature_placement in ("device", "pinned"):
            raise ValueError(f"feature_placement={self.feature_placement} is about a GPU but use_gpu is off; add --use-gpu, or use --feature-placement auto")
        if self.feature_cache_bytes and (not self.use_gpu or self.feature_placement == "device"):
            why = "feature_placement=device keeps the whole table on the GPU" if self.use_gpu else "use_gpu is off"
            raise ValueError(f"feature_cache_bytes={self.feature_cache_bytes} is of no use since {why}; leave it out")
        if self.ray.min_workers is not None and self.ray.min_workers > self.num_workers:
            raise ValueError(f"ray.min_workers={self.ray.min_workers} is above num_workers={self.num_workers}, which is the most; use at most {self.num_workers}")
        if self.ray.backend == "nccl" and not self.use_gpu:
            raise ValueError("ray.backend=nccl needs GPUs but use_gpu is off; add --use-gpu, or leave ray.backend at auto")
        if not any(({"CPU": self.ray.cpus_per_worker} | ({"GPU": self.ray.gpus_per_worker} if self.use_gpu else {}) | self.ray.resources_per_worker).values()):
            raise ValueError(f"ray.resources_per_worker={self.ray.resources_per_worker} leaves a worker nothing to reserve, which Ray does not start; give one amount above 0, e.g. {{CPU: 0.1}}")
        if self.num_workers > self.shards:
            raise ValueError(f"num_workers={self.num_workers} is above num_shards={self.shards}: a worker would have no shard; use at most {self.shards} worker{'s' if self.shards > 1 else ''}, or for a new run --num-shards {self.num_workers} or more")
        return self

    @property
    def fanouts(self) -> tuple[int, ...]:
        """The fanout in use, one entry a layer, input side first."""
        if self.fanout is not None:
            return self.fanout
        if self.batch_size == "full":
            return (-1,) * self.num_layers
        return ((15, 10, 5) + (5,) * self.num_layers)[: self.num_layers]

    @property
    def constant_full_batch(self) -> bool:
        """Whether every step is the same: all training nodes as seeds, all neighbours, so that nothing is sampled."""
        return self.batch_size == "full" and all(entry == -1 for entry in self.fanouts)

    def unlabelled_of(self, batch_size: int) -> int:
        """Return how many of a mini-batch's seeds are nodes outside the training set."""
        return 0 if self.semi == "none" else round(self.semi_share * batch_size)

    @property
    def embedding_width(self) -> int:
        """The width of a node's embedding in link prediction."""
        return self.hidden if self.embedding is None else self.embedding

    @property
    def shards(self) -> int:
        """S, the number of logical shards of a step."""
        return self.num_shards if self.num_shards is not None else self.num_workers

    @property
    def samplers(self) -> int:
        """num_samplers, or what null stands for. A thread draws as fast on a CPU (dngd/bench/results/pipeline.json),
        starts at once, and saves the third of a gigabyte that a process with torch and DGL in it takes."""
        if self.num_samplers is not None:
            return self.num_samplers
        return 1 if self.use_gpu else 0

    @property
    def min_workers(self) -> int:
        """The fewest Ray Train workers that the run goes on with."""
        return self.ray.min_workers if self.ray.min_workers is not None else self.num_workers

    @property
    def gpu_share(self) -> float:
        """A worker's share of what is free on its GPU, which others may use with it."""
        return min(1.0, self.ray.gpus_per_worker) if self.engine == "ray" else 1.0

    @property
    def collective_backend(self) -> Literal["nccl", "gloo"]:
        """The backend of the workers' collectives."""
        if self.ray.backend != "auto":
            return self.ray.backend
        return "nccl" if self.use_gpu and self.ray.gpus_per_worker >= 1 else "gloo"

    @property
    def fisher(self) -> Literal["empirical", "monte_carlo", "ggn"]:
        """The kind of Fisher in use. By measurement (dngd/bench/results/fisher-*.json) Monte-Carlo is better at batch
        4096 and in full batch, where seeds share more nodes, and as good at 256; with two uneven classes (tolokers) its
        sampled labels are noisier than the true ones."""
        if self.kfac.fisher is not None:
            return self.kfac.fisher
        if self.kfac.variant == "paper":
            return "empirical"
        seeds_share_nodes = self.batch_size == "full" or self.batch_size > MOST_SEEDS_EMPIRICAL
        weighs_seeds = self.semi != "none" or self.class_weights is not None
        return "monte_carlo" if seeds_share_nodes or weighs_seeds else "empirical"

    @property
    def damping_mode(self) -> Literal["relative", "tikhonov", "even"]:
        """The damping in use. A link's logit is quadratic in the embeddings: where they are small, so is the Fisher, and
        damping that is a share of it bounds no step (on Cora, a loss above 100 after the first)."""
        return self.kfac.damping_mode or ("tikhonov" if self.task == "link" else "relative")

    def _with_kl_bound(self) -> tuple[tuple[str, bool, str], ...]:
        """Return the fields that kfac.kl_bound depends on, whether it goes with each, and why it would not."""
        return (
            ("kfac.update", self.kfac.update == "mean_gradient", "it predicts the step of one direction; use kfac.update=mean_gradient"),
            ("kfac.variant", self.kfac.variant == "dngd", "the paper's factors are not the Fisher, and predict no divergence; leave kl_bound out"),
            ("task", self.task == "node", "it was not tried for links; leave kl_bound out"),
            ("semi", self.semi == "none", "it was not tried with labels that the network makes; leave kl_bound out"),
        )

    @property
    def kl_bound(self) -> float | None:
        """The bound of measured divergences in use; None where kl_clip bounds the predicted ones, or nothing does.

        It is no default for what it was not tried with: weighed classes, of which the prediction has the weights and
        the measurement has not, and modules of one's own, which may have running statistics, and are measured on a
        whole shard. By measurement (docs/defaults.md, 24) it suits more graphs than one κ."""
        if self.optimizer != "kfac":
            return None
        if self.kfac.kl_bound is not None:
            return self.kfac.kl_bound
        is_open = self.kfac.kl_clip == "auto" and self.kfac.has_usual_clip_schedule
        was_tried = self.class_weights is None and self.model != "custom"
        return KL_BOUND if is_open and was_tried and all(goes for _, goes, _ in self._with_kl_bound()) else None

    @property
    def kl_clip(self) -> float | None:
        """κ in use; None where steps are measured (kl_bound), or where nothing bounds them."""
        if self.optimizer != "kfac" or self.kl_bound is not None:
            return None
        return KL_CLIP if self.kfac.kl_clip == "auto" else self.kfac.kl_clip

    @property
    def output_rank(self) -> int | None:
        """Columns of a low-rank G; 0: none is; None: as many as its damping, a share of its trace, leaves of use."""
        kfac = self.kfac
        if kfac.output_rank is not None:
            return kfac.output_rank
        goes = self.damping_mode == "relative" and kfac.wide_inputs == "low_rank" and kfac.variant == "dngd"
        return None if goes and self._keeps_inverses else 0

    @property
    def _keeps_inverses(self) -> bool:
        """Whether factors are inverted, and not decomposed."""
        return self.kfac.method == "kfac" and self.kfac.update != "adam_eigenbasis"

    @property
    def metric_in_use(self) -> Literal["accuracy", "macro_f1", "roc_auc", "average_precision"]:
        """What the best model is chosen by."""
        return self.metric or ("roc_auc" if self.task == "link" else "accuracy")

    @property
    def run_address(self) -> str | None:
        """The run folder's address; None if it is a folder of a file system."""
        return None if self.run_dir is None else address_of_run(self.run_dir)

    @property
    def run_name(self) -> str:
        """The last part of the run folder's path or address; empty where it is not settled yet."""
        path = str(self.run_dir or "")
        return Path(path.partition("?")[0] if self.run_address else path).name

    @property
    def learning_rate(self) -> float:
        """The peak learning rate in use; of a custom optimizer, what its own rates are multiplied by."""
        if self.lr is not None:
            return self.lr
        if self.optimizer == "kfac" and self.kfac.update == "adam_eigenbasis":
            return 0.01
        return {"kfac": 0.3 if self._rate_falls and self.schedule == "hyperbolic" else 0.1, "adam": 0.01, "adamw": 0.01, "sgd": 0.1, "custom": 1.0}[self.optimizer]

    @property
    def schedule(self) -> LearningRateKind:
        """The learning rate's schedule in use."""
        if self.lr_schedule is not None:
            return self.lr_schedule
        return "hyperbolic" if self._rate_falls else "cosine"

    @property
    def _rate_falls(self) -> bool:
        """Whether the defaults are a high rate that falls from the first step on; for links that was not tried."""
        return self.optimizer == "kfac" and self.kfac.update == "mean_gradient" and self.task == "node"

    @property
    def data_root_in_use(self) -> Path | None:
        """data_root, or $DNGD_DATA_ROOT, or None."""
        if self.data_root is not None:
            return self.data_root
        value = os.environ.get("DNGD_DATA_ROOT")
        return Path(value) if value else None

    def identity(self) -> dict[str, Any]:
        """Return the fields that define the run, flat, with defaults filled in."""
        flat = _flat_identity(self)
        flat |= {"fanout": list(self.fanouts), "num_shards": self.shards, "lr": self.learning_rate, "lr_schedule": self.schedule}
        flat |= {"kfac.fisher": self.fisher, "kfac.damping_mode": self.damping_mode}
        flat |= {"kfac.output_rank": "by damping" if self.output_rank is None else self.output_rank}
        flat |= {"kfac.inverse_rank": "by damping" if self.kfac.inverse_rank is None else self.kfac.inverse_rank}
        flat |= {"kfac.kl_bound": self.kl_bound, "kfac.kl_clip": self.kl_clip}
        flat |= {"embedding": self.embedding_width, "metric": self.metric_in_use}
        idle = [use for use in self._uses() if use.defines and not use.holds]
        flat = {key: value for key, value in flat.items() if not any(use.is_of(key) for use in idle)}
        # Fields that came later: a run that leaves them alone is the run that it was before.
        for name, usual in (("metric", "accuracy"), ("class_weights", None), ("task", "node"), ("average_share", 0.0), ("kfac.kl_clip_power", 1.0), ("kfac.output_rank", 0), ("kfac.inverse_rank", 0)):
            if flat.get(name) == usual:
                flat.pop(name, None)
        if self.optimizer != "kfac":
            flat = {key: value for key, value in flat.items() if not key.startswith("kfac.")}
        return flat

    def given_since(self, begun: TrainConfig) -> dict[str, tuple[Any, Any]]:
        """Return the fields that define a run and were given another value than there, with both, the earlier first: not
        those that only follow from these."""
        old, new = _flat_identity(begun), _flat_identity(self)
        return {name: (old[name], new[name]) for name in new if old[name] != new[name]}

    def _uses(self) -> tuple[Use, ...]:
        """Return what this run has a use for or not; a field without an entry is used by every run."""
        optimizer, kl_bound = self.optimizer, self.kl_bound
        sgd = "use --optimizer sgd" + (", or --set kfac.momentum=X" if optimizer == "kfac" else "")
        has_steps = self.kl_clip is not None and self.kfac.kl_clip_steps is not None
        return (
            Use(
                ("kfac.*",),
                optimizer == "kfac",
                f"with optimizer={optimizer}; leave it out, or use --optimizer kfac",
                False,
            ),
            Use(
                ("ray.*",), self.engine == "ray", f"with engine={self.engine}; leave it out, or use --engine ray", False
            ),
            Use(("momentum",), optimizer == "sgd", f"with optimizer={optimizer}; leave it out, or {sgd}", False),
            Use(("split",), self.task == "node", "with task=link, whose links are dealt by --link-split; leave it out"),
            Use(
                ("link_split", "negatives", "embedding"),
                self.task == "link",
                "with task=node; leave it out, or use --task link",
            ),
            Use(("semi_*",), self.semi != "none", "without --semi; leave it out, or use --semi two_means or pooled"),
            Use(
                ("semi_temperature",),
                self.semi_labels == "soft",
                "with semi_labels=argmax; leave it out, or use --set semi_labels=soft",
            ),
            Use(
                ("semi_share",),
                self.batch_size != "full",
                "with batch_size=full, which takes all nodes in each step; leave it out",
            ),
            Use(
                ("lr_half_steps",),
                self.schedule == "hyperbolic",
                f"with lr_schedule={self.schedule}; leave it out, or use --lr-schedule hyperbolic",
            ),
            Use(
                ("kfac.kl_clip*",),
                kl_bound is None,
                f"with kfac.kl_bound={kl_bound}, which bounds steps in its place; leave one out",
            ),
            Use(
                ("kfac.output_rank",),
                self._keeps_inverses or not self.kfac.output_rank,
                "with kfac.method=ekfac or kfac.update=adam_eigenbasis, which keep G whole; leave it out",
            ),
            Use(
                ("kfac.inverse_rank",),
                (self._keeps_inverses and self.kfac.wide_inputs == "low_rank") or not self.kfac.inverse_rank,
                "without a low-rank A that is inverted (kfac.wide_inputs=low_rank, not kfac.method=ekfac nor "
                "kfac.update=adam_eigenbasis); leave it out",
            ),
            Use(("kfac.kl_clip_power",), has_steps, "without kfac.kl_clip and kfac.kl_clip_steps; leave it out"),
            Use(("kfac.kl_bound_*",), kl_bound is not None, "where kfac.kl_bound is not in use; leave it out"),
            Use(("kfac.kl_bound",), kl_bound is not None, None),
        )

    def why_unused(self, key: str) -> str | None:
        """Return, as words after "has no effect", why the run does not use a field (dotted name) that was set to another
        value than the usual one, and the fix; None for a field that it uses."""
        return next((use.why for use in self._uses() if use.why and not use.holds and use.is_of(key)), None)

    def to_yaml(self) -> str:
        """Return the configuration as YAML that `from_yaml` reads back."""
        return str(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True))

    @classmethod
    def from_yaml(cls, path: Path, overrides: dict[str, Any] | None = None) -> TrainConfig:
        """Return the configuration of a YAML file, with nested overrides on top.

        Raises UserError if the file cannot be read or parsed, or holds an unknown key or bad value.
        """
        return cls(**merge(read_yaml(path), overrides or {}))


def address_of_run(run_dir: Path) -> str | None:
    """Return the s3:// or gs:// address that a run folder's path is, its scheme in small letters: a Path keeps one slash of
    two. None if it is none."""
    found = _ADDRESS.match(str(run_dir))
    return f"{found[1].lower()}://{found[2]}" if found and found[1].lower() in _PLACES else None


def _holds_credentials(rest: str) -> bool:
    """Whether an address, without its scheme, begins with ID:SECRET@, of which the secret may hold slashes, or ID@."""
    first = rest.partition("?")[0].partition("/")[0]
    return "@" in first or (":" in first and "@" in rest)


def _flat_identity(section: BaseModel, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            flat |= _flat_identity(value, f"{prefix}{name}.")
        elif isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("identity"):
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat
