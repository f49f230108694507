"""Which importer a source is for, told by its name and what lies in it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from dngd.errors import UserError
from dngd.graph.catalog import is_planetoid
from dngd.graph.filesystems import address_of, is_remote, shown_address
from dngd.graph.manifest import MANIFEST_NAME
from dngd.graph.ogb import is_ogb_folder
from dngd.graph.table_files import format_of
from dngd.paths import expanded

ImportFormat = Literal["npz", "planetoid", "ogb", "pyg", "dgl", "tables"]
"""tables: Parquet, CSV or Arrow files, each told by its own name"""

TABLE_FORMATS = ("parquet", "csv", "arrow")
FORMATS = ("npz", "planetoid", "ogb", "pyg", "dgl", *TABLE_FORMATS)

_SUFFIXES: dict[str, ImportFormat] = {".npz": "npz", ".pt": "pyg", ".pth": "pyg", ".bin": "dgl"}


def guess_format(source: str | Path) -> ImportFormat:
    """Return the importer for a file, a folder, a pattern, an address, or the name of an OGB data set.

    Raises UserError if nothing is there, or it tells no format.
    """
    text = address_of(source)
    if is_remote(text):
        check_local(text, _SUFFIXES.get(Path(shown_address(text)).suffix, "tables"))
        return "tables"
    path = expanded(text)
    if path.is_file():
        known = _SUFFIXES.get(path.suffix)
        if known is None and format_of(path.name) is None:
            raise UserError(f"{path} does not tell its format by its name; give --format, one of {', '.join(FORMATS)}")
        return known or "tables"
    if path.is_dir():
        if (path / MANIFEST_NAME).is_file():
            raise UserError(
                f"{path} holds a {MANIFEST_NAME}, so it is a store already; train on it, or import its source"
            )
        if is_planetoid(path):
            return "planetoid"
        return "ogb" if is_ogb_folder(path) else "tables"
    if text.startswith("ogbn-"):
        return "ogb"
    if any(mark in text for mark in "*?["):
        return "tables"
    raise UserError(
        f"{text} does not exist; give a file, a folder, an s3:// or gs:// address, or the name of an OGB data set such "
        "as ogbn-products"
    )


def check_local(source: str | Path, source_format: str) -> None:
    """Raise UserError if a source is an address but its format is read from local files only."""
    if is_remote(source) and source_format not in ("tables", *TABLE_FORMATS):
        raise UserError(
            f"{shown_address(address_of(source))} cannot be read as {source_format} where it lies; copy it to this "
            "machine first (node and edge tables are read from there)"
        )
