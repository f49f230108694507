"""Accuracy, macro-F1, ROC-AUC and average precision of sets of nodes, summed over blocks and ranks.

Of one label a node, with C classes: accuracy is the share of nodes whose largest output is their class; macro-F1 the
mean over classes of `2·tp / (2·tp + fp + fn)`, over those that occur or are predicted; ROC-AUC and average precision
the mean over classes, each against the rest, in the order of the class's probability; of two classes that of class 1.
Of several labels a node: outputs above 0 (probability 1/2) are predicted; accuracy is the share of right entries.
Classes that only, or never, occur among the nodes have no ROC-AUC or average precision and are left out of the mean.
Outputs without a probability, as overflow leaves them, predict nothing: the node counts as wrong, of several labels the
label.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dngd.comm import Communicator
from dngd.train.objective import Objective

Metric = Literal["accuracy", "macro_f1", "roc_auc", "average_precision"]
RANKED: dict[str, Callable[[Tensor, Tensor], float]] = {}
"""Metrics that need the order of all nodes, filled below: (scores [n], is positive [n]) -> value."""

CustomMetric = Callable[[Tensor, Tensor], float]
"""(outputs [n, C] of all nodes of a set, labels [n] or [n, C]) -> a number, larger is better."""


@dataclass(frozen=True)
class Scores:
    """Mean loss of one set of nodes, and the run's metric, which is accuracy unless the run says otherwise.

    predicted: the share of nodes (of several labels a node, of labels) whose outputs predict something.
    """

    loss: float
    accuracy: float
    predicted: float = 1.0


class Tally:
    """What is known of one set of nodes so far, at one rank. Blocks may come in any order."""

    def __init__(self, objective: Objective, metric: Metric | CustomMetric, num_classes: int) -> None:
        self._objective = objective
        self._metric = metric
        self._keeps_rows = metric not in ("accuracy", "macro_f1")
        # loss sum, weight sum, right entries, entries, entries that were predicted; then of each class true
        # positives, predicted and actual
        self.sums = torch.zeros(5 + 3 * num_classes, dtype=torch.float64)
        self._outputs: list[Tensor] = []
        self._labels: list[Tensor] = []

    def add(self, outputs: Tensor, labels: Tensor) -> None:
        """Add nodes: outputs [n, C], labels int64 [n] or of several a node [n, C], on one device."""
        if outputs.shape[0] == 0:
            return
        # A loss of one's own may hold tensors of the outputs' type, as class weights are.
        exact = outputs if self._objective.custom is not None else outputs.double()
        loss, weights = (values.double() for values in self._objective.losses(exact, labels))
        if self._objective.is_multilabel:
            predicts = ~outputs.isnan()
            predicted, actual = outputs > 0, labels > 0
            right = ((predicted == actual) & predicts).sum().double()
        else:
            # argmax takes what is not a number for the largest; one infinite output leaves the softmax undefined.
            predicts = outputs.amax(dim=1).isfinite()
            chosen, classes = outputs.argmax(dim=1), outputs.shape[1]
            right = ((chosen == labels) & predicts).sum().double()
            predicted, actual = (torch.nn.functional.one_hot(c, classes).bool() for c in (chosen, labels))
            predicted &= predicts[:, None]
        entries = right.new_tensor(float(labels.numel()))
        head = torch.stack([(weights * loss).sum(), weights.sum(), right, entries, predicts.sum().double()])
        counts = torch.cat([(predicted & actual).sum(dim=0), predicted.sum(dim=0), actual.sum(dim=0)])
        self.sums += torch.cat([head, counts.double()]).cpu()
        if self._keeps_rows:
            self._outputs.append(outputs.float().cpu())
            self._labels.append(labels.cpu())

    def rows(self) -> tuple[Tensor, Tensor]:
        """Return the outputs and labels kept for a metric that needs all of them at once."""
        return torch.cat(self._outputs), torch.cat(self._labels)

    @property
    def has_rows(self) -> bool:
        """Whether there are any."""
        return bool(self._outputs)


def scores_of_tallies(
    tallies: Sequence[Tally],
    objective: Objective,
    metric: Metric | CustomMetric,
    communicator: Communicator,
    device: torch.device,
) -> list[Scores]:
    """Return the scores of sets of nodes, alike on all ranks, which all enter. device: of the collectives."""
    sums = torch.stack([tally.sums for tally in tallies]).to(device)
    communicator.all_reduce(sums.view(-1), "evaluation").wait()
    found = []
    for tally, row in zip(tallies, sums.cpu()):
        loss = float(row[0] / row[1])
        if metric == "accuracy":
            value = float(row[2] / row[3])
        elif metric == "macro_f1":
            value = _macro_f1(row[5:].view(3, -1))
        else:
            value = _of_all_rows(tally, objective, metric, communicator)
        found.append(Scores(loss, value, float(row[4] / row[3]) if row[3] else 1.0))
    return found


def _macro_f1(counts: Tensor) -> float:
    positives, predicted, actual = counts
    occurs = (predicted + actual) > 0
    f1 = 2 * positives[occurs] / (predicted + actual)[occurs]
    return float(f1.mean())


def _of_all_rows(
    tally: Tally, objective: Objective, metric: Metric | CustomMetric, communicator: Communicator
) -> float:
    """Gather the rows at rank 0, which computes the metric for all."""
    payload = b""
    if tally.has_rows:
        outputs, labels = tally.rows()
        shape = json.dumps([outputs.shape[1], list(labels.shape[1:])]).encode()
        payload = b"\n".join((shape, str(len(outputs)).encode(), b"")) + outputs.numpy().tobytes()
        payload += labels.to(torch.int64).numpy().tobytes()
    gathered = communicator.gather_bytes(payload)
    answer: bytes | None = None
    if gathered is not None:
        parts = [_unpacked(part) for part in gathered if part]
        outputs = torch.cat([part[0] for part in parts])
        labels = torch.cat([part[1] for part in parts])
        answer = json.dumps(_value(metric, objective, outputs, labels)).encode()
    return float(json.loads(communicator.broadcast_bytes(answer)))


def _unpacked(payload: bytes) -> tuple[Tensor, Tensor]:
    shape, count, rest = payload.split(b"\n", 2)
    width, label_shape = json.loads(shape)
    rows = int(count)
    split = rows * width * 4
    outputs = torch.from_numpy(np.frombuffer(rest[:split], dtype=np.float32).reshape(rows, width).copy())
    labels = torch.from_numpy(np.frombuffer(rest[split:], dtype=np.int64).reshape(rows, *label_shape).copy())
    return outputs, labels


def _value(metric: Metric | CustomMetric, objective: Objective, outputs: Tensor, labels: Tensor) -> float:
    if callable(metric):
        return float(metric(outputs, labels))
    of_class = RANKED[metric]
    if objective.is_multilabel:
        scores, positive = outputs, labels > 0
    elif outputs.shape[1] == 2:
        scores, positive = (outputs[:, 1] - outputs[:, 0])[:, None], (labels == 1)[:, None]
    else:
        scores = _log_odds(outputs.double())
        positive = torch.nn.functional.one_hot(labels, outputs.shape[1]).bool()
    values = [
        of_class(scores[:, c], positive[:, c])
        for c in range(scores.shape[1])
        if 0 < int(positive[:, c].sum()) < len(positive)
    ]
    return sum(values) / len(values) if values else math.nan


def _log_odds(outputs: Tensor) -> Tensor:
    """Return `log p_c / (1 - p_c)` of the softmax, [n, C]: ordered as p_c is, also where p_c rounds to 1."""
    # From the largest, and sorted: sums of the same terms round alike, and what is equal stays so.
    outputs = outputs - outputs.amax(dim=1, keepdim=True)
    rest = [torch.cat([outputs[:, :c], outputs[:, c + 1 :]], dim=1) for c in range(outputs.shape[1])]
    return outputs - torch.stack([others.sort(dim=1).values.logsumexp(dim=1) for others in rest], dim=1)


def roc_auc(scores: Tensor, positive: Tensor) -> float:
    """Return the probability that a positive scores above a negative, ties counting half.

    scores: [n]. positive: bool [n], of both kinds. By the sum of the positives' ranks (Mann-Whitney).
    1/2 where a score is not a number: such a model ranks nobody.
    """
    if bool(torch.isnan(scores).any()):
        return 0.5
    _, place, counts = torch.unique(scores, return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    ranks = ends - (counts.double() - 1) / 2  # from 1; equal scores share their mean rank
    num_positive = int(positive.sum())
    num_negative = len(positive) - num_positive
    total = float(ranks[place[positive]].sum())
    return (total - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative)


def average_precision(scores: Tensor, positive: Tensor) -> float:
    """Return `Σ_k (R_k - R_{k-1}) P_k` over the distinct scores k, descending: recall's steps times precision.

    scores: [n]. positive: bool [n], at least one. No interpolation; equal scores are one step.
    The positives' share, which equal scores have, where a score is not a number: such a model ranks nobody.
    """
    if bool(torch.isnan(scores).any()):
        return float(positive.double().mean())
    values, place = torch.unique(scores, return_inverse=True)
    hits = torch.bincount(place, weights=positive.double(), minlength=len(values)).flip(0)
    seen = torch.bincount(place, minlength=len(values)).flip(0).cumsum(0).double()
    precision = hits.cumsum(0) / seen
    return float((hits * precision).sum() / hits.sum())


RANKED |= {"roc_auc": roc_auc, "average_precision": average_precision}
