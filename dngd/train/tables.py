"""Tables of rows that exact evaluation hands from layer to layer, and where they lie.

A table lies in a device's memory; in this process's own memory; in memory that all ranks of a machine share; or, beyond
a limit, in a file without a name that all ranks of a machine map, so that the kernel's page cache decides what of it
stays in memory. A file without a name is gone with the last process that has it open, however that ends: nothing is
left behind. Ranks of one machine find each other's memory and files through /proc; where that is not allowed, and for
small tables, each rank has a table of its own, and rows travel through the communicator, in pieces.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from dngd.comm import Communicator
from dngd.errors import UserError
from dngd.graph.advice import read_randomly
from dngd.limits import available_memory
from dngd.train.placement import free_gpu_bytes

SHARED_FROM_BYTES = 16 * 1024 * 1024
"""Smaller tables are each rank's own: agreeing on one costs more than sending it."""
PIECE_BYTES = 16 * 1024 * 1024
"""Most bytes of a table that are sent at a time."""
_TOKEN_BYTES = 16
_IN_MEMORY = {"tmpfs", "ramfs", "devtmpfs"}


@dataclass(frozen=True)
class Rows:
    """Some of a graph's nodes, in ascending order. ids: int64 [count], or None for all nodes 0 to count - 1."""

    ids: Tensor | None
    count: int

    def piece(self, first: int, last: int) -> slice | Tensor:
        """Return the nodes number first to last - 1, as an index of a table's rows."""
        return slice(first, last) if self.ids is None else self.ids[first:last]


def pick(table: Tensor, where: slice | Tensor) -> Tensor:
    """Return rows of a table, a view where they are a slice."""
    return table[where] if isinstance(where, slice) else table.index_select(0, where.to(table.device))


class Table:
    """Rows [num_rows, width]. leaders: for each rank, the lowest rank that has the same copy of the table.

    rows: the table, to be read; what a rank has not written itself is there after TableSpace.publish.
    """

    def __init__(
        self,
        rows: Tensor,
        leaders: Sequence[int],
        descriptor: int | None = None,
        release: Callable[[], None] = lambda: None,
    ) -> None:
        self.rows = rows
        self.leaders = leaders
        self._descriptor = descriptor
        self._release = release

    @property
    def is_file(self) -> bool:
        """Whether the table lies in a file."""
        return self._descriptor is not None

    def write(self, where: slice | Tensor, values: Tensor) -> None:
        """Set rows. where: a slice, or ascending row numbers int64 [n]. values: [n, width]."""
        if isinstance(where, slice) and self._descriptor is not None:
            # Through the file and not the mapping: no page fault a page, and pages are made in large runs.
            row_bytes = self.rows.shape[1] * self.rows.element_size()
            _write_all(self._descriptor, values.cpu().contiguous(), where.start * row_bytes)
        elif isinstance(where, slice):
            self.rows[where].copy_(values)
        else:
            self.rows.index_copy_(0, where.to(self.rows.device), values.to(self.rows.device))

    def close(self) -> None:
        """Give the table's memory or file back. Its rows must not be used any more."""
        self.rows = self.rows.new_empty(0, 0)
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        self._release()
        self._release = lambda: None


