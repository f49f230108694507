"""Writing a store from arrays in memory: what they must be, and their way into a `StoreBuilder`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dngd.errors import UserError
from dngd.graph import manifest as m
from dngd.graph.builder import Progress, StoreBuilder
from dngd.graph.canonical import (
    Array,
    Duplicates,
    FeatureTable,
    FeatureType,
    SelfLoops,
    csc_pair,
    edge_pair,
    edge_weights,
)
from dngd.graph.features import RowBlocks

__all__ = ["Progress", "write_store"]

_BLOCK_EDGES = 1 << 22


def write_store(
    path: str | Path,
    *,
    features: Any,
    labels: Any = None,
    edge_index: Any = None,
    indptr: Any = None,
    indices: Any = None,
    name: str | None = None,
    num_nodes: int | None = None,
    num_classes: int | None = None,
    edge_weight: Any = None,
    masks: Mapping[str, Any] | None = None,
    directed: bool | None = None,
    self_loops: SelfLoops = "drop",
    duplicates: Duplicates = "drop",
    add_reverse: bool = False,
    feature_dtype: FeatureType = "float32",
    node_ids: Any = None,
    provenance: m.Provenance | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Check the arrays and write them as a store at `path`; return the path. See `GraphStore.write`."""
    table = FeatureTable(features, num_nodes)
    builder = StoreBuilder(
        path,
        name=name,
        num_nodes=table.shape[0],
        weighted=edge_weight is not None,
        add_reverse=add_reverse,
        self_loops=self_loops,
        duplicates=duplicates,
        directed=directed,
        feature_dtype=feature_dtype,
        overwrite=overwrite,
        progress=progress,
    )
    source, destination = _ends(table.shape[0], edge_index=edge_index, indptr=indptr, indices=indices)
    weight = None if edge_weight is None else edge_weights(edge_weight, len(source))
    with builder:
        for start in range(0, len(source), _BLOCK_EDGES):
            part = slice(start, start + _BLOCK_EDGES)
            builder.add_edges(source[part], destination[part], None if weight is None else weight[part])
        return builder.write(
            features=RowBlocks(table.shape[1], table.blocks()) if table.shape[1] else None,
            labels=labels,
            num_classes=num_classes,
            masks=masks,
            node_ids=node_ids,
            provenance=provenance,
        )


def _ends(num_nodes: int, *, edge_index: Any, indptr: Any, indices: Any) -> tuple[Array, Array]:
    if edge_index is not None and indptr is None and indices is None:
        return edge_pair(edge_index, num_nodes)
    if edge_index is None and indptr is not None and indices is not None:
        return csc_pair(indptr, indices, num_nodes)
    given = [n for n, v in (("edge_index", edge_index), ("indptr", indptr), ("indices", indices)) if v is not None]
    raise UserError(f"the topology is given as {given or 'nothing'}; give edge_index, or indptr and indices")
