"""On a GPU, a step's preconditioning as one CUDA graph: one launch in place of some fifty.

At a GNN's sizes such a step takes the GPU less time than the host needs to start its kernels one by one. The kernels
are the same ones in the same order, so that replayed steps and others give the same numbers.

A graph reads and writes fixed memory. What differs from step to step is copied there: gradients before it and
preconditioned gradients back after it, inverses when they are new, and the few numbers that bound a step.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor, nn

from dngd.curvature import Tensors, extremes, read_together
from dngd.errors import TrainingError
from dngd.optim.gradients import gradient_of
from dngd.optim.inverses import Inverses, StoredInverse
from dngd.optim.layer_state import LayerState
from dngd.optim.layers import CurvatureLayer
from dngd.optim.step_scale import Bounds, Shortening

MOST_RECORDINGS = 4
"""Sets of layers that take part in a step, each with a graph of its own: heads that are used by turns, say."""

PRECISIONS = (torch.float32, torch.float64)
"""Of the gradients: with others a bound as a 0-d tensor would round unlike a number."""

Body = Callable[[Bounds, Inverses], Shortening]
"""Preconditions what is in `.grad`, in place, by these inverses."""

Record = Callable[[Callable[[], Shortening], torch.device], Callable[[], Shortening]]
"""Does a function's work on a device once, and returns what does it again, on the same memory, and returns the same
tensors."""

MOST_DIFFERENCE = 1e-3
"""Of the largest entry, by which a recording's first replay may differ from the step; rounding does by far less."""


DEBUGGING = ("CUDA_LAUNCH_BLOCKING", "PYTORCH_NO_CUDA_MEMORY_CACHING")
"""Environment variables under which graphs are not recorded, or replay memory that is gone."""


@dataclass(frozen=True)
class _Recording:
    """parameters, and gradients: their `.grad` in the graph's memory. bounds: likewise."""

    parameters: tuple[nn.Parameter, ...]
    gradients: tuple[Tensor, ...]
    bounds: Bounds
    replay: Callable[[], Shortening]


def can_record() -> bool:
    """Return whether torch records graphs here: not with these variables, by which GPU programs are debugged."""
    return not any(os.environ.get(name, "0") not in ("", "0") for name in DEBUGGING)


