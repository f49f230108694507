"""Natural-gradient descent as one torch optimizer: preconditioner, KL clip, momentum, weight decay."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from dngd.comm import Communicator
from dngd.curvature import DampingMode, FactorLayout, FisherKind, LossKind, rotate, rotate_back
from dngd.errors import UserError
from dngd.optim.arguments import LossReduction, Method, in_range
from dngd.optim.capture import Variant, WeightSharing
from dngd.optim.foreach import average_into, step_along
from dngd.optim.gradients import gradient_of
from dngd.optim.inverses import FactorWire, InversePrecision
from dngd.optim.plan import TRAFFIC_BUDGET, StrategyChoice
from dngd.optim.preconditioner import KFACPreconditioner
from dngd.optim.schedules import HyperbolicDecay, Period, Schedule, value_at
from dngd.optim.trust import KLTrustRegion, LevenbergMarquardt, row_divergences

_COUNTS = ("weight", "step")
"""What is kept of a parameter beside its moments: numbers, on the CPU."""

Update = Literal["mean_gradient", "momentum", "adam_eigenbasis"]

CHEAP_LAYOUT = FactorLayout(max_dimension=None, wide="low_rank", rank=None)
"""No more than tr M / λ eigenvalues can exceed λ: rank 64 holds all of those from λ = tr M / 64 on. Weaker damping
leaves some to the diagonal that low rank keeps beside it, which costs little (docs/defaults.md, 6)."""

KL_CLIP = HyperbolicDecay(3e-2, 10, power=2)
"""Long steps while everything is still to be learnt, short ones against the noise of mini-batches later."""

RATES: dict[Update, float] = {"mean_gradient": 0.1, "momentum": 0.1, "adam_eigenbasis": 1e-2}
MOMENTA: dict[Update, float] = {"mean_gradient": 0.8, "momentum": 0.9, "adam_eigenbasis": 0.9}

ADAM_BETA2 = 0.95
ADAM_EPSILON = 1e-8


class NaturalGradient(torch.optim.Optimizer):
    """K-FAC in place of Adam: `optimizer = NaturalGradient(model)`, and `optimizer.step(num_samples=n)` after backward.

    >>> from dngd.optim import default_damping
    >>> model = torch.nn.Linear(3, 2)
    >>> optimizer = NaturalGradient(model, **default_damping(num_samples=1000, num_classes=2))
    >>> optimizer.zero_grad()
    >>> torch.nn.functional.cross_entropy(model(torch.rand(8, 3)), torch.arange(8) % 2).backward()
    >>> optimizer.step(num_samples=8)
    >>> optimizer.preconditioner.close()

    update "mean_gradient": `m ← μm + (1-μ)∇`, `W ← W - η(v + w·W)`, v the preconditioned, KL-clipped m, divided by the
    weights that m sums (dngd.optim.KFACPreconditioner), μ the momentum, w the decoupled weight decay. The clip then
    bounds what the gradients have in common; of a single mini-batch's natural gradient most is noise.
    update "momentum": `u ← μu + v`, `W ← W - η(u + w·W)`, v the preconditioned, KL-clipped gradient.
    update "adam_eigenbasis": Adam in the eigenbasis of the Kronecker factors (SOAP, Vyas et al. 2024, with the
    Fisher's factors): `m ← μm + (1-μ)∇`, `s ← β₂s + (1-β₂)(Q_Gᵀ∇Q_A)²`, both bias-corrected,
    `W ← W - η(Q_G [(Q_GᵀmQ_A) / (√s + ε)] Q_Aᵀ + w·W)`; its rate means what Adam's does (default 1e-2, cut at
    no KL). Parameters without factors take the same step with Q = I.

    A step whose gradients are not finite is dropped whole: parameters, momentum and factors stay.

    lr: η > 0, as in every torch optimizer, may be changed through `param_groups` or an lr_scheduler; None: 1e-2 for
        adam_eigenbasis, else 0.1. momentum: μ in [0, 1), None: 0.8 for mean_gradient, else 0.9. weight_decay: w >= 0.
        Both a number or a function of the step. The other arguments are those of KFACPreconditioner, with the
        scale-free damping, a falling KL clip and low rank for an A wider than 400 as default; for a wide G, too, give
        `FactorLayout(None, "low_rank", None, output_rank=output_rank_for(share))`. Where training samples are few,
        `**default_damping(num_samples, num_classes)` is safer than the constants (`dngd train` takes it, and
        lr 0.3/(1 + step/20)); where each step is of all of them, with full_batch=True, and lr=0.2 here.

    Raises UserError for an argument out of range or a model without a supported layer.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | None = None,
        *,
        update: Update = "mean_gradient",
        momentum: Schedule | None = None,
        weight_decay: Schedule = 0.0,
        damping: Schedule = 1e-3,
        damping_mode: DampingMode = "relative",
        damping_g_ratio: Schedule = 30.0,
        kl_clip: Schedule | None = KL_CLIP,
        norm_constraint: Schedule | None = None,
        loss_reduction: LossReduction = "mean",
        fisher: FisherKind = "empirical",
        loss: LossKind = "cross_entropy",
        method: Literal["kfac", "ekfac"] = "kfac",
        variant: Variant = "dngd",
        factor_decay: Schedule = 0.95,
        factor_update_period: Period = 10,
        inverse_update_period: Period = 50,
        eigenvalue_update_period: Period = 10,
        dense_steps: int = 1,
        inverse_delay: int = 0,
        change_threshold: float = 0.0,
        weight_sharing: WeightSharing = "expand",
        max_rows: int | None = 512,
        layout: FactorLayout | None = None,
        inverse_precision: InversePrecision = "float16",
        factor_wire: FactorWire = "float32",
        strategy: StrategyChoice = "auto",
        traffic_budget: float = TRAFFIC_BUDGET,
        refresh_budget_seconds: float | None = None,
        loss_scale: Callable[[], float] | None = None,
        max_dropped_steps: int | None = 10,
        cuda_graph: bool = True,
        strict: bool = False,
        seed: int = 0,
        communicator: Communicator | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise UserError(f"model is a {type(model).__name__}; give the model itself, not its parameters")
        if update not in get_args(Update):
            raise UserError(f"update={update!r} is unknown; use one of: " + ", ".join(get_args(Update)))
        rate = lr if lr is not None else RATES[update]
        momentum = momentum if momentum is not None else MOMENTA[update]
        if not rate > 0:
            raise UserError(f"lr={lr} is out of range; it must be above 0")
        if not 0 <= value_at(momentum, 0) < 1:
            raise UserError(f"momentum={momentum} is out of range; it must be in [0, 1)")
        if not value_at(weight_decay, 0) >= 0:
            raise UserError(f"weight_decay={weight_decay} is out of range; it must be at least 0")
        rotates = update == "adam_eigenbasis"
        if rotates and method != "kfac":
            raise UserError(f"update='adam_eigenbasis' has eigenvalues of its own; leave method={method!r} away")
        embeddings = (module for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag))
        if any(module.sparse for module in embeddings):
            raise UserError("an Embedding with sparse=True has sparse gradients, which this optimizer does not take")
        # In the groups, so that torch's schedulers find them (OneCycleLR moves the momentum).
        defaults = {"lr": rate, "momentum": value_at(momentum, 0), "weight_decay": value_at(weight_decay, 0)}
        super().__init__([p for p in model.parameters() if p.requires_grad], defaults)
        self.update: Update = update
        self.momentum = momentum
        self.weight_decay = weight_decay
        used: Method = "rotate" if rotates else method
        # Measured (dngd/bench/results/layout.json): as accurate as dense factors from 4,096 rows, at half the cost.
        self.preconditioner = KFACPreconditioner(
            model,
            damping=damping,
            damping_mode=damping_mode,
            damping_g_ratio=damping_g_ratio,
            loss_reduction=loss_reduction,
            fisher=fisher,
            loss=loss,
            method=used,
            variant=variant,
            factor_decay=factor_decay,
            factor_update_period=factor_update_period,
            inverse_update_period=inverse_update_period,
            eigenvalue_update_period=eigenvalue_update_period,
            dense_steps=dense_steps,
            inverse_delay=inverse_delay,
            change_threshold=change_threshold,
            kl_clip=None if rotates else kl_clip,
            norm_constraint=None if rotates else norm_constraint,
            lr=lambda step: float(self.param_groups[0]["lr"]),
            weight_sharing=weight_sharing,
            max_rows=max_rows,
            layout=layout or CHEAP_LAYOUT,
            inverse_precision=inverse_precision,
            factor_wire=factor_wire,
            strategy=strategy,
            traffic_budget=traffic_budget,
            refresh_budget_seconds=refresh_budget_seconds,
            loss_scale=loss_scale,
            max_dropped_steps=max_dropped_steps,
            cuda_graph=cuda_graph,
            strict=strict,
            seed=seed,
            communicator=communicator,
        )

    def observe(
        self,
        outputs: Tensor,
        *,
        weights: Tensor | None = None,
        key: int | None = None,
        row_samples: Tensor | None = None,
    ) -> None:
        """Tell the model's outputs, between forward and backward; see KFACPreconditioner.observe."""
        self.preconditioner.observe(outputs, weights=weights, key=key, row_samples=row_samples)

    def step(  # type: ignore[override]
        self,
        closure: Callable[[], float] | None = None,
        *,
        num_samples: float | None = None,
        finite: bool | None = None,
        mean_gradients: bool | None = None,
        factor_samples: float | None = None,
    ) -> float | None:
        """Take one step. num_samples: n, the number of seeds of the step (required).

        closure: evaluates the loss with gradients, as in torch; its value is returned. finite,
        mean_gradients, factor_samples: see KFACPreconditioner.step. Raises UserError without num_samples or
        without gradients.
        """
        if num_samples is None:
            raise UserError(
                "step() needs the number of seeds that the loss averages over; call step(num_samples=len(seeds))"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad(), torch.autocast(self.preconditioner.device.type, enabled=False):
            step = self.preconditioner.steps
            if self.preconditioner.unfrozen():
                self._tell_of_unfrozen()
            self._follow_schedules(step)
            summed = mean_gradients is False or (mean_gradients is None and self.preconditioner.loss_reduction == "sum")
            if finite is None:
                finite = self.preconditioner.gradients_are_finite(p for g in self.param_groups for p in g["params"])
            elif self.update == "mean_gradient":
                self.preconditioner.note_gradients()
            num_samples = self.preconditioner.check_call(num_samples, finite=finite)
            mean_scale = 1.0 / num_samples if summed and num_samples else 1.0
            if self.update == "mean_gradient" and finite:
                self._average_gradients(mean_scale)
            taken = self.preconditioner.step(
                num_samples, finite=finite, mean_gradients=mean_gradients, factor_samples=factor_samples
            )
            if taken:
                if self.update == "adam_eigenbasis":
                    self._adam_step(mean_scale)
                else:
                    self._scale_left_over(mean_scale)
                    self._momentum_step()
        return loss

    def _tell_of_unfrozen(self) -> None:
        """Say once that parameters which were frozen when the optimizer was made are trained by now, and not by it;
        add_param_group told of those that were added. Raises UserError with `strict`."""
        unfrozen = self.preconditioner.unfrozen()
        own = {id(p) for group in self.param_groups for p in group["params"]}
        names = [name for name, p in unfrozen if id(p) not in own]
        if names:
            text = (
                f"{', '.join(names)} did not require a gradient when the optimizer was made, which leaves them as they "
                "are; freeze layers after it is made, or make a new one"
            )
            if self.preconditioner.strict:
                raise UserError("strict: " + text)
            warnings.warn(text, stacklevel=3)
        self.preconditioner.note_unfrozen([name for name, _ in unfrozen])

    def _follow_schedules(self, step: int) -> None:
        """Put the step's momentum and weight decay into the groups, where they are functions of the step."""
        for name, schedule in (("momentum", self.momentum), ("weight_decay", self.weight_decay)):
            for group in self.param_groups:
                if callable(schedule):
                    group[name] = value_at(schedule, step)
                in_range(name, group[name], low=0.0, high_open=1.0 if name == "momentum" else math.inf)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, and with them the rows that the same backward passes left for the factors."""
        self.preconditioner.forget_skipped_step()
        super().zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with settings of their own. They take their plain gradient: what has curvature is settled
        when the optimizer is made, of the parameters that are trainable then."""
        super().add_param_group(param_group)
        if len(self.param_groups) > 1:
            sizes = [tuple(parameter.shape) for parameter in self.param_groups[-1]["params"]]
            warnings.warn(
                f"the parameters added ({len(sizes)}, of shapes {sizes[:4]}) take their plain gradient, at the natural "
                "gradient's rate unless they have one of their own; to unfreeze layers with curvature, freeze them "
                "after the optimizer is made, or make a new one",
                stacklevel=2,
            )

    def adapt_damping(self, loss_before: float, loss_after: float) -> float:
        """Adapt a LevenbergMarquardt damping to the last step; return the reduction ratio.

        loss_before, loss_after: the mean loss on the step's own batch, before and after the step, dropout and
        sampling alike; call it every few steps, with several ranks on all of them: the ranks' means are taken.
        Raises UserError if the damping is a plain schedule, or with momentum: the prediction is of the step -ηνv alone.
        """
        if self.update == "adam_eigenbasis" or float(self.param_groups[0]["momentum"]) > 0:
            raise UserError(
                f"adapt_damping predicts the step of one natural gradient, but update={self.update!r} and "
                f"momentum={self.param_groups[0]['momentum']}; use momentum=0, and not adam_eigenbasis"
            )
        damping = self.preconditioner.damping
        if not isinstance(damping, LevenbergMarquardt):
            raise UserError("adapt_damping needs damping=LevenbergMarquardt(...); this damping is a plain schedule")
        predicted = self.preconditioner.predicted_reduction(float(self.param_groups[0]["lr"]))
        communicator = self.preconditioner.communicator
        reduction = torch.tensor([loss_before - loss_after], dtype=torch.float64, device=self.preconditioner.device)
        communicator.all_reduce(reduction, "state").wait()
        return damping.update(float(reduction) / communicator.world_size, predicted)

    @property
    def is_clip_due(self) -> bool:
        """Whether `adapt_clip` is to follow the step that comes next: its kl_clip is a KLTrustRegion, and wants it."""
        clip = self.preconditioner.kl_clip
        return isinstance(clip, KLTrustRegion) and clip.is_due(self.preconditioner.steps)

    def adapt_clip(self, before: Tensor | None, after: Tensor | None) -> float:
        """Adapt a KLTrustRegion to the last step; return the measured KL divergence, nats a seed.

        before, after: the outputs [n, C] of the step's own batch with the weights before and after it, of the same
        sampled neighbours and without dropout (with the masks of the step's own gradient they differ several times as
        much). A step that was dropped changed nothing, and tells nothing. With several ranks all of them call it: the
        mean is over those that give outputs; a rank without gives None twice. Raises UserError if kl_clip is no
        KLTrustRegion, or with update="momentum": the prediction is of the step -ηνv alone.
        """
        clip = self.preconditioner.kl_clip
        if not isinstance(clip, KLTrustRegion):
            raise UserError("adapt_clip needs kl_clip=KLTrustRegion(...); this clip is a plain schedule, or none")
        if self.update != "mean_gradient" and float(self.param_groups[0]["momentum"]) > 0:
            raise UserError(
                f"adapt_clip predicts the step of one direction, but update={self.update!r} has "
                f"momentum={self.param_groups[0]['momentum']}; use mean_gradient, or momentum=0"
            )
        total = torch.zeros(2, dtype=torch.float64, device=self.preconditioner.device)
        if before is not None and after is not None:
            # Outputs may be on another device than the first layer.
            total[0].copy_(row_divergences(before, after, self.preconditioner.capture.loss).sum())
            total[1].fill_(before.shape[0])  # an assignment would wait for the GPU
        self.preconditioner.communicator.all_reduce(total, "state").wait()
        divergence, num_rows = total.tolist()
        measured = divergence / num_rows if num_rows else 0.0
        clip.update(measured, self.preconditioner.predicted_divergence())
        return measured

    def _average_gradients(self, mean_scale: float) -> None:
        """Put the mean of the gradients up to now, with weights (1-μ)μᵃ at age a, in the place of each gradient.

        mean_scale: what turns `.grad` into the mean loss's gradient, which is averaged: steps may differ in size.
        """
        for group in self.param_groups:
            mu = group["momentum"]
            means, gradients, scales = [], [], []
            for parameter in group["params"]:
                gradient = gradient_of(parameter)
                if gradient is None:
                    continue
                state = self.state[parameter]
                if "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["weight"] = torch.zeros((), dtype=torch.float64, device="cpu")
                state["weight"].mul_(mu).add_(1 - mu)
                means.append(state["exp_avg"])
                gradients.append(gradient)
                scales.append(1 / (float(state["weight"]) * mean_scale))
            average_into(gradients, means, mu, (1 - mu) * mean_scale, scales)

    def _scale_left_over(self, mean_scale: float) -> None:
        """Turn into the mean loss's gradients those that the preconditioner, which does so with the others, leaves."""
        if mean_scale == 1.0:
            return
        covered = {id(parameter) for layer in self.preconditioner.layers.values() for parameter in layer.parameters}
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = gradient_of(parameter)
                if id(parameter) not in covered and gradient is not None:
                    gradient.mul_(mean_scale)

    def _momentum_step(self) -> None:
        for group in self.param_groups:
            mu = group["momentum"] if self.update == "momentum" else 0.0
            given = [(p, g) for p in group["params"] if (g := gradient_of(p)) is not None]
            parameters = [p for p, _ in given]
            updates: list[Tensor] = [g for _, g in given]
            if mu > 0:
                for place, parameter in enumerate(parameters):
                    state = self.state[parameter]
                    if "momentum_buffer" not in state:
                        state["momentum_buffer"] = torch.zeros_like(parameter)
                    updates[place] = state["momentum_buffer"].mul_(mu).add_(updates[place])
            step_along(parameters, updates, group["lr"], group["weight_decay"])

    def _adam_step(self, gradient_scale: float) -> None:
        """Adam on each layer's gradient matrix in its eigenbasis, and on the other parameters as they are."""
        groups = {id(parameter): group for group in self.param_groups for parameter in group["params"]}
        covered: set[int] = set()
        for name, layer in self.preconditioner.layers.items():
            gradient = layer.gradient()
            covered.update(id(parameter) for parameter in layer.parameters)
            if gradient is None:
                continue
            gradient = gradient.to(layer.dtype) * gradient_scale
            basis = self.preconditioner.rotation(name)
            state = self.state[layer.parameters[0]]
            mu = groups[id(layer.parameters[0])]["momentum"]
            first = self._first_moment(state, gradient, mu)
            if basis is None:
                direction = first / self._second_moment(state, gradient)
            else:
                root = self._second_moment(state, rotate(gradient, *basis))
                direction = rotate_back(rotate(first, *basis) / root, *basis)
            layer.set_gradient(direction)
        for group in self.param_groups:
            given = [(p, g) for p in group["params"] if (g := gradient_of(p)) is not None]
            directions = []
            for parameter, own in given:
                if id(parameter) in covered:
                    directions.append(own)
                    continue
                state, gradient = self.state[parameter], own * gradient_scale
                first = self._first_moment(state, gradient, group["momentum"])
                directions.append(first / self._second_moment(state, gradient))
            step_along([p for p, _ in given], directions, group["lr"], group["weight_decay"])

    def _first_moment(self, state: dict[str, Any], gradient: Tensor, mu: float) -> Tensor:
        """Update and return the bias-corrected mean of the gradients."""
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(gradient)
            state["step"] = torch.zeros((), device="cpu")
        state["step"] += 1
        mean: Tensor = state["exp_avg"].lerp_(gradient, 1 - mu)
        corrected: Tensor = mean / (1 - mu ** float(state["step"]))
        return corrected

    def _second_moment(self, state: dict[str, Any], gradient: Tensor) -> Tensor:
        """Update and return the bias-corrected root mean square of the (rotated) gradients, plus ε."""
        if "exp_avg_sq" not in state:
            state["exp_avg_sq"] = torch.zeros_like(gradient)
        square: Tensor = state["exp_avg_sq"].mul_(ADAM_BETA2).addcmul_(gradient, gradient, value=1 - ADAM_BETA2)
        root: Tensor = (square / (1 - ADAM_BETA2 ** float(state["step"]))).sqrt_().add_(ADAM_EPSILON)
        return root

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state dict (momentum, groups) with the curvature under "preconditioner"."""
        out = super().state_dict()
        out["preconditioner"] = self.preconditioner.state_dict()
        out["update"] = self.update
        return out

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, on the same rank of a world of the same size.

        For another world size load the preconditioner's state by itself: KFACPreconditioner.load_state_dict takes
        the states of all ranks. Raises UserError for the state of another optimizer or model; nothing is changed then.
        """
        state_dict = dict(state_dict)
        curvature = state_dict.pop("preconditioner", None)
        if curvature is None:
            raise UserError("the state has no curvature; give one that NaturalGradient.state_dict() returned")
        update = state_dict.pop("update", self.update)
        if update != self.update:
            raise UserError(
                f"the state is of update={update!r}, this optimizer's is {self.update!r}; load it into one that was "
                "made with the same update"
            )
        saved, own = ([len(g["params"]) for g in groups] for groups in (state_dict["param_groups"], self.param_groups))
        if saved != own:
            raise UserError(
                f"the state has parameter groups of {saved} parameters, this optimizer of {own}; make it for the same "
                "model, and add the same groups, before the state is loaded"
            )
        self.preconditioner.load_state_dict(curvature)
        super().load_state_dict(state_dict)
        # torch casts what it loads to the parameter's precision; moments of a layer are kept in the statistics' own.
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, saved in state_dict["state"].items():
            for key, value in saved.items():
                # A count stays on the CPU: on a GPU reading it would wait for the device.
                device = "cpu" if key in _COUNTS else parameters[index].device
                self.state[parameters[index]][key] = value.to(device, copy=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> NaturalGradient:
        raise UserError("NaturalGradient is tied to its model's layers; make a new one for the copied model")

    def __reduce__(self) -> str | tuple[Any, ...]:
        raise UserError(
            "NaturalGradient is tied to its model's layers and cannot be pickled; save its state_dict(), and make a "
            "new one where the model is"
        )
