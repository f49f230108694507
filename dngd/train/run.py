"""A rank's part of a run, from the run folder to result.json, and what errors of files become."""

from __future__ import annotations

import errno
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from dngd.comm import Communicator
from dngd.config import TrainConfig
from dngd.errors import RunInterrupted, TrainingError, UserError
from dngd.train.checkpoint import replace_file, run_folder_is_gone
from dngd.train.loop import TrainingLoop
from dngd.train.metrics import RunResult, read_result
from dngd.train.parts import RunParts
from dngd.train.progress import Reporter, warn
from dngd.train.remote_run import open_run_folder
from dngd.train.supervision import Supervision

MENDED_BY_USERS = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT))
SETTLE_SECONDS = 30.0


def _gpus_with_random_state(config: TrainConfig) -> Sequence[int]:
    """Return the GPUs whose random state a run may change. A run on the CPU leaves CUDA alone that was not in use: it
    may not work here, and processes that are forked later could not use it."""
    is_used = bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
    is_used |= config.use_gpu and torch.cuda.is_available()
    return range(torch.cuda.device_count()) if is_used else ()


def run_rank(
    config: TrainConfig,
    communicator: Communicator,
    reporter: Reporter,
    *,
    workers_here: int = 1,
    supervision: Supervision | None = None,
    parts: RunParts | None = None,
) -> RunResult:
    """Run one rank to the end; rank 0 writes result.json. The caller's random state is left as it was.

    workers_here: how many of the world's ranks share this machine's memory. supervision: of an engine that starts
    lost workers again. parts: what a program adds to the configuration.
    """
    settle_seconds = SETTLE_SECONDS
    with (
        torch.random.fork_rng(devices=_gpus_with_random_state(config)),
        open_run_folder(config, communicator.rank, partial(warn, reporter)) as folder,
    ):
        loop = TrainingLoop(
            config,
            communicator,
            reporter,
            workers_here=workers_here,
            supervision=supervision,
            folder=folder,
            parts=parts,
        )
        result: RunResult | None = None
        try:
            result = loop.run()
            if communicator.rank == 0:
                result = _write_result(loop, result)
            if config.run_address is not None:
                loop.finish_folder()
        except OSError as error:
            gone = run_folder_is_gone(loop.folder.path) if communicator.rank == 0 else None
            if gone is not None:
                raise gone from error
            mended_by_users = error.errno in MENDED_BY_USERS
            if error.filename is None and not mended_by_users:
                raise  # of a connection, say
            # What a user must mend ends the run; a disk or mount that fails may be another node's after a new start.
            which = "" if error.filename is None else f" ({error.filename})"
            raise (UserError if mended_by_users else TrainingError)(
                f"a file of run {loop.folder.shown} cannot be read or written: {error.strerror or error}{which}; free "
                "space or fix permissions, then go on with --resume"
            ) from error
        except KeyboardInterrupt as error:
            if not isinstance(error, RunInterrupted):
                settle_seconds = 0.0  # at once: what was being written is no checkpoint yet
            raise
        finally:
            loop.callbacks.end(loop.state, result)
            loop.writer.settle(settle_seconds)
    communicator.barrier()
    return result


def _write_result(loop: TrainingLoop, result: RunResult) -> RunResult:
    """Write result.json and return what it holds."""
    if not loop.clock.step_seconds:
        # A finished run that is resumed takes no step: its own result, with its times, stays.
        before = read_result(loop.folder.result)
        if before is not None and before.steps == loop.step:
            result = replace(before, run_dir=loop.folder.shown, history=result.history)
    replace_file(loop.folder.result, json.dumps(result.to_json(), indent=2).encode())
    return result
