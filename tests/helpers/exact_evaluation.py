"""Graphs with everything that exact evaluation can trip over, and the dense forward pass that it must equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dngd.comm import Communicator, LocalCommunicator
from dngd.graph import GraphStore
from dngd.models import GNN, build_model
from dngd.train.batch import PropagationBuilder
from dngd.train.evaluation import ExactEvaluator

CPU = torch.device("cpu")
N, CLASSES = 61, 3


def awkward_store(path: Path, *, weighted: bool = False, features: int = 6, dtype: str = "float32") -> GraphStore:
    """A directed graph with a hub, parallel edges, self loops, nodes without in-edges, and isolated nodes (59, 60)."""
    generator = torch.Generator().manual_seed(3)
    edges = torch.randint(0, N - 2, (2, 240), generator=generator)
    hub = torch.stack([torch.arange(1, 50), torch.full((49,), 17)])
    edge_index = torch.cat([edges, hub], dim=1)
    return GraphStore.write(
        path,
        name="awkward",
        edge_index=edge_index,
        edge_weight=torch.rand(edge_index.shape[1], generator=generator) + 0.1 if weighted else None,
        features=torch.randn(N, features, generator=generator),
        feature_dtype=dtype,  # type: ignore[arg-type]
        labels=torch.randint(CLASSES, (N,), generator=generator),
        num_classes=CLASSES,
        self_loops="keep",
        duplicates="keep",
        overwrite=True,
    )


def made_model(
    kind: str, features: int, hidden: int, *, num_layers: int = 3, dtype: torch.dtype = torch.float32
) -> GNN:
    torch.manual_seed(1)
    model = build_model(
        kind, in_features=features, hidden=hidden, out_features=CLASSES, num_layers=num_layers, dropout=0.5
    )
    for layer in model.graph_layers():
        nn.init.normal_(layer.linear.bias)
    return model.to(dtype)


def evaluator(
    store: GraphStore, model: GNN, communicator: Communicator | None = None, **options: Any
) -> ExactEvaluator:
    builder = PropagationBuilder(store, model.aggregation, CPU)
    settings: dict[str, Any] = {"rows": 65536, "device": CPU, "features": store.features} | options
    return ExactEvaluator(store, builder, communicator or LocalCommunicator(), **settings)


def dense_forward(store: GraphStore, model: GNN) -> Tensor:
    """Logits of all nodes, float64 [N, classes], from the dense adjacency matrix."""
    n = store.num_nodes
    adjacency = torch.zeros(n, n, dtype=torch.float64)
    destinations = torch.repeat_interleave(torch.arange(n), store.indptr.diff())
    weights = torch.ones(store.num_edges) if store.edge_weight is None else store.edge_weight
    adjacency.index_put_((destinations, store.indices), weights.double(), accumulate=True)
    if model.aggregation == "gcn":
        adjacency += torch.eye(n, dtype=torch.float64)
        norm = adjacency.sum(dim=1).rsqrt()
        operator = norm[:, None] * adjacency * norm[None, :]
    else:
        totals = adjacency.sum(dim=1, keepdim=True)
        operator = adjacency / torch.where(totals == 0, 1.0, totals)
    hidden = store.features.double()
    for i, layer in enumerate(model.graph_layers()):
        rows = operator @ hidden
        if model.aggregation == "mean":
            rows = torch.cat([hidden, rows], dim=1)
        hidden = rows @ layer.linear.weight.double().T + layer.linear.bias.double()
        if i + 1 < len(model.layers):
            hidden = F.relu(hidden)
    return hidden.detach()
