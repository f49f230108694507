"""The metric that curves are made of: accuracy, or ROC-AUC for two classes of unequal size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dngd.errors import UserError
from dngd.graph import GraphStore, Split
from dngd.models import GNN
from dngd.train.evaluation import ExactEvaluator
from dngd.train.scoring import roc_auc

Metric = Literal["accuracy", "roc_auc"]
METRICS: tuple[Metric, ...] = ("accuracy", "roc_auc")
RARE_CLASS = 1 / 3
"""Of two classes, one with less than this share of the labelled nodes is a rare one."""


@dataclass(frozen=True)
class Scored:
    """One set of nodes. score: the metric that is compared, accuracy again where that is it."""

    loss: float
    accuracy: float
    score: float


def choose_metric(asked: str, store: GraphStore) -> Metric:
    """Return the metric of a graph. asked: accuracy, roc_auc, or auto.

    auto: roc_auc where there are two classes and fewer than a third of the labelled nodes are of the one, for
    which always naming the other is accurate already; else accuracy. Raises UserError for another word, and for
    roc_auc of a graph that has not two classes.
    """
    if asked not in (*METRICS, "auto"):
        raise UserError(f"--metric {asked!r} is unknown; use auto, accuracy or roc_auc")
    labels = store.labels[store.labels >= 0]
    counts = torch.bincount(labels, minlength=store.num_classes)
    if asked == "roc_auc" and counts.numel() != 2:
        raise UserError(
            f"--metric roc_auc is of two classes but {store.name} has {counts.numel()}; use --metric auto or accuracy"
        )
    if asked == "auto" and counts.numel() == 2 and float(counts.min()) < RARE_CLASS * labels.numel():
        return "roc_auc"
    return "roc_auc" if asked == "roc_auc" else "accuracy"


class Scorer:
    """Scores a model on the validation and test nodes of a split, all neighbours of each.

    Raises UserError for roc_auc if a part has nodes of one class only.
    """

    def __init__(self, evaluator: ExactEvaluator, store: GraphStore, split: Split, metric: Metric) -> None:
        self._evaluator = evaluator
        self._store = store
        self._split = split
        self._metric = metric
        for name, nodes in (("val", split.val), ("test", split.test)):
            if metric == "roc_auc" and torch.bincount(store.labels[nodes]).count_nonzero() != 2:
                raise UserError(
                    f"the {name} nodes of {store.name} are all of one class, of which there is no ROC-AUC; use "
                    "--metric accuracy, or another --split"
                )

    def __call__(self, model: GNN) -> dict[str, Scored]:
        """Return {"val": ..., "test": ...}."""
        if self._metric == "accuracy":
            found = self._evaluator.scores(model, self._split)
            return {name: Scored(of.loss, of.accuracy, of.accuracy) for name, of in found.items()}
        parts = {"val": self._split.val, "test": self._split.test}
        logits = torch.empty(self._store.num_nodes, self._store.num_classes)
        for ids, rows in self._evaluator.predictions(model, torch.cat(list(parts.values()))):
            logits[ids] = rows.float().cpu()
        labels = self._store.labels
        return {name: score_logits(logits[nodes], labels[nodes], self._metric) for name, nodes in parts.items()}


def score_logits(logits: Tensor, labels: Tensor, metric: Metric) -> Scored:
    """Return what logits [n, C] are worth against the labels of the same n nodes; those that overflowed are wrong."""
    right = float(((logits.argmax(dim=1) == labels) & logits.amax(dim=1).isfinite()).double().mean())
    score = right if metric == "accuracy" else roc_auc(logits[:, 1] - logits[:, 0], labels == 1)
    return Scored(float(F.cross_entropy(logits.double(), labels)), right, score)
