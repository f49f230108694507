"""The trainer's side of one sampler process: start it, ask it, notice its death or silence, end it.

Processes are copies of a fork server (dngd.sampling.forked): a fork of this process would have its OpenMP and DGL
state, multiprocessing imports the user's main module again, and an interpreter each takes seconds and some 300 MB.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import socket
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import IO, Any

from torch import Tensor

from dngd.errors import TrainingError
from dngd.models.message_passing import Aggregation
from dngd.sampling import wire
from dngd.sampling.draw import NO_SLOT, setup_message, unpack_answer
from dngd.sampling.forked import STOP_SECONDS, TAIL_CHARACTERS, ForkedProcess, ending_of, start_forked, tail_of
from dngd.sampling.minibatch import Drawn, MiniBatch
from dngd.sampling.slots import SlotPool
from dngd.sampling.topology import SharedTopology

logger = logging.getLogger(__name__)

_ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


class SamplerProcess:
    """A child process that draws batches; answers arrive in the order of the requests.

    aggregation: of the first layer's rows, None where they are not wanted. num_slots: of shared memory for answers;
    further answers, as long as none is free, come over the socket. on_mapped: see SlotPool. random_reads: see
    dngd.graph.advice. each_once: see SamplerPipeline. sparse_width: see setup_message.
    """

    def __init__(
        self,
        graph: SharedTopology,
        fanouts: Sequence[int],
        timeout_seconds: float,
        name: str,
        *,
        aggregation: Aggregation | None = None,
        num_slots: int = 0,
        on_mapped: Callable[[Tensor], None] | None = None,
        random_reads: bool = False,
        each_once: bool = False,
        sparse_width: int | None = None,
    ) -> None:
        self.name = name
        self._timeout_seconds = timeout_seconds
        self._answers: queue.SimpleQueue[tuple[dict[str, Any], list[Tensor]]] = queue.SimpleQueue()
        self._ready = False
        self._num_unanswered = 0
        with contextlib.ExitStack() as opened, contextlib.ExitStack() as given:
            try:
                self._slots = SlotPool(num_slots, on_mapped)
                opened.callback(self._slots.close)
                self._requests, child_requests = map(opened.enter_context, socket.socketpair())
                self._replies, child_replies = map(opened.enter_context, socket.socketpair())
                for end in (child_requests, child_replies):
                    given.enter_context(end)
                # A stopped child would otherwise block the send of a large request for ever.
                self._requests.settimeout(timeout_seconds)
                self._log: IO[bytes] = opened.enter_context(tempfile.TemporaryFile())
                own = (child_requests.fileno(), child_replies.fileno(), self._log.fileno())
                self._process = start_forked((*own, *graph.fds, *self._slots.fds), child_environment())
            except OSError as error:
                raise TrainingError(f"{name} cannot be started: {error}") from error
            opened.pop_all()
        self._finalizer = weakref.finalize(self, _stop, self._process, self._requests, self._log)
        self._reader = threading.Thread(
            target=_read, args=(self._replies, self._answers), name=f"dngd {name}", daemon=True
        )
        self._reader.start()
        setup = setup_message(
            graph,
            fanouts,
            aggregation,
            self._slots,
            random_reads=random_reads,
            each_once=each_once,
            sparse_width=sparse_width,
        )
        self._send(setup, [], "starting")

    @property
    def pid(self) -> int:
        """Its number, waited for while it starts. Raises TrainingError where it does not."""
        pid = self._process.pid(self._timeout_seconds)
        if pid is None:
            if self._process.has_ended:
                raise TrainingError(self._death("the first"))
            raise TrainingError(f"{self._whoami()} was not started within {self._timeout_seconds:g} s")
        return pid

    def request(self, number: int, rng_seed: int, batch: MiniBatch) -> None:
        """Ask for the layers of a batch. Raises TrainingError, which names it."""
        slot = self._slots.acquire()
        asked = {"request": number, "rng_seed": rng_seed, "slot": NO_SLOT if slot is None else slot}
        arrays = [batch.seeds] if batch.excluded is None else [batch.seeds, batch.excluded]
        self._num_unanswered += 1
        self._send(asked, arrays, str(batch.coordinates))

    @property
    def has_answer(self) -> bool:
        """Whether `answer` returns or raises without waiting."""
        return self._answers.qsize() > (0 if self._ready else 1)

    @property
    def is_idle(self) -> bool:
        """Whether no request is at work: all are answered, or the process has ended."""
        return self._answers.qsize() >= self._num_unanswered + (0 if self._ready else 1) or not self._reader.is_alive()

    def answer(self, number: int, what: str) -> Drawn:
        """Return the answer to the oldest request not yet answered, whose number is given.

        Raises TrainingError, naming the batch, when the child failed, died, or gave no answer in time.
        """
        deadline = time.monotonic() + self._timeout_seconds
        while True:
            try:
                header, arrays = self._answers.get(timeout=max(deadline - time.monotonic(), 0.0))
            except queue.Empty:
                waits_for = "its answer" if self._ready else "the process to start and open the graph"
                raise TrainingError(
                    f"{self._whoami()} gave no batch ({what}) within {self._timeout_seconds:g} s; waiting "
                    f"for {waits_for}; it is {self._state()}; raise the sampler timeout if it is only slow"
                ) from None
            if header["kind"] == "ready":
                self._ready = True
                if not header["canonical"]:
                    logger.warning("this DGL draws other batches than dgl 2.1.0 does for the same seed")
            elif header["kind"] == "lost":
                raise TrainingError(self._death(what))
            elif header["kind"] == "refused":
                raise TrainingError(f"{self._whoami()} cannot read the graph: {header['text']}")
            elif header["kind"] == "error":
                tail = header["traceback"][-TAIL_CHARACTERS:]
                raise TrainingError(f"{self._whoami()} failed on the batch ({what}):\n{tail}")
            else:
                assert header["request"] == number, (header["request"], number)
                self._num_unanswered -= 1
                return unpack_answer(header, arrays, self._slots)

    def hang_up(self) -> None:
        """Tell the process to end, without waiting for it; idempotent."""
        self._requests.close()

    def end(self, deadline: float) -> None:
        """Wait until the process that was told to end has; kill it at the deadline, of time.monotonic."""
        _end(self._process, deadline)

    def close(self) -> None:
        """End the process and wait for it; idempotent."""
        self._finalizer()
        if self._process.is_ours:
            with contextlib.suppress(OSError):  # one that has not started yet has the other end
                self._replies.shutdown(socket.SHUT_RDWR)
        if self._reader is not threading.current_thread():  # where a collection of garbage happened to come
            self._reader.join(STOP_SECONDS)
        self._slots.close()

    def _send(self, header: dict[str, Any], arrays: Sequence[Tensor], what: str) -> None:
        try:
            wire.send(self._requests, header, arrays)
        except TimeoutError:
            raise TrainingError(
                f"{self._whoami()} did not take the request for the batch ({what}) within "
                f"{self._timeout_seconds:g} s; it is {self._state()}"
            ) from None
        except OSError:
            # The reader has seen the end as well and its report stands behind answers that did arrive.
            return

    def _death(self, what: str) -> str:
        try:
            code = self._process.wait(STOP_SECONDS)
        except TimeoutError:
            code = None
        how = self._process.failure or ending_of(code)
        return f"{self._whoami()} {how} before the batch ({what})" + (self._process.server_log or tail_of(self._log))

    def _whoami(self) -> str:
        pid = self._process.pid(0.0)
        return self.name if pid is None else f"{self.name} (pid {pid})"

    def _state(self) -> str:
        pid = self._process.pid(0.0)
        return "not started yet" if pid is None else _state(pid)


def child_environment() -> dict[str, str]:
    """Return the environment of a child process: one thread, no GPU, and the modules that this process found."""
    environment = dict(os.environ)
    environment.update(dict.fromkeys(_ONE_THREAD, "1"))
    environment["DGLBACKEND"] = "pytorch"
    environment["CUDA_VISIBLE_DEVICES"] = ""
    # The child must find what this process found, wherever that was put on the path, and nothing else
    # (not a file of the working folder that happens to be called like a package).
    environment["PYTHONPATH"] = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    environment["PYTHONSAFEPATH"] = "1"
    return environment


def _read(replies: socket.socket, answers: queue.SimpleQueue[tuple[dict[str, Any], list[Tensor]]]) -> None:
    # Not a method: a thread that held the SamplerProcess would keep it from being collected.
    try:
        with replies:
            while True:
                answers.put(wire.receive(replies))
    except Exception as error:
        answers.put(({"kind": "lost", "error": str(error)}, []))


def _end(process: ForkedProcess, deadline: float) -> None:
    if not process.is_ours or process.pid(0.0) is None:
        return  # a copy's parent has use for it; one that has not started will find its streams closed
    try:
        process.wait(max(0.0, deadline - time.monotonic()))
    except TimeoutError:
        process.kill()


def _stop(process: ForkedProcess, requests: socket.socket, log: IO[bytes]) -> None:
    requests.close()
    _end(process, time.monotonic() + STOP_SECONDS)
    if process.is_ours and process.pid(0.0) is not None:
        with contextlib.suppress(TimeoutError):  # of one that waits for a disk nothing more can be had
            process.wait(STOP_SECONDS)
    log.close()


def _state(pid: int) -> str:
    """Return what the process is doing, in words."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            letter = stat.read().rpartition(")")[2].split()[0]
    except OSError:
        return "gone"
    words = {"R": "running", "S": "sleeping", "D": "waiting for a disk", "T": "stopped", "Z": "dead"}
    return words.get(letter, f"in state {letter}")
