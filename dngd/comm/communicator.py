"""The collectives that training needs, behind one narrow interface.

The only module that calls torch.distributed. A single process is just another communicator
(`LocalCommunicator`), so world size 1 runs the same code. Two process groups are used: "main" for
gradients, state and evaluation, and "factor" for curvature, so that a slow refresh never sits in
front of a gradient. On each group, every rank must call the same collectives in the same order;
all calls are made from the main thread.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dngd.comm.packing import buckets
from dngd.errors import TrainingError

Traffic = Literal["gradient", "factor", "inverse", "preconditioned", "evaluation", "state"]
"""What a collective is for: "preconditioned" are directions that one rank computed for all, "state" is bookkeeping."""
GroupName = Literal["main", "factor"]

DEFAULT_BUCKET_BYTES = 32 * 1024 * 1024


class Work(Protocol):
    """A collective under way."""

    def wait(self) -> None:
        """Return when the collective has finished; raise TrainingError if it fails or its limit passes."""


class Communicator(Protocol):
    """What a rank can ask of the others. `bytes_sent` counts the payload handed to collectives, by kind."""

    rank: int
    world_size: int
    bytes_sent: Counter[str]

    def all_reduce(self, flat: Tensor, kind: Traffic, group: GroupName = "main") -> Work:
        """Sum a flat buffer over the ranks, in place. All ranks enter; all get the same bits."""

    def broadcast(self, flat: Tensor, source: int, kind: Traffic, group: GroupName = "main") -> Work:
        """Overwrite a flat buffer with the source rank's. All ranks enter."""

    def exchange(self, flat: Tensor, kind: Traffic, group: GroupName = "main") -> tuple[Tensor, Work]:
        """Return a buffer that will hold, in rank order, what every rank has as its flat buffer's chunk for this rank.

        flat: world_size chunks of equal size, chunk r for rank r. All ranks enter.
        """

    def all_gather(self, chunk: Tensor, kind: Traffic, group: GroupName = "main") -> tuple[Tensor, Work]:
        """Return a buffer that will hold every rank's chunk, in rank order. All ranks enter.

        `bytes_sent` counts no bytes for it: after an `exchange`, which counts its whole buffer, the two of them make
        up one all-reduce of that buffer and put as much on the wire.
        """

    def gather_bytes(self, payload: bytes) -> list[bytes] | None:
        """Return every rank's payload, in rank order, at rank 0; None elsewhere. All ranks enter."""

    def broadcast_bytes(self, payload: bytes | None) -> bytes:
        """Return rank 0's payload (others pass None). All ranks enter."""

    def barrier(self) -> None:
        """Return when every rank has entered."""


class _Done:
    def wait(self) -> None:
        return None


class LocalCommunicator:
    """World size 1: every collective is the identity and sends nothing."""

    def __init__(self) -> None:
        self.rank = 0
        self.world_size = 1
        self.bytes_sent: Counter[str] = Counter()

    def all_reduce(self, flat: Tensor, kind: Traffic, group: GroupName = "main") -> Work:
        return _Done()

    def broadcast(self, flat: Tensor, source: int, kind: Traffic, group: GroupName = "main") -> Work:
        return _Done()

    def exchange(self, flat: Tensor, kind: Traffic, group: GroupName = "main") -> tuple[Tensor, Work]:
        return flat, _Done()

    def all_gather(self, chunk: Tensor, kind: Traffic, group: GroupName = "main") -> tuple[Tensor, Work]:
        return chunk, _Done()

    def gather_bytes(self, payload: bytes) -> list[bytes] | None:
        return [payload]

    def broadcast_bytes(self, payload: bytes | None) -> bytes:
        assert payload is not None, "rank 0 must pass a payload"
        return payload

    def barrier(self) -> None:
        return None


class _GroupWork:
    """Several bucket collectives of one buffer, waited for together."""

    def __init__(self, works: list[dist.Work], owner: ProcessGroupCommunicator, what: str) -> None:
        self._works = works
        self._owner = owner
        self._what = what

    def wait(self) -> None:
        with self._owner.limit(self._what):
            for work in self._works:
                work.wait()


