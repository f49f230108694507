"""Tells the system how a mapped array will be read."""

from __future__ import annotations

import ctypes
import logging
import mmap
import os

from torch import Tensor

logger = logging.getLogger(__name__)


def read_randomly(array: Tensor) -> bool:
    """Say that rows are read here and there: a read fetches the pages that it needs from the disk and none beside them.

    For this process's mapping, from now on; return whether the system took the advice. For an array that is larger than
    the memory: pages read ahead would push out others that are of use. array: contiguous, on the CPU.
    """
    size = array.numel() * array.element_size()
    advice: int | None = getattr(mmap, "MADV_RANDOM", None)
    if not size or advice is None:
        return False
    start = array.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    try:
        madvise = ctypes.CDLL(None, use_errno=True).madvise
    except (OSError, AttributeError, TypeError):
        logger.info("the C library has no madvise: more of the features is read from the disk than is asked for")
        return False
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if madvise(start, array.data_ptr() + size - start, advice) != 0:
        logger.info("the system refused advice on the features: %s", os.strerror(ctypes.get_errno()))
        return False
    return True
