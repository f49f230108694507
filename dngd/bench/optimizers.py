"""The optimizers that are compared: dngd's own, torch's, and others from the package pytorch-optimizer.

`shampoo` is that package's ScalableShampoo, Google's blocked Shampoo with grafting (its plain Shampoo takes an
SVD of every weight at every step), with its roots renewed every inverse_update_period steps, as K-FAC's inverses.
`muon` is torch's, on weights, with AdamW on biases, both at one learning rate.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dngd.comm import Communicator
from dngd.config import TrainConfig
from dngd.errors import UserError
from dngd.train.optimizers import (
    UNKNOWN_SET,
    FirstOrder,
    StepOptimizer,
    TrainingSet,
    build_optimizer,
    set_learning_rate,
)

IN_TRAIN = ("kfac", "adam", "adamw", "sgd")
FROM_PACKAGE = ("soap", "shampoo")
KNOWN = (*IN_TRAIN, "soap", "muon", "shampoo")
SUBJECT = "kfac"
BASELINE = "adam"
INSTALL = "pip install 'pytorch-optimizer>=4.1,<5'"

_ADAM_LIKE = (3e-3, 1e-2, 2e-2)
_GRIDS = {"adam": _ADAM_LIKE, "adamw": _ADAM_LIKE, "soap": _ADAM_LIKE, "muon": _ADAM_LIKE}


@dataclass
class Competitor:
    """An optimizer over one model. torch_optimizers: all that hold parameters; muon has two."""

    name: str
    step_optimizer: StepOptimizer
    torch_optimizers: tuple[torch.optim.Optimizer, ...]

    def set_learning_rate(self, lr: float) -> None:
        """Set the rate of every parameter group."""
        for optimizer in self.torch_optimizers:
            set_learning_rate(optimizer, lr)

    def finish_background(self) -> None:
        """Wait for inversions on K-FAC's other thread (inverse_delay > 0); what they yield stays the same.

        While optimizers take turns, that thread would otherwise run inside another optimizer's time.
        """
        preconditioner = self.step_optimizer.preconditioner
        if preconditioner is not None:
            preconditioner.pipeline.drain()

    def state_bytes(self) -> int:
        """Return the bytes of state held now: moments, K-FAC's statistics and inverses, and the weights' average."""
        size = tensor_bytes([dict(o.state) for o in self.torch_optimizers], exclude=self._parameters())
        if self.step_optimizer.average is not None:
            size += self.step_optimizer.average.nbytes
        preconditioner = self.step_optimizer.preconditioner
        return size if preconditioner is None else size + preconditioner.memory_bytes()

    def settings(self) -> dict[str, Any]:
        """Return what the torch optimizers were made with, as far as it is plain data."""
        return {
            type(optimizer).__name__: {
                key: list(value) if isinstance(value, tuple) else value
                for key, value in optimizer.defaults.items()
                if isinstance(value, bool | int | float | str | tuple)
            }
            for optimizer in self.torch_optimizers
        }

    def close(self) -> None:
        """Take K-FAC's hooks off the model and stop its thread."""
        preconditioner = self.step_optimizer.preconditioner
        if preconditioner is not None:
            preconditioner.close()

    def _parameters(self) -> Iterable[Tensor]:
        for optimizer in self.torch_optimizers:
            for group in optimizer.param_groups:
                yield from group["params"]


class _Pair(FirstOrder):
    """Two torch optimizers over disjoint parameters that step together."""

    def __init__(self, first: torch.optim.Optimizer, second: torch.optim.Optimizer) -> None:
        super().__init__(first)
        self._second = second

    def step(self, *, finite: bool, **_: Any) -> None:
        if finite:
            self.torch_optimizer.step()
            self._second.step()


