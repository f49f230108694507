"""A control group of Linux that limits the memory of child processes, page cache included; versions 1 and 2.

Version 1: below this process's own group, whose limits then still hold. Version 2 lets a group with processes have no
limited ones below it, so that it is made beside this process's own, where that is allowed.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

PROC = Path("/proc/self")
_EMPTY_SECONDS = 10.0


class NotAllowedError(Exception):
    """This machine gives no such group; the text says why."""


@dataclass(frozen=True)
class MemoryGroup:
    """One group. folder: its folder in the control file system. version: 1 or 2."""

    folder: Path
    version: int

    @property
    def processes(self) -> Path:
        """The file that a process id is written to, to let it join; its later children join too."""
        return self.folder / "cgroup.procs"

    def limit(self, size: int) -> None:
        """Let the group have at most `size` bytes, page cache included, and no swap. Raises NotAllowedError."""
        names = {1: ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes"), 2: ("memory.max", "memory.swap.max")}
        hard, swap = names[self.version]
        try:
            (self.folder / hard).write_text(str(size))
        except OSError as error:
            raise NotAllowedError(f"{self.folder / hard} cannot be set: {error.strerror}") from None
        # Without swap in the kernel there is no such file.
        with contextlib.suppress(OSError):
            (self.folder / swap).write_text(str(size) if self.version == 1 else "0")

    def peak_bytes(self) -> int:
        """Return the most that the group has held so far."""
        names = {1: "memory.max_usage_in_bytes", 2: "memory.peak"}
        return int((self.folder / names[self.version]).read_text())


@contextlib.contextmanager
def memory_group(name: str) -> Iterator[MemoryGroup]:
    """Make a group and remove it again, once its processes are gone. Raises NotAllowedError."""
    parent, version = _parent()
    remove_leftovers(parent, name, lambda folder: folder.rmdir())
    group = MemoryGroup(parent / f"{name}-{os.getpid()}", version)
    try:
        group.folder.mkdir()
    except OSError as error:
        raise NotAllowedError(f"no group can be made in {parent}: {error.strerror}") from None
    try:
        needed = (
            ("memory.limit_in_bytes", "memory.max_usage_in_bytes") if version == 1 else ("memory.max", "memory.peak")
        )
        if missing := [file for file in needed if not (group.folder / file).exists()]:
            raise NotAllowedError(f"groups in {parent} have no {', '.join(missing)}: memory is not limited there")
        yield group
    finally:
        _remove(group.folder)


def remove_leftovers(parent: Path, name: str, remove: Callable[[Path], None]) -> None:
    """Remove what killed processes left in a folder as NAME-PID, as far as that is possible."""
    for left in parent.glob(f"{name}-*"):
        pid = left.name.removeprefix(f"{name}-")
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            with contextlib.suppress(OSError):
                remove(left)


def _parent() -> tuple[Path, int]:
    """Return the folder to make a group in, and the version."""
    try:
        own = [line.split(":", 2) for line in (PROC / "cgroup").read_text().splitlines()]
        mounts = (PROC / "mountinfo").read_text().splitlines()
    except OSError:
        raise NotAllowedError("this system has no control groups (Linux has)") from None
    for _, controllers, path in own:
        if "memory" in controllers.split(","):
            return _folder(mounts, "cgroup", path), 1
    for number, _, path in own:
        if number == "0":
            folder = _folder(mounts, "cgroup2", path)
            # In the root, processes and limited groups may stand side by side.
            return (folder if path == "/" else folder.parent), 2
    raise NotAllowedError("this process is in no control group")


def _folder(mounts: list[str], kind: str, path: str) -> Path:
    """Return where a group's folder is mounted. mounts: lines of /proc/self/mountinfo."""
    for line in mounts:
        before, _, after = line.partition(" - ")
        root, point = before.split()[3:5]
        file_system, _, options = after.split(" ", 2)
        if file_system != kind or (kind == "cgroup" and "memory" not in options.split(",")):
            continue
        # A container may see only a part of the tree, mounted as if it were all.
        if path == root or path.startswith(root.rstrip("/") + "/"):
            return Path(point) / Path(path).relative_to(root)
        return Path(point)
    raise NotAllowedError(f"no {kind} file system with memory limits is mounted")


def _remove(folder: Path) -> None:
    deadline = time.monotonic() + _EMPTY_SECONDS
    while True:
        try:
            folder.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError:
            # Processes that have just ended count for a moment.
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
