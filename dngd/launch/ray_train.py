"""The training loop under Ray Train: `TorchTrainer` starts the workers and their process group.

Each worker runs the same `run_rank` as the local engine. Rank 0's progress reaches the driver through a
small actor; metrics also go to `ray.train.report`, which every rank calls equally often.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")

import ray
import ray.train
import ray.train.torch

from dngd.comm import current_communicator
from dngd.config import TrainConfig
from dngd.errors import TrainingError, UserError
from dngd.launch.cluster import connect, wait_for_resources
from dngd.train import EvaluationRecord, RunResult, run_rank
from dngd.train.progress import Reporter, StepRecord, deliver, event

POLL_SECONDS = 0.2

# Ray's own limits are minutes to unlimited. Ray Train hands these on from the driver to its controller.
LIMITS = {
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "120",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "120",
    "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "120",
}


@contextmanager
def on_cluster(config: TrainConfig, reporter: Reporter) -> Iterator[None]:
    """Be connected to a Ray cluster that has what the run asks for while the block runs.

    Raises UserError for an unreachable or too small cluster.
    """
    for name, value in LIMITS.items():
        os.environ.setdefault(name, value)
    reporter.message("connecting to Ray")
    connected = connect(config.ray)
    try:
        wait_for_resources(
            config.num_workers,
            config.ray.cpus_per_worker,
            config.use_gpu,
            config.ray.start_timeout_seconds,
            reporter.message,
            may_grow=connected and bool(config.ray.address or os.environ.get("RAY_ADDRESS")),
        )
        yield
    finally:
        if connected:
            ray.shutdown()


def run_on_ray(config: TrainConfig, reporter: Reporter) -> RunResult:
    """Train on the connected cluster and return rank 0's result.

    Raises UserError for what a worker refuses, TrainingError for a worker that failed.
    """
    assert config.run_dir is not None
    channel = ray.remote(ProgressChannel).options(num_cpus=0).remote()
    resources = {"CPU": config.ray.cpus_per_worker} | ({"GPU": 1.0} if config.use_gpu else {})
    trainer = ray.train.torch.TorchTrainer(
        _worker,
        train_loop_config={"config": config.model_dump(mode="json"), "channel": channel},
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.num_workers, use_gpu=config.use_gpu, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name="ray",
            storage_path=str(config.run_dir),
            # Ray's default retries its own failures, such as workers that find no node, for ever.
            failure_config=ray.train.FailureConfig(max_failures=0, controller_failure_limit=0),
        ),
        torch_config=ray.train.torch.TorchConfig(
            backend="nccl" if config.use_gpu else "gloo", timeout_s=int(config.collective_timeout_seconds)
        ),
    )
    with _relaying(channel, reporter):
        reporter.message(f"starting {config.num_workers} workers")
        try:
            trainer.fit()
        except SystemExit:  # what Ray makes of Ctrl-C
            raise KeyboardInterrupt from None
        except Exception as error:  # Ray wraps what a worker raised in classes of its own
            raise _cause(error) from error
    result = ray.get(channel.result.remote(), timeout=60)
    if result is None:
        raise TrainingError("the workers ended without a result; see the worker logs of `ray logs`")
    result["history"] = [EvaluationRecord(**item) for item in result["history"]]
    return RunResult(**result)


def _worker(loop_config: dict[str, Any]) -> None:
    """Run one Ray Train worker's rank."""
    config = TrainConfig(**loop_config["config"])
    communicator = current_communicator(timeout_seconds=config.collective_timeout_seconds)
    channel = loop_config["channel"] if communicator.rank == 0 else None
    workers_here = ray.train.get_context().get_local_world_size()
    result = run_rank(config, communicator, RayReporter(channel), workers_here=workers_here)
    if channel is not None:
        ray.get(channel.finish.remote(asdict(result)), timeout=60)


class RayReporter:
    """Sends rank 0's progress to the driver, and every rank's evaluations to Ray Train."""

    def __init__(self, channel: Any | None) -> None:
        self._channel = channel

    def step(self, record: StepRecord) -> None:
        self._put(event("step", record))

    def evaluation(self, record: EvaluationRecord) -> None:
        self._put(event("evaluation", record))
        ray.train.report(asdict(record))

    def message(self, text: str) -> None:
        self._put(event("message", text))

    def _put(self, item: dict[str, Any]) -> None:
        if self._channel is not None:
            self._channel.put.remote(item)


class ProgressChannel:
    """A queue of progress events from rank 0 to the driver, and the final result."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._result: dict[str, Any] | None = None

    def put(self, item: dict[str, Any]) -> None:
        """Add an event."""
        self._events.append(item)

    def drain(self) -> list[dict[str, Any]]:
        """Return the events since the last call."""
        events, self._events = self._events, []
        return events

    def finish(self, result: dict[str, Any]) -> None:
        """Keep the result."""
        self._result = result

    def result(self) -> dict[str, Any] | None:
        """Return the result, None if no worker finished."""
        return self._result


@contextmanager
def _relaying(channel: Any, reporter: Reporter) -> Iterator[None]:
    """Hand events to the reporter from a thread while the block runs, and the rest when it ends."""
    stop = threading.Event()

    def relay() -> None:
        while not stop.wait(POLL_SECONDS):
            _deliver_all(channel, reporter)

    thread = threading.Thread(target=relay, name="dngd-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=30)
        _deliver_all(channel, reporter)


def _deliver_all(channel: Any, reporter: Reporter) -> None:
    try:
        events = ray.get(channel.drain.remote(), timeout=10)
    except ray.exceptions.RayError:
        return  # progress is lost, not the run
    for item in events:
        deliver(reporter, item)


def _cause(error: BaseException) -> Exception:
    """Return the UserError or TrainingError at the bottom of Ray's exceptions, or a TrainingError naming it."""
    found: list[BaseException] = []
    queue: list[BaseException] = [error]
    while queue:
        current = queue.pop(0)
        if current in found:
            continue
        found.append(current)
        failures = getattr(current, "worker_failures", None)
        nested = [*(failures.values() if isinstance(failures, dict) else ()), getattr(current, "cause", None)]
        nested += [current.__cause__, current.__context__]
        queue += [item for item in nested if isinstance(item, BaseException)]
    for kind in (UserError, TrainingError):
        for item in found:
            if isinstance(item, kind):
                return kind(str(item).strip().splitlines()[0])
    last = found[-1]
    text = str(last).strip().splitlines()
    return TrainingError(f"a worker failed: {type(last).__name__}: {text[-1] if text else ''}")