def check_optimizers(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names. Raises UserError for none, an unknown or repeated one, or one whose package is missing."""
    if not names:
        raise UserError("no optimizer is named; give --optimizers kfac,adam")
    for name in names:
        if name not in KNOWN:
            raise UserError(f"optimizer {name!r} is unknown; use some of: " + ", ".join(KNOWN))
        if names.count(name) > 1:
            raise UserError(f"optimizer {name!r} is named twice; name each one once")
        if name in FROM_PACKAGE:
            _package(name)
        if name == "muon" and not hasattr(torch.optim, "Muon"):
            raise UserError(f"muon is part of torch from 2.9 on and this is torch {torch.__version__}; leave it out")
    return tuple(names)


def default_rates(name: str, config: TrainConfig) -> tuple[float, ...]:
    """Return the learning rates tried where none are given: Adam's grid for those that step like Adam."""
    return _GRIDS.get(name, (base_rate(name, config),))


def base_rate(name: str, config: TrainConfig) -> float:
    """Return the one learning rate of an optimizer: dngd train's, or that of its own package or of its like."""
    if name in IN_TRAIN:
        return with_optimizer(config, name, None).learning_rate
    return {"soap": 3e-3, "muon": 1e-2, "shampoo": 0.1}[name]


def with_optimizer(config: TrainConfig, name: str, lr: float | None) -> TrainConfig:
    """Return the configuration with an optimizer that it knows (adam stands in for others) and a learning rate."""
    known = name if name in IN_TRAIN else BASELINE
    return config.model_copy(update={"optimizer": known, "lr": lr})


def build_competitor(
    name: str,
    config: TrainConfig,
    lr: float,
    model: nn.Module,
    communicator: Communicator,
    training_set: TrainingSet = UNKNOWN_SET,
) -> Competitor:
    """Return an optimizer over a model's parameters; dngd train's own are built by dngd.train."""
    config = with_optimizer(config, name, lr)
    if name in IN_TRAIN:
        built = build_optimizer(config, model, communicator, training_set=training_set)
        return Competitor(name, built, (built.torch_optimizer,))
    parameters, decay = list(model.parameters()), config.weight_decay
    if name == "muon":
        matrices = [p for p in parameters if p.dim() == 2]
        # Updates scaled to Adam's size, so that one learning rate suits weights and biases (Liu et al. 2025).
        muon = torch.optim.Muon(matrices, lr=lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        adamw = torch.optim.AdamW([p for p in parameters if p.dim() != 2], lr=lr, weight_decay=decay)
        return Competitor(name, _Pair(muon, adamw), (muon, adamw))
    package = _package(name)
    if name == "soap":
        made = package.SOAP(parameters, lr=lr, weight_decay=decay)
    else:
        made = package.ScalableShampoo(
            parameters,
            lr=lr,
            weight_decay=decay,
            preconditioning_compute_steps=config.kfac.inverse_update_period,
            # Otherwise a weight of up to 512 entries is taken for a vector, which is not preconditioned.
            shape_interpretation=False,
        )
    return Competitor(name, FirstOrder(made), (made,))


def tensor_bytes(value: Any, exclude: Iterable[Tensor] = ()) -> int:
    """Return the bytes of all distinct tensors inside nested lists, mappings and pytorch-optimizer's objects."""
    seen = {id(tensor) for tensor in exclude}

    def size(item: Any) -> int:
        if id(item) in seen:
            return 0
        if isinstance(item, Tensor):
            seen.add(id(item))
            return item.numel() * item.element_size()
        if isinstance(item, dict):
            return sum(size(part) for part in item.values())
        if isinstance(item, list | tuple):
            return sum(size(part) for part in item)
        if type(item).__module__.startswith("pytorch_optimizer."):
            seen.add(id(item))
            return size(vars(item))
        return 0

    return size(value)


def _package(name: str) -> Any:
    try:
        return importlib.import_module("pytorch_optimizer")
    except ImportError:
        raise UserError(
            f"optimizer {name!r} comes from the package pytorch-optimizer, which is not installed; {INSTALL}"
        ) from None
