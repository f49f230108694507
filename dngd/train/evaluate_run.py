"""Evaluating a run's best model again, from its folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from warnings import warn

import torch

from dngd.graph import LinkSplit
from dngd.train.evaluation import EvaluationProgress
from dngd.train.objective import make_objective
from dngd.train.own_parts import replaced_warning
from dngd.train.parts import RunParts
from dngd.train.task import split_of
from dngd.train.trained_model import evaluator_of, load_trained, open_graph, split_warning


def evaluate_run(
    run: Path,
    *,
    data_root: Path | None = None,
    cache_dir: Path | None = None,
    dataset: str | None = None,
    progress: EvaluationProgress | None = None,
    parts: RunParts | None = None,
    tell: Callable[[str], None] = warn,
) -> dict[str, Any]:
    """Return {"step", "metric", "train", "val", "test"}: the loss and, under its name, the run's metric of its best
    model on all neighbours. Link prediction has no "train": the model sees those links as edges.

    run: its folder or address. data_root: where the data set is now, if not where the run had it. cache_dir:
    folder of converted stores, if not the run's. dataset: another graph to evaluate on, or where the run's is now; the
    run's split is taken there. progress: see EvaluationProgress.
    parts: what the program that trained added to the configuration. tell: hears where scores may not be what they seem.
    Raises UserError if the folder holds no run, no evaluated model yet, or a file that cannot be read, and if the graph
    is not to be found, does not fit the model, or has no such split.
    """
    parts = parts or RunParts()
    trained = load_trained(run, parts)
    store = open_graph(trained, dataset, data_root, cache_dir)
    warning = split_warning(trained, store)
    if warning is not None:
        tell(warning)
    metric = parts.metric_name(trained.config)
    folder = trained.folder
    replaced = replaced_warning(folder.own_parts, str(folder.shown), parts.own(), metric)
    if replaced is not None:
        tell(replaced)
    split = split_of(trained.config, store)
    objective = make_objective(trained.config, store, split.train, parts.loss)
    chosen = parts.metric_of(trained.config)
    if isinstance(split, LinkSplit):
        evaluator = evaluator_of(trained, split.graph, None, progress, objective, chosen)
        found = evaluator.scores(trained.model, split)
    else:
        sets = {"train": split.train, "val": split.val, "test": split.test}
        evaluator = evaluator_of(trained, store, torch.cat(list(sets.values())), progress, objective, chosen)
        found = evaluator.scores_of(trained.model, sets)
    scores = {name: {metric: score.accuracy, "loss": score.loss} for name, score in found.items()}
    return {"step": trained.step, "metric": metric} | scores
