"""What the ranks of test_full_batch_worlds do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dngd.comm import Communicator
from dngd.config import TrainConfig
from dngd.train import TrainingLoop
from dngd.train.progress import SilentReporter


def fit(communicator: Communicator, argument: dict[str, Any]) -> list[list[float]]:
    """Train and return the curve. argument: fields of the configuration; its run_dir exists."""
    config = TrainConfig(**(argument | {"run_dir": Path(argument["run_dir"])}))
    result = TrainingLoop(config, communicator, SilentReporter()).run()
    return [[r.train_loss, r.val_loss, r.test_accuracy] for r in result.history]
