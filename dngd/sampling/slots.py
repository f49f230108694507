"""Memory that a sampler process fills and the trainer reads in place: slots, used again and again.

A slot is a memory file (memfd) that both processes map. The trainer names a free slot in its request; the sampler
process lays the batch's arrays out in it, and the trainer views them there: nothing crosses a socket, and after the
first batches no page is new to either side. A slot is free again when the trainer holds no tensor that lies in it.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Spec = tuple[str, list[int]]
"""An array's dtype (torch's name, without `torch.`) and shape."""

_ALIGNMENT = 64
_HEADROOM = 1.25
"""A slot that is too small grows to this many times what is needed, so that batches of like size fit from then on."""
DTYPES = {str(d).removeprefix("torch."): d for d in (torch.int32, torch.int64, torch.float32, torch.float64)}


class SlotPool:
    """The trainer's side: which slots are free, and the arrays that lie in them.

    on_mapped: called with each new mapping, a uint8 tensor of a slot's whole memory (to pin it for a GPU).
    """

    def __init__(self, count: int, on_mapped: Callable[[Tensor], None] | None = None) -> None:
        self.fds: tuple[int, ...] = ()
        self._mapped: dict[int, mmap.mmap] = {}
        self._finalizer: weakref.finalize[..., SlotPool] | None = None
        try:
            for number in range(count):
                self.fds += (os.memfd_create(f"dngd-slot-{number}"),)
        except OSError:
            self.close()
            raise
        self._finalizer = weakref.finalize(self, _close_files, self.fds)
        self._finalizer.atexit = False
        self._free = deque(range(count))
        self._on_mapped = on_mapped

    def acquire(self) -> int | None:
        """Return a free slot and take it, or None."""
        # The one that was in use last: its pages are there already.
        return self._free.pop() if self._free else None

    def read(self, slot: int, specs: Sequence[Spec]) -> list[Tensor]:
        """Return the arrays of a filled slot, where they lie. The slot is free once none of them is referred to."""
        offsets, size = _layout(specs)
        if slot not in self._mapped or len(self._mapped[slot]) < size:
            # Tensors that still view an older, smaller mapping keep it alive themselves.
            mapping = mmap.mmap(self.fds[slot], os.fstat(self.fds[slot]).st_size)
            self._mapped[slot] = mapping
            if self._on_mapped is not None:
                self._on_mapped(torch.frombuffer(mapping, dtype=torch.uint8))
        # A new object a batch: its end is the end of the last tensor that views it.
        base: Any = np.frombuffer(self._mapped[slot], dtype=np.uint8)
        self._free_with(base, slot)
        return _views(torch.from_numpy(base), offsets, specs)

    def _free_with(self, base: Any, slot: int) -> None:
        """Make the slot free when base ends."""
        weakref.finalize(base, self._free.append, slot).atexit = False

    def close(self) -> None:
        """Close the files; arrays that were handed out stay valid."""
        fds, self.fds = self.fds, ()
        if self._finalizer is None:
            _close_files(fds)
        else:
            self._finalizer()
        self._mapped.clear()


class SlotWriter:
    """The sampler process's side. fds: those of the pool, by this process's numbers."""

    def __init__(self, fds: Sequence[int]) -> None:
        self._fds = tuple(fds)
        self._mapped: dict[int, mmap.mmap] = {}

    def lay_out(self, slot: int, specs: Sequence[Spec]) -> list[Tensor]:
        """Return uninitialised arrays of these specs in the slot's memory, which grows if it must."""
        offsets, size = _layout(specs)
        if slot not in self._mapped or len(self._mapped[slot]) < size:
            capacity = max(mmap.PAGESIZE, int(size * _HEADROOM))
            os.ftruncate(self._fds[slot], capacity)
            self._mapped[slot] = mmap.mmap(self._fds[slot], capacity)
        return _views(torch.frombuffer(self._mapped[slot], dtype=torch.uint8), offsets, specs)


def _close_files(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


def spec_of(array: Tensor) -> Spec:
    """Return an array's spec."""
    return dtype_name(array.dtype), list(array.shape)


def dtype_name(dtype: torch.dtype) -> str:
    """Return torch's name of a type, without `torch.`."""
    return str(dtype).removeprefix("torch.")


def _layout(specs: Sequence[Spec]) -> tuple[list[int], int]:
    """Return each array's first byte, and the bytes in all."""
    offsets, end = [], 0
    for dtype, shape in specs:
        offsets.append(end)
        size = DTYPES[dtype].itemsize * torch.Size(shape).numel()
        end += -(-size // _ALIGNMENT) * _ALIGNMENT
    return offsets, end


def _views(base: Tensor, offsets: Sequence[int], specs: Sequence[Spec]) -> list[Tensor]:
    views = []
    for offset, (dtype, shape) in zip(offsets, specs, strict=True):
        size = DTYPES[dtype].itemsize * torch.Size(shape).numel()
        views.append(base[offset : offset + size].view(DTYPES[dtype]).reshape(shape))
    return views
