"""Exact evaluation: every layer over all nodes and all neighbours, in bounded memory.

Layer l's output for all nodes is finished before layer l+1 starts, so that each aggregation is computed once and no
neighbourhood is sampled or expanded. What the next layer gathers lies in tables (dngd.train.tables) that go to disk
beyond a limit; all else is a block of rows at a time. Ranks split the nodes by cost and share each layer's tables.
Which order a layer takes, and for which nodes, is dngd.train.evaluation_plan's; the formulas are layer_arithmetic's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dngd.comm import Communicator
from dngd.errors import UserError
from dngd.graph import GraphStore, Split
from dngd.models import GNN, SparseRows
from dngd.train.batch import PropagationBuilder
from dngd.train.evaluation_plan import (
    EvaluationWork,
    LayerShape,
    block_rows,
    blocks_between,
    bounds_of,
    evaluation_bytes,
    plan_work,
    shapes_of,
)
from dngd.train.layer_arithmetic import LayerArithmetic, LayerSource
from dngd.train.neighbour_sums import NeighbourSums, in_degrees_of
from dngd.train.objective import Objective
from dngd.train.scoring import CustomMetric, Metric, Scores, Tally, scores_of_tallies
from dngd.train.tables import Rows, Table, TableSpace

EvaluationProgress = Callable[[int, int], None]
"""Called with this rank's work done and its work in all; a unit is an edge aggregated, or a row made, in one layer."""


