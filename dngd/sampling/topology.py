"""The part of a graph that sampling reads, and how a sampler process gets to see the same bytes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

_DTYPES = {"indptr": torch.int64, "indices": torch.int64, "edge_weight": torch.float32}


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
    """A graph in memory. indptr: int64 [N + 1]; indices: int64 [E]; edge_weight: float32 [E] or None."""

    indptr: Tensor
    indices: Tensor
    edge_weight: Tensor | None = None


class SharedTopology:
    """What a child process needs to open a graph: its store's path, or open files that hold a copy.

    description: for open_topology in the child. fds: to be inherited by the child.
    """

    def __init__(self, graph: HasTopology) -> None:
        path = getattr(graph, "path", None)
        self.fds: tuple[int, ...] = ()
        if path is not None:
            self.description: dict[str, Any] = {"store": str(Path(path).absolute())}
            return
        arrays = {name: array for name in _DTYPES if (array := getattr(graph, name)) is not None and array.numel()}
        files = {name: _memory_file(name, array) for name, array in arrays.items()}
        self.fds = tuple(files.values())
        self.description = {"files": {name: [files[name], arrays[name].numel()] for name in arrays}}

    def close(self) -> None:
        """Close this process's files; children that inherited them keep the memory."""
        fds, self.fds = self.fds, ()
        for fd in fds:
            os.close(fd)


def open_store(path: str | Path) -> HasTopology:
    """Open a graph store by memory map. Raises UserError where it is none."""
    from dngd.graph.store import GraphStore

    store: HasTopology = GraphStore.open(path)
    return store


def open_topology(description: dict[str, Any]) -> HasTopology:
    """Open what a SharedTopology describes, in the process that inherited its files; nothing is copied."""
    if "store" in description:
        return open_store(description["store"])
    arrays = {name: _map_file(fd, size, _DTYPES[name]) for name, (fd, size) in description["files"].items()}
    return Topology(
        arrays["indptr"], arrays.get("indices", torch.empty(0, dtype=torch.int64)), arrays.get("edge_weight")
    )


def _memory_file(name: str, array: Tensor) -> int:
    fd = os.memfd_create(f"dngd-{name}")
    content: Any = array.contiguous().numpy()
    view = memoryview(content).cast("B")
    while view.nbytes:
        view = view[os.write(fd, view) :]
    return fd


def _map_file(fd: int, size: int, dtype: torch.dtype) -> Tensor:
    return torch.from_file(f"/proc/self/fd/{fd}", shared=False, size=size, dtype=dtype)
