"""The trainer's side of the fork server: it starts one, asks it for processes, and hears how they end.

A process has one server, started when it is first wanted. Its copies see the environment of that moment.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Sequence
from typing import IO, Any

from dngd.sampling.fork_server import PACKET_BYTES

STOP_SECONDS = 2.0
TAIL_CHARACTERS = 4000
POLL_SECONDS = 1.0
IN_FLIGHT_SECONDS = 60.0
_IN_FLIGHT_POLL_SECONDS = 0.05


class ForkedProcess:
    """A process that was asked for: its number once it is there, its exit code once it has ended."""

    def __init__(self, server: _Server) -> None:
        self._server = server
        self._owner = os.getpid()
        self._started = threading.Event()
        self._ended = threading.Event()
        self._pid: int | None = None
        self._handle: int | None = None
        self._code: int | None = None
        self.failure = ""
        """How it was lost, or why it never started; empty otherwise."""
        self.server_log = ""
        """The end of what the server wrote, where that was lost."""

    @property
    def is_ours(self) -> bool:
        """Whether this process asked for it, and is not a copy of the one that did."""
        return os.getpid() == self._owner

    @property
    def has_ended(self) -> bool:
        """Whether it has, as far as this process was told."""
        return self._ended.is_set()

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
        if self._pid is None or self.has_ended:
            return
        handle = self._handle
        if handle is not None:
            with contextlib.suppress(OSError):  # it has ended meanwhile
                signal.pidfd_send_signal(handle, signal.SIGKILL)
            return
        with contextlib.suppress(OSError):  # a server that is gone takes its copies with it
            self._server.send({"kill": self._pid}, [])

    def _note_start(self, pid: int, handle: int | None) -> None:
        self._pid, self._handle = pid, handle
        self._started.set()

    def _note_end(self, code: int | None, failure: str = "", server_log: str = "") -> None:
        self._code, self.failure, self.server_log = code, failure, server_log
        self._started.set()
        self._ended.set()
        handle, self._handle = self._handle, None
        if handle is not None:
            os.close(handle)


class _Server:
    """A fork server, running. environment: of its process and so of its copies."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (_stop closes it)
        try:
            self._process = subprocess.Popen(
                [*_command(), str(theirs.fileno()), str(os.getpid())],
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
        # Guards the three below.
        self._lock = threading.Lock()
        self._num_requests = 0
        self._starting: dict[int, ForkedProcess] = {}
        self._running: dict[int, ForkedProcess] = {}
        self._lost = threading.Event()
        self._how_lost = ("was lost, since the process that samplers are forked from closed its connection,", "")
        self._finalizer = weakref.finalize(self, _stop, self._process, self._control, self._log)
        _all_servers.add(self)
        threading.Thread(target=_listen, args=(weakref.ref(self), self._control), daemon=True).start()

    @property
    def is_lost(self) -> bool:
        """Whether its end was noticed."""
        return self._lost.is_set()

    @property
    def has_ended(self) -> bool:
        """Whether its process has, whoever holds its end of the socket."""
        return self._process.poll() is not None

    def start(self, files: Sequence[int]) -> ForkedProcess:
        """Ask for a process that gets these open files. Raises ConnectionError if the server takes no more requests."""
        process = ForkedProcess(self)
        with self._lock:
            if self.is_lost:
                raise BrokenPipeError
            self._num_requests += 1
            number = self._num_requests
            self._starting[number] = process
            try:
                self.send({"fork": list(files), "number": number}, files)
            except BaseException:
                # Where it was sent all the same, its streams are closed by now, and it ends.
                del self._starting[number]
                raise
        return process

    def send(self, message: dict[str, Any], files: Sequence[int]) -> None:
        """Send a packet. Raises OSError."""
        deadline = time.monotonic() + IN_FLIGHT_SECONDS
        while True:
            try:
                socket.send_fds(self._control, [json.dumps(message).encode()], files, socket.MSG_DONTWAIT)
                return
            except OSError as error:
                # Packets on their way are limited, and a user's files; a server that still imports torch takes none.
                if error.errno not in (errno.ETOOMANYREFS, errno.EAGAIN) or time.monotonic() > deadline:
                    raise
            time.sleep(_IN_FLIGHT_POLL_SECONDS)

    def hear(self, message: dict[str, Any], files: Sequence[int]) -> None:
        """Take a packet from the server, and the files that came with it."""
        with self._lock:
            if "ended" in message:
                ended = self._running.pop(message["ended"], None)
                if ended is not None:
                    ended._note_end(message["code"])
                return
            process = self._starting.pop(message["number"], None)
            if process is None:
                for file in files:
                    os.close(file)
            elif "failed" in message:
                process._note_end(None, f"could not be forked ({message['failed']})")
            else:
                self._running[message["pid"]] = process
                process._note_start(message["pid"], files[0] if files else None)

    def lose(self) -> None:
        """Note that the server has ended, and end its copies."""
        if not self._finalizer.alive:
            return  # this process ends
        how = ending_of(self._wait())
        tail = ""
        with contextlib.suppress(ValueError):  # closed: this process ends
            tail = tail_of(self._log)
        self._how_lost = (f"was lost, since the process that samplers are forked from {how},", tail)
        with self._lock:
            self._lost.set()
            left = [*self._starting.values(), *self._running.values()]
            self._starting.clear()
            self._running.clear()
        for process in left:
            # By itself it would end within a second, but not if it was stopped.
            process.kill()
            process._note_end(None, *self._how_lost)
        self._finalizer()

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
_all_servers: weakref.WeakSet[_Server] = weakref.WeakSet()
_not_ours: list[_Server] = []
"""Of the process that this one is a copy of; their end would be taken for a child's of this one."""


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
            with contextlib.suppress(ConnectionError):
                return server.start(files)
        for gone in [other for other, server in _servers.items() if server.is_lost]:
            del _servers[gone]
        _servers[key] = _Server(environment)
        try:
            return _servers[key].start(files)
        except ConnectionError:
            return _servers[key].lost_process()


def ending_of(code: int | None) -> str:
    """Return in words how a process ended. code: its exit code, minus a signal; None: it has not."""
    if code is None:
        return "closed its connection"
    if code >= 0:
        return f"exited with code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:  # a real-time signal
        name = f"signal {-code}"
    return f"was killed by {name}" + (" (out of memory, perhaps)" if code == -signal.SIGKILL else "")


def tail_of(log: IO[bytes]) -> str:
    """Return the end of what a process wrote, on lines of its own, or nothing."""
    log.seek(0, os.SEEK_END)
    log.seek(max(0, log.tell() - TAIL_CHARACTERS))
    tail = log.read().decode(errors="replace").strip()
    return f":\n{tail}" if tail else ""


def _listen(server_of: weakref.ref[_Server], control: socket.socket) -> None:
    poll = select.poll()
    try:
        poll.register(control, select.POLLIN)
        while True:
            is_there = poll.poll(1000 * POLL_SECONDS)
            server = server_of()
            # The end of the stream is not seen while a copy that was stopped at its birth still holds the other end.
            if server is None or (not is_there and server.has_ended):
                break
            if is_there:
                packet, files, _, _ = socket.recv_fds(control, PACKET_BYTES, 1)
                if not packet:
                    break
                server.hear(json.loads(packet), files)
            del server
    except (OSError, ValueError):  # closed: this process ends
        pass
    finally:
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


def _forget_servers() -> None:
    """In a copy of this process: its servers are the parent's."""
    global _lock
    _lock = threading.Lock()
    _servers.clear()
    for server in list(_all_servers):
        server._finalizer.detach()
        server._control.close()
        _not_ours.append(server)
    _all_servers.clear()


os.register_at_fork(after_in_child=_forget_servers)
