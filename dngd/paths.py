"""Paths as people write them, at the edge where they come in."""

from __future__ import annotations

from pathlib import Path

from dngd.errors import UserError


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
