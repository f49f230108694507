"""Exact evaluation of link prediction: all end nodes' embeddings first, on all neighbours, then the pairs' scores.

Embeddings lie in a table of one copy a machine (dngd.train.tables). Ranks share out the pairs. A pair is one yes-or-no
label, so that losses and metrics are those of several labels a node, with one label.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dngd.comm import Communicator
from dngd.graph import GraphStore, LinkSplit
from dngd.models.decoder import pair_logits
from dngd.train.evaluation import Evaluator
from dngd.train.objective import Objective
from dngd.train.scoring import CustomMetric, Metric, Scores, Tally, scores_of_tallies
from dngd.train.tables import Rows, TableSpace

PAIRS_AT_A_TIME = 65536


@dataclass(frozen=True)
class LabelledPairs:
    """links: int64 [n, 2], node numbers. negatives: int64 [m, 2], pairs that are no links."""

    links: Tensor
    negatives: Tensor

    @property
    def ends(self) -> Tensor:
        """The nodes that pairs name, ascending and distinct."""
        found: Tensor = torch.unique(torch.cat([self.links, self.negatives]))
        return found


class LinkEvaluator:
    """Scores pairs of nodes. nodes: gives the nodes' embeddings. width: theirs. space: for their table, the one that
    `nodes` takes its own from, so that both keep within one bound.

    All ranks of the communicator must call alike.
    """

    def __init__(
        self,
        nodes: Evaluator,
        store: GraphStore,
        communicator: Communicator,
        space: TableSpace,
        *,
        width: int,
        device: torch.device,
        objective: Objective | None = None,
        metric: Metric | CustomMetric = "roc_auc",
    ) -> None:
        self._nodes = nodes
        self._store = store
        self._comm = communicator
        self._space = space
        self._width = width
        self._device = device
        self._objective = objective or Objective(is_multilabel=True)
        self._metric = metric

    def check(self, model: nn.Module, nodes: Tensor | None, room_for: int = 0) -> None:
        """Raise UserError if there is no room for the tables, all at once. All ranks enter."""
        embeddings = self._store.num_nodes * self._width * _dtype(model).itemsize
        self._nodes.check(model, nodes, embeddings + room_for)

    def predictions(self, model: nn.Module, nodes: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (ids, embeddings) of this rank's part of the nodes, ascending; to be read to its end."""
        return self._nodes.predictions(model, nodes)

    @contextlib.contextmanager
    def embeddings(self, model: nn.Module, nodes: Tensor) -> Iterator[Tensor]:
        """Give a table [N, d] that holds the embeddings of some nodes while the block runs. All ranks enter.

        nodes: int64, ascending and distinct.
        """
        table = self._space.shared(self._store.num_nodes, self._width, _dtype(model))
        try:
            counts = torch.zeros(self._comm.world_size, dtype=torch.float64)
            for ids, z in self._nodes.predictions(model, nodes):
                table.write(ids, z.to(table.rows.dtype))
                counts[self._comm.rank] += ids.numel()
            counts = counts.to(self._device)
            self._comm.all_reduce(counts, "evaluation").wait()
            bounds = [0, *(int(end) for end in counts.cumsum(0).tolist())]
            self._space.publish(table, Rows(nodes, nodes.numel()), bounds)
            yield table.rows
        finally:
            table.close()

    def scores(self, model: nn.Module, split: LinkSplit) -> dict[str, Scores]:
        """Return the scores of "val" and "test" links against their fixed negatives, alike on all ranks."""
        parts = {
            "val": LabelledPairs(split.val, split.val_negatives),
            "test": LabelledPairs(split.test, split.test_negatives),
        }
        return self.scores_of(model, parts)

    @torch.no_grad()
    def scores_of(self, model: nn.Module, parts: Mapping[str, Any]) -> dict[str, Scores]:
        """Return each part's scores, alike on all ranks. parts: name -> LabelledPairs."""
        tallies = [Tally(self._objective, self._metric, 1) for _ in parts]
        ends = torch.unique(torch.cat([part.ends for part in parts.values()]))
        with self.embeddings(model, ends) as table:
            for tally, part in zip(tallies, parts.values()):
                pairs = torch.cat([part.links, part.negatives])
                labels = (torch.arange(len(pairs)) < len(part.links))[:, None].long()
                mine = torch.arange(len(pairs)).tensor_split(self._comm.world_size)[self._comm.rank]
                for first in range(0, len(mine), PAIRS_AT_A_TIME):
                    some = mine[first : first + PAIRS_AT_A_TIME]
                    logits = pair_logits(table, pairs[some].to(table.device))
                    tally.add(logits, labels[some].to(table.device))
        return dict(zip(parts, scores_of_tallies(tallies, self._objective, self._metric, self._comm, self._device)))


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype
