"""The optimizers of `--optimizer`, behind one `step`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dngd.comm import Communicator
from dngd.config import TrainConfig
from dngd.errors import UserError
from dngd.optim import (
    FactorLayout,
    HyperbolicDecay,
    KFACPreconditioner,
    KLTrustRegion,
    LossKind,
    NaturalGradient,
    Schedule,
    WeightAverage,
    default_damping,
    output_rank_for,
)

OWN_RATE = "own_lr"
"""Where the groups of a custom optimizer keep the rate that they were made with."""
OWN_NUMBERS = "own_numbers"
"""Where they keep the other numbers that they were made with: those that change are part of its state."""


class TrainingSet(NamedTuple):
    """What K-FAC's damping follows where it is left open; None: unknown."""

    num_nodes: int | None = None
    num_classes: int | None = None


UNKNOWN_SET = TrainingSet()


def training_set_of(config: TrainConfig, num_seeds: int, num_classes: int) -> TrainingSet:
    """Return what damping follows in a run. num_seeds: of the training set. num_classes: the graph's."""
    return TrainingSet(num_seeds, num_classes if config.task == "node" else None)


class StepOptimizer(Protocol):
    """What the loop needs of an optimizer; gradients are the mean loss's, reduced over ranks."""

    @property
    def torch_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that holds the parameter groups and moments."""

    def observe(self, outputs: Tensor, *, weights: Tensor | None, key: int) -> None:
        """See a shard's outputs [n, C] and the weights of its seeds, between forward and backward; key: the shard."""

    def step(self, *, num_seeds_here: float, finite: bool, factor_samples: float | None = None) -> None:
        """Update the parameters, or, on a step that is not finite, nothing; all ranks enter.

        num_seeds_here: this rank's share of what the summed losses are divided by. factor_samples: n of the
        paper's variant of the factors, if it is another number.
        """

    @property
    def preconditioner(self) -> KFACPreconditioner | None:
        """The curvature, if the optimizer has any."""

    @property
    def natural_gradient(self) -> NaturalGradient | None:
        """The optimizer itself, if it has curvature."""

    @property
    def average(self) -> WeightAverage | None:
        """The weights' running mean, updated by each finite step, if they have one."""


class FirstOrder:
    """Adam, AdamW or SGD of torch."""

    preconditioner = None
    natural_gradient = None

    def __init__(self, torch_optimizer: torch.optim.Optimizer, average: WeightAverage | None = None) -> None:
        self.torch_optimizer = torch_optimizer
        self.average = average

    def observe(self, outputs: Tensor, *, weights: Tensor | None, key: int) -> None:
        return None

    def step(self, *, num_seeds_here: float, finite: bool, factor_samples: float | None = None) -> None:
        if finite:
            self.torch_optimizer.step()
            if self.average is not None:
                self.average.update()


class SecondOrder:
    """NaturalGradient. The loop back-propagates sums, so captured gradients carry no 1/n."""

    def __init__(self, natural_gradient: NaturalGradient, average: WeightAverage | None = None) -> None:
        self.torch_optimizer = self.natural_gradient = natural_gradient
        self.average = average

    @property
    def preconditioner(self) -> KFACPreconditioner:
        return self.natural_gradient.preconditioner

    def observe(self, outputs: Tensor, *, weights: Tensor | None, key: int) -> None:
        self.natural_gradient.observe(outputs, weights=weights, key=key)

    def step(self, *, num_seeds_here: float, finite: bool, factor_samples: float | None = None) -> None:
        self.natural_gradient.step(
            num_samples=num_seeds_here, finite=finite, mean_gradients=True, factor_samples=factor_samples
        )
        if finite and self.average is not None:
            self.average.update()


def build_optimizer(
    config: TrainConfig,
    model: nn.Module,
    communicator: Communicator,
    loss: LossKind = "cross_entropy",
    *,
    training_set: TrainingSet = UNKNOWN_SET,
) -> StepOptimizer:
    """Return the configured optimizer over a model's parameters.

    loss: whose Fisher is measured. training_set: what its damping follows, see default_damping.
    """
    lr, decay = config.learning_rate, config.weight_decay
    average = weight_average(config, model)
    if config.optimizer == "kfac":
        kfac = config.kfac
        damping, g_ratio = damping_in_use(config, training_set)
        return SecondOrder(
            NaturalGradient(
                model,
                lr,
                update=kfac.update,
                method=kfac.method,
                fisher=config.fisher,
                loss=loss,
                variant=kfac.variant,
                momentum=kfac.momentum,
                weight_decay=decay,
                damping=damping,
                damping_mode=config.damping_mode,
                damping_g_ratio=g_ratio,
                kl_clip=kl_clip_in_use(config),
                norm_constraint=kfac.norm_constraint,
                loss_reduction="sum",
                factor_decay=kfac.factor_decay,
                factor_update_period=kfac.factor_update_period,
                inverse_update_period=kfac.inverse_update_period,
                eigenvalue_update_period=kfac.eigenvalue_update_period,
                dense_steps=kfac.dense_steps,
                inverse_delay=kfac.inverse_delay,
                change_threshold=kfac.change_threshold,
                max_rows=kfac.max_rows,
                layout=factor_layout(config, training_set),
                inverse_precision=kfac.inverse_precision,
                factor_wire=kfac.factor_wire,
                strategy=kfac.strategy,
                traffic_budget=kfac.traffic_budget,
                refresh_budget_seconds=kfac.refresh_budget_seconds,
                cuda_graph=kfac.cuda_graph,
                max_dropped_steps=None,  # the loop counts them itself
                seed=config.seed,
                communicator=communicator,
            ),
            average,
        )
    parameters = list(model.parameters())
    if config.optimizer == "sgd":
        return FirstOrder(torch.optim.SGD(parameters, lr=lr, momentum=config.momentum, weight_decay=decay), average)
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return FirstOrder(fused(kind, parameters, lr=lr, weight_decay=decay), average)


def fused(kind: type[torch.optim.Adam], parameters: list[Any], **options: Any) -> torch.optim.Optimizer:
    """Return torch's Adam or AdamW, with a step of one kernel on a GPU and of one pass over memory on a CPU where this
    torch has it; else as it comes. parameters: a list of them, or of groups."""
    groups = [part if isinstance(part, dict) else {"params": [part]} for part in parameters]
    every = [parameter for group in groups for parameter in group["params"]]
    if all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in every):
        # Of copies, since a group keeps what an optimizer writes into it, even one that cannot be made.
        copies = [dict(part) if isinstance(part, dict) else part for part in parameters]
        with contextlib.suppress(RuntimeError):  # a torch that has it on GPUs alone
            return kind(copies, fused=True, **options)
    return kind(parameters, **options)


def weight_average(config: TrainConfig, model: nn.Module) -> WeightAverage | None:
    """Return the running mean of a model's weights that a run asks for, if any."""
    return WeightAverage(model, config.average_share) if config.average_share else None


def damping_in_use(config: TrainConfig, training_set: TrainingSet) -> tuple[float, float]:
    """Return λ and G's ratio. What is left open in relative mode is that of default_damping."""
    kfac = config.kfac
    if config.damping_mode == "relative":
        usual = default_damping(*training_set, damping=kfac.damping)
    else:
        usual = default_damping(damping=kfac.damping or 1e-2)
    return usual["damping"], kfac.damping_g_ratio or usual["damping_g_ratio"]


def kl_clip_in_use(config: TrainConfig) -> Schedule | None:
    """Return κ as a number or a function of the step, a KLTrustRegion where steps are measured; None for no bound."""
    kfac, kl_bound, kl_clip = config.kfac, config.kl_bound, config.kl_clip
    if kl_bound is not None:
        bound = kl_bound if kfac.kl_bound_steps is None else HyperbolicDecay(kl_bound, kfac.kl_bound_steps, 2)
        return KLTrustRegion(bound, period=kfac.kl_bound_period)
    if kl_clip is None or kfac.kl_clip_steps is None:
        return kl_clip
    return HyperbolicDecay(kl_clip, kfac.kl_clip_steps, kfac.kl_clip_power)


INVERSE_RANK, LEAST_DAMPING = 64, 5e-4
"""Columns of a wide A's inverse, where it is damped by at least such a share of its trace: beyond that many directions
eigenvalues were below 1.4 times the damping on Facebook pages and Coauthor Physics (docs/defaults.md, 37)."""


def factor_layout(config: TrainConfig, training_set: TrainingSet) -> FactorLayout:
    """Return what becomes of the configured run's wide factors."""
    kfac, output_rank = config.kfac, config.output_rank
    if output_rank is None:
        damping, g_ratio = damping_in_use(config, training_set)
        output_rank = output_rank_for(damping * g_ratio)
    inverse_rank = inverse_rank_in_use(config, training_set)
    return FactorLayout(
        kfac.max_dimension, kfac.wide_inputs, kfac.rank, kfac.split_inputs, output_rank or None, inverse_rank or None
    )


