"""Finished trainings of a benchmark that takes hours, one JSON line a heat: what a killed one goes on from."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dngd.bench.runs import RunRecord
from dngd.errors import UserError

FILE_NAME = "trainings.jsonl"


def key_of(description: Mapping[str, Any]) -> str:
    """Return the digest of everything that a heat's outcome depends on. description: plain data."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


class TrainingFile:
    """Records by key, in FOLDER/trainings.jsonl; without a folder, in memory alone.

    A line is on the disk before the next heat starts. A line cut short by a kill is dropped, and what stood in it is
    trained again. Several processes may add to one file; each finds what was there when it started. Raises UserError
    if the file cannot be read or written, or holds something else.
    """

    def __init__(self, folder: Path | None) -> None:
        self._path = None if folder is None else folder / FILE_NAME
        self._records: dict[str, list[RunRecord]] = {}
        self.found = 0
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "a+b") as kept:
                fcntl.flock(kept, fcntl.LOCK_EX)
                kept.seek(0)
                content = kept.read()
                whole = content[: content.rfind(b"\n") + 1]
                if len(whole) < len(content):
                    kept.truncate(len(whole))
        except OSError as error:
            raise UserError(f"{self._path} cannot be read or written: {error.strerror}; give another --out") from None
        for number, line in enumerate(whole.decode(errors="replace").splitlines(), 1):
            self._read(number, line)

    def get(self, key: str) -> list[RunRecord] | None:
        """Return a heat's records, or None if it was not run."""
        records = self._records.get(key)
        self.found += 0 if records is None else len(records)
        return records

    def add(self, key: str, description: Mapping[str, Any], records: Sequence[RunRecord]) -> None:
        """Keep a heat's records. description: for people who read the file."""
        self._records[key] = list(records)
        if self._path is None:
            return
        runs = [{"label": record.label, "data": record.data} for record in records]
        try:
            with open(self._path, "a") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.write(json.dumps({"key": key, **description, "runs": runs}) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(
                f"{self._path} cannot be written: {error.strerror}; free space or fix permissions, then go on with the "
                "same command"
            ) from None

    def _read(self, number: int, line: str) -> None:
        try:
            read = json.loads(line)
            self._records[read["key"]] = [RunRecord(run["label"], run["data"]) for run in read["runs"]]
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"line {number} of {self._path} is not a finished training; mend or remove the file, or give another "
                "--out"
            ) from None
