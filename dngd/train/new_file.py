"""Files that appear whole or not at all, however the writer ends."""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def new_file(path: Path, *, overwrite: bool) -> Iterator[BinaryIO]:
    """Give a file to write, which gets its name, and is on the disk, when the block ends without an error.

    Until then it has no name where the file system allows that, so that even a killed process leaves nothing; elsewhere
    a hidden one, removed on an error. Raises FileExistsError if `path` exists by the end and overwrite is off, OSError
    if it cannot be written.
    """
    folder = path.parent
    descriptor, name = _open(folder, path.name)
    try:
        with os.fdopen(descriptor, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if name is None and not overwrite:
                _link(file.fileno(), path)
            elif name is None:
                name = folder / f".{path.name}.{secrets.token_hex(4)}"
                _link(file.fileno(), name)
        if name is not None and overwrite:
            os.replace(name, path)
            name = None
        elif name is not None:
            _name_if_free(name, path)
    finally:
        if name is not None:
            name.unlink(missing_ok=True)


def _open(folder: Path, final: str) -> tuple[int, Path | None]:
    """Return a new file's descriptor, and its name if it must have one."""
    with contextlib.suppress(OSError, AttributeError):
        if _can_be_named_later(folder, f".{final}.{secrets.token_hex(4)}"):
            return os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o666), None
    descriptor, name = tempfile.mkstemp(prefix=f".{final}.", dir=folder)
    os.fchmod(descriptor, 0o666 & ~_umask())
    return descriptor, Path(name)


def _can_be_named_later(folder: Path, name: str) -> bool:
    """Try it with an empty file, before much work goes into one that would be lost."""
    descriptor = os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600)
    try:
        _link(descriptor, folder / name)
        (folder / name).unlink()
        return True
    finally:
        os.close(descriptor)


def _name_if_free(name: Path, path: Path) -> None:
    """Turn a hidden file's name into another that is not taken; as far as can be told where there are no links."""
    try:
        os.link(name, path)
    except FileExistsError:
        raise
    except OSError:
        if path.exists():
            raise FileExistsError(path) from None
        os.rename(name, path)


def _link(descriptor: int, path: Path) -> None:
    # A folder's descriptor makes Python take linkat, which can follow /proc's link to the file.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.link(f"/proc/self/fd/{descriptor}", path, src_dir_fd=folder, follow_symlinks=True)
    finally:
        os.close(folder)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
