"""Stores that are copied to a machine's own disk: once, by one process; interrupted copies are gone on with."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dngd.errors import UserError
from dngd.graph import GraphStore, remote, resolve_dataset
from dngd.graph.remote import open_copy
from tests.helpers.object_store import ObjectStore, object_store

COPY = """
import sys, time
from dngd.graph import remote
from dngd.graph.remote import open_copy
remote._PIECE_BYTES = 4096
def progress(stage, done, total):
    print(stage, done, total, flush=True)
    time.sleep(float(sys.argv[3]))
print(open_copy(sys.argv[1], sys.argv[2], progress=progress).digest)
"""


@pytest.fixture(scope="module")
def bucket(store: GraphStore) -> Iterator[ObjectStore]:
    """A local S3 server with the tests' graph in it."""
    with object_store("graphs") as serving:
        serving.upload(store.path, "small")
        yield serving


def start(source: str, folder: Path, pause: float) -> subprocess.Popen[str]:
    """Copy in a process that pauses after each piece of 4 KiB."""
    return subprocess.Popen(
        [sys.executable, "-c", COPY, source, str(folder), str(pause)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def lines_of(process: subprocess.Popen[str]) -> list[str]:
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    return said.splitlines()


def test_one_process_copies_and_the_others_wait(bucket: ObjectStore, store: GraphStore, tmp_path: Path) -> None:
    processes = [start("s3://graphs/small", tmp_path, 0.03) for _ in range(3)]
    said = [lines_of(process) for process in processes]
    assert {lines[-1] for lines in said} == {store.digest}
    copiers = [lines for lines in said if any(line.startswith("copying") for line in lines)]
    assert len(copiers) == 1, "one process copies, whoever comes first"
    waited = [line for lines in said if lines is not copiers[0] for line in lines[:-1]]
    # The others may also come when all is done, and then wait for each other.
    pids = "|".join(str(process.pid) for process in processes)
    form = re.compile(rf"waiting for process ({pids}|unknown) to finish copying s3://graphs/small 0 0")
    assert all(form.fullmatch(line) for line in waited), waited


def test_a_killed_copy_is_gone_on_with(bucket: ObjectStore, store: GraphStore, tmp_path: Path) -> None:
    first = start("s3://graphs/small", tmp_path, 0.1)
    assert first.stdout is not None
    for line in first.stdout:
        if int(line.split()[1]) > 20_000:
            break
    first.send_signal(signal.SIGKILL)
    first.wait(timeout=20)
    assert not [path for path in tmp_path.iterdir() if path.is_dir() and not path.name.startswith(".")]
    kept = {path.name: path.stat().st_size for path in next(tmp_path.glob(".copy-*.partial")).iterdir()}
    assert sum(kept.values()) > 0
    fetched: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        real = remote._pieces

        def counting(source: remote.Location, start: int, end: int) -> Iterator[bytes]:
            fetched.append(end - start)
            return real(source, start, end)

        patch.setattr(remote, "_pieces", counting)
        began = time.monotonic()
        assert open_copy("s3://graphs/small", tmp_path).digest == store.digest
    assert time.monotonic() - began < 30, "the lock of the killed process is free"
    total = sum(entry.bytes for entry in store.manifest.files.values())
    assert sum(fetched) == total - sum(kept.values()), "what was there is not fetched again"


def test_what_a_crash_damaged_is_fetched_again(bucket: ObjectStore, store: GraphStore, tmp_path: Path) -> None:
    whole = open_copy("s3://graphs/small", tmp_path).path
    partial = whole.with_name(f".{whole.name}.partial")
    whole.rename(partial)
    (partial / "manifest.json").unlink()
    file = partial / "features.arrow"
    file.write_bytes(file.read_bytes()[:-4096] + bytes(4096))
    (partial / "labels.arrow").write_bytes(b"x" * 1_000_000)
    seen: list[int] = []
    again = open_copy("s3://graphs/small", tmp_path, progress=lambda stage, done, total: seen.append(total - done))
    assert again.digest == store.digest
    assert all(path.read_bytes() == (store.path / path.name).read_bytes() for path in again.path.iterdir())
    assert seen[-1] == 0


def test_a_waiter_has_a_limit(bucket: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = start("s3://graphs/small", tmp_path, 0.5)
    assert first.stdout is not None
    first.stdout.readline()
    monkeypatch.setattr(remote, "_SLOWEST_BYTES_PER_SECOND", 1e12)
    with pytest.raises(UserError, match=rf"waited 0\.2 s for process {first.pid} to finish: copying s3://graphs/small"):
        open_copy("s3://graphs/small", tmp_path, wait_seconds=0.2)
    first.kill()
    first.wait(timeout=20)


def test_a_shared_folder_is_copied_to_the_nodes_disk(store: GraphStore, tmp_path: Path) -> None:
    shared, disk = tmp_path / "shared" / "small", tmp_path / "disk"
    shutil.copytree(store.path, shared)
    opened = resolve_dataset(shared, stage_dir=disk)
    assert opened.digest == store.digest
    assert opened.path.parent == disk
    assert resolve_dataset("small", data_root=shared.parent, stage_dir=disk).path == opened.path
    assert resolve_dataset(shared).path == shared, "without a stage_dir it is opened where it lies"
    # What the copy lacks of the shared folder is not missed: the manifest alone is read there.
    (shared / "features.arrow").unlink()
    assert resolve_dataset(shared, stage_dir=disk).digest == store.digest


def test_a_disk_that_is_too_small(bucket: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"has 1000 free; free some space there, .*--stage-dir") as caught:
        open_copy("s3://graphs/small", tmp_path)
    assert os.uname().nodename in str(caught.value), "which of the nodes"