class StepReplay:
    """Records preconditioning where it can, and replays it.

    body: a method that does what is recorded; its object is not kept alive. record: how; by default as CUDA graphs.
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
        self._body = WeakMethod(body)
        self._record = CudaGraphs() if record is None else record
        self._recordings: dict[Any, _Recording | None] = {}
        """None: what could not be recorded."""
        self._inverses: dict[str, tuple[Tensors, Tensors]] = {}
        self._copied: dict[str, tuple[StoredInverse, StoredInverse]] = {}

    def take(self, bounds: Bounds) -> Shortening | None:
        """Precondition the gradients, and return q and ν, which the next replay overwrites; None if it cannot be, and
        nothing is done. bounds: numbers. Raises TrainingError where a recording fails half-way."""
        parameters = self._parameters()
        if not parameters or _is_capturing(parameters[0].device):
            return None
        key = (tuple(map(id, parameters)), bounds.kl_clip is None, bounds.norm_constraint is None)
        if key not in self._recordings:
            if len(self._recordings) == MOST_RECORDINGS:
                return None
            if (recording := self._recorded(key, parameters, bounds)) is None:
                return None
            self._recordings[key] = recording
        elif (recording := self._recordings[key]) is None:
            return None
        else:
            self._copy_inverses()
        gradients, own = _gradients(parameters), list(recording.gradients)
        torch._foreach_copy_(own, gradients)
        _fill(recording.bounds, bounds)
        found = recording.replay()
        torch._foreach_copy_(gradients, own)
        return found

    def tensors(self) -> list[Tensor]:
        """Return what is kept besides the graphs' own memory."""
        found = [tensor for pair in self._inverses.values() for inverse in pair for tensor in inverse]
        for recording in self._recordings.values():
            found += [] if recording is None else recording.gradients
        return found

    def close(self) -> None:
        """Release the graphs and their memory."""
        self._recordings.clear()
        self._inverses.clear()
        self._copied.clear()

    def _parameters(self) -> tuple[nn.Parameter, ...]:
        """Return the parameters that have a gradient; none where one of their layers has no inverse here, or a gradient
        is of a kind that is not recorded."""
        found: list[nn.Parameter] = []
        first: Tensor | None = None
        for name, layer in self._layers.items():
            before = len(found)
            if layer.keeps_plain_gradient:
                continue
            for parameter in layer.parameters:
                gradient = gradient_of(parameter)
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

    def _recorded(self, key: Any, parameters: tuple[nn.Parameter, ...], bounds: Bounds) -> _Recording | None:
        """Return a new recording; None for none, at this step or, with a warning, at any."""
        body = self._body()
        assert body is not None, "the preconditioner is gone"
        try:
            self._copy_inverses()
            gradients = tuple(gradient.clone() for gradient in _gradients(parameters))
            like = gradients[0]
            fixed = Bounds(*(None if value is None else like.new_zeros(()) for value in bounds))  # type: ignore[arg-type]
            _fill(fixed, bounds)

            def work() -> Shortening:
                with _gradients_in_place(parameters, gradients):
                    return body(fixed, self._inverses)

            replay = self._record(work, like.device)
            is_sound = self._is_sound(replay, parameters, gradients)
        except TrainingError:
            raise
        except RuntimeError as error:
            reason = str(error)
        else:
            if is_sound is None:
                return None
            if is_sound:
                return _Recording(parameters, gradients, fixed, replay)
            reason = "its replay gave other numbers"
        self._recordings[key] = None
        if not any(self._recordings.values()):
            self._inverses.clear()
            self._copied.clear()
        warnings.warn(
            f"K-FAC's step could not be recorded as a CUDA graph and goes on without, slower: {reason}", stacklevel=2
        )
        return None

    def _is_sound(
        self, replay: Callable[[], Shortening], parameters: tuple[nn.Parameter, ...], gradients: tuple[Tensor, ...]
    ) -> bool | None:
        """Return whether a replay does what the work did, whose results are in these gradients: all of it was recorded.
        None where the step is not finite, and tells nothing."""
        own = list(gradients)
        done = [gradient.clone() for gradient in own]
        torch._foreach_copy_(own, _gradients(parameters))
        replay()
        sizes = extremes(done)
        values = read_together([*sizes, *extremes(torch._foreach_sub(done, own))])
        sizes_found, differences = values[: len(sizes)], values[len(sizes) :]
        if not all(map(math.isfinite, sizes_found)):
            return None
        # Of each tensor its least and its largest entry.
        return all(
            max(map(abs, differences[i : i + 2])) <= MOST_DIFFERENCE * max(map(abs, sizes_found[i : i + 2]))
            for i in range(0, len(sizes), 2)
        )


class CudaGraphs:
    """Records what one preconditioner does, as graphs that share their memory: they are replayed one at a time."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, work: Callable[[], Shortening], device: torch.device) -> Callable[[], Shortening]:
        """Do the work, on a stream of its own, since libraries set themselves up at their first call, then record it;
        return what replays it on the current stream.

        Raises RuntimeError if it cannot be done there. Raises TrainingError if it fails while it is recorded: torch's
        memory and random streams are then not in a state to go on from.
        """
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
            warm_up, recording = _streams(torch.cuda.current_device())
            caller = torch.cuda.current_stream()
            warm_up.wait_stream(caller)
            try:
                with torch.cuda.stream(warm_up):
                    work()
            finally:
                caller.wait_stream(warm_up)
            graph = torch.cuda.CUDAGraph()
            try:
                # Other threads copy batches and watch collectives meanwhile.
                with torch.cuda.graph(graph, self._pool, recording, capture_error_mode="thread_local"):
                    found = work()
            except RuntimeError as error:
                raise TrainingError(
                    f"K-FAC's step could not be recorded as a CUDA graph ({error}); leave the graph out with "
                    "cuda_graph=False, in a run with --set kfac.cuda_graph=false"
                ) from error
            self._pool = graph.pool()

        def replay() -> Shortening:
            graph.replay()
            return found

        return replay


@lru_cache
def _streams(device: int) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """Return a device's streams, to warm up on and to record on: cuBLAS keeps memory for each stream that it sees."""
    return torch.cuda.Stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _is_capturing(device: torch.device) -> bool:
    """Whether the caller records a graph of its own."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


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
    """Bring a step's numbers to where the graph reads them; beyond the type's range infinity, as in arithmetic."""
    for tensor, value in zip(fixed, bounds):
        if isinstance(tensor, Tensor):
            assert isinstance(value, (int, float))
            tensor.fill_(value if value <= torch.finfo(tensor.dtype).max else math.inf)
