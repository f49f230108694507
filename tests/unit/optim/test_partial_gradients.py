"""Steps in which some parameters have no gradient, steps that are refused, and states of before the first step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch_geometric import nn as pyg

from dngd.errors import UserError
from dngd.optim import KFACPreconditioner, NaturalGradient, capture
from dngd.optim.eigenvalues import EigenvalueCorrection
from dngd.optim.layers import linear
from tests.helpers.mutants import assert_caught

pytestmark = pytest.mark.usefixtures("one_thread")

N = 24


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (N,), generator=generator)


def network() -> Any:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def moves_of_a_bias(
    reduction: Any, update: Any, model: Any = None, call: Callable[[Tensor], Tensor] | None = None
) -> float:
    """Return how far the first bias moves in a step for which its weight was frozen."""
    net = model or network()
    first = net[0] if isinstance(net, nn.Sequential) else net
    weight = first.lin.weight if hasattr(first, "lin") else first.weight
    x, y = data()
    optimizer = NaturalGradient(net, loss_reduction=reduction, update=update)
    before = first.bias.detach().clone()
    for step in range(4):
        if step == 3:
            weight.requires_grad_(False)
            before, fixed = first.bias.detach().clone(), weight.detach().clone()
        optimizer.zero_grad()
        F.cross_entropy((call or net)(x), y, reduction=reduction).backward()
        optimizer.step(num_samples=N)
    assert torch.equal(weight, fixed)
    return float((first.bias.detach() - before).norm())


def law_a_bias_beside_a_frozen_weight() -> None:
    edge_index = torch.randint(0, N, (2, 60), generator=torch.Generator().manual_seed(2))
    for update in ("mean_gradient", "momentum", "adam_eigenbasis"):
        moves = [moves_of_a_bias(reduction, update) for reduction in ("mean", "sum")]
        assert moves[0] > 0
        assert moves[1] == pytest.approx(moves[0], rel=1e-6)
    for reduction in ("mean", "sum"):
        torch.manual_seed(1)
        conv = pyg.GCNConv(5, 3).double()
        moves.append(moves_of_a_bias(reduction, "mean_gradient", conv, lambda x, conv=conv: conv(x, edge_index)))
    assert moves[-1] == pytest.approx(moves[-2], rel=1e-6)


def test_a_bias_beside_a_frozen_weight_steps_alike_for_means_and_sums() -> None:
    def left_out(weight: Any, bias: Any) -> Tensor | None:
        return None if weight.grad is None else joined(weight, bias)

    joined = linear.join_gradient
    assert_caught(law_a_bias_beside_a_frozen_weight, linear, "join_gradient", left_out)


def law_scales_of_layers_used_by_turns() -> None:
    """Two heads, each read in every other step, weights as good as fixed: E over the steps in which each is read."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 3), nn.Linear(5, 3)

    x, y = data()
    torch.manual_seed(1)
    net = Heads().double()
    optimizer = NaturalGradient(
        net,
        method="ekfac",
        lr=1e-12,
        momentum=0.0,
        kl_clip=None,
        factor_update_period=1,
        inverse_update_period=1000,
        max_rows=None,
    )
    for step in range(161):
        optimizer.zero_grad()
        head = net.a if step % 2 == 0 else net.b
        F.cross_entropy(head(x), y).backward()
        optimizer.step(num_samples=N)
    corrected = optimizer.preconditioner.eigenvalues
    assert corrected is not None
    for name in "ab":
        scales, factors = corrected.scales(name), optimizer.preconditioner.factors()[name]
        assert scales is not None
        # Rows m and gradients g of one layer: E‖g‖²‖m‖² is what the scales add up to.
        rows = torch.cat([x, torch.ones(N, 1, dtype=x.dtype)], dim=1)
        with torch.no_grad():
            z = getattr(net, name)(x)
        gradients = z.softmax(dim=1) - F.one_hot(y, 3)
        expected = float((gradients.square().sum(dim=1) * rows.square().sum(dim=1)).mean())
        assert float(scales.sum()) == pytest.approx(expected, rel=1e-5)
        assert float(factors.G.trace()) == pytest.approx(float(gradients.square().sum(dim=1).mean()), rel=1e-5)


