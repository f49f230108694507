"""Arrow IPC files of one record batch, written in blocks and read by memory map.

One record batch keeps each column's values contiguous in the file, so that a numpy array or torch
tensor can view them where they lie. This module owns the byte layout; what the columns mean is
`builder.py`'s and `store.py`'s business.
"""

from __future__ import annotations

import hashlib
import io
import mmap
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dngd.errors import UserError
from dngd.graph.manifest import FileEntry

Array = npt.NDArray[Any]

_HASH_BLOCK_BYTES = 1 << 22
# Python names it from 3.11 on; the value is Linux's.
_MAP_NORESERVE: int = getattr(mmap, "MAP_NORESERVE", 0x4000)


def write_columns(path: Path, columns: Mapping[str, Any]) -> FileEntry:
    """Write equally long columns as one record batch; fsync; return its entry.

    columns: 1-D numpy arrays of int64, int32, float32 or uint8, or Arrow arrays of strings without nulls.
    """
    arrays = [v if isinstance(v, pa.Array) else pa.array(np.ascontiguousarray(v)) for v in columns.values()]
    types = {name: str(v.type if isinstance(v, pa.Array) else v.dtype) for name, v in columns.items()}
    schema = _schema(types)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
    _sync(path)
    return _describe(path, types, len(arrays[0]))


def write_labels(path: Path, labels: Array) -> FileEntry:
    """Write labels, int64 [num_nodes] or int8 [num_nodes, num_classes]; fsync; return the file's entry."""
    if labels.ndim == 1:
        return write_columns(path, {"labels": labels})
    with ColumnWriter(path, "labels", f"int8[{labels.shape[1]}]", len(labels)) as writer:
        writer.append(labels)
        return writer.finish()


class ColumnWriter:
    """Writes a file of one column, in blocks of consecutive rows; memory holds one block.

    The bytes are those that Arrow's writer would give of the whole column. num_rows None: told by what was
    appended (the file is then read once more, for its checksum). Closing without `finish` leaves a file that no
    manifest lists.
    """

    def __init__(self, path: Path, column: str, type_name: str, num_rows: int | None = None) -> None:
        """type_name: int64 | float32 | uint8, or float32[WIDTH] | float16[WIDTH] | bfloat16[WIDTH] | int8[WIDTH]."""
        self._path, self._column, self._type_name, self._num_rows = path, column, type_name, num_rows
        self._type = _parse_type(type_name)
        assert self._type.dtype is not None, f"{type_name} has no fixed width"
        self._written = 0
        # A head of one row has the size of a head of any other number but 0.
        self._frame = _frame(column, type_name, 1 if num_rows is None else num_rows)
        self._sha256 = hashlib.sha256(self._frame.head)
        # Without a buffer, closing writes nothing: on a full disk it would raise again.
        self._file = path.open("wb", buffering=0)
        write_all(self._file, self._frame.head)

    def __enter__(self) -> ColumnWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file, finished or not."""
        self._file.close()

    def append(self, block: Array) -> None:
        """Write the next rows, [rows] or [rows, width], of the column's own type (bfloat16: its bits as uint16)."""
        assert block.dtype == self._type.dtype, f"{block.dtype} instead of {self._type.dtype}"
        data = np.ascontiguousarray(block).reshape(-1).view(np.uint8).data
        self._written += len(data)
        write_all(self._file, data)
        if self._num_rows is not None:
            self._sha256.update(data)

    def finish(self) -> FileEntry:
        """Write what Arrow puts around the values, fsync, close; return the file's entry.

        Raises ValueError if the blocks do not add up to num_rows rows.
        """
        num_rows, rest = divmod(self._written, self._type.row_bytes)
        if rest or (self._num_rows is not None and num_rows != self._num_rows):
            raise ValueError(f"blocks hold {num_rows} rows and {rest} bytes instead of {self._num_rows} rows")
        frame = self._frame
        if self._num_rows is None:
            frame = _frame(self._column, self._type_name, num_rows)
            assert num_rows == 0 or len(frame.head) == len(self._frame.head)
            if num_rows == 0:
                self._file.truncate(0)
            self._file.seek(0)
            write_all(self._file, frame.head)
            self._file.seek(0, os.SEEK_END)
        write_all(self._file, frame.tail)
        os.fsync(self._file.fileno())
        self._file.close()
        self._sha256.update(frame.tail)
        return FileEntry(
            bytes=len(frame.head) + self._written + len(frame.tail),
            sha256=file_sha256(self._path) if self._num_rows is None else self._sha256.hexdigest(),
            length=num_rows,
            columns={self._column: self._type_name},
            data_offset=len(frame.head) if num_rows else 0,
            data_bytes=self._written,
            frame_sha256=hashlib.sha256(frame.head + frame.tail).hexdigest(),
        )


