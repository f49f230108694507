"""Filling a file system to its last page."""

from __future__ import annotations

import os
from pathlib import Path

BALLAST = "ballast"


def fill(path: Path) -> Path:
    """Write a file into a folder until there is no page left."""
    ballast = path / BALLAST
    descriptor = os.open(ballast, os.O_WRONLY | os.O_CREAT)
    try:
        while True:
            os.write(descriptor, bytes(4096))
    except OSError:
        pass
    finally:
        os.close(descriptor)
    return ballast
