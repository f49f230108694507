"""From the ids that users give their nodes to the numbers 0 to N - 1.

Ids are whole numbers (any int64) or strings. Looking up a batch of ids makes no Python object an id for whole
numbers; strings are found by a 64-bit hash and then compared, so that equal hashes cannot mix them up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from dngd.errors import UserError

Int64Array = npt.NDArray[np.int64]
IdKind = Literal["int", "string"]

_NUM_SHOWN = 3
_TABLE_SLACK = 1 << 20
_HASH_ROWS = 1 << 16
_MERGE_ROWS = 1 << 22


class IntegerIds:
    """Distinct int64 ids; the number of an id is its place in the given order."""

    kind: IdKind = "int"

    def __init__(self, values: Int64Array, what: str) -> None:
        """values: [num_nodes], in the order of the nodes. what: where they come from, for messages.

        Raises UserError if an id is given twice.
        """
        self.values = values
        num_nodes = len(values)
        self._order: Int64Array | None = None
        self._sorted = values
        self._table: npt.NDArray[Any] | None = None
        if not _ascends(values):
            self._order = np.argsort(values, kind="stable")
            self._sorted = values[self._order]
            _refuse_repeated(self._sorted[1:] == self._sorted[:-1], self._order, lambda node: str(values[node]), what)
        self._first = int(self._sorted[0]) if num_nodes else 0
        span = int(self._sorted[-1]) - self._first + 1 if num_nodes else 0
        self.identity = self._order is None and self._first == 0 and span == num_nodes
        if not self.identity and span <= 4 * num_nodes + _TABLE_SLACK:
            self._table = np.full(span, -1, dtype=np.int32 if num_nodes < 2**31 else np.int64)
            self._table[values - self._first] = np.arange(num_nodes)
            # The table answers alone from here on.
            self._order, self._sorted = None, values[:0]

    def __len__(self) -> int:
        return len(self.values)

    def kept(self) -> Int64Array | None:
        """Return what a store keeps: the ids, or None when they are 0 to N - 1 in this order already."""
        return None if self.identity else self.values

    def find(self, ids: Int64Array) -> Int64Array:
        """Return the number of each id, -1 for those that are no node's."""
        if len(self.values) == 0:
            return np.full(len(ids), -1, dtype=np.int64)
        if self.identity:
            return np.where((ids >= 0) & (ids < len(self.values)), ids, -1)
        if self._table is None:
            return _search(self._sorted, self._order, ids)
        # In uint64, so that no distance between two int64 overflows.
        place = ids.astype(np.uint64) - np.uint64(self._first & (2**64 - 1))
        inside = place < np.uint64(len(self._table))
        found = np.full(len(ids), -1, dtype=np.int64)
        found[inside] = self._table[place[inside]]
        return found


class StringIds:
    """Distinct strings; the number of a string is its place in the given order."""

    kind: IdKind = "string"

    def __init__(self, values: Any, what: str) -> None:
        """values: pyarrow string array without nulls, in the order of the nodes. what: for messages.

        Raises UserError if an id is given twice.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        self.values = values.cast(pa.large_string())
        self._salt = 0
        while True:
            hashes = _hashes(self.values, self._salt)
            self._order = np.argsort(hashes, kind="stable")
            self._sorted = hashes[self._order]
            same = np.flatnonzero(self._sorted[1:] == self._sorted[:-1])
            if not len(same):
                return
            one, other = self.values.take(self._order[same]), self.values.take(self._order[same + 1])
            repeated = np.zeros(len(hashes) - 1, dtype=np.bool_)
            repeated[same] = pc.equal(one, other).to_numpy(zero_copy_only=False)
            _refuse_repeated(repeated, self._order, lambda node: repr(self.values[node].as_py()), what)
            # Different strings with one hash: take another hash function.
            self._salt += 1

    def __len__(self) -> int:
        return len(self.values)

    def kept(self) -> Any:
        """Return what a store keeps: the ids."""
        return self.values

    def find(self, ids: Any) -> Int64Array:
        """Return the number of each id of a pyarrow string array without nulls, -1 for those that are no node's."""
        import pyarrow as pa
        import pyarrow.compute as pc

        if len(self.values) == 0 or len(ids) == 0:
            return np.full(len(ids), -1, dtype=np.int64)
        # An edge file names its nodes many times: hash and compare each of a batch's strings once.
        encoded = ids.cast(pa.large_string()).dictionary_encode()
        node = _search(self._sorted, self._order, _hashes(encoded.dictionary, self._salt))
        candidates = self.values.take(np.maximum(node, 0))
        node[~pc.equal(candidates, encoded.dictionary).to_numpy(zero_copy_only=False)] = -1
        found: Int64Array = node[encoded.indices.to_numpy()]
        return found


