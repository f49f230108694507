"""Whether the ranks' processors round alike: only then may they do the same arithmetic instead of sending it."""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path

import torch

from dngd.comm.communicator import Communicator


def ranks_are_alike(communicator: Communicator, device: torch.device) -> bool:
    """Return whether all ranks have the same processor, torch and number of threads. All ranks enter.

    Matrix libraries pick their kernels by all three, and kernels round differently.
    """
    marks = torch.zeros(communicator.world_size, dtype=torch.float64, device=device)
    marks[communicator.rank] = _mark(device)
    communicator.all_reduce(marks, "state", group="factor").wait()
    return len(set(marks.tolist())) == 1


def _mark(device: torch.device) -> int:
    """Return a number, below 2^53 so that a double holds it, that differs between kinds of processor."""
    words = [platform.machine(), _processor(), torch.__version__, str(torch.get_num_threads()), device.type]
    if device.type == "cuda":
        words.append(torch.cuda.get_device_name(device))
    return int.from_bytes(hashlib.sha256("\n".join(words).encode()).digest()[:6], "big")


def _processor() -> str:
    """Return the processor's model and abilities as Linux tells them; platform's word elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
