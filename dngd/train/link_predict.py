"""Predicting with a link model: embeddings of nodes, and probabilities that pairs of nodes are linked.

Messages pass along all edges of the graph, those of validation and test links too: what is predicted is what is not
known yet. Scores of the run's own held-out links are `dngd evaluate`'s, which leaves their edges out.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from dngd.errors import UserError
from dngd.graph import GraphStore
from dngd.graph.id_map import IntegerIds, NodeIds, StringIds
from dngd.graph.table_files import open_table
from dngd.graph.table_values import id_values
from dngd.models.decoder import pair_logits
from dngd.train.evaluation import EvaluationProgress
from dngd.train.link_evaluation import PAIRS_AT_A_TIME, LinkEvaluator
from dngd.train.trained_model import TrainedModel, evaluator_of

_ROW_BYTES = 64
SOURCE, TARGET, PROBABILITY = "src", "dst", "probability"


def read_pairs(path: Path, store: GraphStore) -> tuple[Tensor, Tensor]:
    """Return the pairs of a table's columns src and dst as node numbers, int64 [n] each.

    path: a Parquet, CSV or Arrow file, a folder or a pattern. Raises UserError if it has no such columns, no rows, or
    names a node that the graph has not.
    """
    table = open_table(path, "pair")
    for file, schema in zip(table.files, table.schemas()):
        for name in (SOURCE, TARGET):
            if schema is not None and name not in schema.names:
                raise UserError(
                    f"{file.shown} has no column {name!r} (it has: {', '.join(schema.names)}); pairs are columns "
                    f"{SOURCE} and {TARGET} of node ids"
                )
    names = store.node_ids
    ids: NodeIds
    if isinstance(names, pa.Array):
        ids = StringIds(names, store.name)
    else:
        ids = IntegerIds(np.arange(store.num_nodes) if names is None else names, store.name)
    types = {name: pa.int64() if ids.kind == "int" else pa.large_string() for name in (SOURCE, TARGET)}
    ends: dict[str, list[Tensor]] = {SOURCE: [], TARGET: []}
    for file, first_row, batch in table.batches((SOURCE, TARGET), _ROW_BYTES, types):
        for name, found in ends.items():
            where = f"column {name!r} of {file.shown} from row {first_row} on"
            values = id_values(batch.column(name), ids.kind, where)
            numbers = ids.find(values)
            missing = np.flatnonzero(numbers < 0)
            if len(missing):
                raise UserError(
                    f"node {values[int(missing[0])]} in row {first_row + int(missing[0])} of {file.shown}, column "
                    f"{name!r}, is not in graph {store.name}; name nodes by the ids that they were imported with"
                )
            found.append(torch.from_numpy(numbers))
    if not ends[SOURCE] or not sum(len(part) for part in ends[SOURCE]):
        raise UserError(f"{table.shown} has no rows; give pairs to predict")
    return torch.cat(ends[SOURCE]), torch.cat(ends[TARGET])


def pair_batches(
    trained: TrainedModel,
    store: GraphStore,
    sources: Tensor,
    targets: Tensor,
    schema: pa.Schema,
    progress: EvaluationProgress | None,
) -> Iterator[pa.RecordBatch]:
    """Yield rows (src, dst, probability) of pairs, in their order."""
    nodes = torch.unique(torch.cat([sources, targets]))
    evaluator = evaluator_of(trained, store, nodes, progress)
    assert isinstance(evaluator, LinkEvaluator)
    ids = store.ids_of(0, store.num_nodes)
    with torch.no_grad(), evaluator.embeddings(trained.model, nodes) as table:
        for first in range(0, len(sources), PAIRS_AT_A_TIME):
            pairs = torch.stack([t[first : first + PAIRS_AT_A_TIME] for t in (sources, targets)], dim=1)
            shares = pair_logits(table, pairs.to(table.device))[:, 0].float().sigmoid().cpu()
            bad = ~shares.isfinite()
            if bool(bad.any()):
                row = first + int(bad.nonzero()[0, 0])
                raise UserError(
                    f"pair {row} gets no finite probability from {store.name}; check the graph's features with dngd "
                    "data verify, and the run's model with dngd evaluate"
                )
            columns = [*(ids.take(pa.array(pairs[:, k].numpy())) for k in (0, 1)), pa.array(shares.numpy())]
            yield pa.RecordBatch.from_arrays(columns, schema=schema)


def pair_fields(store: GraphStore) -> list[pa.Field]:
    """Return the columns of predicted pairs."""
    kind = store.ids_of(0, 1).type
    return [
        pa.field(SOURCE, kind, nullable=False),
        pa.field(TARGET, kind, nullable=False),
        pa.field(PROBABILITY, pa.float32(), nullable=False),
    ]
