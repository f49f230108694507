"""The trainer's side of the fork server: it starts one, asks it for processes, and hears how they end.

A process has one server, started when it is first wanted. Its copies see the environment of that moment.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from typing import IO, Any

from dngd.sampling.fork_server import PACKET_BYTES

STOP_SECONDS = 2.0
TAIL_CHARACTERS = 4000
IN_FLIGHT_SECONDS = 60.0
_IN_FLIGHT_POLL_SECONDS = 0.05


class ForkedProcess:
    """A process that was asked for: its number once it is there, its exit code once it has ended."""

    def __init__(self, server: _Server) -> None:
        self._server = server
        self._started = threading.Event()
        self._ended = threading.Event()
        self._pid: int | None = None
        self._code: int | None = None
        self.failure = ""
        """How it was lost, or why it never started; empty otherwise."""
        self.server_log = ""
        """The end of what the server wrote, where that was lost."""

    def pid(self, limit_seconds: float) -> int | None:
        """Return its number, waiting for it if it is not there yet; None if it is not started by then, or never."""
        self._started.wait(limit_seconds)
        return self._pid

    def wait(self, limit_seconds: float) -> int | None:
        """Return its exit code, minus the signal that killed it; None where `failure` says what is known.

        Raises TimeoutError if it has not ended by then.
        """
        if not self._ended.wait(limit_seconds):
            raise TimeoutError
        return self._code

    def kill(self) -> None:
        """Kill it, if it has started and not ended."""
        if self._pid is None or self._ended.is_set():
            return
        try:
            self._server.send({"kill": self._pid}, [])
        except OSError:
            # The server takes no requests any more, or is gone, and its copies with it in a second.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)

    def _note_start(self, pid: int) -> None:
        self._pid = pid
        self._started.set()

    def _note_end(self, code: int | None, failure: str = "", server_log: str = "") -> None:
        self._code, self.failure, self.server_log = code, failure, server_log
        self._started.set()
        self._ended.set()


class _Server:
    """A fork server, running. environment: of its process and so of its copies."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (_stop closes it)
        try:
            self._process = subprocess.Popen(
                [*_command(), str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                env=environment,
                # Ctrl-C is for the trainer, which then closes its samplers.
                start_new_session=True,
            )
        except BaseException:
            self._control.close()
            self._log.close()
            raise
        finally:
            theirs.close()
        # Guards the two below; a request and its place in the first are one step.
        self._lock = threading.Lock()
        self._starting: deque[ForkedProcess] = deque()
        self._running: dict[int, ForkedProcess] = {}
        self._lost = threading.Event()
        self._how_lost = ("was lost, since the process that samplers are forked from closed its connection,", "")
        self._finalizer = weakref.finalize(self, _stop, self._process, self._control, self._log)
        threading.Thread(target=_listen, args=(weakref.ref(self), self._control), daemon=True).start()

    @property
    def is_lost(self) -> bool:
        """Whether it has ended."""
        return self._lost.is_set()

    def start(self, files: Sequence[int]) -> ForkedProcess:
        """Ask for a process that gets these open files. Raises OSError if the server takes no more requests."""
        process = ForkedProcess(self)
        with self._lock:
            if self.is_lost:
                raise BrokenPipeError
            self.send({"fork": list(files)}, files)
            self._starting.append(process)
        return process

    def send(self, message: dict[str, Any], files: Sequence[int]) -> None:
        """Send a packet. Raises OSError."""
        deadline = time.monotonic() + IN_FLIGHT_SECONDS
        while True:
            try:
                socket.send_fds(self._control, [json.dumps(message).encode()], files)
                return
            except OSError as error:
                # A user's files on their way are limited; a server that still imports torch takes none.
                if error.errno != errno.ETOOMANYREFS or time.monotonic() > deadline:
                    raise
            time.sleep(_IN_FLIGHT_POLL_SECONDS)

    def hear(self, message: dict[str, Any]) -> None:
        """Take a packet from the server."""
        with self._lock:
            if "ended" in message:
                self._running.pop(message["ended"])._note_end(message["code"])
                return
            process = self._starting.popleft()
            if "failed" in message:
                process._note_end(None, f"could not be forked ({message['failed']})")
                return
            self._running[message["pid"]] = process
            process._note_start(message["pid"])

    def lose(self) -> None:
        """Note that the server has ended, and with it all of its copies."""
        if not self._finalizer.alive:
            return  # this process ends
        how = ending_of(self._wait())
        self._how_lost = (f"was lost, since the process that samplers are forked from {how},", tail_of(self._log))
        self._finalizer()
        with self._lock:
            self._lost.set()
            left = [*self._starting, *self._running.values()]
            self._starting.clear()
            self._running.clear()
        for process in left:
            process._note_end(None, *self._how_lost)

    def lost_process(self) -> ForkedProcess:
        """Return a process that never started, since the server ended before it was asked for one."""
        self._lost.wait(2 * STOP_SECONDS)
        process = ForkedProcess(self)
        process._note_end(None, *self._how_lost)
        return process

    def _wait(self) -> int | None:
        try:
            return self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            return None


def _command() -> list[str]:
    return [sys.executable, "-m", "dngd.sampling.fork_server"]


_servers: dict[tuple[str, str], _Server] = {}
"""By Python and the folders that it looks for modules in; one as a rule."""
_lock = threading.Lock()


def start_forked(files: Sequence[int], environment: dict[str, str]) -> ForkedProcess:
    """Return a process that dngd.sampling.worker serves in, a copy of the fork server.

    files: this process's open files that it gets; the first three are its requests, its replies and its log.
    environment: of a server that has to be started. It returns at once: a new server takes seconds to import torch.
    Raises OSError where none can be started.
    """
    key = (sys.executable, environment["PYTHONPATH"])
    with _lock:
        server = _servers.get(key)
        if server is not None:
            with contextlib.suppress(OSError):
                return server.start(files)
        for gone in [other for other, server in _servers.items() if server.is_lost]:
            del _servers[gone]
        _servers[key] = _Server(environment)
        try:
            return _servers[key].start(files)
        except BrokenPipeError:
            return _servers[key].lost_process()


def ending_of(code: int | None) -> str:
    """Return in words how a process ended. code: its exit code, minus a signal; None: it has not."""
    if code is None:
        return "closed its connection"
    if code >= 0:
        return f"exited with code {code}"
    memory = " (out of memory, perhaps)" if code == -signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-code).name}{memory}"