def test_scales_of_layers_used_by_turns() -> None:
    commit = EigenvalueCorrection.commit

    def counts_all(self: Any, rho: float, num_samples: float, factor: float, absent: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            for layer in self._layers.values():
                patch.setattr(type(layer), "has_gradient", True)
            commit(self, rho, num_samples, factor, absent)

    assert_caught(law_scales_of_layers_used_by_turns, EigenvalueCorrection, "commit", counts_all)


def test_a_step_in_which_no_layer_with_factors_has_a_gradient_is_the_plain_one() -> None:
    x, y = data()
    edge_index = torch.randint(0, N, (2, 60), generator=torch.Generator().manual_seed(2))
    torch.manual_seed(1)
    conv = pyg.GATConv(5, 3).double()
    optimizer = NaturalGradient(conv, momentum=0.0)
    for step in range(3):
        if step == 2:
            conv.lin.requires_grad_(False)
            conv.bias.requires_grad_(False)
            before = conv.att_src.detach().clone()
        optimizer.zero_grad()
        F.cross_entropy(conv(x, edge_index), y).backward()
        gradient = None if conv.att_src.grad is None else conv.att_src.grad.clone()
        optimizer.step(num_samples=N)
    assert torch.allclose(conv.att_src, before - optimizer.param_groups[0]["lr"] * gradient, rtol=1e-12)
    optimizer.zero_grad()
    with pytest.raises(UserError, match="found no gradient"):
        optimizer.step(num_samples=N, finite=True)


def weights_after_freezing(update: Any, frozen: tuple[str, ...], leftover: float | None) -> Tensor:
    """Return all weights after steps with parameters that were frozen, whose gradients were cleared or are left over.

    update: None for the preconditioner alone. leftover: what the gradients are filled with; None: cleared.
    """
    net, (x, y) = network(), data()
    optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.1)
    if update is None:
        pre = KFACPreconditioner(net, lr=0.1, kl_clip=1e-2)
    else:
        optimizer = NaturalGradient(net, update=update, weight_decay=1e-2)
        pre = optimizer.preconditioner
    kept = [net.get_parameter(name) for name in frozen]
    for step in range(8):
        if step == 3:
            for parameter in kept:
                parameter.requires_grad_(False)
                parameter.grad = None if leftover is None else torch.full_like(parameter, leftover)
            if update is None:
                optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.grad = None
        pre.forget()
        F.cross_entropy(net(x), y).backward()
        if update is None:
            assert pre.step(num_samples=N)
            optimizer.step()
        else:
            optimizer.step(num_samples=N)
    assert pre.dropped_steps == 0
    if leftover is not None:
        for parameter in kept:
            assert parameter.grad is not None
            assert torch.equal(parameter.grad, torch.full_like(parameter, leftover))
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@pytest.mark.parametrize("update", [None, "mean_gradient", "momentum", "adam_eigenbasis"])
@pytest.mark.parametrize(
    "frozen", [("0.weight", "0.bias"), ("0.weight",), ("2.weight", "2.bias"), ("2.bias",)], ids=str
)
@pytest.mark.parametrize("leftover", [0.5, float("inf")])
def test_gradients_left_over_by_frozen_parameters_change_nothing(
    update: Any, frozen: tuple[str, ...], leftover: float
) -> None:
    """It was preconditioned again and again, and took the KL clip for itself."""
    expected = weights_after_freezing(update, frozen, None)
    assert torch.equal(weights_after_freezing(update, frozen, leftover), expected)


