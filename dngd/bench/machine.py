"""What a measurement was made on, and with how many threads."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from dngd.errors import UserError
from dngd.train.metrics import versions


@contextlib.contextmanager
def torch_threads(threads: int | None) -> Iterator[int]:
    """Run a block with that many torch threads (None: as they are) and yield the number in use.

    Raises UserError for a number below 1.
    """
    if threads is not None and threads < 1:
        raise UserError(f"threads={threads} is below 1; give the number of CPU threads of a training step")
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def describe_machine(*, keeps_memory: bool) -> dict[str, Any]:
    """Return CPUs, threads, memory, load and versions, as plain data.

    cpus: that this process may use. load_average: over the last minute, before the measurement; well above 0 means
    that others used the machine too. keeps_memory: what keep_freed_memory returned.
    """
    return {
        "cpu": _cpu_name(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "freed_memory_is_kept": keeps_memory,
        "load_average": os.getloadavg()[0],
        "device": "cpu",
        "platform": platform.platform(),
        "versions": versions(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
