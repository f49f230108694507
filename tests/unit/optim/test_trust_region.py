"""The KL clip that follows measured divergences: its arithmetic, its place in the optimizer, what it holds to."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dngd.comm import LocalCommunicator
from dngd.errors import UserError
from dngd.optim import HyperbolicDecay, KLTrustRegion, NaturalGradient
from dngd.optim.trust import mean_divergence
from tests.helpers.mutants import assert_caught
from tests.helpers.thread_world import ThreadCommunicator, run_threads


def test_the_ratio_follows_measurements_within_its_limits() -> None:
    region = KLTrustRegion(0.1, ratio=1.0, weight=0.5, low=0.3, high=30.0)
    assert region(7) == pytest.approx(0.2)
    assert region.update(0.02, 0.01) == pytest.approx(math.sqrt(2.0))
    assert region.update(0.02, 0.02 / math.sqrt(2.0)) == pytest.approx(math.sqrt(2.0))  # as predicted: it stays
    assert region.update(math.inf, 0.01) == pytest.approx(2 * math.sqrt(2.0))
    assert region.update(math.nan, 0.01) == pytest.approx(4 * math.sqrt(2.0))
    before = region.ratio
    for measured, predicted in ((0.1, 0.0), (0.0, 0.1), (-1e-18, 0.1), (0.1, math.nan)):
        assert region.update(measured, predicted) == before
    for _ in range(20):
        region.update(1.0, 1e-6)
    assert region.ratio == 30.0
    for _ in range(20):
        region.update(1e-9, 1.0)
    assert region.ratio == 0.3


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"bound": 0.0}, "bound=0.0"),
        ({"bound": lambda step: -1.0}, "KL divergence above 0"),
        ({"period": 0}, "period=0"),
        ({"ratio": 0.1}, "ratio 0.1"),
        ({"high": math.inf}, "high=inf"),
        ({"weight": 0.0}, "weight=0.0"),
        ({"weight": 1.5}, "weight=1.5"),
    ],
)
def test_arguments_out_of_range_are_named(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        KLTrustRegion(**arguments)


def law_divergence(mean_divergence: Callable[..., float]) -> None:
    """The mean over rows of torch's own divergences of the distributions, in float64."""
    torch.manual_seed(0)
    before, after = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    softmax = torch.distributions.Categorical
    expected = torch.distributions.kl_divergence(softmax(logits=before), softmax(logits=after)).mean()
    assert mean_divergence(before, after) == pytest.approx(float(expected), rel=1e-12)
    bernoulli = torch.distributions.Bernoulli
    each = torch.distributions.kl_divergence(bernoulli(logits=before), bernoulli(logits=after))
    assert mean_divergence(before, after, "binary_cross_entropy") == pytest.approx(float(each.sum(1).mean()), rel=1e-12)
    normal = torch.distributions.Normal
    each = torch.distributions.kl_divergence(normal(before, 0.5**0.5), normal(after, 0.5**0.5))
    assert mean_divergence(before, after, "squared_error") == pytest.approx(float(each.sum(1).mean()), rel=1e-12)
    assert mean_divergence(before, before) == mean_divergence(before[:0], after[:0]) == 0.0


def test_divergence() -> None:
    law_divergence(mean_divergence)


def test_mutants_of_the_divergence_are_caught() -> None:
    def other_way_round(before: Tensor, after: Tensor, *loss: Any) -> float:
        return mean_divergence(after, before, *loss)

    def always_softmax(before: Tensor, after: Tensor, *loss: Any) -> float:
        return mean_divergence(before, after)

    for mutant in (other_way_round, always_softmax):
        with pytest.raises(AssertionError):
            law_divergence(mutant)


def make_net() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(5, 3)


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    return torch.randn(24, 5), torch.randint(3, (24,))


def take_step(net: nn.Linear, optimizer: NaturalGradient) -> float:
    """Take a step and, where it is due, measure it; return the measured divergence."""
    x, y = batch()
    is_due = optimizer.is_clip_due
    optimizer.zero_grad()
    before = net(x)
    F.cross_entropy(before, y).backward()
    optimizer.step(num_samples=24)
    with torch.no_grad():
        after = net(x)
    if is_due:
        assert optimizer.adapt_clip(before, after) == pytest.approx(mean_divergence(before, after))
    return mean_divergence(before, after)


