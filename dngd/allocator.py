"""Keeps the C library from giving a step's memory back to the system, only to ask for it again in the next.

A training step on a CPU makes and drops tensors of tens of megabytes. glibc hands such blocks back to the kernel at
once and takes new pages for the next, each of which the kernel must clear: measured on two cores, that is a third of a
three-layer GraphSAGE's step. With the thresholds raised freed memory stays with the process for the next step.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging

logger = logging.getLogger(__name__)

# glibc's malloc.h
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_TRIM_BYTES = 2**31 - 1
_MMAP_BYTES = 2**30
_LEAST_MMAP_BYTES = 2**25
"""What every glibc accepts; some refuse more."""


def keep_freed_memory() -> bool:
    """Raise the thresholds, for this process, from now on; return whether that could be done (glibc only).

    What is free already goes back to the system first. From then on the process keeps the most memory that it uses.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        logger.info("the C library has no mallopt: freed memory goes back to the system after each step")
        return False
    with contextlib.suppress(AttributeError):  # glibc's own, unlike mallopt
        ctypes.CDLL(None).malloc_trim(0)
    kept = any(mallopt(_M_MMAP_THRESHOLD, size) for size in (_MMAP_BYTES, _LEAST_MMAP_BYTES))
    return bool(mallopt(_M_TRIM_THRESHOLD, _TRIM_BYTES)) and kept
