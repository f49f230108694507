"""Natural-gradient descent as one torch optimizer: preconditioner, KL clip, momentum, weight decay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dngd.comm import Communicator
from dngd.curvature import DampingMode
from dngd.errors import UserError
from dngd.optim.preconditioner import KFACPreconditioner, LossReduction
from dngd.optim.schedules import Schedule


class NaturalGradient(torch.optim.Optimizer):
    """K-FAC with heavy-ball momentum: `u ← μu + v`, `W ← W − η(u + w·W)`.

    v is the preconditioned, KL-clipped gradient (dngd.optim.KFACPreconditioner), μ the momentum, w the
    decoupled weight decay. Call `optimizer.step(num_samples=n)` after backward. A step whose gradients
    are not finite is dropped whole: parameters, momentum and factors stay.

    lr: η > 0, as in every torch optimizer, may be changed through `param_groups` or an lr_scheduler.
    momentum: in [0, 1). weight_decay: >= 0. kl_clip: κ > 0 or None. The other arguments are those of
    KFACPreconditioner, with the scale-free damping as default.

    Raises UserError for an argument out of range or a model without a supported layer.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.1,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        damping: Schedule = 1e-2,
        damping_mode: DampingMode = "relative",
        damping_g_ratio: float = 10.0,
        kl_clip: float | None = 3e-3,
        loss_reduction: LossReduction = "mean",
        fisher: Literal["empirical"] = "empirical",
        factor_decay: Schedule = 0.95,
        factor_update_period: int = 10,
        inverse_update_period: int = 50,
        dense_steps: int = 20,
        inverse_delay: int = 0,
        communicator: Communicator | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise UserError(f"model is a {type(model).__name__}; give the model itself, not its parameters")
        if not lr > 0:
            raise UserError(f"lr={lr} is out of range; it must be above 0")
        if not 0 <= momentum < 1:
            raise UserError(f"momentum={momentum} is out of range; it must be in [0, 1)")
        if not weight_decay >= 0:
            raise UserError(f"weight_decay={weight_decay} is out of range; it must be at least 0")
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__([p for p in model.parameters() if p.requires_grad], defaults)
        self.preconditioner = KFACPreconditioner(
            model,
            damping=damping,
            damping_mode=damping_mode,
            damping_g_ratio=damping_g_ratio,
            loss_reduction=loss_reduction,
            fisher=fisher,
            factor_decay=factor_decay,
            factor_update_period=factor_update_period,
            inverse_update_period=inverse_update_period,
            dense_steps=dense_steps,
            inverse_delay=inverse_delay,
            kl_clip=kl_clip,
            lr=lambda step: float(self.param_groups[0]["lr"]),
            communicator=communicator,
        )

    def step(  # type: ignore[override]
        self,
        closure: Callable[[], float] | None = None,
        *,
        num_samples: float | None = None,
        finite: bool | None = None,
        mean_gradients: bool | None = None,
    ) -> float | None:
        """Take one step. num_samples: n, the number of seeds of the step (required).

        closure: evaluates the loss with gradients, as in torch; its value is returned. finite,
        mean_gradients: see KFACPreconditioner.step. Raises UserError without num_samples or without gradients.
        """
        if num_samples is None:
            raise UserError(
                "step() needs the number of seeds that the loss averages over; call step(num_samples=len(seeds))"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            if finite is None:
                finite = self._gradients_are_finite()
            if self.preconditioner.step(num_samples, finite=finite, mean_gradients=mean_gradients):
                self._update()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, and with them the rows that the same backward passes left for the factors."""
        super().zero_grad(set_to_none=set_to_none)
        for layer in self.preconditioner.layers.values():
            layer.pending = None

    def _gradients_are_finite(self) -> bool:
        """Return whether every parameter's gradient is finite, those without factors too."""
        found = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not found:
            raise UserError("step() found no gradient; call loss.backward() before it")
        return bool(torch.isfinite(torch.stack([torch.linalg.vector_norm(gradient) for gradient in found])).all())

    def _update(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                update: Tensor = parameter.grad
                if group["momentum"] > 0:
                    state = self.state[parameter]
                    if "momentum_buffer" not in state:
                        state["momentum_buffer"] = torch.zeros_like(parameter)
                    update = state["momentum_buffer"].mul_(group["momentum"]).add_(update)
                if group["weight_decay"] > 0:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"])

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state dict (momentum, groups) with the curvature under "preconditioner"."""
        out = super().state_dict()
        out["preconditioner"] = self.preconditioner.state_dict()
        return out

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, on a world of the same size."""
        state_dict = dict(state_dict)
        curvature = state_dict.pop("preconditioner")
        super().load_state_dict(state_dict)
        self.preconditioner.load_state_dict(curvature)
