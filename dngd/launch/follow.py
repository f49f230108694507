"""Following a job of a Ray cluster: its log as it grows, and what became of it.

A connection that breaks is made again, and the log goes on where it was; contact lost for CONTACT_SECONDS ends the
following, never the job.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import dataclass
from typing import Any

import aiohttp

from dngd.errors import TrainingError
from dngd.launch.submit import ClusterJobs, last_line, redact

PULSE_SECONDS = 5.0
"""Silence in the log after which the job's status is asked for."""

CONTACT_SECONDS = 60.0
RETRY_SECONDS = 1.0

INTERRUPTED = 130
_SIGNAL_BASE = 128

_LOST = (OSError, RuntimeError, aiohttp.ClientError, asyncio.TimeoutError)


@dataclass(frozen=True)
class JobOutcome:
    """How a job ended.

    exit_code: the command's own (0, 1, 2, 130), 128 + n if signal n ended it, 130 if the job was stopped; 1, or 2 where
    the user can mend it, if the command never ran. reason: one sentence, empty where the job's log has said it.
    """

    exit_code: int
    reason: str = ""


class LogFollower:
    """Copies a job's log to `write` until the job ends.

    tell: hears what is waited for. secrets: values that no message may repeat.
    `follow` may be called again after an interruption, and goes on where it was.
    """

    def __init__(
        self,
        jobs: ClusterJobs,
        job_id: str,
        write: Callable[[str], None],
        tell: Callable[[str], None],
        secrets: Collection[str] = (),
    ) -> None:
        self._jobs = jobs
        self._job_id = job_id
        self._write = write
        self._tell = tell
        self._secrets = secrets
        self._written = 0
        self._told = ""

    def follow(self, limit_seconds: float | None = None) -> JobOutcome:
        """Return how the job ended, after all of its log.

        limit_seconds: for a job that was told to stop; None: as long as the job runs and the cluster answers.
        Raises TrainingError when contact is lost, or the limit has passed.
        """
        deadline = None if limit_seconds is None else time.monotonic() + limit_seconds
        while True:
            with contextlib.suppress(*_LOST):  # whether the cluster is gone is for _details to find out
                asyncio.run(self._copy_log(deadline))
            details = self._details()
            if details.status.is_terminal():
                return self._outcome(details)
            if deadline is not None and time.monotonic() >= deadline:
                raise TrainingError(
                    f"job {self._job_id} has not ended {limit_seconds:.0f} s after it was told to stop; {self._hint()}"
                )
            time.sleep(RETRY_SECONDS)

    async def _copy_log(self, deadline: float | None) -> None:
        """Write the rest of the log. Returns when it ends, the job does, or the deadline passes."""
        skip = self._written  # every connection begins at the log's beginning
        chunks = self._jobs.tail(self._job_id)
        ended = False
        while True:
            piece = asyncio.ensure_future(_next(chunks))
            try:
                while not piece.done():
                    await asyncio.wait({piece}, timeout=PULSE_SECONDS)
                    if piece.done():
                        break
                    if ended or (deadline is not None and time.monotonic() >= deadline):
                        return
                    details = await asyncio.to_thread(self._jobs.details, self._job_id)
                    ended = details.status.is_terminal()  # one more pulse for the rest of the log
                    self._tell_waiting(details)
            finally:
                piece.cancel()
            text = piece.result()
            if text is None:
                return
            fresh = text[skip:]
            skip = max(skip - len(text), 0)
            if fresh:
                self._written += len(fresh)
                self._write(fresh)

    def _tell_waiting(self, details: Any) -> None:
        message = str(details.message or "")
        if details.status.value == "PENDING" and message != self._told:
            self._told = message
            self._tell(f"waiting for the cluster to start the job: {redact(_line(message), self._secrets)}")

    def _details(self) -> Any:
        """Return the job's details, asking for CONTACT_SECONDS before giving up."""
        deadline = time.monotonic() + CONTACT_SECONDS
        told = False
        while True:
            try:
                return self._jobs.details(self._job_id)
            except _LOST as error:
                if time.monotonic() >= deadline:
                    raise TrainingError(
                        f"no contact with the cluster at {self._jobs.address} for {CONTACT_SECONDS:.0f} s "
                        f"({type(error).__name__}), the job may go on; {self._hint()}"
                    ) from None
                if not told:
                    self._tell(f"waiting up to {CONTACT_SECONDS:.0f} s for {self._jobs.address} to answer again")
                    told = True
                time.sleep(RETRY_SECONDS)

    def _hint(self) -> str:
        return f"follow it again with ray job logs --address {self._jobs.address} --follow {self._job_id}"

    def _outcome(self, details: Any) -> JobOutcome:
        status, code = details.status.value, details.driver_exit_code
        if status == "SUCCEEDED":
            return JobOutcome(0)
        if status == "STOPPED":
            return JobOutcome(
                INTERRUPTED, "was stopped; a run goes on from its newest checkpoint with train --run-dir RUN --resume"
            )
        if code == 127:
            return JobOutcome(
                2, "found no dngd on the cluster's head node; install it on every node, or add it with --pip"
            )
        if code:
            return JobOutcome(int(code) if code > 0 else _SIGNAL_BASE - int(code), f"failed with exit code {code}")
        message = last_line(redact(str(details.message or ""), self._secrets))
        if details.error_type == "RUNTIME_ENV_SETUP_FAILURE":
            return JobOutcome(
                2, f"got no runtime environment ({_line(message)}); mend --pip or --working-dir and submit again"
            )
        return JobOutcome(1, f"did not run to its end ({_line(message)})")


async def _next(chunks: AsyncIterator[str]) -> str | None:
    try:
        return await chunks.__anext__()
    except StopAsyncIteration:
        return None


def _line(message: str) -> str:
    """Return a message on one line, of a length that can be read."""
    text = " ".join(message.split())
    return text if len(text) <= 300 else f"{text[:300]}..."
