"""What a run minimises: the loss of its seeds, by the graph's kind of labels, and the Fisher that belongs to it.

One label a node: cross-entropy over softmax. Several labels a node: binary cross-entropy, summed over the classes'
independent sigmoids, whose Fisher is that of independent Bernoulli variables. A pair of nodes, linked or not, is one
such label of one class. Class weights multiply a seed's loss by
w of its class, and the divisor of the step is Σ w instead of the number of seeds (torch's weighted mean).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dngd.config import TrainConfig
from dngd.errors import UserError
from dngd.graph import GraphStore
from dngd.train.losses import ShardLoss, UnlabelledWeight, shard_loss

CustomLoss = Callable[[Tensor, Tensor], Tensor]
"""(outputs [n, C], labels [n] or [n, C]) -> each seed's loss, [n]."""


@dataclass(frozen=True)
class Objective:
    """The loss of seeds. class_weights: float32 [C], None where all classes weigh 1. custom: in the loss's place."""

    is_multilabel: bool = False
    class_weights: Tensor | None = None
    custom: CustomLoss | None = None

    @property
    def kind(self) -> Literal["cross_entropy", "binary_cross_entropy"]:
        """The loss as dngd.curvature.LossKind, for the Fisher."""
        return "binary_cross_entropy" if self.is_multilabel else "cross_entropy"

    def losses(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the seeds' losses and weights, [n] each, of outputs' type.

        outputs: [n, C]. labels: int64 [n], or of several a node [n, C] of 0 and 1. Raises UserError if a custom loss
        returns something else than one number a seed.
        """
        if self.custom is not None:
            losses = self.custom(outputs, labels)
            if losses.shape != outputs.shape[:1]:
                raise UserError(
                    f"the loss returned shape {list(losses.shape)} for {outputs.shape[0]} seeds; return one number a "
                    "seed, [n] (reduction='none')"
                )
        elif self.is_multilabel:
            losses = F.binary_cross_entropy_with_logits(outputs, labels.to(outputs.dtype), reduction="none").sum(dim=1)
        else:
            losses = F.cross_entropy(outputs, labels, reduction="none")
        if self.class_weights is None:
            return losses, torch.ones_like(losses)
        return losses, self.class_weights.to(losses)[labels]

    def shard_loss(
        self,
        outputs: Tensor,
        labels: Tensor,
        unlabelled: UnlabelledWeight | None,
        soft_labels: Tensor | None = None,
    ) -> ShardLoss:
        """Return a shard's part of the step's loss; see dngd.train.losses."""
        if unlabelled is not None or not (self.is_multilabel or self.custom or self.class_weights is not None):
            return shard_loss(outputs, labels, unlabelled, soft_labels)
        losses, weights = self.losses(outputs, labels)
        if self.class_weights is None:
            return ShardLoss(losses.sum(), float(len(losses)), None)
        return ShardLoss((weights * losses).sum(), float(weights.sum()), weights)


def make_objective(
    config: TrainConfig, store: GraphStore, train: Tensor, custom: CustomLoss | None = None
) -> Objective:
    """Return what a run minimises on a graph. train: of its split.

    Raises UserError for class weights or a semi-supervised loss that the graph's labels do not allow.
    """
    if config.task == "link":
        return Objective(is_multilabel=True, custom=custom)
    weights = config.class_weights
    if store.is_multilabel:
        for field, off in (("class_weights", weights is None), ("semi", config.semi == "none")):
            if not off:
                raise UserError(
                    f"{field}={getattr(config, field)} is about one label a node but {store.name} has several; leave "
                    f"{field} out"
                )
        return Objective(is_multilabel=True, custom=custom)
    if weights is None:
        return Objective(custom=custom)
    if weights == "balanced":
        counts = torch.bincount(store.labels[train], minlength=store.num_classes)
        balanced = train.numel() / (store.num_classes * counts.clamp_min(1).float())
        return Objective(class_weights=balanced, custom=custom)
    if len(weights) != store.num_classes:
        raise UserError(
            f"class_weights has {len(weights)} entries but {store.name} has {store.num_classes} classes; give one "
            "a class"
        )
    return Objective(class_weights=torch.tensor(weights), custom=custom)
