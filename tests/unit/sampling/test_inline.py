"""The thread that samples: what is asked of it has a limit."""

from __future__ import annotations

import threading

import pytest

from dngd.errors import TrainingError
from dngd.sampling.inline import on_sampling_thread, submit_to_sampling_thread


def test_a_thread_that_does_not_answer_is_told() -> None:
    free = threading.Event()
    held = submit_to_sampling_thread(lambda: free.wait(30))
    try:
        with pytest.raises(TrainingError, match=r"not answered for 0\.05 s"):
            on_sampling_thread(lambda: 1, 0.05)
    finally:
        free.set()
    held.result(30)
    assert on_sampling_thread(lambda: 2) == 2


def test_what_the_function_raises_is_raised() -> None:
    def fails() -> None:
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        on_sampling_thread(fails)
