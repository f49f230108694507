"""Ctrl-C, and the command line's SIGTERM: a first one lets the step end and a checkpoint be written, a second one stops
at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, ClassVar, Protocol

TOLD = "{}: the run stops after this step and its checkpoint; once more stops at once"


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


class SigTerm:
    """SIGTERM of this process, while the context is open, as Ctrl-C: an open CtrlC takes it, and otherwise it raises
    KeyboardInterrupt. The handler that `ray.init` puts in this one's place exits with the signal's number instead, of
    which the context's end makes the same.

    For the command line: what a program of its own does at SIGTERM is the program's decision. Outside the main thread,
    and where SIGTERM is ignored or has a handler, it changes nothing. Forked processes have the system's handler.
    """

    _open: ClassVar[SigTerm | None] = None

    def __init__(self) -> None:
        self.received = False
        """Whether one came."""

    def __enter__(self) -> SigTerm:
        if _is_main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            SigTerm._open = self
            signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if SigTerm._open is not self:
            return
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        SigTerm._open = None
        if isinstance(error, SystemExit) and error.code == signal.SIGTERM:
            self.received = True
            raise KeyboardInterrupt from None

    @classmethod
    def is_open(cls) -> bool:
        """Whether a context is open that changes something."""
        return cls._open is not None

    @classmethod
    def note(cls) -> None:
        """Note one that another handler took."""
        if cls._open is not None:
            cls._open.received = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        raise KeyboardInterrupt

    @classmethod
    def _leave_to_parent(cls) -> None:
        if cls._open is not None:
            cls._open = None
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


os.register_at_fork(after_in_child=SigTerm._leave_to_parent)


class CtrlC:
    """SIGINT of this process, while the context is open: the first sets `wanted`, further ones raise KeyboardInterrupt.
    So does SIGTERM in the context of a SigTerm.

    tell: called with a sentence at the first, from a thread of its own: a signal's handler must not wait for what
    the interrupted code holds. Outside the main thread, and where SIGINT is ignored, it changes nothing.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._before: dict[int, Any] = {}
        self.wanted = False

    def __enter__(self) -> CtrlC:
        if _is_main_thread():
            if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
                self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._handle)
            if SigTerm.is_open():
                self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            if before is not None:
                signal.signal(number, before)
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM:
            SigTerm.note()
        if self.wanted:
            raise KeyboardInterrupt
        self.wanted = True
        told = TOLD.format("Ctrl-C" if number == signal.SIGINT else "SIGTERM")
        threading.Thread(target=self._tell, args=(told,), name="dngd-ctrl-c", daemon=True).start()


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
