"""The users' own names of the nodes: distinct whole numbers or strings, checked before they are stored."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from dngd.errors import UserError
from dngd.graph.canonical import as_array

_MAX_STRING_BYTES = 2**31 - 1


def canonical_node_ids(values: Any, num_nodes: int) -> Any:
    """Return values as int64 [num_nodes] (numpy) or an Arrow string array [num_nodes]; None stays None.

    values: whole numbers or strings as numpy, torch, a list, or an Arrow array, one for each node, all distinct.
    Raises UserError otherwise, naming the first that is wrong.
    """
    if values is None:
        return None
    names = _as_names(values)
    if len(names) != num_nodes:
        raise UserError(f"node_ids has {len(names)} entries but the graph has {num_nodes} nodes; give one a node")
    repeated = first_repeated(names)
    if repeated is not None:
        first, again = repeated
        name = names[again].as_py() if isinstance(names, pa.Array) else int(names[again])
        raise UserError(
            f"node_ids has {name!r} for node {first} and again for node {again}; give each node an id of its own"
        )
    return names


def first_repeated(names: Any) -> tuple[int, int] | None:
    """Return (where it was, where it is again) of the first repeated name; None if all differ."""
    if isinstance(names, pa.Array):
        if pc.count_distinct(names).as_py() == len(names):
            return None
        codes = names.dictionary_encode().indices.to_numpy(zero_copy_only=False)
    else:
        ordered = np.sort(names)
        if not (ordered[1:] == ordered[:-1]).any():
            return None
        codes = np.unique(names, return_inverse=True)[1]
    _, first = np.unique(codes, return_index=True)
    again = np.ones(len(codes), dtype=np.bool_)
    again[first] = False
    at = int(np.flatnonzero(again)[0])
    return int(np.flatnonzero(codes == codes[at])[0]), at


def _as_names(values: Any) -> Any:
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks() if values.num_chunks != 1 else values.chunk(0)
    if not isinstance(values, pa.Array):
        if not isinstance(values, list | tuple):
            array = as_array(values, "node_ids")
            if array.ndim != 1:
                raise UserError(f"node_ids has shape {array.shape}; give one id a node")
            if array.dtype.kind in "iu":
                return _whole_numbers(array)
            values = array.tolist()
        try:
            # Not by way of numpy, which makes strings of numbers beside strings.
            values = pa.array(values)
        except (pa.ArrowException, TypeError, OverflowError) as error:
            raise UserError(f"node_ids mixes kinds of values ({error}); give whole numbers, or strings") from error
    if values.null_count:
        at = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0])
        raise UserError(f"node_ids has no id for node {at} ({values.null_count} such nodes); give each node one")
    if pa.types.is_integer(values.type):
        return _whole_numbers(values.to_numpy())
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        raise UserError(f"node_ids has type {values.type}; ids must be whole numbers or strings: cast them first")
    size = pc.sum(pc.binary_length(values)).as_py() or 0
    return _from_start(values.cast(pa.string() if size <= _MAX_STRING_BYTES else pa.large_string()))


def _from_start(strings: Any) -> Any:
    """Return strings whose buffers hold these strings alone, and no validity: equal ids give equal bytes."""
    return pa.concat_arrays([strings, strings.slice(0, 0)]) if strings.offset or strings.buffers()[0] else strings


def _whole_numbers(array: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    if array.dtype.kind == "u" and array.size and int(array.max()) > np.iinfo(np.int64).max:
        raise UserError(f"node_ids has {int(array.max())}, beyond 64-bit signed numbers; give it as a string")
    return np.ascontiguousarray(array, dtype=np.int64)
