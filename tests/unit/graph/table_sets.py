"""Node and edge tables on disk in each format, for the tests of importing them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

FORMATS = ("parquet", "csv", "arrow")


def write_table(path: Path, table: pa.Table) -> Path:
    """Write a table in the format that the path's suffix names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    elif path.suffix == ".csv":
        pyarrow.csv.write_csv(table, path)
    else:
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
    return path


def write_parts(folder: Path, kind: str, table: pa.Table, file_format: str, cuts: list[int]) -> None:
    """Write a table as files part-0, part-1, ..., cut at the given rows; equal cuts make empty files."""
    ends = [0, *sorted(min(cut, table.num_rows) for cut in cuts), table.num_rows]
    for k, (start, end) in enumerate(zip(ends[:-1], ends[1:])):
        write_table(folder / kind / f"part-{k}.{file_format}", table.slice(start, end - start))


def node_table(ids: Any, **columns: Any) -> pa.Table:
    """Return a node table; a 2-D array becomes a column of lists."""
    arrays = {"id": pa.array(ids)}
    for name, values in columns.items():
        if isinstance(values, np.ndarray) and values.ndim == 2:
            flat = pa.array(values.reshape(-1))
            arrays[name] = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
        else:
            arrays[name] = values if isinstance(values, pa.Array) else pa.array(values)
    return pa.table(arrays)


def edge_table(source: Any, target: Any, **columns: Any) -> pa.Table:
    """Return an edge table with columns src and dst."""
    return pa.table({"src": source, "dst": target, **columns})


def small_set(
    folder: Path, nodes: pa.Table | None = None, edges: pa.Table | None = None, suffix: str = "parquet"
) -> Path:
    """Write nodes.* and edges.* of a sound graph of four nodes, either table replaced by one that is given."""
    if nodes is None:
        nodes = node_table([10, 20, 30, 40], label=[0, 1, 0, 1], x=[0.0, 1.0, 2.0, 3.0], y=[1.0, 1.0, 1.0, 2.0])
    if edges is None:
        edges = edge_table([10, 20, 30], [20, 30, 40])
    write_table(folder / f"nodes.{suffix}", nodes)
    write_table(folder / f"edges.{suffix}", edges)
    return folder
