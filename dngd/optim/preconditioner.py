"""K-FAC preconditioning of a model's gradients: capture, commit, refresh, precondition, clip."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import chain

import torch
from torch import Tensor, nn

from dngd.comm import Communicator, current_communicator
from dngd.curvature import (
    DampingMode,
    FactorLayout,
    FactorStatistics,
    FisherKind,
    KroneckerFactors,
    LossKind,
)
from dngd.errors import TrainingError, UserError
from dngd.optim.arguments import LossReduction, Method, check_arguments, check_wrapper, in_range
from dngd.optim.capture import Capture, Variant, WeightSharing
from dngd.optim.commit import fold_pending, look_at_pending
from dngd.optim.directions import Directions
from dngd.optim.eigenvalues import EigenvalueCorrection
from dngd.optim.findings import Damping
from dngd.optim.first_measurement import check_first_measurement
from dngd.optim.foreach import scaled
from dngd.optim.gradients import StepGradients, gradient_of
from dngd.optim.health import layer_health, layer_table
from dngd.optim.inverses import PRECISIONS, WIRES, FactorWire, InversePrecision, Inverses, Wanted
from dngd.optim.layer_state import LayerState
from dngd.optim.layers import CurvatureLayer, find_layers, unwrapped
from dngd.optim.participation import Participation
from dngd.optim.plan import TRAFFIC_BUDGET, LayerSizes, Plan, Planner, StrategyChoice
from dngd.optim.refresh import RefreshPipeline
from dngd.optim.replay import StepReplay, can_record
from dngd.optim.schedules import Period, Schedule, UpdateSchedule, period_at, value_at
from dngd.optim.state import load_preconditioner_state, preconditioner_state
from dngd.optim.step_scale import Bounds, Shortening, StepScale, shortening


class KFACPreconditioner:
    """Replaces each layer's gradient by `(G + λ_G I)⁻¹ ∇W (A + λ_A I)⁻¹`, its natural gradient.

    In any loop of torch, PyG or DGL modules:

    >>> model = torch.nn.Linear(3, 2)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> pre = KFACPreconditioner(model)
    >>> loss = torch.nn.functional.cross_entropy(model(torch.rand(8, 3)), torch.arange(8) % 2)
    >>> loss.backward()
    >>> pre.step(num_samples=8)  # whether the step counts: False where a gradient is not finite
    True
    >>> optimizer.step()
    >>> {name: (tuple(f.A.shape), tuple(f.G.shape)) for name, f in pre.factors().items()}
    {'': ((4, 4), (2, 2))}
    >>> pre.close()

    The factors are `A = (1/r) Σ m_i m_iᵀ` over the r input rows m_i that the loss reaches (a 1 appended for the
    bias; aggregated rows for graph convolutions) and `G = (1/n) Σ g_i g_iᵀ` over n seeds, g_i the gradient of
    the summed loss with respect to output row i; both are running averages of sums and counts (Martens & Grosse
    2015; Izadi et al. 2020, arXiv 2008.09624). Between refreshes they stay on their rank; a refresh reduces them
    over the ranks, inverts each on its owner rank and shares the inverse, or as `strategy` says.

    model: linear layers of torch and PyG, graph convolutions of dngd, PyG and DGL, Embedding, BatchNorm and
        LayerNorm are preconditioned; other parameters keep their gradient and are named in one warning, or
        refused with `strict`. A module used twice has the rows of both uses; a weight shared by two modules is refused.
    damping: λ > 0. damping_mode: "tikhonov" (√λ·π and √λ/π, in units of the loss's Fisher), "even" (√λ each),
        "relative" (λ·tr A and damping_g_ratio·λ·tr G, free of units) or "mean" (λ and damping_g_ratio·λ times their
        mean eigenvalues, the bias's 1 in A aside). A LevenbergMarquardt adapts it.
    loss_reduction: whether the loss that is back-propagated is the seeds' "mean" or their "sum".
    fisher: "empirical" (the labels' own gradients), "monte_carlo" or "ggn", which need
        `pre.observe(outputs)` between forward and backward; see dngd.curvature.fisher. loss: what the outputs mean.
    variant: "dngd", or "paper" for the factors of the method's published code; see dngd.optim.capture.Variant.
    method: "kfac", "ekfac" (eigenvalues corrected every eigenvalue_update_period steps), or "rotate".
    factor_decay: ρ in [0, 1) per factor step. factor_update_period, inverse_update_period: in steps.
    dense_steps: this many first steps are all factor steps, and inverses are renewed from powers of two on.
    inverse_delay: steps between the launch of a refresh and its adoption by all ranks; 0 waits at once.
    change_threshold: a factor whose relative change since its inversion is at most this is not inverted again.
    unit_scale: multiply each layer's direction by λ_A·λ_G, `(I + G/λ_G)⁻¹ ∇W (I + A/λ_A)⁻¹`: it shortens the gradient
        where the curvature is high, lengthens it nowhere, and its learning rate means what the gradient's means.
    kl_clip: κ > 0 bounds η²Σ⟨v, ∇⟩, twice the step's predicted KL, by scaling all layers alike; norm_constraint:
        c > 0 bounds the step's length η‖v‖; both need lr.
    weight_sharing: "expand" or "reduce"; see dngd.optim.capture.WeightSharing, and `observe`.
    max_rows: rows of a call that are measured at most, an unbiased draw of those that the loss reaches; None for all.
    layout: what becomes of wide factors; see dngd.curvature.FactorLayout (with eigenbases "low_rank" is diagonal).
        inverse_precision: how inverses are kept and sent, where their conditioning allows it ("full" otherwise, and
        for float64 models).
    factor_wire: type in which sums travel between ranks, "float32" or "bfloat16": what rounding leaves over is kept and
        sent with the next, and factors whose damping could not bear it, low-rank sketches, and float64 models travel as
        they are; see dngd.comm.rounding.
    strategy: "replicate" (every rank inverts all), "share_inverse" (owners invert and send the inverses),
        "share_gradient" (an owner keeps a layer's inverses and sends its preconditioned gradient every step), or
        "auto", which chooses for each layer from what all ranks measured: inverses are sent only where they and the
        statistics send no more a step than traffic_budget times the gradient's bytes, else every rank inverts
        (share_gradient sends the gradient once more, so that auto takes it from a budget of 1 on). Ranks that round
        differently always send inverses. See dngd.comm.cost_model and `plan`. No number of the training
        depends on it where the ranks round alike.
    refresh_budget_seconds: most seconds of inversions that a step starts, by the plan's measurements; layers beyond it
        wait for the next step, so that timings decide when inverses are renewed (on all ranks alike, but two runs of
        one seed differ). One layer always starts; None for no limit.
    loss_scale: a function that returns what the loss was multiplied with, e.g. `scaler.get_scale`; gradients must be
        unscaled (`scaler.unscale_(optimizer)`) before `step`.
    max_dropped_steps: non-finite steps in a row after which TrainingError is raised; None for no limit.
    cuda_graph: on a GPU, replay a step's preconditioning as a CUDA graph, with method="kfac" and without unit_scale.
        The numbers are the same. It keeps the inverses once more, in the layers' precision, and about four times the
        gradients; what torch computes matrix products in (TF32, say) is settled when it is recorded, at the first step.
    communicator: None takes torch.distributed's, all ranks, if initialised. The gradients given to `step` must
        already be reduced over the ranks (as DDP does).

    The defaults measure every row and keep every digit, in units of the loss's Fisher; NaturalGradient's are the cheap,
    scale-free ones, chosen by measurement. Every schedule is a number or a function of the step; so are the periods.
    Raises UserError for an argument out of range, a model without a supported layer, or a shared weight.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        damping: Schedule = 1e-2,
        damping_mode: DampingMode = "tikhonov",
        damping_g_ratio: Schedule = 10.0,
        loss_reduction: LossReduction = "mean",
        fisher: FisherKind = "empirical",
        loss: LossKind = "cross_entropy",
        method: Method = "kfac",
        variant: Variant = "dngd",
        factor_decay: Schedule = 0.95,
        factor_update_period: Period = 10,
        inverse_update_period: Period = 100,
        eigenvalue_update_period: Period = 10,
        dense_steps: int = 20,
        inverse_delay: int = 0,
        change_threshold: float = 0.0,
        unit_scale: bool = False,
        kl_clip: Schedule | None = None,
        norm_constraint: Schedule | None = None,
        lr: Schedule | None = None,
        weight_sharing: WeightSharing = "expand",
        max_rows: int | None = None,
        layout: FactorLayout | None = None,
        inverse_precision: InversePrecision = "full",
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
        check_arguments(locals())
        if not isinstance(model, nn.Module):
            raise UserError(f"model is a {type(model).__name__}; give the model itself, not its parameters")
        self.damping = damping
        self.damping_mode: DampingMode = damping_mode
        self.damping_g_ratio = damping_g_ratio
        self.loss_reduction: LossReduction = loss_reduction
        self.factor_decay = factor_decay
        self.schedule = UpdateSchedule(
            factor_update_period, inverse_update_period, dense_steps, at_once=inverse_delay == 0
        )
        self.inverse_delay = inverse_delay
        self.kl_clip = kl_clip
        self.norm_constraint = norm_constraint
        self.lr = lr
        self.method: Method = method
        self.max_dropped_steps = max_dropped_steps
        self.communicator: Communicator = communicator if communicator is not None else current_communicator()
        check_wrapper(model, fisher)
        if variant == "paper" and self.communicator.world_size > 1:
            raise UserError("variant='paper' reproduces a single-process method; run it with one worker")

        self.steps = 0
        self.factor_steps = 0
        self.dropped_steps = 0
        self.dropped_in_a_row = 0
        self.non_finite_statistics = 0
        self._scale = StepScale()
        self.phase_seconds: dict[str, float] = defaultdict(float)
        self.inside: Callable[[str], contextlib.AbstractContextManager[None]] = lambda _: contextlib.nullcontext()
        """Entered with the name of each part of a step: for those who watch what a process is at."""
        self.capture = Capture(
            fisher=fisher,
            loss=loss,
            weight_sharing=weight_sharing,
            max_rows=max_rows,
            seed=seed,
            loss_scale=loss_scale,
            variant=variant,
            rank=self.communicator.rank,
        )
        self._parameters = list(model.parameters())
        self._frozen = [(name, p) for name, p in unwrapped(model).named_parameters() if not p.requires_grad]
        self.strict = strict
        self._was_stepped = True
        self._gradients = StepGradients()
        self._joined: list[str] = []
        self.participation = Participation()
        layout = layout or FactorLayout()
        layers, left_over = find_layers(model, self.capture, layout if method == "kfac" else layout.for_eigenbases())
        if left_over:
            named = "these parameters keep the optimizer's plain gradient, K-FAC has no factors for them: "
            if strict:
                for layer in layers:
                    layer.remove()
                raise UserError("strict: " + named + ", ".join(left_over))
            warnings.warn(named + ", ".join(left_over), stacklevel=2)
        self.left_over = left_over
        self.layers: dict[str, CurvatureLayer] = {layer.name: layer for layer in layers}
        alone = self.communicator.world_size == 1
        self.states = {
            layer.name: LayerState(
                layer.a, layer.g, None if alone else layer.empty_statistics(), layer.empty_statistics(), layer.has_ones
            )
            for layer in layers
        }
        wanted = Wanted(eigenbasis=method != "kfac", dtype=self._stored_dtype(inverse_precision))
        self._planner = Planner(
            {layer.name: _layer_sizes(layer, wanted) for layer in layers},
            self.communicator,
            strategy,
            shares_gradients=method == "kfac",
            traffic_budget=traffic_budget,
        )
        self.refresh_budget_seconds = refresh_budget_seconds
        self.deferred: list[str] = []
        self.pipeline = RefreshPipeline(
            self.states,
            self._planner.plan,
            self.communicator,
            wanted,
            change_threshold,
            None if self._stored_dtype("float16") is None else WIRES[factor_wire],
            self._planner.record_inversion,
        )
        self.eigenvalues = (
            EigenvalueCorrection(self.layers, self.states, self.communicator, eigenvalue_update_period)
            if method == "ekfac"
            else None
        )
        self._directions = Directions(
            method,
            self.layers,
            self.states,
            self.eigenvalues,
            self.communicator,
            self._planner.record_preconditioning,
            self.participation.was_measured,
            unit_scale=unit_scale,
            strict=strict,
        )
        replays = cuda_graph and self.device.type == "cuda" and method == "kfac" and not unit_scale and can_record()
        self._replay = StepReplay(self.layers, self.states, self._precondition_now) if replays else None
        self.capture.start_step(0, self.schedule.is_factor_step(0))

    def _stored_dtype(self, precision: InversePrecision) -> torch.dtype | None:
        doubles = any(layer.dtype == torch.float64 for layer in self.layers.values())
        return None if doubles else PRECISIONS[precision]

    def observe(
        self,
        outputs: Tensor,
        *,
        weights: Tensor | None = None,
        key: int | None = None,
        row_samples: Tensor | None = None,
    ) -> None:
        """Tell the model's outputs, between forward and backward; does work on factor steps alone.

        outputs: [n, C], with their graph. weights: [n], what each seed's loss is multiplied with; the Fisher
        then is `Σ_s w_s F_s / num_samples`, and `step` wants what the loss is divided by (`Σ w` for a weighted mean).
        key: of the random draws, besides seed and step; None: the rank and the number of the call in this step.
        row_samples: [r], for weight_sharing="reduce": the sample (from 0) that each row of two-dimensional layers
        belongs to, as PyG's `batch` vector says it.
        Several outputs of one forward pass (heads) are observed one after another: their Fishers add up.
        The empirical Fisher needs this call only where there are weights, and then equal ones (zeros aside).
        Raises UserError for unequal weights with the empirical Fisher, or outputs of another shape.
        """
        self.capture.observe(outputs, weights, key, row_samples)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Measure nothing inside: for passes through the model that are no training, an attack's or a saliency map's.

        >>> model = torch.nn.Linear(3, 2)
        >>> pre = KFACPreconditioner(model)
        >>> x = torch.rand(8, 3, requires_grad=True)
        >>> with pre.paused():
        ...     direction = torch.autograd.grad(model(x).sum(), x)[0].sign()

        Both the forward and the backward pass belong inside. Passes under `torch.no_grad()` are never measured.
        """
        before, self.capture.is_paused = self.capture.is_paused, True
        try:
            yield
        finally:
            self.capture.is_paused = before

    def step(
        self,
        num_samples: float,
        *,
        finite: bool | None = None,
        mean_gradients: bool | None = None,
        factor_samples: float | None = None,
    ) -> bool:
        """Turn the gradients in `.grad` into natural gradients. Call once a step, after backward.

        A backward pass whose step you skip must be forgotten: call `discard()` instead.

        num_samples: n, the number of seeds (or the sum of their weights) behind this rank's gradients: what a mean
        loss is divided by. Losses that also average over C output columns (mse_loss, BCEWithLogitsLoss) are the mean
        loss over C: multiply them by C first.
        finite: whether the step's gradients are all finite, if the caller (and with several ranks, all
        of them alike) already knows; None checks here.
        mean_gradients: whether `.grad` holds the gradient of the mean loss by now; None: as
        loss_reduction says. A sum's gradient is divided by num_samples first: the result is the mean
        loss's natural gradient either way. Needed where sums are back-propagated, reduced over ranks
        and divided by the global n before this call.
        factor_samples: n of the paper's variant of the factors, if it is not num_samples.
        Returns False for a step with non-finite gradients: nothing is committed or changed, the step is
        counted in `dropped_steps`, and the optimizer should skip it too.
        Raises UserError if nothing has a gradient, TrainingError after max_dropped_steps non-finite steps in a row.
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
        num_samples = self.check_call(num_samples, finite=finite)
        self._check_not_moved()
        if self._frozen:
            self._tell_of_unfrozen()
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            with self._phase("commit"):
                self._joined = []
                if finite:
                    self._joined = self._take_note()
                    self.commit(num_samples, factor_samples)
                    self.dropped_in_a_row = 0
                else:
                    self.discard()
            with self._phase("refresh"):
                self.refresh()
            with self._phase("precondition"):
                if finite and self.method != "rotate":
                    self.precondition(1.0 if mean_gradients or num_samples == 0 else 1.0 / num_samples)
        self.steps += 1
        self._was_stepped = True
        self._gradients.forget()
        self.capture.start_step(self.steps, self._is_factor_step())
        self._stop_after_many_drops()
        return finite

    def _take_note(self) -> list[str]:
        """Note which layers have a gradient; return those that come late to be measured, which this step does."""
        # The published code takes every row, reached or not.
        counts_zeros = self.capture.variant == "paper"
        names = [
            name
            for name, layer in self.layers.items()
            if layer.has_gradient and (counts_zeros or not self._gradients.is_zero(layer))
        ]
        period = period_at(self.schedule.factor_update_period, self.steps)
        return self.participation.note(self.steps, names, is_factor_step=self.capture.active, period=period)

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        with self.inside(name):
            yield
        self.phase_seconds[name] += time.perf_counter() - started

    def unfrozen(self) -> list[tuple[str, nn.Parameter]]:
        """Return the parameters, by name, that were frozen when the layers were found, so that none covers them, and
        have a gradient by now."""
        return [(name, p) for name, p in self._frozen if gradient_of(p) is not None]

    def note_unfrozen(self, names: Collection[str]) -> None:
        """Have unfrozen parameters told of no more."""
        self._frozen = [(name, p) for name, p in self._frozen if name not in names]

    def _tell_of_unfrozen(self) -> None:
        """Say once which parameters are trained by now without factors. Raises UserError with `strict`."""
        names = [name for name, _ in self.unfrozen()]
        if not names:
            return
        text = (
            f"{', '.join(names)} did not require a gradient when the preconditioner was made, so that K-FAC has no "
            "factors for them: they keep the optimizer's plain gradient; freeze layers after it is made, or make a new "
            "one"
        )
        if self.strict:
            raise UserError("strict: " + text)
        warnings.warn(text, stacklevel=3)
        self.left_over += names
        self.note_unfrozen(names)

    def _check_not_moved(self) -> None:
        for name, layer in self.layers.items():
            counts = self.states[name].folded.counts
            if (layer.dtype, layer.device) != (counts.dtype, counts.device):
                raise UserError(
                    f"layer {name!r} is now {layer.dtype} on {layer.device}, its statistics are {counts.dtype} on "
                    f"{counts.device}; move or cast the model before the preconditioner is made"
                )

    def _is_factor_step(self) -> bool:
        # Until a step has been committed every step is a factor step: there is nothing to precondition with.
        return (
            self.factor_steps == 0 or self.schedule.is_factor_step(self.steps) or self.participation.wants(self.steps)
        )

    def _stop_after_many_drops(self) -> None:
        if self.max_dropped_steps is not None and self.dropped_in_a_row >= self.max_dropped_steps:
            where = f"after step {self.steps}" if self.steps else "before any step was taken"
            fix = "use a smaller learning rate or a larger damping, and check the inputs for non-finite values"
            if self.capture.loss_scale is not None:
                scale = self.capture.loss_scale()
                fix = f"start the loss's scale, now {scale:g}, lower (GradScaler's init_scale), or {fix}"
            raise TrainingError(f"{self.dropped_in_a_row} steps in a row had non-finite gradients ({where}); {fix}")

    def gradients_are_finite(self, others: Iterable[Tensor] = ()) -> bool:
        """Return whether every parameter's gradient is finite. Raises UserError if there is none at all.

        others: parameters beside the model's.
        """
        are_finite = self._gradients.are_finite(chain(self._parameters, others), self.device)
        if are_finite is None:
            raise UserError("step() found no gradient; call loss.backward() before it")
        return are_finite

    def note_gradients(self) -> None:
        """Note which gradients are zero, before something else takes their place in `.grad`; gradients_are_finite does
        so, too. Only factor steps ask for it."""
        self._gradients.forget()
        if self.capture.active:
            self._gradients.note(self.layers.values())

    def check_call(self, num_samples: float, *, finite: bool = True) -> float:
        """Return the number of samples, and raise UserError for a step that cannot be taken as it is asked for, before
        anything is changed.

        finite: whether the step's gradients are; otherwise it is dropped, and needs no outputs.
        """
        try:
            count = math.fsum([num_samples])  # which takes no text, as float() does
        except (TypeError, ValueError, RuntimeError):
            raise UserError(
                f"num_samples is a {type(num_samples).__name__}, no number; give the number of seeds of the step, such "
                "as len(seeds)"
            ) from None
        if count < 0 or not math.isfinite(count):
            raise UserError(f"num_samples={num_samples} is out of range; give the number of seeds of the step")
        if finite and self.capture.active and self.capture.is_waiting_for_outputs:
            raise UserError(
                f"fisher={self.capture.fisher!r} samples from the model's outputs; call observe(outputs) between the "
                "forward and the backward pass, for each forward pass of the step (and evaluate under torch.no_grad())"
            )
        return count

    def commit(self, num_samples: float, factor_samples: float | None = None) -> None:
        """Fold this step's captured rows into this rank's running sums: `S ← ρS + ΔS`, `c ← ρc + Δc`.

        All ranks commit the same steps; a rank that captured no rows for a layer still decays. Rows whose
        sums overflow count as no rows (`non_finite_statistics`).
        """
        num_samples = self.check_call(num_samples)
        if not self.capture.active:
            return
        rho = value_at(self.factor_decay, self.steps)
        in_range("factor_decay", rho, low=0.0, high_open=1.0)
        paper = self.capture.variant == "paper"
        scale = 1.0
        if self.capture.fisher == "empirical" and paper == (self.loss_reduction == "sum"):
            # Rows hold gradients of the loss as back-propagated; wanted are the summed loss's (the paper: the mean's).
            scale = 1.0 / max(num_samples, 1.0) if paper else float(num_samples)
        if not self.factor_steps:
            check_first_measurement(self.layers, self.capture, num_samples, self.loss_reduction, self.device)
        self.capture.seen = None  # also of a state that was loaded, whose first step was looked at
        found = look_at_pending(self.layers, {} if paper else self._gradients.sizes(self.layers), self.device)
        self.non_finite_statistics += list(found.sound.values()).count(False)
        shared_count = (num_samples if factor_samples is None else factor_samples) if paper else None
        fold_pending(
            self.layers,
            self.states,
            found.sound,
            decay=rho,
            gradient_scale=scale,
            num_samples=num_samples,
            absent=found.absent,
            shared_count=shared_count,
        )
        if self.eigenvalues is not None:
            self.eigenvalues.commit(rho, num_samples, scale * scale, found.absent)
        for layer in self.layers.values():
            layer.forget()
        self._gradients.forget()
        self.factor_steps += 1

    def discard(self) -> None:
        """Forget this step's captured rows, on all ranks, and count the step as dropped."""
        self.forget()
        self._was_stepped = True
        self.dropped_steps += 1
        self.dropped_in_a_row += 1

    @property
    def device(self) -> torch.device:
        """Where scalars that all ranks share are reduced: the first layer's device."""
        return next(iter(self.layers.values())).device

    def forget_skipped_step(self) -> None:
        """Forget this step's rows, before the gradients go; with a loss_scale, gradients that are not finite and were
        never stepped on are a step that the GradScaler skipped, and count as dropped."""
        has_scale = self.capture.loss_scale is not None
        may_be_skipped = (
            has_scale and not self._was_stepped and any(gradient_of(p) is not None for p in self._parameters)
        )
        was_skipped = may_be_skipped and not self.gradients_are_finite()
        self._was_stepped = False
        self.forget()
        if was_skipped:
            self.dropped_steps += 1
            self.dropped_in_a_row += 1
            self._stop_after_many_drops()

    def forget(self) -> None:
        """Forget this step's captured rows without counting the step (as `zero_grad` does for gradients)."""
        for layer in self.layers.values():
            layer.forget()
        self.capture.forget()
        self._gradients.forget()

    def refresh(self) -> None:
        """Launch the refreshes that are due at this step, and move those under way forward.

        With several ranks all of them enter, in the same order. The very first refresh is adopted at
        once, whatever inverse_delay: until then there is nothing to precondition with.
        """
        self._replan_if_due()
        names = list(self.layers)
        due = [*self.deferred, *(names[i] for i in self.schedule.layers_due(self.steps, len(names)))]
        missing = [name for name, state in self.states.items() if state.attempted_step < 0]
        if self.factor_steps == 0:
            due = missing = []  # every step so far was dropped: the same on all ranks
        launched = {name for refresh in self.pipeline.under_way for name in refresh.layers}
        first = [name for name in dict.fromkeys([*missing, *self._joined]) if name not in launched]
        later = list(dict.fromkeys(name for name in due if name not in first and name not in launched))
        if first:
            self.pipeline.launch(self.steps, first, self._damping_now(), 0)
        now = self._within_budget(later)
        self.deferred = later[len(now) :]
        if now:
            self.pipeline.launch(self.steps, now, self._damping_now(), self.inverse_delay)
        self.pipeline.advance(self.steps)
        if self.eigenvalues is not None:
            self.eigenvalues.advance(self.steps)

    def _within_budget(self, layers: list[str]) -> list[str]:
        """Return the first layers whose inversions fit in the step's budget, at least one; alike on all ranks."""
        if self.refresh_budget_seconds is None:
            return layers
        count = min(1, len(layers))
        while count < len(layers) and self.plan().refresh_seconds(layers[: count + 1]) <= self.refresh_budget_seconds:
            count += 1
        return layers[:count]

    def _replan_if_due(self) -> None:
        period = period_at(self.schedule.inverse_update_period, self.steps)
        if (begun := self._planner.begin(self.steps, period, self.device)) is not None:
            self.pipeline.change_plan(begun)
        uses_a_plan = self.communicator.world_size > 1 or self.refresh_budget_seconds is not None
        if uses_a_plan and self._planner.is_due(self.steps, period):
            self.pipeline.change_plan(self._planner.replan(self.steps, period, self.device))

    def plan(self) -> Plan:
        """Return who inverts what and how it is shared, with the measurements behind it; alike on all ranks."""
        return self._planner.plan

    def adopt_plan(self, saved: Plan) -> None:
        """Go on with a saved plan, made anew from its measurements if this world is of another size."""
        self.pipeline.plan = self._planner.restore(saved, self.device)

    def _damping_now(self) -> Damping:
        value = value_at(self.damping, self.steps)
        in_range("damping", value, low_open=0.0)
        ratio = value_at(self.damping_g_ratio, self.steps)
        in_range("damping_g_ratio", ratio, low_open=0.0)
        return Damping(value, self.damping_mode, ratio)

    def precondition(self, gradient_scale: float = 1.0) -> None:
        """Replace each layer's gradient by `ν · (G + λ_G I)⁻¹ ∇W (A + λ_A I)⁻¹`, ν of the KL clip and norm constraint.

        gradient_scale: what turns `.grad` into the mean loss's gradient ∇W.
        """
        bounds = Bounds.checked(
            None if self.lr is None else value_at(self.lr, self.steps),
            None if self.kl_clip is None else value_at(self.kl_clip, self.steps),
            None if self.norm_constraint is None else value_at(self.norm_constraint, self.steps),
        )
        period = period_at(self.schedule.inverse_update_period, self.steps)
        measures_gpu = self.communicator.world_size > 1 and self._planner.is_due(self.steps + 1, period)
        found = None
        if self._replay is not None and gradient_scale == 1.0 and not measures_gpu:
            found = self._replay.take(bounds)
        if found is None:
            found = self._precondition_now(bounds, None, gradient_scale, measures_gpu=measures_gpu)
        self._scale.note(found, bounds)

    def _precondition_now(
        self,
        bounds: Bounds,
        inverses: Inverses | None,
        gradient_scale: float = 1.0,
        *,
        measures_gpu: bool = False,
    ) -> Shortening:
        gradients, directions = self._directions.take(gradient_scale, measures_gpu=measures_gpu, inverses=inverses)
        if not gradients and all(gradient_of(parameter) is None for parameter in self._parameters):
            raise UserError("step() found no gradient; call loss.backward() before it")
        out = [directions[name] for name in gradients]
        found = shortening(out, list(gradients.values()), bounds)
        for name, direction in zip(gradients, out if found.scale is None else scaled(out, found.scale)):
            self.layers[name].set_gradient(direction)
        return found

    @property
    def last_scale(self) -> Tensor:
        """ν of the last step, a 0-d tensor: by how much the KL clip and the norm constraint shortened it."""
        return self._scale.last.clone()

    def predicted_reduction(self, lr: float) -> float:
        """Return by how much the damped quadratic model says that the last step, `-ηνv`, reduces the loss:
        `ηνq (1 - ην/2)`, `q = Σ⟨v, ∇⟩`. Without momentum or weight decay."""
        return self._scale.predicted_reduction(lr)

    def predicted_divergence(self) -> float:
        """Return the KL divergence that the damped quadratic model says the last step, `-ηνv`, brought: `(ην)² q / 2`,
        `q = Σ⟨v, ∇⟩`, η the rate that bounded it; 0 before the first step. Without momentum on v, or weight decay; an
        upper bound of the model's own, since q counts the damping too."""
        return self._scale.predicted_divergence()

    def factors(self) -> dict[str, KroneckerFactors]:
        """Return the averages {layer: (A, G)} over this world's ranks up to now, as matrices.

        A is [d_in (+1), d_in (+1)] whatever its structure (zeros between the blocks of a block-diagonal one;
        GraphSAGE's rows are [self, neighbour, 1]), G [d_out, d_out].
        With several ranks all of them must call it, in the same order as their other collectives.
        A layer without statistics yet is left out.
        """
        self.pipeline.drain()  # sums that a refresh under way has taken are part of the averages
        out: dict[str, KroneckerFactors] = {}
        for name, state in self.states.items():
            averages = self._total(name, state).averages()
            if averages is not None:
                out[name] = KroneckerFactors(state.a.dense(averages[0]), state.g.dense(averages[1]))
        return out

    def _total(self, name: str, state: LayerState) -> FactorStatistics:
        """Return folded and unfolded sums of all ranks together."""
        total = state.folded.clone()
        if state.unfolded is not None:
            total.decay_(state.decay)
            pending = state.unfolded.clone()
            late = self.pipeline.late_statistics(name)
            if late is not None:
                pending.add_(late)
            for tensor in pending.tensors():
                self.communicator.all_reduce(tensor.view(-1), "factor", group="factor").wait()
            total.add_(pending)
        return total

    def rotation(self, name: str) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None:
        """Return a layer's eigenbases (of A, of G), each (Q, e) or (e,) for the identity; None until there are any."""
        state = self.states[name]
        if self.method == "kfac" or len(state.inverses) < 2:
            return None
        return state.inverses["A"].tensors, state.inverses["G"].tensors

    def health(self) -> dict[str, dict[str, float]]:
        """Return what shows why training goes wrong, by layer; see dngd.optim.health."""
        return {name: layer_health(layer, self.states[name], self) for name, layer in self.layers.items()}

    def describe(self) -> str:
        """Return a table: layer, kind, factor structures, bytes, cost of an inversion, owners."""
        return layer_table(self)

    def memory_bytes(self) -> int:
        """Return the bytes that this rank holds now: statistics, pending sums, inverses, sketches, buffers.

        Not what all preconditioners of a process share: places of packed entries (dngd.curvature.symmetric), probes.
        """
        tensors: list[Tensor] = []
        for state in self.states.values():
            tensors += state.folded.tensors()
            tensors += state.unfolded.tensors() if state.unfolded is not None else ()
            tensors += [t for inverse in state.inverses.values() for t in inverse.tensors]
            tensors += state.probes.values()
            for structure in (state.a, state.g):
                tensors += getattr(structure, "_omega", {}).values()
        for refresh in self.pipeline.under_way:
            tensors += [refresh.reduced, *refresh.share_buffers.values()]
            tensors += [*(refresh.reduction.tensors() if refresh.reduction else ()), *chain(*refresh.late.values())]
            tensors += [t for inverse in refresh.inverses.values() if inverse is not None for t in inverse.tensors]
        if self.eigenvalues is not None:
            tensors += self.eigenvalues.tensors()
        if self._replay is not None:
            tensors += self._replay.tensors()
        distinct = {t.data_ptr(): t.numel() * t.element_size() for t in tensors}
        return sum(distinct.values()) + sum(layer.memory_bytes() for layer in self.layers.values())

    def state_dict(self) -> dict[str, Tensor]:
        """Return tensors alone: "shared.*" equal on all ranks, "local.*" this rank's unfolded statistics.

        All ranks must call it at the same step: refreshes under way are finished (not adopted) first.
        """
        self.pipeline.drain()
        return preconditioner_state(self)

    def load_state_dict(self, *states: dict[str, Tensor]) -> None:
        """Restore from the state dicts of all ranks that saved, in rank order (one is enough for one rank).

        All ranks enter, and all refuse what one of them does. At the same world size each rank takes its own, bitwise;
        at another, their unfolded statistics are summed on rank 0. Raises UserError if the layers or sizes differ from
        this model's.
        """
        load_preconditioner_state(self, states)
        self.capture.start_step(self.steps, self._is_factor_step())

    def close(self) -> None:
        """Take the hooks off the model and stop the inversion thread."""
        for layer in self.layers.values():
            layer.remove()
        self.pipeline.close()
        if self._replay is not None:
            self._replay.close()


def _layer_sizes(layer: CurvatureLayer, wanted: Wanted) -> LayerSizes:
    return LayerSizes(
        flops=(layer.a.inversion_cost, layer.g.inversion_cost),
        inverse_bytes=sum(wanted.wire_bytes(structure, layer.dtype) for structure in (layer.a, layer.g)),
        gradient_bytes=layer.a.dimension * layer.g.dimension * layer.parameters[0].dtype.itemsize,
        full_bytes=sum(t.numel() * t.element_size() for t in layer.empty_statistics().tensors()),
    )