def inverse_rank_in_use(config: TrainConfig, training_set: TrainingSet) -> int:
    """Return the columns of the inverse of a low-rank A wider than 4,096; 0: all of its sketch."""
    if config.kfac.inverse_rank is not None:
        return config.kfac.inverse_rank
    damping, _ = damping_in_use(config, training_set)
    return INVERSE_RANK if config.damping_mode == "relative" and damping >= LEAST_DAMPING else 0


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get(OWN_RATE, 1.0)


def wrap_optimizer(optimizer: object, average: WeightAverage | None = None) -> FirstOrder:
    """Return an optimizer of one's own for the loop; its groups' rates are what the schedule multiplies.

    Raises UserError if it is no torch optimizer, or a NaturalGradient, whose settings are the configuration's.
    """
    if isinstance(optimizer, NaturalGradient):
        raise UserError(
            "NaturalGradient is the configuration's optimizer=kfac, which also reduces its statistics over workers; "
            "leave optimizer= out and set the fields of kfac"
        )
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UserError(
            f"the optimizer's factory returned a {type(optimizer).__name__}; return a torch.optim.Optimizer over the "
            "module's parameters"
        )
    for group in optimizer.param_groups:
        group[OWN_RATE] = float(group.get("lr", 1.0))
        group[OWN_NUMBERS] = _numbers(group)
    return FirstOrder(optimizer, average)


def _numbers(group: dict[str, Any]) -> dict[str, Tensor]:
    """Return a group's numbers but for the rate, which is the schedule's: Python's as [1], 0-d tensors as they are."""
    numbers = {}
    for key, value in group.items():
        if key in ("lr", OWN_RATE):
            continue
        if isinstance(value, Tensor) and value.dim() == 0:
            numbers[key] = value.detach().clone()
        elif isinstance(value, (int, float)):
            numbers[key] = torch.tensor([value], dtype=torch.float64 if isinstance(value, float) else None)
    return numbers


def moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's per-parameter tensors as "INDEX.KEY" (Adam's step counts included).

    Of one's own optimizer also its groups' numbers that changed since it was made, as "group.INDEX.KEY": schedule-free
    and D-adapting ones keep counts and sums there. Raises UserError for state that is no tensor.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    out = {}
    for i, parameter in enumerate(parameters):
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                out[f"{i}.{key}"] = value
            elif value is not None:
                raise UserError(
                    f"{type(optimizer).__name__} keeps {key} as a {type(value).__name__}, and checkpoints hold "
                    "tensors; use an optimizer whose state is tensors, as torch's are"
                )
    for i, group in enumerate(optimizer.param_groups):
        if OWN_NUMBERS in group:
            made_with = group[OWN_NUMBERS]
            for key, value in _numbers(group).items():
                was = made_with.get(key)
                if was is None or (was.dtype, was.tolist()) != (value.dtype, value.tolist()):
                    out[f"group.{i}.{key}"] = value
    return out


COUNTS = ("step", "weight")
"""Names of what torch's optimizers and NaturalGradient keep beside moments."""


def load_moments(optimizer: torch.optim.Optimizer, saved: dict[str, Tensor]) -> None:
    """Restore what `moments` returned, each tensor on its parameter's device; counts, which have no dimension, where
    the optimizer has them: on the CPU, but for a fused one's."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    counts_there = [
        bool(group.get("fused") or group.get("capturable")) for group in optimizer.param_groups for _ in group["params"]
    ]
    for key, value in saved.items():
        index, name = key.split(".", 1)
        if index == "group":
            _load_number(optimizer, name, value)
            continue
        parameter = parameters[int(index)]
        # Adam in the eigenbasis has moments of other shapes than its parameters.
        is_moment = value.dim() > 0 or (parameter.dim() == 0 and name not in COUNTS)
        is_there = is_moment or counts_there[int(index)]
        device = parameter.device if is_there else torch.device("cpu")
        optimizer.state[parameter][name] = value.to(device, copy=True)


def _load_number(optimizer: torch.optim.Optimizer, place: str, value: Tensor) -> None:
    index, name = place.split(".", 1)
    group = optimizer.param_groups[int(index)]
    if value.dim() == 1:
        group[name] = value.item()
    else:
        present = group.get(name)
        group[name] = value.to(present.device if isinstance(present, Tensor) else group["params"][0].device, copy=True)


@contextlib.contextmanager
def evaluated_weights(optimizer: StepOptimizer) -> Iterator[None]:
    """Have the weights that are evaluated in the model's place: their average, if there is one."""
    if optimizer.average is None:
        yield
    else:
        with optimizer.average.applied():
            yield
