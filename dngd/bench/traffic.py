"""What passes between ranks: time in collectives, payload by kind, and what full matrices would take.

Kinds are those of dngd.comm's counters. Gradients are what Adam sends too, and evaluation and state are no part of a
training step; every other kind is curvature, whatever strategy sends it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dngd.comm import Communicator
from dngd.optim import KFACPreconditioner

GRADIENT = "gradient"
NOT_CURVATURE = frozenset({GRADIENT, "evaluation", "state"})

SAME_ON_ALL = frozenset({GRADIENT, "factor"})
"""Kinds that every rank hands in a buffer of, which count once; of the others each payload has one sender."""

FLOAT_BYTES = 4


class TimedCommunicator:
    """A communicator that measures the seconds spent in its collectives and in waiting for them.

    It passes everything on, methods that it has not heard of too, so that it fits any strategy. seconds: since it was
    made. calls: of collectives, by name.
    """

    def __init__(self, inner: Communicator) -> None:
        self._inner = inner
        self.seconds = 0.0
        self.calls: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        return self._timed(name, found) if callable(found) else found

    def _timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                result = call(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - started
            self.calls[name] += 1
            # Some return a buffer along with the work that will fill it.
            return tuple(map(self._watched, result)) if type(result) is tuple else self._watched(result)

        return timed

    def _watched(self, result: Any) -> Any:
        return _TimedWork(result, self) if hasattr(result, "wait") else result


class _TimedWork:
    """A collective under way, the waiting for which is measured."""

    def __init__(self, work: Any, owner: TimedCommunicator) -> None:
        self._work = work
        self._owner = owner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return self._work.wait(*args, **kwargs)
        finally:
            self._owner.seconds += time.perf_counter() - started


def total_bytes(ranks: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """Return the bytes of all collectives' buffers by kind, each buffer once; ranks: each rank's counters.

    An all-reduced buffer is on every rank and counts once; of what one rank sends to the others, all senders add up.
    """
    kinds = sorted({kind for rank in ranks for kind in rank})
    return {
        kind: max(rank.get(kind, 0) for rank in ranks)
        if kind in SAME_ON_ALL
        else sum(rank.get(kind, 0) for rank in ranks)
        for kind in kinds
    }


def curvature_bytes(by_kind: Mapping[str, float]) -> float:
    """Return the bytes of all kinds that are curvature."""
    return sum(size for kind, size in by_kind.items() if kind not in NOT_CURVATURE)


def full_matrix_bytes(preconditioner: KFACPreconditioner) -> int:
    """Return what one all-reduce of every factor takes as whole float32 matrices, `4 Σ d²`.

    Of a factor that is kept in blocks the blocks alone count: the least that per-step reduction would send.
    """
    sides: list[int] = []
    for state in preconditioner.states.values():
        for structure in (state.a, state.g):
            sides += getattr(structure, "sizes", (structure.dimension,))
    return FLOAT_BYTES * sum(side * side for side in sides)
