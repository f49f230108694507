"""What a program adds to a configuration: a module, an optimizer, a loss, a metric, callbacks of its own."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from dngd.config import KL_CLIP, TrainConfig
from dngd.errors import UserError
from dngd.graph import GraphStore
from dngd.models import build_model
from dngd.models.graph_batch import GraphShape
from dngd.models.pyg_model import PyGModel, takes_edges
from dngd.models.pyg_stack import PyGStack
from dngd.train.callbacks import Callback, check_callbacks
from dngd.train.objective import CustomLoss
from dngd.train.scoring import CustomMetric, Metric
from dngd.train.task import shape_of

ModuleFactory = Callable[[GraphShape], nn.Module]
OptimizerFactory = Callable[[nn.Module], torch.optim.Optimizer]


@dataclass(frozen=True)
class RunParts:
    """See Trainer. All of it is pickled where workers of Ray run it."""

    module: nn.Module | ModuleFactory | None = None
    optimizer: OptimizerFactory | None = None
    loss: CustomLoss | None = None
    metric: CustomMetric | None = None
    callbacks: tuple[Callback, ...] = ()

    def own_module(self, config: TrainConfig, store: GraphStore) -> nn.Module | None:
        """Return the program's module for a graph, None without one. torch's random stream stays as it is."""
        if self.module is None:
            return None
        with torch.random.fork_rng(devices=[]):
            return make_module(config, self, shape_of(config, store))

    def metric_of(self, config: TrainConfig) -> Metric | CustomMetric:
        """Return what the best model is chosen by."""
        return config.metric_in_use if self.metric is None else self.metric

    def metric_name(self, config: TrainConfig) -> str:
        """Return its name in the run's files."""
        if self.metric is None:
            return config.metric_in_use
        return _name_of(self.metric)

    def own(self) -> dict[str, str]:
        """Return which of module, optimizer, loss and metric are the program's own, with their names."""
        parts = {"module": self.module, "optimizer": self.optimizer, "loss": self.loss, "metric": self.metric}
        return {kind: _name_of(part) for kind, part in parts.items() if part is not None}

    def complete(self, config: TrainConfig) -> TrainConfig:
        """Return the configuration that says what is the program's own.

        Raises UserError for a configuration that wants a part which is not there, or the other way round.
        """
        check_callbacks(self.callbacks)
        changes = {}
        if self.module is not None:
            changes["model"] = "custom"
        elif config.model == "custom":
            raise UserError(
                "model=custom is a module of one's own, which a configuration does not hold; give it to "
                "dngd.Trainer(config, module=...), or use gcn or sage"
            )
        if self.optimizer is not None:
            changes["optimizer"] = "custom"
        elif config.optimizer == "custom":
            raise UserError(
                "optimizer=custom is one of one's own, which a configuration does not hold; give it to "
                "dngd.Trainer(config, optimizer=...), or use kfac, adam, adamw or sgd"
            )
        complete = TrainConfig(**(config.model_dump() | changes)) if changes else config
        if self.loss is not None and complete.optimizer == "kfac" and complete.fisher != "empirical":
            raise UserError(
                f"the {complete.fisher} Fisher is that of the built-in loss, not of one's own; use "
                "kfac.fisher=empirical, which takes the gradients of any loss, or a first-order optimizer"
            )
        if self.loss is not None and complete.kl_bound is not None:
            if complete.kfac.kl_bound is not None:
                raise UserError(
                    f"kfac.kl_bound={complete.kfac.kl_bound} is about the built-in loss's probabilities, and of one's "
                    "own loss it is not known what the outputs stand for; leave kl_bound out"
                )
            kfac = complete.kfac.model_copy(update={"kl_clip": KL_CLIP})
            complete = complete.model_copy(update={"kfac": kfac})
        if self.loss is not None and complete.semi != "none":
            raise UserError(f"semi={complete.semi} has a loss of its own; leave loss= out, or use semi=none")
        return complete


