"""A lock between processes of one machine, with a time limit that says what it waited for."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from dngd.errors import UserError

_POLL_SECONDS = 0.1


@contextlib.contextmanager
def file_lock(
    path: Path, *, purpose: str, wait_seconds: float, on_wait: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Hold an exclusive lock on `path` (created if missing, never removed).

    purpose: what the holder does, for the message of those who wait too long. on_wait: called, again and again while
    another process holds the lock, with what is waited for.
    The operating system releases the lock when its holder ends, however it ends.
    Raises UserError after wait_seconds, naming the holder, or if the file cannot be locked.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}); check the folder's permissions, or choose another "
            "folder by --stage-dir, --cache-dir or DNGD_CACHE_DIR"
        ) from error
    try:
        deadline = time.monotonic() + wait_seconds
        while not _try_lock(descriptor, path):
            holder = os.pread(descriptor, 64, 0).decode("ascii", "replace").strip() or "unknown"
            _wait(f"process {holder}", purpose, f" (lock {path})", wait_seconds, deadline, on_wait)
        # On a full disk those who wait are not told who holds it; what is done under the lock says what is wrong.
        with contextlib.suppress(OSError):
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def folder_lock(
    folder: Path, *, purpose: str, wait_seconds: float, on_wait: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Hold an exclusive lock on a folder itself: nothing is written there for it, so that its holder is not known.

    purpose, on_wait: as of `file_lock`. Where the file system has no locks nothing is held, and two writers at once
    must be kept apart by their users. Raises UserError after wait_seconds, OSError if the folder cannot be locked.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        deadline = time.monotonic() + wait_seconds
        while not _try_folder_lock(descriptor):
            _wait("another process", purpose, "", wait_seconds, deadline, on_wait)
        yield
    finally:
        os.close(descriptor)


def _wait(
    holder: str, purpose: str, where: str, wait_seconds: float, deadline: float, on_wait: Callable[[str], None] | None
) -> None:
    """Wait for a moment before the next try. Raises UserError after the deadline, of time.monotonic()."""
    if time.monotonic() >= deadline:
        raise UserError(
            f"waited {wait_seconds:g} s for {holder} to finish: {purpose}{where}; wait for it or end it, then start "
            "again"
        )
    if on_wait is not None:
        on_wait(f"waiting for {holder} to finish {purpose}")
    time.sleep(_POLL_SECONDS)


def _try_folder_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.EBADF):
            raise
    return True


def _try_lock(descriptor: int, path: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise UserError(
            f"{path} cannot be locked ({error.strerror}): its file system has no locks; choose a local cache "
            "folder by --stage-dir, --cache-dir or DNGD_CACHE_DIR"
        ) from error
    return True
