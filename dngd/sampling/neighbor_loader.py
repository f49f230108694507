"""Mini-batches for a training loop of one's own: PyG's `Data` objects, drawn ahead by sampler processes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

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
    graph; other attributes of edges are left out, which is said. 16-bit features of a store come as float32.

    GCNConv normalises by the degrees that it sees, those of the sample, as with PyG's loader.

    A loop that is left in the middle of an epoch begins the next one with the next loop. Workers end with the loader:
    `close()`, a with statement, or nothing that refers to it any more. Raises UserError for arguments that cannot be;
    TrainingError, with the batch's place, if a worker fails, dies or is silent.
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
        self._topology, self._of_nodes, self._of_graph = _opened(graph)
        self._num_nodes = self._topology.indptr.shape[0] - 1
        self._fanouts = check_neighbors(num_neighbors)
        self._seeds = _seeds(input_nodes, self._num_nodes)
        if not 0 <= rank < world_size:
            raise UserError(f"rank={rank} is not one of world_size={world_size}; give 0 to {max(world_size - 1, 0)}")
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size} is too small; give at least 1")
        if num_workers is None:
            num_workers = int(len(os.sched_getaffinity(0)) > 1)
        if num_workers < 0 or prefetch < min(1, num_workers):
            name, value = ("num_workers", num_workers) if num_workers < 0 else ("prefetch", prefetch)
            raise UserError(f"{name}={value} is too small; give at least {min(1, num_workers) if value >= 0 else 0}")
        self.batch_size = batch_size
        self.epoch = 0
        self._shuffle, self._seed, self._prefetch = shuffle, seed, prefetch
        self._num_workers, self._timeout_seconds = num_workers, timeout_seconds
        self._rank, self._world_size = rank, world_size
        self._length = steps_per_epoch(self._seeds.shape[0], world_size, batch_size)
        self._at = (0, 0)

    def __len__(self) -> int:
        """Return the number of an epoch's batches."""
        return self._length

    def __iter__(self) -> Iterator[Data]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        pipeline = self._opened_at(epoch)
        for step in range(self._length):
            mini_batch = next(pipeline)
            self._at = divmod(epoch * self._length + step + 1, self._length)
            yield self._data(mini_batch)

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
        if self._pipeline is not None and self._at == (epoch, 0) and self._pipeline.is_open:
            return self._pipeline
        self.close()
        self._at = (epoch, 0)
        self._pipeline = SamplerPipeline(
            self._topology,
            self._seeds,
            self._fanouts,
            self._seed,
            self._world_size,
            self.batch_size,
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
            rows = table.index_select(0, nodes)
            values[name] = rows.float() if name == "x" and rows.is_floating_point() and self._widens(rows) else rows
        values |= {"edge_index": edge_index, "n_id": nodes, "batch_size": mini_batch.seeds.shape[0]}
        values |= {"num_sampled_nodes": num_nodes, "num_sampled_edges": num_edges}
        if edge_weight is not None:
            values["edge_weight"] = edge_weight
        return Data(num_nodes=nodes.shape[0], **values)

    def _widens(self, rows: Tensor) -> bool:
        return rows.element_size() < 4 and isinstance(self._topology, GraphStore)


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
        return check_fanouts(list(num_neighbors)[::-1])
    except (TypeError, ValueError, UserError):
        raise UserError(
            f"num_neighbors={num_neighbors!r} is not valid; give a number for each hop, nearest to the seeds first, "
            "each at least 1, or -1 for all neighbours"
        ) from None


def _opened(graph: Any) -> tuple[HasTopology, dict[str, Tensor], dict[str, Any]]:
    """Return a graph's edges, what it has of each node by name, and of the graph as a whole."""
    if isinstance(graph, str | Path):
        graph = resolve_dataset(graph)
    if isinstance(graph, GraphStore):
        tables = {"x": graph.features} if graph.num_features else {}
        return graph, {**tables, "y": graph.labels}, {}
    return _in_memory(graph)


def _in_memory(data: Any) -> tuple[Topology, dict[str, Tensor], dict[str, Any]]:
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
    of_nodes, of_graph, left_out = {}, {}, []
    for name, value in data.to_dict().items():
        if name in _OF_BATCH or value is None:
            continue
        if data.is_edge_attr(name):
            left_out.append(name)
        elif isinstance(value, Tensor) and data.is_node_attr(name):
            of_nodes[name] = value.to_dense().cpu() if value.layout != torch.strided else value.cpu()
        else:
            of_graph[name] = value
    if left_out:
        warnings.warn(
            f"batches are without {', '.join(left_out)} of the edges: they have edge_weight alone", stacklevel=4
        )
    edge_weight = None if weight is None else weight.reshape(-1).float().cpu()[order].contiguous()
    return Topology(indptr, source[order].contiguous(), edge_weight), of_nodes, of_graph


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
    nodes = torch.as_tensor(input_nodes).cpu()
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
