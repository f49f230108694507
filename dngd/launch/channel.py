"""What the workers, Ray's controller and the driver know of a run together: one small actor, without Ray in it.

Rank 0's progress goes through it to the driver, every worker's heartbeat and failure is kept in it, and it decides
what a failure means: workers are started again, or the run is given up with a sentence. It runs beside the driver,
so that it is there for as long as the driver is.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

PHASE_WORDS = {"sample_wait": "sampling"}
WAITING_PHASES = frozenset({"reduce"})
"""Phases in which a rank does nothing but wait for the others."""

UNHURRIED_PHASES = frozenset({"setup", "callback"})
"""A rank whose node converts or fetches the graph takes its time, and so does a callback of the program's own: only the
collectives' own limit is for them."""

SAME_FAILURE_SECONDS = 10.0
"""Ray tells of a failure at each look until the workers are gone; they take longer than this to start again."""

SILENT_SECONDS = 30.0
"""Beats come every second: where none comes from any rank for this long, no worker runs."""

FATAL_KINDS = frozenset({"user", "diverged"})
"""Failures that doing the same again would not mend."""


class RunChannel:
    """The actor's class. max_failures: see RayConfig. now: a monotonic clock in seconds."""

    def __init__(self, max_failures: int, now: Callable[[], float] = time.monotonic) -> None:
        self._max_failures = max_failures
        self._now = now
        self._events: list[dict[str, Any]] = []
        self._result: dict[str, Any] | None = None
        self._attempt = 0
        self._world_size = 0
        self._beats: dict[int, tuple[float, dict[str, Any]]] = {}
        self._stalled: dict[int, _Loss] = {}
        self._failures: list[dict[str, Any]] = []
        self._losses: list[_Loss] = []
        self._last_error = ""
        self._reached_step = 0
        self._recoveries = 0
        self._steps_repeated = 0
        self._checkpoint_step = -1
        self._failures_in_a_row = 0
        self._failure_told: tuple[int, float] | None = None
        self._waiting_since: float | None = now()
        self._controller: Any = None
        self._verdict: dict[str, str] | None = None
        self._stop_wanted = False
        self._interruption: dict[str, Any] | None = None

    # Progress, from rank 0 to the driver.

    def put(self, item: dict[str, Any]) -> None:
        """Add a progress event."""
        self._events.append(item)

    def drain(self) -> list[dict[str, Any]]:
        """Return the events since the last call."""
        events, self._events = self._events, []
        return events

    def finish(self, result: dict[str, Any]) -> None:
        """Keep the result."""
        self._result = result

    def result(self) -> dict[str, Any] | None:
        """Return the result, None if no worker finished."""
        return self._result

    # What workers tell.

    def begin(self, world_size: int) -> dict[str, Any]:
        """Start an attempt (rank 0 of it calls) and return the fields of dngd.train's Attempt."""
        self._attempt += 1
        reason = "; ".join(loss.sentence for loss in self._losses)
        if self._attempt > 1 and not reason:
            grown = f"the cluster has room for {world_size} workers instead of {self._world_size}"
            reason = grown if world_size != self._world_size else "the workers were started again"
        if self._attempt > 1:
            self._recoveries += 1
        self._world_size = world_size
        self._losses, self._failures = [], []
        self._beats, self._stalled = {}, {}
        self._waiting_since = None
        return {
            "number": self._attempt,
            "reason": reason,
            "reached_step": self._reached_step,
            "recoveries": self._recoveries,
            "steps_repeated": self._steps_repeated,
        }

    def resumed(self, attempt: int, step: int, steps_repeated: int) -> None:
        """Keep where an attempt went on (rank 0 calls)."""
        if attempt == self._attempt:
            self._reached_step = step
            self._steps_repeated += steps_repeated

    def checkpointed(self, step: int) -> None:
        """Keep that a checkpoint is safe: failures before it count no longer."""
        if step > self._checkpoint_step:
            self._checkpoint_step = step
            self._failures_in_a_row = 0
            self._last_error = ""

    def ask_to_stop(self) -> None:
        """Keep that the driver wants the run to end after a step."""
        self._stop_wanted = True

    def interrupted(self, interruption: dict[str, Any]) -> None:
        """Keep where the run stopped because it was asked to: message, step and run_dir of RunInterrupted."""
        self._interruption = interruption

    def interruption(self) -> dict[str, Any] | None:
        """Return where the run stopped because it was asked to; None if it did not."""
        return self._interruption

    def beat(self, beat: dict[str, Any]) -> bool:
        """Keep a heartbeat, and return whether the run is to stop; beats of earlier attempts are late and ignored."""
        if beat["attempt"] == self._attempt and self._waiting_since is None:
            self._beats[beat["rank"]] = (self._now(), beat)
            self._reached_step = max(self._reached_step, beat["step"])
        return self._stop_wanted

    def left(self, beat: dict[str, Any]) -> None:
        """Forget a rank that has done its part: it may be silent from now on."""
        if beat["attempt"] == self._attempt:
            self._beats.pop(beat["rank"], None)

    def failed(self, beat: dict[str, Any], kind: str, text: str) -> None:
        """Keep a failure that a rank saw itself. kind: user, diverged, training (a lost rank, say) or other."""
        if beat["attempt"] != self._attempt:
            return
        self.beat(beat)
        self._failures.append({"beat": beat, "kind": kind, "text": text})
        if kind in FATAL_KINDS and self._verdict is None:
            self._verdict = {"kind": kind, "text": text}

    # What Ray's controller tells.

    def controlled_by(self, controller: Any) -> None:
        """Keep Ray's controller, which the driver may have to kill."""
        self._controller = controller

    def group_failed(self, lost: list[int], raised: dict[int, str], controller: Any = None) -> str | None:
        """Keep that an attempt ended, and return why the run is given up; None if workers are to start again.

        lost: ranks whose process is gone. raised: what the others raised, as far as it is known. Ray may tell of one
        failure several times, with more of it known; it counts once.
        """
        self._controller = controller
        if self._waiting_since is None:
            self._waiting_since = self._now()
        told = {failure["beat"]["rank"] for failure in self._failures}
        how = "was lost"
        if not lost and not self._stalled:
            # The death of a process may become known later than its peers' broken connections.
            how = "was lost or is stuck"
            silent = [rank for rank in self._beats if rank not in told and rank not in raised]
            lost = silent if self._failures and len(silent) < self._world_size else []
        losses = list(self._stalled.values())
        losses += [_Loss(rank, self._beat_of(rank), how) for rank in lost if rank not in self._stalled]
        before, self._failure_told = self._failure_told, (self._attempt, self._now())
        if before is not None and before[0] == self._attempt and self._now() - before[1] < SAME_FAILURE_SECONDS:
            known = {loss.rank for loss in self._losses}
            self._losses += [loss for loss in losses if loss.rank not in known]
            return None if self._verdict is None else self._verdict["text"]
        if not losses:
            texts = [f["text"] for f in self._failures if f["kind"] == "other"]
            texts = texts or [f["text"] for f in self._failures] or list(raised.values()) or ["the workers failed"]
            losses = [_Loss(None, None, texts[0])]
        self._losses += losses
        self._failures_in_a_row += 1
        if self._verdict is None:
            self._verdict = self._judge(losses[0].sentence)
        return None if self._verdict is None else self._verdict["text"]

    def _judge(self, loss: str) -> dict[str, str] | None:
        errors = [failure["text"] for failure in self._failures if failure["kind"] == "other"]
        if errors and errors[0] == self._last_error:
            return {"kind": "training", "text": f"{errors[0]} (again after workers were started again)"}
        self._last_error = errors[0] if errors else ""
        if self._failures_in_a_row <= self._max_failures:
            return None
        newest = "without any checkpoint" if self._checkpoint_step < 0 else "without a newer checkpoint"
        count = f"{self._failures_in_a_row} failures of workers in a row {newest}"
        more = "" if self._max_failures == 0 else f" ({count}; ray.max_failures={self._max_failures})"
        return {"kind": "training", "text": f"{loss}{more}; go on with --resume"}

    # What the driver asks.

    def verdict(self) -> dict[str, str] | None:
        """Return why the run is given up ("kind", "text"); None if it is not."""
        return self._verdict

    def give_up(self, text: str) -> None:
        """Keep why the driver gives the run up."""
        if self._verdict is None:
            self._verdict = {"kind": "training", "text": text}

    def waiting(self) -> tuple[float, Any]:
        """Return for how many seconds workers have been expected to run (0.0: they do), and Ray's controller.

        None stands for a controller that does not run yet.
        """
        since = self._waiting_since
        if since is None and self._beats:
            # Ray may take workers away without telling of a failure: to use more or fewer nodes, say.
            heard = max(heard for heard, _ in self._beats.values())
            since = heard if self._now() - heard > SILENT_SECONDS else None
        return (0.0 if since is None else self._now() - since), self._controller

    def stalls(self, limit_seconds: float) -> list[dict[str, Any]]:
        """Return the workers that are silent, or keep all others waiting, for longer than a limit.

        Each is a beat with "how", the middle of a sentence.
        """
        found = []
        for rank, (heard, beat) in self._beats.items():
            silent = self._now() - heard
            if rank in self._stalled:
                continue
            if silent > limit_seconds:
                found.append(beat | {"how": f"has been silent for {silent:.0f} s"})
            elif self._keeps_waiting(rank, limit_seconds):
                found.append(beat | {"how": f"has kept the others waiting for {beat['phase_seconds']:.0f} s"})
        return found

    def killed(self, stall: dict[str, Any], place: tuple[str, int] | None) -> str:
        """Keep that a worker that `stalls` named was killed, and return the diagnosis in one sentence.

        place: phase and step of its flight record, if there was one.
        """
        loss = _Loss(stall["rank"], stall, stall["how"], place)
        if stall["attempt"] == self._attempt:
            self._stalled[stall["rank"]] = loss
        return loss.sentence

    def unlocated(self) -> list[dict[str, Any]]:
        """Return the last beats of lost workers, each once: their flight records may say where they were."""
        wanted = [loss for loss in self._losses if loss.beat is not None and loss.place is None and not loss.asked]
        for loss in wanted:
            loss.asked = True
        return [loss.beat for loss in wanted if loss.beat is not None]

    def located(self, beat: dict[str, Any], phase: str, step: int) -> None:
        """Keep where a lost worker was, by its flight record."""
        for loss in self._losses:
            if loss.beat is beat or (loss.beat is not None and loss.beat["record"] == beat["record"]):
                loss.place = (phase, step)
                self._reached_step = max(self._reached_step, step)

    def _keeps_waiting(self, rank: int, limit_seconds: float) -> bool:
        _, beat = self._beats[rank]
        others = [other for r, (_, other) in self._beats.items() if r != rank]
        return (
            len(others) == self._world_size - 1 > 0
            and beat["phase"] not in WAITING_PHASES | UNHURRIED_PHASES
            and beat["phase_seconds"] > limit_seconds
            and all(
                other["phase"] in WAITING_PHASES
                and other["phase_seconds"] > limit_seconds
                # Without a collective of its own, a step's end may let the others into the next one.
                and other["step"] in (beat["step"], beat["step"] + 1)
                for other in others
            )
        )

    def _beat_of(self, rank: int) -> dict[str, Any] | None:
        return self._beats[rank][1] if rank in self._beats else None


@dataclass
class _Loss:
    """Why an attempt ended. rank None: how is the whole sentence. place: phase and step, of the flight record."""

    rank: int | None
    beat: dict[str, Any] | None
    how: str
    place: tuple[str, int] | None = None
    asked: bool = False

    @property
    def sentence(self) -> str:
        if self.rank is None:
            return self.how
        if self.beat is None:
            return f"rank {self.rank} {self.how} before its first step"
        beat = self.beat
        phase, step = self.place or (beat["phase"], beat["step"])
        heard = "" if self.place else ", last heard"
        where = f"in phase {PHASE_WORDS.get(phase, phase)} of step {step}"
        return f"rank {self.rank} (pid {beat['pid']} on {beat['node_name']}) {self.how}{heard} {where}"
