"""One Parquet, CSV or Arrow file, read in record batches of bounded memory.

Row groups of Parquet and uncompressed batches of Arrow may be of any size. A compressed Arrow batch is the exception:
it is in memory as a whole, since Arrow cannot decompress a part (Feather's writer makes batches of 65,536 rows).
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dngd.errors import UserError
from dngd.graph.filesystems import Location, explained

TableFormat = Literal["parquet", "csv", "arrow"]

# Read ahead of all columns together.
_BUFFER_BYTES = 1 << 25
# What a column of a row group takes while it is read: a dictionary and a page, decompressed, and its buffer.
_COLUMN_BYTES = 3 << 20
_GROUP_BYTES = 1 << 26
_SPILLED_COLUMNS = 16
# Tried in turn: a line must fit into a block.
_CSV_BLOCKS = (1 << 20, 1 << 23, 1 << 26)
_ARROW_MAGIC = b"ARROW1"
# How files begin that are no text: what they are, and what to do.
_OTHER_FORMATS = {
    b"PAR1\x15": ("Parquet", "rename it to end in .parquet"),
    b"ARROW1\0": ("Feather", "rename it to end in .feather"),
    b"\x1f\x8b": ("gzip", "add .gz to its name"),
    b"PK\x03\x04": ("zip", "unpack it"),
}
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_NOT_UTF8 = "is not in UTF-8, which CSV files have to be in; convert it, say iconv -f LATIN1 -t UTF-8 OLD > NEW"


@dataclass(frozen=True)
class TableFile:
    """One file of a table."""

    location: Location
    format: TableFormat
    compression: str | None = None
    """of a CSV file, as pyarrow calls it"""

    @property
    def shown(self) -> str:
        """The file as messages name it."""
        return self.location.shown


@dataclass(frozen=True)
class CsvStyle:
    """How CSV files are written. Raises UserError if they cannot be read so."""

    delimiter: str | None = None
    """one character, or \\t as it is typed at a command line; None: a tab in .tsv files, else a comma"""
    header: bool = True
    """False: the first line is data, and columns are called f0, f1, ..."""

    def __post_init__(self) -> None:
        if self.delimiter == "\\t":
            object.__setattr__(self, "delimiter", "\t")
        if self.delimiter is not None and (
            len(self.delimiter) != 1 or not self.delimiter.isascii() or self.delimiter in '"\r\n'
        ):
            raise UserError(
                f"--delimiter {self.delimiter!r} is not one ASCII character between values; give one, say ';' or '\\t' "
                "for a tab"
            )


@dataclass(frozen=True)
class ReadPlan:
    """What to read of a file."""

    columns: Sequence[str]
    rows: int
    """most rows in a batch"""
    csv_types: Mapping[str, Any] = field(default_factory=dict)
    """column -> Arrow type, of CSV files"""
    style: CsvStyle = field(default_factory=CsvStyle)
    scratch: Path | None = None
    """folder for temporary files; None: the system's"""


def read_schema(file: TableFile, style: CsvStyle) -> Any:
    """Return the file's Arrow schema, None for a CSV file of no bytes; raises UserError if it is of another format."""
    import pyarrow as pa

    filesystem, path = file.location.filesystem, file.location.path
    with readable(file):
        if file.format == "parquet":
            import pyarrow.parquet as pq

            with filesystem.open_input_file(path) as source:
                return pq.read_schema(source)
        if file.format == "csv":
            if filesystem.get_file_info(path).size == 0:
                return None
            _check_begin(file)
            with _open_csv(file, style, None, {}) as reader:
                schema = reader.schema
                # The names are decoded here, where a failure is told.
                tuple(schema.names)
                return schema
        with filesystem.open_input_stream(path) as source:
            begin = source.read(len(_ARROW_MAGIC))
        with filesystem.open_input_file(path) as source:
            return (pa.ipc.open_file if begin == _ARROW_MAGIC else pa.ipc.open_stream)(source).schema


def read_batches(file: TableFile, plan: ReadPlan) -> Iterator[Any]:
    """Yield the file's rows as record batches of the plan's columns, in its order of columns.

    Raises UserError naming the file if it cannot be read on.
    """
    readers = {"parquet": _read_parquet, "csv": _read_csv, "arrow": _read_arrow}
    with readable(file):
        yield from readers[file.format](file, plan)


def check_encoding(file: TableFile, name: str, arrow_type: Any) -> None:
    """Raise UserError if a CSV file's column is of bytes, which is how pyarrow takes text that is not UTF-8."""
    import pyarrow.types as t

    if file.format == "csv" and t.is_binary(arrow_type):
        raise UserError(f"column {name!r} of {file.shown} {_NOT_UTF8}")


def _check_begin(file: TableFile) -> None:
    """Raise UserError if a file that is named as CSV begins as no text does."""
    if file.compression is not None:
        return
    with file.location.filesystem.open_input_stream(file.location.path) as source:
        begin = source.read(max(map(len, _OTHER_FORMATS)))
    if begin.startswith(_UTF16):
        raise UserError(f"{file.shown} {_NOT_UTF8}".replace("LATIN1", "UTF-16"))
    for magic, (kind, fix) in _OTHER_FORMATS.items():
        if begin.startswith(magic):
            raise UserError(f"{file.shown} is a {kind} file by its first bytes, not text; {fix}")


