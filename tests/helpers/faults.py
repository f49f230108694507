"""Faults at chosen moments of Ray Train workers: the product has no code for them, worker processes are patched.

`install` is a Ray `worker_process_setup_hook`. The plan comes as JSON in $DNGD_TEST_FAULTS: a list of
{"phase", "rank", "step", "action"}; a fault strikes once in a run, when that rank (null: any) is in that phase of that
step, and leaves a file `PHASE-RANK-STEP` in $DNGD_TEST_FAULTS_HIT, written before it strikes. Phases are those of
StepClock, "inversion" (a factor is about to be inverted) and "write" (a checkpoint's files are written, its manifest
is not). Actions: "kill" and "stop" are signals to the process itself, "hold" sleeps until something else ends the
process, "nan" poisons this rank's features of the step.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.util
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

PLAN, HIT = "DNGD_TEST_FAULTS", "DNGD_TEST_FAULTS_HIT"


def install() -> None:
    """Patch the training loop when it is imported: most processes of a job never do."""
    sys.meta_path.insert(0, _Patcher())


class _Patcher(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "dngd.train.loop":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        run = spec.loader.exec_module

        def run_and_patch(module: ModuleType) -> None:
            run(module)
            _patch()

        spec.loader.exec_module = run_and_patch  # type: ignore[method-assign]
        return spec


def _patch() -> None:
    from dataclasses import replace

    import torch

    from dngd.optim import refresh
    from dngd.train import checkpoint
    from dngd.train.loop import TrainingLoop
    from dngd.train.metrics import StepClock

    inside, write, decompose = StepClock.inside, checkpoint.write_flushed, refresh._decompose_all
    back_propagate = TrainingLoop._back_propagate
    clocks: list[StepClock] = []

    @contextlib.contextmanager
    def striking_inside(self: StepClock, name: str) -> Iterator[None]:
        clocks[:] = [self]
        with inside(self, name):
            _strike(name, self.activity.step)
            yield

    def striking_write(path: Path, data: bytes) -> None:
        if path.name == "state.json":
            _strike("write", int(path.parent.name.removeprefix(".writing-")))
        write(path, data)

    def striking_decompose(jobs: Any) -> Any:
        if jobs and clocks:
            _strike("inversion", clocks[0].activity.step)
        return decompose(jobs)

    def poisoned(self: TrainingLoop, batch: Any, *arguments: Any) -> float:
        if _is_due("features", self.step, "nan"):
            rows = batch.first_aggregation
            assert rows is not None, "where samplers take the first rows, they are this rank's features"
            batch = replace(batch, first_aggregation=torch.full_like(rows, float("nan")))
        return back_propagate(self, batch, *arguments)

    StepClock.inside = striking_inside  # type: ignore[method-assign]
    checkpoint.write_flushed = striking_write
    refresh._decompose_all = striking_decompose
    TrainingLoop._back_propagate = poisoned  # type: ignore[method-assign]


def _strike(phase: str, step: int) -> None:
    for action, number in (("kill", signal.SIGKILL), ("stop", signal.SIGSTOP)):
        if _is_due(phase, step, action):
            # To this very thread: one sent to the process may stop the main thread, and this one a phase later.
            signal.pthread_kill(threading.get_ident(), number)
    if _is_due(phase, step, "hold"):
        time.sleep(600)


def _is_due(phase: str, step: int, action: str) -> bool:
    rank = int(os.environ.get("RANK", "0"))
    planned = json.loads(os.environ[PLAN])
    wanted = [{"phase": phase, "rank": of, "step": step, "action": action} for of in (rank, None)]
    fault = next((item for item in wanted if item in planned), None)
    if fault is None:
        return False
    try:
        with open(Path(os.environ[HIT]) / f"{phase}-{fault['rank']}-{step}", "x") as file:
            file.write(str(os.getpid()))
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        return False
    return True
