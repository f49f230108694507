"""One rank of a world in a benchmark: dngd's training step over a real process group.

Every rank draws its own shard of each step's global batch, as `dngd train` does. Seconds in collectives are measured
apart; the rest of a step is this rank's own work.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch

from dngd.allocator import keep_freed_memory
from dngd.bench.child import Message
from dngd.bench.learner import Batch, Learner, initial_model
from dngd.bench.optimizers import base_rate
from dngd.bench.traffic import TimedCommunicator, full_matrix_bytes
from dngd.comm import Communicator, current_communicator, init_process_group
from dngd.config import TrainConfig
from dngd.errors import TrainingError
from dngd.graph import GraphStore
from dngd.sampling import MiniBatch, SamplerPipeline
from dngd.train.batch import PropagationBuilder
from dngd.train.optimizers import TrainingSet
from dngd.train.placement import PlacedFeatures, with_sparse
from dngd.train.plan import batch_size_of


class Rank:
    """A rank, in its process.

    setup: rank, world_size, rendezvous (a path that all ranks see), threads, store (path), config (TrainConfig as JSON;
    its shards are the world size). Requests: {"do": "learn", "optimizer", "config"} begins anew, with the first
    batch; {"do": "steps", "steps", "sleep_seconds"} takes steps, each after that much sleep.
    """

    def __init__(self, setup: Message) -> None:
        torch.set_num_threads(setup["threads"])
        config = TrainConfig(**setup["config"])
        self._rank: int = setup["rank"]
        self._world_size: int = setup["world_size"]
        self._store = GraphStore.open(Path(setup["store"]))
        limit = config.collective_timeout_seconds
        if self._world_size > 1:
            init_process_group(self._rank, self._world_size, f"file://{setup['rendezvous']}", timeout_seconds=limit)
        self._communicator = TimedCommunicator(current_communicator(timeout_seconds=limit))
        self._config = config
        self._builder: PropagationBuilder | None = None
        self._learner: Learner | None = None
        self._batches: Iterator[MiniBatch] = iter(())
        self._pipeline: SamplerPipeline | None = None
        if "optimizer" in setup:
            self._learn(setup["optimizer"], config)

    def answer(self, request: Message) -> Message:
        """Do what is asked; all ranks are asked alike."""
        if request["do"] == "learn":
            self._learn(request["optimizer"], TrainConfig(**request["config"]))
            return {}
        return self._steps(request["steps"], request.get("sleep_seconds", 0.0))

    def _learn(self, optimizer: str, config: TrainConfig) -> None:
        """Begin with an optimizer and the configuration's model, from the first batch on."""
        if self._learner is not None:
            self._learner.close()
        if self._pipeline is not None:
            self._pipeline.close()
        model = initial_model(config, self._store)
        if self._builder is None:
            self._builder = PropagationBuilder(self._store, model.aggregation, self._store.labels.device)
        train_nodes = self._store.split(config.split, config.seed).train
        self._learner = Learner(
            optimizer,
            config,
            base_rate(optimizer, config),
            model,
            self._store.features,
            self._builder,
            cast(Communicator, self._communicator),
            TrainingSet(int(train_nodes.numel()), self._store.num_classes),
        )
        batch_size = batch_size_of(config, int(train_nodes.numel()))
        self._pipeline = SamplerPipeline(
            self._store,
            train_nodes,
            config.fanouts,
            config.seed,
            self._world_size,
            batch_size,
            [self._rank],
            num_samplers=config.samplers,
            # Without sampler processes a batch is drawn when it is asked for: within its own step.
            prefetch=config.prefetch if config.samplers else 0,
            timeout_seconds=config.collective_timeout_seconds,
            aggregation=model.aggregation,
            sparse=with_sparse(PlacedFeatures("memory_map", self._store.features), config, self._store, model).sparse,
        )
        # An epoch's last step may hold a few seeds only, on every rank: its time is not that of a step.
        self._batches = (batch for batch in self._pipeline if batch.seeds.numel() == batch_size)

    def _steps(self, steps: int, sleep_seconds: float) -> Message:
        learner = self._learner
        assert learner is not None, "ask it to learn first"
        if self._config.keep_memory:
            # As dngd's training loop does, and not before: what setting up frees is not wanted again.
            keep_freed_memory()
        learner.start_clock()
        before = Counter(self._communicator.bytes_sent)
        calls = Counter(self._communicator.calls)
        times: dict[str, list[float]] = {"step": [], "draw": [], "collective": []}
        seeds = edges = 0
        loss = 0.0
        for _ in range(steps):
            in_collectives = self._communicator.seconds
            started = time.perf_counter()
            if sleep_seconds > 0:
                time.sleep(sleep_seconds)
            drawing = time.perf_counter()
            batch = next(self._batches)
            drawn = time.perf_counter()
            sums = learner.step(Batch(batch, batch.coordinates), learner.lr, alone=False)
            ended = time.perf_counter()
            if learner.dropped_steps:
                raise TrainingError(
                    f"{learner.name} had non-finite gradients, so that it cannot be timed; its learning rate is "
                    f"{learner.lr:g}: check its settings and the features (dngd data verify)"
                )
            times["step"].append(ended - started)
            times["draw"].append(drawn - drawing)
            times["collective"].append(self._communicator.seconds - in_collectives)
            seeds, edges = seeds + int(batch.seeds.numel()), edges + batch.num_edges
            loss = sums.loss_sum / sums.num_seeds
        sent: Counter[str] = Counter(self._communicator.bytes_sent)
        sent.subtract(before)
        made = Counter(self._communicator.calls)
        made.subtract(calls)
        return {
            "seconds": times,
            "bytes": {kind: int(size) for kind, size in sent.items() if size},
            "calls": {name: number for name, number in made.items() if number},
            "phase_ms": learner.clock.phase_ms(),
            "kfac_phase_ms": learner.kfac_phase_ms(),
            "seeds": seeds,
            "edges": edges,
            "loss": loss,
            **self._sizes(learner),
        }

    def _sizes(self, learner: Learner) -> dict[str, Any]:
        preconditioner = learner.competitor.step_optimizer.preconditioner
        return {
            "parameter_bytes": learner.parameter_bytes,
            "full_matrix_bytes": 0 if preconditioner is None else full_matrix_bytes(preconditioner),
        }
