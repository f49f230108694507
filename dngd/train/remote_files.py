"""The files of a run at an `s3://` or `gs://` address: read, written and removed whole, one at a time.

A checkpoint there is a folder whose `state.json`, with the sha256 of its other files, is sent last and removed first:
without it there is no checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from dngd.errors import UserError
from dngd.graph.filesystems import Location, explained, locate, shown_address
from dngd.train.checkpoint import PREFIX, STATE_NAME, write_flushed

CHECKPOINTS = "checkpoints"
_STEP_FOLDER = re.compile(rf"{PREFIX}[0-9]{{1,18}}")


class RemoteFiles:
    """The folder at an address. Methods raise UserError if the store cannot be reached, or refuses.

    shown: the address as messages print it. name: its last part.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self.shown = shown_address(address).rstrip("/")
        self.name = self.shown.rpartition("/")[2]

    @cached_property
    def _root(self) -> Location:
        return locate(self._address)  # may ask the store for its region

    def read(self, name: str) -> bytes | None:
        """Return a file's content; None if there is none."""
        location = self._at(name)
        try:
            with (
                explained(location.shown, missing_ok=True),
                location.filesystem.open_input_stream(location.path) as file,
            ):
                return bytes(file.read())
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        """Write a file, whole or not at all."""
        location = self._at(name)
        with (
            explained(location.shown, doing="written"),
            location.filesystem.open_output_stream(location.path) as file,
        ):
            file.write(data)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        location = self._at(name)
        with suppress(FileNotFoundError), explained(location.shown, missing_ok=True, doing="written"):
            location.filesystem.delete_file(location.path)

    def names(self, folder: str = "") -> list[str]:
        """Return the names of what lies in a folder, files and folders, in order; none if there is no such folder."""
        return sorted(entry.base_name for entry in self._entries(folder))

    def files(self) -> list[str]:
        """Return the names of the files that lie here, not of those in folders."""
        return sorted(entry.base_name for entry in self._entries("") if entry.is_file)

    def folders(self) -> list[str]:
        """Return the names of the folders that lie here."""
        return sorted(entry.base_name for entry in self._entries("") if not entry.is_file)

    def check_writable(self) -> None:
        """Raise UserError unless a file can be written here."""
        self.write(".probe", b"dngd")
        self.remove(".probe")

    def fetch(self, names: Sequence[str], folder: Path) -> None:
        """Copy the files that are there into a folder of this machine."""
        for name in names:
            data = self.read(name)
            if data is not None:
                write_flushed(folder / name, data)

    def checkpoints(self) -> list[str]:
        """Return the names of the checkpoints' folders, oldest first, whether or not they are whole."""
        return [name for name in self.names(CHECKPOINTS) if _STEP_FOLDER.fullmatch(name)]

    def fetch_checkpoint(self, name: str, folder: Path) -> bool:
        """Copy a checkpoint to a folder of this machine; return False if it was never whole."""
        source = f"{CHECKPOINTS}/{name}"
        state = self.read(f"{source}/{STATE_NAME}")
        if state is None:
            return False
        folder.mkdir(parents=True)
        self.fetch([f"{source}/{file}" for file in self.names(source)], folder.parents[1])
        return True

    def send_checkpoint(self, folder: Path, keep: int) -> None:
        """Write a checkpoint, then remove those after it, those beyond the newest `keep`, and what is not whole."""
        target = f"{CHECKPOINTS}/{folder.name}"
        files = sorted(folder.iterdir(), key=lambda path: path.name == STATE_NAME)
        self.remove(f"{target}/{STATE_NAME}")
        for path in files:
            self.write(f"{target}/{path.name}", path.read_bytes())
        with suppress(UserError):  # what stays too long does no harm, and goes with the next one
            self._remove_others(folder.name, keep)

    def _remove_others(self, newest: str, keep: int) -> None:
        names = self.checkpoints()
        whole = [n for n in names if n < newest and STATE_NAME in self.names(f"{CHECKPOINTS}/{n}")]
        kept = {newest, *(whole[1 - keep :] if keep > 1 else [])}
        for name in names:
            if name not in kept:
                self._remove_checkpoint(name)

    def _remove_checkpoint(self, name: str) -> None:
        self.remove(f"{CHECKPOINTS}/{name}/{STATE_NAME}")
        for file in self.names(f"{CHECKPOINTS}/{name}"):
            self.remove(f"{CHECKPOINTS}/{name}/{file}")
        location = self._at(f"{CHECKPOINTS}/{name}")
        # The empty object that stands for the folder, which may not be there.
        with suppress(FileNotFoundError, UserError), explained(location.shown, missing_ok=True, doing="written"):
            location.filesystem.delete_dir(location.path)

    def _entries(self, folder: str) -> list[Any]:
        from pyarrow.fs import FileSelector

        location = self._at(folder) if folder else self._root
        with explained(location.shown):
            entries = location.filesystem.get_file_info(FileSelector(location.path, allow_not_found=True))
        # What begins with a dot is no file of a run, and might lead out of the folder that it is copied to.
        return [entry for entry in entries if not entry.base_name.startswith(".")]

    def _at(self, name: str) -> Location:
        return self._root.child(f"{self._root.path}/{name}")