def test_the_prediction_is_half_the_squared_length_of_the_step() -> None:
    """(ην)²⟨v, ∇⟩/2, from the parameters' own change and the gradient."""
    net = make_net()
    optimizer = NaturalGradient(net, 0.5, momentum=0.0, kl_clip=KLTrustRegion(0.01))
    x, y = batch()
    F.cross_entropy(net(x), y).backward()
    gradients = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    old = [p.detach().clone() for p in net.parameters()]
    optimizer.step(num_samples=24)
    moved = [p.detach() - q for p, q in zip(net.parameters(), old)]
    length = 0.5 * float(optimizer.preconditioner.last_scale)
    inner = -sum(float((m * g).sum()) for m, g in zip(moved, gradients))
    optimizer.param_groups[0]["lr"] = 7.0  # as a scheduler may have done since
    assert optimizer.preconditioner.predicted_divergence() == pytest.approx(length * inner / 2, rel=1e-5)


@pytest.mark.parametrize("first", [True, False])
def test_a_dropped_step_tells_nothing(first: bool) -> None:
    net = make_net()
    region = KLTrustRegion(0.01, period=1)
    optimizer = NaturalGradient(net, 1.0, kl_clip=region)
    if not first:
        take_step(net, optimizer)
    ratio = region.ratio
    x, y = batch()
    optimizer.zero_grad()
    before = net(x)
    F.cross_entropy(before, y).backward()
    optimizer.step(num_samples=24, finite=False)
    with torch.no_grad():
        after = net(x)
    assert optimizer.adapt_clip(before, after) == 0.0
    assert region.ratio == ratio


def law_bound() -> None:
    """Once measured, steps that the bound binds diverge by about as much as it, though the rate is far too high and
    the first prediction was off by a factor."""
    net = make_net()
    region = KLTrustRegion(0.01, period=1, ratio=30.0)
    optimizer = NaturalGradient(net, 50.0, kl_clip=region, factor_update_period=1, inverse_update_period=1)
    first, *others = [take_step(net, optimizer) for _ in range(12)]
    assert first < 0.003  # the ratio that it begins with takes the steps for far longer than they are
    assert all(0.005 < measured < 0.02 for measured in others[5:])


def test_bound() -> None:
    law_bound()


def test_mutant_that_never_learns_is_caught() -> None:
    assert_caught(law_bound, KLTrustRegion, "update", lambda self, measured, predicted: self.ratio)


def test_a_rank_without_logits_takes_part() -> None:
    """Two of three ranks give logits, one more of them than the other; all have the mean over rows."""
    x, _ = batch()
    net = make_net()
    before, after = net(x), net(x * 1.1)
    parts = [(before[:8], after[:8]), (before[8:], after[8:]), (None, None)]

    def work(comm: ThreadCommunicator) -> tuple[float, float]:
        own = make_net()
        region = KLTrustRegion(HyperbolicDecay(0.01, steps=5))
        optimizer = NaturalGradient(own, 0.1, kl_clip=region, communicator=comm)
        own_x, own_y = batch()
        F.cross_entropy(own(own_x), own_y).backward()
        optimizer.step(num_samples=24, finite=True)
        measured = optimizer.adapt_clip(*parts[comm.rank])
        return measured, region.ratio

    results = run_threads(3, work)
    assert [measured for measured, _ in results] == pytest.approx([mean_divergence(before, after)] * 3)
    assert results[0] == results[1] == results[2]


def test_the_ratio_is_part_of_the_state() -> None:
    net = make_net()
    optimizer = NaturalGradient(net, 1.0, kl_clip=KLTrustRegion(0.01))
    take_step(net, optimizer)
    clip = optimizer.preconditioner.kl_clip
    assert isinstance(clip, KLTrustRegion)
    assert clip.ratio != 3.0
    other = NaturalGradient(make_net(), 1.0, kl_clip=KLTrustRegion(0.01))
    other.load_state_dict(optimizer.state_dict())
    restored = other.preconditioner.kl_clip
    assert isinstance(restored, KLTrustRegion)
    assert restored.ratio == clip.ratio


def test_only_a_trust_region_is_adapted() -> None:
    plain = NaturalGradient(make_net(), communicator=LocalCommunicator())
    assert not plain.is_clip_due
    with pytest.raises(UserError, match="KLTrustRegion"):
        plain.adapt_clip(None, None)
    with_momentum = NaturalGradient(make_net(), update="momentum", kl_clip=KLTrustRegion())
    with pytest.raises(UserError, match=r"momentum=0\.9"):
        with_momentum.adapt_clip(None, None)
