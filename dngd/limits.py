"""What this process may take, of the machine and of the control groups that it runs in: memory and CPUs."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

PROC = Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")
CPU_MAX = Path("/sys/fs/cgroup/cpu.max")
"""Quota and period of this container's CPU time, in microseconds (control groups, version 2)."""
_NO_LIMIT = 2**60
"""Version 1 writes a number near 2^63 where there is no limit."""


def available_memory() -> int:
    """Return the bytes that can be taken without pushing others out: what the machine has available, or the room in
    the narrowest control group (versions 1 and 2; file pages that a group could drop count as room)."""
    return min([int(psutil.virtual_memory().available), *_rooms()])


def usable_cpus() -> int:
    """Return the number of CPUs that this process may use, at least 1: no more than its container's quota is worth."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CPU_MAX.read_text().split()
        return max(1, min(cpus, int(quota) // int(period)))
    except (OSError, ValueError):
        return cpus  # no such file, or "max"


def _rooms() -> list[int]:
    try:
        lines = PROC.read_text().splitlines()
    except OSError:
        return []
    rooms = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, used = GROUPS, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit, used = GROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        # A container may see its own group as the root.
        folder = root / path.lstrip("/")
        folder = folder if folder.is_dir() else root
        for group in (folder, *folder.parents):
            if not group.is_relative_to(root):
                break
            room = _room(group, limit, used)
            if room is not None:
                rooms.append(room)
    return rooms


def _room(group: Path, limit: str, used: str) -> int | None:
    try:
        most = int((group / limit).read_text())
        room = most - int((group / used).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None  # no such group, or "max"
    if most >= _NO_LIMIT:
        return None
    droppable = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
    return max(0, room + droppable)