NodeIds = IntegerIds | StringIds


def distinct_integers(batches: Iterable[Int64Array]) -> Int64Array:
    """Return the distinct values of all batches, ascending; holds them and a few batches at a time."""
    known = np.empty(0, dtype=np.int64)
    waiting: list[Int64Array] = []
    rows = 0
    for batch in batches:
        waiting.append(np.unique(batch))
        rows += len(waiting[-1])
        # Merging only when there is as much as is known keeps the cost of merging in proportion to the batches.
        if rows >= max(len(known), _MERGE_ROWS):
            known, waiting, rows = np.unique(np.concatenate([known, *waiting])), [], 0
    return np.unique(np.concatenate([known, *waiting]))


def distinct_strings(batches: Iterable[Any]) -> Any:
    """Return the distinct strings of all pyarrow string batches as one array, ascending by their bytes."""
    import pyarrow as pa
    import pyarrow.compute as pc

    known = pa.array([], type=pa.large_string())
    waiting: list[Any] = []
    rows = 0
    for batch in batches:
        waiting.append(pc.unique(batch.cast(pa.large_string())))
        rows += len(waiting[-1])
        if rows >= max(len(known), _MERGE_ROWS):
            known, waiting, rows = pc.unique(pa.concat_arrays([known, *waiting])), [], 0
    known = pc.unique(pa.concat_arrays([known, *waiting]))
    return known.take(pc.array_sort_indices(known))


def _ascends(values: Int64Array) -> bool:
    return bool((values[1:] > values[:-1]).all())


def _search(ascending: npt.NDArray[Any], order: Int64Array | None, wanted: npt.NDArray[Any]) -> Int64Array:
    """Return order[k] where ascending[k] is the wanted value, -1 where none is; ascending is not empty."""
    # Searching in ascending order walks through memory once: 4 times faster on millions of ids, sorting included.
    by_value = np.argsort(wanted)
    wanted = wanted[by_value]
    place = np.searchsorted(ascending, wanted)
    np.minimum(place, len(ascending) - 1, out=place)
    found = place if order is None else order[place]
    result = np.empty(len(wanted), dtype=np.int64)
    result[by_value] = np.where(ascending[place] == wanted, found, -1)
    return result


def _refuse_repeated(repeated: npt.NDArray[np.bool_], order: Int64Array, text: Callable[[int], str], what: str) -> None:
    """repeated[k]: the k-th and the next of the sorted ids are equal; order: the row of each sorted id."""
    places = np.flatnonzero(repeated)
    if not len(places):
        return
    again = np.sort(order[places + 1])[:_NUM_SHOWN]
    shown = ", ".join(f"{text(int(node))} (row {node})" for node in again)
    raise UserError(
        f"{what} repeats node ids in {len(places)} rows, the first again at {shown}; each node needs one row with "
        "an id of its own: drop the repeated rows"
    )


def _hashes(strings: Any, salt: int) -> npt.NDArray[np.uint64]:
    """Return a 64-bit hash of each string; in blocks, since pandas hashes Python strings."""
    from pandas.util import hash_array

    key = f"dngd-node-id{salt % 10_000:04d}"
    result = np.empty(len(strings), dtype=np.uint64)
    for start in range(0, len(strings), _HASH_ROWS):
        block = strings.slice(start, _HASH_ROWS).to_numpy(zero_copy_only=False)
        result[start : start + len(block)] = hash_array(block, hash_key=key, categorize=False)
    return result