def read_columns(path: Path, entry: FileEntry, fix: str) -> dict[str, Any]:
    """Map a file and return its columns as arrays that view it; (rows,) or (rows, width).

    Numbers are numpy arrays (bfloat16: its bits as int16, which every torch can view), strings are Arrow arrays,
    whose offsets are not checked.

    The time is independent of the file's size: only Arrow's header and footer are read and hashed. The
    mapping is private and copy-on-write: unwritten pages are shared between processes, and writing to
    an array changes neither the file nor another process (through a read-only mapping it would be a
    segmentation fault, since torch has no read-only tensors).
    Raises UserError naming the file, and the fix, if it is missing, of another size, or its header is altered.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing though the manifest lists it; {fix}")
    size = path.stat().st_size
    if size != entry.bytes:
        state = "truncated" if size < entry.bytes else "longer than written"
        raise UserError(f"{path} is {state}: {size} bytes, the manifest says {entry.bytes}; {fix}")
    try:
        with path.open("rb") as file:
            flags = mmap.MAP_PRIVATE | _MAP_NORESERVE
            mapped = mmap.mmap(file.fileno(), size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    except OSError as error:
        raise UserError(f"{path} cannot be mapped into memory ({error.strerror}); check its permissions") from error
    if frame_digest(mapped, entry.data_offset, entry.data_bytes) != entry.frame_sha256:
        raise UserError(f"{path} has an altered header or footer (its checksum does not match); {fix}")
    try:
        return _columns_of(mapped, entry)
    except (pa.ArrowException, ValueError, OSError) as error:
        raise UserError(f"{path} is not the Arrow file that the manifest describes ({error}); {fix}") from error


def frame_digest(data: mmap.mmap | bytes, data_offset: int, data_bytes: int) -> str:
    """Return the sha256 of the bytes before `data_offset` and after `data_offset + data_bytes`."""
    view = memoryview(data)
    try:
        digest = hashlib.sha256(view[:data_offset])
        digest.update(view[data_offset + data_bytes :])
        return digest.hexdigest()
    finally:
        view.release()


def write_all(file: io.FileIO, data: memoryview | bytes) -> None:
    """Write bytes to a file without a buffer, in as many calls as it takes."""
    view = memoryview(data)
    while len(view):
        view = view[file.write(view) :]


def file_sha256(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """Return the sha256 of a whole file; `progress` is called with the bytes of each block."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
            if progress is not None:
                progress(len(block))
    return digest.hexdigest()


def _columns_of(mapped: mmap.mmap, entry: FileEntry) -> dict[str, Any]:
    buffer = pa.py_buffer(mapped)
    reader = pa.ipc.open_file(pa.BufferReader(buffer))
    if reader.schema != _schema(entry.columns):
        raise ValueError(f"its columns are {dict(zip(reader.schema.names, reader.schema.types))}")
    if reader.num_record_batches != 1:
        raise ValueError(f"it has {reader.num_record_batches} record batches instead of 1")
    batch = reader.get_batch(0)
    if batch.num_rows != entry.length:
        raise ValueError(f"it has {batch.num_rows} rows instead of {entry.length}")
    columns: dict[str, Any] = {}
    for name, array in zip(reader.schema.names, batch.columns):
        kind = _parse_type(entry.columns[name])
        start, end = _extent([array], buffer.address)
        if array.null_count or start < entry.data_offset or end > entry.data_offset + entry.data_bytes:
            raise ValueError(f"column {name} lies outside the listed bytes or has nulls")
        if kind.dtype is None:
            columns[name] = array
            continue
        shape = (entry.length,) if kind.width is None else (entry.length, kind.width)
        dtype = np.dtype(np.int16) if kind.dtype == np.uint16 else kind.dtype
        count = entry.length * (kind.width or 1)
        if count == 0:
            columns[name] = np.empty(shape, dtype=dtype)
            continue
        if end - start < count * dtype.itemsize:
            raise ValueError(f"column {name} is shorter than its rows")
        columns[name] = np.frombuffer(mapped, dtype=dtype, count=count, offset=start).reshape(shape)
    return columns


