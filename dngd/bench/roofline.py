"""What the machine's memory allows: bandwidths measured here, and the bytes that a batch's features must move.

A target out of reach shows here: no pipeline reads the first layer's rows faster than the machine reads rows at
random, nor draws them faster than the draw alone, which `sampling` contenders measure.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dngd.bench.contenders import AGGREGATION, whole_batches
from dngd.bench.dgl_example import GatherBuffer
from dngd.config import TrainConfig
from dngd.graph import GraphStore
from dngd.sampling import MiniBatch

COPY_BYTES = 1 << 28
REPEATS = 7
INDEX_BYTES = 8


def measure_roofline(store: GraphStore, config: TrainConfig) -> dict[str, Any]:
    """Return bandwidths in bytes a second (best of a few) with torch's threads as they are, and a batch's bytes."""
    batches = whole_batches(store, config, num_samplers=0, aggregation=None)
    batch = next(batches)
    del batches
    first = batch.layers[0]
    distinct = torch.cat([first.dst_nodes, first.indices]).unique()  # type: ignore[no-untyped-call]
    table = store.features
    row_bytes = table.shape[1] * table.element_size()
    buffer = GatherBuffer(table)
    random = distinct[torch.randperm(distinct.shape[0], generator=torch.Generator().manual_seed(0))]
    source, target = torch.ones(COPY_BYTES // 4), torch.zeros(COPY_BYTES // 4)
    seconds = {
        "copy": _best(lambda: target.copy_(source)),
        "random_gather": _best(lambda: buffer.rows(random)),
        "gather_and_mean": _best(lambda: _mean_rows(table, batch)),
    }
    return {
        "aggregation": AGGREGATION[config.model],
        "seconds": seconds,
        "bytes_per_second": {
            # Each read once and written once.
            "copy": 2 * COPY_BYTES / seconds["copy"],
            "random_gather": 2 * distinct.shape[0] * row_bytes / seconds["random_gather"],
            "gather_and_mean": first.num_edges * row_bytes / seconds["gather_and_mean"],
        },
        "batch": {
            "first_layer_edges": first.num_edges,
            "first_layer_rows": first.num_dst,
            "input_nodes": int(distinct.shape[0]),
            "feature_row_bytes": row_bytes,
            "edges": batch.num_edges,
        },
        "feature_bytes_a_batch": _bytes_moved(batch, int(distinct.shape[0]), row_bytes),
    }


def _bytes_moved(batch: MiniBatch, input_nodes: int, row_bytes: int) -> dict[str, int]:
    """Return the feature bytes that each way reads and writes at least, caches left out.

    gathered: the input nodes' matrix is written, then read once for each edge. fused: rows are read from the table
    once for each edge. Both write the aggregated rows; indices are read as often as edges.
    """
    first = batch.layers[0]
    per_edge = first.num_edges * (row_bytes + INDEX_BYTES)
    out = first.num_dst * row_bytes
    return {"gathered": 2 * input_nodes * row_bytes + per_edge + out, "fused": per_edge + out}


def _mean_rows(table: Tensor, batch: MiniBatch) -> Tensor:
    first = batch.layers[0]
    return F.embedding_bag(first.indices, table, first.indptr, mode="mean", include_last_offset=True)


def _best(work: Callable[[], object]) -> float:
    work()
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)
