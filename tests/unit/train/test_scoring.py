"""Metrics against scikit-learn's, over blocks and ranks; losses with weights and several labels a node."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dngd.comm import LocalCommunicator
from dngd.errors import UserError
from dngd.train.objective import Objective
from dngd.train.scoring import Metric, Scores, Tally, scores_of_tallies
from tests.helpers.thread_world import run_threads

CPU = torch.device("cpu")
CASES = ("binary", "classes", "several")


def nodes(case: str) -> tuple[Objective, Tensor, Tensor, int]:
    generator = torch.Generator().manual_seed(3)
    classes = {"binary": 2, "classes": 5, "several": 4}[case]
    # Rounded: equal scores are what goes wrong in such formulas.
    outputs = (torch.randn(157, classes, generator=generator) * 2).round() / 2
    if case == "several":
        labels = (torch.rand(157, classes, generator=generator) < 0.3).to(torch.int8)
        return Objective(is_multilabel=True), outputs, labels, classes
    labels = torch.randint(0, classes, (157,), generator=generator)
    return Objective(), outputs, labels, classes


def expected(metric: str, case: str, outputs: Tensor, labels: Tensor) -> float:
    sk: Any = pytest.importorskip("sklearn.metrics")
    several = case == "several"
    predicted = (outputs > 0).int() if several else outputs.argmax(dim=1)
    if metric == "accuracy":
        return float((predicted == labels).double().mean())
    if metric == "macro_f1":
        return float(sk.f1_score(labels, predicted, average="macro"))
    function = {"roc_auc": sk.roc_auc_score, "average_precision": sk.average_precision_score}[metric]
    if case == "binary":
        return float(function(labels, outputs[:, 1] - outputs[:, 0]))
    # Rounded, so that probabilities that are equal but for the order of their sums are equal.
    scores = outputs if several else outputs.double().softmax(dim=1).round(decimals=12)
    rows = labels if several else F.one_hot(labels)
    return float(function(rows, scores, average="macro"))


def scored(
    metric: Any, objective: Objective, outputs: Tensor, labels: Tensor, classes: int, communicator: Any
) -> Scores:
    tally = Tally(objective, metric, classes)
    mine = torch.arange(len(outputs))[communicator.rank :: communicator.world_size]
    for block in mine.split(40):
        tally.add(outputs[block], labels[block])
    (found,) = scores_of_tallies([tally], objective, metric, communicator, CPU)
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("metric", get_args(Metric))
def test_metrics_are_scikit_learns(metric: Metric, case: str) -> None:
    objective, outputs, labels, classes = nodes(case)
    found = scored(metric, objective, outputs, labels, classes, LocalCommunicator())
    assert found.accuracy == pytest.approx(expected(metric, case, outputs, labels), abs=1e-12)
    together = run_threads(3, lambda comm: scored(metric, objective, outputs, labels, classes, comm))
    assert {round(score.accuracy, 12) for score in together} == {round(found.accuracy, 12)}
    assert together[0].loss == pytest.approx(found.loss)


@pytest.mark.parametrize("metric", ["roc_auc", "average_precision"])
def test_certain_outputs_keep_their_order(metric: Metric) -> None:
    """A probability that rounds to 1 is still below one that is nearer to it."""
    outputs = torch.zeros(6, 3)
    outputs[:, 0] = torch.arange(50.0, 110.0, 10.0)
    labels = torch.tensor([1, 1, 1, 0, 0, 0])
    # Class 0 is ranked without a mistake, and class 1 in the same order of the nodes.
    assert scored(metric, Objective(), outputs, labels, 3, LocalCommunicator()).accuracy == pytest.approx(1.0)


def test_outputs_that_are_no_numbers_rank_nobody() -> None:
    """Whatever the order of the nodes: such an evaluation must not be the best."""
    outputs = torch.full((10, 2), float("nan"))
    for labels in (torch.arange(10) < 5, torch.arange(10) >= 5, torch.arange(10) < 2):
        for metric, value in (("roc_auc", 0.5), ("average_precision", float(labels.double().mean()))):
            found = scored(metric, Objective(), outputs, labels.long(), 2, LocalCommunicator())
            assert found.accuracy == pytest.approx(value)


@pytest.mark.parametrize("case", CASES)
def test_outputs_that_are_no_numbers_predict_nothing(case: str) -> None:
    """Whichever class argmax makes of them, or 0 of a label of several."""
    objective, outputs, labels, classes = nodes(case)
    half, whole = outputs.clone(), torch.full_like(outputs, float("nan"))
    half[::2] = float("nan")
    for metric in ("accuracy", "macro_f1"):
        found = scored(metric, objective, whole, labels, classes, LocalCommunicator())
        assert (found.accuracy, found.predicted) == (0.0, 0.0)
        together = run_threads(3, lambda comm, metric=metric: scored(metric, objective, half, labels, classes, comm))
        assert {round(score.predicted, 12) for score in together} == {round(78 / 157, 12)}
    right = expected("accuracy", case, outputs[1::2], labels[1::2]) * len(outputs[1::2]) / len(outputs)
    assert scored("accuracy", objective, half, labels, classes, LocalCommunicator()).accuracy == pytest.approx(right)
    # macro-F1 with a class more, that the nodes without a prediction are predicted as and none is.
    if case != "several":
        sk: Any = pytest.importorskip("sklearn.metrics")
        predicted = outputs.argmax(dim=1)
        predicted[::2] = classes
        wanted = sk.f1_score(labels, predicted, average="macro", labels=range(classes))
        found = scored("macro_f1", objective, half, labels, classes, LocalCommunicator())
        assert found.accuracy == pytest.approx(wanted)


def test_an_infinite_output_leaves_no_probabilities() -> None:
    outputs, labels = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)
    outputs[0, 0], outputs[1, 1], outputs[2] = float("inf"), float("-inf"), float("-inf")
    found = scored("accuracy", Objective(), outputs, labels, 3, LocalCommunicator())
    assert (found.accuracy, found.predicted) == (0.5, 0.5), "a class that is ruled out is a prediction"


def test_a_class_that_never_occurs_is_left_out() -> None:
    outputs, labels = torch.randn(30, 3), torch.randint(0, 2, (30,))
    found = scored("roc_auc", Objective(), outputs, labels, 3, LocalCommunicator())
    assert 0 < found.accuracy < 1
    only = scored("roc_auc", Objective(), outputs, torch.zeros(30, dtype=torch.int64), 3, LocalCommunicator())
    assert only.accuracy != only.accuracy, "with one class there is no order to measure"


def test_a_metric_of_ones_own() -> None:
    objective, outputs, labels, classes = nodes("classes")

    def top_two(outputs: Tensor, labels: Tensor) -> float:
        return float((outputs.topk(2).indices == labels[:, None]).any(dim=1).float().mean())

    assert scored(top_two, objective, outputs, labels, classes, LocalCommunicator()).accuracy == top_two(
        outputs, labels
    )


def test_weighted_loss_is_torchs() -> None:
    objective, outputs, labels, _ = nodes("classes")
    weights = torch.tensor([1.0, 2.0, 0.5, 4.0, 1.0])
    objective = Objective(class_weights=weights)
    outputs.requires_grad_()
    loss = objective.shard_loss(outputs, labels, None)
    wanted = F.cross_entropy(outputs, labels, weight=weights)
    assert float(loss.loss_sum.detach() / loss.divisor) == pytest.approx(float(wanted), rel=1e-6)
    assert loss.weights is not None
    assert torch.equal(loss.weights, weights[labels])
    tally = scored("accuracy", objective, outputs.detach(), labels, 5, LocalCommunicator())
    assert tally.loss == pytest.approx(float(wanted), rel=1e-6)


def test_a_weighted_loss_of_ones_own_sees_the_outputs_as_training_does() -> None:
    _, outputs, labels, _ = nodes("classes")
    weights = torch.tensor([1.0, 2.0, 0.5, 4.0, 1.0])

    def weighted(outputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(outputs, labels, weight=weights, reduction="none")

    found = scored("accuracy", Objective(custom=weighted), outputs, labels, 5, LocalCommunicator())
    assert found.loss == pytest.approx(float(weighted(outputs, labels).mean()), rel=1e-6)


def test_several_labels_are_summed_over_classes() -> None:
    objective, outputs, labels, _ = nodes("several")
    loss = objective.shard_loss(outputs, labels, None)
    wanted = F.binary_cross_entropy_with_logits(outputs, labels.float(), reduction="sum")
    assert float(loss.loss_sum) == pytest.approx(float(wanted))
    assert (loss.divisor, loss.weights) == (157, None)


def test_a_loss_of_another_shape_is_refused() -> None:
    objective = Objective(custom=lambda outputs, labels: F.cross_entropy(outputs, labels))
    with pytest.raises(UserError, match=r"one number a\s+seed"):
        objective.losses(torch.randn(4, 3), torch.zeros(4, dtype=torch.int64))
