"""Child processes of a benchmark, and turns among them: whoever has no turn is stopped (SIGSTOP), its helpers too.

A contender that draws batches ahead would otherwise work in another's time, and start its own turn with batches that
cost nothing. Stopped, it goes on where it was: a chunk is a piece of one long run, with queues as that run has them.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import IO, Any, Protocol

import psutil

from dngd.bench.child import HungUpError, Message, receive, send
from dngd.bench.progress import BenchProgress
from dngd.bench.timing import turn_order
from dngd.errors import TrainingError, UserError

ANSWER_SECONDS = 900.0
END_SECONDS = 5.0
_TAIL_CHARACTERS = 3000


class Child:
    """One child process. setup: its first message; environment: variables of its own.

    join: the process list of a control group, which it enters before anything else. prefix: a command that ends by
    becoming the one behind it (`ip netns exec NAME`), so that its process is the child's.
    """

    def __init__(
        self,
        name: str,
        setup: Message,
        environment: Mapping[str, str] | None = None,
        join: Path | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        self.name = name
        self._connection, there = socket.socketpair()
        self._connection.settimeout(ANSWER_SECONDS)
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (close does it)
        with there:
            self._process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "dngd.bench.child", str(there.fileno())],
                pass_fds=(there.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                env=_environment(environment or {}),
                # Ctrl-C is for the benchmark, which then ends its children.
                start_new_session=True,
            )
        try:
            if join is not None:
                # It has no setup yet, so that it has not touched a page of the graph.
                join.write_text(str(self.pid))
            send(self._connection, setup)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_until_ready(self) -> None:
        """Wait until the setup is done. Raises as `ask` does."""
        self._receive()

    def tree(self) -> list[psutil.Process]:
        """Return the process and all below it, itself first."""
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.pid)
            return [process, *process.children(recursive=True)]
        return []

    def ask(self, request: Message) -> Message:
        """Return the answer to a request. Raises UserError, TrainingError as the child does, or when it is gone."""
        self.post(request)
        return self._receive()

    def post(self, request: Message) -> None:
        """Send a request whose answer `answer_of_any` will take."""
        with contextlib.suppress(OSError):
            # A child that is gone has left its reason to be read, or none.
            send(self._connection, request)

    @staticmethod
    def answer_of_any(children: Sequence[Child], seconds: float) -> tuple[Child, Message]:
        """Return whichever of the children that were asked answers first, and its answer; at most `seconds` later.

        Raises as `ask` does.
        """
        by_connection = {child._connection: child for child in children}
        ready, _, _ = select.select(list(by_connection), [], [], max(0.0, seconds))
        if not ready:
            names = ", ".join(child.name for child in children)
            raise TrainingError(f"{names} gave no answer within {ANSWER_SECONDS:g} s{children[0]._tail()}")
        child = by_connection[ready[0]]
        return child, child._receive()

    def _receive(self) -> Message:
        try:
            answer = receive(self._connection)
        except TimeoutError:
            raise TrainingError(f"{self.name} gave no answer within {ANSWER_SECONDS:g} s{self._tail()}") from None
        except (HungUpError, OSError):
            raise TrainingError(f"{self.name} {self._end()}{self._tail()}") from None
        if "error" not in answer:
            return answer
        if answer["kind"] == "UserError":
            raise UserError(answer["error"])
        raise TrainingError(f"{self.name} failed: {answer['error'][-_TAIL_CHARACTERS:]}")

    def pause(self) -> None:
        """Stop the process, then its helpers: a stopped one starts no further ones."""
        _signal(self.tree(), signal.SIGSTOP)

    def resume(self) -> None:
        """Let all go on."""
        _signal(self.tree(), signal.SIGCONT)

    def hang_up(self) -> None:
        """Let the process go on, and see the end of its requests; idempotent."""
        self.resume()
        self._connection.close()

    def close(self) -> None:
        """End the process and its helpers, and wait for it; idempotent."""
        below = self.tree()[1:]
        self.hang_up()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # one that waits for a disk ends when it answers
                self._process.wait(END_SECONDS)
        # They would see that their parent is gone, but in seconds only.
        _signal(below, signal.SIGTERM)
        _signal(psutil.wait_procs(below, END_SECONDS)[1], signal.SIGKILL)
        self._log.close()

    def _end(self) -> str:
        try:
            code = self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        if code == -signal.SIGKILL:
            return "was killed (out of memory, perhaps)"
        return f"ended with code {code}"

    def _tail(self) -> str:
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - _TAIL_CHARACTERS))
        text = self._log.read().decode(errors="replace").strip()
        return f":\n{text}" if text else ""


class RankGroup:
    """Children that are the ranks of one world: they are asked, stopped and ended together.

    setups: each rank's first message; environment: of all. prefixes: each rank's, see Child. All are started before
    any is waited for, since a process group comes about only once all ranks have entered.
    """

    def __init__(
        self,
        name: str,
        setups: Sequence[Message],
        environment: Mapping[str, str] | None = None,
        prefixes: Sequence[Sequence[str]] | None = None,
    ) -> None:
        self.name = name
        self._children: list[Child] = []
        try:
            for rank, setup in enumerate(setups):
                prefix = () if prefixes is None else prefixes[rank]
                self._children.append(Child(f"{name}, rank {rank}", setup, environment, prefix=prefix))
        except BaseException:
            self.close()
            raise

    def wait_until_ready(self) -> None:
        """Wait until all setups are done. Raises as `ask` does."""
        self._answers()

    def ask(self, request: Message) -> Message:
        """Return {"ranks": [...]}, each rank's answer to one request. Raises the first error that any of them tells:
        the others may wait for that rank until the group is closed."""
        for child in self._children:
            child.post(request)
        return {"ranks": self._answers()}

    def pause(self) -> None:
        """Stop all ranks."""
        for child in self._children:
            child.pause()

    def resume(self) -> None:
        """Let all ranks go on."""
        for child in self._children:
            child.resume()

    def close(self) -> None:
        """End all ranks; idempotent. One that waits for another in a collective is killed."""
        for child in self._children:
            child.hang_up()
        for child in self._children:
            child.close()

    def _answers(self) -> list[Message]:
        deadline = time.monotonic() + ANSWER_SECONDS
        answers: dict[str, Message] = {}
        while waiting := [child for child in self._children if child.name not in answers]:
            child, answer = Child.answer_of_any(waiting, deadline - time.monotonic())
            answers[child.name] = answer
        return [answers[child.name] for child in self._children]


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM unwind the block, as Ctrl-C does, so that children, copies and control groups do not stay behind."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def stopped_children(
    setups: Mapping[str, tuple[Message, Mapping[str, str]]], progress: BenchProgress
) -> Iterator[dict[str, Child]]:
    """Start children, each stopped once it is ready; the next starts meanwhile. setups: (setup, environment)."""
    with ExitStack() as stack:
        children: dict[str, Child] = {}
        starting: Child | None = None
        for name, (setup, environment) in setups.items():
            children[name] = Child(name, setup, environment)
            stack.callback(children[name].close)
            if starting is not None:
                _stop_when_ready(starting, progress)
            starting = children[name]
        if starting is not None:
            _stop_when_ready(starting, progress)
        yield children


def _stop_when_ready(child: Child, progress: BenchProgress) -> None:
    child.wait_until_ready()
    child.pause()
    progress.advance(1, f"starting {child.name}")


class TakesTurns(Protocol):
    """What turns are given to: a Child, or a RankGroup."""

    name: str

    def resume(self) -> None:
        """Go on."""

    def ask(self, request: Message) -> Message:
        """Return the answer to a request."""

    def pause(self) -> None:
        """Stop."""


def take_turns(
    children: Mapping[str, TakesTurns],
    rounds: int,
    request: Message,
    first: Mapping[str, Message],
    progress: BenchProgress,
) -> dict[str, list[Message]]:
    """Return each child's answers, in the order of the rounds; the order within a round rotates.

    first: each child's request of a round before them, whose answers come first.
    """
    names = list(children)
    answers: dict[str, list[Message]] = {name: [] for name in names}
    for number in range(rounds + 1):
        for place in turn_order(number, len(names), len(names)):
            child = children[names[place]]
            child.resume()
            answers[child.name].append(child.ask(first[child.name] if number == 0 else request))
            child.pause()
            progress.advance(1, child.name)
    return answers


def _signal(processes: Sequence[psutil.Process], number: int) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def _environment(own: Mapping[str, str]) -> dict[str, str]:
    environment: dict[str, Any] = dict(os.environ)
    environment["DGLBACKEND"] = "pytorch"
    # The child must find what this process found, and nothing that only happens to be called alike.
    environment["PYTHONPATH"] = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    environment["PYTHONSAFEPATH"] = "1"
    return environment | dict(own)
