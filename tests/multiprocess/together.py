"""What the ranks of test_together.py do."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from dngd.comm import Communicator, current_communicator
from dngd.config import TrainConfig
from dngd.errors import TrainingError, UserError
from dngd.train import TrainingLoop
from dngd.train.progress import SilentReporter
from dngd.train.together import Progress, together

LIMIT_SECONDS = 2.0
"""Of each collective."""


def meet(comm: Communicator, argument: dict[str, Any]) -> dict[str, Any]:
    """Set up with a rank 1 that sleeps, fails or does neither; return what this rank got and was told."""
    comm.barrier()  # processes start at different times
    impatient = current_communicator(timeout_seconds=LIMIT_SECONDS)
    told: list[str] = []

    def work(progress: Progress) -> str:
        if comm.rank == 1:
            progress("copying", 1, 4)
            time.sleep(argument["sleep"])
            if argument.get("error"):
                raise {"user": UserError, "other": ValueError}[argument["error"]]("no such graph; give another")
        return f"graph of rank {comm.rank}"

    began = time.monotonic()
    try:
        if argument.get("mutant"):
            result = work(lambda *_: None)
            impatient.barrier()
        else:
            result = together(
                work,
                impatient,
                limit_seconds=argument.get("limit", 60.0),
                round_seconds=LIMIT_SECONDS / 4,
                tell=told.append,
            )
    except (UserError, TrainingError, ValueError) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"result": result, "seconds": time.monotonic() - began, "told": told}


def set_up(comm: Communicator, argument: dict[str, Any]) -> str:
    """Set up a run with a $DNGD_DATA_ROOT of the rank's own; return how that ended, once the other rank did too."""
    os.environ["DNGD_DATA_ROOT"] = argument["roots"][comm.rank]
    config = TrainConfig(**(argument["config"] | {"run_dir": Path(argument["config"]["run_dir"])}))
    try:
        TrainingLoop(config, comm, SilentReporter())
    except Exception as error:
        comm.barrier()
        return f"{type(error).__name__}: {error}"
    comm.barrier()
    return "set up"
