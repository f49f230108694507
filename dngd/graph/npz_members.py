"""Arrays of an `.npz` file, read in blocks: no array is in memory as a whole unless it is asked for whole.

Pickled arrays are never loaded. Every read ends at the member's end, so that the zip file's checksum is compared.
"""

from __future__ import annotations

import errno
import os
import struct
import tempfile
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from dngd.errors import UserError

Array = npt.NDArray[Any]

_BLOCK_BYTES = 1 << 24
_SUFFIX = ".npy"
# What zipfile, zlib and numpy raise for damaged content; RuntimeError for encrypted or unknown compression.
_READ_ERRORS = (
    ValueError,
    OSError,
    EOFError,
    KeyError,
    OverflowError,
    RuntimeError,
    SyntaxError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)


@dataclass(frozen=True)
class ArrayHeader:
    """What a member says of its array."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=object)) * self.dtype.itemsize


class NpzMembers:
    """An open `.npz` file. A context.

    Raises UserError, naming the file and the array, if one is missing, pickled, truncated or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise UserError(f"{path} is not a file; give the path of an .npz file")
        try:
            with path.open("rb") as file:
                if file.read(6) == np.lib.format.MAGIC_PREFIX:
                    raise UserError(f"{path} holds a single array; save the graph's arrays by numpy.savez")
                file.seek(0)
                if file.read(2) != b"PK":
                    raise UserError(f"{path} is no npz file; save the graph's arrays by numpy.savez")
            self._zip = zipfile.ZipFile(path)
        except _READ_ERRORS as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{path} cannot be read ({error}); the file is truncated or damaged: fetch it again"
            ) from error
        self.names = [name.removesuffix(_SUFFIX) for name in self._zip.namelist() if name.endswith(_SUFFIX)]

    def __enter__(self) -> NpzMembers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._zip.close()

    def header(self, name: str) -> ArrayHeader:
        """Return what the member says of its array; its values are not read."""
        with self._named(name), self._zip.open(name + _SUFFIX) as file:
            return _header(file)

    def read(self, name: str) -> Array:
        """Return a whole array."""
        with self._named(name), self._zip.open(name + _SUFFIX) as file:
            header = _header(file)
            data = _read(file, header.nbytes)
            _expect_end(file)
            # A copy, since frombuffer's arrays cannot be written to.
            values = np.frombuffer(data, dtype=header.dtype).copy()
            return values.reshape(header.shape, order="F" if header.fortran else "C")

    def rows(self, name: str, scratch: Path) -> Iterator[Array]:
        """Yield blocks of consecutive rows of a 2-D array.

        scratch: a folder for a copy, needed only if the array is stored column by column.
        """
        with self._named(name), self._zip.open(name + _SUFFIX) as file:
            header = _header(file)
            num_rows, width = header.shape
            rows = max(1, _BLOCK_BYTES // max(width * header.dtype.itemsize, 1))
            if header.fortran and width > 1:
                yield from _rows_across(file, header, rows, scratch)
            else:
                for start in range(0, num_rows, rows):
                    count = min(rows, num_rows - start)
                    data = _read(file, count * width * header.dtype.itemsize)
                    yield np.frombuffer(data, dtype=header.dtype).reshape(count, width)
            _expect_end(file)

    def values(self, name: str, lengths: Iterator[int]) -> Iterator[Array]:
        """Yield consecutive pieces, of the given lengths, of a 1-D array that they add up to."""
        with self._named(name), self._zip.open(name + _SUFFIX) as file:
            header = _header(file)
            for length in lengths:
                yield np.frombuffer(_read(file, length * header.dtype.itemsize), dtype=header.dtype)
            _expect_end(file)

    def pair_lengths(self, name: str) -> Iterator[int]:
        """Yield the number of entries in each block of `pairs`."""
        header = self.header(name)
        block = _BLOCK_BYTES // (2 * header.dtype.itemsize)
        for start in range(0, header.shape[1], block):
            yield min(block, header.shape[1] - start)

    def pairs(self, name: str) -> Iterator[tuple[Array, Array]]:
        """Yield (row 0, row 1) of an array of shape (2, entries), in blocks of entries."""
        header = self.header(name)
        size = header.dtype.itemsize
        with self._named(name), self._zip.open(name + _SUFFIX) as first:
            _header(first)
            if header.fortran:
                for count in self.pair_lengths(name):
                    both = np.frombuffer(_read(first, 2 * count * size), dtype=header.dtype).reshape(count, 2)
                    yield both[:, 0], both[:, 1]
                _expect_end(first)
                return
            # The second row lies behind all of the first: a second reader goes there.
            with self._zip.open(name + _SUFFIX) as second:
                _header(second)
                for count in self.pair_lengths(name):
                    _read(second, count * size)
                for count in self.pair_lengths(name):
                    ends = [np.frombuffer(_read(file, count * size), dtype=header.dtype) for file in (first, second)]
                    yield ends[0], ends[1]
                _expect_end(second)

    @contextmanager
    def _named(self, name: str) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except _Pickled:
            raise UserError(
                f"array {name!r} of {self.path} is pickled, which is never loaded because it could run code; save it "
                "as plain numbers (not dtype object) by numpy.savez"
            ) from None
        except _READ_ERRORS as error:
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise
            raise UserError(
                f"array {name!r} of {self.path} cannot be read ({error}); the file is truncated or damaged: fetch it "
                "again"
            ) from error


class _Pickled(Exception):
    """The array holds Python objects."""


def _header(file: IO[bytes]) -> ArrayHeader:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise ValueError(f"version {version} of numpy's format")
    if dtype.hasobject:
        raise _Pickled
    if dtype.itemsize == 0 or any(size < 0 for size in shape):
        raise ValueError(f"shape {shape} of {dtype}")
    return ArrayHeader(tuple(int(size) for size in shape), dtype, bool(fortran))


def _read(file: IO[bytes], num_bytes: int) -> bytes:
    data = file.read(num_bytes)
    if len(data) != num_bytes:
        raise EOFError(f"{len(data)} bytes where {num_bytes} are announced")
    return data


def _expect_end(file: IO[bytes]) -> None:
    if file.read(1):
        raise ValueError("more bytes than its header announces")


def _rows_across(file: IO[bytes], header: ArrayHeader, rows: int, scratch: Path) -> Iterator[Array]:
    """Yield row blocks of an array that is stored column by column, from a copy of it on the disk."""
    num_rows, width = header.shape
    size = header.dtype.itemsize
    with tempfile.TemporaryFile(dir=scratch) as copy:
        for start in range(0, header.nbytes, _BLOCK_BYTES):
            copy.write(_read(file, min(_BLOCK_BYTES, header.nbytes - start)))
        copy.flush()
        for start in range(0, num_rows, rows):
            count = min(rows, num_rows - start)
            block = np.empty((count, width), dtype=header.dtype)
            for k in range(width):
                data = os.pread(copy.fileno(), count * size, (k * num_rows + start) * size)
                block[:, k] = np.frombuffer(data, dtype=header.dtype)
            yield block