@dataclass(frozen=True)
class _ColumnType:
    arrow: Any
    dtype: np.dtype[Any] | None
    """of the stored values; None for strings"""
    width: int | None

    @property
    def row_bytes(self) -> int:
        assert self.dtype is not None
        return self.dtype.itemsize * (self.width or 1)


_NUMBERS: dict[str, Any] = {
    "int64": np.int64,
    "int32": np.int32,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": np.uint16,
    "uint8": np.uint8,
    "int8": np.int8,
}
_STRINGS: dict[str, Any] = {"string": pa.string(), "large_string": pa.large_string()}


def _parse_type(name: str) -> _ColumnType:
    if name in _STRINGS:
        return _ColumnType(_STRINGS[name], None, None)
    base, _, width = name.partition("[")
    if base not in _NUMBERS:
        raise ValueError(f"unknown column type {name}")
    dtype = np.dtype(_NUMBERS[base])
    arrow = pa.from_numpy_dtype(dtype)
    if not width:
        return _ColumnType(arrow, dtype, None)
    row = pa.list_(pa.field("item", arrow, nullable=False), int(width.rstrip("]")))
    return _ColumnType(row, dtype, row.list_size)


def _schema(types: Mapping[str, str]) -> Any:
    return pa.schema(
        [pa.field(name, _parse_type(type_name).arrow, nullable=False) for name, type_name in types.items()]
    )


@dataclass(frozen=True)
class _Frame:
    """What Arrow's writer puts before and after a column's values."""

    head: bytes
    tail: bytes


class _FrameSink:
    """A file for Arrow's writer that keeps everything but the values, which are never copied."""

    closed = False

    def __init__(self, values: Any) -> None:
        self._values = values
        self._parts: list[bytes] = []
        self._num_head: int | None = None

    def write(self, data: Any) -> int:
        # Arrow hands whole buffers over as they are, and all else as bytes.
        if isinstance(data, pa.Buffer) and data.address == self._values.address and data.size:
            assert data.size == self._values.size
            self._num_head = len(self._parts)
            return int(data.size)
        self._parts.append(bytes(data))
        return len(self._parts[-1])

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True

    def frame(self) -> _Frame:
        at = len(self._parts) if self._num_head is None else self._num_head
        return _Frame(b"".join(self._parts[:at]), b"".join(self._parts[at:]))


def _frame(column: str, type_name: str, num_rows: int) -> _Frame:
    """Return the frame of a column of num_rows rows.

    Arrow's writer wants the whole column. It is given pages of zeros that take no memory: a private anonymous
    mapping that nothing touches.
    """
    kind = _parse_type(type_name)
    num_bytes = num_rows * kind.row_bytes
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    zeros = pa.py_buffer(mmap.mmap(-1, num_bytes, flags=flags) if num_bytes else b"")
    values = pa.Array.from_buffers(pa.from_numpy_dtype(kind.dtype), num_rows * (kind.width or 1), [None, zeros])
    array = values if kind.width is None else pa.FixedSizeListArray.from_arrays(values, type=kind.arrow)
    sink = _FrameSink(zeros)
    schema = _schema({column: type_name})
    with pa.ipc.new_file(pa.PythonFile(sink, mode="w"), schema) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays([array], schema=schema))
    return sink.frame()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _extent(arrays: list[Any], base: int) -> tuple[int, int]:
    """Return (first, behind the last) byte of the arrays' buffers from address base; (0, 0) without values."""
    buffers = [b for array in arrays for b in array.buffers() if b is not None and b.size]
    if not buffers or len(arrays[0]) == 0:
        return 0, 0
    return min(b.address for b in buffers) - base, max(b.address + b.size for b in buffers) - base


def _describe(path: Path, types: Mapping[str, str], length: int) -> FileEntry:
    with pa.memory_map(str(path)) as source:
        base = source.read_buffer(source.size()).address
        start, end = _extent(pa.ipc.open_file(source).get_batch(0).columns, base)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        frame = frame_digest(mapped, start, end - start)
    return FileEntry(
        bytes=path.stat().st_size,
        sha256=file_sha256(path),
        length=length,
        columns=dict(types),
        data_offset=start,
        data_bytes=end - start,
        frame_sha256=frame,
    )
