"""Sorting more 64-bit keys than memory should hold, with a weight beside each key if there are weights.

Keys are collected in a buffer; a full buffer is sorted and appended to a temporary file as a run. In the end the
runs are read together, one range of keys after another, each small enough to be sorted in memory. Ranges are cut
between different keys, wherever the keys lie: a range may be part of one node's edges.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dngd.graph.arrow_files import write_all

Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]
Chunk = tuple[Int64Array, Float32Array | None]

_KEY_BYTES, _WEIGHT_BYTES = 8, 4
_LEAST_BYTES, _MOST_BYTES = 1 << 22, 1 << 28
"""Of the keys in one buffer or range, if the caller sets no limit; between them an eighth of all keys so far."""
_SHARE = 8
_WORKING_COPIES = 5
"""How many times a range's keys are in memory while it is worked on, at most."""
_SAMPLE_PERIOD = 4096
_PIECE_KEYS = 1 << 18
_FEW_RUNS = 16


class KeySort:
    """Sorts keys (int64, not negative) that are added in blocks of any size; a context, which ends its files."""

    def __init__(
        self, folder: Path, *, weighted: bool = False, distinct: bool = False, memory_bytes: int | None = None
    ) -> None:
        """folder: where the temporary files go (they have no name, so that a killed process leaves none).

        distinct: of equal keys (with equal weights) one is enough, so that copies may be left out early.
        memory_bytes: limit of the working memory, roughly; None: an eighth of the keys, 4 to 256 MiB, some times.
        """
        self._folder, self._weighted, self._distinct = folder, weighted, distinct
        self._limit = None if memory_bytes is None else max(memory_bytes // (_WORKING_COPIES * _KEY_BYTES), 1)
        self._spilled = _Runs(folder, weighted)
        self._keys: Int64Array | None = None
        self._weights: Float32Array | None = None
        self._filled = 0

    def __enter__(self) -> KeySort:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give memory and disk back."""
        self._spilled.close()
        self._keys = self._weights = None
        self._filled = 0

    @property
    def num_kept(self) -> int:
        """Number of keys that `chunks` will give: those added less copies left out early."""
        return self._spilled.num_keys + self._filled

    def add(self, keys: Int64Array, weights: Float32Array | None = None) -> None:
        """Add keys [n], and weights [n] if weighted."""
        start = 0
        while start < len(keys):
            buffer = self._buffer()
            count = min(len(keys) - start, len(buffer) - self._filled)
            part = slice(self._filled, self._filled + count)
            buffer[part] = keys[start : start + count]
            if self._weights is not None and weights is not None:
                self._weights[part] = weights[start : start + count]
            self._filled += count
            start += count
            if self._filled == len(buffer):
                self._sort_buffer()
                # Copies may have made enough room; a buffer nearly full again would be sorted for little.
                if 2 * self._filled > len(buffer):
                    self._spill()

    def chunks(self) -> Iterator[Chunk]:
        """Yield all keys in ascending order, with their weights ascending among equal keys, in arrays of their own.

        Equal keys are never parted; with distinct=True some copies may still be there. Can be called again, also
        after more keys were added.
        """
        self._sort_buffer()
        if not self._spilled.runs:
            if self._filled and self._keys is not None:
                weights = None if self._weights is None else self._weights[: self._filled].copy()
                yield self._keys[: self._filled].copy(), weights
            return
        if self._filled:
            self._spill()
        self._keys = self._weights = None
        yield from self._spilled.chunks(self._capacity())

    def merge(self) -> int:
        """Make one run of all keys, without copies if distinct; return their number.

        When a few more keys are added then, `chunks` costs little more than reading.
        """
        merged = _Runs(self._folder, self._weighted)
        try:
            merged.begin(self._period())
            for keys, weights in self.chunks():
                if self._distinct:
                    num_kept = keep_only(_first_of_pairs(keys, weights), keys, weights)
                    keys, weights = keys[:num_kept], None if weights is None else weights[:num_kept]
                merged.append(keys, weights)
        except BaseException:
            merged.close()
            raise
        self.close()
        self._spilled = merged
        return merged.num_keys

    def _capacity(self) -> int:
        if self._limit is not None:
            return self._limit
        size = max(_LEAST_BYTES, min(self._spilled.num_keys * _KEY_BYTES // _SHARE, _MOST_BYTES))
        return size // _KEY_BYTES

    def _period(self) -> int:
        return min(max(self._capacity() // 64, 1), _SAMPLE_PERIOD)

    def _buffer(self) -> Int64Array:
        capacity = self._capacity()
        if self._keys is None or (not self._filled and len(self._keys) != capacity):
            # Freed first; and pages of an array that nothing was written to take no memory.
            self._keys = self._weights = None
            self._keys = np.empty(capacity, dtype=np.int64)
            if self._weighted:
                self._weights = np.empty(capacity, dtype=np.float32)
        return self._keys

    def _sort_buffer(self) -> None:
        if self._keys is None or not self._filled:
            return
        keys, weights = self._keys[: self._filled], None if self._weights is None else self._weights[: self._filled]
        sort_pairs(keys, weights)
        if self._distinct:
            self._filled = keep_only(_first_of_pairs(keys, weights), keys, weights)

    def _spill(self) -> None:
        """Write the sorted buffer as a run."""
        assert self._keys is not None
        self._spilled.begin(self._period())
        weights = None if self._weights is None else self._weights[: self._filled]
        self._spilled.append(self._keys[: self._filled], weights)
        self._filled = 0


class _Runs:
    """Sorted runs in temporary files."""

    def __init__(self, folder: Path, weighted: bool) -> None:
        self._folder, self._weighted = folder, weighted
        self._files: list[Any] = []
        self._opened = ExitStack()
        self.runs: list[_Run] = []
        self.num_keys = 0

    def close(self) -> None:
        self._opened.close()
        self._files, self.runs, self.num_keys = [], [], 0

    def begin(self, period: int) -> None:
        """Begin a run; period: of its samples."""
        while len(self._files) < 1 + self._weighted:
            file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115  (the stack closes it)
            self._files.append(self._opened.enter_context(file))
        self.runs.append(_Run(self.num_keys, period))

    def append(self, keys: Int64Array, weights: Float32Array | None) -> None:
        """Write sorted keys, beyond all before them, to the last run."""
        write_all(self._files[0], keys.view(np.uint8).data)
        if weights is not None:
            write_all(self._files[1], weights.view(np.uint8).data)
        run = self.runs[-1]
        run.samples = np.concatenate([run.samples, keys[-run.length % run.period :: run.period]])
        run.length += len(keys)
        self.num_keys += len(keys)

    def chunks(self, capacity: int) -> Iterator[Chunk]:
        for starts, stops in self._ranges(capacity):
            yield self._read(starts, stops)

    def _ranges(self, capacity: int) -> Iterator[tuple[list[int], list[int]]]:
        """Yield for each range the first position and the one behind the last in each run."""
        samples = np.concatenate([run.samples for run in self.runs])
        counts = np.concatenate([np.full(len(run.samples), run.period) for run in self.runs])
        order = np.argsort(samples, kind="stable")
        samples, reached = samples[order], np.cumsum(counts[order])
        starts, end = [0] * len(self.runs), 0
        while True:
            # A sample stands for the keys up to the next one of its run: no more than reached[at - 1] are below it.
            at = int(np.searchsorted(reached, sum(starts) + capacity, side="right"))
            at = max(at, int(np.searchsorted(samples, end, side="left")))
            if at == len(samples):
                break
            end = int(samples[at])
            stops = [self._position(run, end) for run in self.runs]
            if stops == starts:
                # Copies of one key fill the range: take them all.
                end += 1
                stops = [self._position(run, end) for run in self.runs]
            yield starts, stops
            starts = stops
        stops = [run.length for run in self.runs]
        if stops != starts:
            yield starts, stops

    def _position(self, run: _Run, key: int) -> int:
        """Return the number of the run's keys below `key`."""
        block = int(np.searchsorted(run.samples, key, side="left"))
        if block == 0:
            return 0
        start = (block - 1) * run.period
        keys = np.empty(min(run.period, run.length - start), dtype=np.int64)
        _read_at(self._files[0], keys, run.offset + start)
        return start + int(np.searchsorted(keys, key, side="left"))

    def _read(self, starts: list[int], stops: list[int]) -> Chunk:
        total = sum(stops) - sum(starts)
        keys = np.empty(total, dtype=np.int64)
        weights = np.empty(total, dtype=np.float32) if self._weighted else None
        at = 0
        for run, start, stop in zip(self.runs, starts, stops):
            part = slice(at, at + stop - start)
            _read_at(self._files[0], keys[part], run.offset + start)
            if weights is not None:
                _read_at(self._files[1], weights[part], run.offset + start)
            at = part.stop
        sort_pairs(keys, weights, num_runs=len(self.runs))
        return keys, weights


@dataclass
class _Run:
    """A sorted part of the files. samples: every period-th of its keys."""

    offset: int
    period: int
    length: int = 0
    samples: Int64Array = field(default_factory=lambda: np.empty(0, dtype=np.int64))


def sort_pairs(keys: Int64Array, weights: Float32Array | None, num_runs: int | None = None) -> None:
    """Sort keys in place, and weights along with them; equal keys by their weights.

    num_runs: how many sorted runs the keys are made of, if they are; a few are merged rather than sorted.
    """
    if weights is None:
        keys.sort(kind="stable" if num_runs is not None and num_runs <= _FEW_RUNS else None)
        return
    if len(keys) < 2:
        return
    # Sorting numbers is many times faster than sorting their positions: each number is a key, without its last
    # bits if there is no room for them, and its position.
    low, position_bits = int(keys.min()), (len(keys) - 1).bit_length()
    dropped_bits = max((int(keys.max()) - low).bit_length() + position_bits - 63, 0)
    packed = keys - low
    packed >>= dropped_bits
    packed <<= position_bits
    packed |= np.arange(len(keys))
    packed.sort()
    order = packed & ((1 << position_bits) - 1)
    packed >>= position_bits
    same = packed[1:] == packed[:-1]
    del packed
    keys[:] = keys[order]
    weights[:] = weights[order]
    if same.any():
        among = np.zeros(len(keys), dtype=np.bool_)
        among[1:] = same
        among[:-1] |= same
        at = np.flatnonzero(among)
        right = at[np.lexsort((weights[at], keys[at]))]
        keys[at], weights[at] = keys[right], weights[right]


def first_of_equal(keys: Int64Array) -> npt.NDArray[np.bool_]:
    """Return for sorted keys where a key differs from the one before it; the first does."""
    first = np.ones(len(keys), dtype=np.bool_)
    np.not_equal(keys[1:], keys[:-1], out=first[1:])
    return first


def _first_of_pairs(keys: Int64Array, weights: Float32Array | None) -> npt.NDArray[np.bool_]:
    first = first_of_equal(keys)
    if weights is not None:
        first[1:] |= weights[1:] != weights[:-1]
    return first


def keep_only(kept: npt.NDArray[np.bool_], *arrays: npt.NDArray[Any] | None) -> int:
    """Move the kept entries of each array to its front, in place; return their number."""
    total = int(np.count_nonzero(kept))
    if total == len(kept):
        return total
    at = 0
    for start in range(0, len(kept), _PIECE_KEYS):
        mask = kept[start : start + _PIECE_KEYS]
        count = int(np.count_nonzero(mask))
        for array in arrays:
            if array is not None:
                array[at : at + count] = array[start : start + _PIECE_KEYS][mask]
        at += count
    return total


def _read_at(file: Any, into: npt.NDArray[Any], position: int) -> None:
    """Fill an array from the file, from its entry number `position`."""
    view = into.view(np.uint8).data
    offset = position * into.itemsize
    while len(view):
        count = os.preadv(file.fileno(), [view], offset)
        if count == 0:
            raise OSError(f"a temporary file of the edges ends at byte {offset}")
        view, offset = view[count:], offset + count
