"""The training loop under Ray Train: `TorchTrainer` starts the workers and their process group, again if need be.

Each worker runs the same `run_rank` as the local engine. Progress, heartbeats and failures meet in a small actor
(`RunChannel`); a lost or stalled worker makes Ray start all workers again, which go on from the run's newest good
checkpoint. What doing the same again would not mend ends the run. Metrics also go to `ray.train.report`, which every
rank calls equally often.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")

import ray
import ray.train
import ray.train.torch
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dngd.comm import Communicator, current_communicator
from dngd.config import TrainConfig
from dngd.errors import DivergedError, RunInterrupted, TrainingError, UserError
from dngd.launch.channel import RunChannel
from dngd.launch.cluster import Demand, connect, wait_for_resources
from dngd.launch.fit import fit_in_thread
from dngd.launch.gauges import Gauges
from dngd.launch.watch import Watch
from dngd.paths import expanded
from dngd.train import EvaluationRecord, RunResult, run_rank
from dngd.train.heartbeat import Beat, Heartbeat
from dngd.train.interrupt import CtrlC, NobodyStops
from dngd.train.logs import rank_logs
from dngd.train.parts import RunParts
from dngd.train.progress import Reporter, StepRecord, event
from dngd.train.supervision import Attempt, Supervision

ANSWER_SECONDS = 60.0
NO_WAIT_SECONDS = 5.0
"""For the channel's word on a run that is over already."""

MOST_FAILED_STARTS = 20

# Ray's own limits are minutes to unlimited. Ray Train hands the RAY_TRAIN ones on from the driver to its controller.
LIMITS = {
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "120",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "120",
    "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "120",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "10",
}


@contextmanager
def on_cluster(config: TrainConfig, reporter: Reporter) -> Iterator[None]:
    """Be connected to a Ray cluster that has what the run asks for while the block runs.

    Raises UserError for an unreachable or too small cluster.
    """
    # What the user has set stays, and a job's own variables may not be given again.
    unset = {name: value for name, value in LIMITS.items() if name not in os.environ}
    os.environ.update(unset)
    reporter.message("connecting to Ray")
    connected = connect(config.ray, environment=unset)
    try:
        wait_for_resources(
            Demand(config.min_workers, _worker_resources(config), config.ray.placement_strategy),
            config.ray.start_timeout_seconds,
            reporter.message,
            may_grow=connected and bool(config.ray.address or os.environ.get("RAY_ADDRESS")),
        )
        yield
    finally:
        if connected:
            ray.shutdown()


def run_on_ray(config: TrainConfig, reporter: Reporter, parts: RunParts | None = None) -> RunResult:
    """Train on the connected cluster and return rank 0's result. parts: pickled to the workers.

    Raises UserError for what a worker refuses, TrainingError for a run that workers were lost of too often.
    """
    with _ray_folder(config) as folder:
        return _run_on_ray(config, reporter, parts, folder)


@contextmanager
def _ray_folder(config: TrainConfig) -> Iterator[str]:
    """Give the folder for what Ray keeps of its own. Its controller, on this node, is all that goes there."""
    if config.run_address is None:
        yield str(config.run_dir)
        return
    with tempfile.TemporaryDirectory(prefix="dngd-ray-train-", ignore_cleanup_errors=True) as folder:
        yield folder


def _run_on_ray(config: TrainConfig, reporter: Reporter, parts: RunParts | None, folder: str) -> RunResult:
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    channel = ray.remote(RunChannel).options(num_cpus=0, scheduling_strategy=here).remote(config.ray.max_failures)
    watch = Watch(channel, config, reporter)
    trainer = ray.train.torch.TorchTrainer(
        _worker,
        train_loop_config={
            "config": config.model_dump(mode="json"),
            "data_root": None if (root := config.data_root_in_use) is None else str(expanded(root).absolute()),
            "channel": channel,
            "parts": parts,
        },
        scaling_config=_scaling(config),
        run_config=ray.train.RunConfig(
            name="ray",
            storage_path=folder,
            failure_config=_failure_config(),
            callbacks=[FailureListener(channel), StartListener(channel)],
        ),
        torch_config=ray.train.torch.TorchConfig(
            backend=config.collective_backend, timeout_s=int(config.collective_timeout_seconds)
        ),
    )
    with watch, CtrlC(watch.ask_to_stop):
        reporter.message(f"starting {config.num_workers} workers")
        try:
            fit_in_thread(trainer.fit, watch)
        except (KeyboardInterrupt, SystemExit):  # Ctrl-C, and what Ray makes of SIGTERM
            raise _given_up(channel, NO_WAIT_SECONDS) or KeyboardInterrupt from None
        except Exception as error:  # Ray wraps what a worker raised in classes of its own
            raise _given_up(channel, NO_WAIT_SECONDS if watch.given_up else ANSWER_SECONDS) or _cause(error) from error
    result = ray.get(channel.result.remote(), timeout=ANSWER_SECONDS)
    if result is None and (interruption := ray.get(channel.interruption.remote(), timeout=ANSWER_SECONDS)):
        raise RunInterrupted(**interruption)
    if result is None:
        raise _given_up(channel) or TrainingError(
            "the workers ended without a result; see the worker logs of `ray logs`"
        )
    result["history"] = [EvaluationRecord(**item) for item in result["history"]]
    return RunResult(**result)


