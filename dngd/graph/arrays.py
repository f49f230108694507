"""Importing a graph whose arrays another library holds in memory: what PyG's and DGL's importers share.

The arrays are not copied as a whole: edges, features and weights go to the store's builder in blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import scipy.sparse
import torch
from torch import Tensor

from dngd.errors import UserError
from dngd.graph.builder import RowBlocks, StoreBuilder
from dngd.graph.canonical import as_table, canonical_labels, canonical_masks, check_width
from dngd.graph.import_options import ImportOptions, check_options, check_training_nodes, warn_of_empty_classes
from dngd.graph.manifest import MASK_NAMES, Provenance
from dngd.graph.store import GraphStore

_BLOCK_EDGES = 1 << 20
_BLOCK_BYTES = 1 << 24
MASK_FORMS = {"train": ("train_mask",), "val": ("val_mask", "valid_mask"), "test": ("test_mask",)}


@dataclass(frozen=True)
class GraphArrays:
    """One homogeneous graph, as tensors on any device.

    source, destination: integer [E]. features: [N, F] or None. labels: [N], [N, 1], [N, classes] of 0 and 1, or None.
    edge_weight: [E] or None.
    masks: {train | val | test: [N], or [N, splits] or [splits, N]}. node_ids: integer [N] or None.
    """

    num_nodes: int
    source: Tensor
    destination: Tensor
    features: Tensor | None = None
    labels: Tensor | None = None
    edge_weight: Tensor | None = None
    masks: dict[str, Tensor] = field(default_factory=dict)
    node_ids: Tensor | None = None


def import_arrays(
    graph: GraphArrays, what: str, out: str | Path, provenance: Provenance, options: ImportOptions
) -> GraphStore:
    """Write a graph as a store. what: names it in errors. Raises UserError if the arrays make no graph."""
    weighted = graph.edge_weight is not None
    check_options(out, options, weighted=weighted)
    for name, ends in (("source", graph.source), ("destination", graph.destination)):
        if ends.dim() != 1 or ends.is_floating_point() or ends.dtype == torch.bool:
            raise UserError(f"the edges' {name} nodes of {what} are {_form(ends)}; give integers, one an edge")
    for name, values in (
        ("source nodes of the edges", graph.source),
        ("edge weights", graph.edge_weight),
        ("node ids", graph.node_ids),
    ):
        if values is not None and values.layout != torch.strided:
            raise UserError(f"the {name} of {what} are a sparse tensor; give values.to_dense()")
    if graph.edge_weight is not None and graph.edge_weight.numel() != graph.source.shape[0]:
        raise UserError(
            f"the edge weights of {what} are {_form(graph.edge_weight)} but there are {graph.source.shape[0]} edges; "
            "give one number for each edge"
        )
    features = _features(graph, what)
    values = None if graph.labels is None else _numpy(graph.labels)
    labels, num_classes = canonical_labels(values, graph.num_nodes, None)
    warn_of_empty_classes(labels, num_classes, what)
    masks = dict(canonical_masks({n: _mask(m, graph.num_nodes) for n, m in graph.masks.items()}, graph.num_nodes))
    check_training_nodes(masks, None if graph.labels is None else labels, what)
    with StoreBuilder(out, num_nodes=graph.num_nodes, weighted=weighted, **options) as builder:
        for part in _blocks(graph.source.shape[0], _BLOCK_EDGES):
            weight = None if graph.edge_weight is None else _numpy(graph.edge_weight[part].reshape(-1))
            builder.add_edges(_numpy(graph.source[part]), _numpy(graph.destination[part]), weight)
        return builder.finish(
            features=features,
            labels=labels,
            num_classes=num_classes,
            masks=masks,
            node_ids=None if graph.node_ids is None else _numpy(graph.node_ids),
            provenance=provenance,
        )


def _features(graph: GraphArrays, what: str) -> RowBlocks | None:
    table = graph.features
    if table is None:
        return None
    known = (torch.strided, torch.sparse_coo, torch.sparse_csr)
    if table.layout not in known or table.dim() != 2 or table.dtype.is_complex:
        fix = as_table("x", table.dim())
        if table.dim() == 2:
            fix = "x.real" if table.dtype.is_complex else "x.to_dense()"
        raise UserError(
            f"the features of {what} are {_form(table)} but must be a table of numbers [nodes, width]; give {fix}"
        )
    if table.shape[0] != graph.num_nodes:
        raise UserError(
            f"the features of {what} have {table.shape[0]} rows but the graph has {graph.num_nodes} nodes; give one "
            "row for each node"
        )
    if table.shape[1] == 0:
        return None
    rows = max(1, _BLOCK_BYTES // (4 * table.shape[1]))
    if table.layout != torch.strided:
        check_width(table.shape[1], what)
        sparse = _sparse(table)
        return RowBlocks(table.shape[1], (sparse[part].toarray() for part in _blocks(graph.num_nodes, rows)))
    return RowBlocks(table.shape[1], (_numpy(table[part]) for part in _blocks(graph.num_nodes, rows)))


def _sparse(table: Tensor) -> Any:
    """Return a sparse tensor as scipy's compressed rows, which can be cut."""
    if table.layout == torch.sparse_coo:
        rows, columns = _numpy(table.coalesce().indices())
        return scipy.sparse.csr_matrix((_numpy(table.coalesce().values()), (rows, columns)), shape=tuple(table.shape))
    parts = (_numpy(table.values()), _numpy(table.col_indices()), _numpy(table.crow_indices()))
    return scipy.sparse.csr_matrix(parts, shape=tuple(table.shape))


def _mask(mask: Tensor, num_nodes: int) -> Any:
    """Return a mask as (nodes,) or (splits, nodes): PyG keeps several splits as columns."""
    values = _numpy(mask)
    if values.ndim == 2 and values.shape[0] == num_nodes and values.shape[1] != num_nodes:
        values = values.T
    return values[0] if values.ndim == 2 and values.shape[0] == 1 else values


def masks_of(found: Any) -> dict[str, Any]:
    """Return {part: mask} of a mapping's mask entries, under whichever name it has them."""
    forms = ((part, form) for part in MASK_NAMES for form in MASK_FORMS[part])
    return {part: found[form] for part, form in forms if form in found and found[form] is not None}


def _blocks(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def _numpy(values: Tensor) -> Any:
    """Return a tensor of any layout as a numpy array; bfloat16, which numpy lacks, as float32."""
    values = values.detach().to_dense().cpu()
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy()


def _form(values: Tensor) -> str:
    layout = "" if values.layout == torch.strided else f" {str(values.layout).removeprefix('torch.')}"
    return f"{str(values.dtype).removeprefix('torch.')}{layout} of shape {list(values.shape)}"
