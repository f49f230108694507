"""The process groups that communicators stand on, in one process, with torch's backend that does nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from dngd.comm import ProcessGroupCommunicator, current_communicator, destroy_process_group
from dngd.optim import KFACPreconditioner


@pytest.fixture
def world() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    if dist.is_initialized():
        destroy_process_group()


def num_groups() -> int:
    return len(dist.distributed_c10d._world.pg_map)


def groups_of(communicator: object) -> dict[str, object]:
    assert isinstance(communicator, ProcessGroupCommunicator)
    return dict(communicator._groups)


@pytest.mark.usefixtures("world")
def test_preconditioners_share_their_groups() -> None:
    """Torch's groups do not end by themselves: a sweep in one process would collect threads and sockets."""
    before = num_groups()
    for _ in range(5):
        KFACPreconditioner(nn.Linear(3, 2)).close()
    assert num_groups() == before + 2


@pytest.mark.usefixtures("world")
def test_another_limit_has_groups_of_its_own() -> None:
    first, again = (groups_of(current_communicator(timeout_seconds=30)) for _ in range(2))
    other = groups_of(current_communicator(timeout_seconds=31))
    assert first == again
    assert first["main"] is not first["factor"]
    assert not set(map(id, first.values())) & set(map(id, other.values()))


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("by_dngd", [False, True])
def test_a_new_default_group_has_new_groups(by_dngd: bool) -> None:
    old = groups_of(current_communicator())
    destroy_process_group() if by_dngd else dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    new = groups_of(current_communicator())
    assert not set(map(id, old.values())) & set(map(id, new.values()))


class _Counted:
    """Work whose waits are counted."""

    waits = 0

    def wait(self) -> None:
        _Counted.waits += 1


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("on_gpu", [False, True])
def test_collectives_on_gpus_are_waited_for_when_they_are_issued(monkeypatch: pytest.MonkeyPatch, on_gpu: bool) -> None:
    """By the stream alone, before another group's are issued; on a CPU that would take from what overlaps."""
    communicator = ProcessGroupCommunicator()
    communicator._on_gpu = on_gpu
    monkeypatch.setattr(_Counted, "waits", 0)
    for name in ("all_reduce", "broadcast", "all_to_all_single", "all_gather"):
        monkeypatch.setattr(dist, name, lambda *_, **__: _Counted())
    flat = torch.ones(4)
    communicator.all_reduce(flat, "factor", group="factor")
    communicator.broadcast(flat, 0, "state", group="factor")
    communicator.exchange(flat, "state")
    work = communicator.all_gather(flat, "state")[1]
    assert _Counted.waits == (4 if on_gpu else 0)
    work.wait()
    assert _Counted.waits == (5 if on_gpu else 1)
