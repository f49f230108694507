"""Stores on an object store: copied once into the cache folder, checked byte by byte on the way, then opened there.

The manifest is read first: a copy of the same manifest that is already in the cache is opened without reading
anything else. A copy that is interrupted leaves nothing that opens.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from dngd.errors import UserError
from dngd.graph.builder import Progress
from dngd.graph.cache import cache_folder, open_or_build
from dngd.graph.filesystems import Location, check_bucket, explained, locate, read_small
from dngd.graph.manifest import MANIFEST_NAME, FileEntry, Manifest, parse_manifest
from dngd.graph.staging import StagedFolder
from dngd.graph.store import GraphStore

_KEY_DIGITS = 16
_PIECE_BYTES = 1 << 23
_NUM_CONNECTIONS = 8
_SLOWEST_BYTES_PER_SECOND = 5e6
"""What a wait for another process's copy expects of its connection."""


def open_remote(
    address: str,
    cache_dir: str | Path | None = None,
    wait_seconds: float = 600,
    *,
    progress: Progress | None = None,
) -> GraphStore:
    """Open the store at an `s3://` or `gs://` address by a copy in the cache folder; see `GraphStore.open`.

    wait_seconds: how long to wait for another process that copies the same store, besides a time that grows with its
    size. progress: called with ("copying", bytes done, bytes in all).
    Raises UserError if the address cannot be reached or read, holds no store, differs from its manifest, or the cache
    folder's disk is too small.
    """
    root = locate(address)
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
        cache_folder(cache_dir),
        wait_seconds + total / _SLOWEST_BYTES_PER_SECOND,
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
    """Copy all files, the manifest last, into a folder that takes the target's place when it is whole."""
    total = sum(entry.bytes for entry in manifest.files.values())
    done = 0

    def count(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        if progress is not None:
            progress("copying", done, total)

    with StagedFolder(target, overwrite=True) as staged:
        free = shutil.disk_usage(staged.path).free
        if free < total:
            raise UserError(
                f"{root.shown} has {total} bytes but the cache folder {target.parent} has {free} free; free some "
                "space, or choose another cache folder by DNGD_CACHE_DIR"
            )
        for name, entry in manifest.files.items():
            _copy_file(root.child(f"{root.path}/{name}"), entry, staged.path / name, count)
        with (staged.path / MANIFEST_NAME).open("wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        staged.commit()


def _copy_file(source: Location, entry: FileEntry, target: Path, count: Callable[[int], None]) -> None:
    fix = "it was not copied there whole, or has changed since: copy the store there again"
    with explained(source.shown):
        size = source.filesystem.get_file_info(source.path).size
    if size is None:
        raise UserError(f"{source.shown} is missing though the manifest lists it; {fix}")
    if size != entry.bytes:
        raise UserError(f"{source.shown} has {size} bytes but its manifest says {entry.bytes}; {fix}")
    digest = hashlib.sha256()
    with target.open("wb") as file:
        for piece in _pieces(source, size):
            digest.update(piece)
            file.write(piece)
            count(len(piece))
        file.flush()
        os.fsync(file.fileno())
    if digest.hexdigest() != entry.sha256:
        raise UserError(f"{source.shown} does not have the checksum that its manifest says; {fix}")


def _pieces(source: Location, size: int) -> Iterator[bytes]:
    """Yield a file's bytes in order."""
    if source.filesystem.type_name == "s3":
        yield from _pieces_in_parallel(source, size)
        return
    with explained(source.shown):
        opened = source.filesystem.open_input_stream(source.path)
    with opened:
        while True:
            with explained(source.shown):
                piece = opened.read(_PIECE_BYTES)
            if not piece:
                return
            yield piece


def _pieces_in_parallel(source: Location, size: int) -> Iterator[bytes]:
    """Yield a file's bytes in order, read over several connections, a bounded number of pieces ahead."""
    with explained(source.shown):
        opened = source.filesystem.open_input_file(source.path)
    with opened, ThreadPoolExecutor(_NUM_CONNECTIONS) as pool:
        waiting: deque[Future[bytes]] = deque()
        try:
            for start in range(0, size, _PIECE_BYTES):
                waiting.append(pool.submit(opened.read_at, min(_PIECE_BYTES, size - start), start))
                if len(waiting) >= _NUM_CONNECTIONS:
                    yield _result(waiting.popleft(), source.shown)
            while waiting:
                yield _result(waiting.popleft(), source.shown)
        finally:
            for future in waiting:
                future.cancel()


def _result(future: Future[bytes], shown: str) -> bytes:
    with explained(shown):
        return future.result()
