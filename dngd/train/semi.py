"""The semi-supervised part of a run: how many unlabelled seeds a step has, and what they weigh.

All numbers follow from the configuration, the split and (epoch, step): every rank knows the whole step's by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dngd.config import TrainConfig
from dngd.train.batch import DeviceBatch
from dngd.train.losses import SemiSupervised, UnlabelledWeight, sharpened, unlabelled_share, unlabelled_weight


@dataclass(frozen=True)
class SemiSupervision:
    """semi, gamma, largest, epochs, temperature: of the loss, see dngd.train.losses; temperature None: arg-max labels.

    num_labelled, num_unlabelled: n_l and n_u of the graph. labelled_step, unlabelled_step: seeds of a step at most.
    """

    semi: SemiSupervised
    gamma: float
    largest: float
    epochs: int
    temperature: float | None
    num_labelled: int
    num_unlabelled: int
    labelled_step: int
    unlabelled_step: int

    @classmethod
    def of(
        cls, config: TrainConfig, num_labelled: int, num_unlabelled: int, labelled_shard: int, unlabelled_shard: int
    ) -> SemiSupervision | None:
        """Return the configured run's; None without a semi-supervised loss. The last two: seeds of a shard at most."""
        if config.semi == "none":
            return None
        return cls(
            semi=config.semi,
            gamma=config.semi_gamma,
            largest=config.semi_weight,
            epochs=config.epochs,
            temperature=config.semi_temperature if config.semi_labels == "soft" else None,
            num_labelled=num_labelled,
            num_unlabelled=num_unlabelled,
            labelled_step=min(num_labelled, config.shards * labelled_shard),
            unlabelled_step=min(num_unlabelled, config.shards * unlabelled_shard),
        )

    def weight(self, epoch: int, step: int) -> UnlabelledWeight:
        """Return what an unlabelled seed brings in a step (counted within its epoch)."""
        ratio = None if self._is_whole else self.num_unlabelled / self.num_labelled
        labelled, unlabelled = self._counts(step)
        return unlabelled_weight(self.semi, self._share(epoch), labelled, unlabelled, ratio)

    def factor_samples(self, epoch: int, step: int) -> float:
        """Return the paper's n of its factors, `m_l + λ_u·m_u`."""
        labelled, unlabelled = self._counts(step)
        return labelled + self._share(epoch) * unlabelled

    def num_seeds(self, step: int) -> int:
        """Return m_l + m_u of a step."""
        return sum(self._counts(step))

    def soft_labels(
        self, model: nn.Module, batch: DeviceBatch, outputs: Callable[[DeviceBatch], Tensor]
    ) -> Tensor | None:
        """Return the labels [m_u, classes] of a batch's unlabelled seeds; None where the arg-max is taken.

        outputs: what the model gives a batch's seeds.

        The batch's own layer graphs, without dropout, and with the weights before the step: in constant full batch that
        is the prediction at the end of the previous epoch.
        """
        if self.temperature is None:
            return None
        was_training = model.training
        model.eval()
        with torch.no_grad():
            logits = outputs(batch)
        model.train(was_training)
        return sharpened(logits[batch.labels.shape[0] :], self.temperature)

    @property
    def _is_whole(self) -> bool:
        """Whether every step has every node."""
        return (self.labelled_step, self.unlabelled_step) == (self.num_labelled, self.num_unlabelled)

    def _counts(self, step: int) -> tuple[int, int]:
        left = self.num_labelled - step * self.labelled_step
        return min(self.labelled_step, left), self.unlabelled_step

    def _share(self, epoch: int) -> float:
        return unlabelled_share(epoch, self.epochs, self.gamma, self.largest)
