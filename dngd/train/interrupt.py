"""Ctrl-C: a first one lets the step end and a checkpoint be written, a second one stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Protocol

TOLD = "Ctrl-C: the run stops after this step and its checkpoint; once more stops at once"


class StopRequests(Protocol):
    """Whether somebody wants the run to stop after the current step, while the context is open."""

    @property
    def wanted(self) -> bool:
        """Whether it is to stop."""

    def __enter__(self) -> StopRequests:
        """Listen."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Listen no longer."""


class NobodyStops:
    """Nobody asks: Ctrl-C does what it did before."""

    wanted = False

    def __enter__(self) -> NobodyStops:
        return self

    def __exit__(self, *_: object) -> None:
        return None


class CtrlC:
    """SIGINT of this process, while the context is open: the first sets `wanted`, further ones raise KeyboardInterrupt.

    tell: called with a sentence at the first, from a thread of its own: a signal's handler must not wait for what
    the interrupted code holds. Outside the main thread, and where SIGINT is ignored, it changes nothing.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._before: Any = None
        self.wanted = False

    def __enter__(self) -> CtrlC:
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.wanted:
            raise KeyboardInterrupt
        self.wanted = True
        threading.Thread(target=self._tell, args=(TOLD,), name="dngd-ctrl-c", daemon=True).start()
