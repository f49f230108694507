"""From a table's record batches to a graph's arrays: ids, labels, splits, features, weights."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from dngd.errors import UserError
from dngd.graph.canonical import MAX_CLASSES, as_array
from dngd.graph.id_map import IdKind
from dngd.graph.manifest import MASK_NAMES
from dngd.graph.table_columns import NodeColumns, kind_of
from dngd.graph.table_readers import TableFile

Array = npt.NDArray[Any]

SPLIT_VALUES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}

_WHOLE = re.compile(r"[+-]?[0-9]+")
_ZERO_IN_FRONT = re.compile(r"[+-]?0[0-9]")
_INT64 = range(-(2**63), 2**63)
_BOOLEAN_NAMES = ("false", "true")
_CSV_BOOLEANS = dict.fromkeys(("1", "true", "True", "TRUE"), 1.0) | dict.fromkeys(("0", "false", "False", "FALSE"), 0.0)


@cache
def csv_nothing() -> frozenset[str]:
    """Return the words that stand for a missing number in CSV files (R and pandas write some of them)."""
    from pyarrow import csv

    return frozenset(csv.ConvertOptions().null_values)


class LeadingZeros(UserError):
    """Ids have zeros in front, which they would lose as whole numbers."""


def id_values(column: Any, kind: IdKind, where: str, *, id_type: str | None = None) -> Any:
    """Return a batch's ids as numpy int64 or as an Arrow large_string array. where: for messages.

    id_type: what the user chose of auto, int and string; None: there is no such choice. Raises UserError if there are
    other ids; of auto and kind int LeadingZeros.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if kind == "int" and kind_of(column.type) == "string":
        text = column.cast(pa.large_string())
        try:
            column = text.cast(pa.int64())
        except pa.ArrowInvalid:
            # If that is not mended by this, the cast below says what is wrong.
            column = text = _without_blanks(text)
        if id_type == "auto":
            _refuse_leading_zeros(text, where)
    elif kind == "string" and kind_of(column.type) == "string":
        # How a CSV file writes a missing id: all edges without an end would meet in one node.
        column = column.cast(pa.large_string())
        empty = pc.equal(column, "")
        column = pc.if_else(empty, None, column) if pc.any(empty).as_py() else column
    if column.null_count:
        at = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        raise UserError(f"{where} has no id in {column.null_count} rows, the first is row {at}; give each row one")
    try:
        if kind == "string":
            return column.cast(pa.large_string())
        return column.cast(pa.int64()).to_numpy()
    except pa.ArrowException as error:
        form = "strings" if kind == "string" else "64-bit whole numbers"
        fix = "give --id-type string to read them as strings"
        if id_type is None:
            fix = "give the ids that the graph's nodes have"
        raise UserError(f"{where} has ids that are no {form} ({error}); {fix}") from error


def _without_blanks(column: Any) -> Any:
    """Return text as whole numbers are read from CSV files: without blanks around it, and null where it is nothing."""
    import pyarrow as pa
    import pyarrow.compute as pc

    column = pc.utf8_trim_whitespace(column)
    nothing = pc.is_in(column, value_set=pa.array(sorted(csv_nothing()), pa.large_string()))
    return pc.if_else(nothing, None, column) if pc.any(nothing).as_py() else column


def _refuse_leading_zeros(column: Any, where: str) -> None:
    import pyarrow.compute as pc

    zeros = pc.starts_with(column, "-0")
    begin = pc.starts_with(column, "0")
    if pc.any(begin).as_py():
        zeros = pc.or_(zeros, pc.and_(begin, pc.greater(pc.binary_length(column), 1)))
    if pc.any(zeros).as_py():
        at = pc.index(zeros, True).as_py()
        raise LeadingZeros(
            f"{where} has the id {column[at].as_py()!r}, whose zeros would be lost in a whole number; "
            "give --id-type string to keep ids as they are written, or --id-type int to drop the zeros"
        )


