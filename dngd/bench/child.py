"""A benchmark's child process: `python -m dngd.bench.child FD`, started by dngd.bench.children.

It answers requests, one JSON line each, over the socket FD; the first says what part it plays. Allocator settings,
thread counts and DGL's forked workers are a process's own, so that contenders do not share one.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any

import psutil

from dngd.errors import TrainingError, UserError

_PR_SET_PDEATHSIG = 1
"""Of Linux's prctl.h."""

Message = dict[str, Any]
Handler = Callable[[Message], Message]


class HungUpError(Exception):
    """The benchmark closed its end."""


def send(connection: socket.socket, message: Message) -> None:
    """Send one message. Raises OSError."""
    connection.sendall(json.dumps(message).encode() + b"\n")


def receive(connection: socket.socket) -> Message:
    """Return the next message; each side waits for the other's, so that no two are under way. Raises HungUpError."""
    line = bytearray()
    while not line.endswith(b"\n"):
        part = connection.recv(1 << 16)
        if not part:
            raise HungUpError
        line += part
    message: Message = json.loads(line)
    return message


def serve(connection: socket.socket, handler: Handler) -> None:
    """Answer requests until the benchmark hangs up; a failure is an answer too."""
    while True:
        request = receive(connection)
        try:
            answer = handler(request)
        except HungUpError:
            raise
        except Exception as error:
            answer = failure(error)
        send(connection, answer)


def failure(error: Exception) -> Message:
    """Return an error as an answer."""
    told = isinstance(error, UserError | TrainingError)
    text = str(error) if told else traceback.format_exc()
    return {"error": text, "kind": type(error).__name__ if told else "other"}


def main(argv: list[str]) -> int:
    _go_on_when_the_benchmark_dies()
    connection = socket.socket(fileno=int(argv[0]))
    try:
        setup = receive(connection)
        try:
            handler = _part(setup, connection)
        except Exception as error:
            send(connection, failure(error))
            return 1
        send(connection, {"ready": True})
        serve(connection, handler)
    except (HungUpError, ConnectionError):
        pass
    finally:
        _end_helpers()
    return 0


def _part(setup: Message, connection: socket.socket) -> Handler:
    """Return what answers requests, as the setup names it; imports only what that needs."""
    part = setup["part"]
    if part == "contender":
        from dngd.bench.contenders import Contender

        return Contender(setup).answer
    if part == "worker":
        from dngd.bench.worker import Worker

        return Worker(setup, connection).answer
    if part == "rank":
        from dngd.bench.rank import Rank

        return Rank(setup).answer
    if part == "open":
        from dngd.bench.opening import time_open

        return time_open
    raise AssertionError(part)


def _go_on_when_the_benchmark_dies() -> None:
    """Have the kernel resume this process, should the benchmark be killed while it is stopped: it then sees the end
    of its requests, and nothing stopped is left behind. Linux only."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGCONT)


def _end_helpers() -> None:
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGCONT)
            process.terminate()


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # DGL's forked workers end with their parent; sampler processes see theirs gone.
    os._exit(code)