def test_left_over_gradients_alone_are_no_step() -> None:
    net, (x, y) = network(), data()
    pre = KFACPreconditioner(net)
    F.cross_entropy(net(x), y).backward()
    pre.step(num_samples=N)
    net.requires_grad_(False)
    with pytest.raises(UserError, match="found no gradient"):
        pre.step(num_samples=N)


@pytest.mark.parametrize("module", [lambda: nn.LayerNorm(5), lambda: nn.Embedding(N, 5), lambda: pyg.GCNConv(5, 5)])
def test_left_over_gradients_of_each_kind_of_layer(module: Callable[[], nn.Module]) -> None:
    net = nn.ModuleDict({"first": module(), "out": nn.Linear(5, 3)}).double()
    x, y = data()
    edge_index = torch.randint(0, N, (2, 60), generator=torch.Generator().manual_seed(2))
    first: Any = net["first"]
    pre = KFACPreconditioner(net)
    if isinstance(first, nn.Embedding):
        hidden = first(torch.arange(N))
    else:
        hidden = first(x, edge_index) if isinstance(first, pyg.GCNConv) else first(x)
    F.cross_entropy(net["out"](hidden), y).backward()
    first.requires_grad_(False)
    before = [p.grad.clone() for p in first.parameters()]
    assert pre.layers["first"].gradient() is None
    assert not pre.layers["first"].has_gradient
    pre.step(num_samples=N)
    assert all(torch.equal(p.grad, kept) for p, kept in zip(first.parameters(), before))


@pytest.mark.parametrize("update", ["mean_gradient", "momentum", "adam_eigenbasis"])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -5])
def test_a_step_that_is_refused_changes_nothing(update: Any, wrong: float) -> None:
    """At a factor step (the third) and at another (the fourth), and a right call goes on from there."""

    def weights(refused_at: int | None) -> Tensor:
        net, (x, y) = network(), data()
        optimizer = NaturalGradient(net, update=update, loss_reduction="sum")
        for step in range(5):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y, reduction="sum").backward()
            if step == refused_at:
                with pytest.raises(UserError, match="is out of range; give the number of seeds"):
                    optimizer.step(num_samples=wrong)
            optimizer.step(num_samples=N)
        return torch.cat([p.detach().flatten() for p in net.parameters()])

    expected = weights(None)
    assert torch.equal(weights(2), expected)
    assert torch.equal(weights(3), expected)


def test_outputs_that_were_forgotten_may_be_told_late() -> None:
    def weights(forgets: bool) -> Tensor:
        net, (x, y) = network(), data()
        optimizer = NaturalGradient(net, fisher="monte_carlo")
        for step in range(3):
            optimizer.zero_grad()
            outputs = net(x)
            F.cross_entropy(outputs, y).backward(retain_graph=True)
            if forgets and step == 2:
                with pytest.raises(UserError, match="call observe"):
                    optimizer.step(num_samples=N)
            optimizer.observe(outputs)
            optimizer.step(num_samples=N)
        return torch.cat([p.detach().flatten() for p in net.parameters()])

    assert torch.equal(weights(True), weights(False))


