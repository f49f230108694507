"""Tables in memory and in unnamed files: shared by a machine's ranks, sent to others', gone with their processes."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from dngd.comm import LocalCommunicator
from dngd.errors import UserError
from dngd.train import tables
from dngd.train.tables import Rows, TableSpace, pick, unnamed_file
from tests.helpers.thread_world import ThreadCommunicator, run_threads

CPU = torch.device("cpu")
ALL = Rows(None, 10)


@pytest.fixture(autouse=True)
def nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "SHARED_FROM_BYTES", 1)
    monkeypatch.setattr(tables, "PIECE_BYTES", 40)


def alone(folder: Path, memory_bytes: int | None) -> TableSpace:
    return TableSpace(LocalCommunicator(), folders=[folder], memory_bytes=memory_bytes, device=CPU)


@pytest.mark.parametrize("memory_bytes", [0, 2**30])
def test_what_is_written_is_read(tmp_path: Path, memory_bytes: int) -> None:
    """Slices and chosen rows; rows of any type; in a file there is none to see in its folder."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        table = alone(tmp_path / "new", memory_bytes).shared(10, 3, dtype)
        expected = torch.arange(30, dtype=dtype).view(10, 3)
        table.write(slice(0, 4), expected[:4])
        table.write(torch.tensor([4, 6, 9]), expected[[4, 6, 9]])
        table.write(slice(5, 6), expected[5:6])
        table.write(torch.tensor([7, 8]), expected[7:9])
        assert table.is_file == (memory_bytes == 0)
        assert torch.equal(table.rows, expected)
        assert torch.equal(pick(table.rows, torch.tensor([3, 9])), expected[[3, 9]])
        assert not list(tmp_path.glob("new/*"))
        table.close()


def test_memory_is_given_back(tmp_path: Path) -> None:
    """What was closed does not count against the limit; what is open does."""
    space = alone(tmp_path, 200)
    first = space.shared(10, 3, torch.float32)
    second = space.shared(10, 3, torch.float32)
    first.close()
    third = space.shared(10, 3, torch.float32)
    assert [table.is_file for table in (first, second, third)] == [False, True, False]
    assert space.private(10, 1, torch.float32, room_for=50).is_file


def by_automatic_limit(folder: Path, monkeypatch: pytest.MonkeyPatch, available: int) -> bool:
    monkeypatch.setattr(tables, "available_memory", lambda: available)
    return alone(folder, None).shared(10, 3, torch.float32).is_file


def test_half_of_what_is_available_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not by_automatic_limit(tmp_path, monkeypatch, 240)
    assert by_automatic_limit(tmp_path, monkeypatch, 239)


Copies = list[tuple[int, bool, torch.Tensor]]


def fill(folder: Path, memory_bytes: int | None, rows: Rows = ALL, bounds: list[int] | None = None) -> Copies:
    """Each of three ranks writes its part; return the address, whether it is a file, and the table that each sees."""
    ends = bounds or [0, 3, 4, 10]

    def work(communicator: ThreadCommunicator) -> tuple[int, bool, torch.Tensor]:
        space = TableSpace(communicator, folders=[folder], memory_bytes=memory_bytes, device=CPU)
        table = space.shared(10, 5, torch.float32)
        first, last = ends[communicator.rank], ends[communicator.rank + 1]
        where = rows.piece(first, last)
        values = torch.arange(50.0).view(10, 5)
        table.write(where, pick(values, where))
        space.publish(table, rows, ends)
        seen = (len(set(table.leaders)), table.is_file, table.rows.clone())
        communicator.barrier()
        table.close()
        return seen

    return run_threads(3, work)


@pytest.mark.parametrize("memory_bytes", [0, 2**30])
@pytest.mark.parametrize("machines", [1, 2, 3])
def test_ranks_share_what_their_machine_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machines: int, memory_bytes: int
) -> None:
    """One copy a machine, whole on all of them; also with rows that are a choice, and a rank without any."""
    order = iter(range(100))
    monkeypatch.setattr(tables, "_boot_id", lambda: str(next(order) % machines))
    for seen in (fill(tmp_path, memory_bytes), fill(tmp_path, memory_bytes, bounds=[0, 0, 10, 10])):
        for copies, is_file, rows in seen:
            assert copies == machines
            assert is_file == (memory_bytes == 0)
            assert torch.equal(rows, torch.arange(50.0).view(10, 5))
    chosen = Rows(torch.tensor([0, 2, 5, 7, 9]), 5)
    for _, _, rows in fill(tmp_path, memory_bytes, chosen, [0, 2, 2, 5]):
        assert torch.equal(rows[chosen.ids], torch.arange(50.0).view(10, 5)[chosen.ids])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("hindrance", ["no memory of its kind", "no look into others"])
def test_ranks_that_cannot_share_have_a_copy_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hindrance: str
) -> None:
    if hindrance == "no memory of its kind":
        monkeypatch.delattr(os, "memfd_create")
    else:
        monkeypatch.setattr(tables, "_sees", lambda other: False)
    for copies, _, rows in fill(tmp_path, None):
        assert copies == 3
        assert torch.equal(rows, torch.arange(50.0).view(10, 5))


def disk_with(free: int) -> Callable[[str], Any]:
    return lambda path: type("Disk", (), {"free": free})


def test_no_room_is_told_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first folder with room is taken; a folder in memory is none; all reasons are told."""
    space = TableSpace(LocalCommunicator(), folders=[tmp_path / "a", tmp_path / "b"], memory_bytes=100, device=CPU)
    space.check(100)
    monkeypatch.setattr(psutil, "disk_usage", disk_with(1000))
    space.check(900)
    with pytest.raises(
        UserError, match=r"0\.0 GiB for its tables.*a has 0\.0 GiB free.*b has.*eval_memory_bytes=BYTES"
    ):
        space.check(990)
    monkeypatch.setattr(tables, "_file_system", lambda path: "tmpfs")
    with pytest.raises(UserError, match="lies in memory"):
        space.check(900)
    with pytest.raises(UserError, match="there is no folder"):
        TableSpace(LocalCommunicator(), memory_bytes=0, device=CPU).shared(10, 3, torch.float32)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_is_told_to_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    told: list[str] = []

    def work(communicator: ThreadCommunicator) -> None:
        space = TableSpace(communicator, folders=[tmp_path], memory_bytes=0, device=CPU)
        with pytest.raises(UserError, match="No space left on device") as info:
            space.shared(10, 3, torch.float32)
        told.append(str(info.value))

    run_threads(2, work)
    assert len(told) == 2
    assert not list(tmp_path.iterdir())


def test_file_systems_that_know_only_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name is gone before the file is used; disks that reserve nothing are fine."""
    opened = os.open

    def refuses(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "not supported")
        return opened(path, flags, *rest, **options)

    def reserves_nothing(*arguments: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "open", refuses)
    monkeypatch.setattr(os, "posix_fallocate", reserves_nothing)
    descriptor = unnamed_file(tmp_path, 100)
    assert not list(tmp_path.iterdir())
    assert os.fstat(descriptor).st_size == 100
    os.close(descriptor)


def test_a_killed_process_leaves_nothing(tmp_path: Path) -> None:
    """A fork of this process, since a new one takes seconds to import torch."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            table = alone(tmp_path, 0).shared(1000, 10, torch.float32)
            table.write(slice(0, 1000), table.rows + 1)
            os.write(write, b"file" if table.is_file else b"none")
            signal.pause()
        finally:
            os._exit(1)
    assert os.read(read, 4) == b"file"
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not list(tmp_path.iterdir())
    os.close(read)
    os.close(write)
