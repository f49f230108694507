"""The memory that this process holds alone."""

from __future__ import annotations

import psutil


def private_memory() -> int:
    """Return the bytes that this process alone holds: its resident pages that no file backs."""
    info = psutil.Process().memory_info()
    return int(info.rss - getattr(info, "shared", 0))
