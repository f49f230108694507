"""A step's gradients in one buffer: what is reduced, divided and told."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dngd.comm import FlatGradients, LocalCommunicator, shards_of_rank
from dngd.errors import UserError
from tests.helpers.mutants import assert_caught
from tests.helpers.thread_world import run_threads


def flat(net: nn.Module) -> FlatGradients:
    gradients = FlatGradients(net.parameters())
    gradients.zero_()
    return gradients


def test_sums_are_divided_and_told() -> None:
    net = nn.Linear(3, 2)
    gradients = flat(net)
    for size, loss in ((4, 8.0), (6, 5.0)):
        for parameter in net.parameters():
            assert parameter.grad is not None
            parameter.grad += size
        gradients.add_loss_(torch.tensor(loss), size)
    sums = gradients.reduce_(LocalCommunicator())
    assert (sums.loss_sum, sums.num_seeds, sums.finite, sums.stop) == (13.0, 10.0, True, False)
    for parameter in net.parameters():
        assert torch.equal(parameter.grad, torch.ones_like(parameter))  # type: ignore[arg-type]
    gradients.zero_()
    gradients.ask_to_stop_()
    gradients.add_loss_(torch.tensor(0.0), 0)
    sums = gradients.reduce_(LocalCommunicator())
    assert (sums.num_seeds, sums.finite, sums.stop) == (0.0, True, True)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", ["first", "last", "loss"])
def test_what_is_not_finite_is_told(wrong: float, place: str) -> None:
    net = nn.Linear(3, 2)
    gradients = flat(net)
    assert net.weight.grad is not None
    assert net.bias.grad is not None
    if place == "first":
        net.weight.grad[0, 0] = wrong
    if place == "last":
        net.bias.grad[-1] = wrong
    gradients.add_loss_(torch.tensor(wrong if place == "loss" else 1.0), 4)
    assert not gradients.reduce_(LocalCommunicator()).finite


class Zeroing(torch.optim.SGD):
    """Ends its step as some optimizers do."""

    def step(self, closure: Any = None) -> Any:
        out = super().step(closure)
        self.zero_grad()
        return out


SHARDS, STEPS = 2, 4


def curve(communicator: Any, made: nn.Module, kind: type[torch.optim.SGD]) -> list[Tensor]:
    """The weights after each step, of shards of other sizes. made: alike at all ranks."""
    net = copy.deepcopy(made)
    optimizer = kind(net.parameters(), lr=0.1, momentum=0.9)
    gradients, weights = FlatGradients(net.parameters(), net), []
    for step in range(STEPS):
        gradients.zero_()
        for shard in shards_of_rank(SHARDS, communicator.rank, communicator.world_size):
            rows = torch.randn(3 + shard, 3, generator=torch.Generator().manual_seed(SHARDS * step + shard))
            loss = net(rows).square().sum()
            loss.backward()
            gradients.add_loss_(loss, len(rows))
        gradients.reduce_(communicator)
        optimizer.step()
        weights.append(torch.cat([p.detach().flatten().clone() for p in net.parameters()]))
    return weights


def law_an_optimizer_may_forget_gradients(world: int) -> None:
    made = nn.Linear(3, 2)
    forgets = run_threads(world, lambda communicator: curve(communicator, made, Zeroing))
    keeps = run_threads(world, lambda communicator: curve(communicator, made, torch.optim.SGD))
    for one, other in zip(forgets, keeps):
        assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("world", [1, 2])
def test_an_optimizer_that_sets_gradients_to_none_takes_the_same_steps(
    monkeypatch: pytest.MonkeyPatch, world: int
) -> None:
    law_an_optimizer_may_forget_gradients(world)
    monkeypatch.setattr(FlatGradients, "_refusal", lambda self: "")

    def forgets(self: FlatGradients) -> None:
        self._flat.zero_()

    assert_caught(lambda: law_an_optimizer_may_forget_gradients(world), FlatGradients, "zero_", forgets)


def replaced(net: nn.Sequential) -> None:
    net[0].weight.grad = torch.ones_like(net[0].weight)


def forgotten(net: nn.Sequential) -> None:
    net[0].zero_grad()


def unfrozen(net: nn.Sequential) -> None:
    net[1].requires_grad_(True)
    net(torch.ones(1, 3)).sum().backward()


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replaced, r"the gradient of parameter 0\.weight was replaced or set to None within a step"),
        (forgotten, r"the gradient of parameter 0\.weight was replaced or set to None within a step"),
        (unfrozen, r"parameter 1\.weight was frozen when the run was set up and got a gradient.*; unfreeze it before"),
    ],
)
def test_a_gradient_that_is_not_in_the_buffer_is_refused_by_all_ranks(
    world: int, change: Callable[[nn.Sequential], None], message: str
) -> None:
    """Also where one rank alone has it: callbacks are rank 0's."""

    def work(communicator: Any) -> str:
        net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2).requires_grad_(False))
        net[1].weight.grad = torch.ones(2, 2)  # left over
        gradients = FlatGradients((p for p in net.parameters() if p.requires_grad), net)
        gradients.zero_()
        if communicator.rank == world - 1:
            gradients.ask_to_stop_()
        assert gradients.reduce_(communicator).stop
        gradients.zero_()
        if communicator.rank == 0:
            change(net)
        with pytest.raises(UserError, match=message) as told:
            gradients.reduce_(communicator)
        return str(told.value)

    assert len(set(run_threads(world, work))) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sums_are_exact_whatever_the_parameters_type(dtype: torch.dtype) -> None:
    def work(communicator: Any) -> tuple[float, float, bool]:
        net = nn.Linear(3, 2).to(dtype)
        gradients = flat(net)
        for _ in range(4):
            gradients.add_loss_(torch.tensor(3.0, dtype=dtype), 257)
        for parameter in net.parameters():
            assert parameter.grad is not None
            parameter.grad += 257
        sums = gradients.reduce_(communicator)
        for parameter in net.parameters():
            assert parameter.grad is not None
            assert float(parameter.grad.mean()) == pytest.approx(0.25, rel=1e-2)
        return sums.loss_sum, sums.num_seeds, sums.finite

    for world in (1, 2):
        assert run_threads(world, work) == [(12.0 * world, 1028.0 * world, True)] * world
