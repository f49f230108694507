"""Buffers of a module in a world of several ranks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dngd.train.buffers import RunningStatistics, share_buffers
from tests.helpers.mutants import assert_caught
from tests.helpers.thread_world import run_threads

SHARDS = 4
STEPS = 3


def make_net(momentum: float | None) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, momentum=momentum), nn.LayerNorm(5))


def shard_rows(step: int, shard: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + shard)
    return torch.randn(6, 4, generator=generator) + shard


def trained_statistics(communicator: Any, made: nn.Sequential, empty: tuple[int, ...] = ()) -> list[Tensor]:
    """made: alike at all ranks, which share one random stream here."""
    net = copy.deepcopy(made)
    statistics = RunningStatistics(net, communicator)
    own = SHARDS // communicator.world_size
    for step in range(STEPS):
        statistics.begin_step()
        for shard in range(own * communicator.rank, own * (communicator.rank + 1)):
            if shard not in empty:
                net(shard_rows(step, shard))
                statistics.end_shard()
        statistics.end_step(finite=step != 1)
    return [buffer.clone() for buffer in net.buffers()]


def expected_statistics(momentum: float) -> tuple[Tensor, Tensor]:
    """The mean over the shards of what torch's rule makes of each; step 1 was dropped."""
    net = make_net(momentum)
    mean, variance = torch.zeros(5), torch.ones(5)
    for step in (0, 2):
        hidden = [net[0](shard_rows(step, shard)).detach() for shard in range(SHARDS)]
        mean = (1 - momentum) * mean + momentum * torch.stack([h.mean(0) for h in hidden]).mean(0)
        variance = (1 - momentum) * variance + momentum * torch.stack([h.var(0) for h in hidden]).mean(0)
    return mean, variance


def law_statistics_are_the_shards_mean(world: int) -> None:
    made = make_net(0.2)
    for mean, variance, steps in run_threads(world, lambda comm: trained_statistics(comm, made)):
        for found, expected in zip((mean, variance), expected_statistics(0.2)):
            assert torch.allclose(found, expected, atol=1e-6)
        assert int(steps) == 2, "a step, not a shard"


@pytest.mark.parametrize("world", [1, 2, 4])
def test_statistics_are_the_shards_mean(world: int) -> None:
    law_statistics_are_the_shards_mean(world)

    def goes_on(self: RunningStatistics) -> None:
        self._changes[-1] += 1

    assert_caught(lambda: law_statistics_are_the_shards_mean(world), RunningStatistics, "end_shard", goes_on)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_shard_without_seeds_has_no_part(momentum: float | None) -> None:
    """None: the mean of all steps, which goes by their count, on a rank without a shard too."""
    made = make_net(momentum)
    worlds = [run_threads(world, lambda comm: trained_statistics(comm, made, (2, 3))) for world in (1, 2, 4)]
    whole = worlds[0][0]
    for ranks in worlds[1:]:
        for found in ranks:
            assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, whole))


def test_every_rank_gets_rank_0s_buffers_however_they_lie_in_memory() -> None:
    def work(communicator: Any) -> list[Tensor]:
        module = nn.Module()
        module.register_buffer("turned", torch.full((2, 3), float(communicator.rank)).T)
        module.register_buffer("number", torch.tensor(communicator.rank))
        share_buffers(module, communicator)
        return list(module.buffers())

    for turned, number in run_threads(2, work):
        assert torch.equal(turned, torch.zeros(3, 2))
        assert int(number) == 0
