"""Graphs in files of dgl.save_graphs, whose loading needs dgl and so is here.

The files are DGL's own binary format, read by its core library: no pickles.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from dngd.errors import UserError
from dngd.graph.arrow_files import file_sha256
from dngd.graph.dgl_graph import import_dgl
from dngd.graph.import_options import ImportOptions
from dngd.graph.store import GraphStore
from dngd.paths import expanded
from dngd.sampling.dgl_import import import_dgl as dgl_module

_MAGIC = (0xDD2E4FF046B4A13F).to_bytes(8, "little")


def import_dgl_file(path: str | Path, out: str | Path, options: ImportOptions) -> GraphStore:
    """Convert the one graph of a file of dgl.save_graphs into a store at `out`. Raises UserError."""
    source = expanded(path)
    if not source.is_file():
        raise UserError(f"{source} is not a file; give one that dgl.save_graphs wrote")
    with source.open("rb") as file:
        magic = file.read(len(_MAGIC))
    if magic != _MAGIC:
        raise UserError(f"{source} is no file of dgl.save_graphs (it begins otherwise); save the graph again")
    dgl = dgl_module()
    try:
        graphs: list[Any] = dgl.load_graphs(str(source))[0]
    except Exception as error:
        # DGL's first line says what failed, after a time and its own file; a C++ stack follows.
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        reason = re.sub(r"^\[[\d:]+\] \S+: (?=.)", "", first).strip(" :")
        raise UserError(f"{source} cannot be read by DGL ({reason}); it is damaged: save the graph again") from error
    if len(graphs) != 1:
        raise UserError(f"{source} holds {len(graphs)} graphs; save the one to import in a file of its own")
    settings = ImportOptions(**{**options, "name": options.get("name") or source.stem})
    return import_dgl(graphs[0], out, source=source.name, source_sha256=file_sha256(source), **settings)
