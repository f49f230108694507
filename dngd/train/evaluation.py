"""Exact evaluation: every layer over all nodes and all neighbours, in bounded memory.

Layer l's output for all nodes is finished before layer l+1 starts, so each aggregation is computed
once and no neighbourhood is sampled or expanded. Memory: two activation tables [N, hidden] and
`rows` aggregated rows at a time. Ranks split the nodes and share each layer's result.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dngd.comm import Communicator
from dngd.graph import GraphStore, Split
from dngd.models import GNN, Propagation
from dngd.train.batch import PropagationBuilder

FIRST_ROWS_CACHE_BYTES = 512 * 1024 * 1024


@dataclass(frozen=True)
class _NodeRange:
    """All in-edges of the nodes [first, last): a slice of the store, no copy. See LayerGraphLike."""

    indptr: Tensor
    indices: Tensor
    degrees: Tensor
    edge_weight: Tensor | None


@dataclass(frozen=True)
class Scores:
    """Mean cross-entropy and accuracy of one set of nodes."""

    loss: float
    accuracy: float


class ExactEvaluator:
    """Full-neighbour predictions of a GNN for every node of the graph.

    rows: most destination rows aggregated at a time. The first layer's aggregated rows never change;
    they are kept between calls where they fit in 512 MiB. All ranks of the communicator must call alike.
    """

    def __init__(
        self,
        store: GraphStore,
        builder: PropagationBuilder,
        communicator: Communicator,
        *,
        rows: int,
        device: torch.device,
        features: Tensor,
    ) -> None:
        self._store = store
        self._builder = builder
        self._comm = communicator
        self._rows = rows
        self._device = device
        self._features = features
        self._first_rows: list[Tensor] = []

    @torch.no_grad()
    def logits(self, model: GNN) -> Tensor:
        """Return the logits of all nodes, [N, num_classes], alike on all ranks."""
        was_training = model.training
        model.eval()
        table = self._features
        layers = model.graph_layers()
        for i, layer in enumerate(layers):
            out = torch.empty(
                self._store.num_nodes,
                layer.linear.out_features,
                device=self._device,
                dtype=layer.linear.weight.dtype,
            )
            for k, (first, last) in enumerate(self._chunks()):
                if i == 0 and k < len(self._first_rows):
                    aggregated = self._first_rows[k]
                else:
                    aggregated = layer.aggregate(table, self._propagation(first, last))
                    if i == 0:
                        self._keep_first_rows(aggregated, k)
                z = layer.linear(aggregated)
                out[first:last] = model.between(z) if i + 1 < len(layers) else z
            self._share(out)
            table = out
        model.train(was_training)
        return table

    def scores(self, model: GNN, split: Split) -> dict[str, Scores]:
        """Return the scores on "val" and "test" nodes."""
        logits = self.logits(model)
        return {
            "val": score(logits, self._store.labels, split.val),
            "test": score(logits, self._store.labels, split.test),
        }

    def _range(self, rank: int) -> tuple[int, int]:
        n, world = self._store.num_nodes, self._comm.world_size
        return n * rank // world, n * (rank + 1) // world

    def _chunks(self) -> Iterator[tuple[int, int]]:
        first, end = self._range(self._comm.rank)
        while first < end:
            last = min(end, first + self._rows)
            yield first, last
            first = last

    def _propagation(self, first: int, last: int) -> Propagation:
        store = self._store
        offsets = store.indptr[first : last + 1]
        begin, end = int(offsets[0]), int(offsets[-1])
        weights = None if store.edge_weight is None else store.edge_weight[begin:end]
        graph = _NodeRange(offsets - begin, store.indices[begin:end], offsets.diff(), weights)
        nodes = torch.arange(first, last)
        return self._builder.propagation(graph, graph.indices, nodes, nodes).to(self._device)

    def _keep_first_rows(self, aggregated: Tensor, chunk: int) -> None:
        size = self._store.num_nodes * aggregated.shape[1] * aggregated.element_size()
        if chunk == len(self._first_rows) and size <= FIRST_ROWS_CACHE_BYTES:
            self._first_rows.append(aggregated)

    def _share(self, out: Tensor) -> None:
        works = []
        for rank in range(self._comm.world_size):
            first, last = self._range(rank)
            if last > first:
                works.append(self._comm.broadcast(out[first:last].view(-1), rank, "evaluation"))
        for work in works:
            work.wait()


def score(logits: Tensor, labels: Tensor, nodes: Tensor) -> Scores:
    """Return mean cross-entropy and accuracy of nodes int64 [n], n > 0."""
    chosen, expected = logits[nodes.to(logits.device)], labels[nodes].to(logits.device)
    return Scores(
        loss=float(F.cross_entropy(chosen.float(), expected)),
        accuracy=float((chosen.argmax(dim=1) == expected).double().mean()),
    )
