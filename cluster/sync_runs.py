"""Copy run folders to object storage again and again, so that they outlive the cluster; run by aws.yaml and gcp.yaml.

    python sync_runs.py /shared/runs s3://BUCKET/runs [--period 300] [--once]

A file is copied when it is new or its size or time changed since the last round. A checkpoint that a run has removed
is removed there too, once a newer one of the run is copied; nothing else is ever removed, so that a copy outlives the
run's own folder. A source folder is copied by one process of a machine at a time: another one says so and ends, with
exit code 0, or 2 with --once. Needs pyarrow and nothing of dngd. Credentials are those of the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import pyarrow.fs as pafs

CHECKPOINTS = "checkpoints"
CHUNK_BYTES = 2**24


def copy_changed(source: Path, target: pafs.FileSystem, base: str, seen: dict[str, tuple[int, int]]) -> int:
    """Copy what changed since `seen`, which is brought up to date, and return how many files that was.

    Hidden files and folders are unfinished ones (dngd writes there and renames), so they are left out.
    """
    found: dict[str, tuple[int, int]] = {}
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source).as_posix()
        if any(part.startswith(".") for part in name.split("/")):
            continue
        try:
            if path.is_file():
                status = path.stat()
                found[name] = (status.st_size, status.st_mtime_ns)
        except FileNotFoundError:  # removed while we look
            continue
    copied = 0
    for name, state in found.items():
        if seen.get(name) == state:
            continue
        destination = f"{base}/{name}"
        if isinstance(target, pafs.LocalFileSystem):  # object storage has no folders to make
            target.create_dir(destination.rpartition("/")[0], recursive=True)
        try:
            with open(source / name, "rb") as file, target.open_output_stream(destination) as stream:
                shutil.copyfileobj(file, stream, CHUNK_BYTES)
        except FileNotFoundError:
            continue
        seen[name] = state
        copied += 1
    newest: dict[str, str] = {}
    for name in found.keys() & seen.keys():
        if place := checkpoint_of(name):
            newest[place[0]] = max(newest.get(place[0], ""), place[1])
    for name in [name for name in seen if name not in found]:
        if place := checkpoint_of(name):
            if place[1] >= newest.get(place[0], ""):
                continue  # the last of its run, whose folder may be gone, moved or unmounted: the copy is what is left
            with contextlib.suppress(FileNotFoundError):  # gone from there already
                target.delete_file(f"{base}/{name}")
        del seen[name]
    return copied


def checkpoint_of(name: str) -> tuple[str, str] | None:
    """Return (the run's folder of checkpoints, the checkpoint) of a file's name; None if it is no checkpoint's.

    Checkpoints are named by their step in eight digits, so that names are ordered as steps are.
    """
    parts = name.split("/")
    if CHECKPOINTS not in parts[:-2]:
        return None
    at = parts.index(CHECKPOINTS)
    return "/".join(parts[: at + 1]), parts[at + 1]


def lock_path(source: Path) -> Path:
    """Return the file that is locked while a source folder is copied.

    It is in this machine's own temporary folder: on a shared file system a lock may outlive a lost machine.
    """
    key = hashlib.sha256(os.fsencode(os.path.realpath(source))).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"sync_runs-{os.getuid()}-{key}.lock"


def lock(source: Path) -> int | None:
    """Return the open file whose lock says that this process copies the folder; None if another one does.

    The lock goes with the process, however it ends.
    """
    descriptor = os.open(lock_path(source), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def main() -> None:
    parser = argparse.ArgumentParser(description="Copy run folders to object storage again and again.")
    parser.add_argument("source", type=Path)
    parser.add_argument("target", help="s3://BUCKET/PREFIX or gs://BUCKET/PREFIX")
    parser.add_argument("--period", type=float, default=300.0, help="seconds between rounds")
    parser.add_argument("--once", action="store_true", help="one round, then end")
    arguments = parser.parse_args()
    if arguments.once and not arguments.source.is_dir():
        parser.error(f"{arguments.source} is no folder; give the one that holds the runs")
    if lock(arguments.source) is None:
        print(f"{arguments.source} is being copied by another sync_runs.py; left to that", file=sys.stderr, flush=True)
        sys.exit(2 if arguments.once else 0)
    target, base = pafs.FileSystem.from_uri(arguments.target)
    seen: dict[str, tuple[int, int]] = {}
    while True:
        try:
            if not arguments.source.is_dir():  # not yet, or not mounted for a while
                raise FileNotFoundError(f"{arguments.source} is no folder")
            copied = copy_changed(arguments.source, target, base.rstrip("/"), seen)
            print(f"{time.strftime('%F %T')} copied {copied} files to {arguments.target}", flush=True)
        except OSError as error:
            # Tried again: a run must not lose its copies to one bad minute of the network.
            print(f"{time.strftime('%F %T')} not copied to {arguments.target}: {error}", file=sys.stderr, flush=True)
            if arguments.once:
                sys.exit(1)
        if arguments.once:
            return
        time.sleep(arguments.period)


if __name__ == "__main__":
    main()
