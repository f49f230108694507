"""What the layers of one preconditioner share while a step is measured.

Layers report each call's input rows and output; the curvature needs the gradient of the loss with
respect to that output. The empirical Fisher reads it in the user's own backward pass; the others
(`observe`) back-propagate vectors of their own, with `autograd.grad`, which touches no parameter's `.grad`
and fires no hook on parameters (DDP's are such); hooks on intermediate tensors do fire.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from dngd.curvature import FisherKind, LossKind, SparseInput, hessian_columns, random_signs, sampled_gradient
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
        rank: int = 0,
    ) -> None:
        self.variant = variant
        self.rank = rank
        self.has_warned_of_second_backward = False
        self.fisher = fisher
        self.loss = loss
        self.weight_sharing = weight_sharing
        self.max_rows = max_rows
        self.seed = seed
        self.loss_scale = loss_scale
        self.active = True
        self.is_paused = False
        self.step = 0
        self._row_samples: Tensor | None = None
        self._records: list[_Record] = []
        self._num_observed = 0
        """How many of the records the last `observe` has seen; they stay for the outputs of another head."""
        self._num_lost = 0
        """How many records of forward passes that nobody observed are gone."""
        self.seen: dict[str, Reach] | None = {}
        """Rows of each layer in the first measured step; None after it."""
        self._calls = 0
        self._key = "0/0"
        self._draws: dict[str, int] = {}
        self._weight = 1.0

    def start_step(self, step: int, active: bool) -> None:
        """Forget what the last step left and get ready for the next one."""
        self.step, self.active = step, active
        self._records.clear()
        self._draws.clear()
        self._num_observed = self._num_lost = self._calls = 0
        if self.seen is not None:
            self.seen.clear()
        self._key, self._weight, self._row_samples = "0/0", 1.0, None

    def forget(self) -> None:
        """Forget what was observed, as `zero_grad` does for gradients. It often stands between forward and backward:
        calls of layers, key and weight stay, and an observation that is lost must be made again."""
        self._draws.clear()
        self._num_observed = self._calls = 0

    def record(self, layer: CurvatureLayer, payload: Any, output: Tensor) -> None:
        """Note one call of a layer; payload is what the layer needs later to make its input rows.

        Raises UserError for features that the layer cannot make rows of.
        """
        if self.is_paused or not (self.active and torch.is_grad_enabled() and output.requires_grad):
            return
        if _is_transformed(output):
            return
        layer.check_features(payload)
        if self.fisher == "empirical":
            if layer.pending is not None and not layer.has_gradient and not _is_inside_backward():
                # Gradients were set to None since: the backward pass that left these rows was given up. (Activation
                # checkpointing calls a layer anew before the backward pass that it is part of leaves gradients.)
                layer.forget()
            output.register_hook(_GradientHook(self, layer, _Given(payload)))  # type: ignore[no-untyped-call]
            return
        if _is_inside_backward():
            return  # activation checkpointing makes a layer's output anew, whose first one was recorded
        if any(record.layer is layer for record in self._records[: self._num_observed]):
            # A new forward pass: what was observed of the last one is done with. Not so where another head runs after
            # the first was observed: what both share is observed again with it.
            del self._records[: self._num_observed]
            self._num_observed = 0
        self._drop_before_another_step(layer)
        # The edge, not the tensor: an activation that works in place would turn the tensor into its own output.
        self._records.append(_Record(layer, _Given(payload), get_gradient_edge(output), _writes_to(layer)))

    def _drop_before_another_step(self, layer: CurvatureLayer) -> None:
        """Drop what was recorded before somebody else moved the layer's parameters.

        That is what happens where another optimizer has taken over and this one was not closed: its forward passes
        would keep their graphs, one after another, for an `observe` that never comes.
        """
        last = next((i for i in reversed(range(len(self._records))) if self._records[i].layer is layer), None)
        if last is not None and self._records[last].writes != _writes_to(layer):
            del self._records[: last + 1]
            self._num_lost += last + 1

    @property
    def is_waiting_for_outputs(self) -> bool:
        """Whether layers ran in this factor step and `observe` was not told of the outputs."""
        return len(self._records) + self._num_lost > self._num_observed

    def observe(
        self, outputs: Tensor, weights: Tensor | None, key: int | None, row_samples: Tensor | None = None
    ) -> None:
        """Measure G from the model's outputs; see KFACPreconditioner.observe."""
        if self.is_paused or not self.active:
            return
        if weights is not None and (weights.shape != outputs.shape[:1] or not bool((weights >= 0).all())):
            raise UserError(
                f"weights of shape {tuple(weights.shape)} must be one number of at least 0 a row of outputs"
            )
        self._key = f"{self.rank}/{self._calls}" if key is None else str(key)
        self._calls += 1
        self._row_samples = row_samples
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
        records = list(self._records)
        self._num_observed, self._num_lost = len(records), 0
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
                [record.edge for record in records],
                grad_outputs=weighted.to(outputs.dtype),
                retain_graph=True,
                allow_unused=True,
            )
            with torch.no_grad():
                for i, (record, gradient) in enumerate(zip(records, gradients)):
                    if gradient is None:
                        continue
                    layer, payload = record.layer, record.given.unchanged(record.layer)
                    self.take(layer, payload, gradient, with_inputs=self.fisher == "monte_carlo")
                    if self.fisher == "ggn":
                        before = reached[i]
                        reached[i] = gradient != 0 if before is None else before.logical_or_(gradient != 0)
        with torch.no_grad():
            for record, mask in zip(records, reached):
                if mask is not None:
                    layer, payload = record.layer, record.given.unchanged(record.layer)
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
        # Products of half-precision rows would overflow or round: the statistics keep their own precision.
        with torch.autocast(gradient.device.type, enabled=False):
            samples = self._samples_of(layer, gradient)
            gradients = _merged_gradients(layer.gradients(payload, gradient), samples)
            reached = self._reached(gradients)
            if self.seen is not None:
                self.seen[layer.name] = self.seen.get(layer.name, Reach()).with_call(reached)
            if with_inputs and samples is None and self._is_constant(layer, payload, gradients):
                layer.add_constant_inputs(lambda positions: _rows(layer, payload, None, positions), reached)
                with_inputs = False
            chosen, weight = self._choose(layer, reached)
            if chosen is not None:
                gradients = gradients[chosen]
            # Rows can cost an aggregation over the graph: they are not made where nothing reads them.
            is_read = with_inputs or layer.basis is not None
            rows = _rows(layer, payload, samples, chosen) if is_read else gradients[:, :0]
            gradients = gradients.to(layer.dtype) * (self._gradient_factor(layer) if with_gradients else 0.0)
            layer.add(rows, gradients, weight, with_inputs=with_inputs)

    def _gradient_factor(self, layer: CurvatureLayer) -> float:
        """Return what turns a back-propagated gradient into the one whose square enters G, up to n (`commit`)."""
        factor = float(layer.g.dimension) if self.variant == "paper" else 1.0
        if self.fisher == "empirical":
            factor /= (1.0 if self.loss_scale is None else self.loss_scale()) * self._weight**0.5
        return factor

    def _is_constant(self, layer: CurvatureLayer, payload: Any, gradients: Tensor) -> bool:
        """Return whether the call's rows may be those of every step, and are worth keeping a product of."""
        sources = layer.sources(payload)
        is_small = self.max_rows is None or gradients.shape[0] <= self.max_rows
        return bool(sources) and layer.constant.is_worth_keeping(sources, trusts_first=is_small)

    def _reached(self, gradients: Tensor) -> Tensor:
        """Return which rows a seed of nonzero weight reaches: those whose gradient is not exactly zero."""
        if self.variant == "paper":
            return torch.ones(gradients.shape[0], dtype=torch.bool, device=gradients.device)
        return nonzero_rows(gradients, is_on_cpu=gradients.device.type == "cpu")

    def _choose(self, layer: CurvatureLayer, reached: Tensor) -> tuple[Tensor | None, float]:
        """Return the positions of the reached rows that are measured (None for all rows) and what each stands for."""
        positions = reached.nonzero()[:, 0]
        num_reached = positions.numel()
        if self.max_rows is None or num_reached <= self.max_rows:
            return (None if num_reached == reached.numel() else positions), 1.0
        drawn = torch.randperm(num_reached, generator=self._generator(layer.name), device="cpu")[: self.max_rows]
        return positions[drawn.to(reached.device)], num_reached / self.max_rows

    def _generator(self, purpose: str) -> torch.Generator:
        """Return a random stream that depends on seed, step, key, purpose and how often it was asked for."""
        count = self._draws.get(purpose, 0)
        self._draws[purpose] = count + 1
        text = f"{self.seed}/{self.step}/{self._key}/{purpose}/{count}"
        digest = hashlib.blake2b(text.encode(), digest_size=7).digest()
        return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little"))

    def _samples_of(self, layer: CurvatureLayer, gradient: Tensor) -> _Samples | None:
        """Return how the call's rows form samples, None where each row is one."""
        if self.weight_sharing == "expand" or not layer.merges_samples:
            return None
        if gradient.dim() > 2:
            return _Samples(None)
        if self._row_samples is None:
            return None
        if self._row_samples.numel() != gradient.shape[0]:
            if self._row_samples.numel() and int(self._row_samples.max()) + 1 == gradient.shape[0]:
                return None  # a layer behind the pooling: one row a sample
            raise UserError(
                f"row_samples has {self._row_samples.numel()} entries, but layer {layer.name!r} has "
                f"{gradient.shape[0]} rows; give the sample (from 0) of each row of the layers before the pooling"
            )
        return _Samples(self._row_samples.to(gradient.device))