class _ChannelStops(NobodyStops):
    """What the channel answers to heartbeats: whether the run is to stop. They come from the heartbeat's thread."""

    def __init__(self, channel: Any) -> None:
        self._channel = channel
        self._answer: Any = None

    def beat(self, beat: Beat) -> None:
        """Send a heartbeat, and take the answer to the one before."""
        before, self._answer = self._answer, self._channel.beat.remote(asdict(beat))
        if before is not None and ray.wait([before], timeout=0)[0]:
            with contextlib.suppress(ray.exceptions.RayError):
                self.wanted = self.wanted or ray.get(before)


def _scaling(config: TrainConfig) -> Any:
    settings = config.ray
    elastic = config.min_workers < config.num_workers
    return ray.train.ScalingConfig(
        num_workers=(config.min_workers, config.num_workers) if elastic else config.num_workers,
        use_gpu=config.use_gpu,
        resources_per_worker=_worker_resources(config),
        placement_strategy=settings.placement_strategy,
        elastic_resize_monitor_interval_s=settings.resize_period_seconds,
    )


def _worker_resources(config: TrainConfig) -> dict[str, float]:
    gpus = {"GPU": config.ray.gpus_per_worker} if config.use_gpu else {}
    return {"CPU": config.ray.cpus_per_worker} | gpus | config.ray.resources_per_worker


def _failure_config() -> Any:
    """Ray starts lost workers again without end: how often it may is counted by RunChannel, which knows of
    checkpoints, and how long it may take is bounded by Watch. Its own count is of starts that fail."""
    return ray.train.FailureConfig(max_failures=-1, controller_failure_limit=MOST_FAILED_STARTS)


class StartListener(ControllerCallback):  # type: ignore[misc]
    """Runs in Ray's controller: tells the channel of it, for the driver to kill it if it does not answer."""

    def __init__(self, channel: Any) -> None:
        self._channel = channel

    def after_controller_start(self, *_: Any) -> None:
        """Hear that it started."""
        self._channel.controlled_by.remote(ray.get_runtime_context().current_actor)


class FailureListener(ray.train.UserCallback):  # type: ignore[misc]
    """Runs in Ray's controller: tells the channel of failures, and stops Ray where the run is given up."""

    def __init__(self, channel: Any) -> None:
        self._channel = channel

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Hear of workers that failed. Raises TrainingError, which ends the run, if it is given up."""
        lost = [rank for rank, error in worker_exceptions.items() if _process_is_gone(error)]
        raised = {rank: _sentence(error) for rank, error in worker_exceptions.items() if rank not in lost}
        controller = ray.get_runtime_context().current_actor
        told = self._channel.group_failed.remote(lost, raised, controller)
        given_up = ray.get(told, timeout=ANSWER_SECONDS)
        if given_up is not None:
            raise TrainingError(given_up)


def _process_is_gone(error: BaseException) -> bool:
    return any(isinstance(item, ray.exceptions.RayActorError) for item in _nested(error))


def _with_data_root(config: TrainConfig, of_driver: str | None) -> TrainConfig:
    """Return the configuration with the driver's folder of data sets, unless this node has one of its own. A relative
    one is no node's: a worker's working directory is Ray's."""
    own = config.data_root_in_use
    if of_driver is None or (own is not None and own.is_absolute()):
        return config
    return config.model_copy(update={"data_root": Path(of_driver)})


