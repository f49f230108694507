"""What the ranks of test_slow_reading.py do."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from dngd.comm import Communicator, current_communicator
from dngd.errors import TrainingError
from dngd.train import checkpoint
from dngd.train.checkpoint import CheckpointFolder, Snapshot

LIMIT_SECONDS = 1.0
"""Of each collective."""


def load(comm: Communicator, argument: dict[str, Any]) -> dict[str, Any]:
    """Load a checkpoint whose files take longer to read than a collective may last."""
    path = Path(argument["folder"])
    if comm.rank == 0:
        written = CheckpointFolder(path, _Alone(), keep=1)
        captured = written.capture(Snapshot(3, {"a": 1}, {}, {"w": torch.arange(5.0)}, {}))
        assert captured is not None
        written.write(captured)
    original = checkpoint.read_verified

    def slow(folder: Path) -> dict[str, bytes]:
        time.sleep(1.5 * LIMIT_SECONDS)
        return original(folder)

    checkpoint.read_verified = slow
    comm.barrier()
    impatient = current_communicator(timeout_seconds=LIMIT_SECONDS)
    folder = CheckpointFolder(path, impatient, keep=1)
    if argument.get("mutant"):
        try:
            return {"read": len(_reads_in_a_collective(folder, impatient))}
        except TrainingError as error:
            return {"error": str(error)}
    snapshot, skipped = folder.load_newest(limit_seconds=60, round_seconds=LIMIT_SECONDS / 4)
    assert snapshot is not None
    return {"step": snapshot.step, "w": snapshot.model["w"].tolist(), "skipped": skipped}


def _reads_in_a_collective(folder: CheckpointFolder, comm: Communicator) -> bytes:
    payload = folder._read_newest()[0][checkpoint.STATE_NAME] if comm.rank == 0 else None
    return comm.broadcast_bytes(payload)


class _Alone:
    """One rank's world, for what it writes itself."""

    rank, world_size = 0, 1
