"""Arrow IPC files of one record batch, written in blocks and read by memory map.

One record batch keeps each column's values contiguous in the file, so that a numpy array or torch
tensor can view them where they lie. This module owns the byte layout; what the columns mean is
`writer.py`'s and `store.py`'s business.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dngd.errors import UserError
from dngd.graph.manifest import REIMPORT, FileEntry

Array = npt.NDArray[Any]

_HASH_BLOCK_BYTES = 1 << 22
# Python names it from 3.11 on; the value is Linux's.
_MAP_NORESERVE: int = getattr(mmap, "MAP_NORESERVE", 0x4000)


def write_columns(path: Path, columns: Mapping[str, Array]) -> FileEntry:
    """Write equally long 1-D arrays (int64, float32, uint8) as one record batch; fsync; return its entry."""
    arrays = [pa.array(np.ascontiguousarray(values)) for values in columns.values()]
    types = {name: str(values.dtype) for name, values in columns.items()}
    length = len(next(iter(columns.values())))
    _write_batch(path, arrays, types)
    _sync(path)
    return _describe(path, types, length)


def write_rows(path: Path, column: str, num_rows: int, width: int, blocks: Iterable[Array]) -> FileEntry:
    """Write a float32 table (num_rows, width) from consecutive row blocks; fsync; return its entry.

    Arrow's writer wants the whole column at once. It is given pages of zeros that take no memory (a
    private anonymous mapping that is only read), then the values are written over them in place, so the
    peak is one block whatever the table's size.
    Raises ValueError if the blocks do not add up to num_rows rows.
    """
    num_bytes = num_rows * width * 4
    types = {column: f"float32[{width}]"}
    zeros = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    values = pa.Array.from_buffers(pa.float32(), num_rows * width, [None, pa.py_buffer(zeros)])
    _write_batch(path, [_fixed_size_list(values, width)], types)
    offset, _ = _data_range(path)
    written = 0
    with path.open("r+b") as file:
        file.seek(offset)
        for block in blocks:
            written += block.nbytes
            if written > num_bytes:
                raise ValueError(f"blocks hold more than the announced {num_rows} rows")
            file.write(np.ascontiguousarray(block, dtype="<f4").data)
        if written != num_bytes:
            raise ValueError(f"blocks hold {written} bytes, expected {num_bytes}")
        file.flush()
        os.fsync(file.fileno())
    return _describe(path, types, num_rows)


def read_columns(path: Path, entry: FileEntry, store: Path) -> dict[str, Array]:
    """Map a file and return its columns as arrays that view it; (rows,) or (rows, width).

    The time is independent of the file's size: only Arrow's header and footer are read and hashed. The
    mapping is private and copy-on-write: unwritten pages are shared between processes, and writing to
    an array changes neither the file nor another process (through a read-only mapping it would be a
    segmentation fault, since torch has no read-only tensors).
    Raises UserError naming the file if it is missing, of another size, or its header is altered.
    """
    fix = REIMPORT.format(path=store)
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


def file_sha256(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """Return the sha256 of a whole file; `progress` is called with the bytes of each block."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
            if progress is not None:
                progress(len(block))
    return digest.hexdigest()


def _columns_of(mapped: mmap.mmap, entry: FileEntry) -> dict[str, Array]:
    buffer = pa.py_buffer(mapped)
    reader = pa.ipc.open_file(pa.BufferReader(buffer))
    if reader.schema != _schema(entry.columns):
        raise ValueError(f"its columns are {dict(zip(reader.schema.names, reader.schema.types))}")
    if reader.num_record_batches != 1:
        raise ValueError(f"it has {reader.num_record_batches} record batches instead of 1")
    batch = reader.get_batch(0)
    if batch.num_rows != entry.length:
        raise ValueError(f"it has {batch.num_rows} rows instead of {entry.length}")
    columns: dict[str, Array] = {}
    for name, array in zip(reader.schema.names, batch.columns):
        dtype, width = _parse_type(entry.columns[name])
        shape = (entry.length,) if width is None else (entry.length, width)
        count = entry.length * (width or 1)
        if count == 0:
            columns[name] = np.empty(shape, dtype=dtype)
            continue
        values = array.buffers()[-1]
        offset = values.address - buffer.address
        end = entry.data_offset + entry.data_bytes
        if array.null_count or not entry.data_offset <= offset <= end - count * dtype.itemsize:
            raise ValueError(f"column {name} lies outside the listed bytes or has nulls")
        columns[name] = np.frombuffer(mapped, dtype=dtype, count=count, offset=offset).reshape(shape)
    return columns


def _parse_type(name: str) -> tuple[np.dtype[Any], int | None]:
    base, _, width = name.partition("[")
    if base not in ("int64", "float32", "uint8"):
        raise ValueError(f"unknown column type {name}")
    return np.dtype(base), int(width.rstrip("]")) if width else None


def _schema(types: Mapping[str, str]) -> Any:
    fields = []
    for name, type_name in types.items():
        dtype, width = _parse_type(type_name)
        arrow = pa.from_numpy_dtype(dtype)
        if width is not None:
            arrow = pa.list_(pa.field("item", arrow, nullable=False), width)
        fields.append(pa.field(name, arrow, nullable=False))
    return pa.schema(fields)


def _fixed_size_list(values: Any, width: int) -> Any:
    item = pa.field("item", values.type, nullable=False)
    return pa.FixedSizeListArray.from_arrays(values, type=pa.list_(item, width))


def _write_batch(path: Path, arrays: list[Any], types: Mapping[str, str]) -> None:
    schema = _schema(types)
    batch = pa.RecordBatch.from_arrays(arrays, schema=schema)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(batch)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _data_range(path: Path) -> tuple[int, int]:
    """Return (offset, bytes) of the values in a written file; (0, 0) without rows."""
    with pa.memory_map(str(path)) as source:
        base = source.read_buffer(source.size()).address
        batch = pa.ipc.open_file(source).get_batch(0)
        if batch.num_rows == 0:
            return 0, 0
        buffers = [column.buffers()[-1] for column in batch.columns]
        start = min(b.address for b in buffers) - base
        end = max(b.address + b.size for b in buffers) - base
    return start, end - start


def _describe(path: Path, types: Mapping[str, str], length: int) -> FileEntry:
    offset, num_bytes = _data_range(path)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        frame = frame_digest(mapped, offset, num_bytes)
    return FileEntry(
        bytes=path.stat().st_size,
        sha256=file_sha256(path),
        length=length,
        columns=dict(types),
        data_offset=offset,
        data_bytes=num_bytes,
        frame_sha256=frame,
    )
