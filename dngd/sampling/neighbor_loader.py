"""Mini-batches for a training loop of one's own: PyG's `Data` objects, drawn ahead by sampler processes."""

from __future__ import annotations

import copy
import operator
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dngd.errors import UserError
from dngd.graph import GraphStore, resolve_dataset
from dngd.graph.pyg import arrays_of
from dngd.sampling.minibatch import MiniBatch
from dngd.sampling.pipeline import SamplerPipeline
from dngd.sampling.sampler import check_fanouts
from dngd.sampling.schedule import steps_per_epoch
from dngd.sampling.topology import HasTopology, Topology

if TYPE_CHECKING:
    from torch_geometric.data import Data

_OF_BATCH = ("edge_index", "edge_weight", "num_nodes", "n_id", "batch_size", "num_sampled_nodes", "num_sampled_edges")
"""What a batch has of its own."""


class NeighborLoader:
    """Iterates over an epoch's mini-batches of sampled neighbourhoods, as PyG's NeighborLoader does, without pyg-lib.

    ::

        loader = dngd.NeighborLoader(data, num_neighbors=[15, 10], input_nodes=data.train_mask, batch_size=1024)
        for batch in loader:
            out = model(batch.x, batch.edge_index)[: batch.batch_size]
            loss = F.cross_entropy(out, batch.y[: batch.batch_size])

    graph: a `Data` object, a GraphStore, or what names a graph for `dngd train` (a store's path, `products-mini`, ...).
        A store's features stay on its disk; the edges of a Data object are copied, sorted.
    num_neighbors: how many in-neighbours are drawn at each hop from the seeds, nearest first (PyG's order: the reverse
        of TrainConfig.fanout), without replacement; -1 is all of them.
    input_nodes: bool [N] or int64 [n], distinct: the seeds of an epoch, each once. None: all nodes.
    batch_size: seeds a batch; the last one of an epoch may have fewer.
    shuffle: whether an epoch has them in an order of its own, else as they were given.
    seed: what a batch holds is a function of (seed, epoch, its number, rank) and the graph, on any machine and with any
        number of workers. `epoch` is the number of the next epoch, from 0, and may be set, to go on with a run say.
    num_workers: processes that draw; 0: a thread of this one. None: one process, where there are two CPUs.
    prefetch: batches that each draws ahead.
    rank, world_size: of several processes that train together, each gets its part of every step's
        world_size · batch_size seeds, and all get as many batches; in an epoch's last step some may have no seeds.
    timeout_seconds: the longest wait for a batch.

    A batch is a `Data` with x [num_rows, F], edge_index [2, E] of rows, y, n_id [num_rows] (the rows' nodes in the
    graph), batch_size: the seeds are the first rows, and then those hop by hop (num_sampled_nodes and
    num_sampled_edges, for `trim_to_layer`). A row has the in-edges that were drawn for it, the outermost none. It has
    edge_weight where the graph has, and of a Data object all that has a row a node (masks, say) and what belongs to the
    graph (as it is: the same object in all batches); other attributes of edges are left out, which is said. Of a store
    16-bit features and labels of 0 and 1 come as float32; -1 is no label.

    GCNConv normalises by the degrees that it sees, those of the sample, as with PyG's loader.

    A loop that is left in the middle of an epoch begins the next one with the next loop; two loops at once want a
    loader each. Workers end with the loader: `close()`, a with statement, or nothing that refers to it any more. Raises
    UserError for arguments that cannot be; TrainingError, with the batch's place, if a worker fails, dies or is silent.
    """

    def __init__(
        self,
        graph: Data | GraphStore | str | Path,
        num_neighbors: Sequence[int],
        input_nodes: Tensor | None = None,
        batch_size: int = 1024,
        *,
        shuffle: bool = True,
        seed: int = 0,
        num_workers: int | None = None,
        prefetch: int = 4,
        rank: int = 0,
        world_size: int = 1,
        timeout_seconds: float = 120.0,
    ) -> None:
        self._pipeline: SamplerPipeline | None = None
        self._owner = 0
        self._topology, self._of_nodes, self._of_graph = _opened(graph)
        self._fanouts = check_neighbors(num_neighbors)
        self._seeds = _seeds(input_nodes, self._topology.indptr.shape[0] - 1)
        if num_workers is None:
            num_workers = int(len(os.sched_getaffinity(0)) > 1)
        self._num_workers = _whole("num_workers", num_workers, 0)
        self._prefetch = _whole("prefetch", prefetch, min(1, self._num_workers))
        self._batch_size = _whole("batch_size", batch_size, 1)
        self._world_size = _whole("world_size", world_size, 1)
        self._rank = _whole("rank", rank, 0)
        if self._rank >= self._world_size:
            raise UserError(f"rank={rank} is not one of world_size={world_size}; give 0 to {world_size - 1}")
        if not timeout_seconds > 0:
            raise UserError(f"timeout_seconds={timeout_seconds} is too small; give a time above 0")
        self._seed = _whole("seed", seed, None)
        self._shuffle, self._timeout_seconds = shuffle, timeout_seconds
        self._length = steps_per_epoch(self._seeds.shape[0], self._world_size, self._batch_size)
        self._epoch = 0
        self._at = (0, 0)

    @property
    def batch_size(self) -> int:
        """Seeds a batch."""
        return self._batch_size

    @property
    def epoch(self) -> int:
        """Number of the next epoch."""
        return self._epoch

    @epoch.setter
    def epoch(self, value: int) -> None:
        self._epoch = _whole("epoch", value, 0)

    def __len__(self) -> int:
        """Return the number of an epoch's batches."""
        return self._length

    def __iter__(self) -> Iterator[Data]:
        epoch = self._epoch
        pipeline = self._opened_at(epoch)
        self._epoch = epoch + 1
        for step in range(self._length):
            if self._pipeline is not pipeline:
                raise UserError(
                    "another loop over this NeighborLoader was begun, or it was closed; give each loop that goes on "
                    "beside others a loader of its own"
                )
            mini_batch = next(pipeline)
            self._at = divmod(epoch * self._length + step + 1, self._length)
            yield self._data(mini_batch)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pipeline": None}  # copies begin with workers of their own

    def __enter__(self) -> NeighborLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_pipeline", None) is not None:
            self.close()

    def close(self) -> None:
        """End the workers; a loop begun afterwards starts them again."""
        pipeline, self._pipeline = self._pipeline, None
        if pipeline is not None:
            pipeline.close()

    def _opened_at(self, epoch: int) -> SamplerPipeline:
        """Return the pipeline with an epoch's first batch as its next one."""
        is_own = self._owner == os.getpid()  # a fork has its parent's, whose batches it would take
        if self._pipeline is not None and self._at == (epoch, 0) and self._pipeline.is_open and is_own:
            return self._pipeline
        self.close()
        self._owner = os.getpid()
        self._at = (epoch, 0)
        self._pipeline = SamplerPipeline(
            self._topology,
            self._seeds,
            self._fanouts,
            self._seed,
            self._world_size,
            self._batch_size,
            [self._rank],
            num_samplers=self._num_workers,
            prefetch=self._prefetch,
            start=(epoch, 0),
            timeout_seconds=self._timeout_seconds,
            shuffle=self._shuffle,
            each_once=True,
        )
        return self._pipeline

    def _data(self, mini_batch: MiniBatch) -> Data:
        from torch_geometric.data import Data

        assert mini_batch.nodes is not None
        nodes = mini_batch.nodes.clone()  # a worker's memory is used again
        edge_index, edge_weight, num_nodes, num_edges = _edges(mini_batch)
        values: dict[str, Any] = dict(self._of_graph)
        for name, table in self._of_nodes.items():
            values[name] = _rows(table, nodes, widens=isinstance(self._topology, GraphStore))
        values |= {"edge_index": edge_index, "n_id": nodes, "batch_size": mini_batch.seeds.shape[0]}
        values |= {"num_sampled_nodes": num_nodes, "num_sampled_edges": num_edges}
        if edge_weight is not None:
            values["edge_weight"] = edge_weight
        return Data(num_nodes=nodes.shape[0], **values)