@contextmanager
def readable(file: TableFile) -> Iterator[None]:
    """Turn a failure to read the file inside the block into a UserError that names it."""
    import pyarrow as pa

    with explained(file.shown):
        try:
            yield
        except UnicodeDecodeError as error:
            raise UserError(f"{file.shown} {_NOT_UTF8}") from error
        # pyarrow raises kinds of its own for content that is not of the format.
        except pa.ArrowException as error:
            text = " ".join(str(error).split())[:300]
            fix = "it is damaged, or of another format: write it again"
            if file.format == "csv" and "invalid UTF8" in text:
                raise UserError(f"{file.shown} {_NOT_UTF8} ({text})") from error
            if file.format == "csv":
                fix = "mend the lines, or say how they are written by --delimiter and --no-header"
                if "conversion error" in text:
                    fix = "mend the lines where a column of numbers holds something else"
            raise UserError(f"{file.shown} cannot be read as {file.format} ({text}); {fix}") from error


def _read_parquet(file: TableFile, plan: ReadPlan) -> Iterator[Any]:
    import pyarrow.parquet as pq

    columns = list(plan.columns)
    buffer = max(1 << 16, min(1 << 23, _BUFFER_BYTES // max(len(columns), 1)))
    with (
        file.location.filesystem.open_input_file(file.location.path) as source,
        # Not prefetched: a row group, which may hold the whole file, is never in memory as a whole.
        pq.ParquetFile(source, buffer_size=buffer, pre_buffer=False) as opened,
    ):
        for group in range(opened.num_row_groups):
            if _group_bytes(opened.metadata.row_group(group), set(columns)) > _GROUP_BYTES:
                yield from _spilled(opened, group, plan)
                continue
            for batch in opened.iter_batches(batch_size=plan.rows, row_groups=[group], columns=columns):
                yield batch.select(columns)


def _group_bytes(group: Any, columns: set[str]) -> int:
    """Return about how much memory reading these columns of a row group side by side takes."""
    chunks = (group.column(k) for k in range(group.num_columns))
    return sum(
        min(chunk.total_uncompressed_size, _COLUMN_BYTES)
        for chunk in chunks
        if chunk.path_in_schema in columns or chunk.path_in_schema.partition(".")[0] in columns
    )


def _spilled(opened: Any, group: int, plan: ReadPlan) -> Iterator[Any]:
    """Yield a row group of many columns: a few columns at a time go to temporary files, which are read side by side."""
    import pyarrow as pa

    with ExitStack() as files:
        readers = []
        for start in range(0, len(plan.columns), _SPILLED_COLUMNS):
            part = list(plan.columns[start : start + _SPILLED_COLUMNS])
            file = files.enter_context(tempfile.TemporaryFile(dir=plan.scratch))
            writer = None
            for batch in opened.iter_batches(batch_size=plan.rows, row_groups=[group], columns=part):
                writer = writer or files.enter_context(pa.ipc.new_stream(file, batch.select(part).schema))
                writer.write_batch(batch.select(part))
            if writer is None:
                return
            writer.close()
            file.seek(0)
            readers.append(pa.ipc.open_stream(file))
        for parts in zip(*readers, strict=True):
            yield pa.RecordBatch.from_arrays([column for part in parts for column in part.columns], list(plan.columns))


def _read_arrow(file: TableFile, plan: ReadPlan) -> Iterator[Any]:
    import pyarrow as pa

    columns = list(plan.columns)
    with ExitStack() as opened:
        mapped = None
        if file.location.remote:
            source: Any = opened.enter_context(file.location.filesystem.open_input_file(file.location.path))
        else:
            # A map: an uncompressed batch, which may hold the whole file, takes memory only as it is used.
            mapped = _map(file.location.path)
            source = pa.BufferReader(pa.py_buffer(mapped))
        begin = source.read(len(_ARROW_MAGIC))
        source.seek(0)
        for batch in _arrow_batches(source, is_file=begin == _ARROW_MAGIC):
            for start in range(0, batch.num_rows, plan.rows):
                yield batch.select(columns).slice(start, plan.rows)
                if mapped is not None:
                    # The pages just read need not stay with this process.
                    mapped.madvise(mmap.MADV_DONTNEED)
            # Before the next one is read: it may be compressed, and large.
            del batch


def _map(path: str) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _arrow_batches(source: Any, *, is_file: bool) -> Iterator[Any]:
    import pyarrow as pa

    if not is_file:
        yield from pa.ipc.open_stream(source)
        return
    reader = pa.ipc.open_file(source)
    for k in range(reader.num_record_batches):
        yield reader.get_batch(k)


def _read_csv(file: TableFile, plan: ReadPlan) -> Iterator[Any]:
    types = {name: kind for name, kind in plan.csv_types.items() if name in plan.columns}
    with _open_csv(file, plan.style, list(plan.columns), types) as reader:
        for batch in reader:
            for start in range(0, batch.num_rows, plan.rows):
                yield batch.slice(start, plan.rows)


def _open_csv(file: TableFile, style: CsvStyle, columns: list[str] | None, types: dict[str, Any]) -> Any:
    import pyarrow as pa
    from pyarrow import csv

    delimiter = style.delimiter or ("\t" if ".tsv" in Path(file.location.name).suffixes else ",")
    for block_size in _CSV_BLOCKS:
        stream = file.location.filesystem.open_input_stream(file.location.path, compression=file.compression)
        try:
            return csv.open_csv(
                stream,
                read_options=csv.ReadOptions(block_size=block_size, autogenerate_column_names=not style.header),
                parse_options=csv.ParseOptions(delimiter=delimiter),
                convert_options=csv.ConvertOptions(include_columns=columns, column_types=types),
            )
        except pa.ArrowInvalid as error:
            stream.close()
            if "block" not in str(error) or block_size == _CSV_BLOCKS[-1]:
                raise
    raise AssertionError