class Reach(NamedTuple):
    """Rows of a layer's calls, those of them that have a gradient, and whether these were a call's first ones each
    time."""

    num_rows: int = 0
    num_reached: int = 0
    are_first: bool = True

    def with_call(self, reached: Tensor) -> Reach:
        """Return the sums with one more call. reached: bool [r]; two host synchronisations."""
        count = int(reached.sum())
        are_first = self.are_first and (count == 0 or bool(reached[:count].all()))
        return Reach(self.num_rows + reached.numel(), self.num_reached + count, are_first)


@dataclass(frozen=True)
class _Samples:
    """Which rows make one sample. index: [r], the sample of each row; None: a sample a first dimension."""

    index: Tensor | None


def _rows(
    layer: CurvatureLayer, payload: Any, samples: _Samples | None, positions: Tensor | None
) -> Tensor | SparseInput:
    """Return a call's rows as [r, d], or those at some positions (int64 [k]) alone; of samples, their mean rows."""
    if samples is None:
        return layer.all_rows(payload) if positions is None else layer.rows_at(payload, positions)
    rows = _merged_rows(layer.rows(payload), samples)
    return rows if positions is None else rows[positions]


def _num_samples(index: Tensor) -> int:
    return int(index.max()) + 1 if index.numel() else 0