def _rows(table: Tensor | list[Any], nodes: Tensor, *, widens: bool) -> Tensor | list[Any]:
    """Return rows of what a graph has of its nodes. widens: 16-bit features, and labels of 0 and 1, to float32."""
    if isinstance(table, list):
        return [table[node] for node in nodes.tolist()]
    rows = table.index_select(0, nodes)
    is_narrow = rows.dtype in (torch.float16, torch.bfloat16, torch.int8)
    return rows.float() if widens and is_narrow else rows


def _edges(mini_batch: MiniBatch) -> tuple[Tensor, Tensor | None, list[int], list[int]]:
    """Return a batch's edges (source row, destination row), hop by hop from the seeds, their weights, and how many rows
    and edges each hop has."""
    sources, destinations, weights, num_nodes, num_edges = [], [], [], [], []
    known = 0
    for layer in reversed(mini_batch.layers):
        sources.append(layer.indices)
        rows = torch.arange(known, known + layer.num_dst)
        destinations.append(torch.repeat_interleave(rows, layer.indptr.diff()))
        if layer.edge_weight is not None:
            weights.append(layer.edge_weight)
        num_nodes.append(layer.num_dst)
        num_edges.append(layer.num_edges)
        known += layer.num_dst
    num_nodes.append(mini_batch.layers[0].num_src - known)
    edge_index = torch.stack([torch.cat(sources), torch.cat(destinations)])
    return edge_index, torch.cat(weights) if weights else None, num_nodes, num_edges


