"""What every layer that has curvature offers: its gradient as a matrix, its rows, its pending sums."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dngd.curvature import FactorStatistics, FactorStructure, Tensors, row_scales
from dngd.optim.capture import Capture


class CurvatureLayer:
    """One block `F ≈ A ⊗ G` of the Fisher: which parameters it covers and how their statistics are taken.

    name: dotted path in the model. kind: words for tables. a, g: the factors' structures; the gradient of
    the layer is a [d_g, d_a] matrix. has_ones: whether a 1 is appended to each row (a bias). `pending`
    holds what was captured since the last commit or discard: Σ m mᵀ, Σ g gᵀ (of the loss as
    back-propagated) and the row count in counts[0]; `pending_scales` the sums of EKFAC, taken while
    `basis` is set.

    Subclasses register hooks, with `hook`, that call `self.capture.record(self, payload, output)`, and
    implement `rows`, `gradient` and `set_gradient` (and `gradients`, where the output's are not the rows').
    """

    kind: ClassVar[str] = ""
    merges_samples: ClassVar[bool] = True
    """Whether the reduce treatment of weight sharing may average this layer's rows."""

    def __init__(
        self,
        name: str,
        capture: Capture,
        parameters: Sequence[nn.Parameter],
        a: FactorStructure,
        g: FactorStructure,
        *,
        has_ones: bool,
    ) -> None:
        self.name = name
        self.capture = capture
        self.parameters = tuple(parameters)
        self.a = a
        self.g = g
        self.has_ones = has_ones
        self.pending: FactorStatistics | None = None
        self.pending_scales: Tensor | None = None
        self.basis: tuple[Tensors, Tensors] | None = None
        self.constant = ConstantInput()
        self._handles: list[RemovableHandle] = []

    @property
    def dtype(self) -> torch.dtype:
        """The statistics' precision: the weight's, but never below float32."""
        dtype = self.parameters[0].dtype
        return dtype if dtype in (torch.float32, torch.float64) else torch.float32

    @property
    def device(self) -> torch.device:
        """The weight's device."""
        return self.parameters[0].device

    def rows(self, payload: Any) -> Tensor:
        """Return the rows [..., d_in] (without the 1) of one call; asked for only when something reads them."""
        raise AssertionError(f"{type(self).__name__} must say what its rows are")

    def gradients(self, payload: Any, gradient: Tensor) -> Tensor:
        """Return the rows' gradients [..., d_g] of one call, linear in the gradient of the recorded output."""
        return gradient

    def sources(self, payload: Any) -> tuple[Any, ...]:
        """Return the tensors (and graphs) that the rows are made of, if these do not depend on parameters;
        () if unknown."""
        return ()

    def gradient(self) -> Tensor | None:
        """Return the parameters' gradient as [d_g, d_a], a new tensor; None if backward did not reach the layer."""
        raise AssertionError(f"{type(self).__name__} must say what its gradient is")

    def set_gradient(self, value: Tensor) -> None:
        """Overwrite the parameters' gradients in place with a [d_g, d_a] matrix."""
        raise AssertionError(f"{type(self).__name__} must say what its gradient is")

    def empty_statistics(self) -> FactorStatistics:
        """Return zero statistics of this layer's structures."""
        return FactorStatistics.zeros(self.a, self.g, dtype=self.dtype, device=self.device)

    def add(self, rows: Tensor, gradients: Tensor, weight: float, *, with_inputs: bool) -> None:
        """Add rows and gradients, each standing for `weight` rows, to the pending sums."""
        pending = self._pending()
        if with_inputs:
            self.a.accumulate_(pending.a, rows.to(self.dtype), ones=self.has_ones, weight=weight)
            pending.counts[0] += weight * rows.shape[0]
        self.g.accumulate_(pending.g, gradients, weight=weight)
        if self.basis is not None:
            scales = row_scales(rows.to(self.dtype), gradients, self.has_ones, *self.basis)
            self._add_scales(scales * weight)

    def add_constant_inputs(self, rows: Tensor, reached: Tensor) -> None:
        """Add the input rows of an input that may never change: their product is taken once and kept."""
        pending = self._pending()
        kept = self.constant.product(reached)
        if kept is None:
            if not bool(reached.all()):
                rows = rows[reached]
            sums = self.a.zeros(self.dtype, self.device)
            self.a.accumulate_(sums, rows.to(self.dtype), ones=self.has_ones)
            kept = self.constant.keep(sums, float(rows.shape[0]), reached)
        sums, count = kept
        for mine, theirs in zip(pending.a, sums):
            mine.add_(theirs)
        pending.counts[0] += count

    def forget(self) -> None:
        """Drop what was captured since the last commit."""
        self.pending = None
        self.pending_scales = None

    def hook(self, handle: RemovableHandle) -> None:
        """Remember a hook to take off again."""
        self._handles.append(handle)

    def remove(self) -> None:
        """Take the hooks off the module."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def memory_bytes(self) -> int:
        """Return the bytes of pending sums and kept products."""
        tensors = [*(self.pending.tensors() if self.pending else ()), *self.constant.tensors()]
        tensors += [self.pending_scales] if self.pending_scales is not None else []
        return sum(t.numel() * t.element_size() for t in tensors)

    def _pending(self) -> FactorStatistics:
        if self.pending is None:
            self.pending = self.empty_statistics()
        return self.pending

    def _add_scales(self, scales: Tensor) -> None:
        if self.pending_scales is None:
            self.pending_scales = torch.zeros_like(scales)
        self.pending_scales += scales


class ConstantInput:
    """Recognises an input that never changes, by identity and version of the objects that it is made of.

    Full-batch training without input dropout shows the first layer the same rows at every step: their
    product is then computed once. The first call is kept on trust, if it is measured whole either way; a call
    with another input ends that until an input comes twice in a row. repeats: whether that is so; a saved state
    keeps it.
    """

    def __init__(self, *, repeats: bool = False) -> None:
        self.repeats = repeats
        self._seen: tuple[tuple[weakref.ref[Any], int], ...] | None = None
        self._kept: tuple[Tensors, float, Tensor] | None = None

    def is_worth_keeping(self, sources: tuple[Any, ...], *, trusts_first: bool) -> bool:
        """Return whether this input is the one of the last call, or the first one ever and trusted."""
        is_first = self._seen is None
        is_trusted = is_first and (trusts_first or self.repeats)
        same = self._seen is not None and len(self._seen) == len(sources)
        if same and self._seen is not None:
            same = all(ref() is t and version == _version(t) for (ref, version), t in zip(self._seen, sources))
        self._seen = tuple((weakref.ref(t), _version(t)) for t in sources)
        if not same:
            self._kept = None
        if not is_first:
            self.repeats = same
        return is_trusted or same

    def product(self, reached: Tensor) -> tuple[Tensors, float] | None:
        """Return the kept sums and row count, if they are of the same reached rows."""
        if self._kept is None or not torch.equal(self._kept[2], reached):
            return None
        return self._kept[0], self._kept[1]

    def keep(self, sums: Tensors, count: float, reached: Tensor) -> tuple[Tensors, float]:
        """Keep sums and row count for the next call."""
        self._kept = (sums, count, reached)
        return sums, count

    def tensors(self) -> Tensors:
        """Return what is kept."""
        return () if self._kept is None else (*self._kept[0], self._kept[2])


def _version(source: Any) -> int:
    """Return how often a tensor was changed in place; 0 for another object, which must not be changed at all."""
    return source._version if isinstance(source, Tensor) else 0


class InertHook:
    """A forward hook that copies of the model lose: a copied or saved model is not measured."""

    def __init__(self, layer: CurvatureLayer, method: str) -> None:
        self._target = getattr(layer, method)

    def __call__(self, *args: Any) -> Any:
        return self._target(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_Nothing, ())


class _Nothing:
    """What a copied hook becomes."""

    def __call__(self, *args: Any) -> None:
        return None