class NodeValues:
    """Collects ids, labels and masks over the batches of a node table.

    num_labels: length of the lists of labels. id_type: see `id_values`.
    """

    def __init__(self, columns: NodeColumns, kind: IdKind, num_labels: int = 0, id_type: str = "auto") -> None:
        self._columns = columns
        self._num_labels = num_labels
        self._kind, self._id_type = kind, id_type
        self._ids: list[Any] = []
        self._labels: list[Array] = []
        self._label_codes: dict[str, int] = {}
        self._label_places: list[str] = []
        self._has_csv_labels = False
        self._masks: dict[str, list[Array]] = {}
        self.num_rows = 0

    def add(self, file: TableFile, first_row: int, batch: Any) -> None:
        """Take the next batch, with the columns in `NodeColumns.small`."""
        columns = self._columns
        where = f"column {columns.id!r} of {file.shown} from row {first_row} on"
        self._ids.append(id_values(batch.column(columns.id), self._kind, where, id_type=self._id_type))
        if columns.labels or columns.label_is_list:
            self._labels.append(self._label_rows(batch, file, first_row))
        elif columns.label is not None:
            self._labels.append(self._label_values(batch.column(columns.label), file, first_row))
        if columns.split is not None:
            self._add_split(batch.column(columns.split), file, first_row)
        for part, name in columns.masks.items():
            self._masks.setdefault(part, []).append(_mask_values(batch.column(name), name, file, first_row))
        self.num_rows += batch.num_rows

    def ids(self) -> Any:
        """Return all ids, as `id_values` returns a batch's; frees the batches."""
        import pyarrow as pa

        parts, self._ids = self._ids, []
        if self._kind == "int":
            return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
        return pa.concat_arrays(parts) if parts else pa.array([], type=pa.large_string())

    def labels(self) -> tuple[Array | None, list[str] | None]:
        """Return (labels or None, names of the classes if labels were names: sorted, class k is the k-th; or true and
        false).

        Several labels a node: int8 [nodes, classes], rows of -1 for unlabelled nodes, and the names of their columns.
        """
        if not self._labels:
            return None, None
        labels = np.concatenate(self._labels)
        self._labels = []
        if self._columns.labels:
            return labels, self._columns.labels
        if not self._columns.label_is_name:
            is_bool = self._columns.label_is_bool and bool((labels >= 0).any())
            return labels, list(_BOOLEAN_NAMES) if is_bool else None
        numbers = self._label_numbers() if self._has_csv_labels else None
        if numbers is not None:
            words = {name.strip().lower() for name in self._label_codes}
            is_bool = bool(words) and words <= set(_BOOLEAN_NAMES)
            return np.append(numbers, -1)[labels], list(_BOOLEAN_NAMES) if is_bool else None
        names = sorted(self._label_codes)
        number = np.full(len(names) + 1, -1, dtype=np.int64)
        number[[self._label_codes[name] for name in names]] = np.arange(len(names))
        return number[labels], names

    def masks(self) -> dict[str, Array] | None:
        """Return {train | val | test: bool [nodes]}, or None if the table tells no split."""
        return {part: np.concatenate(values) for part, values in self._masks.items()} or None

    def _label_rows(self, batch: Any, file: TableFile, first_row: int) -> Array:
        """Return a batch's rows of 0 and 1, int8 [rows, classes], -1 throughout where a row says nothing."""
        columns = self._columns
        if columns.labels:
            names = [f"column {name!r} of {file.shown}" for name in columns.labels]
            rows = _stacked(batch, columns.labels)
        else:
            name = f"column {columns.label!r} of {file.shown}"
            names = [name] * self._num_labels
            rows = _label_lists(batch.column(columns.label), self._num_labels, name, first_row)
        known = np.nan_to_num(rows, nan=-1)
        wrong = np.argwhere(~np.isin(known, (-1, 0, 1)))
        if len(wrong):
            row, k = wrong[0]
            raise UserError(
                f"{names[k]} has {rows[row, k]:g} in row {first_row + row} ({len(wrong)} such values in these rows); "
                "of several labels a node each is 0 or 1"
            )
        unknown = (known < 0).sum(axis=1)
        partly = np.flatnonzero((unknown > 0) & (unknown < known.shape[1]))
        if len(partly):
            row = partly[0]
            k = int(np.flatnonzero(known[row] < 0)[0])
            raise UserError(
                f"{names[k]} has no label in row {first_row + row}, where others have ({len(partly)} such rows in "
                "these); give 0 or 1 for every class, or nothing for all of an unlabelled node"
            )
        return known.astype(np.int8)

    def _label_values(self, column: Any, file: TableFile, first_row: int) -> Array:
        if self._columns.label_is_name:
            return self._label_codes_of(column, file, first_row)
        values = _label_integers(column)
        if values is not None:
            return values
        values = numbers(column)
        missing = np.isnan(values)
        wrong = np.flatnonzero(~missing & (values != np.trunc(values)) | np.isinf(values))
        if len(wrong):
            raise UserError(
                f"label {values[wrong[0]]:g} in row {first_row + wrong[0]} of {file.shown} is no whole number "
                f"({len(wrong)} such labels in these rows); labels are whole numbers from 0, or names"
            )
        return np.where(missing, -1, values)

    def _label_codes_of(self, column: Any, file: TableFile, first_row: int) -> Array:
        """Return the place of each name in the order in which names were met, -1 for missing and empty ones, and -1."""
        import pyarrow as pa

        self._has_csv_labels = is_csv = file.format == "csv"
        encoded = column.cast(pa.large_string()).dictionary_encode()
        indices = encoded.indices.fill_null(-1).to_numpy()
        codes = np.full(len(encoded.dictionary) + 1, -1, dtype=np.int64)
        new: list[int] = []
        for place, name in enumerate(encoded.dictionary.to_pylist()):
            bare = name.strip() if is_csv else name
            if bare in ("", "-1") or (is_csv and bare in csv_nothing()):
                continue
            codes[place] = self._label_codes.setdefault(name, len(self._label_codes))
            if codes[place] == len(self._label_places) + len(new):
                new.append(place)
        if len(self._label_codes) > MAX_CLASSES:
            raise UserError(
                f"column {self._columns.label!r} has more than {MAX_CLASSES} different values, so that it hardly holds "
                "classes; choose another by --label-column"
            )
        if new:
            met, rows = np.unique(indices, return_index=True)
            rows_of = rows[np.searchsorted(met, new)]
            self._label_places += [f"row {first_row + int(row)} of {file.shown}" for row in rows_of]
        found: Array = codes[indices]
        return found

    def _label_numbers(self) -> Array | None:
        """Return the labels of CSV files that were met, as numbers, or None if one of them is a name."""
        import pyarrow as pa

        met = [name.strip() for name in self._label_codes]
        if any(not name.isdecimal() for name in met) and all(name in _CSV_BOOLEANS for name in met):
            return np.array([_CSV_BOOLEANS[name] for name in met])
        if any(map(_ZERO_IN_FRONT.match, met)):
            return None  # as numbers "01" and "1" would be one class
        try:
            values: Array = pa.array(met, pa.large_string()).cast(pa.float64()).to_numpy()
        except pa.ArrowInvalid:
            return None
        wrong = np.flatnonzero(~np.isfinite(values) | (values != np.trunc(values)))
        if len(wrong):
            first = int(wrong[0])
            raise UserError(
                f"label {met[first]} in {self._label_places[first]} is no whole number ({len(wrong)} such values); "
                "labels are whole numbers from 0, or names"
            )
        # Not as those floats, in which long codes that differ in the last digits are one.
        exact = [int(name) if _WHOLE.fullmatch(name) else int(value) for name, value in zip(met, values)]
        return np.array(exact, dtype=np.int64) if all(label in _INT64 for label in exact) else values

    def _add_split(self, column: Any, file: TableFile, first_row: int) -> None:
        import pyarrow as pa

        encoded = column.cast(pa.large_string()).dictionary_encode()
        parts = np.empty(len(encoded.dictionary) + 1, dtype=np.int64)
        parts[-1] = -1
        codes = encoded.indices.fill_null(-1).to_numpy()
        for place, value in enumerate(encoded.dictionary.to_pylist()):
            is_nothing = not value or (file.format == "csv" and value.strip() in csv_nothing())
            part = None if is_nothing else SPLIT_VALUES.get(value.strip().lower())
            if part is None and not is_nothing:
                at = first_row + int(np.flatnonzero(codes == place)[0])
                raise UserError(
                    f"split {value!r} in row {at} of {file.shown} is not known; give train, val, test, or nothing for "
                    "nodes in no part"
                )
            parts[place] = -1 if part is None else MASK_NAMES.index(part)
        of_row = parts[codes]
        for k, part in enumerate(MASK_NAMES):
            self._masks.setdefault(part, []).append(of_row == k)


