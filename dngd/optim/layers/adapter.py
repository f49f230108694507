"""The contract between the walk over a model and the adapters of each library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from dngd.curvature import FactorLayout
from dngd.errors import UserError
from dngd.optim.capture import Capture
from dngd.optim.layers.base import CurvatureLayer


@dataclass
class Adapted:
    """What an adapter made of a module. claimed: inner modules that need no layer of their own any more."""

    layers: list[CurvatureLayer]
    claimed: list[nn.Module] = field(default_factory=list)


Adapter = Callable[[str, nn.Module, Capture, FactorLayout], Adapted | None]
"""(dotted name, module, capture, layout) -> what was made of it, or None for a module of another kind."""


def class_path(module: nn.Module) -> str:
    """Return a module's class as "package.module.Class"; libraries are recognised by it, never imported for it."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def trainable(name: str, module: nn.Module, attribute: str) -> nn.Parameter | None:
    """Return a module's own parameter if it is trained and real, None for anything else.

    A parametrized tensor (weight norm, spectral norm) is computed from others: it has no gradient of its own.
    name: of the layer, for the message. Raises UserError for a parameter without a size.
    """
    parameter = module._parameters.get(attribute)
    if parameter is None or not parameter.requires_grad:
        return None
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        raise UserError(
            f"layer {name!r} has no size yet (lazy initialisation); run one forward pass, or give its "
            "in_channels, before K-FAC looks at the model"
        )
    return parameter if parameter.is_floating_point() else None


def argument(inputs: tuple[Any, ...], named: dict[str, Any], position: int, name: str) -> Any:
    """Return an argument of a forward call, by position or by name; None if it was not given."""
    return inputs[position] if len(inputs) > position else named.get(name)
