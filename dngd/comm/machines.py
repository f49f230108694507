"""Whether the ranks' processors round alike: only then may they do the same arithmetic instead of sending it."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from pathlib import Path

import torch

from dngd.comm.communicator import Communicator


class Agreement:
    """Yes or no, the same on all ranks, about what each of them found out from the same numbers.

    Ranks that round alike find the same and are not asked; elsewhere a number next to its limit may fall on either
    side, and ranks that disagreed would wait for messages of different sizes.
    """

    def __init__(self, communicator: Communicator) -> None:
        self._comm = communicator
        self._alike = True if communicator.world_size == 1 else None

    def of_all(self, found: Sequence[bool], device: torch.device) -> list[bool]:
        """Return for each answer whether every rank found yes. All ranks enter, with equally many answers."""
        if self._alike is None:
            self._alike = ranks_are_alike(self._comm, device)
        if self._alike or not found:
            return list(found)
        votes = torch.tensor(found, dtype=torch.float64, device=device)
        self._comm.all_reduce(votes, "state", group="factor").wait()
        return (votes == self._comm.world_size).tolist()


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
