"""What the workers, Ray's controller and the driver know of a run together: one small actor, without Ray in it.

Rank 0's progress goes through it to the driver, every worker's heartbeat and failure is kept in it, and it decides
what a failure means: workers are started again, or the run is given up with a sentence. It runs beside the driver,
so that it is there for as long as the driver is.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

PHASE_WORDS = {"sample_wait": "sampling"}
WAITING_PHASES = frozenset({"reduce"})
"""Phases in which a rank does nothing but wait for the others."""

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
        self._stalled: dict[int, str] = {}
        self._failures: list[dict[str, Any]] = []
        self._losses: list[str] = []
        self._last_error = ""
        self._reached_step = 0
        self._recoveries = 0
        self._steps_repeated = 0
        self._checkpoint_step = -1
        self._failures_in_a_row = 0
        self._waiting_since: float | None = now()
        self._controller: Any = None
        self._verdict: dict[str, str] | None = None

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
        reason = "; ".join(self._losses)
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

    def beat(self, beat: dict[str, Any]) -> None:
        """Keep a heartbeat; those of earlier attempts are late and ignored."""
        if beat["attempt"] == self._attempt and self._waiting_since is None:
            self._beats[beat["rank"]] = (self._now(), beat)
            self._reached_step = max(self._reached_step, beat["step"])

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

    def group_failed(self, lost: list[int], raised: dict[int, str], controller: Any = None) -> str | None:
        """Keep that an attempt ended, and return why the run is given up; None if workers are to start again.

        lost: ranks whose process is gone. raised: what the others raised, as far as it is known.
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
        losses += [
            f"{self._who(rank)} {how}, last heard {self._where(rank)}" for rank in lost if rank not in self._stalled
        ]
        if not losses:
            losses = [f["text"] for f in self._failures if f["kind"] == "other"]
            losses = losses or [f["text"] for f in self._failures] or list(raised.values()) or ["the workers failed"]
            losses = losses[:1]
        self._losses += losses
        self._failures_in_a_row += 1
        if self._verdict is None:
            self._verdict = self._judge(losses)
        return None if self._verdict is None else self._verdict["text"]

    def _judge(self, losses: list[str]) -> dict[str, str] | None:
        errors = [failure["text"] for failure in self._failures if failure["kind"] == "other"]
        if errors and errors[0] == self._last_error:
            return {"kind": "training", "text": f"{errors[0]} (again after workers were started again)"}
        self._last_error = errors[0] if errors else ""
        if self._failures_in_a_row <= self._max_failures:
            return None
        newest = "without any checkpoint" if self._checkpoint_step < 0 else "without a newer checkpoint"
        count = f"{self._failures_in_a_row} failures of workers in a row {newest}"
        more = "" if self._max_failures == 0 else f" ({count}; ray.max_failures={self._max_failures})"
        return {"kind": "training", "text": f"{losses[0]}{more}; go on with --resume"}

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

        The controller is known after a failure alone.
        """
        since = self._waiting_since
        return (0.0 if since is None else self._now() - since), self._controller

    def stalls(self, limit_seconds: float) -> list[dict[str, Any]]:
        """Return the workers that are silent, or keep all others waiting, for longer than a limit.

        Each is a beat with "diagnosis", one sentence by rank, pid, node, phase and step.
        """
        found = []
        for rank, (heard, beat) in self._beats.items():
            silent = self._now() - heard
            if rank in self._stalled:
                continue
            if silent > limit_seconds:
                how = f"has been silent for {silent:.0f} s, last heard {self._where(rank)}"
            elif self._keeps_waiting(rank, limit_seconds):
                how = f"keeps the others waiting: {beat['phase_seconds']:.0f} s {self._where(rank)}"
            else:
                continue
            found.append(beat | {"diagnosis": f"{self._who(rank)} {how}"})
        return found

    def killed(self, rank: int, attempt: int, diagnosis: str, was_there: bool) -> None:
        """Keep that a stalled worker was killed, or that its process was gone already."""
        if attempt == self._attempt:
            self._stalled[rank] = diagnosis + ("" if was_there else "; its process is gone")

    def _keeps_waiting(self, rank: int, limit_seconds: float) -> bool:
        _, beat = self._beats[rank]
        others = [other for r, (_, other) in self._beats.items() if r != rank]
        return (
            len(others) == self._world_size - 1 > 0
            and beat["phase"] not in WAITING_PHASES
            and beat["phase_seconds"] > limit_seconds
            and all(
                other["phase"] in WAITING_PHASES
                and other["phase_seconds"] > limit_seconds
                and other["step"] == beat["step"]
                for other in others
            )
        )

    def _who(self, rank: int) -> str:
        if rank not in self._beats:
            return f"rank {rank}"
        beat = self._beats[rank][1]
        return f"rank {rank} (pid {beat['pid']} on {beat['node_name']})"

    def _where(self, rank: int) -> str:
        if rank not in self._beats:
            return "before its first step"
        beat = self._beats[rank][1]
        return f"in phase {PHASE_WORDS.get(beat['phase'], beat['phase'])} of step {beat['step']}"
