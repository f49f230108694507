"""Paths as people write them, at the edge where they come in; and which of them are folders of runs."""

from __future__ import annotations

import os
from pathlib import Path

from dngd.errors import UserError

MOST_NAMED = 5
"""Runs that a message lists."""


def expanded(path: str | Path) -> Path:
    """Return a path with the home folder in place of a leading ~ or ~user; shells leave it there in --out=~/x.

    Others stay as they are, s3:// and gs:// addresses too. Raises UserError if there is no such user or home folder.
    """
    try:
        return Path(path).expanduser() if str(path).startswith("~") else Path(path)
    except RuntimeError:
        user = Path(path).parts[0]
        raise UserError(
            f"{path} begins with {user}, whose home folder this machine does not know; write the whole path"
        ) from None


RUN_FILES = ("config.yaml", "metrics.jsonl", "result.json")
"""A folder with one of these holds a run, or what is left of one."""


def holds_run(folder: Path) -> bool:
    """Say whether a folder holds a run, finished or not."""
    return any(os.path.isfile(folder / name) for name in RUN_FILES)


def runs_in(folder: Path) -> list[Path]:
    """Return the sub-folders that hold runs, by name; none of a folder that is not there or may not be read.

    A result.json alone, which other programs write too, and dngd bench, makes no run here.
    """
    try:
        below = sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError:
        return []
    return [path for path in below if any(os.path.isfile(path / name) for name in RUN_FILES[:2])]


def runs_inside_text(folder: Path) -> str:
    """Return ", but has the runs a, b in it" of a folder that holds no run itself, MOST_NAMED of them at most by name;
    empty where there are none."""
    names = [path.name for path in runs_in(folder)]
    if not names:
        return ""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    what = "runs" if len(names) > 1 else "run"
    return f", but has the {what} {', '.join(names[:MOST_NAMED])}{more} in it"


def is_utf8(text: str | Path) -> bool:
    """Say whether a text is Unicode: file names need not be, of which Python keeps the other bytes as surrogates."""
    try:
        str(text).encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(text: str | Path) -> str:
    """Return a text with a question mark for each byte that is no Unicode, see `is_utf8`."""
    return str(text).encode(errors="replace").decode()
