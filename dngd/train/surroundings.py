"""What a model is surrounded by: what makes its batches, and what evaluates it; by the kind of model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from dngd.comm import Communicator
from dngd.config import TrainConfig
from dngd.errors import UserError
from dngd.graph import GraphStore
from dngd.models import GNN, SparseRows
from dngd.sampling.cached_rows import CachedRows
from dngd.sampling.operators import check_weights
from dngd.train.batch import PropagationBuilder
from dngd.train.evaluation import EvaluationProgress, Evaluator, ExactEvaluator
from dngd.train.link_evaluation import LinkEvaluator
from dngd.train.module_batches import ModuleBatchBuilder
from dngd.train.module_evaluation import ModuleEvaluator
from dngd.train.objective import Objective
from dngd.train.scoring import CustomMetric, Metric


def make_surroundings(
    config: TrainConfig,
    store: GraphStore,
    model: nn.Module,
    communicator: Communicator,
    *,
    device: torch.device,
    features: Tensor,
    folders: Sequence[Path],
    objective: Objective | None,
    metric: Metric | CustomMetric,
    cache: CachedRows | None = None,
    sparse: SparseRows | None = None,
    keeps_first: bool = True,
    progress: EvaluationProgress | None = None,
) -> tuple[PropagationBuilder | ModuleBatchBuilder, Evaluator]:
    """Return the batch builder and the evaluator of a model on a graph. The arguments are theirs.

    store: the graph whose edges the model may see. Raises UserError for edge weights beyond 32-bit floats.
    """
    check_weights(store)
    builder: PropagationBuilder | ModuleBatchBuilder
    evaluator: ExactEvaluator | ModuleEvaluator
    if isinstance(model, GNN):
        builder = PropagationBuilder(store, model.aggregation, device, cache)
        evaluator = ExactEvaluator(
            store,
            builder,
            communicator,
            rows=config.eval_rows,
            device=device,
            features=features,
            sparse=sparse,
            folders=folders,
            memory_bytes=config.eval_memory_bytes,
            keeps_first=keeps_first,
            progress=progress,
            objective=objective,
            metric=metric,
        )
    else:
        builder = ModuleBatchBuilder(store, features, device)
        evaluator = ModuleEvaluator(
            store,
            builder,
            communicator,
            num_layers=config.num_layers,
            rows=config.eval_rows,
            device=device,
            features=features,
            folders=folders,
            memory_bytes=config.eval_memory_bytes,
            progress=progress,
            objective=objective,
            metric=metric,
        )
    if config.task == "node":
        return builder, evaluator
    return builder, LinkEvaluator(
        evaluator,
        store,
        communicator,
        evaluator.space,
        width=config.embedding_width,
        device=device,
        objective=objective,
        metric=metric,
    )


def load_weights(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    what: str,
    fix: str = "give the module that the run was started with",
) -> None:
    """Load a state dict. Raises UserError, naming the first difference, if the model has other parameters."""
    own = model.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        here, there = (list(found[name].shape) if name in found else "nothing" for found in (own, weights))
        if here != there:
            raise UserError(f"{what} is of another model: {name} is {there} there and {here} in this model; {fix}")
    model.load_state_dict(dict(weights))