class TableSpace:
    """Makes tables. Methods that communicate are marked; all ranks must call those alike.

    folders: where files may lie, best first. memory_bytes: most bytes of tables that this machine's ranks hold in
    memory together; what goes beyond lies in files. None: half of what is available when a table is made.
    device: tables lie there where they take at most half of what is free there, and else on the machine.
    """

    def __init__(
        self,
        communicator: Communicator,
        *,
        folders: Sequence[Path] = (),
        memory_bytes: int | None = None,
        device: torch.device,
    ) -> None:
        self._comm = communicator
        self._folders = list(folders)
        self._memory_bytes = memory_bytes
        self._device = device
        self._in_use = 0
        self._machine: list[int] | None = None

    def shared(self, num_rows: int, width: int, dtype: torch.dtype) -> Table:
        """Return a new table, one copy a machine where that can be. All ranks enter.

        Raises UserError on all ranks if a machine has no room for it in memory or on a disk.
        """
        size = num_rows * width * dtype.itemsize
        own = list(range(self._comm.world_size))
        if self._fits_device(size):
            return Table(torch.empty(num_rows, width, dtype=dtype, device=self._device), own)
        if self._comm.world_size == 1 or size < SHARED_FROM_BYTES:
            table = self._table(self._place(size, private=True), num_rows, width, dtype, own)
        else:
            leaders = self._leaders()
            table = self._table(self._common_place(size, leaders), num_rows, width, dtype, leaders)
        if table.is_file:
            read_randomly(table.rows)
        return table

    def private(self, num_rows: int, width: int, dtype: torch.dtype, *, room_for: int = 0) -> Table:
        """Return a new table of this rank alone. All ranks enter, each for its own number of rows.

        room_for: bytes of shared tables that have the first claim on memory. Raises UserError, perhaps on this rank
        alone, if there is no room for it.
        """
        size = num_rows * width * dtype.itemsize
        own = list(range(self._comm.world_size))
        if self._fits_device(size + room_for):
            return Table(torch.empty(num_rows, width, dtype=dtype, device=self._device), own)
        leaders = own if self._comm.world_size == 1 else self._leaders()
        # The machine's other ranks are about to take as much.
        room_for += size * (leaders.count(leaders[self._comm.rank]) - 1)
        return self._table(self._place(size, room_for, private=True), num_rows, width, dtype, own)

    def publish(self, table: Table, rows: Rows, bounds: Sequence[int]) -> None:
        """Make the rows that each rank has written known to all. All ranks enter.

        bounds: rank r has written the nodes number bounds[r] to bounds[r + 1] - 1 of `rows`.
        """
        comm = self._comm
        if comm.world_size == 1:
            return
        leaders = table.leaders
        if len(set(leaders)) > 1:
            width = table.rows.shape[1]
            step = max(1, PIECE_BYTES // max(1, width * table.rows.element_size()))
            receives = leaders[comm.rank] == comm.rank
            for source in range(comm.world_size):
                for first in range(bounds[source], bounds[source + 1], step):
                    where = rows.piece(first, min(bounds[source + 1], first + step))
                    count = where.stop - where.start if isinstance(where, slice) else where.numel()
                    if source == comm.rank:
                        piece = pick(table.rows, where).to(self._device, copy=True).view(-1)
                    else:
                        piece = torch.empty(count * width, dtype=table.rows.dtype, device=self._device)
                    comm.broadcast(piece, source, "evaluation").wait()
                    if receives and leaders[source] != comm.rank:
                        table.write(where, piece.view(count, width))
        comm.barrier()

    def check(self, size: int) -> None:
        """Raise UserError if tables of `size` bytes in all fit neither in memory nor on a disk here."""
        if not self._fits_device(size) and size > max(SHARED_FROM_BYTES, self._memory_limit()):
            self._folder(size)

    def _fits_device(self, size: int) -> bool:
        if self._device.type != "cuda":
            return False
        return self._agree(size <= free_gpu_bytes(self._device) // 2)

    def _agree(self, fits: bool) -> bool:
        """Return whether it is so on all ranks."""
        if self._comm.world_size == 1:
            return fits
        refusals = torch.tensor([0.0 if fits else 1.0], device=self._device)
        self._comm.all_reduce(refusals, "state").wait()
        return float(refusals) == 0

    def _memory_limit(self) -> int:
        if self._memory_bytes is not None:
            return self._memory_bytes
        return (available_memory() + self._in_use) // 2

    def _common_place(self, size: int, leaders: Sequence[int]) -> _Place:
        """Return a place that each leader sets aside and its followers open. All ranks enter."""
        leader = leaders[self._comm.rank]
        made: _Place | None = None
        answer: dict[str, Any] = {}
        if leader == self._comm.rank:
            try:
                made = self._place(size, private=leaders.count(leader) == 1)
                answer = {"descriptor": made.descriptor, "pid": os.getpid(), "file": made.is_file}
            except UserError as error:
                answer = {"error": str(error)}
        answers = self._exchange(answer)
        errors = [str(told["error"]) for told in answers if "error" in told]
        if errors:
            raise UserError(errors[0])
        if made is None:
            theirs = answers[leader]
            descriptor = os.open(f"/proc/{theirs['pid']}/fd/{theirs['descriptor']}", os.O_RDWR)
            made = _Place(size, descriptor, is_file=theirs["file"])
        return made

    def _place(self, size: int, room_for: int = 0, *, private: bool) -> _Place:
        if size < SHARED_FROM_BYTES or self._in_use + size + room_for <= self._memory_limit():
            descriptor = None if private else _memory_descriptor(size)
            return _Place(size, descriptor, is_file=False)
        try:
            return _Place(size, unnamed_file(self._folder(size), size), is_file=True)
        except OSError as error:
            raise UserError(_no_room(size, f"{error.strerror} ({error.filename or self._folders})")) from error

    def _folder(self, size: int) -> Path:
        """Return the first folder on a disk with room for `size` bytes."""
        seen = []
        for folder in self._folders:
            exists = next((p for p in (folder, *folder.parents) if p.is_dir()), None)
            if exists is None or not os.access(exists, os.W_OK):
                seen.append(f"{folder} cannot be written")
                continue
            free = psutil.disk_usage(str(exists)).free
            if _file_system(exists) in _IN_MEMORY:
                seen.append(f"{folder} lies in memory")
            elif free < size + size // 20:
                seen.append(f"{folder} has {free / 2**30:.1f} GiB free")
            else:
                return folder
        raise UserError(_no_room(size, ", ".join(seen) or "there is no folder for files"))

    def _table(self, made: _Place, num_rows: int, width: int, dtype: torch.dtype, leaders: Sequence[int]) -> Table:
        rows = _view(made, num_rows, width, dtype)
        keeps = made.descriptor
        # A leader's descriptor of shared memory stays open for the others to find it.
        in_memory = 0 if made.is_file else made.size
        self._in_use += in_memory

        def release() -> None:
            self._in_use -= in_memory
            if keeps is not None and not made.is_file:
                os.close(keeps)

        return Table(rows, leaders, keeps if made.is_file else None, release)

    def _leaders(self) -> list[int]:
        """Return, for each rank, the lowest rank whose memory it can map; found out once. All ranks enter."""
        if self._machine is None:
            token, descriptor = os.urandom(_TOKEN_BYTES), _memory_descriptor(_TOKEN_BYTES)
            if descriptor is not None:
                os.pwrite(descriptor, token, 0)
            told = self._exchange(
                {"boot": _boot_id(), "pid": os.getpid(), "descriptor": descriptor, "token": token.hex()}
            )
            mine = told[self._comm.rank]
            first = next(rank for rank, other in enumerate(told) if other["boot"] == mine["boot"])
            found = first if first != self._comm.rank and _sees(told[first]) else self._comm.rank
            self._machine = [int(other["leader"]) for other in self._exchange({"leader": found})]
            if descriptor is not None:
                os.close(descriptor)
        return self._machine

    def _exchange(self, payload: dict[str, Any]) -> list[dict[str, Any]]:
        """Return every rank's payload, in rank order. All ranks enter."""
        gathered = self._comm.gather_bytes(json.dumps(payload).encode())
        whole = None if gathered is None else json.dumps([json.loads(item) for item in gathered]).encode()
        answers: list[dict[str, Any]] = json.loads(self._comm.broadcast_bytes(whole))
        return answers


@dataclass(frozen=True)
class _Place:
    """Bytes set aside. descriptor: of the file or of shared memory; None for this process's own memory."""

    size: int
    descriptor: int | None
    is_file: bool


def unnamed_file(folder: Path, size: int = 0) -> int:
    """Return the descriptor of a new file without a name in a folder, with `size` bytes reserved.

    Raises OSError if it cannot be made there or the disk has no room.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600)
    except (AttributeError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (
            errno.EOPNOTSUPP,
            errno.EISDIR,
            errno.EINVAL,
            errno.ENOENT,
        ):
            raise
        # Some file systems know only names: it has one for a moment.
        descriptor, name = tempfile.mkstemp(prefix=".dngd-table-", dir=folder)
        os.unlink(name)
    try:
        os.ftruncate(descriptor, size)
        if size and hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(descriptor, 0, size)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _view(made: _Place, num_rows: int, width: int, dtype: torch.dtype) -> Tensor:
    if made.descriptor is None and made.size < SHARED_FROM_BYTES:
        return torch.empty(num_rows, width, dtype=dtype)
    if made.descriptor is None:
        # Not torch's: what that frees may stay with the process (dngd.allocator).
        mapped = mmap.mmap(-1, made.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    else:
        mapped = mmap.mmap(made.descriptor, made.size, flags=mmap.MAP_SHARED)
    return torch.frombuffer(mapped, dtype=dtype).view(num_rows, width)


def _memory_descriptor(size: int) -> int | None:
    """Return the descriptor of new memory that others can map; None where the system has none."""
    if not hasattr(os, "memfd_create"):
        return None
    descriptor = os.memfd_create("dngd-table", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, size)
    return descriptor


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return os.urandom(_TOKEN_BYTES).hex()  # like no other's


def _sees(other: dict[str, Any]) -> bool:
    """Return whether this process can open another's memory: same machine, same names of processes, allowed."""
    if other["descriptor"] is None:
        return False
    try:
        descriptor = os.open(f"/proc/{other['pid']}/fd/{other['descriptor']}", os.O_RDWR)
    except OSError:
        return False
    try:
        return os.pread(descriptor, _TOKEN_BYTES, 0).hex() == str(other["token"])
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, values: Tensor, offset: int) -> None:
    buffer: Any = values.view(-1).view(torch.uint8).numpy()  # NumPy does not know every type
    data = memoryview(buffer)
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def _file_system(path: Path) -> str:
    """Return the type of the file system that a path lies on; empty if that is not known."""
    best, found = -1, ""
    resolved = path.resolve()
    for mount in psutil.disk_partitions(all=True):
        if resolved.is_relative_to(mount.mountpoint) and len(mount.mountpoint) > best:
            best, found = len(mount.mountpoint), mount.fstype
    return found


def _no_room(size: int, reason: str) -> str:
    return (
        f"exact evaluation needs {size / 2**30:.1f} GiB for its tables, which fit neither in the memory set aside for "
        f"them nor on a disk ({reason}); free disk space, give another --cache-dir, or allow more memory with --set "
        "eval_memory_bytes=BYTES"
    )