def tail_of(log: IO[bytes]) -> str:
    """Return the end of what a process wrote, on lines of its own, or nothing."""
    log.seek(0, os.SEEK_END)
    log.seek(max(0, log.tell() - TAIL_CHARACTERS))
    tail = log.read().decode(errors="replace").strip()
    return f":\n{tail}" if tail else ""


def _listen(server_of: weakref.ref[_Server], control: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while packet := control.recv(PACKET_BYTES):
            server = server_of()
            if server is None:
                return
            server.hear(json.loads(packet))
            del server
    server = server_of()
    if server is not None:
        server.lose()


def _stop(process: subprocess.Popen[bytes], control: socket.socket, log: IO[bytes]) -> None:
    # close alone would not be seen by a thread that reads.
    with contextlib.suppress(OSError):
        control.shutdown(socket.SHUT_RDWR)
    control.close()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # of one that waits for a disk nothing more can be had
            process.wait(STOP_SECONDS)
    log.close()


_not_ours: list[_Server] = []


def _forget_servers() -> None:
    """In a copy of this process: its servers are the parent's."""
    global _lock
    _lock = threading.Lock()
    for server in _servers.values():
        server._finalizer.detach()
    _not_ours.extend(_servers.values())
    _servers.clear()


os.register_at_fork(after_in_child=_forget_servers)
