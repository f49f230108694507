"""What every layer that has curvature offers: its gradient as a matrix, its rows, its pending sums."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dngd.curvature import FactorStatistics, FactorStructure, LowRank, SparseInput, Tensors, row_scales
from dngd.errors import UserError
from dngd.optim.capture import Capture, flat_rows, version_of
from dngd.optim.gradients import gradient_of

DENSE_ROWS = 4096
"""Rows of a sparse input that are made dense at a time, where A is not low rank."""


class CurvatureLayer:
    """One block `F ≈ A ⊗ G` of the Fisher: which parameters it covers and how their statistics are taken.

    name: dotted path in the model. kind: words for tables. a, g: the factors' structures; the gradient of
    the layer is a [d_g, d_a] matrix. has_ones: whether a 1 is appended to each row (a bias). `pending`
    holds what was captured since the last commit or discard: Σ m mᵀ, Σ g gᵀ (of the loss as
    back-propagated) and the row count in counts[0]; `pending_scales` the sums of EKFAC, taken while
    `basis` is set. only_constant: whether all input rows pending are those of an input that never changes.

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
        self.only_constant: bool | None = None
        self.basis: tuple[Tensors, Tensors] | None = None
        self.constant = ConstantInput()
        self._handles: list[RemovableHandle] = []
        # An optimizer that is dropped without close(), or was never made whole, leaves the model as it was.
        weakref.finalize(self, _remove_all, self._handles).atexit = False

    @property
    def dtype(self) -> torch.dtype:
        """The statistics' precision: the weight's, but never below float32."""
        dtype = self.parameters[0].dtype
        return dtype if dtype in (torch.float32, torch.float64) else torch.float32

    @property
    def has_gradient(self) -> bool:
        """Whether the layer takes part in this step: it has a gradient, zero perhaps."""
        return any(gradient_of(parameter) is not None for parameter in self.parameters)

    @property
    def keeps_plain_gradient(self) -> bool:
        """Whether `gradient` gives none for now, although there is one."""
        return False

    @property
    def device(self) -> torch.device:
        """The weight's device."""
        return self.parameters[0].device

    def features(self, payload: Any) -> Any:
        """Return what one call's rows are made of, edges aside."""
        return payload

    def check_features(self, payload: Any) -> None:
        """Raise UserError if one call's features are one of torch's sparse tensors."""
        features = self.features(payload)
        if isinstance(features, Tensor) and features.layout != torch.strided:
            raise UserError(
                f"layer {self.name!r} was given features as a {str(features.layout).removeprefix('torch.')} tensor, of "
                "which K-FAC cannot measure rows; give it dense ones (x.to_dense()), or train with dngd.Trainer, "
                "which keeps a graph's sparse features sparse"
            )

    def rows(self, payload: Any) -> Tensor:
        """Return the rows [..., d_in] (without the 1) of one call; asked for only when something reads them."""
        raise AssertionError(f"{type(self).__name__} must say what its rows are")

    def rows_at(self, payload: Any, positions: Tensor) -> Tensor | SparseInput:
        """Return the rows [k, d_in] at some positions among all of one call (int64 [k]).

        For layers that can make them without the others. SparseInput only where there is no basis.
        """
        return flat_rows(self.rows(payload))[positions]

    def all_rows(self, payload: Any) -> Tensor | SparseInput:
        """Return all rows of one call, [r, d_in]; as rows_at."""
        return flat_rows(self.rows(payload))

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

    def add(self, rows: Tensor | SparseInput, gradients: Tensor, weight: float, *, with_inputs: bool) -> None:
        """Add rows and gradients, each standing for `weight` rows, to the pending sums."""
        pending = self._pending()
        if with_inputs:
            self.only_constant = False
            self._accumulate_inputs(pending.a, rows, weight)
            pending.counts[0] += weight * rows.shape[0]
        self.g.accumulate_(pending.g, gradients, weight=weight)
        if self.basis is not None:
            assert isinstance(rows, Tensor)
            scales = row_scales(rows.to(self.dtype), gradients, self.has_ones, *self.basis)
            self._add_scales(scales * weight)

    def add_constant_inputs(self, make_rows: Callable[[Tensor | None], Tensor | SparseInput], reached: Tensor) -> None:
        """Add the rows [r, d_in] of an input that may never change: their product is taken once and kept.

        make_rows: returns all rows, or those at some positions. Rows that any step so far reached count in all: a
        hidden unit that is dead or dropped in one step would otherwise take its row out of a product that is meant to
        stay.
        """
        pending = self._pending()
        self.only_constant = self.only_constant is not False
        reach = self.constant.widen(reached)
        if self.constant.product is None:
            rows = make_rows(None if bool(reach.all()) else reach.nonzero()[:, 0])
            sums = self.a.zeros(self.dtype, self.device)
            self._accumulate_inputs(sums, rows, 1.0)
            self.constant.product = (sums, float(rows.shape[0]))
        sums, count = self.constant.product
        for mine, theirs in zip(pending.a, sums):
            mine.add_(theirs)
        pending.counts[0] += count

    def _accumulate_inputs(self, sums: Tensors, rows: Tensor | SparseInput, weight: float) -> None:
        if isinstance(rows, Tensor):
            self.a.accumulate_(sums, rows.to(self.dtype), ones=self.has_ones, weight=weight)
        elif isinstance(self.a, LowRank):
            self.a.accumulate_sparse_(sums, rows, ones=self.has_ones, weight=weight)
        else:  # few at a time: with their zeros all of them may be more than there is memory
            for first in range(0, rows.shape[0], DENSE_ROWS):
                block = rows[first : first + DENSE_ROWS].dense()
                self.a.accumulate_(sums, block.to(self.dtype), ones=self.has_ones, weight=weight)

    def forget(self) -> None:
        """Drop what was captured since the last commit."""
        self.pending = None
        self.pending_scales = None
        self.only_constant = None

    def hook(self, handle: RemovableHandle) -> None:
        """Remember a hook to take off again."""
        self._handles.append(handle)

    def hook_output(self, module: nn.Module, **options: bool) -> None:
        """Have `on_forward` called with a module's own output: before hooks that are there already and replace it.

        options: of torch's register_forward_hook.
        """
        hook = InertHook(self, "on_forward")
        self.hook(module.register_forward_hook(hook, prepend=True, **options))

    def remove(self) -> None:
        """Take the hooks off the module."""
        _remove_all(self._handles)

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