def _name_of(part: object) -> str:
    return str(getattr(part, "__name__", type(part).__name__))


class WrappedModel(PyGModel):
    """What make_module makes of a model over (x, edge_index). The program sees the model, not this."""


def own_part(module: nn.Module) -> nn.Module:
    """Return what a program's callbacks and optimizer see: the module that it gave or made."""
    return module.model if isinstance(module, WrappedModel) else module


def make_module(config: TrainConfig, parts: RunParts, shape: GraphShape) -> nn.Module:
    """Return the run's model, its weights from torch's current random stream.

    A module that was given is copied, with the weights that it has. One of PyG's kind, forward(x, edge_index), is
    wrapped (see PyGModel). Raises UserError if a factory makes something else than a module, or one without parameters,
    with parameters that are not there yet or trained ones of several types, or whose forward takes no batch.
    """
    if parts.module is None:
        return build_model(
            config.model,
            in_features=shape.num_features,
            hidden=config.hidden,
            out_features=shape.num_classes,
            num_layers=config.num_layers,
            dropout=config.dropout,
        )
    given = parts.module
    module = copy.deepcopy(given) if isinstance(given, nn.Module) else _made(given, shape)
    if not isinstance(module, nn.Module):
        raise UserError(f"the module's factory returned a {type(module).__name__}; return a torch.nn.Module")
    parameters = dict(module.named_parameters())
    lazy = [name for name, parameter in parameters.items() if is_lazy(parameter)]
    if lazy:
        raise UserError(
            f"parameter {lazy[0]} of the module has no size before a first batch; give its layer the width of its "
            f"input (the features': {shape.num_features})"
        )
    trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    if not trained:
        raise UserError("the module has no trainable parameter; return one that has")
    first = next(iter(trained))
    other = next((name for name in trained if trained[name].dtype != trained[first].dtype), None)
    if other is not None:
        types = " and ".join(str(trained[name].dtype).removeprefix("torch.") for name in (first, other))
        raise UserError(
            f"the module's parameters {first} and {other} are {types}, and workers sum gradients of one type; make all "
            "that are trained one type, module.float() say, and convert rows (or use autocast) in forward"
        )
    if takes_edges(module):
        module = WrappedModel(module)
    if isinstance(module, PyGModel):
        module.check(shape.num_features, config.num_layers)
    if isinstance(module, PyGStack):
        module.check(shape.num_features)
    for name, value in module.state_dict().items():
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            what = f"a tensor of layout {value.layout}" if isinstance(value, torch.Tensor) else type(value).__name__
            raise UserError(
                f"{name} in the module's state_dict() is {what}, and checkpoints hold dense tensors alone; keep it out "
                "of the state (register_buffer(..., persistent=False)), or as dense tensors"
            )
    return module


def _made(factory: ModuleFactory, shape: GraphShape) -> object:
    """Return what a factory makes. Raises UserError for one, a class say, that is not called with a shape alone."""
    try:
        inspect.signature(factory).bind(shape)
    except TypeError as error:
        name = getattr(factory, "__name__", "factory")
        raise UserError(
            f"module={name} is called with the graph's shape alone: {error}; give a module, or a function such as "
            f"lambda shape: {name}(shape.num_features, shape.num_classes)"
        ) from None
    except ValueError:
        pass  # no signature can be told
    return factory(shape)


def check_outputs(outputs: object, num_seeds: int, width: int) -> None:
    """Raise UserError unless a module's outputs are [num_seeds, width]. width: GraphShape.num_classes."""
    shape = list(outputs.shape) if isinstance(outputs, torch.Tensor) else type(outputs).__name__
    if shape != [num_seeds, width]:
        raise UserError(
            f"the module returned {shape} for {num_seeds} seeds and {width} classes (of link prediction, numbers of an "
            f"embedding); return [{num_seeds}, {width}], the rows of the last layer's destinations"
        )
