"""K-FAC preconditioning of a model's gradients: capture, commit, refresh, precondition, clip."""

from __future__ import annotations

import math
import time
import warnings
from collections import defaultdict
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from dngd.comm import Communicator, LocalCommunicator, assign_owners, inversion_cost
from dngd.comm.assignment import Factor
from dngd.curvature import (
    DampingMode,
    FactorStatistics,
    KroneckerFactors,
    kl_clip_scale,
    precondition_with_inverses,
)
from dngd.errors import UserError
from dngd.optim.capture import LinearLayer, find_layers
from dngd.optim.refresh import Damping, LayerState, RefreshPipeline
from dngd.optim.schedules import Schedule, UpdateSchedule, value_at
from dngd.optim.state import load_preconditioner_state, preconditioner_state

LossReduction = Literal["mean", "sum"]


class KFACPreconditioner:
    """Replaces each layer's gradient by `(G + λ_G I)⁻¹ ∇W (A + λ_A I)⁻¹`, its natural gradient.

    Use, in any loop whose layers are `nn.Linear` on aggregated rows::

        pre = KFACPreconditioner(model)
        ...
        loss.backward(); pre.step(num_samples=len(seeds)); optimizer.step()

    The factors are `A = (1/r) Σ m_i m_iᵀ` over the r input rows m_i (a 1 appended for the bias) and
    the empirical `G = (1/n) Σ g_i g_iᵀ` over n seeds, g_i the gradient of the summed loss with respect
    to output row i; both are running averages of sums and counts (Martens & Grosse 2015; Izadi et al.
    2020, arXiv 2008.09624). Between refreshes they stay on their rank; a refresh reduces them over the
    ranks, inverts each on its owner rank and shares the inverse.

    model: its trainable nn.Linear layers are preconditioned; other parameters keep their gradient, and
        are named in one warning.
    damping: λ > 0, a number or a function of the step. damping_mode: "tikhonov" (√λ·π and √λ/π, in
        units of the loss's Fisher) or "relative" (λ·tr A and damping_g_ratio·λ·tr G, free of units).
    loss_reduction: whether the loss that is back-propagated is the seeds' "mean" or their "sum".
    fisher: "empirical" (the labels' own gradients).
    factor_decay: ρ in [0, 1) per factor step. factor_update_period, inverse_update_period: in steps.
    dense_steps: this many first steps are all factor steps, and inverses are renewed at powers of two.
    inverse_delay: steps between the launch of a refresh and its adoption by all ranks; 0 waits at once.
    kl_clip: κ > 0 bounds η²Σ⟨v, ∇⟩, twice the step's predicted KL, by scaling all layers alike; needs lr (number or
        function of the step). None: no clip.
    communicator: of a world of ranks that step together; None is this process alone. The gradients
        given to `step` must already be reduced over its ranks.

    Raises UserError for an argument out of range, a model without a supported layer, or a shared weight.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        damping: Schedule = 1e-2,
        damping_mode: DampingMode = "tikhonov",
        damping_g_ratio: float = 10.0,
        loss_reduction: LossReduction = "mean",
        fisher: Literal["empirical"] = "empirical",
        factor_decay: Schedule = 0.95,
        factor_update_period: int = 10,
        inverse_update_period: int = 100,
        dense_steps: int = 20,
        inverse_delay: int = 0,
        kl_clip: float | None = None,
        lr: Schedule | None = None,
        communicator: Communicator | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise UserError(f"model is a {type(model).__name__}; give the model itself, not its parameters")
        _check_choice("damping_mode", damping_mode, get_args(DampingMode))
        _check_choice("loss_reduction", loss_reduction, get_args(LossReduction))
        _check_choice("fisher", fisher, ("empirical",))
        for name, value, low in (
            ("factor_update_period", factor_update_period, 1),
            ("inverse_update_period", inverse_update_period, 1),
            ("dense_steps", dense_steps, 0),
            ("inverse_delay", inverse_delay, 0),
        ):
            if value < low:
                raise UserError(f"{name}={value} is out of range; give a whole number of steps, at least {low}")
        if inverse_delay >= inverse_update_period:
            raise UserError(
                f"inverse_delay={inverse_delay} must be below inverse_update_period={inverse_update_period}; "
                "an inverse would be renewed before it is in use"
            )
        if kl_clip is not None and not kl_clip > 0:
            raise UserError(f"kl_clip={kl_clip} is out of range; give a number above 0, or None for no clip")
        if kl_clip is not None and lr is None:
            raise UserError("kl_clip needs the learning rate that it bounds; pass lr= (a number or step -> number)")
        self.damping = damping
        self.damping_mode: DampingMode = damping_mode
        self.damping_g_ratio = damping_g_ratio
        self.loss_reduction: LossReduction = loss_reduction
        self.factor_decay = factor_decay
        self.schedule = UpdateSchedule(factor_update_period, inverse_update_period, dense_steps)
        self.inverse_delay = inverse_delay
        self.kl_clip = kl_clip
        self.lr = lr
        self.communicator: Communicator = communicator or LocalCommunicator()
        _in_range("damping", value_at(damping, 0), low_open=0.0)
        _in_range("damping_g_ratio", damping_g_ratio, low_open=0.0)
        _in_range("factor_decay", value_at(factor_decay, 0), low=0.0, high_open=1.0)

        self.steps = 0
        self.factor_steps = 0
        self.dropped_steps = 0
        self.last_kl_scale: Tensor = torch.ones(())
        self.phase_seconds: dict[str, float] = defaultdict(float)
        self._capturing = self.schedule.is_factor_step(0)
        layers, left_over = find_layers(model, lambda: self._capturing)
        if left_over:
            warnings.warn(
                "K-FAC leaves these parameters to the optimizer's plain gradient: " + ", ".join(left_over),
                stacklevel=2,
            )
        self.layers: dict[str, LinearLayer] = {layer.name: layer for layer in layers}
        self.states = {
            layer.name: LayerState(unfolded=layer.empty_statistics(), folded=layer.empty_statistics())
            for layer in layers
        }
        costs: dict[Factor, float] = {}
        for layer in layers:
            costs[layer.name, "A"] = inversion_cost(layer.d_a)
            costs[layer.name, "G"] = inversion_cost(layer.d_g)
        self.owners = assign_owners(costs, self.communicator.world_size)
        self.pipeline = RefreshPipeline(self.states, self.owners, self.communicator)

    def step(self, num_samples: float, *, finite: bool | None = None, mean_gradients: bool | None = None) -> bool:
        """Turn the gradients in `.grad` into natural gradients. Call once a step, after backward.

        A backward pass whose step you skip must be forgotten: call `discard()` instead. Back-propagate
        unscaled losses: a GradScaler's factor would go into G squared.

        num_samples: n, the number of seeds (or the sum of their weights) behind this rank's gradients.
        finite: whether the step's gradients are all finite, if the caller (and with several ranks, all
        of them alike) already knows; None checks here.
        mean_gradients: whether `.grad` holds the gradient of the mean loss by now; None: as
        loss_reduction says. A sum's gradient is divided by num_samples first: the result is the mean
        loss's natural gradient either way. Needed where sums are back-propagated, reduced over ranks
        and divided by the global n before this call.
        Returns False for a step with non-finite gradients: nothing is committed or changed, the step is
        counted in `dropped_steps`, and the optimizer should skip it too.
        Raises UserError if no layer has a gradient.
        """
        if mean_gradients is None:
            mean_gradients = self.loss_reduction == "mean"
        if not mean_gradients and self.communicator.world_size > 1:
            raise UserError(
                "with several ranks, divide the reduced gradients by the global number of samples and say "
                "step(..., mean_gradients=True): this rank's num_samples is not the world's"
            )
        if finite is None:
            finite = self.gradients_are_finite()
        started = time.perf_counter()
        if finite:
            self.commit(num_samples)
        else:
            self.discard()
        committed = time.perf_counter()
        self.refresh()
        refreshed = time.perf_counter()
        if finite:
            self.precondition(1.0 if mean_gradients or num_samples == 0 else 1.0 / num_samples)
        self.phase_seconds["commit"] += committed - started
        self.phase_seconds["refresh"] += refreshed - committed
        self.phase_seconds["precondition"] += time.perf_counter() - refreshed
        self.steps += 1
        self._capturing = self._is_factor_step()
        return finite

    def _is_factor_step(self) -> bool:
        # Until a step has been committed every step is a factor step: there is nothing to precondition with.
        return self.factor_steps == 0 or self.schedule.is_factor_step(self.steps)

    def gradients_are_finite(self) -> bool:
        """Return whether every layer's gradient is finite. Raises UserError if there is none at all."""
        gradients = [p.grad for m in self.layers.values() for p in m.module.parameters() if p.grad is not None]
        if not gradients:
            raise UserError("step() found no gradient; call loss.backward() before it")
        norms = torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients])
        return bool(torch.isfinite(norms).all())

    def commit(self, num_samples: float) -> None:
        """Fold this step's captured rows into this rank's running sums: `S ← ρS + ΔS`, `c ← ρc + Δc`.

        All ranks commit the same steps; a rank that captured no rows for a layer still decays.
        """
        if not self._capturing:
            return
        if num_samples < 0 or not math.isfinite(num_samples):
            raise UserError(f"num_samples={num_samples} is out of range; give the number of seeds of the step")
        rho = value_at(self.factor_decay, self.steps)
        _in_range("factor_decay", rho, low=0.0, high_open=1.0)
        scale = float(num_samples) if self.loss_reduction == "mean" else 1.0
        for name, layer in self.layers.items():
            state = self.states[name]
            state.unfolded.decay_(rho)
            state.decay *= rho
            if layer.pending is not None:
                layer.pending.g_sum.mul_(scale * scale)
                layer.pending.counts[1] = num_samples
                state.unfolded.add_(layer.pending)
                layer.pending = None
        self.factor_steps += 1

    def discard(self) -> None:
        """Forget this step's captured rows, on all ranks, and count the step as dropped."""
        for layer in self.layers.values():
            layer.pending = None
        self.dropped_steps += 1

    def refresh(self) -> None:
        """Launch the refreshes that are due at this step, and move those under way forward.

        With several ranks all of them enter, in the same order. The very first refresh is adopted at
        once, whatever inverse_delay: until then there is nothing to precondition with.
        """
        names = list(self.layers)
        due = [names[i] for i in self.schedule.layers_due(self.steps, len(names))]
        missing = [name for name, state in self.states.items() if state.attempted_step < 0]
        if self.factor_steps == 0:
            due = missing = []  # every step so far was dropped: the same on all ranks
        launched = {name for refresh in self.pipeline.under_way for name in refresh.layers}
        first = [name for name in missing if name not in launched]
        later = [name for name in due if name not in first and name not in launched]
        if first:
            self.pipeline.launch(self.steps, first, self._damping_now(), 0)
        if later:
            self.pipeline.launch(self.steps, later, self._damping_now(), self.inverse_delay)
        self.pipeline.advance(self.steps)

    def _damping_now(self) -> Damping:
        value = value_at(self.damping, self.steps)
        _in_range("damping", value, low_open=0.0)
        return Damping(value, self.damping_mode, self.damping_g_ratio)

    def precondition(self, gradient_scale: float = 1.0) -> None:
        """Replace each layer's gradient by `ν · (G + λ_G I)⁻¹ ∇W (A + λ_A I)⁻¹`, ν the KL clip.

        gradient_scale: what turns `.grad` into the mean loss's gradient ∇W.
        """
        pairs: list[tuple[LinearLayer, Tensor, Tensor]] = []
        for name, layer in self.layers.items():
            gradient = layer.gradient()
            if gradient is None:
                continue
            if gradient_scale != 1.0:
                gradient = gradient * gradient_scale
            state = self.states[name]
            if state.a_inverse is None or state.g_inverse is None:
                preconditioned = gradient
            else:
                preconditioned = precondition_with_inverses(
                    gradient.to(layer.dtype), state.a_inverse, state.g_inverse
                ).to(gradient.dtype)
            pairs.append((layer, preconditioned, gradient))
        if not pairs:
            raise UserError("step() found no gradient; call loss.backward() before it")
        scale: Tensor | None = None
        if self.kl_clip is not None:
            assert self.lr is not None
            products = ((preconditioned, gradient) for _, preconditioned, gradient in pairs)
            scale = kl_clip_scale(products, value_at(self.lr, self.steps), self.kl_clip)
            self.last_kl_scale = scale
        for layer, preconditioned, _ in pairs:
            layer.set_gradient(preconditioned if scale is None else preconditioned * scale)

    def factors(self) -> dict[str, KroneckerFactors]:
        """Return the averages {layer: (A, G)} over this world's ranks up to now.

        With several ranks all of them must call it, in the same order as their other collectives.
        A layer without statistics yet is left out.
        """
        self.pipeline.drain()  # sums that a refresh under way has taken are part of the averages
        out: dict[str, KroneckerFactors] = {}
        for name, state in self.states.items():
            total = FactorStatistics(*(tensor.clone() for tensor in state.unfolded.tensors()))
            for tensor in total.tensors():
                self.communicator.all_reduce(tensor.view(-1), "factor", group="factor").wait()
            owed = FactorStatistics(*(tensor.clone() for tensor in state.folded.tensors()))
            owed.decay_(state.decay)
            total.add_(owed)
            factors = total.factors()
            if factors is not None:
                out[name] = factors
        return out

    def health(self) -> dict[str, dict[str, float]]:
        """Return per layer: staleness (steps since its inverse's launch; -1: none yet), escalations and
        failed_inversions (of the factors this rank owns)."""
        return {
            name: {
                "staleness": float(self.steps - state.launched_step) if state.launched_step >= 0 else -1.0,
                "escalations": float(state.escalations),
                "failed_inversions": float(state.failed_inversions),
            }
            for name, state in self.states.items()
        }

    def memory_bytes(self) -> int:
        """Return the bytes of statistics and inverses held by this rank now."""
        tensors: list[Tensor] = []
        for state in self.states.values():
            tensors += [*state.unfolded.tensors(), *state.folded.tensors()]
            tensors += [t for t in (state.a_inverse, state.g_inverse) if t is not None]
        for layer in self.layers.values():
            if layer.pending is not None:
                tensors += layer.pending.tensors()
        return sum(t.numel() * t.element_size() for t in tensors)

    def state_dict(self) -> dict[str, Tensor]:
        """Return tensors alone: "shared.*" equal on all ranks, "local.*" this rank's unfolded statistics.

        All ranks must call it at the same step: refreshes under way are finished (not adopted) first.
        """
        self.pipeline.drain()
        return preconditioner_state(self)

    def load_state_dict(self, *states: dict[str, Tensor]) -> None:
        """Restore from the state dicts of all ranks that saved, in rank order (one is enough for one rank).

        At the same world size each rank takes its own, bitwise; at another, their unfolded statistics are
        summed on rank 0. Raises UserError if the layers or sizes differ from this model's.
        """
        load_preconditioner_state(self, states)
        self._capturing = self._is_factor_step()

    def close(self) -> None:
        """Take the hooks off the model and stop the inversion thread."""
        for layer in self.layers.values():
            layer.remove()
        self.pipeline.close()


def _check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise UserError(f"{name}={value!r} is unknown; use one of: " + ", ".join(allowed))


def _in_range(
    name: str,
    value: float,
    *,
    low: float = -math.inf,
    low_open: float = -math.inf,
    high_open: float = math.inf,
) -> None:
    if not (value >= low and value > low_open and value < high_open):
        limits = [f"above {low_open}"] if low_open > -math.inf else [f"at least {low}"]
        if high_open < math.inf:
            limits.append(f"below {high_open}")
        raise UserError(f"{name}={value} is out of range; it must be " + " and ".join(limits))
