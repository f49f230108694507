"""The weights' running mean: its values, what it leaves of the module, and its state."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dngd.errors import UserError
from dngd.optim import WeightAverage


def module() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    return net.double()


def train(net: nn.Module, average: WeightAverage, steps: int) -> list[dict[str, torch.Tensor]]:
    """Move all weights and buffers; return what they were after each step."""
    seen = []
    for step in range(steps):
        torch.manual_seed(step)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(torch.randn_like(parameter))
        net(torch.randn(8, 3, dtype=torch.float64))
        average.update()
        seen.append({name: tensor.clone() for name, tensor in net.state_dict().items()})
    return seen


@settings(deadline=None)
@given(st.floats(0.05, 1.0), st.integers(0, 5), st.integers(1, 12))
def test_the_mean_is_the_products_written_out(share: float, begin: int, steps: int) -> None:
    net = module()
    average = WeightAverage(net, share, begin)
    seen = train(net, average, steps)
    # Step s keeps 1/(1 + share·(s - begin)) of itself, of which each later step t leaves 1 - 1/(1 + share·(t - begin)).
    taken = [1 / (1 + share * max(0, t - begin)) for t in range(steps)]
    weights = []
    for s in range(steps):
        weight = taken[s]
        for t in range(s + 1, steps):
            weight *= 1 - taken[t]
        weights.append(weight)
    assert sum(weights) == pytest.approx(1)
    with average.applied():
        held = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    parameters = dict(net.named_parameters())
    for name, tensor in held.items():
        if name in parameters:
            expected = sum(w * entry[name] for w, entry in zip(weights, seen))
            torch.testing.assert_close(tensor, expected, rtol=1e-12, atol=1e-12)
        else:  # buffers stay as they are
            assert torch.equal(tensor, seen[-1][name])


def test_a_share_of_one_is_the_plain_mean_and_the_age_is_as_said() -> None:
    net = nn.Linear(1, 1, bias=False).double()
    for share in (1.0, 0.5, 0.25):
        average = WeightAverage(net, share, begin=7)
        steps = 4000
        for step in range(steps):
            net.weight.data.fill_(float(step))
            average.update()
        with average.applied():
            age = steps - net.weight.item()
        assert age / steps == pytest.approx(share / (1 + share), rel=0.01)


def test_the_module_has_its_own_weights_again_bit_for_bit() -> None:
    net = module()
    average = WeightAverage(net, 0.3, begin=2)
    train(net, average, 5)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    places = [parameter.data_ptr() for parameter in net.parameters()]

    def fail() -> None:
        with average.applied():
            assert not torch.equal(net[0].weight, before["0.weight"])
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        fail()
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert places == [parameter.data_ptr() for parameter in net.parameters()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex64])
def test_short_and_complex_parameters(dtype: torch.dtype) -> None:
    """A 16-bit mean would stand still: its steps round to nothing."""
    net = nn.Linear(2, 1, bias=False).to(dtype)
    average = WeightAverage(net, 0.3)
    for value, steps in ((1.0, 100), (1.05, 5000)):
        net.weight.data.fill_(value)
        for _ in range(steps):
            average.update()
    last = net.weight.clone()
    with average.applied():
        assert complex(net.weight[0, 0]).real == pytest.approx(1.05, abs=0.005)
    assert torch.equal(net.weight, last)


def test_buffers_that_are_infinite_or_come_later_do_no_harm() -> None:
    net = module()
    net.register_buffer("mask", torch.tensor([0.0, -torch.inf]).expand(3, 2))
    average = WeightAverage(net, 0.3, begin=0)
    train(net, average, 3)
    net.register_buffer("late", torch.ones(2))
    average.update()
    with average.applied():
        assert net.mask[0].tolist() == [0.0, -torch.inf]
        assert all(bool(torch.isfinite(p).all()) for p in net.parameters())


def test_before_the_first_step_there_is_nothing_to_average() -> None:
    net = module()
    average = WeightAverage(net, 0.3)
    with torch.no_grad():
        net[0].weight.fill_(5.0)
    with average.applied():
        assert bool((net[0].weight == 5).all())


def test_a_state_goes_on_bitwise() -> None:
    net, other = module(), module()
    average = WeightAverage(net, 0.3, begin=2)
    train(net, average, 4)
    saved = {name: tensor.clone() for name, tensor in average.state_dict().items()}
    weights = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    train(net, average, 7)
    again = WeightAverage(other, 0.3, begin=2)
    other.load_state_dict(weights)
    again.load_state_dict(saved)
    train(other, again, 7)
    for name, tensor in average.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_a_state_of_another_model_is_refused() -> None:
    average = WeightAverage(module())
    with pytest.raises(UserError, match="another model"):
        average.load_state_dict(WeightAverage(nn.Linear(3, 4)).state_dict())
    with pytest.raises(UserError, match="another model"):
        average.load_state_dict({})


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(UserError, match="no share of the steps"):
        WeightAverage(module(), share)


def test_steps_before_the_beginning_are_no_steps() -> None:
    with pytest.raises(UserError, match="begin=-1"):
        WeightAverage(module(), begin=-1)
    with pytest.raises(UserError, match="begin=nan"):
        WeightAverage(module(), begin=float("nan"))  # type: ignore[arg-type]


def test_it_is_one_more_copy() -> None:
    net = module()
    sizes = (t.numel() * t.element_size() for t in net.parameters())
    assert WeightAverage(net).nbytes == sum(sizes)
