"""Runs at `s3://` and `gs://` addresses: a working folder on this machine, whose files are sent as they are written.

Rank 0 works in a folder of its own disk. Checkpoints are sent by the thread that writes them, the other files by one of
their own, so that training waits for neither; a store that cannot be reached is told of and tried again with the next
file, and at the end for a while.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from dngd.config import TrainConfig, address_of_run
from dngd.errors import UserError
from dngd.graph import cache_folder
from dngd.paths import RUN_FILES, expanded, holds_run, runs_in
from dngd.train.checkpoint import STATE_NAME, DamagedError, read_verified
from dngd.train.own_parts import OWN_PARTS_NAME
from dngd.train.remote_files import CHECKPOINTS, RemoteFiles
from dngd.train.run_folder import CONFIG_NAME, RunFolder

DRIVERS_OWN = (CONFIG_NAME, OWN_PARTS_NAME, "report.html")
"""The files of a run that its driver writes, not rank 0."""

SETTLE_SECONDS = 10.0
FINISH_SECONDS = 60.0
RETRY_SECONDS = 2.0


@contextmanager
def open_run_folder(config: TrainConfig, rank: int, tell: Callable[[str], None]) -> Iterator[RunFolder]:
    """Give the folder in which a rank works on a run; that of a run at an address goes when the block ends.

    tell: hears of failures to send. Raises UserError if rank 0 does not see the folder that the driver prepared.
    """
    assert config.run_dir is not None, "the launcher settles the run folder"
    if config.run_address is None:
        folder = RunFolder(config.run_dir)
        if rank == 0 and not folder.holds_a_run:
            raise UserError(
                f"run folder {folder.shown} is not seen by {os.uname().nodename}, where the run's first worker is; put "
                "--run-dir on storage that all nodes share, or at s3://"
            )
        yield folder
        return
    files = RemoteFiles(config.run_address)
    with _working_folder(cache_folder(config.cache_dir) / "runs") as path:
        if rank != 0:
            yield RunFolder(path, files.shown)
            return
        remote = RemoteRunFolder(path, files, config.checkpoint.keep, tell)
        try:
            yield remote
        finally:
            remote.close()


class _FetchedFolder(RunFolder):
    """A copy of what lies at an address, without the tensors of its checkpoints; gone when the object is."""

    def __init__(self, files: RemoteFiles) -> None:
        self._holder = tempfile.TemporaryDirectory(prefix="dngd-run-")
        super().__init__(Path(self._holder.name) / files.name, files.shown)
        self.path.mkdir()
        files.fetch(files.files(), self.path)
        for name in files.checkpoints():
            (self.checkpoints / name).mkdir(parents=True)
            files.fetch([f"{CHECKPOINTS}/{name}/{STATE_NAME}"], self.path)


def readable_folder(run: Path) -> RunFolder:
    """Return a run folder to read from: the one at a path, or a copy of what is at an address. Raises UserError if the
    address cannot be read."""
    address = address_of_run(run)
    return RunFolder(expanded(run)) if address is None else _FetchedFolder(RemoteFiles(address))


def runs_of(run: Path) -> list[Path]:
    """Return the runs that a path or address stands for: itself, or, where it holds none but has folders that do, those
    by name. Raises UserError if an address cannot be read, or holds neither."""
    address = address_of_run(run)
    if address is None:
        folder = expanded(run)
        return [run] if holds_run(folder) else runs_in(folder) or [run]
    if _holds_run_at(address):
        return [run]
    files = RemoteFiles(address)
    place, mark, options = address.partition("?")
    below = [f"{place.rstrip('/')}/{name}{mark}{options}" for name in files.folders()]
    found = [Path(address) for address in below if _holds_run_at(address)]
    if not found:
        raise UserError(f"{files.shown} holds no run, and no folders of runs; give the address that --run-dir had")
    return found


def _holds_run_at(address: str) -> bool:
    return not set(RUN_FILES).isdisjoint(RemoteFiles(address).files())


def send_report(run: Path, report: Path) -> None:
    """Put a report into the run that lies at an address. Raises UserError if that fails."""
    address = address_of_run(run)
    if address is not None:
        RemoteFiles(address).write(report.name, report.read_bytes())


class RemoteRunFolder(RunFolder):
    """The working copy of a run at an address. keep: how many checkpoints stay there. tell: hears of failures."""

    def __init__(self, path: Path, files: RemoteFiles, keep: int, tell: Callable[[str], None]) -> None:
        super().__init__(path, files.shown)
        self._files = files
        self._keep = keep
        self._tell = tell
        self._sent: dict[str, tuple[int, int]] = {}
        self._sending = threading.Lock()
        self._sending_checkpoint = threading.Lock()
        self._unsent: Path | None = None
        self._wanted = threading.Event()
        self._closed = False
        self._stopped = False
        self._told = ""
        self._thread = threading.Thread(target=self._run, name="dngd-run-files", daemon=True)
        self._thread.start()

    def fetch(self) -> None:
        """Bring the run's files and its newest checkpoint that is good. Raises UserError if that fails."""
        self._files.fetch([name for name in self._files.files() if name not in DRIVERS_OWN], self.path)
        self._sent = self._state()
        for name in reversed(self._files.checkpoints()):
            target = self.checkpoints / name
            if not self._files.fetch_checkpoint(name, target):
                continue
            try:
                read_verified(target)
                return
            except DamagedError:
                continue  # it stays here, where loading tells of it

    def changed(self) -> None:
        """Have the files sent soon, by a thread."""
        self._wanted.set()

    def send_checkpoint(self, path: Path) -> None:
        """Send a checkpoint. Raises UserError if that fails; it is then sent with the next files."""
        with self._sending_checkpoint:
            self._unsent = path
            self._send_unsent()

    def finish(self) -> None:
        """Send what is not sent yet, again and again for a minute. Raises UserError if that fails."""
        deadline = time.monotonic() + FINISH_SECONDS
        while True:
            try:
                self._send()
                return
            except UserError as error:
                if time.monotonic() >= deadline:
                    raise UserError(f"the run's last files were not sent: {error}; then go on with --resume") from error
            time.sleep(RETRY_SECONDS)

    def close(self) -> None:
        """End the thread, after what it is sending; what takes longer than SETTLE_SECONDS is not gone on with."""
        self._closed = True
        self._wanted.set()
        try:
            self._thread.join(SETTLE_SECONDS)
        finally:
            self._stopped = True  # the folder goes next, which must not look as if its files had been removed

    def _run(self) -> None:
        closed = False
        while not closed:
            self._wanted.wait()
            self._wanted.clear()
            closed = self._closed
            try:
                self._send()
                self._told = ""
            except FileNotFoundError:
                continue  # removed here meanwhile, which is told of with `changed` too
            except UserError as error:
                self.failed += 1
                if self._told != str(error):  # told once, however often it fails
                    self._told = str(error)
                    self._tell(f"{error}; training goes on, and the file is sent with the next ones")

    def _send(self) -> None:
        """Send a checkpoint that was not sent, each file that changed, and remove those that are gone here."""
        with self._sending_checkpoint:
            self._send_unsent()
        with self._sending:
            state = self._state()
            for name, is_now in state.items():
                if self._sent.get(name) != is_now and not self._stopped:
                    self._files.write(name, (self.path / name).read_bytes())
                    self._sent[name] = is_now
            for name in self._sent.keys() - state.keys():
                if not self._stopped and self.path.is_dir():
                    self._files.remove(name)
                    del self._sent[name]

    def _send_unsent(self) -> None:
        """Send the newest checkpoint if it was not sent."""
        if self._unsent is not None and not self._stopped:
            self._files.send_checkpoint(self._unsent, self._keep)
            self._unsent = None

    def _state(self) -> dict[str, tuple[int, int]]:
        """Return size and time of each file, but of checkpoints and of what is being written."""
        found = {}
        for path in self.path.rglob("*"):
            parts = path.relative_to(self.path).parts
            if parts[0] != CHECKPOINTS and not any(part.startswith(".") for part in parts) and path.is_file():
                status = path.stat()
                found["/".join(parts)] = (status.st_size, status.st_mtime_ns)
        return found


@contextmanager
def _working_folder(parent: Path) -> Iterator[Path]:
    """Give a folder of this process's own, without those that killed processes of this machine left."""
    host = os.uname().nodename
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for left_over in parent.glob(f"{host}-*-*"):
            pid = left_over.name.removeprefix(f"{host}-").partition("-")[0]
            if pid.isdigit() and not psutil.pid_exists(int(pid)):
                shutil.rmtree(left_over, ignore_errors=True)
        path = Path(tempfile.mkdtemp(prefix=f"{host}-{os.getpid()}-", dir=parent))
    except OSError as error:
        raise UserError(
            f"{parent} on {host} cannot be written ({error.strerror}); give a folder that can be with --cache-dir"
        ) from error
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
