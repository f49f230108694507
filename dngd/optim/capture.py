"""What the layers of one preconditioner share while a step is measured.

Layers report each call's input rows and output; the curvature needs the gradient of the loss with
respect to that output. The empirical Fisher reads it in the user's own backward pass; the others
(`observe`) back-propagate vectors of their own, with `autograd.grad`, which touches no `.grad` and
fires no hook of DDP.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from dngd.curvature import FisherKind, LossKind, hessian_columns, random_signs, sampled_gradient
from dngd.errors import UserError

if TYPE_CHECKING:
    from dngd.optim.layers.base import CurvatureLayer

Variant = Literal["dngd", "paper"]
"""dngd: the factors as this package defines them; paper: those of the code behind arXiv 2008.09624, for reproduction:
gradients of the **mean** loss times the layer's width d_g instead of n, all rows in A, and both divided by one n."""

WeightSharing = Literal["expand", "reduce"]
"""expand: every row is a sample of its own, `A = (1/r) Σ m mᵀ`, `G = (1/n) Σ g gᵀ`; reduce: the rows of one
sample are merged first, `A = (1/n) Σ_s m̄_s m̄_sᵀ` with their mean, `G = (1/n) Σ_s ĝ_s ĝ_sᵀ` with the sum of their
gradients (Eschenhagen et al. 2023)."""


