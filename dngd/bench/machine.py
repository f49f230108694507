"""What a measurement was made on, and with how many threads."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from typing import Any

import psutil
import torch

from dngd.errors import UserError
from dngd.limits import usable_cpus
from dngd.train.metrics import cpu_name, versions

CPU = torch.device("cpu")


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


def describe_machine(*, keeps_memory: bool, device: torch.device = CPU) -> dict[str, Any]:
    """Return CPUs, threads, memory, load and versions, as plain data.

    cpus: that this process may use. load_average: over the last minute, before the measurement; well above 0 means
    that others used the machine too. keeps_memory: what keep_freed_memory returned. device: where is trained.
    """
    return {
        "cpu": cpu_name(),
        "cpus": usable_cpus(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "freed_memory_is_kept": keeps_memory,
        "load_average": os.getloadavg()[0],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "platform": platform.platform(),
        "versions": versions(),
    }