def feature_width(columns: NodeColumns, batches: Iterator[tuple[TableFile, int, Any]]) -> int:
    """Return the number of features: of columns their count, of lists the length of the first one."""
    return list_width(columns.features[0], batches) if columns.is_list else len(columns.features)


def list_width(name: str, batches: Iterator[tuple[TableFile, int, Any]]) -> int:
    """Return the length of the lists of a column: of the first one that is not empty; 0 if there is none."""
    import pyarrow.compute as pc

    for _, _, batch in batches:
        column = batch.column(name)
        fixed = getattr(column.type, "list_size", None)
        if fixed is not None:
            return int(fixed)
        lengths = pc.list_value_length(column).drop_null().to_numpy(zero_copy_only=False)
        if lengths.any():
            return int(lengths[lengths.nonzero()[0][0]])
    return 0


def feature_blocks(columns: NodeColumns, width: int, batches: Iterator[tuple[TableFile, int, Any]]) -> Iterator[Array]:
    """Yield each batch's features, (rows, width); missing numbers are NaN.

    Raises UserError if a list has another length.
    """
    for file, first_row, batch in batches:
        if columns.is_list:
            what = f"column {columns.features[0]!r} of {file.shown}"
            yield _list_rows(batch.column(columns.features[0]), width, what, first_row)
        else:
            yield _stacked(batch, columns.features)