class Capture:
    """Collects rows and gradients of the step under way and hands them to the layers.

    active: whether this step is measured. max_rows: rows of a call that enter the sums at most, drawn
    uniformly without replacement and weighted by r/k, so that every sum keeps its expectation.
    loss_scale: what the back-propagated loss was multiplied with (a GradScaler's scale); divided out here.
    row_samples: [r], which sample each row belongs to, for the reduce treatment of two-dimensional rows.
    """

    def __init__(
        self,
        *,
        fisher: FisherKind,
        loss: LossKind,
        weight_sharing: WeightSharing,
        max_rows: int | None,
        seed: int,
        loss_scale: Callable[[], float] | None,
        variant: Variant = "dngd",
    ) -> None:
        self.variant = variant
        self.fisher = fisher
        self.loss = loss
        self.weight_sharing = weight_sharing
        self.max_rows = max_rows
        self.seed = seed
        self.loss_scale = loss_scale
        self.active = True
        self.step = 0
        self.row_samples: Tensor | None = None
        self._records: list[tuple[CurvatureLayer, Any, GradientEdge]] = []
        self._observed = False
        self._missed = False
        self._key = 0
        self._draws: dict[str, int] = {}
        self._weight = 1.0

    def start_step(self, step: int, active: bool) -> None:
        """Forget what the last step left and get ready for the next one."""
        self.step, self.active = step, active
        self._records.clear()
        self._draws.clear()
        self._observed = self._missed = False
        self._key, self._weight = 0, 1.0

    def forget(self) -> None:
        """Forget what was observed, as `zero_grad` does for gradients. It often stands between forward and backward:
        calls of layers, key and weight stay, and an observation that is lost must be made again."""
        self._draws.clear()
        self._observed = False

    def record(self, layer: CurvatureLayer, payload: Any, output: Tensor) -> None:
        """Note one call of a layer; payload is what the layer needs later to make its input rows."""
        if not (self.active and torch.is_grad_enabled() and output.requires_grad):
            return
        if self.fisher == "empirical":
            output.register_hook(_GradientHook(self, layer, payload))  # type: ignore[no-untyped-call]
        else:
            # The edge, not the tensor: an activation that works in place would turn the tensor into its own output.
            self._records.append((layer, payload, get_gradient_edge(output)))
            self._missed = True

    @property
    def is_waiting_for_outputs(self) -> bool:
        """Whether layers ran in this factor step and `observe` was never told of the outputs."""
        return self._missed and not self._observed

    def observe(self, outputs: Tensor, weights: Tensor | None, key: int) -> None:
        """Measure G from the model's outputs; see KFACPreconditioner.observe."""
        if not self.active:
            return
        if weights is not None and (weights.shape != outputs.shape[:1] or not bool((weights >= 0).all())):
            raise UserError(
                f"weights of shape {tuple(weights.shape)} must be one number of at least 0 a row of outputs"
            )
        self._key = key
        self._draws.clear()
        if self.fisher == "empirical":
            if self.variant == "dngd":
                self._weight = _uniform_weight(weights)
            return
        if outputs.dim() != 2 or not outputs.requires_grad:
            raise UserError(
                f"observe() got outputs of shape {tuple(outputs.shape)}"
                + ("" if outputs.requires_grad else " without a graph")
                + "; give the model's outputs, [num_seeds, num_classes], before backward"
            )
        self._observed = True
        records, self._records = self._records, []
        if not records or outputs.shape[0] == 0:
            return
        generator = self._generator("labels")
        roots = None if weights is None else weights.to(outputs.device).sqrt()[:, None]
        if self.fisher == "monte_carlo":
            vectors = iter([sampled_gradient(outputs, self.loss, generator)])
        else:
            vectors = (
                column * random_signs(column.shape[0], generator).to(column)[:, None]
                for column in hessian_columns(outputs, self.loss)
            )
        # Which rows a seed reaches is known after the last column only: an output need not depend on every row.
        reached: list[Tensor | None] = [None] * len(records)
        for vector in vectors:
            weighted = vector if roots is None else vector * roots.to(vector.dtype)
            gradients: Sequence[Tensor | None] = torch.autograd.grad(
                outputs,
                [edge for _, _, edge in records],
                grad_outputs=weighted.to(outputs.dtype),
                retain_graph=True,
                allow_unused=True,
            )
            with torch.no_grad():
                for i, ((layer, payload, _), gradient) in enumerate(zip(records, gradients)):
                    if gradient is None:
                        continue
                    self.take(layer, payload, gradient, with_inputs=self.fisher == "monte_carlo")
                    if self.fisher == "ggn":
                        before = reached[i]
                        reached[i] = gradient != 0 if before is None else before.logical_or_(gradient != 0)
        with torch.no_grad():
            for (layer, payload, _), mask in zip(records, reached):
                if mask is not None:
                    self.take(layer, payload, mask.to(layer.dtype), with_gradients=False)

    def take(
        self,
        layer: CurvatureLayer,
        payload: Any,
        gradient: Tensor,
        *,
        with_inputs: bool = True,
        with_gradients: bool = True,
    ) -> None:
        """Add one call's rows and output gradients to the layer's pending sums.

        with_gradients: False for a gradient that only says which rows were reached.
        """
        divisor = 1.0
        if self.fisher == "empirical":
            divisor = (1.0 if self.loss_scale is None else self.loss_scale()) * self._weight**0.5
        if self.variant == "paper":
            divisor /= gradient.shape[-1]
        gradients = layer.gradients(payload, gradient)
        sources = layer.sources(payload) if with_inputs and self.weight_sharing == "expand" else ()
        reached: Tensor | None = None
        is_small = self.max_rows is None or gradients.shape[:-1].numel() <= self.max_rows
        if sources and layer.constant.is_worth_keeping(sources, trusts_first=is_small):
            reached = self._reached(gradients.reshape(-1, gradients.shape[-1]))
            with_inputs = False
        # Rows can cost an aggregation over the graph: they are not made where nothing reads them.
        product_is_missing = reached is not None and layer.constant.product(reached) is None
        is_read = with_inputs or product_is_missing or layer.basis is not None
        rows = layer.rows(payload) if is_read else gradients[..., :0]
        if self.weight_sharing == "reduce" and layer.merges_samples:
            rows, gradients = self._merge_samples(rows, gradients)
        gradients = gradients.reshape(-1, gradients.shape[-1])
        rows = rows.reshape(gradients.shape[0], rows.shape[-1])
        num_rows = gradients.shape[0]
        if reached is not None:
            layer.add_constant_inputs(rows, reached)
        chosen, weight = self._choose(layer, num_rows)
        if chosen is not None:
            rows, gradients = rows[chosen.to(rows.device)], gradients[chosen.to(gradients.device)]
        gradients = gradients.to(layer.dtype)
        if divisor != 1.0:
            gradients = gradients / divisor
        reached = self._reached(gradients)
        if with_inputs and not bool(reached.all()):
            rows, gradients = rows[reached], gradients[reached]
        if not with_gradients:
            gradients = torch.zeros_like(gradients)
        layer.add(rows, gradients, weight, with_inputs=with_inputs)

    def _reached(self, gradients: Tensor) -> Tensor:
        """Return which rows a seed of nonzero weight reaches: those whose gradient is not exactly zero."""
        if self.variant == "paper":
            return torch.ones(gradients.shape[0], dtype=torch.bool, device=gradients.device)
        return (gradients != 0).any(dim=1)

    def _choose(self, layer: CurvatureLayer, num_rows: int) -> tuple[Tensor | None, float]:
        """Return the rows of this call that are measured (None for all) and what each then stands for."""
        if self.max_rows is None or num_rows <= self.max_rows:
            return None, 1.0
        chosen = torch.randperm(num_rows, generator=self._generator(layer.name))[: self.max_rows]
        return chosen, num_rows / self.max_rows

    def _generator(self, purpose: str) -> torch.Generator:
        """Return a random stream that depends on seed, step, key, purpose and how often it was asked for."""
        count = self._draws.get(purpose, 0)
        self._draws[purpose] = count + 1
        text = f"{self.seed}/{self.step}/{self._key}/{purpose}/{count}"
        digest = hashlib.blake2b(text.encode(), digest_size=7).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little"))

    def _merge_samples(self, rows: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
        """Return a sample's mean row and summed gradient; two-dimensional rows by `row_samples`, if it fits."""
        if gradients.dim() > 2:
            between = tuple(range(1, gradients.dim() - 1))
            return rows.mean(dim=between), gradients.sum(dim=between)
        samples = self.row_samples
        if samples is None or samples.numel() != gradients.shape[0]:
            return rows, gradients
        samples = samples.to(gradients.device)
        count = int(samples.max()) + 1
        sizes = torch.bincount(samples, minlength=count).clamp_min(1).to(rows.dtype)
        means = rows.new_zeros(count, rows.shape[1]).index_add_(0, samples, rows) / sizes[:, None]
        sums = gradients.new_zeros(count, gradients.shape[1]).index_add_(0, samples, gradients)
        return means, sums


class _GradientHook:
    """The empirical Fisher's tap in the user's backward pass."""

    def __init__(self, capture: Capture, layer: CurvatureLayer, payload: Any) -> None:
        self._capture, self._layer, self._payload = capture, layer, payload
        self._step = capture.step

    def __call__(self, gradient: Tensor) -> None:
        if self._capture.active and self._capture.step == self._step:
            with torch.no_grad():
                self._capture.take(self._layer, self._payload, gradient.detach())


def _uniform_weight(weights: Tensor | None) -> float:
    """Return the one weight of the seeds that count. Raises UserError if there are several."""
    if weights is None:
        return 1.0
    used = weights[weights > 0]
    if used.numel() == 0:
        return 1.0
    low, high = float(used.min()), float(used.max())
    if high - low > 1e-6 * high:
        raise UserError(
            f"the seeds' weights go from {low:g} to {high:g}: the empirical Fisher of a hidden layer needs equal ones "
            "(its gradients carry the weight squared); use fisher='monte_carlo'"
        )
    return high
