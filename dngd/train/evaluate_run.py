"""Evaluating a run's best model again, from its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dngd.train.evaluation import EvaluationProgress
from dngd.train.trained_model import evaluator_of, load_trained, open_graph


def evaluate_run(
    run: Path,
    *,
    data_root: Path | None = None,
    dataset: str | None = None,
    progress: EvaluationProgress | None = None,
) -> dict[str, Any]:
    """Return {"step", "train", "val", "test"}: loss and accuracy of a run's best model on all neighbours.

    data_root: where the data set is now, if not where the run had it. dataset: another graph to evaluate on, or where
    the run's is now; the run's split is taken there. progress: see EvaluationProgress.
    Raises UserError if the folder holds no run, no evaluated model yet, or a file that cannot be read, and if the graph
    is not to be found, does not fit the model, or has no such split.
    """
    trained = load_trained(run)
    store = open_graph(trained, dataset, data_root)
    split = store.split(trained.config.split, trained.config.seed)
    parts = {"train": split.train, "val": split.val, "test": split.test}
    evaluator = evaluator_of(trained, store, torch.cat(list(parts.values())), progress)
    found = evaluator.scores_of(trained.model, parts)
    scores = {name: {"accuracy": score.accuracy, "loss": score.loss} for name, score in found.items()}
    return {"step": trained.step} | scores
