"""The training loop: set up, resume, step, evaluate, checkpoint, report. One rank's whole story.

A step's work is S logical shards. This rank back-propagates its shards (sampled ahead, or constant in full batch),
the gradients of the summed loss are reduced and divided by the global divisor (the number of seeds, where all weigh
1), and every rank takes the same optimizer step.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dngd.allocator import keep_freed_memory
from dngd.comm import Communicator, FlatGradients, StepSums, shards_of_rank
from dngd.config import TrainConfig
from dngd.errors import DivergedError, RunInterrupted, TrainingError, UserError
from dngd.graph import GraphStore, Progress, Split
from dngd.models import GNN
from dngd.models.decoder import pair_logits
from dngd.optim import learning_rate
from dngd.sampling import derive_seed
from dngd.train.batch import BatchSource, DeviceBatch
from dngd.train.buffers import RunningStatistics, share_buffers
from dngd.train.callbacks import Callbacks, RunState
from dngd.train.checkpoint import (
    CheckpointFolder,
    Snapshot,
    check_same_run,
    host_copies,
    replace_file,
    said_in,
    weights_file,
)
from dngd.train.checkpoint_writer import CheckpointSchedule, CheckpointWriter
from dngd.train.divergence import DivergenceMeter, takes_whole_batches
from dngd.train.health_log import HealthLog
from dngd.train.loggers import make_loggers
from dngd.train.losses import UnlabelledWeight
from dngd.train.metrics import (
    EvaluationRecord,
    MetricsLog,
    RunResult,
    machine,
    mark_unfinished,
    peak_gpu_bytes,
    peak_rss_bytes,
    read_metrics,
    versions,
)
from dngd.train.objective import make_objective
from dngd.train.optimizers import (
    build_optimizer,
    evaluated_weights,
    load_moments,
    moments,
    set_learning_rate,
    training_set_of,
    weight_average,
    wrap_optimizer,
)
from dngd.train.parts import RunParts, check_outputs, make_module, own_part
from dngd.train.placement import choose_placement, free_gpu_bytes, place_features, with_sparse
from dngd.train.plan import check_fits, device_of, make_plan, with_samplers
from dngd.train.progress import Reporter, StepRecord, warn
from dngd.train.run_folder import RunFolder, check_same_graph, resume_command, spill_folders
from dngd.train.semi import SemiSupervision
from dngd.train.sources import BatchSources
from dngd.train.streams import DROPOUT_STREAM, WEIGHTS_STREAM, seed_generators
from dngd.train.supervision import Supervision
from dngd.train.surroundings import load_weights, make_surroundings
from dngd.train.task import evaluated_nodes, graph_of, shape_of, split_of
from dngd.train.together import check_same_everywhere, open_dataset, together

logger = logging.getLogger(__name__)

REPORT_PERIOD_SECONDS = 0.25
FULL_BATCH_CHECKPOINT_PERIOD = 50
"""An epoch is one step there, shorter than writing a checkpoint."""


class TrainingLoop:
    """One rank of a run. Every method that communicates must be called by all ranks alike."""

    def __init__(
        self,
        config: TrainConfig,
        communicator: Communicator,
        reporter: Reporter,
        *,
        workers_here: int = 1,
        supervision: Supervision | None = None,
        folder: RunFolder | None = None,
        parts: RunParts | None = None,
    ) -> None:
        assert config.run_dir is not None, "the launcher settles the run folder"
        self.config = config
        self.comm = communicator
        self.reporter = reporter
        self.warn = partial(warn, reporter)
        self.supervision = supervision or Supervision()
        self.parts = parts or RunParts()
        self.metric_name = self.parts.metric_name(config)
        self.clock = self.supervision.clock
        self.folder = folder or RunFolder(config.run_dir)
        self.device = device_of(config)
        self.store: GraphStore = together(
            self._fetched,
            communicator,
            limit_seconds=config.stage_timeout_seconds,
            round_seconds=config.collective_timeout_seconds / 4,
            tell=reporter.message,
        )
        check_same_everywhere(self.store, communicator)
        self.split = split_of(config, self.store)
        self.graph = graph_of(self.store, self.split)
        left_out = sum(self.split.dropped_unlabelled.values()) if isinstance(self.split, Split) else 0
        if left_out:
            reporter.message(f"{left_out} nodes of split {config.split} have no label and are left out")
        self.objective = make_objective(config, self.store, self.split.train, self.parts.loss)
        torch.manual_seed(derive_seed(config.seed, WEIGHTS_STREAM))
        self.shape = shape_of(config, self.store)
        self.model: nn.Module = make_module(config, self.parts, self.shape)
        self.plan = make_plan(config, self.store, self.split, None if isinstance(self.model, GNN) else self.model)
        if self.plan.takes_fewer_seeds(config):
            reporter.message(
                f"there are fewer {config.task}s to train on than the default batch_size, {config.batch_size}: a step "
                f"takes all of them, {self.plan.labelled} a shard"
            )
        self.plan, config = with_samplers(self.plan, config, workers_here)
        self.config = config
        check_fits(self.plan, config, workers_here, is_worker=True)
        self.semi = self._semi_supervision()
        free = 0
        if self.device.type == "cuda":
            free = int(free_gpu_bytes(self.device) * config.gpu_share)
            torch.cuda.reset_peak_memory_stats(self.device)
        placement = choose_placement(config, self.plan.feature_bytes, free, self.plan.gpu_bytes)

        self.model.to(self.device)
        self.placed = place_features(self.graph, placement, self.device, sampled=not config.constant_full_batch)
        self.placed = with_sparse(self.placed, config, self.graph, self.model)
        if self.placed.note:
            reporter.message(self.placed.note)
        self.features = self.placed.table
        self.builder, self.evaluator = make_surroundings(
            config,
            self.graph,
            self.model,
            communicator,
            device=self.device,
            features=self.features,
            cache=self.placed.cache,
            sparse=self.placed.sparse,
            folders=spill_folders(config, self.folder),
            objective=self.objective,
            metric=self.parts.metric_of(config),
        )
        self.sources = BatchSources(
            config,
            self.graph,
            self.split.train,
            self.plan,
            self.model,
            self.builder,
            self.placed,
            self.device,
            self.clock,
        )
        self.evaluator.check(self.model, evaluated_nodes(self.split))
        if self.parts.optimizer is None:
            training_set = training_set_of(config, self.split.train.numel(), self.store.num_classes)
            self.optimizer = build_optimizer(
                config, self.model, communicator, self.objective.kind, training_set=training_set
            )
        else:
            self.optimizer = wrap_optimizer(
                self.parts.optimizer(own_part(self.model)), weight_average(config, self.model)
            )
        takes_all = takes_whole_batches(config, self.device)
        self.meter = DivergenceMeter(self.optimizer, self.model, self._outputs, takes_all=takes_all)
        self.statistics = RunningStatistics(self.model, communicator)
        trainable = (p for p in self.model.parameters() if p.requires_grad)
        self.gradients = FlatGradients(trainable, own_part(self.model))
        self.checkpoints = CheckpointFolder(
            self.folder.checkpoints,
            communicator,
            keep=config.checkpoint.keep,
            send=self.folder.send_checkpoint,
            shown=f"{self.folder.shown}/checkpoints",
        )
        self.writer = CheckpointWriter(
            self.checkpoints,
            communicator,
            timeout_seconds=config.checkpoint.write_timeout_seconds,
            signal_seconds=config.collective_timeout_seconds / 4,
            tell=self.warn,
            written=self.supervision.checkpointed,
        )
        if communicator.rank == 0:
            self.folder.checkpoints.mkdir(exist_ok=True)  # there and empty: none was lost
        self.schedule = _checkpoint_schedule(config, communicator)
        self.metrics = MetricsLog(self.folder.metrics, self.metric_name, f"{self.folder.shown}/metrics.jsonl")
        self.health = HealthLog(self.folder.health)
        if self.optimizer.preconditioner is not None:
            self.optimizer.preconditioner.inside = self.clock.inside

        self.step = self.measured_from_step = 0
        self.train_seconds = 0.0
        self.epoch_loss = 0.0
        self.epoch_seeds = 0.0
        self.seeds_done = 0.0
        self.dropped_in_a_row = 0
        self.dropped_steps = 0
        self.checkpointed_step = 0
        self.steps_repeated = 0
        self.best: EvaluationRecord | None = None
        self.best_predicts = self.predicts_all = True
        self.best_model: bytes | None = None
        self.history: list[EvaluationRecord] = []
        self._reported = (time.monotonic(), 0.0)
        self.asked_to_end = False
        self.state = RunState(
            config,
            self.folder.path,
            own_part(self.model),
            self.optimizer.torch_optimizer,
            self.metric_name,
            self.plan.total_steps,
        )
        chosen = [*make_loggers(config.loggers), *self.parts.callbacks] if communicator.rank == 0 else []
        self.callbacks = Callbacks(chosen, self.warn, self.clock.inside)

    def run(self) -> RunResult:
        """Train to the end and return the result; rank 0 has written the run folder by then."""
        if self.config.resume:
            with self.clock.inside("resuming"):
                self._resume()
        shards = shards_of_rank(self.config.shards, self.comm.rank, self.comm.world_size)
        logger.info("training: shards %s of %d, to step %d", list(shards), self.config.shards, self.plan.total_steps)
        self.model.train()
        if self.config.keep_memory and self.device.type == "cpu":
            # Not before: what setting up takes and frees, for graphs of millions of nodes, is never wanted again.
            keep_freed_memory()
        self.state.step, self.state.history = self.step, self.history
        self.measured_from_step = self.step
        self.callbacks.start(self.state)
        # Past the last step there is nothing to sample: a finished run that is resumed only reports.
        if not self._is_over():
            if self.comm.rank == 0:
                mark_unfinished(self.folder.result)
                self.folder.changed()
            started = time.perf_counter()
            with self.supervision.stops, self.sources.open(shards, self.step) as source:
                if self.config.constant_full_batch:
                    self.train_seconds += time.perf_counter() - started  # of what no step has to do again
                self.schedule.start(self.step)
                while not self._is_over():
                    stop = self._train_step(source, shards)
                    self._after_step()
                    if stop and not self._is_over():
                        self._interrupt()
        with self.clock.inside("writing the checkpoint"):
            if self.writer.left_out_step == self.step:
                self._checkpoint()  # there is nothing left to hold up: the last one is worth a second wait
            self.writer.finish()
        return self._finish()

    def finish_folder(self) -> None:
        """Return when all of a run at an address is there. All ranks enter."""
        with self.clock.inside("sending the run's files"):
            together(
                lambda progress: self.folder.finish(),
                self.comm,
                limit_seconds=self.config.checkpoint.write_timeout_seconds,
                round_seconds=self.config.collective_timeout_seconds / 4,
                tell=self.reporter.message,
                state="are done",
                fix="wait longer with --set checkpoint.write_timeout_seconds=N",
            )

    def _fetched(self, progress: Progress) -> GraphStore:
        """Return the graph, after what the run has elsewhere is here."""
        if self.comm.rank == 0 and self.config.resume:
            try:
                self.folder.fetch()
            except UserError as error:
                if self.supervision.attempt.number == 1:
                    raise
                raise TrainingError(str(error)) from error  # the next attempt may find the store again
        return open_dataset(self.config, progress)

    def _is_over(self) -> bool:
        """Whether all steps are taken, or too many evaluations in a row were no better than the best; alike on all
        ranks, which have the same history; or a callback wants it."""
        return self.step >= self.plan.total_steps or self.asked_to_end or self._has_stalled()

    def _has_stalled(self) -> bool:
        if self.config.patience is None or self.best is None:
            return False
        return sum(record.step > self.best.step for record in self.history) >= self.config.patience

    def _semi_supervision(self) -> SemiSupervision | None:
        num_labelled = self.split.train.numel()
        others = self.store.num_nodes - num_labelled
        return SemiSupervision.of(self.config, num_labelled, others, self.plan.labelled, self.plan.unlabelled)

    def _interrupt(self) -> None:
        """Leave after a checkpoint of this step, as Ctrl-C asked for. All ranks enter."""
        if self.checkpointed_step != self.step or self.writer.left_out_step == self.step:
            self._checkpoint()
        with self.clock.inside("writing the checkpoint"):
            self.writer.finish()
        if self.config.run_address is not None:
            self.finish_folder()
        raise RunInterrupted(
            f"interrupted after step {self.step} of {self.plan.total_steps}; go on with "
            f"{resume_command(self.config, self.folder, self.parts.own())}",
            self.step,
            self.folder.shown,
        )

    def _train_step(self, source: BatchSource, shards: Sequence[int]) -> bool:
        """Take a step; return whether a rank wants the run to stop after it, which all ranks learn alike."""
        started = time.perf_counter()
        self.clock.at_step(self.step)
        epoch, step_in_epoch = divmod(self.step, self.plan.steps_per_epoch)
        lr = learning_rate(
            self.step,
            # max_steps cuts a run short without bending its schedule, so that it can be gone on with.
            self.plan.steps_per_epoch * self.config.epochs,
            self.config.learning_rate,
            self.config.schedule,
            self.config.warmup_steps,
            self.config.lr_half_steps,
        )
        set_learning_rate(self.optimizer.torch_optimizer, lr)
        self.gradients.zero_()
        is_measured = self.meter.is_due
        num_seeds_here = 0.0
        self.statistics.begin_step()
        for shard in shards:
            batch = source.batch(epoch, step_in_epoch, shard)
            seed_generators(derive_seed(self.config.seed, DROPOUT_STREAM, epoch, step_in_epoch, shard), self.device)
            unlabelled = None if self.semi is None else self.semi.weight(epoch, step_in_epoch)
            num_seeds_here += self._back_propagate(batch, shard, unlabelled)
            source.look_ahead()
        if self.supervision.stops.wanted:
            self.gradients.ask_to_stop_()
        with self.clock.phase("reduce"):
            sums = self.gradients.reduce_(self.comm)
            self.statistics.end_step(finite=sums.finite)
        with self.clock.phase("optimizer"):
            self.optimizer.step(
                num_seeds_here=num_seeds_here,
                finite=sums.finite,
                factor_samples=None if self.semi is None else self.semi.factor_samples(epoch, step_in_epoch),
            )
        if is_measured:
            with self.clock.phase("divergence"):
                self.meter.measure(finite=sums.finite)
        self._account(sums, step_in_epoch)
        self.step += 1
        elapsed = time.perf_counter() - started
        self.train_seconds += elapsed
        self.clock.step_seconds.append(elapsed)
        return sums.stop

    def _back_propagate(self, batch: DeviceBatch, shard: int, unlabelled: UnlabelledWeight | None) -> float:
        """Add a shard's summed-loss gradients to the flat buffer; return its share of the divisor."""
        if batch.seeds.numel() == 0:
            return 0.0
        with self.clock.phase("forward"), self.meter.watch(shard):
            soft_labels = None if self.semi is None else self.semi.soft_labels(self.model, batch, self._outputs)
            logits = self._outputs(batch)
            loss = self.objective.shard_loss(logits, batch.labels, unlabelled, soft_labels)
        if self.meter.is_due:
            with self.clock.phase("divergence"):
                self.meter.note(shard, batch)
        with self.clock.phase("observe"):
            self.optimizer.observe(logits, weights=loss.weights, key=shard)
        with self.clock.phase("backward"):
            loss.loss_sum.backward()  # type: ignore[no-untyped-call]
        self.statistics.end_shard()
        self.gradients.add_loss_(loss.loss_sum, loss.divisor)
        return loss.divisor

    def _outputs(self, batch: DeviceBatch) -> Tensor:
        """Return the logits of a batch's seeds, [n, C], or of its pairs, [m, 1]."""
        outputs: Tensor
        if batch.graph is None:
            outputs = self.model(self.features, batch.propagations, batch.first_aggregation, batch.first_output)
        else:
            outputs = self.model(batch.graph)
            check_outputs(outputs, batch.seeds.numel(), self.shape.num_classes)
        return outputs if batch.pairs is None else pair_logits(outputs, batch.pairs)

    def _account(self, sums: StepSums, step_in_epoch: int) -> None:
        self.state.loss = sums.loss_sum / sums.num_seeds if sums.num_seeds else float("nan")
        if sums.finite:
            self.dropped_in_a_row = 0
            self.epoch_loss += sums.loss_sum
            self.epoch_seeds += sums.num_seeds
        else:
            self.dropped_in_a_row += 1
            self.dropped_steps += 1
            self.warn(f"step {self.step}: a gradient is not finite; all ranks dropped the step")
        if self.objective.class_weights is not None:  # the divisor is no number of seeds then
            self.seeds_done += self.split.train.numel() / self.plan.steps_per_epoch
        else:
            self.seeds_done += sums.num_seeds if self.semi is None else self.semi.num_seeds(step_in_epoch)
        if self.dropped_in_a_row >= self.config.max_dropped_steps:
            raise DivergedError(
                f"{self.dropped_in_a_row} steps in a row had non-finite gradients (up to step {self.step}); use a "
                "smaller --lr or a larger --damping, and check the features with dngd data verify"
            )

    def _after_step(self) -> None:
        self.clock.at_step(self.step)
        per_epoch = self.plan.steps_per_epoch
        ended = self.step == self.plan.total_steps
        epoch_ended = self.step % per_epoch == 0
        self._report_step()
        self.state.step, self.state.learning_rate = (
            self.step,
            self.optimizer.torch_optimizer.param_groups[0].get("lr", 0.0),
        )
        self.callbacks.step(self.state)
        if ended or (epoch_ended and (self.step // per_epoch) % self.config.eval_period == 0):
            with self.clock.inside("evaluation"):
                self._evaluate()
        if epoch_ended:
            self.epoch_loss = self.epoch_seeds = 0.0
        if self._is_over() and not ended:
            ended = True
            why = f"{self.config.patience} evaluations in a row without a better validation {self.metric_name}"
            self.reporter.message(
                f"stopped early after step {self.step}: {'a callback asked for it' if self.asked_to_end else why}"
            )
        if self.schedule.is_due(self.step, epoch_ended=epoch_ended) or ended:
            started = time.perf_counter()
            with self.clock.phase("checkpoint"):
                self._checkpoint()
            self.train_seconds += time.perf_counter() - started

    def _report_step(self) -> None:
        now = time.monotonic()
        last, seeds = self._reported
        if now - last < REPORT_PERIOD_SECONDS and self.step < self.plan.total_steps:
            return
        rate = (self.seeds_done - seeds) / max(now - last, 1e-9)
        self._reported = (now, self.seeds_done)
        mean_loss = self.epoch_loss / self.epoch_seeds if self.epoch_seeds else float("nan")
        epoch = (self.step - 1) // self.plan.steps_per_epoch + 1
        self.reporter.step(StepRecord(self.step, self.plan.total_steps, epoch, mean_loss, rate))

    def _evaluate(self) -> None:
        share_buffers(self.model, self.comm)
        with evaluated_weights(self.optimizer):
            self._evaluate_model()

    def _evaluate_model(self) -> None:
        scores = self.evaluator.scores(self.model, self.split)
        record = EvaluationRecord(
            epoch=self.step / self.plan.steps_per_epoch,
            step=self.step,
            train_loss=self.epoch_loss / self.epoch_seeds if self.epoch_seeds else float("nan"),
            val_loss=scores["val"].loss,
            val_accuracy=scores["val"].accuracy,
            test_accuracy=scores["test"].accuracy,
            train_seconds=self.train_seconds,
        )
        if math.isnan(record.val_accuracy) and not any(math.isnan(before.val_accuracy) for before in self.history):
            self.warn(
                f"the validation {self.metric_name} is not defined (its nodes are of one class alone, or an output is "
                "not finite): until it is, the first model counts as the best"
            )
        if scores["val"].predicted < 1 and self.predicts_all:
            self.predicts_all = False
            self.warn(
                f"step {self.step}: {1 - scores['val'].predicted:.1%} of the validation outputs are not finite and "
                "count as wrong; use a smaller --lr or a larger --damping"
            )
        self.history.append(record)
        preconditioner = self.optimizer.preconditioner
        health = preconditioner.health() if preconditioner is not None and self.comm.rank == 0 else {}
        if self.comm.rank == 0:
            self.metrics.append(record)
            if health:
                self.health.append(self.step, health)
        if self._is_best(record):
            self.best = record
            self.best_predicts = scores["val"].predicted > 0
            if self.comm.rank == 0:
                self.best_model = self._model_bytes(record)
                replace_file(self.folder.best_model, self.best_model)
        self.folder.changed()
        self.reporter.evaluation(record)
        logger.info(
            "evaluation: train loss %.4f, val loss %.4f, val %s %.4f",
            *(record.train_loss, record.val_loss, self.metric_name, record.val_accuracy),
        )
        wish = self.callbacks.evaluation(self.state, record)
        if self.parts.callbacks:  # known to all ranks alike, and the only ones that may want it
            answer = b"end" if wish else b"go on"
            self.asked_to_end |= self.comm.broadcast_bytes(answer if self.comm.rank == 0 else None) == b"end"
        if self.supervision.measured is not None:
            self.supervision.measured(record, self._measurements(health))

    def _is_best(self, record: EvaluationRecord) -> bool:
        """Whether none before was as good; any number is better than none, as a metric may be before it is defined."""
        if self.best is None or record.val_accuracy > self.best.val_accuracy:
            return True
        return math.isnan(self.best.val_accuracy) and not math.isnan(record.val_accuracy)

    def _measurements(self, health: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        """Return step phases in ms, bytes, staleness and factor health by name, of this rank; health at rank 0."""
        out = {f"step_ms/{name}": value for name, value in self.clock.step_ms().items()}
        out |= {f"phase_ms/{name}": value for name, value in self._phase_ms().items()}
        out |= {f"bytes/{kind}": float(size) for kind, size in self.comm.bytes_sent.items()}
        out["dropped_steps"] = float(self.dropped_steps)
        for layer, values in health.items():
            out |= {f"factor_health/{layer}/{name}": value for name, value in values.items()}
        return out

    def _phase_ms(self) -> dict[str, float]:
        phases = self.clock.phase_ms()
        if self.optimizer.preconditioner is not None:
            for name, seconds in self.optimizer.preconditioner.phase_seconds.items():
                phases[f"optimizer.{name}"] = seconds * 1e3 / max(1, len(self.clock.step_seconds))
        return phases

    def _model_bytes(self, record: EvaluationRecord) -> bytes:
        tensors = host_copies(self.model.state_dict())
        said = {
            "step": str(record.step),
            "val_accuracy": repr(record.val_accuracy),
            "graph_digest": self.store.digest,
        }
        if self.config.model == "custom":
            said |= {"num_features": str(self.shape.num_features), "num_classes": str(self.shape.num_classes)}
        if self.store.is_multilabel and self.config.task == "node":
            said["labels"] = "several"
        if self.store.label_names is not None and self.config.task == "node":
            said["label_names"] = json.dumps(self.store.label_names)
        return weights_file(tensors, said)

    def _checkpoint(self) -> None:
        preconditioner = self.optimizer.preconditioner
        self.checkpointed_step = self.step
        logger.info("checkpoint")
        self.writer.save(
            Snapshot(
                step=self.step,
                position={
                    "train_seconds": self.train_seconds,
                    "epoch_loss": self.epoch_loss,
                    "epoch_seeds": self.epoch_seeds,
                    "dropped_in_a_row": self.dropped_in_a_row,
                    "dropped_steps": self.dropped_steps,
                    "best_step": self.best.step if self.best else None,
                    "best": self.best.to_json() if self.best else None,
                    "graph": self.store.name,
                    "graph_digest": self.store.digest,
                },
                identity=self.config.identity(),
                model=dict(self.model.state_dict()),
                optimizer=moments(self.optimizer.torch_optimizer),
                average=None if self.optimizer.average is None else self.optimizer.average.state_dict(),
                curvature=None if preconditioner is None else preconditioner.state_dict(),
                best_model=self.best_model,
            )
        )

    def _resume(self) -> None:
        snapshot, skipped = self.checkpoints.load_newest(
            limit_seconds=self.config.stage_timeout_seconds,
            round_seconds=self.config.collective_timeout_seconds / 4,
            tell=self.reporter.message,
        )
        for text in skipped:
            self.warn(text)
        if snapshot is None:
            if self.supervision.attempt.number == 1:
                self.warn(f"nothing to resume in {self.folder.shown}; starting from the beginning")
            if self.comm.rank == 0:
                self.metrics.keep_up_to(-1)
                self.health.keep_up_to(-1)
                self.folder.best_model.unlink(missing_ok=True)
                self.folder.changed()
            self._tell_recovery()
            return
        check_same_run(snapshot.identity, self.config.identity())
        position: dict[str, Any] = snapshot.position
        check_same_graph(position, self.store, self.folder.shown)
        load_weights(self.model, snapshot.model, f"the checkpoint of step {snapshot.step} in {self.folder.shown}")
        load_moments(self.optimizer.torch_optimizer, snapshot.optimizer)
        if self.optimizer.average is not None:
            self.optimizer.average.load_state_dict(snapshot.average or {})
        if self.optimizer.preconditioner is not None:
            self.optimizer.preconditioner.load_state_dict(*snapshot.rank_curvatures)
        if self.comm.rank == 0:
            self.health.keep_up_to(snapshot.step)
            # What a later step left there belongs to a time line that is given up.
            self.folder.best_model.unlink(missing_ok=True)
            self.best_model = snapshot.best_model
            if snapshot.best_model is not None:
                replace_file(self.folder.best_model, snapshot.best_model)
        self.step = snapshot.step
        self.clock.at_step(self.step)
        self.train_seconds = position["train_seconds"]
        self.epoch_loss, self.epoch_seeds = position["epoch_loss"], position["epoch_seeds"]
        self.dropped_in_a_row, self.dropped_steps = position["dropped_in_a_row"], position["dropped_steps"]
        # Rank 0 alone reads the run folder. Which evaluation is the best is the checkpoint's to say: it has the model.
        kept = []
        if self.comm.rank == 0:
            kept = self.metrics.keep_up_to(self.step, self._best_of(snapshot), self.warn)
        self.history = self._broadcast_history(kept)
        self.folder.changed()
        self.best = next((r for r in self.history if r.step == position["best_step"]), None)
        if self.supervision.attempt.number > 1:
            self._tell_recovery()
        elif self.step >= self.plan.total_steps:
            self.reporter.message(
                f"the run is finished (step {self.step}); nothing to do: raise {self._ends()} to go on"
            )
        elif self._has_stalled():
            self.reporter.message(
                f"the run was ended by patience={self.config.patience} after step {self.step} of "
                f"{self.plan.total_steps}; nothing to do: raise --patience (or --set patience=null) to go on"
            )
        else:
            self.reporter.message(f"resumed from step {self.step} of {self.plan.total_steps}")

    def _ends(self) -> str:
        """Return the options that end the run at its last step."""
        by_epochs, by_steps = self.plan.steps_per_epoch * self.config.epochs, self.config.max_steps
        options = ["--epochs"] if self.plan.total_steps == by_epochs else []
        options += ["--max-steps"] if self.plan.total_steps == by_steps else []
        options += ["--patience"] if self._has_stalled() else []
        return " and ".join(options)

    def _best_of(self, snapshot: Snapshot) -> EvaluationRecord | None:
        """Return the best evaluation that a checkpoint holds; None if there was none before it."""
        position = snapshot.position
        if position.get("best") is not None:
            return EvaluationRecord.from_json(position["best"])
        if position["best_step"] is None or snapshot.best_model is None:
            return None
        # A checkpoint of an earlier dngd: the log has the evaluation, or else the model's file its step and value.
        for record in read_metrics(self.folder.metrics):
            if record.step == position["best_step"]:
                return record
        value = float(said_in(snapshot.best_model)["val_accuracy"])
        step, unknown = position["best_step"], math.nan
        return EvaluationRecord(step / self.plan.steps_per_epoch, step, *(unknown,) * 2, value, *(unknown,) * 2)

    def _tell_recovery(self) -> None:
        attempt = self.supervision.attempt
        if attempt.number == 1:
            return
        self.steps_repeated = max(0, attempt.reached_step - self.step)
        workers = "1 worker" if self.comm.world_size == 1 else f"{self.comm.world_size} workers"
        again = "1 step is" if self.steps_repeated == 1 else f"{self.steps_repeated} steps are"
        self.reporter.message(
            f"{attempt.reason}; the run goes on from step {self.step} of {self.plan.total_steps} with {workers}, "
            f"{again} done again"
        )
        self.supervision.resumed(self.step, self.steps_repeated)

    def _broadcast_history(self, records: list[EvaluationRecord]) -> list[EvaluationRecord]:
        payload = json.dumps([asdict(record) for record in records]).encode() if self.comm.rank == 0 else None
        return [EvaluationRecord(**item) for item in json.loads(self.comm.broadcast_bytes(payload))]

    def _finish(self) -> RunResult:
        if self.step and self.dropped_steps == self.step:
            raise DivergedError(
                f"all {self.step} steps had non-finite gradients and were dropped: nothing was learnt; "
                "use a smaller --lr or a larger --damping, and check the graph with dngd data verify"
            )
        if self.best is None:
            self._evaluate()
        assert self.best is not None
        if not self.best_predicts:
            raise DivergedError(
                f"no output of the network is finite at step {self.best.step}, nor at a later evaluation: nothing was "
                "learnt; use a smaller --lr or a larger --damping, and check the graph with dngd data verify"
            )
        preconditioner = self.optimizer.preconditioner
        phases = self._phase_ms()
        if preconditioner is not None:
            preconditioner.close()
        seconds_here = sum(self.clock.step_seconds)
        sent = self.comm.bytes_sent
        return RunResult(
            metric=self.metric_name,
            best_val_accuracy=self.best.val_accuracy,
            test_accuracy=self.best.test_accuracy,
            train_seconds=self.train_seconds,
            seconds_to_best_val=self.best.train_seconds,
            steps=self.step,
            epochs=self.step / self.plan.steps_per_epoch,
            world_size=self.comm.world_size,
            seeds_per_second=self.seeds_done / seconds_here if seconds_here else 0.0,
            step_ms=self.clock.step_ms(),
            phase_ms=phases,
            bytes={kind: int(sent[kind]) for kind in ("gradient", "factor", "inverse")}
            | ({"preconditioned": int(sent["preconditioned"])} if sent["preconditioned"] else {}),
            peak_rss_bytes=peak_rss_bytes(),
            peak_gpu_bytes=peak_gpu_bytes(self.device),
            dropped_steps=self.dropped_steps,
            versions=versions(),
            run_dir=self.folder.shown,
            recoveries=self.supervision.attempt.recoveries,
            steps_repeated=self.supervision.attempt.steps_repeated + self.steps_repeated,
            failed_checkpoints=self.writer.failed,
            failed_uploads=self.folder.failed,
            measured_from_step=self.measured_from_step,
            machine=machine(self.device),
            resolved=self._resolved(),
            history=self.history,
        )

    def _resolved(self) -> dict[str, Any]:
        """Return the values in use, of the rules and of what this machine and the ranks' measurements settled."""
        found = self.plan.resolved | {"metric": self.metric_name, "feature_placement": self.placed.where}
        if self.placed.cache is not None:
            found["feature_cache_bytes"] = self.placed.cache.table.nbytes
        found["checkpoint.period_steps"] = _checkpoint_period(self.config) or self.plan.steps_per_epoch
        if self.optimizer.preconditioner is not None and self.comm.world_size > 1:
            found["kfac.strategy"] = dict(self.optimizer.preconditioner.plan().strategies)
        return found


def _checkpoint_period(config: TrainConfig) -> int | None:
    """Return the steps between checkpoints; None for the end of each epoch."""
    if config.checkpoint.period_steps is None and config.constant_full_batch:
        return FULL_BATCH_CHECKPOINT_PERIOD
    return config.checkpoint.period_steps


def _checkpoint_schedule(config: TrainConfig, communicator: Communicator) -> CheckpointSchedule:
    minutes = config.checkpoint.period_minutes
    return CheckpointSchedule(
        communicator,
        period_steps=_checkpoint_period(config),
        period_seconds=None if minutes is None else minutes * 60,
    )
