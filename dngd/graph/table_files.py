"""Tables as users have them: any number of Parquet, CSV or Arrow IPC files, read in record batches.

This module owns the formats. Which column means what is `table_columns.py`'s business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dngd.errors import UserError
from dngd.graph.filesystems import Location, explained, list_files, shown_address

TableFormat = Literal["parquet", "csv", "arrow"]

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
_BATCH_BYTES = 1 << 23
_MAX_BATCH_ROWS = 1 << 19
# All columns' read buffers together: what is read ahead of a column of a row group.
_BUFFER_BYTES = 1 << 26
_CSV_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True)
class TableFile:
    """One file of a table."""

    location: Location
    format: TableFormat
    compression: str | None = None

    @property
    def shown(self) -> str:
        """The file as messages name it."""
        return self.location.shown


@dataclass(frozen=True)
class CsvStyle:
    """How CSV files are written. delimiter: None: a tab in .tsv files, else a comma."""

    delimiter: str | None = None
    header: bool = True
    """False: the first line is data, and columns are called f0, f1, ..."""


@dataclass
class Table:
    """Files of one table, read in their order, with the schema of each."""

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
            self._schemas = [_schema(file, self.style) for file in self.files]
        return self._schemas

    def batches(
        self, columns: Sequence[str], row_bytes: int, csv_types: Mapping[str, Any] | None = None
    ) -> Iterator[tuple[TableFile, int, Any]]:
        """Yield (file, number of the first row in it, record batch of these columns in this order).

        row_bytes: about how much a row takes, so that a batch takes some MiB. csv_types: Arrow types of CSV columns,
        which would be guessed from each file's beginning otherwise.
        Raises UserError naming a file that cannot be read on.
        """
        rows = max(1, min(_MAX_BATCH_ROWS, _BATCH_BYTES // max(row_bytes, 1)))
        for file, schema in zip(self.files, self.schemas()):
            if schema is None:
                continue
            first = 0
            with _readable(file):
                for batch in _READERS[file.format](file, self.style, list(columns), rows, dict(csv_types or {})):
                    yield file, first, batch
                    first += batch.num_rows


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
    files = [file for file in files if table_format in (None, file.format)]
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


@contextmanager
def _readable(file: TableFile) -> Iterator[None]:
    """Turn a failure to read the file inside the block into a UserError that names it."""
    import pyarrow as pa

    try:
        with explained(file.shown):
            yield
    # pyarrow raises its own kinds (some are ValueErrors or OSErrors) for content that is not of the format.
    except pa.ArrowException as error:
        text = " ".join(str(error).split())[:300]
        hint = ""
        if file.format == "csv" and "conversion error" in text:
            hint = ": later lines hold other values than the first ones; mend them, or for ids give --id-type string"
        raise UserError(f"{file.shown} cannot be read as {file.format} ({text}){hint or '; write it again'}") from error


def _schema(file: TableFile, style: CsvStyle) -> Any:
    import pyarrow as pa

    with _readable(file):
        if file.format == "parquet":
            import pyarrow.parquet as pq

            with file.location.filesystem.open_input_file(file.location.path) as source:
                return pq.read_schema(source)
        if file.format == "arrow":
            with file.location.filesystem.open_input_file(file.location.path) as source:
                return pa.ipc.open_file(source).schema
        if file.location.filesystem.get_file_info(file.location.path).size == 0:
            return None
        with _open_csv(file, style, None, {}) as reader:
            return reader.schema


def _read_parquet(
    file: TableFile, style: CsvStyle, columns: list[str], rows: int, csv_types: dict[str, Any]
) -> Iterator[Any]:
    import pyarrow.parquet as pq

    # Buffered and not prefetched: a row group, which may hold the whole file, is never in memory as a whole.
    buffer = max(1 << 16, min(1 << 23, _BUFFER_BYTES // max(len(columns), 1)))
    with (
        file.location.filesystem.open_input_file(file.location.path) as source,
        pq.ParquetFile(source, buffer_size=buffer, pre_buffer=False) as opened,
    ):
        for batch in opened.iter_batches(batch_size=rows, columns=columns):
            yield batch.select(columns)


def _read_arrow(
    file: TableFile, style: CsvStyle, columns: list[str], rows: int, csv_types: dict[str, Any]
) -> Iterator[Any]:
    import pyarrow as pa

    # A map where the file system has one: an uncompressed batch then takes memory only as it is used.
    if file.location.remote:
        source = file.location.filesystem.open_input_file(file.location.path)
    else:
        source = pa.memory_map(file.location.path)
    with source:
        schema = pa.ipc.open_file(source).schema
        # Columns of its own options: the others of a compressed batch are not even decompressed.
        wanted = [schema.get_field_index(name) for name in columns]
        reader = pa.ipc.open_file(source, options=pa.ipc.IpcReadOptions(included_fields=sorted(wanted)))
        for k in range(reader.num_record_batches):
            batch = reader.get_batch(k).select(columns)
            for start in range(0, batch.num_rows, rows):
                yield batch.slice(start, rows)


def _read_csv(
    file: TableFile, style: CsvStyle, columns: list[str], rows: int, csv_types: dict[str, Any]
) -> Iterator[Any]:
    types = {name: kind for name, kind in csv_types.items() if name in columns}
    with _open_csv(file, style, columns, types) as reader:
        for batch in reader:
            for start in range(0, batch.num_rows, rows):
                yield batch.slice(start, rows)


def _open_csv(file: TableFile, style: CsvStyle, columns: list[str] | None, types: dict[str, Any]) -> Any:
    from pyarrow import csv

    stream = file.location.filesystem.open_input_stream(file.location.path, compression=file.compression)
    delimiter = style.delimiter or ("\t" if ".tsv" in Path(file.location.name).suffixes else ",")
    return csv.open_csv(
        stream,
        read_options=csv.ReadOptions(block_size=_CSV_BLOCK_BYTES, autogenerate_column_names=not style.header),
        parse_options=csv.ParseOptions(delimiter=delimiter),
        convert_options=csv.ConvertOptions(include_columns=columns, column_types=types),
    )


_READERS: dict[TableFormat, Callable[..., Iterator[Any]]] = {
    "parquet": _read_parquet,
    "arrow": _read_arrow,
    "csv": _read_csv,
}
