"""ROC-AUC by its definition, and when it is the metric."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dngd.bench.scoring import Scorer, choose_metric
from dngd.errors import UserError
from dngd.graph import GraphStore, Split, StoreBuilder
from dngd.train.evaluation import ExactEvaluator
from dngd.train.scoring import roc_auc


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=30))
def test_the_area_is_the_share_of_pairs_in_the_right_order(nodes: list[tuple[int, bool]]) -> None:
    """Few values, so that there are ties; each counts half."""
    ups = [score for score, is_positive in nodes if is_positive]
    downs = [score for score, is_positive in nodes if not is_positive]
    if not ups or not downs:
        return
    pairs = [1.0 if up > down else 0.5 if up == down else 0.0 for up in ups for down in downs]
    scores = torch.tensor([float(score) for score, _ in nodes])
    assert roc_auc(scores, torch.tensor([kind for _, kind in nodes])) == pytest.approx(sum(pairs) / len(pairs))


def test_a_model_without_numbers_ranks_nobody() -> None:
    assert roc_auc(torch.tensor([0.1, float("nan"), 0.3]), torch.tensor([True, False, False])) == 0.5


def two_classes(path: Path, rare: int, nodes: int = 120) -> GraphStore:
    """A ring, `rare` nodes of class 1 spread evenly."""
    labels = np.zeros(nodes, dtype=np.int64)
    labels[np.linspace(0, nodes - 1, rare).astype(int)] = 1
    ring = np.arange(nodes)
    with StoreBuilder(path, num_nodes=nodes) as builder:
        builder.add_edges(ring, (ring + 1) % nodes)
        builder.finish(labels=labels)
    return GraphStore.open(path)


def test_a_rare_class_asks_for_the_area(tmp_path: Path, store: GraphStore) -> None:
    rare, even = two_classes(tmp_path / "rare", 30), two_classes(tmp_path / "even", 50)
    assert [choose_metric("auto", graph) for graph in (rare, even, store)] == ["roc_auc", "accuracy", "accuracy"]
    assert choose_metric("accuracy", rare) == "accuracy"
    assert choose_metric("roc_auc", even) == "roc_auc"
    with pytest.raises(UserError, match="has 5"):
        choose_metric("roc_auc", store)


class _Logits:
    """Stands in for the evaluator: given logits, in blocks, for the nodes asked for alone."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits

    def predictions(self, model: object, nodes: torch.Tensor) -> object:
        for part in nodes.sort().values.split(7):
            yield part, self.logits[part]


def test_the_area_is_of_the_right_nodes(tmp_path: Path) -> None:
    graph = two_classes(tmp_path / "store", 30)
    val, test = torch.arange(0, 60), torch.arange(60, 120)
    logits = torch.zeros(120, 2)
    logits[val, 1] = graph.labels[val].float() - 0.5
    logits[test, 1] = 0.5 - graph.labels[test].float()
    evaluator: ExactEvaluator = _Logits(logits)  # type: ignore[assignment]
    scorer = Scorer(evaluator, graph, Split(torch.arange(0), val, test, "x"), "roc_auc")
    found = scorer(None)  # type: ignore[arg-type]
    assert (found["val"].score, found["val"].accuracy) == (1.0, 1.0)
    assert (found["test"].score, found["test"].accuracy) == (0.0, 0.0)
    assert found["val"].loss == pytest.approx(float(torch.nn.functional.softplus(torch.tensor(-0.5))))


def test_nodes_of_one_class_have_no_area(tmp_path: Path) -> None:
    graph = two_classes(tmp_path / "store", 30)
    evaluator: ExactEvaluator = _Logits(torch.zeros(120, 2))  # type: ignore[assignment]
    ones = (graph.labels == 1).nonzero()[:, 0]
    with pytest.raises(UserError, match="the test nodes"):
        Scorer(evaluator, graph, Split(torch.arange(0), torch.arange(120), ones, "x"), "roc_auc")
