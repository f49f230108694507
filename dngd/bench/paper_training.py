"""One training of the paper's table: full batch, evaluated after every step, in the time of two passes over the input.

The first layer's output before dropout is the same for the evaluation after a step and for the next step's training
pass: it is computed once. Test accuracy is taken at the lowest validation loss, as the paper's code does.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dngd.bench.paper_graph import PaperGraph
from dngd.bench.paper_recipes import Recipe
from dngd.models import GNN
from dngd.optim import FactorLayout, KFACPreconditioner, learning_rate
from dngd.sampling import derive_seed
from dngd.train.losses import shard_loss, sharpened, unlabelled_share, unlabelled_weight
from dngd.train.optimizers import fused, set_learning_rate
from dngd.train.streams import DROPOUT_STREAM, WEIGHTS_STREAM

WIDEST_DENSE, RANK = 400, 64
"""Of A in this project's factors. Directions whose eigenvalue is far below the damping stay as they are: few have to be
known."""
FACTOR_PERIOD, DENSE_STEPS, CHANGE_THRESHOLD = 10, 1, 0.01


@dataclass(frozen=True)
class Outcome:
    """val_loss: the lowest; the accuracies (of 1) are those of its epoch, counted from 1. highest_val_accuracy: of all
    epochs, and test_accuracy_there: of that epoch, the one of lowest loss if there are several. seconds: of the steps
    and evaluations. step_seconds: of the steps alone; the pass over all nodes that an evaluation shares with a
    semi-supervised step, which needs its predictions, counts as the evaluation's."""

    val_loss: float
    val_accuracy: float
    test_accuracy: float
    epoch: int
    seconds: float
    highest_val_accuracy: float
    test_accuracy_there: float
    step_seconds: float = math.nan


@dataclass(frozen=True)
class _Reading:
    epoch: int
    val_loss: float
    val_accuracy: float
    test_accuracy: float