def nonzero_rows(gradients: Tensor, *, is_on_cpu: bool) -> Tensor:
    """Return which rows of [r, d] have an entry that is not zero, NaN among these, as bool [r]."""
    if is_on_cpu:  # by both ends of each row: several times as fast there as any(), or a norm
        return (gradients.amax(dim=1) != 0).logical_or_(gradients.amin(dim=1) != 0)
    largest: Tensor = torch.linalg.vector_norm(gradients, torch.inf, dim=1)
    return largest != 0


def flat_rows(rows: Tensor) -> Tensor:
    """Return rows [..., d] as [r, d]."""
    return rows.reshape(math.prod(rows.shape[:-1]), rows.shape[-1])


def _merged_rows(rows: Tensor, samples: _Samples | None) -> Tensor:
    """Return rows as [r, d]; of samples, their mean rows."""
    if samples is None:
        return flat_rows(rows)
    if samples.index is None:
        return rows.mean(dim=tuple(range(1, rows.dim() - 1)))
    count = _num_samples(samples.index)
    sizes = torch.bincount(samples.index, minlength=count).clamp_min(1).to(rows.dtype)
    return rows.new_zeros(count, rows.shape[1]).index_add_(0, samples.index, rows) / sizes[:, None]


def _merged_gradients(gradients: Tensor, samples: _Samples | None) -> Tensor:
    """Return gradients as [r, d_g]; of samples, their sums."""
    if samples is None:
        return gradients.reshape(math.prod(gradients.shape[:-1]), gradients.shape[-1])
    if samples.index is None:
        return gradients.sum(dim=tuple(range(1, gradients.dim() - 1)))
    count = _num_samples(samples.index)
    return gradients.new_zeros(count, gradients.shape[1]).index_add_(0, samples.index, gradients)


