"""What an engine that starts lost workers again tells a rank, and what it wants to hear from it.

The local engine has none of it: the defaults are a first attempt that nobody watches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from dngd.train.interrupt import NobodyStops, StopRequests
from dngd.train.metrics import EvaluationRecord, StepClock


@dataclass(frozen=True)
class Attempt:
    """Which start of the run's workers this is, and why there is another.

    number: 1 for the first. reason: what ended the one before. reached_step: how far that was. recoveries and
    steps_repeated: of all attempts before this one.
    """

    number: int = 1
    reason: str = ""
    reached_step: int = 0
    recoveries: int = 0
    steps_repeated: int = 0


def _ignore(*_: object) -> None:
    return None


@dataclass
class Supervision:
    """A rank's attempt, its clock, and its listeners.

    resumed(step, steps_repeated): where the rank goes on. checkpointed(step): a checkpoint is safe (rank 0).
    measured(record, measurements): an evaluation, with step phases in ms, bytes, staleness and factor health by
    name; all ranks call it equally often. stops: asks this rank to let the run end after a step; all ranks then do.
    """

    attempt: Attempt = field(default_factory=Attempt)
    clock: StepClock = field(default_factory=StepClock)
    resumed: Callable[[int, int], None] = _ignore
    checkpointed: Callable[[int], None] = _ignore
    stops: StopRequests = field(default_factory=NobodyStops)
    measured: Callable[[EvaluationRecord, dict[str, float]], None] | None = None
