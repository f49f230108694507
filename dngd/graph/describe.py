"""What `dngd data info` says of a store."""

from __future__ import annotations

from typing import Any

import torch

from dngd.graph.links import find_entries
from dngd.graph.manifest import PartitionInfo
from dngd.graph.store import GraphStore

_BLOCK_EDGES = 1 << 24
_NUM_LOOKED_AT = 1 << 16
"""Edges of which it is looked whether their reverse is there."""


def describe(store: GraphStore) -> dict[str, Any]:
    """Return counts, degrees, homophily, classes, masks, bytes and provenance, ready for JSON.

    homophily: share of the edges between labelled nodes that join equal labels; None without such edges, and of
    several labels a node. class_counts: labelled nodes of each class, which of several labels a node overlap.
    reversed_share: see the function.
    class_names: what the user calls them; None if they are numbers from 0. columns: which column of the tables that it
    was imported from is what, and why others are not used; None for other sources.
    Reads the topology and labels, not the features.
    """
    degrees = store.in_degrees()
    labels = store.labels
    if store.is_multilabel:
        counts = (labels == 1).sum(dim=0)
    else:
        counts = torch.bincount(labels[labels >= 0], minlength=store.num_classes)
    return {
        "name": store.name,
        "path": str(store.path),
        "num_nodes": store.num_nodes,
        "num_edges": store.num_edges,
        "num_features": store.num_features,
        "feature_dtype": store.manifest.feature_dtype,
        "num_classes": store.num_classes,
        "num_labelled": store.manifest.num_labelled,
        "multilabel": store.is_multilabel,
        "directed": store.manifest.directed,
        "reversed_share": reversed_share(store),
        "edge_weights": store.edge_weight is not None,
        "node_ids": store.manifest.node_id_type,
        "in_degree": {
            "min": int(degrees.min()),
            "median": float(degrees.double().quantile(0.5)) if len(degrees) < 1 << 24 else float(degrees.median()),
            "max": int(degrees.max()),
            "isolated": int((degrees == 0).sum()),
        },
        "homophily": _homophily(store),
        "class_counts": counts.tolist(),
        "class_names": None if store.label_names is None else list(store.label_names),
        "masks": {
            name: {
                "splits": 1 if mask.ndim == 1 else len(mask),
                "nodes": mask.reshape(-1, store.num_nodes).sum(1).tolist(),
            }
            for name, mask in store.split_masks.items()
        },
        "partitions": {str(parts): _partition(info) for parts, info in sorted(store.partitions.items())},
        "self_loops": store.manifest.self_loops.model_dump(),
        "duplicates": store.manifest.duplicates.model_dump(),
        "bytes": store.nbytes,
        "file_bytes": {name: entry.bytes for name, entry in store.manifest.files.items()},
        "format_version": store.manifest.format_version,
        "columns": store.manifest.provenance.options.get("columns"),
        "provenance": store.manifest.provenance.model_dump(),
    }


def _partition(info: PartitionInfo) -> dict[str, Any]:
    """Return a partition in few words: the parts' sizes by their range."""
    nodes, train = info.nodes, info.train_nodes
    return {
        "method": info.method,
        "edge_cut": info.edge_cut,
        "nodes_a_part": [min(nodes), max(nodes)],
        "train_nodes_a_part": None if train is None else [min(train), max(train)],
    }


def reversed_share(store: GraphStore) -> float | None:
    """Return the share of the edges between two nodes whose reverse is there too, of at most 65,536 spread evenly over
    the edges; None without such edges."""
    if not store.manifest.directed:
        return 1.0 if store.num_edges > store.manifest.self_loops.kept else None
    entries = torch.arange(0, store.num_edges, max(1, -(-store.num_edges // _NUM_LOOKED_AT)))
    source = store.indices[entries]
    destination = torch.searchsorted(store.indptr, entries, right=True) - 1
    apart = source != destination
    if not apart.any():
        return None
    first, last = find_entries(store, destination[apart], source[apart])
    return float((first < last).double().mean())


def _homophily(store: GraphStore) -> float | None:
    equal = known = 0
    if store.is_multilabel:
        return None
    for start in range(0, store.num_edges, _BLOCK_EDGES):
        end = min(start + _BLOCK_EDGES, store.num_edges)
        # The destination of entry e is the last node whose run starts at or before e.
        destination = torch.searchsorted(store.indptr, torch.arange(start, end), right=True) - 1
        one, other = store.labels[store.indices[start:end]], store.labels[destination]
        both = (one >= 0) & (other >= 0)
        known += int(both.sum())
        equal += int((both & (one == other)).sum())
    return equal / known if known else None
