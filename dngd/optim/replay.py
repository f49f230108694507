"""On a GPU, a step's preconditioning as one CUDA graph: one launch in place of some fifty.

At a GNN's sizes such a step takes the GPU less time than the host needs to start its kernels one by one. The kernels
are the same ones in the same order, so that replayed steps and others give the same numbers.

A graph reads and writes fixed memory. What differs from step to step is copied there: gradients before it and
preconditioned gradients back after it, inverses when they are new, and the few numbers that bound a step.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dngd.curvature import Tensors
from dngd.optim.inverses import StoredInverse
from dngd.optim.layer_state import LayerState
from dngd.optim.layers import CurvatureLayer
from dngd.optim.step_scale import Bounds, Shortening

MOST_RECORDINGS = 4
"""Sets of layers that take part in a step, each with a graph of its own: heads that are used by turns, say."""

PRECISIONS = (torch.float32, torch.float64)
"""Of the gradients: with others a bound as a 0-d tensor would round unlike a number."""

Inverses = Mapping[str, tuple[Tensors, Tensors]]
"""Each layer's damped inverses (of A, of G), in the precision that is computed with."""

Body = Callable[[Bounds, Inverses], Shortening]
"""Preconditions what is in `.grad`, in place, by these inverses."""

Record = Callable[[Callable[[], Shortening], torch.device], Callable[[], Shortening]]
"""Returns what does a function's work on a device again, on the same memory, and returns the same tensors."""

MOST_DIFFERENCE = 1e-3
"""Of the largest entry, by which a recording's first replay may differ from the step; rounding does by far less."""


@dataclass(frozen=True)
class _Recording:
    """parameters, and gradients: their `.grad` in the graph's memory. bounds: likewise."""

    parameters: tuple[nn.Parameter, ...]
    gradients: tuple[Tensor, ...]
    bounds: Bounds
    replay: Callable[[], Shortening]


