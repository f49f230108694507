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


def document(title: str, parts: Sequence[str]) -> str:
    """Return an HTML document. parts: markup of the body; empty ones are left out."""
    body = "\n".join(part for part in parts if part)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)} – dngd report</title>\n<style>\n{style_sheet()}</style>\n</head>\n"
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
    if out.is_dir():
        raise UserError(f"{out} is a folder; give the name of a file, e.g. {out / 'report.html'}")
    if not out.absolute().parent.is_dir():
        raise UserError(f"{out} lies in no folder that exists; create {out.absolute().parent}, or give another path")


def write_file(out: Path, text: str) -> Path:
    """Write a file and return its path. Raises UserError if it cannot be written."""
    out = expanded(out)
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; give the name of a file, e.g. {out / 'report.html'}")
    temporary = out.with_name(f".{out.name}.{os.getpid()}.writing")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(text.encode())
        os.replace(temporary, out)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"report {out} cannot be written: {error.strerror}; give another --out") from None
    return out
