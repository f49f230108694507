"""Checkpoints while training goes on: a thread of rank 0 writes what was copied to the host; and when they are due.

A checkpoint costs the training loop the copy of the state to the host and the gathering of the ranks' own parts.
A write that fails is told and counted, and training goes on: the checkpoints before it are intact. Where the run folder
is gone, with them, all ranks end.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable

from dngd.comm import Communicator
from dngd.errors import UserError
from dngd.train.checkpoint import CheckpointFolder, HostSnapshot, Snapshot

FIRST_LOOK_STEPS = 10
MOST_LOOK_STEPS = 10_000
GONE = b"gone: "


class CheckpointWriter:
    """Writes one checkpoint at a time. Methods that wait are entered by all ranks alike.

    timeout_seconds: limit of the wait for a write. signal_seconds: how often rank 0 tells the others, who wait for
    it in a collective, that it still waits. tell: gets a sentence about a failure. written: gets the step of a
    checkpoint that is safe; both are called from the thread.
    """

    def __init__(
        self,
        folder: CheckpointFolder,
        communicator: Communicator,
        *,
        timeout_seconds: float,
        signal_seconds: float,
        tell: Callable[[str], None],
        written: Callable[[int], None],
    ) -> None:
        self._folder = folder
        self._comm = communicator
        self._timeout_seconds = timeout_seconds
        self._signal_seconds = signal_seconds
        self._tell = tell
        self._written = written
        self._has_begun = False
        self._thread: threading.Thread | None = None
        self._gone: UserError | None = None
        self.failed = 0
        """Checkpoints that were not written, at rank 0."""
        self.left_out_step: int | None = None
        """Step of the last `save`, if it was left out; the same on all ranks."""

    def save(self, snapshot: Snapshot) -> None:
        """Copy the state and start to write it, when the checkpoint before is written. All ranks enter.

        Where that takes longer than the limit, this checkpoint is left out, which is told and counted. Raises UserError
        on all ranks if the run folder was gone when the one before was written.
        """
        self.left_out_step = None
        if not self._wait_together():
            self.left_out_step = snapshot.step
            self._fail(
                f"checkpoint of step {snapshot.step} is left out: the one before is still being written after "
                f"{self._timeout_seconds:.0f} s; is the storage of the run folder slow or gone?"
            )
            return
        captured = self._folder.capture(snapshot)
        self._has_begun = True
        if captured is not None:
            self._thread = threading.Thread(target=self._write, args=(captured,), name="dngd-checkpoint", daemon=True)
            self._thread.start()

    def finish(self) -> None:
        """Wait until the last checkpoint is written, at most for the limit. All ranks enter. Raises as `save` does."""
        if not self._wait_together():
            self._fail(
                f"the last checkpoint is still being written after {self._timeout_seconds:.0f} s and may be lost; is "
                "the storage of the run folder slow or gone?"
            )

    def settle(self, seconds: float) -> None:
        """Wait a little for a write under way; for a rank that leaves alone, after a failure."""
        if self._thread is not None:
            self._thread.join(seconds)

    def _wait_together(self) -> bool:
        """Return whether rank 0 has nothing left to write; every rank returns the same."""
        deadline = time.monotonic() + self._timeout_seconds
        while self._has_begun:
            state = b"wait"
            if self._comm.rank == 0:
                self.settle(max(0.0, min(self._signal_seconds, deadline - time.monotonic())))
                if self._thread is None or not self._thread.is_alive():
                    state = b"done" if self._gone is None else GONE + str(self._gone).encode()
                elif time.monotonic() >= deadline:
                    state = b"late"
            state = self._comm.broadcast_bytes(state if self._comm.rank == 0 else None)
            if state == b"done":
                self._thread = None
                self._has_begun = False
            elif state == b"late":
                return False
            elif state.startswith(GONE):
                raise UserError(state.removeprefix(GONE).decode())
        return True

    def _write(self, captured: HostSnapshot) -> None:
        step = captured.snapshot.step
        try:
            self._folder.write(captured)
        except Exception as error:
            self._gone = self._folder.run_folder_is_gone()
            if self._gone is not None:
                return  # all ranks learn of it together, when they next wait for this thread
            # Whatever it is, a run is worth more than one of its checkpoints.
            told = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            reason = getattr(error, "strerror", None) or told
            self._fail(
                f"checkpoint of step {step} could not be written ({reason}); training goes on, earlier checkpoints "
                "are intact; free space or fix permissions before the run is needed to go on from a newer one"
            )
        else:
            self._written(step)

    def _fail(self, text: str) -> None:
        if self._comm.rank == 0:
            self.failed += 1
            self._tell(text)


class CheckpointSchedule:
    """When a checkpoint is due: by steps or ends of epochs, and by minutes of rank 0's clock, on all ranks alike.

    period_steps: None for the end of each epoch. period_seconds: None for no limit in time. Ranks agree on the time
    at few steps: rank 0 says at which step they look next, half of the way to when it will be due.
    """

    def __init__(
        self,
        communicator: Communicator,
        *,
        period_steps: int | None,
        period_seconds: float | None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._comm = communicator
        self._period_steps = period_steps
        self._period_seconds = period_seconds
        self._now = now
        self._last = self._look = now()
        self._looked_at: int | None = None
        self._look_at: int | None = None

    def start(self, step: int) -> None:
        """Say where the run begins; the time since the last checkpoint runs from here."""
        self._last = self._look = self._now()
        self._looked_at, self._look_at = step, step + FIRST_LOOK_STEPS

    def is_due(self, step: int, *, epoch_ended: bool) -> bool:
        """Return whether a checkpoint is due after so many steps. All ranks call it after every step."""
        due = epoch_ended if self._period_steps is None else step % self._period_steps == 0
        if self._period_seconds is not None and step == self._look_at:
            due = self._agree_on_time(step, self._period_seconds) or due
        if due:
            self._last = self._now()
        return due

    def _agree_on_time(self, step: int, period_seconds: float) -> bool:
        payload = None
        if self._comm.rank == 0:
            assert self._looked_at is not None
            now = self._now()
            step_seconds = max((now - self._look) / max(1, step - self._looked_at), 1e-6)
            left = period_seconds - (now - self._last)
            horizon = (left if left > 0 else period_seconds) / 2 / step_seconds
            answer = {"due": left <= 0, "look_at": step + max(1, min(int(horizon), MOST_LOOK_STEPS))}
            payload = json.dumps(answer).encode()
            self._look, self._looked_at = now, step
        agreed = json.loads(self._comm.broadcast_bytes(payload))
        self._look_at = agreed["look_at"]
        return bool(agreed["due"])