class StepReplay:
    """Records preconditioning where it can, and replays it.

    body: what is recorded. record: how; by default as a CUDA graph.
    """

    def __init__(
        self,
        layers: Mapping[str, CurvatureLayer],
        states: Mapping[str, LayerState],
        body: Body,
        record: Record | None = None,
    ) -> None:
        self._layers = layers
        self._states = states
        self._body = body
        self._record = record_cuda_graph if record is None else record
        self._recordings: dict[Any, _Recording] = {}
        self._inverses: dict[str, tuple[Tensors, Tensors]] = {}
        self._copied: dict[str, tuple[StoredInverse, StoredInverse]] = {}
        self._has_given_up = False

    def take(self, bounds: Bounds) -> Shortening | None:
        """Precondition the gradients, and return q and ν, which the next replay overwrites; None if it cannot be, and
        nothing is done. bounds: numbers."""
        parameters = self._parameters()
        if self._has_given_up or not parameters:
            return None
        if _is_capturing(parameters[0].device):
            return None
        key = (tuple(map(id, parameters)), bounds.kl_clip is None, bounds.norm_constraint is None)
        recording = self._recordings.get(key)
        if recording is None and len(self._recordings) == MOST_RECORDINGS:
            return None
        self._copy_inverses()
        gradients = _gradients(parameters)
        if recording is None:
            recording = self._recorded(parameters, bounds)
            if recording is None:
                return None
            self._recordings[key] = recording
        own = list(recording.gradients)
        torch._foreach_copy_(own, gradients)
        _fill(recording.bounds, bounds)
        found = recording.replay()
        torch._foreach_copy_(gradients, own)
        return found

    def tensors(self) -> list[Tensor]:
        """Return what is kept besides the graphs' own memory."""
        found = [tensor for pair in self._inverses.values() for inverse in pair for tensor in inverse]
        for recording in self._recordings.values():
            found += recording.gradients
        return found

    def close(self) -> None:
        """Release the graphs and their memory."""
        self._recordings.clear()
        self._inverses.clear()
        self._copied.clear()
        self._has_given_up = True

    def _parameters(self) -> tuple[nn.Parameter, ...]:
        """Return the parameters that have a gradient; none where one of their layers has no inverse here, or a gradient
        is of a kind that is not recorded."""
        found: list[nn.Parameter] = []
        first: Tensor | None = None
        for name, layer in self._layers.items():
            before = len(found)
            for parameter in layer.parameters:
                gradient = parameter.grad
                if gradient is None:
                    continue
                if first is None:
                    first = gradient
                    if first.dtype not in PRECISIONS:
                        return ()
                if (gradient.dtype, gradient.device, gradient.layout) != (first.dtype, first.device, torch.strided):
                    return ()
                found.append(parameter)
            state = self._states[name]
            if state.holder is not None or (len(found) > before and len(state.inverses) < 2):
                return ()
        return tuple(found)

    def _copy_inverses(self) -> None:
        """Bring the inverses in use into the graphs' memory, those that are new."""
        for name, layer in self._layers.items():
            inverses = self._states[name].inverses
            if len(inverses) < 2:
                continue
            a, g = inverses["A"], inverses["G"]
            copied = self._copied.get(name)
            if copied is not None and copied[0] is a and copied[1] is g:
                continue
            expanded = a.expanded(layer.dtype), g.expanded(layer.dtype)
            if name not in self._inverses:
                self._inverses[name] = tuple(t.clone() for t in expanded[0]), tuple(t.clone() for t in expanded[1])
            else:
                for mine, latest in zip(self._inverses[name], expanded):
                    for own, tensor in zip(mine, latest, strict=True):
                        own.copy_(tensor)
            self._copied[name] = a, g

    def _recorded(self, parameters: tuple[nn.Parameter, ...], bounds: Bounds) -> _Recording | None:
        gradients = tuple(gradient.clone() for gradient in _gradients(parameters))
        fixed = Bounds(*(None if value is None else gradients[0].new_full((), float(value)) for value in bounds))  # type: ignore[arg-type]

        def work() -> Shortening:
            with _gradients_in_place(parameters, gradients):
                return self._body(fixed, self._inverses)

        try:
            replay = self._record(work, gradients[0].device)
            reason = "" if self._is_sound(work, replay, parameters, gradients) else "its replay gave other numbers"
        except RuntimeError as error:
            reason = str(error)
        if not reason:
            return _Recording(parameters, gradients, fixed, replay)
        self._has_given_up = True
        warnings.warn(
            f"K-FAC's step could not be recorded as a CUDA graph and goes on without, slower: {reason}", stacklevel=2
        )
        return None

    def _is_sound(
        self,
        work: Callable[[], Shortening],
        replay: Callable[[], Shortening],
        parameters: tuple[nn.Parameter, ...],
        gradients: tuple[Tensor, ...],
    ) -> bool:
        """Return whether a replay does what the work does, by one step of each: all of it was recorded."""
        own, results = list(gradients), []
        for step in (work, replay):
            torch._foreach_copy_(own, _gradients(parameters))
            step()
            results.append([gradient.clone() for gradient in own])
        return all(
            torch.allclose(one, other, rtol=0.0, atol=MOST_DIFFERENCE * float(one.abs().amax()), equal_nan=True)
            for one, other in zip(*results, strict=True)
        )


def _is_capturing(device: torch.device) -> bool:
    """Whether the caller records a graph of its own."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def record_cuda_graph(work: Callable[[], Shortening], device: torch.device) -> Callable[[], Shortening]:
    """Return what replays `work`, recorded as a CUDA graph; it is done twice before that, since libraries set
    themselves up at their first call. Raises RuntimeError if it cannot be recorded."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads copy batches and watch collectives meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            found = work()

    def replay() -> Shortening:
        graph.replay()
        return found

    return replay


@contextmanager
def _gradients_in_place(parameters: tuple[nn.Parameter, ...], gradients: tuple[Tensor, ...]) -> Iterator[None]:
    """Have other gradients in the place of the parameters' own."""
    own = _gradients(parameters)
    try:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        yield
    finally:
        for parameter, gradient in zip(parameters, own, strict=True):
            parameter.grad = gradient


def _gradients(parameters: tuple[nn.Parameter, ...]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _fill(fixed: Bounds, bounds: Bounds) -> None:
    """Bring a step's numbers to where the graph reads them."""
    for tensor, value in zip(fixed, bounds):
        if isinstance(tensor, Tensor):
            assert value is not None
            tensor.fill_(value)
