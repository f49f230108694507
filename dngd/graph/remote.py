"""Stores elsewhere, on an object store or a shared folder: copied once a machine, checked byte by byte, opened there.

The manifest is read first: a copy of the same manifest that is already there is opened without reading anything else.
One process copies, others wait for it. What an interrupted copy left is hashed and gone on with, and has no manifest
until it is whole, so that it does not open.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dngd.errors import UserError
from dngd.graph.builder import Progress
from dngd.graph.cache import cache_folder, open_or_build
from dngd.graph.filesystems import Location, check_bucket, explained, locate, read_small
from dngd.graph.manifest import MANIFEST_NAME, FileEntry, Manifest, parse_manifest
from dngd.graph.store import GraphStore

_KEY_DIGITS = 16
_PIECE_BYTES = 1 << 23
_NUM_CONNECTIONS = 8
_SLOWEST_BYTES_PER_SECOND = 5e6
"""What a wait for another process's copy expects of its connection."""


def open_copy(
    source: str | Path,
    folder: str | Path | None = None,
    wait_seconds: float = 600,
    *,
    progress: Progress | None = None,
) -> GraphStore:
    """Open the store in a folder, or at an `s3://` or `gs://` address, by a copy on this machine.

    folder: where copies are kept; default: the cache folder. wait_seconds: how long to wait for another process that
    copies the same store, besides a time that grows with its size. progress: called with ("copying", bytes done, bytes
    in all), and with what is waited for.
    Raises UserError if the source cannot be reached or read, holds no store, differs from its manifest, or the disk is
    too small.
    """
    root = locate(source)
    raw = _manifest_bytes(root)
    fix = "write the store again and copy all of its files there"
    manifest = parse_manifest(raw, f"{root.shown}/{MANIFEST_NAME}", fix)
    total = sum(entry.bytes for entry in manifest.files.values())

    def build(target: Path) -> GraphStore:
        _copy(root, manifest, raw, target, progress)
        return GraphStore.open(target)

    return open_or_build(
        f"copy-{hashlib.sha256(raw).hexdigest()[:_KEY_DIGITS]}",
        build,
        f"copying {root.shown}",
        cache_folder(folder),
        wait_seconds + total / _SLOWEST_BYTES_PER_SECOND,
        progress=progress,
    )


def _manifest_bytes(root: Location) -> bytes:
    try:
        return read_small(root.child(f"{root.path}/{MANIFEST_NAME}"))
    except UserError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
    check_bucket(root)
    raise UserError(
        f"{root.shown} holds no {MANIFEST_NAME}, so it is not a dngd graph store; give the address of a folder that "
        "`dngd data import --out` wrote and that was copied there whole"
    )


def _copy(root: Location, manifest: Manifest, raw: bytes, target: Path, progress: Progress | None) -> None:
    """Copy all files into a hidden folder, the manifest last, and rename it. The caller holds the target's lock."""
    total = sum(entry.bytes for entry in manifest.files.values())
    done = 0

    def count(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        if progress is not None:
            progress("copying", done, total)

    partial = target.with_name(f".{target.name}.partial")
    try:
        partial.mkdir(exist_ok=True)
        _check_space(root, total - sum(file.stat().st_size for file in partial.iterdir()), partial)
        for name, entry in manifest.files.items():
            _copy_file(root.child(f"{root.path}/{name}"), entry, partial / name, count)
        with (partial / MANIFEST_NAME).open("wb") as file:
            file.write(raw)
            _flush(file)
        partial.rename(target)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise UserError(
            f"the copy of {root.shown} cannot be written to {target.parent} on {os.uname().nodename} ({reason}); free "
            "some space there, or choose another folder by --stage-dir or DNGD_CACHE_DIR"
        ) from error


def _check_space(root: Location, wanted: int, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise UserError(
            f"{root.shown} takes {wanted} more bytes but {folder.parent} on {os.uname().nodename} has {free} free; "
            "free some space there, or choose another folder by --stage-dir or DNGD_CACHE_DIR"
        )


def _copy_file(source: Location, entry: FileEntry, target: Path, count: Callable[[int], None]) -> None:
    fix = "it was not copied there whole, or has changed since: copy the store there again"
    with explained(source.shown):
        size = source.filesystem.get_file_info(source.path).size
    if size is None:
        raise UserError(f"{source.shown} is missing though the manifest lists it; {fix}")
    if size != entry.bytes:
        raise UserError(f"{source.shown} has {size} bytes but its manifest says {entry.bytes}; {fix}")
    had = target.stat().st_size if target.exists() else 0
    if _complete(source, entry, target, count):
        return
    target.unlink()
    count(-entry.bytes)
    # What lay there may have been damaged, by a machine that crashed, say: once more, all of it.
    if not had or not _complete(source, entry, target, count):
        raise UserError(f"{source.shown} does not have the checksum that its manifest says; {fix}")


def _complete(source: Location, entry: FileEntry, target: Path, count: Callable[[int], None]) -> bool:
    """Fetch what a file lacks and return whether it has its checksum then."""
    digest = hashlib.sha256()
    with target.open("a+b") as file:
        if file.tell() > entry.bytes:
            file.truncate(0)
        file.seek(0)
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
            count(len(piece))
        for piece in _pieces(source, file.tell(), entry.bytes):
            digest.update(piece)
            file.write(piece)
            count(len(piece))
        _flush(file)
    return digest.hexdigest() == entry.sha256


def _pieces(source: Location, start: int, end: int) -> Iterator[bytes]:
    """Yield a file's bytes from start to end, in order."""
    if start == end:
        return
    with explained(source.shown):
        opened = source.filesystem.open_input_file(source.path)
    with opened:
        if source.filesystem.type_name == "s3":
            yield from _pieces_in_parallel(opened, source.shown, start, end)
            return
        for at in range(start, end, _PIECE_BYTES):
            with explained(source.shown):
                piece = opened.read_at(min(_PIECE_BYTES, end - at), at)
            yield piece


def _pieces_in_parallel(opened: Any, shown: str, start: int, end: int) -> Iterator[bytes]:
    """Yield a file's bytes in order, read over several connections, a bounded number of pieces ahead."""
    with ThreadPoolExecutor(_NUM_CONNECTIONS) as pool:
        waiting: deque[Future[bytes]] = deque()
        try:
            for at in range(start, end, _PIECE_BYTES):
                waiting.append(pool.submit(opened.read_at, min(_PIECE_BYTES, end - at), at))
                if len(waiting) >= _NUM_CONNECTIONS:
                    yield _result(waiting.popleft(), shown)
            while waiting:
                yield _result(waiting.popleft(), shown)
        finally:
            for future in waiting:
                future.cancel()


def _result(future: Future[bytes], shown: str) -> bytes:
    with explained(shown):
        return future.result()


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
