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
from torch import Tensor, nn

from dngd.bench.paper_graph import PaperGraph
from dngd.bench.paper_recipes import Recipe
from dngd.models import GNN
from dngd.optim import FactorLayout, KFACPreconditioner, learning_rate
from dngd.sampling import derive_seed
from dngd.train.losses import shard_loss, sharpened, unlabelled_share, unlabelled_weight
from dngd.train.optimizers import set_learning_rate
from dngd.train.streams import DROPOUT_STREAM, WEIGHTS_STREAM

WIDEST_DENSE, RANK = 640, 128
"""Of A in this project's factors: what `dngd train` has by default."""
FACTOR_PERIOD, DENSE_STEPS = 10, 20


@dataclass(frozen=True)
class Outcome:
    """val_loss: the lowest; the accuracies (of 1) are those of its epoch, counted from 1. seconds: of the steps and
    evaluations."""

    val_loss: float
    val_accuracy: float
    test_accuracy: float
    epoch: int
    seconds: float


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
        self._optimizer = _optimizer(recipe, model)
        self._preconditioner = None if recipe.factors is None else _preconditioner(recipe, model, seed)
        self._train_labels = graph.labels[: graph.num_train]
        self._best = Outcome(math.inf, 0.0, 0.0, 0, 0.0)

    def run(self) -> Outcome:
        started = time.perf_counter()
        for epoch in range(self._recipe.epochs):
            first = self._first_output()
            prediction = self._evaluate(first, epoch)
            self._step(first, prediction, epoch)
        with torch.no_grad():
            self._evaluate(self._first_output(), self._recipe.epochs)
        best = self._best
        seconds = time.perf_counter() - started
        return Outcome(best.val_loss, best.val_accuracy, best.test_accuracy, best.epoch, seconds)

    def close(self) -> None:
        if self._preconditioner is not None:
            self._preconditioner.close()

    def _first_output(self) -> Tensor:
        out: Tensor = self._model.graph_layers()[0].linear(self._graph.first)
        return out

    @torch.no_grad()
    def _evaluate(self, first: Tensor, epoch: int) -> Tensor:
        """Return all nodes' logits without dropout, and keep the epoch's accuracies if its loss is the lowest."""
        self._model.eval()
        logits = self._graph.logits(self._model, first)
        self._model.train()
        if epoch > 0:
            val, labels = self._graph.val, self._graph.labels
            val_loss = float(F.cross_entropy(logits[val], labels[val]))
            if val_loss < self._best.val_loss:
                val_accuracy, test_accuracy = (self._accuracy(logits, rows) for rows in (val, self._graph.test))
                self._best = Outcome(val_loss, val_accuracy, test_accuracy, epoch, 0.0)
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
        loss = shard_loss(logits, self._train_labels, rule, soft_labels)
        if self._preconditioner is not None:
            self._preconditioner.observe(logits, weights=loss.weights)
        (loss.loss_sum / loss.divisor).backward()  # type: ignore[no-untyped-call]
        if self._preconditioner is None or self._preconditioner.step(
            num_samples=loss.divisor, factor_samples=num_train + share * num_others
        ):
            self._optimizer.step()


def _optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    decay = recipe.weight_decay
    if recipe.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr=recipe.lr, weight_decay=decay)
    return torch.optim.SGD(model.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=decay)


def _preconditioner(recipe: Recipe, model: nn.Module, seed: int) -> KFACPreconditioner:
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
        damping_mode="relative",
        damping_g_ratio=recipe.damping_g / recipe.damping,
        unit_scale=True,
        factor_update_period=FACTOR_PERIOD,
        dense_steps=DENSE_STEPS,
        layout=FactorLayout(WIDEST_DENSE, "low_rank", RANK),
        **shared,
    )
