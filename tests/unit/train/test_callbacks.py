"""Which callbacks are told of a run's end."""

from __future__ import annotations

from typing import Any

import pytest

from dngd.errors import UserError
from dngd.train.callbacks import Callback, Callbacks

RUN: Any = None


class Told(Callback):
    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.calls: list[str] = []

    def on_start(self, run: Any) -> None:
        self.calls.append("start")
        if self.error is not None:
            raise self.error

    def on_end(self, run: Any, result: Any) -> None:
        self.calls.append("end")


def test_what_was_not_started_has_no_end() -> None:
    told: list[str] = []
    callback = Told()
    Callbacks([callback], told.append).end(RUN, None)
    assert (callback.calls, told) == ([], [])


def test_an_end_is_of_those_alone_that_a_start_has_not_failed() -> None:
    first, failing, refusing, last = made = [Told(), Told(OSError("no disk")), Told(UserError("no package")), Told()]
    callbacks = Callbacks(made, lambda text: None)
    with pytest.raises(UserError, match="no package"):
        callbacks.start(RUN)
    callbacks.end(RUN, None)
    assert first.calls == ["start", "end"]
    assert failing.calls == refusing.calls == ["start"]
    assert last.calls == []