class Evaluator(Protocol):
    """What evaluates a model on all neighbours: ExactEvaluator, or ModuleEvaluator for modules of one's own; in link
    prediction LinkEvaluator over one of them, whose splits and parts are of links."""

    def check(self, model: Any, nodes: Tensor | None, room_for: int = 0) -> None:
        """Raise UserError if there is no room for what it needs, and `room_for` bytes more. All ranks enter."""

    def predictions(self, model: Any, nodes: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (ids, outputs) of this rank's part of the nodes, ascending; to be read to its end."""

    def scores(self, model: Any, split: Any) -> dict[str, Scores]:
        """Return the scores on "val" and "test" nodes (or links), alike on all ranks."""

    def scores_of(self, model: Any, parts: Mapping[str, Any]) -> dict[str, Scores]:
        """Return each part's scores, alike on all ranks."""


@dataclass(frozen=True)
class _Plan:
    """What is computed for a set of nodes. bounds: of the ranks' parts, a list a layer. inputs: of the parts of
    work.inputs. total: this rank's work, in the unit of EvaluationProgress."""

    nodes: Tensor | None
    shapes: tuple[LayerShape, ...]
    work: EvaluationWork
    bounds: tuple[list[int], ...]
    inputs: list[int]
    total: int


class ExactEvaluator:
    """Full-neighbour predictions of a GNN for any nodes of the graph.

    rows: most destination rows worked on at a time. features: the table [N, F], on the machine or on the device; of
    16-bit floats it is widened before anything is added. sparse: its entries that are not zero, which are then read in
    its place. folders: where tables may lie on disk. memory_bytes: most
    bytes of tables that the ranks of this machine hold in memory, None for half of what is available.
    keeps_first: keep the first layer's aggregated rows, which never change, for the next call, in a table as well.
    objective, metric: of scores.
    All ranks of the communicator must call alike. Logits depend on the number of ranks by their rounding at most.
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
        sparse: SparseRows | None = None,
        folders: Sequence[Path] = (),
        memory_bytes: int | None = None,
        keeps_first: bool = True,
        progress: EvaluationProgress | None = None,
        objective: Objective | None = None,
        metric: Metric | CustomMetric = "accuracy",
    ) -> None:
        self._store = store
        self._comm = communicator
        self._device = device
        self._features = features
        self._sparse = sparse
        self._keeps_first = keeps_first
        self._objective = objective or Objective()
        self._metric = metric
        self._report = progress or (lambda done, total: None)
        self._block = block_rows(store.num_nodes, rows, on_gpu=device.type == "cuda")
        self._neighbours = NeighbourSums(store, builder.operators.aggregation, builder.operators.norm)
        self.space = TableSpace(communicator, folders=folders, memory_bytes=memory_bytes, device=device)
        self._plan: _Plan | None = None
        self._kept: _KeptRows | None = None
        self._sought_room = False

    def check(self, model: GNN, nodes: Tensor | None, room_for: int = 0) -> None:
        """Raise UserError if the tables for the logits of some nodes, and `room_for` bytes of others, fit neither in
        memory nor on a disk. All ranks enter. nodes: int64 [n], or None for all."""
        sizes = evaluation_bytes(self._store, shapes_of(model), nodes, self._block, is_sparse=self._sparse is not None)
        self.space.check(sizes.tables + room_for)

    @torch.no_grad()
    def logits(self, model: GNN) -> Tensor:
        """Return the logits of all nodes, [N, num_classes], alike on all ranks. `predictions` needs less."""
        plan = self._plan_for(model, None)
        rows, last = Rows(None, self._store.num_nodes), plan.shapes[-1]
        dtype = model.graph_layers()[-1].linear.weight.dtype
        out = torch.empty(rows.count, last.d_out, dtype=dtype, device=self._device)
        everything = Table(out, list(range(self._comm.world_size)))
        for where, logits in self._run(model, plan):
            everything.write(where, logits)
        self.space.publish(everything, rows, plan.bounds[-1])
        return out

    @torch.no_grad()
    def predictions(self, model: GNN, nodes: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (node ids int64 [n], logits [n, num_classes]) of this rank's part of the nodes, ascending, by blocks.

        nodes: int64, distinct; None for all. Only what their logits need is computed. To be read to its end.
        """
        wanted = None if nodes is None else nodes.sort().values
        for where, logits in self._run(model, self._plan_for(model, wanted)):
            yield (torch.arange(where.start, where.stop) if isinstance(where, slice) else where), logits

    def scores(self, model: GNN, split: Split) -> dict[str, Scores]:
        """Return the scores on "val" and "test" nodes; no other node's logits are computed."""
        return self.scores_of(model, {"val": split.val, "test": split.test})

    def scores_of(self, model: GNN, parts: Mapping[str, Tensor]) -> dict[str, Scores]:
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

    def _plan_for(self, model: GNN, nodes: Tensor | None) -> _Plan:
        """Return the plan for ascending nodes; the last one's is kept."""
        shapes, plan = shapes_of(model), self._plan
        if plan is not None and plan.shapes == shapes and _are_same(plan.nodes, nodes):
            return plan
        store, world = self._store, self._comm.world_size
        work = plan_work(store, shapes, nodes, keeps_first=self._keeps_first, is_sparse=self._sparse is not None)
        bounds = tuple(bounds_of(store, layer.rows, self._block, world) for layer in work.layers)
        inputs = bounds_of(store, work.inputs, self._block, world)
        total = 0
        for layer, ends in zip(work.layers, bounds):
            total += self._units(layer.rows.piece(*ends[self._comm.rank : self._comm.rank + 2]))
        self._plan = _Plan(nodes, shapes, work, bounds, inputs, total)
        if self._kept is not None:
            self._kept.table.close()
            self._kept = None
        self._sought_room = False
        return self._plan

    def _run(self, model: GNN, plan: _Plan) -> Iterator[tuple[slice | Tensor, Tensor]]:
        """Yield this rank's blocks of the last layer, (nodes, logits)."""
        layers = [
            LayerArithmetic(layer, shape, self._neighbours, self._device, transforms_first=work.transforms_first)
            for layer, shape, work in zip(model.graph_layers(), plan.shapes, plan.work.layers)
        ]
        done = 0
        with evaluating(model), contextlib.ExitStack() as stack:
            self._make_room_for_first(layers, plan)
            source, tables = self._input(layers[0], plan, stack)
            for i, (layer, work) in enumerate(zip(layers, plan.work.layers)):
                target = self._tables(layers[i + 1], stack) if i + 1 < len(layers) else None
                for first, last in blocks_between(plan.bounds[i], self._comm.rank, self._block):
                    where = work.rows.piece(first, last)
                    z = self._first_output(layer, source, where, first, plan) if i == 0 else layer.output(source, where)
                    if target is None:
                        yield where, z
                    else:
                        target.write(where, layers[i + 1].prepare(model.between(z), where))
                    done += self._units(where)
                    self._report(done, plan.total)
                if i == 0 and self._kept is not None:
                    self._kept.is_filled = True
                if target is not None:
                    target.publish(self.space, work.rows, plan.bounds[i])
                tables.close()
                if target is not None:
                    source, tables = target.source(), target

    def _input(self, layer: LayerArithmetic, plan: _Plan, stack: contextlib.ExitStack) -> tuple[LayerSource, _Tables]:
        """Return what the first layer reads: the features, or tables made of them."""
        features = LayerSource(self._features, is_features=True)
        if not layer.transforms_first:
            return features, _Tables([])
        made = self._tables(layer, stack)
        for first, last in blocks_between(plan.inputs, self._comm.rank, self._block):
            where = plan.work.inputs.piece(first, last)
            rows = layer.rows(features, where) if self._sparse is None else self._sparse[where]
            made.write(where, layer.prepare(rows, where))
        made.publish(self.space, plan.work.inputs, plan.inputs)
        return made.source(), made

    def _tables(self, layer: LayerArithmetic, stack: contextlib.ExitStack) -> _Tables:
        """Return new tables for what a layer will read."""
        made = []
        for width in layer.widths:
            made.append(self.space.shared(self._store.num_nodes, width, layer.dtype))
            stack.callback(made[-1].close)
        return _Tables(made)

    def _make_room_for_first(self, layers: Sequence[LayerArithmetic], plan: _Plan) -> None:
        first = layers[0]
        if self._sought_room or not self._keeps_first or first.transforms_first:
            return
        self._sought_room = True  # once, found or not: on a GPU all ranks look together, and some may find none
        begin, end = plan.bounds[0][self._comm.rank : self._comm.rank + 2]
        # Read from end to end, they may rather lie on disk than the tables that rows are gathered from.
        widths = [sum(layer.widths) for layer in layers[1:]] + [0]
        room_for = max(map(sum, pairwise([0, *widths]))) * self._store.num_nodes * first.dtype.itemsize
        # Without room for them they are computed again each time.
        with contextlib.suppress(UserError):
            table = self.space.private(end - begin, first.shape.d_in, first.dtype, room_for=room_for)
            self._kept = _KeptRows(table, begin)

    def _first_output(
        self, layer: LayerArithmetic, source: LayerSource, where: slice | Tensor, first: int, plan: _Plan
    ) -> Tensor:
        """Return the first layer's output of a block that begins with number `first` of the layer's rows."""
        if self._kept is None:
            return layer.output(source, where)
        count = where.stop - where.start if isinstance(where, slice) else where.numel()
        place = slice(first - self._kept.begin, first - self._kept.begin + count)
        if self._kept.is_filled:
            aggregated = self._kept.table.rows[place]
        else:
            aggregated = layer.aggregate(source, where)
            self._kept.table.write(place, aggregated)
        return layer.transform(aggregated, source, where)

    def _units(self, where: slice | Tensor) -> int:
        degrees = in_degrees_of(self._store, where)
        return int(degrees.sum()) + degrees.numel()


def score_parts(
    predictions: Callable[[Tensor], Iterable[tuple[Tensor, Tensor]]],
    parts: Mapping[str, Tensor],
    store: GraphStore,
    objective: Objective,
    metric: Metric | CustomMetric,
    communicator: Communicator,
    device: torch.device,
) -> dict[str, Scores]:
    """Return each part's scores, alike on all ranks, which all enter.

    predictions: given ascending nodes, yields (ids, logits) of this rank's. parts: name -> labelled nodes, distinct.
    """
    member = torch.zeros(len(parts), store.num_nodes, dtype=torch.bool)
    for k, nodes in enumerate(parts.values()):
        member[k, nodes] = True
    tallies = [Tally(objective, metric, store.num_classes) for _ in parts]
    for ids, logits in predictions(member.any(dim=0).nonzero()[:, 0]):
        labels = store.labels[ids]
        for k, tally in enumerate(tallies):
            chosen = member[k, ids].nonzero()[:, 0]
            tally.add(logits[chosen.to(logits.device)], labels[chosen].to(logits.device))
    return dict(zip(parts, scores_of_tallies(tallies, objective, metric, communicator, device)))


@dataclass
class _KeptRows:
    """The first layer's aggregated rows of this rank's part, which begins at number `begin` of the layer's rows."""

    table: Table
    begin: int
    is_filled: bool = False


@dataclass(frozen=True)
class _Tables:
    """The tables that a layer reads: what is gathered, and the nodes' own part where that is kept apart."""

    tables: list[Table]

    def write(self, where: slice | Tensor, values: tuple[Tensor, Tensor | None]) -> None:
        for table, rows in zip(self.tables, values):
            assert rows is not None
            table.write(where, rows)

    def publish(self, space: TableSpace, rows: Rows, bounds: Sequence[int]) -> None:
        for table in self.tables:
            space.publish(table, rows, bounds)

    def source(self) -> LayerSource:
        return LayerSource(self.tables[0].rows, self.tables[1].rows if len(self.tables) > 1 else None)

    def close(self) -> None:
        for table in self.tables:
            table.close()


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Hold the model in evaluation mode while the block runs."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _are_same(first: Tensor | None, second: Tensor | None) -> bool:
    return first is second or (first is not None and second is not None and torch.equal(first, second))
