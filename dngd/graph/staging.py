"""A folder that is either whole or not there: filled under a hidden name beside its target, then renamed.

A process killed at any point leaves at most a folder whose name `open` refuses; the next write of the same
target removes it, since it no longer holds its lock.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from dngd.errors import UserError
from dngd.graph.manifest import MANIFEST_NAME
from dngd.paths import is_utf8, printable

_TEMPORARY_MARK = ".tmp-"
_RETIRED_MARK = "-old"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_temporary(path: Path) -> bool:
    """Say whether a folder's name is that of an unfinished write."""
    return path.name.startswith(".") and _TEMPORARY_MARK in path.name


def remove_unfinished(target: Path) -> None:
    """Remove what killed writes to `target` left beside it. The caller must be its only writer."""
    for leftover in _leftovers(target):
        shutil.rmtree(leftover, ignore_errors=True)


def check_utf8(folder: Path) -> None:
    """Raise UserError if Arrow cannot write files into a folder of this path."""
    if not is_utf8(folder):
        raise UserError(
            f"{printable(folder)} is no path in UTF-8, as Arrow's files have to have; choose another path for the store"
        )


def check_target(target: Path, overwrite: bool, is_own: Callable[[str], bool]) -> None:
    """Raise UserError if a folder cannot be put at target: not UTF-8, taken, or no store, which has a manifest and no
    file whose name is not its own. An empty folder may be replaced."""
    if is_temporary(target) or not target.name:
        raise UserError(f"{target} cannot be the name of a store; choose a folder name without '{_TEMPORARY_MARK}'")
    check_utf8(target)
    if not target.exists() and not target.is_symlink():
        return
    if not overwrite:
        raise UserError(f"{target} already exists and is not overwritten; choose another path, or --overwrite")
    foreign = not target.is_dir() or target.is_symlink()
    if not foreign:
        names = [entry.name for entry in target.iterdir()]
        foreign = bool(names) and not (MANIFEST_NAME in names and all(map(is_own, names)))
    if foreign:
        raise UserError(
            f"{target} is not a graph store, or holds other files too, so that it is not overwritten; "
            "choose another path or remove it yourself"
        )


class StagedFolder:
    """A context: a temporary folder to fill; `commit` renames it to the target, leaving without it removes it.

    An OSError within the context (a full disk) becomes a UserError that names the target.
    """

    def __init__(self, target: Path, overwrite: bool) -> None:
        self._target, self._overwrite = target, overwrite
        self._made_parents: list[Path] = []
        self._lock: int | None = None
        self._committed = False
        self.path = target

    def __enter__(self) -> StagedFolder:
        try:
            self._make()
        except OSError as error:
            self._remove()
            raise _write_error(self._target, error) from error
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()
        if isinstance(error, OSError):
            raise _write_error(self._target, error) from error

    def commit(self) -> None:
        """Sync the folder and put it in the target's place. Raises UserError if another took it meanwhile."""
        _sync_folder(self.path)
        _rename(self.path, self._target, self._overwrite)
        self._committed = True
        _sync_folder(self._target.parent)

    def _make(self) -> None:
        parent = self._target.parent
        missing = [folder for folder in (parent, *parent.parents) if not folder.exists()]
        parent.mkdir(parents=True, exist_ok=True)
        self._made_parents = missing
        _remove_dead(self._target)
        while self._lock is None:
            name = f".{self._target.name}{_TEMPORARY_MARK}{os.getpid()}-{secrets.token_hex(4)}"
            self.path = self._target.with_name(name)
            self.path.mkdir()
            self._lock = _locked(self.path)

    def _remove(self) -> None:
        if not self._committed:
            if self.path != self._target:
                shutil.rmtree(self.path, ignore_errors=True)
            for folder in self._made_parents:
                try:
                    folder.rmdir()
                except OSError:
                    break
            self._made_parents = []
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _write_error(target: Path, error: OSError) -> UserError:
    # Arrow's own errors put more words around it.
    reason = os.strerror(error.errno) if error.errno else str(error)
    fix = "free some space" if error.errno in _DISK_FULL else "check the folder's permissions and disk"
    return UserError(f"the store {target} cannot be written ({reason}); {fix}, or choose another path")


def _leftovers(target: Path) -> list[Path]:
    prefix = f".{target.name}{_TEMPORARY_MARK}"
    return [entry for entry in target.parent.iterdir() if entry.name.startswith(prefix)]


def _remove_dead(target: Path) -> None:
    """Remove the temporary folders of killed writes: those whose lock nobody holds."""
    for leftover in _leftovers(target):
        if leftover.name.endswith(_RETIRED_MARK) and not target.exists():
            continue  # the only copy of a store whose replacement was killed between two renames
        lock = _locked(leftover)
        if lock is not None:
            shutil.rmtree(leftover, ignore_errors=True)
            os.close(lock)


def _locked(folder: Path) -> int | None:
    """Return a descriptor of the folder that holds its lock; None if another holds it or has removed it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL) and not _is_foreign(folder):
            return descriptor  # a file system without locks
        os.close(descriptor)
        return None
    if not folder.exists():
        os.close(descriptor)
        return None
    return descriptor


def _is_foreign(folder: Path) -> bool:
    """Say whether another process made this temporary folder."""
    return f"{_TEMPORARY_MARK}{os.getpid()}-" not in folder.name


def _rename(temporary: Path, target: Path, overwrite: bool) -> None:
    retired = temporary.with_name(temporary.name + _RETIRED_MARK)
    if overwrite and target.exists():
        target.rename(retired)
    try:
        temporary.rename(target)
    except OSError as error:
        if retired.exists():
            retired.rename(target)
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise UserError(
                f"{target} was created meanwhile by another process; use it, or choose another path"
            ) from error
        raise
    shutil.rmtree(retired, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
