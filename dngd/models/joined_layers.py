"""A batch's layer graphs as one graph, for models that run all of their layers on one.

A row's in-edges are those that were drawn for it at its own distance from the seeds. All layer graphs number rows
alike, nearest to the seeds first, so that the rows of one distance, and the edges into them, follow those of the
distance before: the order of PyG's loaders, that `trim_to_layer` wants.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from dngd.models.graph_batch import LayerEdges


class JoinedLayers(NamedTuple):
    """A batch's layer graphs as one; see join_layers. nodes_per_hop, edges_per_hop: rows at each distance from the
    seeds, and edges into them; the outermost rows have none."""

    edges: LayerEdges
    nodes_per_hop: list[int]
    edges_per_hop: list[int]


def join_layers(layers: tuple[LayerEdges, ...]) -> JoinedLayers:
    """Return one graph of the rows of all layer graphs, in which each row has the in-edges that it got first.

    A row at distance h from the seeds is a destination of the last layer graph but h, and of those before, where other
    neighbours were drawn for it again: these may be rows without in-edges. With all neighbours there is no difference.
    """
    pieces, weights, nodes, edges = [], [], [], []
    known = 0
    for layer in reversed(layers):
        first = int(torch.searchsorted(layer.edge_index[1].contiguous(), known)) if known else 0
        pieces.append(layer.edge_index[:, first:])
        if layer.edge_weight is not None:
            weights.append(layer.edge_weight[first:])
        nodes.append(layer.num_dst - known)
        edges.append(layer.edge_index.shape[1] - first)
        known = layer.num_dst
    nodes.append(layers[0].num_src - known)
    joined = replace(layers[0], edge_index=torch.cat(pieces, 1), edge_weight=torch.cat(weights) if weights else None)
    return JoinedLayers(joined, nodes, edges)
