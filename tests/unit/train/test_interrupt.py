"""Signals that let a run end after its step: whose handlers stand when, and in which processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest

from dngd.train.interrupt import CtrlC, SigTerm


@pytest.fixture(autouse=True)
def as_found() -> Iterator[None]:
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def test_a_first_sigterm_asks_and_a_second_one_interrupts() -> None:
    heard = threading.Event()
    told: list[str] = []

    def tell(text: str) -> None:
        told.append(text)
        heard.set()

    with SigTerm() as terminated, CtrlC(tell) as stops:
        send(signal.SIGTERM)
        assert stops.wanted
        assert terminated.received
        assert heard.wait(10)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGTERM)
    assert told == ["SIGTERM: the run stops after this step and its checkpoint; once more stops at once"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_it_is_heard_where_ctrl_c_is_ignored() -> None:
    """As in what a shell's script starts in the background."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with SigTerm(), CtrlC(lambda told: None) as stops:
        send(signal.SIGINT)
        assert not stops.wanted
        send(signal.SIGTERM)
        assert stops.wanted
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_before_and_after_training_it_interrupts_at_once() -> None:
    with SigTerm() as terminated:
        with CtrlC(lambda told: None):
            pass
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGTERM)
    assert terminated.received


def test_what_another_handler_makes_of_it_is_an_interrupt_too() -> None:
    """`ray.init` puts one in this one's place that exits with the signal's number; other exits are nobody's SIGTERM."""

    def run(terminated: SigTerm, end: Callable[[], None]) -> None:
        with terminated:
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
            end()

    terminated = SigTerm()
    with pytest.raises(KeyboardInterrupt):
        run(terminated, lambda: send(signal.SIGTERM))
    assert terminated.received
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    terminated = SigTerm()
    with pytest.raises(SystemExit):
        run(terminated, lambda: sys.exit(1))
    assert not terminated.received


def test_programs_keep_theirs() -> None:
    """A run of a program's own, and a command that something else has given a handler, or that ignores it."""
    with CtrlC(lambda told: None):
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    def own(number: int, frame: object) -> None:
        pass

    for handler in (own, signal.SIG_IGN):
        signal.signal(signal.SIGTERM, handler)
        with SigTerm() as terminated, CtrlC(lambda told: None) as stops:
            send(signal.SIGTERM)
        assert (stops.wanted, terminated.received) == (False, False)
        assert signal.getsignal(signal.SIGTERM) == handler

    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    found: list[object] = []

    def elsewhere() -> None:
        with SigTerm(), CtrlC(lambda told: None):
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [signal.SIG_DFL]


CHILDREN = """
import os, signal, subprocess, sys, threading
from dngd.train.interrupt import CtrlC, SigTerm

def forked():
    ready, begun = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(begun, b".")
        signal.pause()
    os.read(ready, 1)
    os.kill(pid, signal.SIGTERM)
    ended.append(-os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

ended = []
with SigTerm():
    forked()
    with CtrlC(print):
        forked()
        thread = threading.Thread(target=forked)
        thread.start()
        thread.join()
        child = subprocess.Popen([sys.executable, "-c", "import time; print(flush=True); time.sleep(600)"], stdout=-1)
        child.stdout.readline()
        child.terminate()
        ended.append(-child.wait())
        assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL, "the parent keeps its own"
print(ended)
"""


def test_children_can_be_ended_by_it() -> None:
    """Forked from either thread, or started anew: they have the system's way with it, not their parent's."""
    done = subprocess.run([sys.executable, "-c", CHILDREN], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == str([int(signal.SIGTERM)] * 4), done.stderr
