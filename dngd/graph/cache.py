"""The cache folder: stores made once from something else, by one process while others wait."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from dngd.errors import UserError
from dngd.graph.builder import Progress
from dngd.graph.checked import open_checked
from dngd.graph.lock import file_lock
from dngd.graph.staging import remove_unfinished
from dngd.graph.store import GraphStore
from dngd.paths import expanded

CACHE_VARIABLE = "DNGD_CACHE_DIR"

# Raised when a new format makes cached stores of the old one wrong; format 2 only adds to format 1.
_CACHE_VERSION = 1


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """Return the cache folder: the argument, else $DNGD_CACHE_DIR, else ~/.cache/dngd."""
    chosen = cache_dir or os.environ.get(CACHE_VARIABLE) or Path("~/.cache/dngd")
    return expanded(chosen).absolute()


def open_or_build(
    key: str,
    build: Callable[[Path], GraphStore],
    purpose: str,
    cache_dir: str | Path | None = None,
    wait_seconds: float = 600,
    *,
    progress: Progress | None = None,
) -> GraphStore:
    """Open the cached store of a key, or let `build` write it there first. One process builds, others wait.

    key: names the content: other content needs another key. purpose: what building is called in messages.
    progress: hears of a wait for another process.
    A cached store that does not open, or has values out of range, is built anew.
    """
    target = cache_folder(cache_dir) / f"{key}-v{_CACHE_VERSION}"
    if target.is_dir():
        try:
            return open_checked(target)
        except UserError:
            # Not removed here: without the lock, another process may be rebuilding it.
            pass
    on_wait = None if progress is None else lambda text: progress(text, 0, 0)
    lock = target.with_name(f"{target.name}.lock")
    with file_lock(lock, purpose=purpose, wait_seconds=wait_seconds, on_wait=on_wait):
        if target.is_dir():
            try:
                return open_checked(target)
            except UserError:
                shutil.rmtree(target, ignore_errors=True)
        remove_unfinished(target)
        return build(target)