def _worker(loop_config: dict[str, Any]) -> None:
    """Run one Ray Train worker's rank, this time."""
    config = _with_data_root(TrainConfig(**loop_config["config"]), loop_config["data_root"])
    channel = loop_config["channel"]
    context = ray.train.get_context()
    communicator = current_communicator(timeout_seconds=config.collective_timeout_seconds)
    attempt = _agreed_attempt(channel, communicator)
    if attempt.number > 1:
        # The driver has refused folders of other runs: what is there is this run's own.
        config = config.model_copy(update={"resume": True})
    supervision = Supervision(attempt)
    if communicator.rank == 0:
        supervision.resumed = lambda step, repeated: channel.resumed.remote(attempt.number, step, repeated)
        supervision.checkpointed = lambda step: channel.checkpointed.remote(step)
    supervision.measured = _measured(Gauges(config.run_name) if communicator.rank == 0 else None)
    supervision.stops = stops = _ChannelStops(channel)
    heartbeat = Heartbeat(
        supervision.clock,
        stops.beat,
        attempt=attempt.number,
        rank=communicator.rank,
        world_size=communicator.world_size,
        node_id=ray.get_runtime_context().get_node_id(),
        node_name=os.uname().nodename,
    )
    reporter = RayReporter(channel if communicator.rank == 0 else None)
    with heartbeat, rank_logs(communicator.rank, supervision.clock):
        try:
            result = run_rank(
                config,
                communicator,
                reporter,
                workers_here=context.get_local_world_size(),
                supervision=supervision,
                parts=loop_config["parts"],
            )
        except RunInterrupted as error:
            told = {"message": str(error), "step": error.step, "run_dir": error.run_dir}
            ray.get(channel.interrupted.remote(told), timeout=ANSWER_SECONDS)
            ray.get(channel.left.remote(asdict(heartbeat.now())), timeout=ANSWER_SECONDS)
            return
        except Exception as error:
            _tell_failure(channel, heartbeat.now(), error)
            raise
    if communicator.rank == 0:
        ray.get(channel.finish.remote(asdict(result)), timeout=ANSWER_SECONDS)
    ray.get(channel.left.remote(asdict(heartbeat.now())), timeout=ANSWER_SECONDS)


def _agreed_attempt(channel: Any, communicator: Communicator) -> Attempt:
    """Return the attempt that this start of the workers is. All ranks enter; rank 0 asks."""
    payload = None
    if communicator.rank == 0:
        began = ray.get(channel.begin.remote(communicator.world_size), timeout=ANSWER_SECONDS)
        payload = json.dumps(began).encode()
    return Attempt(**json.loads(communicator.broadcast_bytes(payload)))


def _tell_failure(channel: Any, beat: Beat, error: Exception) -> None:
    kinds: list[tuple[type[Exception], str]] = [
        (UserError, "user"),
        (DivergedError, "diverged"),
        (TrainingError, "training"),
    ]
    kind = next((name for of, name in kinds if isinstance(error, of)), "other")
    ray.get(channel.failed.remote(asdict(beat), kind, _sentence(error)), timeout=ANSWER_SECONDS)


def _sentence(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    if isinstance(error, (UserError, TrainingError)):
        return lines[0]
    return f"a worker failed: {type(error).__name__}: {lines[-1]}"


def _measured(gauges: Gauges | None) -> Callable[[EvaluationRecord, dict[str, float]], None]:
    """Return what hands an evaluation to Ray: all ranks report equally often, rank 0 has gauges too."""

    def hand_on(record: EvaluationRecord, measurements: dict[str, float]) -> None:
        if gauges is not None:
            gauges.set(record, measurements)
        ray.train.report(asdict(record) | measurements)

    return hand_on


class RayReporter:
    """Sends rank 0's progress to the driver."""

    def __init__(self, channel: Any | None) -> None:
        self._channel = channel

    def step(self, record: StepRecord) -> None:
        self._put(event("step", record))

    def evaluation(self, record: EvaluationRecord) -> None:
        self._put(event("evaluation", record))

    def message(self, text: str) -> None:
        self._put(event("message", text))

    def warning(self, text: str) -> None:
        self._put(event("warning", text))

    def _put(self, item: dict[str, Any]) -> None:
        if self._channel is not None:
            self._channel.put.remote(item)


def _given_up(channel: Any, seconds: float = ANSWER_SECONDS) -> Exception | None:
    """Return why the channel gave the run up, as an exception; None if it did not, or is silent for some seconds."""
    try:
        verdict = ray.get(channel.verdict.remote(), timeout=seconds)
    except ray.exceptions.RayError:
        return None
    if verdict is None:
        return None
    return (UserError if verdict["kind"] == "user" else TrainingError)(verdict["text"])


def _nested(error: BaseException) -> list[BaseException]:
    """Return an exception and all that Ray wrapped in it, outermost first."""
    found: list[BaseException] = []
    queue: list[BaseException] = [error]
    while queue:
        current = queue.pop(0)
        if current in found:
            continue
        found.append(current)
        failures = getattr(current, "worker_failures", None)
        nested = [*(failures.values() if isinstance(failures, dict) else ())]
        nested += [getattr(current, name, None) for name in ("cause", "health_check_failure", "controller_failure")]
        nested += [current.__cause__, current.__context__]
        queue += [item for item in nested if isinstance(item, BaseException)]
    return found


def _cause(error: BaseException) -> Exception:
    """Return the UserError or TrainingError at the bottom of Ray's exceptions, or a TrainingError naming it."""
    found = _nested(error)
    for kind in (UserError, TrainingError):
        for item in found:
            if isinstance(item, kind):
                return kind(str(item).strip().splitlines()[0])
    return TrainingError(_sentence(found[-1]))
