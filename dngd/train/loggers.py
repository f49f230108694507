"""Callbacks that write evaluations and step losses where people look at them: CSV, TensorBoard, MLflow, W&B.

CSV is always written, beside metrics.jsonl. The others need their package, which is an extra of dngd, and are asked for
by name (`loggers` in the configuration). Each goes on where it was when a run is resumed.
"""

from __future__ import annotations

import csv
import importlib.util
import math
import os
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from dngd.errors import UserError
from dngd.train.callbacks import Callback, RunState
from dngd.train.checkpoint import replace_file
from dngd.train.metrics import EvaluationRecord, RunResult

STEP_PERIOD = 10
"""Steps between two logged step losses."""


MLFLOW_DEFAULTS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
"""Seconds and repetitions of a request, for which all ranks wait; what the environment says takes precedence."""


class CSVLogger(Callback):
    """RUN/metrics.csv: metrics.jsonl's lines as a table; a value that is not finite is empty."""

    def on_start(self, run: RunState) -> None:
        self._path = run.run_dir / "metrics.csv"
        names = [field.name for field in fields(EvaluationRecord)]
        self._write([names, *map(self._row, run.history)], "w")

    def on_evaluation(self, run: RunState, record: EvaluationRecord) -> None:
        self._write([self._row(record)], "a")

    def _row(self, record: EvaluationRecord) -> list[Any]:
        return ["" if isinstance(v, float) and not math.isfinite(v) else v for v in asdict(record).values()]

    def _write(self, rows: Sequence[Sequence[Any]], mode: str) -> None:
        with open(self._path, mode, newline="") as file:
            csv.writer(file).writerows(rows)


def named_values(run: RunState, record: EvaluationRecord) -> dict[str, float]:
    """Return an evaluation's finite numbers as others call them: val/accuracy, or val/roc_auc, train/loss, ..."""
    values = {
        "train/loss": record.train_loss,
        "val/loss": record.val_loss,
        f"val/{run.metric}": record.val_accuracy,
        f"test/{run.metric}": record.test_accuracy,
        "train/seconds": record.train_seconds,
        "train/epoch": record.epoch,
    }
    return {name: value for name, value in values.items() if math.isfinite(value)}


class _Logger(Callback, ABC):
    """What the three have in common: step losses now and then, evaluations always, each with its step."""

    def on_step(self, run: RunState) -> None:
        if run.step % STEP_PERIOD == 0 and math.isfinite(run.loss):
            self._log({"step/loss": run.loss, "step/learning_rate": run.learning_rate}, run.step)

    def on_evaluation(self, run: RunState, record: EvaluationRecord) -> None:
        self._log(named_values(run, record), record.step)

    @abstractmethod
    def _log(self, values: dict[str, float], step: int) -> None:
        """Send values of a step."""


class TensorBoardLogger(_Logger):
    """Event files in RUN/tensorboard: `tensorboard --logdir RUN/tensorboard`."""

    def on_start(self, run: RunState) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise _missing("tensorboard") from None
        # What an earlier time line wrote after this step is not shown.
        self._writer = SummaryWriter(str(run.run_dir / "tensorboard"), purge_step=run.step + 1 if run.step else None)

    def _log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def on_end(self, run: RunState, result: RunResult | None) -> None:
        self._writer.close()


class MLflowLogger(_Logger):
    """A run of MLflow, at MLFLOW_TRACKING_URI, or in RUN/mlflow.db (`mlflow ui --backend-store-uri sqlite:///RUN/mlflow.db`);
    in experiment MLFLOW_EXPERIMENT_NAME, or dngd."""

    def on_start(self, run: RunState) -> None:
        for name, value in MLFLOW_DEFAULTS.items():
            os.environ.setdefault(name, value)
        try:
            from mlflow.tracking import MlflowClient
        except ImportError:
            raise _missing("mlflow") from None
        address = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run.run_dir.absolute() / 'mlflow.db'}"
        self._client = MlflowClient(tracking_uri=address)
        experiment_name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "dngd")
        found = self._client.get_experiment_by_name(experiment_name)
        experiment = found.experiment_id if found else self._client.create_experiment(experiment_name)

        def create() -> str:
            made = self._client.create_run(experiment, run_name=run.run_dir.name)
            for key, value in _flat(run.config.model_dump(mode="json")).items():
                self._client.log_param(made.info.run_id, key, str(value)[:500])
            return str(made.info.run_id)

        self._run_id = _kept_id(run.run_dir / "mlflow-run", create)
        self._client.update_run(self._run_id, status="RUNNING")

    def _log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._client.log_metric(self._run_id, name, value, step=step)

    def on_end(self, run: RunState, result: RunResult | None) -> None:
        self._client.set_terminated(self._run_id, "KILLED" if result is None else "FINISHED")


class WandbLogger(_Logger):
    """A run of Weights & Biases, in project WANDB_PROJECT, or dngd. WANDB_MODE=offline keeps it in RUN/wandb."""

    def on_start(self, run: RunState) -> None:
        try:
            import wandb
        except ImportError:
            raise _missing("wandb") from None
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "dngd"),
            name=run.run_dir.name,
            id=_kept_id(run.run_dir / "wandb-run", lambda: uuid.uuid4().hex[:12]),
            resume="allow",
            dir=str(run.run_dir),
            config=run.config.model_dump(mode="json"),
            settings=wandb.Settings(silent=True, console="off"),
        )
        # Not W&B's own step, which must never fall: a resumed run may go back.
        self._run.define_metric("*", step_metric="step")

    def _log(self, values: dict[str, float], step: int) -> None:
        self._run.log(values | {"step": step})

    def on_end(self, run: RunState, result: RunResult | None) -> None:
        self._run.finish(exit_code=1 if result is None else 0)


LOGGERS: dict[str, type[Callback]] = {
    "tensorboard": TensorBoardLogger,
    "mlflow": MLflowLogger,
    "wandb": WandbLogger,
}


def make_loggers(names: Sequence[str]) -> list[Callback]:
    """Return the loggers of a run: CSV, and those asked for."""
    return [CSVLogger(), *(LOGGERS[name]() for name in names)]


def check_loggers(names: Sequence[str]) -> None:
    """Raise UserError if a logger's package is not installed here."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise _missing(name)


def _missing(package: str) -> UserError:
    return UserError(f"logger {package} needs a package that is not installed; pip install 'dngd[{package}]'")


def _kept_id(path: Path, create: Callable[[], str]) -> str:
    """Return the identity of this run elsewhere, the same when it is resumed."""
    if path.exists():
        return path.read_text().strip()
    made = create()
    replace_file(path, made.encode())
    return made


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