def train(graph: PaperGraph, recipe: Recipe, seed: int) -> Outcome:
    """Train once. seed: of weights, dropout and sampled labels; the caller's random state is left as it was.

    A training that diverges has an infinite validation loss.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, WEIGHTS_STREAM))
        model = graph.model(recipe)
        torch.manual_seed(derive_seed(seed, DROPOUT_STREAM))
        trainer = _Trainer(graph, recipe, model, seed)
        try:
            return trainer.run()
        finally:
            trainer.close()


class _Trainer:
    def __init__(self, graph: PaperGraph, recipe: Recipe, model: GNN, seed: int) -> None:
        self._graph = graph
        self._recipe = recipe
        self._model = model
        self._evaluated = _twin(graph, recipe, model) if recipe.average > 0 else model
        """The model, or one of the running mean of its weights."""
        self._optimizer = optimizer_of(recipe, model)
        self._preconditioner = None if recipe.factors is None else _preconditioner(recipe, model, seed)
        self._train_labels = graph.labels[: graph.num_train]
        self._lowest = _Reading(0, math.inf, 0.0, 0.0)
        self._highest = self._lowest

    def run(self) -> Outcome:
        started = time.perf_counter()
        step_seconds = 0.0
        for epoch in range(self._recipe.epochs):
            first_started = time.perf_counter()
            first = self._first_output(self._model)
            evaluation_started = time.perf_counter()
            prediction = self._evaluate(first, epoch)
            step_started = time.perf_counter()
            self._step(first, prediction, epoch)
            self._average(epoch)
            step_seconds += evaluation_started - first_started + time.perf_counter() - step_started
        with torch.no_grad():
            self._evaluate(self._first_output(self._model), self._recipe.epochs)
        lowest, highest = self._lowest, self._highest
        return Outcome(
            val_loss=lowest.val_loss,
            val_accuracy=lowest.val_accuracy,
            test_accuracy=lowest.test_accuracy,
            epoch=lowest.epoch,
            seconds=time.perf_counter() - started,
            step_seconds=step_seconds,
            highest_val_accuracy=highest.val_accuracy,
            test_accuracy_there=highest.test_accuracy,
        )

    def close(self) -> None:
        if self._preconditioner is not None:
            self._preconditioner.close()

    def _first_output(self, model: GNN) -> Tensor:
        out: Tensor = model.graph_layers()[0].linear(self._graph.first)
        return out

    @torch.no_grad()
    def _average(self, epoch: int) -> None:
        if self._evaluated is self._model:
            return
        decay = min(self._recipe.average, (epoch + 1) / (epoch + 10))
        for mean, weight in zip(self._evaluated.parameters(), self._model.parameters()):
            mean.lerp_(weight, 1 - decay)

    @torch.no_grad()
    def _evaluate(self, first: Tensor, epoch: int) -> Tensor:
        """Return all nodes' logits without dropout, by the weights or their mean, and keep the epoch's accuracies if
        its validation is the best."""
        evaluated = self._evaluated
        if evaluated is not self._model:
            first = self._first_output(evaluated)
        evaluated.eval()
        logits = self._graph.logits(evaluated, first)
        self._model.train()
        if epoch > 0:
            val, labels = self._graph.val, self._graph.labels
            val_loss = float(F.cross_entropy(logits[val], labels[val]))
            val_accuracy, test_accuracy = (self._accuracy(logits, rows) for rows in (val, self._graph.test))
            reading = _Reading(epoch, val_loss, val_accuracy, test_accuracy)
            self._lowest = min(self._lowest, reading, key=lambda r: r.val_loss)
            if math.isfinite(val_loss):
                self._highest = max(self._highest, reading, key=lambda r: (r.val_accuracy, -r.val_loss))
        return logits

    def _accuracy(self, logits: Tensor, rows: Tensor) -> float:
        return float((logits[rows].argmax(dim=1) == self._graph.labels[rows]).double().mean())

    def _step(self, first: Tensor, prediction: Tensor, epoch: int) -> None:
        recipe, graph = self._recipe, self._graph
        set_learning_rate(self._optimizer, learning_rate(epoch, recipe.epochs, recipe.lr, recipe.schedule, 0))
        self._optimizer.zero_grad()
        num_train, num_others = graph.num_train, graph.labels.numel() - graph.num_train
        logits = graph.logits(self._model, first)
        rule, soft_labels, share = None, None, 0.0
        if recipe.semi > 0:
            share = unlabelled_share(epoch, recipe.epochs, recipe.gamma, recipe.semi)
            rule = unlabelled_weight("two_means", share, num_train, num_others)
            if recipe.temperature is not None:
                soft_labels = sharpened(prediction[num_train:], recipe.temperature)
        else:
            logits = logits[:num_train]
        loss = shard_loss(logits, self._train_labels, rule, soft_labels, recipe.smoothing)
        if self._preconditioner is not None:
            self._preconditioner.observe(logits, weights=loss.weights)
        (loss.loss_sum / loss.divisor).backward()  # type: ignore[no-untyped-call]
        if self._preconditioner is None or self._preconditioner.step(
            num_samples=loss.divisor, factor_samples=num_train + share * num_others
        ):
            self._optimizer.step()


def _twin(graph: PaperGraph, recipe: Recipe, model: GNN) -> GNN:
    with torch.random.fork_rng(devices=[]):
        twin = graph.model(recipe)
    twin.load_state_dict(model.state_dict())
    return twin


def optimizer_of(recipe: Recipe, model: GNN) -> torch.optim.Optimizer:
    """Return a recipe's optimizer, a parameter group a layer."""
    first, *others = (list(layer.parameters()) for layer in model.graph_layers())
    behind = recipe.weight_decay if recipe.decay == "all" else 0.0
    groups = [{"params": first, "weight_decay": recipe.weight_decay}]
    groups += [{"params": layer, "weight_decay": behind} for layer in others]
    if recipe.optimizer == "adam":
        return fused(torch.optim.Adam, groups, lr=recipe.lr)
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum)


def _preconditioner(recipe: Recipe, model: GNN, seed: int) -> KFACPreconditioner:
    shared: dict[str, Any] = {"inverse_update_period": recipe.period, "max_dropped_steps": None, "seed": seed}
    if recipe.factors == "paper":
        # As its code does: measured and inverted every `period` steps, no average, √λ added to each.
        return KFACPreconditioner(
            model,
            variant="paper",
            fisher="empirical",
            damping=recipe.damping,
            damping_mode="even",
            factor_decay=0.0,
            factor_update_period=recipe.period,
            dense_steps=0,
            layout=FactorLayout(wide="dense"),
            **shared,
        )
    return KFACPreconditioner(
        model,
        fisher="monte_carlo",
        damping=recipe.damping,
        damping_mode="mean" if recipe.scale == "mean" else "relative",
        damping_g_ratio=recipe.damping_g / recipe.damping,
        unit_scale=True,
        factor_update_period=FACTOR_PERIOD,
        dense_steps=DENSE_STEPS,
        change_threshold=CHANGE_THRESHOLD,
        layout=FactorLayout(WIDEST_DENSE, "low_rank", RANK),
        **shared,
    )