def check_neighbors(num_neighbors: Sequence[int]) -> tuple[int, ...]:
    """Return fanouts of layers, input side first, of numbers of neighbours, nearest hop first. Raises UserError."""
    try:
        return check_fanouts([operator.index(number) for number in num_neighbors][::-1])
    except (TypeError, ValueError, OverflowError, UserError):
        raise UserError(
            f"num_neighbors={num_neighbors!r} is not valid; give a number for each hop, nearest to the seeds first, "
            "each at least 1, or -1 for all neighbours"
        ) from None


def _whole(name: str, value: Any, least: int | None) -> int:
    """Return an argument as an int. Raises UserError if it is none, or below the least."""
    try:
        number = operator.index(value)
    except TypeError:
        raise UserError(f"{name}={value!r} is no whole number; give one") from None
    if least is not None and number < least:
        raise UserError(f"{name}={number} is too small; give at least {least}")
    return number


def _opened(graph: Any) -> tuple[HasTopology, dict[str, Tensor | list[Any]], dict[str, Any]]:
    """Return a graph's edges, what it has of each node by name, and of the graph as a whole."""
    if isinstance(graph, str | Path):
        graph = resolve_dataset(graph)
    if isinstance(graph, GraphStore):
        tables: dict[str, Tensor | list[Any]] = {"x": graph.features} if graph.num_features else {}
        return graph, tables | {"y": graph.labels}, {}
    return _in_memory(graph)


def _in_memory(data: Any) -> tuple[Topology, dict[str, Tensor | list[Any]], dict[str, Any]]:
    if not hasattr(data, "is_node_attr") or not hasattr(data, "to_dict"):
        raise UserError(
            f"the graph is a {type(data).__name__}; give a torch_geometric.data.Data (of a dataset dataset[0]), a "
            "GraphStore, or the path of one"
        )
    arrays = arrays_of(data, "the graph")
    num_nodes = arrays.num_nodes
    source, target = (_ends(ends, num_nodes) for ends in (arrays.source, arrays.destination))
    order = torch.argsort(target * num_nodes + source, stable=True)
    indptr = torch.zeros(num_nodes + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(target, minlength=num_nodes), 0, out=indptr[1:])
    weight = arrays.edge_weight
    if weight is not None and weight.numel() != order.numel():
        raise UserError(
            f"edge_weight of the graph has {weight.numel()} entries for {order.numel()} edges; give one each"
        )
    if weight is not None and weight.requires_grad:
        warnings.warn("edge_weight requires a gradient, which batches do not pass on", stacklevel=4)
    counted = copy.copy(data)
    counted.num_nodes = num_nodes  # PyG's own count, where there is no x, is what edges name
    of_nodes: dict[str, Tensor | list[Any]] = {}
    of_graph: dict[str, Any] = {}
    left_out = []
    for name, value in data.to_dict().items():
        if name in _OF_BATCH or value is None:
            continue
        if counted.is_edge_attr(name) or "index" in name:
            left_out.append(name)
        elif counted.is_node_attr(name) or (isinstance(value, np.ndarray) and value.shape[:1] == (num_nodes,)):
            of_nodes[name] = _table(value)
        else:
            of_graph[name] = value
    if left_out:
        what = "which are of the edges, or numbers of nodes in the graph"
        warnings.warn(f"batches are without {', '.join(left_out)}, {what}", stacklevel=4)
    if data.to_dict().get("n_id") is not None:
        warnings.warn("the graph has an n_id: that of batches is the rows' numbers in this graph", stacklevel=4)
    edge_weight = None if weight is None else weight.detach().reshape(-1).float().cpu()[order].contiguous()
    return Topology(indptr, source[order].contiguous(), edge_weight), of_nodes, of_graph


