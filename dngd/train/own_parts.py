"""Which loss and metric of a program's own a run has, kept in its folder: config.yaml does not say, as it does of model
and optimizer (custom). Without the note a run would go on with the built-in ones."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from dngd.config import TrainConfig
from dngd.errors import UserError
from dngd.paths import expanded
from dngd.train.remote_files import RemoteFiles

OWN_PARTS_NAME = "own-parts.json"
NOTED = ("loss", "metric")


def note_of(own_parts: Mapping[str, str]) -> bytes | None:
    """Return the file's content for a program's own parts, by kind with their names; None if it needs none."""
    noted = {kind: own_parts[kind] for kind in NOTED if kind in own_parts}
    return json.dumps(noted).encode() if noted else None


def check_own_parts(config: TrainConfig, given: Iterable[str]) -> None:
    """Raise UserError if the run that is gone on with had a loss or metric of a program's own that is not given now.

    given: the kinds that are. Of runs of an earlier dngd it is not known what they had.
    """
    if not config.resume:
        return
    assert config.run_dir is not None
    if config.run_address is not None:
        files = RemoteFiles(config.run_address)
        content, shown = files.read(OWN_PARTS_NAME), files.shown
    else:
        file = expanded(config.run_dir) / OWN_PARTS_NAME
        content, shown = file.read_bytes() if file.is_file() else None, str(config.run_dir)
    had = {} if content is None else _parts_in(content, f"{shown}/{OWN_PARTS_NAME}")
    lacking = [f"{kind} ({name})" for kind, name in had.items() if kind not in given]
    if lacking:
        arguments = ", ".join(f"{kind}=..." for kind in had)
        raise UserError(
            f"the run in {shown} was trained with a program's own {listed(lacking)}, which its folder does not hold; "
            f"go on from Python: dngd.Trainer(config, {arguments}).resume()"
        )


def replaced_warning(file: Path, shown: str, given: Iterable[str], metric: str) -> str | None:
    """Return the warning for scores of a run whose own loss or metric the built-in one stands for; None if none does.

    file: the run's note, which need not be there. shown: the run. given: the kinds that the program gives now. metric:
    the name of the one that is computed. Raises UserError for a note that cannot be read.
    """
    if not file.is_file():
        return None
    had = _parts_in(file.read_bytes(), f"{shown}/{OWN_PARTS_NAME}")
    replaced = [f"{kind} ({name})" for kind, name in had.items() if kind not in given]
    if not replaced:
        return None
    stands_in = listed([metric if kind == "metric" else f"the built-in {kind}" for kind in had if kind not in given])
    return (
        f"{shown} was trained with a program's own {listed(replaced)}, which its folder does not hold: {stands_in} "
        f"{'stand' if len(replaced) > 1 else 'stands'} here for it; dngd.Trainer(config, "
        f"{', '.join(f'{kind}=...' for kind in had)}).evaluate() has the run's own"
    )


def listed(words: Sequence[str]) -> str:
    """Return words as a list in a sentence: a, b and c."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _parts_in(content: bytes, shown: str) -> dict[str, str]:
    try:
        return {kind: str(name) for kind, name in dict(json.loads(content)).items()}
    except (ValueError, TypeError, RecursionError):
        raise UserError(f"{shown} is not as a run writes it; put back a copy of the run's own") from None
