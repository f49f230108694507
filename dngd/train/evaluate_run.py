"""Evaluating a run's best model again, from its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from dngd.comm import LocalCommunicator
from dngd.config import TrainConfig
from dngd.errors import UserError
from dngd.graph import resolve_dataset
from dngd.models import build_model
from dngd.train.batch import PropagationBuilder
from dngd.train.evaluation import ExactEvaluator, score
from dngd.train.run_folder import RunFolder


def evaluate_run(run: Path, *, data_root: Path | None = None) -> dict[str, Any]:
    """Return {"step", "train", "val", "test"}: loss and accuracy of a run's best model on all neighbours.

    data_root: where the data set is now, if not where the run had it.
    Raises UserError if the folder holds no run, no evaluated model yet, or a file that cannot be read.
    """
    folder = RunFolder(run)
    if not folder.holds_a_run:
        raise UserError(f"{run} is no run folder (it has no config.yaml); give a folder that dngd train wrote")
    if not folder.best_model.exists():
        raise UserError(f"run {run} has no model yet: it ended before its first evaluation; go on with --resume")
    overrides = {"data_root": str(data_root)} if data_root is not None else {}
    config = TrainConfig.from_yaml(folder.config, overrides)
    store = resolve_dataset(config.dataset, config.data_root_in_use, config.cache_dir)
    split = store.split(config.split, config.seed)
    model = build_model(
        config.model,
        in_features=store.num_features,
        hidden=config.hidden,
        out_features=store.num_classes,
        num_layers=config.num_layers,
        dropout=config.dropout,
    )
    try:
        model.load_state_dict(safetensors.torch.load_file(folder.best_model))
        with safe_open(folder.best_model, framework="pt") as file:
            step = int((file.metadata() or {})["step"])
    except (SafetensorError, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{folder.best_model} cannot be loaded into the run's model: {reason}") from None
    device = torch.device("cpu")
    builder = PropagationBuilder(store, model.aggregation, device)
    evaluator = ExactEvaluator(
        store, builder, LocalCommunicator(), rows=config.eval_rows, device=device, features=store.features
    )
    logits = evaluator.logits(model)
    parts = {"train": split.train, "val": split.val, "test": split.test}
    scores: dict[str, Any] = {"step": step}
    for name, nodes in parts.items():
        result = score(logits, store.labels, nodes)
        scores[name] = {"accuracy": result.accuracy, "loss": result.loss}
    return scores
