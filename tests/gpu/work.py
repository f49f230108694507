"""What the ranks of tests/gpu do: several processes on one GPU, over gloo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dngd
from dngd.comm import Communicator
from dngd.train import TrainingLoop, prepare_run_folder
from dngd.train.progress import SilentReporter


def train(communicator: Communicator, argument: dict[str, Any]) -> dict[str, Any]:
    """Train as dngd does on each of a cluster's workers; return the curve and what went between the ranks."""
    config = dngd.TrainConfig(**argument["config"] | {"use_gpu": argument["use_gpu"]})
    path = config.run_dir.with_name(f"{config.run_dir.name}-{communicator.world_size}-{argument['use_gpu']}")
    config = config.model_copy(update={"run_dir": Path(path)})
    if communicator.rank == 0:
        config = prepare_run_folder(config)
    communicator.barrier()
    loop = TrainingLoop(config, communicator, SilentReporter())
    result = loop.run()
    return {
        "losses": [record.train_loss for record in result.history],
        "device": loop.device.type,
        "sent": {kind: size for kind, size in communicator.bytes_sent.items() if size},
    }
