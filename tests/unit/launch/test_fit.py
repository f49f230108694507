"""A caller of Ray's fit waits by the run's limits."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from dngd.errors import TrainingError
from dngd.launch import fit
from dngd.launch.fit import fit_in_thread


class Limits:
    """Stands in for the watch. kill: what the end of the controller does to fit."""

    def __init__(self, given_up: str | None = None, kill: Callable[[], None] = lambda: None) -> None:
        self.given_up = given_up
        self.kills = 0
        self._kill = kill

    def end_controller(self) -> None:
        self.kills += 1
        self._kill()


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """What a fit that nothing ends waits for."""
    monkeypatch.setattr(fit, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(fit, "END_SECONDS", 0.05)
    return threading.Event()


def test_what_fit_raises_is_raised(held: threading.Event) -> None:
    def fails() -> None:
        raise ValueError("of Ray")

    fit_in_thread(lambda: None, Limits())
    with pytest.raises(ValueError, match="of Ray"):
        fit_in_thread(fails, Limits())


@pytest.mark.parametrize("in_thread", [False, True])
def test_a_run_that_is_given_up_ends_though_fit_does_not(held: threading.Event, in_thread: bool) -> None:
    limits = Limits()
    threading.Timer(0.05, lambda: setattr(limits, "given_up", "no nodes")).start()
    raised: list[BaseException] = []

    def call() -> None:
        with pytest.raises(TrainingError, match="no nodes") as error:
            fit_in_thread(held.wait, limits)
        raised.append(error.value)

    if in_thread:
        thread = threading.Thread(target=call)
        thread.start()
        thread.join(timeout=10)
    else:
        call()
    held.set()
    assert len(raised) == 1


def test_a_fit_that_ends_well_at_the_last_moment_has_ended_well(held: threading.Event) -> None:
    held.set()
    fit_in_thread(held.wait, Limits(given_up="no nodes"))


def test_a_signal_ends_the_controller_and_is_raised(held: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though fit goes on; and with the controller fit ends, whose own error is then of no interest."""

    class Interrupting(Limits):
        @property
        def given_up(self) -> str | None:  # type: ignore[override]
            raise KeyboardInterrupt

        @given_up.setter
        def given_up(self, _: str | None) -> None: ...

    for limits in (Interrupting(), Interrupting(kill=held.set)):
        with pytest.raises(KeyboardInterrupt):
            fit_in_thread(held.wait, limits)
        assert limits.kills == 1
