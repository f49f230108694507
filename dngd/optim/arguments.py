"""What the preconditioner's arguments may be; each mistake is one sentence with the value, the range and the fix."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

from torch import nn

from dngd.curvature import DampingMode, FactorLayout, FisherKind, LossKind
from dngd.errors import UserError
from dngd.optim.capture import Variant, WeightSharing
from dngd.optim.inverses import FactorWire, InversePrecision
from dngd.optim.plan import StrategyChoice
from dngd.optim.schedules import period_at, value_at

LossReduction = Literal["mean", "sum"]
Method = Literal["kfac", "ekfac", "rotate"]
"""kfac: damped inverses; ekfac: eigenvalue-corrected; rotate: eigenbases alone, for an optimizer that works in them."""

_CHOICES = {
    "damping_mode": DampingMode,
    "loss_reduction": LossReduction,
    "fisher": FisherKind,
    "loss": LossKind,
    "method": Method,
    "variant": Variant,
    "weight_sharing": WeightSharing,
    "inverse_precision": InversePrecision,
    "factor_wire": FactorWire,
    "strategy": StrategyChoice,
}
_PERIODS = ("factor_update_period", "inverse_update_period", "eigenvalue_update_period")
_LEAST = {"dense_steps": 0, "inverse_delay": 0, "max_rows": 1, "max_dropped_steps": 1}


def check_arguments(given: Mapping[str, Any]) -> None:
    """Raise UserError for an argument of KFACPreconditioner that is unknown, out of range, or does not fit another."""
    for name, kind in _CHOICES.items():
        if given[name] not in get_args(kind):
            raise UserError(f"{name}={given[name]!r} is unknown; use one of: " + ", ".join(get_args(kind)))
    steps = {name: (period_at(given[name], 0) if callable(given[name]) else given[name], 1) for name in _PERIODS}
    steps |= {name: (given[name], low) for name, low in _LEAST.items()}
    for name, (value, low) in steps.items():
        if value is not None and (value < low or value != int(value)):
            raise UserError(f"{name}={value} is out of range; give a whole number, at least {low}")
    if given["variant"] == "paper" and given["fisher"] != "empirical":
        raise UserError(f"variant='paper' is defined for the empirical Fisher, not fisher={given['fisher']!r}")
    period = steps["inverse_update_period"][0]
    if given["inverse_delay"] >= period:
        raise UserError(
            f"inverse_delay={given['inverse_delay']} must be below inverse_update_period={period}; "
            "an inverse would be renewed before it is in use"
        )
    for name in ("kl_clip", "norm_constraint"):
        bound = given[name]
        if bound is not None and not value_at(bound, 0) > 0:
            raise UserError(f"{name}={bound} is out of range; give a number above 0, or None for no bound")
        if bound is not None and given["lr"] is None:
            raise UserError(f"{name} needs the learning rate that it bounds; pass lr= (a number or step -> number)")
    if given["loss_scale"] is not None and not callable(given["loss_scale"]):
        raise UserError(
            f"loss_scale={given['loss_scale']!r} is no function; give one that returns the scale, scaler.get_scale"
        )
    if given["layout"] is not None and not isinstance(given["layout"], FactorLayout):
        raise UserError(f"layout={given['layout']!r} is no FactorLayout; give FactorLayout(wide=...), for example")
    in_range("damping", value_at(given["damping"], 0), low_open=0.0)
    in_range("damping_g_ratio", value_at(given["damping_g_ratio"], 0), low_open=0.0)
    in_range("factor_decay", value_at(given["factor_decay"], 0), low=0.0, high_open=1.0)
    in_range("change_threshold", given["change_threshold"], low=0.0)
    in_range("traffic_budget", given["traffic_budget"], low=0.0)
    if given["refresh_budget_seconds"] is not None:
        in_range("refresh_budget_seconds", given["refresh_budget_seconds"], low_open=0.0)
    if given["strategy"] == "share_gradient" and given["method"] != "kfac":
        named = "update='adam_eigenbasis'" if given["method"] == "rotate" else f"method={given['method']!r}"
        raise UserError(
            f"strategy='share_gradient' leaves a layer's factors with one rank, but {named} works in their eigenbases "
            "on every rank; use strategy='share_inverse', 'replicate' or 'auto'"
        )


def in_range(
    name: str,
    value: float,
    *,
    low: float = -math.inf,
    low_open: float = -math.inf,
    high_open: float = math.inf,
) -> None:
    """Raise UserError unless low <= value, low_open < value and value < high_open."""
    if not (value >= low and value > low_open and value < high_open):
        limits = [f"above {low_open}"] if low_open > -math.inf else [f"at least {low}"]
        if high_open < math.inf:
            limits.append(f"below {high_open}")
        raise UserError(f"{name}={value} is out of range; it must be " + " and ".join(limits))


def check_wrapper(model: nn.Module, fisher: FisherKind) -> None:
    """Raise UserError for a wrapper whose backward pass the preconditioner cannot follow."""
    kind = type(model).__name__
    if kind in ("DataParallel", "FullyShardedDataParallel"):
        raise UserError(f"{kind} is not supported: its copies or shards of a weight have no factors; use DDP")
    if getattr(model, "static_graph", False) and fisher != "empirical":
        raise UserError(
            f"DDP(static_graph=True) counts the extra backward pass of fisher={fisher!r} as a step of its own and then "
            "reduces nothing; use static_graph=False, or fisher='empirical'"
        )
