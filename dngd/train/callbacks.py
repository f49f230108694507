"""Callbacks: a program's own code at a few points of a run.

They are called in rank 0's process, where the model is, in the order given. One that fails is told of and left out
from then on: a run is worth more than what watches it. A UserError ends the run.
"""

from __future__ import annotations

import contextlib
import difflib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from dngd.config import TrainConfig
from dngd.errors import UserError
from dngd.train.metrics import EvaluationRecord, RunResult

CALLBACK_PHASE = "callback"


@dataclass
class RunState:
    """What callbacks see of a run; to be read.

    step: number of steps done, of total_steps. loss: mean loss of the last step's seeds. learning_rate: of the last
    step. metric: name of what the evaluations' accuracies are. history: evaluations so far, those before a resumption
    included. model is in training mode between steps; in on_evaluation it holds the weights that were evaluated, which
    are an average in runs that have one. A model of PyG is itself, to be called as model(x, edge_index) here.
    """

    config: TrainConfig
    run_dir: Path
    model: nn.Module
    optimizer: torch.optim.Optimizer
    metric: str
    total_steps: int
    step: int = 0
    loss: float = float("nan")
    learning_rate: float = float("nan")
    history: list[EvaluationRecord] = field(default_factory=list)


class Callback:
    """Override what is of interest. With engine ray a callback is pickled to the workers before `on_start`.

    One that raises something else than UserError is left out from then on, and that is said; where a program has the
    run say nothing (quiet=True), by a Python warning.

    All run on rank 0 between steps, while the other ranks wait: they must return well within the configuration's
    collective_timeout_seconds.
    """

    def on_start(self, run: RunState) -> None:
        """Training begins, or goes on from run.step: after a resumption, or when lost workers were started again."""

    def on_step(self, run: RunState) -> None:
        """A step has ended."""

    def on_evaluation(self, run: RunState, record: EvaluationRecord) -> bool | None:
        """An evaluation has ended. Return True to end the run here, as after its last step."""

    def on_end(self, run: RunState, result: RunResult | None) -> None:
        """The run has ended with a result, or with None: interrupted, or by an error. Not called without a start."""


HOOKS = tuple(name for name in vars(Callback) if name.startswith("on_"))


def check_callbacks(callbacks: Sequence[Callback]) -> None:
    """Raise UserError for what is no callback, and warn of a method that is nearly named like a hook."""
    for callback in callbacks:
        if isinstance(callback, type):
            raise UserError(f"the callback {callback.__name__} is a class; give one made of it, {callback.__name__}()")
        kind = type(callback)
        if not isinstance(callback, Callback):
            raise UserError(f"a callback is a {kind.__name__}; derive its class from dngd.Callback")
        known = dir(Callback)
        for name in dir(kind):
            if name.startswith("on_") and name not in known and callable(getattr(kind, name)):
                near = difflib.get_close_matches(name, HOOKS, n=1, cutoff=0.75)
                if near:
                    warnings.warn(
                        f"dngd does not call {kind.__name__}.{name} (is it {near[0]}?); a callback's hooks are "
                        f"{', '.join(HOOKS)}",
                        stacklevel=4,
                    )


class Callbacks:
    """Calls a run's callbacks. tell: gets a sentence about one that failed. inside: entered with the phase's name
    around each call, for those who watch what a process is at."""

    def __init__(
        self,
        callbacks: Sequence[Callback],
        tell: Callable[[str], None],
        inside: Callable[[str], contextlib.AbstractContextManager[None]] = lambda _: contextlib.nullcontext(),
    ) -> None:
        self._callbacks = list(callbacks)
        self._inside = inside
        self._started: list[Callback] = []
        self._tell = tell

    def start(self, run: RunState) -> None:
        """Call on_start."""
        for callback in list(self._callbacks):
            self._call(callback, lambda c: c.on_start(run))
            self._started.append(callback)

    def step(self, run: RunState) -> None:
        """Call on_step."""
        for callback in list(self._callbacks):
            self._call(callback, lambda c: c.on_step(run))

    def evaluation(self, run: RunState, record: EvaluationRecord) -> bool:
        """Call on_evaluation; return whether one of them wants the run to end."""
        return any([self._call(callback, lambda c: c.on_evaluation(run, record)) for callback in list(self._callbacks)])

    def end(self, run: RunState, result: RunResult | None) -> None:
        """Call on_end of those that were started: a run may end before it begins, at a refused resumption, say."""
        for callback in list(self._callbacks):
            if callback in self._started:
                self._call(callback, lambda c: c.on_end(run, result))

    def _call(self, callback: Callback, hook: Callable[[Callback], bool | None]) -> bool:
        with self._inside(CALLBACK_PHASE):
            try:
                return bool(hook(callback))
            except UserError:
                raise
            except Exception as error:
                self._callbacks.remove(callback)
                name = type(callback).__name__
                self._tell(f"callback {name} failed ({type(error).__name__}: {error}); the run goes on without it")
                return False
