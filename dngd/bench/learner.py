"""One competitor: its own copy of a model and an optimizer, taking a training step as dngd.train does."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dngd.bench.device import wait_for
from dngd.bench.optimizers import build_competitor
from dngd.comm import Communicator, FlatGradients, LocalCommunicator, StepSums
from dngd.config import TrainConfig
from dngd.graph import GraphStore
from dngd.models import GNN, build_model
from dngd.sampling import BatchCoordinates, MiniBatch, derive_seed
from dngd.train.batch import DeviceBatch, PropagationBuilder
from dngd.train.divergence import DivergenceMeter, takes_whole_batches
from dngd.train.metrics import StepClock
from dngd.train.optimizers import UNKNOWN_SET, TrainingSet
from dngd.train.streams import DROPOUT_STREAM, WEIGHTS_STREAM, seed_generators


@dataclass(frozen=True)
class Batch:
    """What a step works on: a sampled mini-batch, or one that is on its device already (the full batch)."""

    content: MiniBatch | DeviceBatch
    coordinates: BatchCoordinates


def initial_model(config: TrainConfig, store: GraphStore) -> GNN:
    """Return the model that every competitor starts from; it depends on the configuration's seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, WEIGHTS_STREAM))
        return build_model(
            config.model,
            in_features=store.num_features,
            hidden=config.hidden,
            out_features=store.num_classes,
            num_layers=config.num_layers,
            dropout=config.dropout,
        )


class Learner:
    """A model, its flat gradients and its optimizer. clock: step times and phases since `start_clock`.

    It trains where the features are. On a GPU, which works on while the host goes on, phases are the host's times.

    communicator: of the ranks that step together; None for a single one. training_set: what K-FAC's
    damping follows where it is left open; unknown where only times matter.
    """

    def __init__(
        self,
        name: str,
        config: TrainConfig,
        lr: float,
        model: GNN,
        features: Tensor,
        builder: PropagationBuilder,
        communicator: Communicator | None = None,
        training_set: TrainingSet = UNKNOWN_SET,
    ) -> None:
        self.name = name
        self.lr = lr
        self.device = features.device
        self.model = copy.deepcopy(model).to(self.device)
        self.model.train()
        self.clock = StepClock()
        self.dropped_steps = 0
        self._seed = config.seed
        self._features = features
        self.builder = builder
        self._communicator = LocalCommunicator() if communicator is None else communicator
        self.competitor = build_competitor(name, config, lr, self.model, self._communicator, training_set)
        takes_all = takes_whole_batches(config, self.device)
        step_optimizer = self.competitor.step_optimizer
        self._meter = DivergenceMeter(step_optimizer, self.model, self._logits, takes_all=takes_all)
        self._gradients = FlatGradients(self.model.parameters())
        self._kfac_before: dict[str, float] = {}

    @property
    def parameter_bytes(self) -> int:
        """Bytes of the model's parameters."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    def start_clock(self) -> None:
        """Forget the times so far."""
        self.clock = StepClock()
        self._kfac_before = self._kfac_seconds()

    def kfac_phase_ms(self) -> dict[str, float]:
        """Return the mean milliseconds a step of each of K-FAC's own phases since start_clock; else empty."""
        steps = max(1, len(self.clock.step_seconds))
        return {
            name: (seconds - self._kfac_before.get(name, 0.0)) * 1e3 / steps
            for name, seconds in self._kfac_seconds().items()
        }

    def step(self, batch: Batch, lr: float, *, alone: bool) -> StepSums:
        """Take one step and record its time: from zeroing the gradients to the parameters' update.

        The operators of the layer graphs are part of the forward pass, as in the training loop; sampling is not
        here. alone: whether the step pays for all that it started, inversions on K-FAC's other thread included;
        without it they may go on during this learner's next steps.
        """
        where = batch.coordinates
        optimizer = self.competitor.step_optimizer
        seed = derive_seed(self._seed, DROPOUT_STREAM, where.epoch, where.step, where.shard)
        seed_generators(seed, self.device)
        is_measured = self._meter.is_due
        started = time.perf_counter()
        self.competitor.set_learning_rate(lr)
        with self.clock.phase("zero"):
            self._gradients.zero_()
        with self.clock.phase("forward"), self._meter.watch(where.shard):
            on_device = self._on_device(batch.content)
            logits = self._logits(on_device)
            loss_sum = F.cross_entropy(logits, on_device.labels, reduction="sum")
        if is_measured:
            with self.clock.phase("divergence"):
                self._meter.note(where.shard, on_device)
        with self.clock.phase("observe"):
            optimizer.observe(logits, weights=None, key=where.shard)
        with self.clock.phase("backward"):
            loss_sum.backward()  # type: ignore[no-untyped-call]
        num_seeds = on_device.seeds.numel()
        self._gradients.add_loss_(loss_sum, num_seeds)
        with self.clock.phase("reduce"):
            sums = self._gradients.reduce_(self._communicator)
        with self.clock.phase("optimizer"):
            optimizer.step(num_seeds_here=num_seeds, finite=sums.finite)
            if alone:
                self.competitor.finish_background()
        if is_measured:
            with self.clock.phase("divergence"):
                self._meter.measure(finite=sums.finite)
        if alone:
            wait_for(self.device)
        self.clock.step_seconds.append(time.perf_counter() - started)
        self.dropped_steps += not sums.finite
        return sums

    def _logits(self, batch: DeviceBatch) -> Tensor:
        logits: Tensor = self.model(self._features, batch.propagations, batch.first_aggregation, batch.first_output)
        return logits

    def close(self) -> None:
        """Release what the optimizer holds of the model."""
        self.competitor.close()

    def _on_device(self, content: MiniBatch | DeviceBatch) -> DeviceBatch:
        return content if isinstance(content, DeviceBatch) else self.builder.batch(content)

    def _kfac_seconds(self) -> dict[str, float]:
        preconditioner = self.competitor.step_optimizer.preconditioner
        return {} if preconditioner is None else dict(preconditioner.phase_seconds)