def _remove_all(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()


class ConstantInput:
    """Recognises an input that never changes, by identity, version and a sample of the objects it is made of.

    Full-batch training without input dropout shows the first layer the same rows at every step: their
    product is then computed once. The first call is kept on trust, if it is measured whole either way; a call
    with another input ends that until an input comes twice in a row. was_seen: whether there was a call. repeats:
    whether the last input came twice in a row. is_only_input: whether there never was another. reach: the rows that any
    step with this input reached. restored: the fingerprint of the last input before a restart. A saved state keeps
    these. product: A's sums over these rows and their number, None until they are taken. The sample of the values
    catches writes that torch does not count, such as those through a numpy array that shares the memory.
    """

    def __init__(self) -> None:
        self.was_seen = False
        self.repeats = False
        self.is_only_input = True
        self.reach: Tensor | None = None
        self.restored: int | None = None
        self.product: tuple[Tensors, float] | None = None
        self._seen: list[_Seen] | None = None

    def is_worth_keeping(self, sources: tuple[Any, ...], *, trusts_first: bool) -> bool:
        """Return whether this input is the one of the last call, or the first one ever and trusted."""
        is_first, self.was_seen = self._seen is None and self.restored is None, True
        is_trusted = is_first and (trusts_first or self.repeats)
        now = [(weakref.ref(t), _version(t), _sample(t)) for t in sources]
        if self._seen is None:
            same = self.restored is not None and self.restored == _fingerprint(now)
        else:
            same = len(self._seen) == len(now) and all(
                old[0]() is new[0]() and old[1] == new[1] and _equal(old[2], new[2])
                for old, new in zip(self._seen, now)
            )
        self._seen, self.restored = now, None
        if not same:
            self.product = None
        if not is_first:
            self.repeats = same
            self.is_only_input &= same
            if not same:
                self.reach = None
        return is_trusted or same

    def fingerprint(self) -> int | None:
        """Return what the last input can be recognised by after a restart; None if by nothing, GONE if it cannot come
        again."""
        if self._seen is None:
            return self.restored
        return GONE if any(source() is None for source, _, _ in self._seen) else _fingerprint(self._seen)

    def widen(self, reached: Tensor) -> Tensor:
        """Return the rows reached so far, these included; a wider reach makes the product void."""
        if self.reach is None or self.reach.shape != reached.shape:
            self.reach, self.product = reached, None
        elif bool((reached & ~self.reach).any()):
            self.reach, self.product = self.reach | reached, None
        return self.reach

    def tensors(self) -> Tensors:
        """Return what is kept."""
        kept = [] if self.product is None else [*self.product[0]]
        kept += [] if self.reach is None else [self.reach]
        return (*kept, *(sample for _, _, sample in self._seen or () if sample is not None))


_Seen = tuple[weakref.ref[Any], int, Tensor | None]
"""An object that an input is made of: itself, its version, a sample of its values."""

GONE = -1
"""The fingerprint of an input that exists no more."""

SAMPLE_SIZE = 4096
"""Entries of an input that are compared from step to step."""


def _version(source: Any) -> int:
    """Return how often a tensor was changed in place; 0 for another object, which must not be changed at all."""
    return version_of(source) if isinstance(source, Tensor) else 0


def _sample(source: Any) -> Tensor | None:
    """Return evenly spaced entries of a dense tensor; None for anything else."""
    if not isinstance(source, Tensor) or source.layout != torch.strided or source.numel() == 0:
        return None
    flat = source.detach()
    flat = flat.view(-1) if flat.is_contiguous() else flat[:: max(1, flat.shape[0] // 64)].reshape(-1)
    return flat[:: max(1, flat.numel() // SAMPLE_SIZE)].clone()


def _fingerprint(seen: list[_Seen]) -> int | None:
    """Return a number that depends on the samples alone; None without any."""
    samples = [sample for _, _, sample in seen if sample is not None]
    if not samples:
        return None
    digest = hashlib.blake2b(digest_size=7)
    for sample in samples:
        digest.update(f"{sample.dtype} {sample.numel()} ".encode())
        digest.update(sample.cpu().view(torch.uint8).numpy().tobytes())
    return int.from_bytes(digest.digest(), "little")


def _equal(old: Tensor | None, new: Tensor | None) -> bool:
    return old is new or (old is not None and new is not None and torch.equal(old, new))


class InertHook:
    """A forward hook that copies of the model lose: a copied or saved model is not measured. It does not keep the layer
    alive."""

    def __init__(self, layer: CurvatureLayer, method: str) -> None:
        self._target = weakref.WeakMethod(getattr(layer, method))

    def __call__(self, *args: Any) -> Any:
        target = self._target()
        return None if target is None else target(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_Nothing, ())


class _Nothing:
    """What a copied hook becomes."""

    def __call__(self, *args: Any) -> None:
        return None