def numbers(column: Any) -> Array:
    """Return a column of numbers (or a categorical of them) as numpy: integers, or floats with NaN for missing."""
    import pyarrow as pa
    import pyarrow.types as t

    if t.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if t.is_boolean(column.type):
        column = column.cast(pa.uint8())
    if t.is_integer(column.type):
        # Beyond 2^53 rounded, as any number that becomes a float is; labels and ids are not read by this.
        column = column.cast(pa.float64(), safe=False) if column.null_count else column
    elif column.null_count or not t.is_floating(column.type):
        column = column.cast(column.type if t.is_floating(column.type) else pa.float64())
    return as_array(column.to_numpy(zero_copy_only=False), "a column")


def _label_integers(column: Any) -> Array | None:
    """Return a column of whole numbers (or a categorical of them) as int64, -1 for missing ones; None if it is none."""
    import pyarrow as pa
    import pyarrow.types as t

    if t.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if not t.is_integer(column.type):
        return None
    values = _int64(column.fill_null(pa.scalar(0, column.type)).to_numpy(zero_copy_only=False))
    if column.null_count:
        values = np.where(column.is_null().to_numpy(zero_copy_only=False), -1, values)
    return values


def _mask_words(column: Any) -> Array:
    """Return the numbers that a CSV file's words of a mask stand for: NaN for nothing, 2 for any other word."""
    import pyarrow as pa

    def number(word: str) -> float:
        if word in _CSV_BOOLEANS or word in csv_nothing():
            return _CSV_BOOLEANS.get(word, np.nan)
        try:
            return float(word)
        except ValueError:
            return 2.0

    encoded = column.cast(pa.large_string()).dictionary_encode()
    values = [number(word.strip()) for word in encoded.dictionary.to_pylist()]
    found: Array = np.array([*values, np.nan])[encoded.indices.fill_null(-1).to_numpy()]
    return found


def _mask_values(column: Any, name: str, file: TableFile, first_row: int) -> npt.NDArray[np.bool_]:
    values = _mask_words(column) if kind_of(column.type) == "string" else numbers(column)
    values = np.where(np.isnan(values), 0, values)
    bad = np.flatnonzero((values != 0) & (values != 1))
    if len(bad):
        raise UserError(
            f"column {name!r} of {file.shown} has {column[bad[0]].as_py()} in row {first_row + bad[0]}; a mask is true "
            "or false (or 1 or 0) for each node"
        )
    return values.astype(np.bool_)


def _int64(values: Array) -> Array:
    if values.dtype == np.uint64 and values.size and int(values.max()) > np.iinfo(np.int64).max:
        raise UserError(
            f"label {int(values.max())} is beyond 64-bit numbers; labels are whole numbers from 0, or names"
        )
    return values.astype(np.int64, copy=False)


def _stacked(batch: Any, names: list[str]) -> Array:
    columns = [numbers(batch.column(name)) for name in names]
    table = np.empty((batch.num_rows, len(names)), dtype=np.result_type(np.float32, *{c.dtype for c in columns}))
    for k, column in enumerate(columns):
        table[:, k] = column
    return table


def _label_lists(column: Any, width: int, what: str, first_row: int) -> Array:
    """Return a column of lists of labels as [rows, width], NaN where a row has none."""
    import pyarrow.compute as pc

    lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
    there = column.is_valid().to_numpy(zero_copy_only=False)
    bad = np.flatnonzero(there & (lengths != width))
    if len(bad):
        raise UserError(
            f"{what} has {int(lengths[bad[0]])} labels in row {first_row + int(bad[0])} but {width} in the first list "
            f"with any ({len(bad)} such rows of the {len(lengths)} from row {first_row} on); give each labelled node "
            "one entry a class"
        )
    rows = np.full((len(column), width), np.nan)
    rows[there] = numbers(column.flatten()).reshape(-1, width)
    return rows


def _list_rows(column: Any, width: int, what: str, first_row: int) -> Array:
    import pyarrow.compute as pc

    lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
    bad = np.flatnonzero((lengths != width) | column.is_null().to_numpy(zero_copy_only=False))
    if len(bad):
        at = int(bad[0])
        state = f"{int(lengths[at])} numbers" if column[at].is_valid else "no list"
        raise UserError(
            f"{what} has {state} in row {first_row + at} but {width} in the first list with any ({len(bad)} such "
            f"rows of the {len(lengths)} from row {first_row} on); give every node a list of {width}"
        )
    return numbers(column.flatten()).reshape(len(column), width)