def law_a_module_used_again_and_again_under_checkpoints(reentrant: bool) -> None:
    """Each of its calls is measured, although torch makes all of them anew before its weight has a gradient."""
    x, y = data()

    def factors(with_checkpoint: bool) -> Any:
        torch.manual_seed(1)
        net = nn.ModuleDict({"in": nn.Linear(5, 7), "again": nn.Linear(7, 7), "out": nn.Linear(7, 3)}).double()
        optimizer = NaturalGradient(net)

        def inner(hidden: Tensor) -> Tensor:
            out: Tensor = torch.tanh(net["again"](hidden))
            return out

        for _ in range(3):
            optimizer.zero_grad()
            hidden = net["in"](x)
            for _ in range(4):
                hidden = checkpoint(inner, hidden, use_reentrant=reentrant) if with_checkpoint else inner(hidden)
            F.cross_entropy(net["out"](hidden), y).backward()
            optimizer.step(num_samples=N)
        counts = {name: state.folded.counts.tolist() for name, state in optimizer.preconditioner.states.items()}
        return optimizer.preconditioner.factors(), counts

    (found, found_counts), (expected, expected_counts) = factors(True), factors(False)
    for name in ("in", "again", "out"):
        assert found_counts[name] == pytest.approx(expected_counts[name])
        assert torch.allclose(found[name].A, expected[name].A, rtol=1e-9)
        assert torch.allclose(found[name].G, expected[name].G, rtol=1e-9)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_module_used_again_and_again_under_checkpoints(reentrant: bool) -> None:
    law_a_module_used_again_and_again_under_checkpoints(reentrant)
    if reentrant:
        return  # there each call's backward pass leaves a gradient before the next call is made anew

    assert_caught(
        lambda: law_a_module_used_again_and_again_under_checkpoints(False),
        capture,
        "_is_inside_backward",
        lambda: False,
    )


@pytest.mark.parametrize("fisher", ["empirical", "monte_carlo", "ggn"])
def test_activation_checkpoints_do_not_change_the_factors(fisher: Any) -> None:
    x, y = data()

    def factors(with_checkpoint: bool) -> Any:
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 3)).double()
        optimizer = NaturalGradient(net, fisher=fisher)
        for _ in range(3):
            optimizer.zero_grad()
            hidden = net[0](x)
            inner = net[1:4]
            hidden = checkpoint(inner, hidden, use_reentrant=False) if with_checkpoint else inner(hidden)
            outputs = net[4](hidden)
            if fisher != "empirical":
                optimizer.observe(outputs)
            F.cross_entropy(outputs, y).backward()
            optimizer.step(num_samples=N)
        return optimizer.preconditioner.factors()

    found, expected = factors(True), factors(False)
    for name in ("0", "2", "4"):
        assert torch.allclose(found[name].A, expected[name].A, rtol=1e-12)
        assert torch.allclose(found[name].G, expected[name].G, rtol=1e-12)


@pytest.mark.parametrize("options", [{}, {"method": "ekfac"}, {"damping_mode": "tikhonov"}, {"max_rows": 5}], ids=str)
@pytest.mark.parametrize("num_steps", [0, 1, 2, 3, 11])
@pytest.mark.parametrize("inputs", ["constant", "anew", "switch"])
def test_a_state_is_gone_on_with_bitwise(num_steps: int, options: dict[str, Any], inputs: str) -> None:
    """An input that never changes, of which each step reaches other rows: A is its latest value, not a mean. One that
    is made anew in each step, or changes right after the state was saved, is no such input."""
    x, y = data()

    def begin() -> tuple[Any, NaturalGradient]:
        net = network()
        return net, NaturalGradient(net, **options)

    def train(net: Any, optimizer: NaturalGradient, first: int, last: int) -> None:
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            seeds = torch.randperm(N, generator=generator)[:6]
            optimizer.zero_grad()
            given = {"constant": x, "anew": x.clone(), "switch": x if step < num_steps else switched}[inputs]
            F.cross_entropy(net(given)[seeds], y[seeds]).backward()
            optimizer.step(num_samples=6)

    switched = x.flip(0)
    net, optimizer = begin()
    train(net, optimizer, 0, num_steps)
    saved = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    train(net, optimizer, num_steps, 15)
    other, restored = begin()
    other.load_state_dict(saved[0])
    restored.load_state_dict(saved[1])
    again = restored.state_dict()["preconditioner"]
    assert all(torch.equal(t, again[key]) for key, t in saved[1]["preconditioner"].items() if key != "shared.plan")
    train(other, restored, num_steps, 15)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters()))
    found, expected = restored.preconditioner.factors()["0"], optimizer.preconditioner.factors()["0"]
    assert torch.equal(found.A, expected.A)
    assert torch.equal(found.G, expected.G)