def _table(value: Any) -> Tensor | list[Any]:
    """Return what a graph has of its nodes as a tensor on the CPU, or a list of what no tensor holds."""
    if not isinstance(value, Tensor):
        try:
            value = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError):
            return list(value)
    if value.requires_grad:
        warnings.warn(
            "a table of the graph's nodes requires a gradient, which batches do not pass on; look rows of an embedding "
            "up by batch.n_id",
            stacklevel=5,
        )
    table: Tensor = value.detach().cpu()
    return table if table.layout == torch.strided else table.to_dense()


def _ends(nodes: Tensor, num_nodes: int) -> Tensor:
    """Return the edges' nodes as int64 on the CPU. Raises UserError for what are none of the graph's."""
    if nodes.layout != torch.strided or nodes.is_floating_point() or nodes.dtype == torch.bool:
        raise UserError(
            f"edge_index of the graph is {str(nodes.dtype).removeprefix('torch.')}; give whole numbers, dense"
        )
    nodes = nodes.cpu().long()
    if nodes.numel() and not 0 <= int(nodes.min()) <= int(nodes.max()) < num_nodes:
        wrong = int(nodes.min()) if int(nodes.min()) < 0 else int(nodes.max())
        raise UserError(f"edge_index of the graph names node {wrong}, and its nodes are 0 to {num_nodes - 1}")
    return nodes


def _seeds(input_nodes: Any, num_nodes: int) -> Tensor:
    """Return the seeds' numbers, int64 [n]. Raises UserError for what names none, or others than the graph has."""
    if input_nodes is None:
        return torch.arange(num_nodes)
    try:
        nodes = torch.as_tensor(input_nodes).cpu()
    except (TypeError, ValueError, RuntimeError):
        raise UserError(
            f"input_nodes is a {type(input_nodes).__name__}; give numbers of nodes, or a mask, as a tensor"
        ) from None
    if nodes.dtype == torch.uint8 and nodes.shape == (num_nodes,):
        raise UserError("input_nodes is uint8; give a mask as mask.bool(), or numbers of nodes as int64")
    if nodes.dtype == torch.bool:
        if nodes.shape != (num_nodes,):
            raise UserError(
                f"input_nodes is a mask of shape {list(nodes.shape)}, and the graph has {num_nodes} nodes; give one "
                "entry a node"
            )
        nodes = nodes.nonzero()[:, 0]
    if nodes.dim() != 1 or nodes.is_floating_point():
        raise UserError(
            f"input_nodes is {str(nodes.dtype).removeprefix('torch.')} of shape {list(nodes.shape)}; give numbers of "
            "nodes, or a mask"
        )
    if not nodes.numel():
        raise UserError("input_nodes names no node; give at least one")
    first, last = int(nodes.min()), int(nodes.max())
    if first < 0 or last >= num_nodes:
        wrong = first if first < 0 else last
        raise UserError(f"input_nodes names node {wrong}, and the graph's are 0 to {num_nodes - 1}")
    nodes = nodes.long()
    if torch.unique(nodes).shape != nodes.shape:
        raise UserError("input_nodes names a node more than once; remove the duplicates (torch.unique)")
    return nodes
