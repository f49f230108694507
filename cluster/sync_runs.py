"""Copy run folders to object storage again and again, so that they outlive the cluster; run by aws.yaml and gcp.yaml.

    python sync_runs.py /shared/runs s3://BUCKET/runs [--period 300] [--once]

A file is copied when it is new or its size or time changed since the last round. Checkpoints that a run has removed
are removed there too, after its newer ones are copied; nothing else is ever removed. Needs pyarrow and nothing of
dngd. Credentials are those of the machine.
"""

from __future__ import annotations

import argparse
import shutil
import sys
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
    for name in [name for name in seen if name not in found]:
        if CHECKPOINTS in name.split("/"):
            target.delete_file(f"{base}/{name}")
        del seen[name]
    return copied


def main() -> None:
    parser = argparse.ArgumentParser(description="Copy run folders to object storage again and again.")
    parser.add_argument("source", type=Path)
    parser.add_argument("target", help="s3://BUCKET/PREFIX or gs://BUCKET/PREFIX")
    parser.add_argument("--period", type=float, default=300.0, help="seconds between rounds")
    parser.add_argument("--once", action="store_true", help="one round, then end")
    arguments = parser.parse_args()
    target, base = pafs.FileSystem.from_uri(arguments.target)
    seen: dict[str, tuple[int, int]] = {}
    while True:
        try:
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
