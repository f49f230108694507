"""A page as a document: one file with its style inside, no script, nothing fetched; written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from dngd.errors import UserError
from dngd.paths import expanded
from dngd.report.style import style_sheet
from dngd.report.text import escape

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""The browser itself refuses to load or run anything, should a value ever slip through unescaped."""

_HEAD = (
    '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>'
)
_TITLE_END = " – dngd report</title>"
"""With _HEAD and a title before it, how each page begins: what `check_page` knows one by."""

_LOOK_BYTES = 4096


def document(title: str, parts: Sequence[str]) -> str:
    """Return an HTML document. parts: markup of the body; empty ones are left out."""
    body = "\n".join(part for part in parts if part)
    return (
        f"{_HEAD}{escape(title)}{_TITLE_END}\n<style>\n{style_sheet()}</style>\n</head>\n"
        f"<body>\n<main>\n{body}</main>\n</body>\n</html>\n"
    )


def section(title: str, content: str) -> str:
    """Return a section with its heading. content: markup."""
    return f"<section><h2>{escape(title)}</h2>\n{content}</section>"


def card(content: str) -> str:
    """Return markup on a card."""
    return f'<div class="card">{content}</div>'


def card_list(cards: Sequence[tuple[str, str, str]]) -> str:
    """Return headline numbers as (name, value, remark) cards."""
    items = "".join(
        f'<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd><dd class="by">{escape(by)}</dd></div>'
        for name, value, by in cards
    )
    return f'<dl class="cards">{items}</dl>' if cards else ""


def check_file(out: Path) -> None:
    """Raise UserError if a file cannot come to be at this path, before hours of work for it."""
    out = expanded(out)
    _check_kind(out, "")
    if not out.absolute().parent.is_dir():
        raise UserError(f"{out} lies in no folder that exists; create {out.absolute().parent}, or give another path")


def check_page(out: Path, option: str = "--out") -> None:
    """Raise UserError if a page would replace something else than a page of ours or an empty file.

    option: the flag that the path was given with.
    """
    out = expanded(out)
    _check_kind(out, f"{option} ")
    if not out.exists():
        return
    try:
        with open(out, "rb") as file:
            begins = file.read(_LOOK_BYTES)
    except OSError as error:
        raise UserError(f"{option} {out} cannot be read: {error.strerror}; give another path") from None
    if begins and not _is_page(begins):
        raise UserError(f"{option} {out} exists and is no dngd report; give another path")


def _is_page(begins: bytes) -> bool:
    """Whether a file that begins so is a page of ours; a title has no tag in it."""
    title, end, _ = begins.removeprefix(_HEAD.encode()).partition(b"</title>")
    return begins.startswith(_HEAD.encode()) and (title + end).endswith(_TITLE_END.encode())


def _check_kind(out: Path, named: str) -> None:
    """Raise UserError for what is there and no file: a folder, a pipe, a terminal. named: stands before the path."""
    if out.is_dir():
        raise UserError(f"{named}{out} is a folder; give the name of a file, e.g. {out / 'report.html'}")
    if out.exists() and not out.is_file():
        raise UserError(f"{named}{out} is a pipe or a device; give the name of a file")


def write_file(out: Path, text: str) -> Path:
    """Write a file and return its path. Raises UserError if it cannot be written.

    A link stays, and what it points to is written: /dev/stdout is one.
    """
    out = expanded(out)
    _check_kind(out, "--out ")
    final = Path(os.path.realpath(out))
    temporary = final.with_name(f".{final.name}.{os.getpid()}.writing")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(text.encode())
        os.replace(temporary, final)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"report {out} cannot be written: {error.strerror}; give another --out") from None
    return out
