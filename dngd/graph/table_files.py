"""Tables as users have them: any number of Parquet, CSV or Arrow IPC files.

This module owns which files make a table. `table_readers.py` reads one, `table_columns.py` knows what columns mean.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from dngd.errors import UserError
from dngd.graph.filesystems import Location, list_files, shown_address
from dngd.graph.table_readers import CsvStyle, ReadPlan, TableFile, TableFormat, read_batches, read_schema

SUFFIXES: dict[str, TableFormat] = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "csv",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
}
_COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4"}
_PARTITION = re.compile(r"([^=]+)=(.*)", re.DOTALL)
_NO_VALUE = "__HIVE_DEFAULT_PARTITION__"
_BATCH_BYTES = 1 << 23
_MAX_BATCH_ROWS = 1 << 19


@dataclass
class Table:
    """Files of one table, read in their order, with the schema of each.

    A column by which Spark, Hive or pyarrow has partitioned the table is not in the files: its values are in the
    folders' names, `column=value`. It is a column of text here.
    """

    files: list[TableFile]
    name: str
    """what it was given as, without the folders: for provenance"""
    style: CsvStyle = field(default_factory=CsvStyle)
    _schemas: list[Any] | None = None

    @property
    def shown(self) -> str:
        """The table as messages name it."""
        more = f" and {len(self.files) - 1} more" if len(self.files) > 1 else ""
        return self.files[0].shown + more

    def schemas(self) -> list[Any]:
        """Return the Arrow schema of each file; None for a CSV file of no bytes. Read once."""
        if self._schemas is None:
            self._schemas = [self._schema_of(k, file) for k, file in enumerate(self.files)]
        return self._schemas

    def _schema_of(self, number: int, file: TableFile) -> Any:
        import pyarrow as pa

        schema = read_schema(file, self.style)
        partition = self._partitions[number]
        for name in list(partition):
            if schema is None or name in schema.names:
                del partition[name]  # the file's own column is the one to read
            else:
                schema = schema.append(pa.field(name, pa.large_string()))
        return schema

    @cached_property
    def _partitions(self) -> list[dict[str, str | None]]:
        """Columns and values in the names of each file's folders, as far as the table's files have different ones."""
        found = []
        for file in self.files:
            pairs = [_PARTITION.fullmatch(name) for name in file.location.path.split("/")[:-1]]
            values = {unquote(pair[1]): unquote(pair[2]) for pair in pairs if pair is not None}
            found.append({name: None if value == _NO_VALUE else value for name, value in values.items()})
        names = set().union(*found)
        differing = {name for name in names if len({of_file.get(name) for of_file in found}) > 1}
        return [{name: of_file[name] for name in sorted(differing & of_file.keys())} for of_file in found]

    def batches(
        self,
        columns: Sequence[str],
        row_bytes: int,
        csv_types: Mapping[str, Any] | None = None,
        scratch: Path | None = None,
    ) -> Iterator[tuple[TableFile, int, Any]]:
        """Yield (file, number of the first row in it, record batch of these columns in this order).

        row_bytes: about how much a row takes, so that a batch takes some MiB. csv_types: Arrow types of CSV columns,
        which would be guessed from each file's beginning otherwise. scratch: folder for temporary files.
        Raises UserError naming a file that cannot be read on.
        """
        rows = max(1, min(_MAX_BATCH_ROWS, _BATCH_BYTES // max(row_bytes, 1)))
        plan = ReadPlan(columns, rows, csv_types or {}, self.style, scratch)
        for k, (file, schema) in enumerate(zip(self.files, self.schemas())):
            first = 0
            for batch in self._batches_of(k, file, plan) if schema is not None else ():
                yield file, first, batch
                first += batch.num_rows

    def _batches_of(self, number: int, file: TableFile, plan: ReadPlan) -> Iterator[Any]:
        import pyarrow as pa

        own = self._partitions[number].keys() & set(plan.columns)
        if not own:
            yield from read_batches(file, plan)
            return
        values = {name: pa.scalar(self._partitions[number][name], pa.large_string()) for name in own}
        inside = [name for name in plan.columns if name not in own]
        for batch in read_batches(file, replace(plan, columns=inside)):
            columns = [
                pa.repeat(values[name], batch.num_rows) if name in own else batch.column(name) for name in plan.columns
            ]
            yield pa.RecordBatch.from_arrays(columns, names=list(plan.columns))


def open_table(
    source: str | Path | Sequence[str | Path],
    what: str,
    *,
    table_format: TableFormat | None = None,
    style: CsvStyle | None = None,
) -> Table:
    """Return the table of a file, a folder, a pattern, an address, or a list of these; see `list_files`.

    what: node or edge, for messages. table_format: None: told by the files' names; else files of other formats are
    left out, and files whose names tell none are of this one.
    Raises UserError if nothing is there, formats are mixed, or a file's name does not tell its format.
    """
    sources = [source] if isinstance(source, str | Path) else list(source)
    if not sources:
        raise UserError(f"no {what} files are given; give at least one")
    locations = [location for one in sources for location in list_files(one)]
    shown = str(sources[0])
    return make_table(locations, what, shown_address(shown) if "://" in shown else shown, table_format, style)


def make_table(
    locations: Sequence[Location], what: str, shown: str, table_format: TableFormat | None, style: CsvStyle | None
) -> Table:
    """Return the table of these files, at least one. shown: what they were given as. See `open_table`."""
    files = [_table_file(location, table_format) for location in locations]
    given, files = files, [file for file in files if table_format in (None, file.format)]
    if not files and len(given) == 1:
        raise UserError(
            f"{given[0].shown} is a {given[0].format} file by its name; leave --format out, or rename it if it is a "
            f"{table_format} file"
        )
    if not files:
        raise UserError(f"{shown} has no {table_format} files; check --format, or the path of the {what} table")
    formats = {file.format: file for file in files}
    if len(formats) > 1:
        one, other = list(formats.values())[:2]
        raise UserError(
            f"the {what} table mixes formats ({one.shown}, {other.shown}); give files of one, or choose by --format"
        )
    return Table(files, Path(shown.rstrip("/")).name, style or CsvStyle())


def format_of(name: str) -> TableFormat | None:
    """Return the table format that a file's name tells, compressed CSV included; None if it tells none."""
    suffixes = Path(name).suffixes
    if suffixes and suffixes[-1] in _COMPRESSIONS:
        kind = SUFFIXES.get(suffixes[-2]) if len(suffixes) > 1 else None
        return kind if kind == "csv" else None
    return SUFFIXES.get(suffixes[-1]) if suffixes else None


def _table_file(location: Location, table_format: TableFormat | None) -> TableFile:
    kind = format_of(location.name) or table_format
    if kind is None:
        raise UserError(
            f"{location.shown} does not tell its format by its name; name it .parquet, .csv, .tsv, .csv.gz, .arrow or "
            ".feather, or give --format"
        )
    return TableFile(location, kind, _COMPRESSIONS.get(Path(location.name).suffix) if kind == "csv" else None)
