"""A training process that stops in its last step and tells what it took: time, memory, reads. Runs dngd's own loop."""

from __future__ import annotations

import hashlib
import socket
from pathlib import Path
from typing import Any

import psutil
import torch

from dngd.bench.child import Message, receive, send
from dngd.bench.optimizers import tensor_bytes
from dngd.comm import LocalCommunicator
from dngd.config import TrainConfig
from dngd.errors import TrainingError
from dngd.train.loop import TrainingLoop
from dngd.train.progress import StepRecord


class Worker:
    """The process's part. setup: config (its run folder exists), threads."""

    def __init__(self, setup: Message, connection: socket.socket) -> None:
        torch.set_num_threads(setup["threads"])
        self._connection = connection
        self._reads: list[dict[str, int]] = []
        self._loop = TrainingLoop(TrainConfig(**setup["config"]), LocalCommunicator(), self)

    def answer(self, request: Message) -> Message:
        """Train. The answer is sent from the last step, and from there the benchmark hangs up."""
        self._loop.run()
        raise TrainingError("the training loop ended without telling of its last step")

    def step(self, record: StepRecord) -> None:
        """Hear of a step, as the loop's reporter; hold in the last one, with batches drawn ahead as ever."""
        self._reads.append({"step": record.step, **_reads()})
        if record.step == record.total_steps:
            send(self._connection, self._report())
            receive(self._connection)

    def evaluation(self, record: Any) -> None:
        return None

    def message(self, text: str) -> None:
        return None

    def warning(self, text: str) -> None:
        return None

    def _report(self) -> Message:
        loop = self._loop
        parameters = list(loop.model.parameters())
        preconditioner = loop.optimizer.preconditioner
        state = tensor_bytes([dict(loop.optimizer.torch_optimizer.state)], exclude=parameters)
        return {
            "bytes": {
                "model": tensor_bytes(parameters),
                "gradients": tensor_bytes([p.grad for p in parameters if p.grad is not None]),
                "optimizer": state + (0 if preconditioner is None else preconditioner.memory_bytes()),
            },
            "step_seconds": loop.clock.step_seconds,
            "loss_sum": float(loop.epoch_loss).hex(),
            "weights_sha256": _digest(parameters),
            "reads": self._reads,
        }


def _digest(tensors: list[torch.nn.Parameter]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _reads() -> dict[str, int]:
    """Return the major page faults, and the bytes read from disks, of this process and its samplers so far."""
    faults = size = 0
    own = psutil.Process()
    for process in (own, *own.children(recursive=True)):
        # The name in parentheses may hold blanks; major faults are the tenth column behind it.
        faults += int(Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[9])
        size += process.io_counters().read_bytes
    return {"major_faults": faults, "read_bytes": size}
