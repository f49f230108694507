"""Sampling inside the trainer's process, on one kept thread.

DGL's stream number belongs to a thread, so all draws of a process come from this one, whoever asks. It also
keeps DGL's thread setting, which is OpenMP's and so torch's, out of the thread that trains.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError  # the built-in one from Python 3.11 on
from typing import TypeVar

from dngd.errors import TrainingError
from dngd.sampling.sampler import canonical

T = TypeVar("T")

LIMIT_SECONDS = 60.0
"""What is asked of the thread here takes milliseconds; draws that are queued before it take seconds at most."""

_executor: ThreadPoolExecutor | None = None


def submit_to_sampling_thread(function: Callable[[], T]) -> Future[T]:
    """Queue function for this process's sampling thread and return its future."""
    global _executor
    if _executor is None:
        _executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="dngd sampling")
    return _executor.submit(function)


def on_sampling_thread(function: Callable[[], T], limit_seconds: float = LIMIT_SECONDS) -> T:
    """Run function on this process's sampling thread, after all that is queued there, and return its result.

    Raises what it raises, and TrainingError after limit_seconds.
    """
    future = submit_to_sampling_thread(function)
    try:
        return future.result(limit_seconds)
    except FutureTimeoutError:
        if future.done():
            raise  # the function's own
        future.cancel()
        raise TrainingError(
            f"the thread that samples has not answered for {limit_seconds:g} s; something else holds it, or the disk "
            "that the graph is read from is too slow: sample in processes with --num-samplers 1"
        ) from None


def inline_sampling_is_canonical() -> bool:
    """Whether this process's sampling thread draws what a sampler process draws.

    It does not when another thread (a user's own loop, say) used DGL's generator first.
    """
    return on_sampling_thread(canonical)


def _forget_thread() -> None:
    global _executor
    _executor = None


os.register_at_fork(after_in_child=_forget_thread)
