"""Finished trainings of `dngd bench paper`, kept in a file so that a run that was cut off goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dngd.bench.paper_recipes import Recipe
from dngd.bench.paper_training import Outcome
from dngd.errors import UserError

_FILE = "trainings.jsonl"
_VERSION = 2
"""To be raised where the same recipe and seed train differently than before."""


def training_key(graph_digest: str, split: str, recipe: Recipe, seed: int) -> str:
    """Return what stands for a training: it changes with all that its outcome depends on (4 and 4.0 are one rate)."""
    fields = {name: float(value) if isinstance(value, int) else value for name, value in recipe.to_json().items()}
    text = json.dumps([_VERSION, graph_digest, split, fields, seed], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class Finished:
    """`outcomes` by training_key, one JSON line each in FOLDER/trainings.jsonl; folder None: in memory alone.

    Raises UserError for a folder that cannot be made or a file that cannot be read.
    """

    def __init__(self, folder: Path | None) -> None:
        self._path = None if folder is None else folder / _FILE
        self.outcomes: dict[str, Outcome] = {}
        if folder is None or self._path is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lines = self._path.read_text().splitlines() if self._path.exists() else []
        except OSError as error:
            raise UserError(f"--out {folder} cannot be used as a folder: {error.strerror}; give another") from None
        for line in lines:
            try:
                data: Mapping[str, Any] = json.loads(line)
                self.outcomes[data["key"]] = Outcome(**data["outcome"])
            except (ValueError, TypeError, KeyError):
                continue  # the line that a killed run left half written: that training is done again

    def put(self, key: str, outcome: Outcome) -> None:
        """Keep an outcome. Raises UserError if the file cannot be written."""
        self.outcomes[key] = outcome
        if self._path is None:
            return
        try:
            with self._path.open("a") as file:
                # Before it, a new line: after half a line it would be lost too.
                file.write("\n" + json.dumps({"key": key, "outcome": asdict(outcome)}) + "\n")
        except OSError as error:
            raise UserError(
                f"{self._path} cannot be written: {error.strerror}; free space or give another --out"
            ) from None
