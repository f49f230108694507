"""The part of a graph that sampling reads, and how a sampler process gets to see the same bytes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

_EDGE_NAMES = ("indptr", "indices", "edge_weight")
_NAMES = (*_EDGE_NAMES, "features")


class HasTopology(Protocol):
    """A graph in CSC form; `dngd.GraphStore` is one, and so is Topology."""

    @property
    def indptr(self) -> Tensor: ...
    @property
    def indices(self) -> Tensor: ...
    @property
    def edge_weight(self) -> Tensor | None: ...


@dataclass(frozen=True)
class Topology:
    """A graph in memory. indptr: int64 [N + 1]; indices: int64 [E]; edge_weight: float32 [E] or None.

    features: [N, F], or None where nobody asks for the first layer's rows.
    """

    indptr: Tensor
    indices: Tensor
    edge_weight: Tensor | None = None
    features: Tensor | None = None


class SharedTopology:
    """What a child process needs to open a graph: its store's path, or open files that hold copies of what it has not.

    extra: further arrays by name, which the child gets as they are. description: for open_shared in the child.
    fds: for the child.
    """

    def __init__(self, graph: HasTopology, extra: Mapping[str, Tensor] | None = None) -> None:
        path = getattr(graph, "path", None)
        arrays = dict(extra or {})
        self.description: dict[str, Any] = {}
        own: tuple[str, ...] = _NAMES
        if path is not None:
            self.description["store"] = [str(Path(path).absolute()), getattr(graph, "digest", None)]
            own = _EDGE_NAMES if getattr(graph, "has_own_edges", False) else ()
        arrays |= {name: array for name in own if (array := getattr(graph, name, None)) is not None}
        self.fds: tuple[int, ...] = ()
        try:
            described = {}
            for name, array in arrays.items():
                fd = _memory_file(name, array)
                self.fds += (fd,)
                described[name] = [fd, str(array.dtype).removeprefix("torch."), list(array.shape)]
        except BaseException:
            self.close()
            raise
        self.description["arrays"] = described

    def close(self) -> None:
        """Close this process's files; children that were given them keep the memory."""
        fds, self.fds = self.fds, ()
        for fd in fds:
            os.close(fd)


def open_store(path: str | Path, digest: str | None = None) -> HasTopology:
    """Open a graph store by memory map. Raises UserError where it is none, or not the graph of the digest."""
    from dngd.graph.store import GraphStore

    store: HasTopology = GraphStore.open(path) if digest is None else GraphStore.reopen(path, digest)
    return store


def open_shared(description: dict[str, Any], files: Mapping[int, int]) -> tuple[HasTopology, dict[str, Tensor]]:
    """Open what a SharedTopology describes, in a process that was given its files: the graph, the extra arrays.

    files: this process's numbers of those files, by the other's. Nothing is copied.
    """
    arrays = {name: _map_file(files[fd], *spec) for name, (fd, *spec) in description["arrays"].items()}
    own = {name: arrays.pop(name) for name in _NAMES if name in arrays}
    if "store" in description:
        store = open_store(*description["store"])
        if not own:
            return store, arrays
        own["features"] = store.features  # type: ignore[attr-defined]  # a GraphStore
    return Topology(**own), arrays


def _memory_file(name: str, array: Tensor) -> int:
    fd = os.memfd_create(f"dngd-{name}")
    # numpy has no bfloat16: bytes it is.
    content: Any = array.contiguous().view(-1).view(torch.uint8).numpy()
    view = memoryview(content)
    while view.nbytes:
        view = view[os.write(fd, view) :]
    return fd


def _map_file(fd: int, dtype_name: str, shape: list[int]) -> Tensor:
    dtype: torch.dtype = getattr(torch, dtype_name)
    size = torch.Size(shape).numel()
    if size == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.from_file(f"/proc/self/fd/{fd}", shared=False, size=size, dtype=dtype).view(shape)