class _Given:
    """What a layer noted of one call, by reference, and how often each tensor of it had been written to by then.

    autograd keeps, and watches, what its own derivatives need, which is not always what the rows are made of: a copy in
    lower precision under autocast, no edges, nothing of a mean.
    """

    def __init__(self, payload: Any) -> None:
        self._payload = payload
        self._versions = [(tensor, version_of(tensor)) for tensor in _tensors_of(payload)]

    def unchanged(self, layer: CurvatureLayer) -> Any:
        """Return the payload. Raises UserError if a tensor of it was overwritten since the call."""
        for tensor, version in self._versions:
            if version_of(tensor) != version:
                raise UserError(
                    f"an input of layer {layer.name!r}, of shape {tuple(tensor.shape)}, was overwritten between "
                    "its forward and backward pass, so that its factors cannot be measured; give it a copy "
                    "(x.clone()), or overwrite it after the backward pass"
                )
        return self._payload


class _Record(NamedTuple):
    """One call of a layer, for `observe`. writes: how often the layer's parameters had been written to by then."""

    layer: CurvatureLayer
    given: _Given
    edge: GradientEdge
    writes: int


def _writes_to(layer: CurvatureLayer) -> int:
    return sum(version_of(parameter) for parameter in layer.parameters)


def _tensors_of(payload: Any) -> Iterator[Tensor]:
    """Yield the dense tensors; of torch's sparse ones, some reads count as writes (PyG's normalisation)."""
    if isinstance(payload, Tensor):
        if payload.layout == torch.strided:
            yield payload
    elif isinstance(payload, tuple):
        for part in payload:
            yield from _tensors_of(part)
    elif isinstance(payload, SparseInput):
        yield from (payload.values, payload.columns, payload.indptr)


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor was written to in place; 0 for one of inference mode, which torch does not count."""
    return 0 if tensor.is_inference() else tensor._version


class _GradientHook:
    """The empirical Fisher's tap in the user's backward pass."""

    def __init__(self, capture: Capture, layer: CurvatureLayer, given: _Given) -> None:
        self._capture, self._layer, self._given = capture, layer, given
        self._step = capture.step
        self._fired = False

    def __call__(self, gradient: Tensor) -> None:
        if self._capture.is_paused or not (self._capture.active and self._capture.step == self._step):
            return
        if _is_transformed(gradient):
            return
        if self._fired and not self._capture.has_warned_of_second_backward:
            self._capture.has_warned_of_second_backward = True
            warnings.warn(
                f"a second backward pass went through the same call of layer {self._layer.name!r} in one factor step: "
                "its rows are measured twice; back-propagate the whole loss at once, or use fisher='monte_carlo', "
                "whose statistics come from observe() alone",
                stacklevel=2,
            )
        self._fired = True
        with torch.no_grad():
            self._capture.take(self._layer, self._given.unchanged(self._layer), gradient.detach())


def _is_transformed(tensor: Tensor) -> bool:
    """Return whether a tensor is of one of torch.func's transforms (vmap, grad, jacrev) or of autograd's batches of
    gradients (jacobian(vectorize=True)), which are no rows of a training step."""
    if torch.compiler.is_compiling():
        return False
    kinds = torch._C._functorch  # torch has no public name for these
    return kinds.is_functorch_wrapped_tensor(tensor) or kinds.is_legacy_batchedtensor(tensor)


def _is_inside_backward() -> bool:
    """Return whether autograd is at work in this thread."""
    return torch._C._current_graph_task_id() != -1  # torch has no public name for it


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
