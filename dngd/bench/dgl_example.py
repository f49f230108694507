"""DGL's own way to train on ogbn-products, as its examples and guides have it: what dngd is measured against.

The loader, the model and the step are those of DGL's `examples/pytorch/graphsage/node_classification.py` (fanout
15,10,5, batch 1024, hidden 256, Adam): `dgl.dataloading.DataLoader` over a `NeighborSampler`, features through
`prefetch_node_feats`, as that file does, or as `x[input_nodes]`, as DGL's older ones do; `enable_cpu_affinity` is
from its "CPU best practices". The tuned variant is the same loop with one thing of ours: a gather buffer that is kept.

Two liberties, neither of which costs DGL time: seeds come in dngd's order (shuffled too), so that all contenders see
the same ones, and the graph is kept in the one format that sampling reads, which saves its workers' memory. GraphBolt,
DGL's newer loader, takes no part: its compiled library exists for torch up to 2.2.1 only.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dngd.graph import GraphStore
from dngd.models import Aggregation
from dngd.sampling import epoch_permutation, import_dgl

Gather = Literal["index", "prefetch", "kept"]
"""How rows are gathered: x[input_nodes], prefetch_node_feats, or into a kept buffer."""

LEARNING_RATE, WEIGHT_DECAY = 1e-3, 5e-4


@dataclass(frozen=True)
class LoaderOptions:
    """num_workers: of the DataLoader. affinity: whether its workers and this process get CPUs of their own."""

    fanouts: Sequence[int]
    batch_size: int
    num_workers: int
    gather: Gather
    affinity: bool
    threads: int
    seed: int
    num_batches: int
    """How many will be asked for."""


class DGLBatches:
    """DGL's DataLoader on a store's graph, which is not copied."""

    def __init__(self, store: GraphStore, train_nodes: Tensor, options: LoaderOptions) -> None:
        dgl = import_dgl()
        torch.set_num_threads(options.threads)
        dgl.utils.set_num_threads(options.threads)
        dgl.seed(options.seed)
        torch.manual_seed(options.seed)
        no_edge_ids = torch.empty(0, dtype=torch.int64)
        graph = dgl.graph(("csc", (store.indptr, store.indices, no_edge_ids)), num_nodes=store.num_nodes).formats("csc")
        graph.ndata["feat"] = store.features
        graph.ndata["label"] = store.labels
        self.graph: Any = graph
        self.gather = options.gather
        prefetched = {"prefetch_node_feats": ["feat"], "prefetch_labels": ["label"]}
        sampler = dgl.dataloading.NeighborSampler(
            list(options.fanouts), **(prefetched if options.gather == "prefetch" else {})
        )
        self._stack = ExitStack()
        # DGL advises cpu affinity at every start; here that is a contender of its own.
        self._stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        loader = dgl.dataloading.DataLoader(
            graph,
            seeds_in_order(train_nodes, options),
            sampler,
            batch_size=options.batch_size,
            shuffle=False,
            drop_last=True,
            num_workers=options.num_workers,
        )
        if options.affinity:
            self._stack.enter_context(loader.enable_cpu_affinity(verbose=False))
        self._batches: Iterator[Any] = iter(loader)
        self._buffer = GatherBuffer(store.features)

    def next(self) -> tuple[Tensor, Tensor, Any]:
        """Return (input nodes, seeds, blocks)."""
        input_nodes, seeds, blocks = next(self._batches)
        return input_nodes, seeds, blocks

    def features(self, input_nodes: Tensor, blocks: Any) -> Tensor:
        """Return the input nodes' rows."""
        if self.gather == "prefetch":
            rows: Tensor = blocks[0].srcdata["feat"]
        elif self.gather == "kept":
            rows = self._buffer.rows(input_nodes)
        else:
            rows = self.graph.ndata["feat"][input_nodes]
        return rows

    def labels(self, seeds: Tensor, blocks: Any) -> Tensor:
        """Return the seeds' labels."""
        labels: Tensor = blocks[-1].dstdata["label"] if self.gather == "prefetch" else self.graph.ndata["label"][seeds]
        return labels