class ProcessGroupCommunicator:
    """Collectives over two groups of all ranks of torch.distributed's default group: main, and one for factors.

    Expects an initialised default group (Ray Train's, or `init_process_group` below). timeout_seconds
    limits every wait; a collective that fails or runs over raises TrainingError with rank and purpose (with NCCL
    torch's own watchdog ends the process instead: there the host does not wait). Communicators of one limit share their
    groups, which last as long as the default group: torch has none that end by themselves.
    """

    def __init__(self, *, timeout_seconds: float = 120.0, bucket_bytes: int = DEFAULT_BUCKET_BYTES) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.bytes_sent: Counter[str] = Counter()
        self._timeout_seconds = timeout_seconds
        self._bucket_bytes = bucket_bytes
        self._on_gpu = dist.get_backend() == "nccl"
        with self.limit("setting up process groups"):
            self._groups = _groups(timeout_seconds)

    def all_reduce(self, flat: Tensor, kind: Traffic, group: GroupName = "main") -> Work:
        works = []
        with self.limit(f"all-reduce of {kind}"):
            for bucket in buckets(flat, self._bucket_bytes):
                works.append(dist.all_reduce(bucket, group=self._groups[group], async_op=True))
        self.bytes_sent[kind] += flat.numel() * flat.element_size()
        return self._issued(works, f"all-reduce of {kind}")

    def broadcast(self, flat: Tensor, source: int, kind: Traffic, group: GroupName = "main") -> Work:
        works = []
        with self.limit(f"broadcast of {kind} from rank {source}"):
            # As bytes: nothing is computed on the way, and gloo does not know every type.
            for bucket in buckets(flat.view(torch.uint8), self._bucket_bytes):
                works.append(dist.broadcast(bucket, src=source, group=self._groups[group], async_op=True))
        if self.rank == source:
            self.bytes_sent[kind] += flat.numel() * flat.element_size()
        return self._issued(works, f"broadcast of {kind} from rank {source}")

    def exchange(self, flat: Tensor, kind: Traffic, group: GroupName = "main") -> tuple[Tensor, Work]:
        received = torch.empty_like(flat)
        with self.limit(f"exchange of {kind}"):
            work = dist.all_to_all_single(
                received.view(torch.uint8), flat.view(torch.uint8), group=self._groups[group], async_op=True
            )
        self.bytes_sent[kind] += flat.numel() * flat.element_size()
        return received, self._issued([work], f"exchange of {kind}")

    def all_gather(self, chunk: Tensor, kind: Traffic, group: GroupName = "main") -> tuple[Tensor, Work]:
        gathered = chunk.new_empty(self.world_size * chunk.numel())
        parts = list(gathered.view(torch.uint8).chunk(self.world_size))
        with self.limit(f"all-gather of {kind}"):
            work = dist.all_gather(parts, chunk.view(torch.uint8), group=self._groups[group], async_op=True)
        return gathered, self._issued([work], f"all-gather of {kind}")

    def _issued(self, works: list[Any], what: str) -> Work:
        """Return what waits for collectives that were issued. NCCL's are waited for here, by the GPU's stream alone:
        torch asks for it before another group's are issued, and this has two groups, or DDP a third."""
        work = _GroupWork(works, self, what)
        if self._on_gpu:
            work.wait()
        return work

    def gather_bytes(self, payload: bytes) -> list[bytes] | None:
        # Lengths differ, so they are agreed first; then each rank's payload is broadcast. Rank 0 keeps them.
        lengths = torch.zeros(self.world_size, dtype=torch.int64, device="cpu")
        lengths[self.rank] = len(payload)
        lengths = self._to_device(lengths)
        self.all_reduce(lengths, "state").wait()
        gathered = []
        for source, length in enumerate(lengths.tolist()):
            if source == self.rank:
                buffer = torch.from_numpy(np.frombuffer(payload, dtype=np.uint8).copy())
            else:
                buffer = torch.empty(int(length), dtype=torch.uint8, device="cpu")
            buffer = self._to_device(buffer)
            self.broadcast(buffer, source, "state").wait()
            if self.rank == 0:
                gathered.append(buffer.cpu().numpy().tobytes())
        return gathered if self.rank == 0 else None

    def broadcast_bytes(self, payload: bytes | None) -> bytes:
        length = self._to_device(
            torch.tensor([0 if payload is None else len(payload)], dtype=torch.int64, device="cpu")
        )
        self.broadcast(length, 0, "state").wait()
        if self.rank == 0:
            assert payload is not None, "rank 0 must pass a payload"
            buffer = torch.from_numpy(np.frombuffer(payload, dtype=np.uint8).copy())
        else:
            buffer = torch.empty(int(length.item()), dtype=torch.uint8, device="cpu")
        buffer = self._to_device(buffer)
        self.broadcast(buffer, 0, "state").wait()
        return buffer.cpu().numpy().tobytes()

    def barrier(self) -> None:
        self.all_reduce(self._to_device(torch.zeros(1, device="cpu")), "state").wait()

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.cuda() if self._on_gpu else tensor

    @contextlib.contextmanager
    def limit(self, what: str) -> Iterator[None]:
        """Turn a collective's failure into one sentence with rank, purpose and time waited."""
        start = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, TrainingError):
                raise
            waited = time.monotonic() - start
            reason = str(error).strip().splitlines()[0]
            raise TrainingError(
                f"rank {self.rank} of {self.world_size}: {what} failed after {waited:.0f} s "
                f"(limit {self._timeout_seconds:.0f} s): another rank died or is stuck; {reason}"
            ) from error


_made: dict[float, tuple[dist.ProcessGroup | None, dict[GroupName, dist.ProcessGroup]]] = {}
"""Groups by their limit in seconds, and the default group that they are of."""


def _groups(timeout_seconds: float) -> dict[GroupName, dist.ProcessGroup]:
    """Return the groups of a limit; all ranks enter, and make them at the same calls."""
    default = dist.group.WORLD
    if timeout_seconds not in _made or _made[timeout_seconds][0] is not default:
        timeout = timedelta(seconds=timeout_seconds)
        # Ranks enter new_group in this order: main, then factor. The default group's own limit is the
        # launcher's; ours is set on groups of our own.
        groups: dict[GroupName, dist.ProcessGroup] = {
            "main": dist.new_group(timeout=timeout),
            "factor": dist.new_group(timeout=timeout),
        }
        _made[timeout_seconds] = default, groups
    return _made[timeout_seconds][1]


def init_process_group(
    rank: int, world_size: int, init_method: str, *, backend: str = "gloo", timeout_seconds: float = 120.0
) -> None:
    """Initialise torch.distributed's default group without Ray, e.g. `init_method="file:///tmp/x"`."""
    dist.init_process_group(
        backend,
        init_method=init_method,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_seconds),
    )


def destroy_process_group() -> None:
    """Tear the default group down, and those made of it."""
    _made.clear()
    dist.destroy_process_group()


def current_communicator(*, timeout_seconds: float = 120.0) -> Communicator:
    """Return a communicator for this process: torch.distributed's if it is initialised, else local."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return ProcessGroupCommunicator(timeout_seconds=timeout_seconds)
    return LocalCommunicator()
