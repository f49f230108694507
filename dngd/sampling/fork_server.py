"""The fork server: `python -m dngd.sampling.fork_server CONTROL_FD TRAINER_PID`, started by dngd.sampling.forked.

It imports torch, DGL and what a sampler needs, once, and then forks a sampler process for each request: that takes
milliseconds where a new interpreter takes seconds, and the copies share what was imported. It uses one thread
(pyarrow's allocator has another, which knows of forks), starts no OpenMP threads, and never touches DGL's generator, so
that a copy's main thread is the first that does (see sampler).

Messages on the control socket are JSON, one a packet. From the trainer: {"fork": numbers of the files that come with
it there; the first three are the request stream, the reply stream and the log, "number": the request's}, {"kill": pid}.
To it: {"number", "pid"} with a file that stands for the process (pidfd) where the kernel has those, or {"number",
"failed": why}; {"ended": pid, "code": exit code, or minus the signal}.

It ends with its trainer, and after a minute without samplers.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any

from dngd.sampling import worker

IDLE_SECONDS = 60.0
MAX_FILES = 250
"""A packet carries 253 at most."""
PACKET_BYTES = 1 << 16


class ForkServer:
    """Forks samplers. control: SOCK_SEQPACKET, to the trainer. trainer: its process."""

    def __init__(self, control: socket.socket, trainer: int) -> None:
        self._control = control
        self._trainer = trainer
        self._samplers: set[int] = set()
        self._takes_requests = True

    def serve(self) -> None:
        """Return when the trainer is gone, or after a minute without samplers."""
        woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, _note_in_the_pipe)
        self._wake_fds = (woken, wake)
        poll, control = select.poll(), self._control.fileno()
        poll.register(woken, select.POLLIN)
        poll.register(control, select.POLLIN)
        idle_since = time.monotonic()
        while os.getppid() == self._trainer:
            ready = [fd for fd, _ in poll.poll(1000 * worker.PARENT_POLL_SECONDS)]
            if woken in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(woken, PACKET_BYTES)
            self._report_ended()
            if control in ready and not self._take_request():
                return
            if self._samplers or control in ready:
                idle_since = time.monotonic()
            elif not self._takes_requests:
                return
            elif time.monotonic() - idle_since > IDLE_SECONDS:
                # From here on the trainer's requests fail, and it starts another server; some may be on their way.
                self._control.shutdown(socket.SHUT_RD)
                self._takes_requests = False
                poll.unregister(control)
                while self._take_request():
                    pass

    def _take_request(self) -> bool:
        """Do what the next packet asks for; False at the end of the stream."""
        packet, files, _, _ = socket.recv_fds(self._control, PACKET_BYTES, MAX_FILES)
        if not packet:
            return False
        message: dict[str, Any] = json.loads(packet)
        if "kill" in message:
            # Not reaped yet, so that the number is no other process's.
            if message["kill"] in self._samplers:
                os.kill(message["kill"], signal.SIGKILL)
            return True
        try:
            self._fork(message["number"], message["fork"], files)
        finally:
            for file in files:
                os.close(file)
        return True

    def _fork(self, number: int, names: list[int], files: list[int]) -> None:
        if len(files) != len(names):
            self._tell({"number": number, "failed": f"only {len(files)} of {len(names)} files could be opened"})
            return
        server = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            self._tell({"number": number, "failed": str(error)})
            return
        if pid == 0:
            self._be_a_sampler(server, dict(zip(names, files)))
        self._samplers.add(pid)
        handles = []
        with contextlib.suppress(OSError, AttributeError):
            handles.append(os.pidfd_open(pid))
        self._tell({"number": number, "pid": pid}, handles)
        for handle in handles:
            os.close(handle)

    def _be_a_sampler(self, server: int, files: dict[int, int]) -> None:
        """Serve the streams, and end the process.

        server: the parent's number. files: by the trainer's numbers, in the order of the request.
        """
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for fd in self._wake_fds:
                os.close(fd)
            self._control.close()
            requests, replies, log = list(files.values())[:3]
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.close(log)
            code = worker.serve(socket.socket(fileno=requests), socket.socket(fileno=replies), files, server)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            worker.leave(code)

    def _report_ended(self) -> None:
        while self._samplers:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            self._samplers.discard(pid)
            self._tell({"ended": pid, "code": os.waitstatus_to_exitcode(status)})

    def _tell(self, message: dict[str, Any], files: Sequence[int] = ()) -> None:
        # A trainer that is gone is seen elsewhere.
        with contextlib.suppress(OSError):
            socket.send_fds(self._control, [json.dumps(message).encode()], files)


def _note_in_the_pipe(number: int, frame: object) -> None:
    """Nothing: that there is a handler is what makes Python write to the pipe."""


def _import_what_samplers_need() -> None:
    # What cannot be imported is told by each sampler, which tries again.
    with contextlib.suppress(Exception):
        importlib.import_module("dngd.graph.store")
        importlib.import_module("dngd.sampling.draw")
        importlib.import_module("dngd.sampling.dgl_import").import_dgl()
    # The collector would write to every object, and so copy its page in each sampler.
    gc.collect()
    gc.freeze()


def main(argv: list[str]) -> int:
    """Run a fork server. argv: the number of the control socket's file, and of the trainer's process."""
    # A terminal's Ctrl-C may reach this process too, and a scheduler's SIGTERM all of a job's, but when to stop is the
    # trainer's decision. Samplers inherit this.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    _import_what_samplers_need()
    ForkServer(socket.socket(fileno=int(argv[0])), int(argv[1])).serve()
    return 0


if __name__ == "__main__":
    worker.leave(main(sys.argv[1:]))
