"""Feature tables on their way into a store: block by block, converted, checked, never whole in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dngd.errors import UserError
from dngd.graph.arrow_files import ColumnWriter
from dngd.graph.canonical import FeatureType, as_array
from dngd.graph.manifest import FileEntry

Array = npt.NDArray[Any]

_PIECE_VALUES = 1 << 20
_NUM_SHOWN = 3
_BFLOAT16_EXPONENT = np.uint16(0x7F80)
_LARGEST = {"float32": 3.4e38, "float16": 65504.0, "bfloat16": 3.39e38}


@dataclass(frozen=True)
class RowBlocks:
    """A feature table that is read once, in the order of the nodes.

    blocks: consecutive rows, each (rows, width) of any numbers; together one row for each node.
    """

    width: int
    blocks: Iterable[Any]
    names: Sequence[str] = ()
    """of the columns, for messages; empty: they have none"""


def write_features(
    path: Path,
    table: RowBlocks,
    num_nodes: int,
    dtype: FeatureType,
    progress: Callable[[str, int, int], None] | None = None,
) -> FileEntry:
    """Write the table as a feature file of `dtype`; return its entry.

    progress: called with ("features", rows done, num_nodes).
    Raises UserError if a block is no table of numbers of that width, if there is not one row for each node, or if
    values are NaN, infinite or too large for dtype: with their count over the whole table and the first positions.
    """
    check = _FiniteCheck(dtype, table.names)
    num_rows = 0
    with ColumnWriter(path, "features", f"{dtype}[{table.width}]", num_nodes) as file:
        for block in _pieces(table):
            if num_rows + len(block) > num_nodes:
                raise UserError(
                    f"features have more than {num_nodes} rows but the graph has {num_nodes} nodes; give one row for "
                    "each node"
                )
            stored = _stored(block, dtype)
            check.add(block, stored)
            # A table that will be refused need not be written.
            if not check.num_bad:
                file.append(stored)
            num_rows += len(block)
            if progress is not None:
                progress("features", num_rows, num_nodes)
        if num_rows != num_nodes:
            raise UserError(
                f"features have {num_rows} rows but the graph has {num_nodes} nodes; give one row for each node"
            )
        check.finish()
        return file.finish()


def _pieces(table: RowBlocks) -> Iterator[Array]:
    """Yield the blocks in pieces of some megabytes, whatever their own sizes."""
    rows = max(1, _PIECE_VALUES // table.width)
    for number, given in enumerate(table.blocks):
        block = as_array(given, f"feature block {number}")
        if block.ndim != 2 or block.shape[1] != table.width or block.dtype.kind not in "iufb":
            raise UserError(
                f"feature block {number} has shape {block.shape} and dtype {block.dtype} but must be numbers "
                f"(rows, {table.width}); give every row all features"
            )
        for start in range(0, len(block), rows):
            yield block[start : start + rows]


def _stored(block: Array, dtype: FeatureType) -> Array:
    """Return the block as the file holds it, rounded to nearest; bfloat16 as its bits, uint16."""
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype != "bfloat16":
            return np.ascontiguousarray(block, dtype=dtype)
        single = torch.from_numpy(np.array(block, dtype=np.float32, order="C"))
    return single.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


class _FiniteCheck:
    """Counts the values that are not finite as stored, over all blocks."""

    def __init__(self, dtype: FeatureType, names: Sequence[str]) -> None:
        self._dtype = dtype
        self._names = names
        self._num_missing = 0
        self._num_rows = 0
        self.num_bad = 0
        self._num_overflows = 0
        self._shown: list[str] = []

    def add(self, block: Array, stored: Array) -> None:
        if self._dtype == "bfloat16":
            finite = (stored & _BFLOAT16_EXPONENT) != _BFLOAT16_EXPONENT
        else:
            finite = np.isfinite(stored)
        if not finite.all():
            bad = np.argwhere(~finite)
            self.num_bad += len(bad)
            self._num_overflows += int(np.isfinite(block[~finite]).sum())
            room = _NUM_SHOWN - len(self._shown)
            self._num_missing += int(np.isnan(block[~finite]).sum())
            self._shown += [
                f"node {self._num_rows + r} column {repr(self._names[c]) if self._names else c}" for r, c in bad[:room]
            ]
        self._num_rows += len(block)

    def finish(self) -> None:
        """Raise UserError if there were any."""
        if not self.num_bad:
            return
        fix = "replace them by finite numbers"
        if self._num_missing == self.num_bad and self._names:
            fix += " (missing ones by the column's mean, say)"
        if self._num_overflows:
            wider = "" if self._dtype == "float32" else ", or store them as float32"
            fix = (
                f"{self._num_overflows} of them are finite but beyond the largest {self._dtype}, "
                f"{_LARGEST[self._dtype]:g}: scale or replace them{wider}"
            )
        raise UserError(
            f"features have {self.num_bad} NaN or infinite values as {self._dtype}, the first at "
            f"{', '.join(self._shown)}; {fix}"
        )
