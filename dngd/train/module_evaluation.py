"""Evaluation of modules of one's own, on all neighbours.

A LayerwiseModule is evaluated as dngd's own models are: layer by layer, each layer's output for all nodes finished
before the next starts, so that no neighbourhood is expanded. Another module gets batches of nodes with their whole
L-hop neighbourhoods: exact too, but a node's work is done again for every batch that it is a neighbour in.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from dngd.comm import Communicator
from dngd.graph import GraphStore, Split
from dngd.models.graph_batch import LayerwiseModule
from dngd.train.evaluation import EvaluationProgress, evaluating, score_parts
from dngd.train.evaluation_plan import block_rows, blocks_between, bounds_of
from dngd.train.module_batches import ModuleBatchBuilder
from dngd.train.objective import Objective
from dngd.train.scoring import CustomMetric, Metric, Scores
from dngd.train.tables import Rows, TableSpace


class ModuleEvaluator:
    """Full-neighbour outputs of a module for any nodes; the interface of ExactEvaluator.

    num_layers: of the module. rows: most nodes worked on at a time. folders, memory_bytes: see ExactEvaluator.
    All ranks of the communicator must call alike.
    """

    def __init__(
        self,
        store: GraphStore,
        builder: ModuleBatchBuilder,
        communicator: Communicator,
        *,
        num_layers: int,
        rows: int,
        device: torch.device,
        features: Tensor,
        folders: Sequence[Path] = (),
        memory_bytes: int | None = None,
        objective: Objective | None = None,
        metric: Metric | CustomMetric = "accuracy",
        progress: EvaluationProgress | None = None,
    ) -> None:
        self._store = store
        self._builder = builder
        self._comm = communicator
        self._num_layers = num_layers
        self._device = device
        self._features = features
        self._objective = objective or Objective()
        self._metric = metric
        self._report = progress or (lambda done, total: None)
        self._block = block_rows(store.num_nodes, rows, on_gpu=device.type == "cuda")
        self.space = TableSpace(communicator, folders=folders, memory_bytes=memory_bytes, device=device)

    def check(self, model: nn.Module, nodes: Tensor | None, room_for: int = 0) -> None:
        """Raise UserError if there is no room for `room_for` bytes: the widths between a module's layers are known
        when it has run. All ranks enter."""
        self.space.check(room_for)

    @torch.no_grad()
    def predictions(self, model: nn.Module, nodes: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (node ids int64 [n], outputs [n, C]) of this rank's part of the nodes, ascending, by blocks.

        nodes: int64, distinct; None for all. To be read to its end.
        """
        everything = Rows(None, self._store.num_nodes)
        wanted = everything if nodes is None else Rows(nodes.sort().values, nodes.numel())
        with evaluating(model):
            if isinstance(model, LayerwiseModule):
                yield from self._by_layers(model, wanted)
            else:
                yield from self._by_neighbourhoods(model, wanted)

    def scores(self, model: nn.Module, split: Split) -> dict[str, Scores]:
        """Return the scores on "val" and "test" nodes."""
        return self.scores_of(model, {"val": split.val, "test": split.test})

    def scores_of(self, model: nn.Module, parts: Mapping[str, Tensor]) -> dict[str, Scores]:
        """Return each part's scores, alike on all ranks. parts: name -> labelled nodes, int64 [n], n > 0, distinct."""
        return score_parts(
            partial(self.predictions, model),
            parts,
            self._store,
            self._objective,
            self._metric,
            self._comm,
            self._device,
        )

    def _by_neighbourhoods(self, model: nn.Module, wanted: Rows) -> Iterator[tuple[Tensor, Tensor]]:
        blocks = self._blocks(wanted)
        for number, (first, last) in enumerate(blocks):
            ids = _ids(wanted, first, last)
            yield ids, model(self._builder.whole(ids, self._num_layers))
            self._report(number + 1, len(blocks))

    def _by_layers(self, model: LayerwiseModule, wanted: Rows) -> Iterator[tuple[Tensor, Tensor]]:
        everything = Rows(None, self._store.num_nodes)
        total = (self._num_layers - 1) * len(self._blocks(everything)) + len(self._blocks(wanted))
        done, source, held = 0, self._features, None
        with contextlib.ExitStack() as stack:
            for index in range(self._num_layers - 1):
                # All ranks learn the width and type by a node of no interest, also those without a block.
                like = self._output(model, index, source, torch.zeros(1, dtype=torch.int64))
                table = self.space.shared(self._store.num_nodes, like.shape[1], like.dtype)
                stack.callback(table.close)
                for first, last in self._blocks(everything):
                    ids = _ids(everything, first, last)
                    table.write(slice(first, last), self._output(model, index, source, ids))
                    done += 1
                    self._report(done, total)
                self.space.publish(table, everything, self._bounds(everything))
                if held is not None:
                    held.close()
                source, held = table.rows, table
            for first, last in self._blocks(wanted):
                ids = _ids(wanted, first, last)
                yield ids, self._output(model, self._num_layers - 1, source, ids)
                done += 1
                self._report(done, total)

    def _output(self, model: LayerwiseModule, index: int, source: Tensor, ids: Tensor) -> Tensor:
        edges, nodes = self._builder.of_nodes(ids)
        return model.forward_layer(index, self._builder.rows(source, nodes), edges)

    def _bounds(self, rows: Rows) -> list[int]:
        return bounds_of(self._store, rows, self._block, self._comm.world_size)

    def _blocks(self, rows: Rows) -> list[tuple[int, int]]:
        return blocks_between(self._bounds(rows), self._comm.rank, self._block)


def _ids(rows: Rows, first: int, last: int) -> Tensor:
    where = rows.piece(first, last)
    return torch.arange(where.start, where.stop) if isinstance(where, slice) else where