class GatherBuffer:
    """Gathers rows of a table into memory that is kept from batch to batch: no page of it is new to the process."""

    def __init__(self, table: Tensor) -> None:
        self._table = table
        self._rows = table.new_empty(0, table.shape[1])

    def rows(self, nodes: Tensor) -> Tensor:
        """Return table[nodes], valid until the next call."""
        size = nodes.shape[0]
        if self._rows.shape[0] < size:
            self._rows = self._table.new_empty(size + size // 4, self._table.shape[1])
        out = self._rows[:size]
        torch.index_select(self._table, 0, nodes, out=out)
        return out


def seeds_in_order(train_nodes: Tensor, options: LoaderOptions) -> Tensor:
    """Return the seeds of num_batches whole batches, epoch by epoch, each without its smaller last batch."""
    per_epoch = train_nodes.shape[0] // options.batch_size
    epochs, missing = [], options.num_batches
    for epoch in count():
        batches = min(per_epoch, missing)
        epochs.append(epoch_permutation(train_nodes, options.seed, epoch)[: batches * options.batch_size])
        missing -= batches
        if missing == 0:
            return torch.cat(epochs)
    raise AssertionError


def first_rows(block: Any, rows: Tensor, aggregation: Aggregation) -> tuple[Tensor, ...]:
    """Return what enters the first layer's matmul: as SAGEConv('mean') or GraphConv make it."""
    function = import_dgl().function
    with block.local_scope():
        if aggregation == "mean":
            block.srcdata["h"] = rows
            block.update_all(function.copy_u("h", "m"), function.mean("m", "neigh"))
            return rows[: block.num_dst_nodes()], block.dstdata["neigh"]
        conv = import_dgl().nn.GraphConv(
            rows.shape[1], rows.shape[1], norm="both", weight=False, bias=False, allow_zero_in_degree=True
        )
        return (conv(block, rows),)


class SAGE(nn.Module):
    """The example's model: SAGEConv('mean') layers, ReLU and dropout between them."""

    def __init__(self, widths: Sequence[int], dropout: float) -> None:
        super().__init__()
        conv = import_dgl().nn.SAGEConv
        self.layers = nn.ModuleList(conv(a, b, "mean") for a, b in zip(widths, widths[1:]))
        self.dropout = nn.Dropout(dropout)

    def forward(self, blocks: Sequence[Any], rows: Tensor) -> Tensor:
        hidden = rows
        for number, (layer, block) in enumerate(zip(self.layers, blocks)):
            hidden = layer(block, hidden)
            if number != len(self.layers) - 1:
                hidden = self.dropout(F.relu(hidden))
        return hidden


class InputLoop:
    """Draws batches and takes their first layer's rows. seconds: of each phase, summed up."""

    def __init__(self, batches: DGLBatches, aggregation: Aggregation) -> None:
        self._batches = batches
        self._aggregation: Aggregation = aggregation
        self.seconds = dict.fromkeys(("sample", "gather", "aggregate"), 0.0)
        self.loss: float | None = None

    def step(self) -> dict[str, int]:
        """Take one batch; return its sizes."""
        times = [time.perf_counter()]
        input_nodes, seeds, blocks = self._batches.next()
        times.append(time.perf_counter())
        rows = self._batches.features(input_nodes, blocks)
        times.append(time.perf_counter())
        first_rows(blocks[0], rows, self._aggregation)
        times.append(time.perf_counter())
        for phase, start, end in zip(self.seconds, times, times[1:]):
            self.seconds[phase] += end - start
        return _sizes(input_nodes, seeds, blocks)


class TrainingLoop:
    """The example's training step."""

    def __init__(self, batches: DGLBatches, model: SAGE) -> None:
        self._batches = batches
        self._model = model.train()
        self._optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        self.seconds = dict.fromkeys(("sample", "gather", "train"), 0.0)
        self.loss: float | None = None

    def step(self) -> dict[str, int]:
        """Take one step; return its batch's sizes."""
        times = [time.perf_counter()]
        input_nodes, seeds, blocks = self._batches.next()
        times.append(time.perf_counter())
        rows = self._batches.features(input_nodes, blocks)
        labels = self._batches.labels(seeds, blocks)
        times.append(time.perf_counter())
        loss = F.cross_entropy(self._model(blocks, rows), labels)
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self.loss = loss.item()
        times.append(time.perf_counter())
        for phase, start, end in zip(self.seconds, times, times[1:]):
            self.seconds[phase] += end - start
        return _sizes(input_nodes, seeds, blocks)


def _sizes(input_nodes: Tensor, seeds: Tensor, blocks: Any) -> dict[str, int]:
    return {
        "seeds": int(seeds.shape[0]),
        "edges": sum(int(block.num_edges()) for block in blocks),
        "first_layer_edges": int(blocks[0].num_edges()),
        "first_layer_rows": int(blocks[0].num_dst_nodes()),
        "input_nodes": int(input_nodes.shape[0]),
    }
