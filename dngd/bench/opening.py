"""How long `GraphStore.open` takes, in a fresh process: on the store and on a small one, with files cached or not."""

from __future__ import annotations

import ctypes
import mmap
import os
import statistics
import time
from pathlib import Path
from typing import Any

from dngd.bench.child import Message
from dngd.bench.children import Child
from dngd.bench.progress import BenchProgress

CACHE_STATES = ("warm", "cold")

_LIBC = ctypes.CDLL(None)


def time_open(request: Message) -> Message:
    """Return the seconds of one open, imports done before."""
    from dngd.graph import GraphStore

    started = time.perf_counter()
    GraphStore.open(request["store"])
    return {"seconds": time.perf_counter() - started}


def measure_open(stores: dict[str, Path], repeats: int, progress: BenchProgress) -> dict[str, Any]:
    """Return seconds of opening each store, each time in a new process; stores take turns.

    cold: with the store's pages dropped from the page cache just before, as far as the system does so.
    """
    times: dict[str, dict[str, list[float]]] = {name: {state: [] for state in CACHE_STATES} for name in stores}
    resident: dict[str, list[float]] = {name: [] for name in stores}
    for _ in range(repeats):
        for name, path in stores.items():
            # In this order: the warm one finds what the cold one has read.
            for state in reversed(CACHE_STATES):
                child = Child(f"open {name}", {"part": "open"})
                try:
                    child.wait_until_ready()
                    if state == "cold":
                        drop_cached(path)
                        resident[name].append(cached_share(path))
                    times[name][state].append(child.ask({"store": str(path)})["seconds"])
                finally:
                    child.close()
            progress.advance(1, f"opening {name}")
    return {
        name: {
            "bytes": sum(file.stat().st_size for file in stores[name].iterdir()),
            **{f"{state}_seconds": statistics.median(seconds) for state, seconds in of_store.items()},
            **{f"{state}_runs": seconds for state, seconds in of_store.items()},
            "cached_share_when_cold": statistics.median(resident[name]),
        }
        for name, of_store in times.items()
    }


def drop_cached(folder: Path) -> None:
    """Ask the system to forget the cached pages of a folder's files; pages that a process has mapped stay."""
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached_share(folder: Path) -> float:
    """Return which share of a folder's files is in the page cache, 0 to 1; 1 where the system does not tell."""
    files = list(folder.iterdir())
    return sum(map(cached_bytes, files)) / max(1, sum(file.stat().st_size for file in files))


def cached_bytes(file: Path) -> int:
    """Return how many bytes of a file are in the page cache; all of them where the system does not tell."""
    size = file.stat().st_size
    count = -(-size // mmap.PAGESIZE)
    if size == 0 or not hasattr(_LIBC, "mincore"):
        return size
    # Writable but private, which is what ctypes needs to take its address; nothing is written.
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), size, access=mmap.ACCESS_COPY) as mapped:
        view = (ctypes.c_char * size).from_buffer(mapped)
        states = (ctypes.c_ubyte * count)()
        failed = _LIBC.mincore(ctypes.c_void_p(ctypes.addressof(view)), ctypes.c_size_t(size), states)
        # A view that is alive would keep the mapping open.
        del view
        cached = sum(state & 1 for state in states) * mmap.PAGESIZE
        return size if failed else min(size, cached)
