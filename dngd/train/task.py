"""What a run learns, by its task: from which parts of a graph, along which edges, and what its model gives a node."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from dngd.config import TrainConfig
from dngd.errors import UserError
from dngd.graph import GraphStore, LinkSplit, Split, split_links
from dngd.models.graph_batch import GraphShape

TaskSplit: TypeAlias = Split | LinkSplit
"""Of labelled nodes, or of links; an item of `train` is a seed of the loss either way."""


def split_of(config: TrainConfig, store: GraphStore) -> TaskSplit:
    """Return the run's split of a graph. Raises UserError if there is none, or the graph has nothing to learn from."""
    if config.task == "node":
        if store.num_features == 0 and config.model != "custom":
            raise UserError(
                f"graph {store.name} has no features, and all that a {config.model} model learns from are features; "
                "import it with some, such as the nodes' degrees, or give dngd.Trainer a module that needs none"
            )
        return store.split(config.split, config.seed)
    if store.num_features == 0:
        raise UserError(
            f"graph {store.name} has no features, which embeddings are made of; import it with some, such as the "
            "nodes' degrees"
        )
    return split_links(store, config.link_split, config.seed)


def graph_of(store: GraphStore, split: TaskSplit) -> GraphStore:
    """Return the graph whose edges the run may see."""
    return split.graph if isinstance(split, LinkSplit) else store


def shape_of(config: TrainConfig, store: GraphStore) -> GraphShape:
    """Return what the run's model takes and gives: classes, or the width of an embedding."""
    return GraphShape(store.num_features, store.num_classes if config.task == "node" else config.embedding_width)


def evaluated_nodes(split: TaskSplit) -> Tensor | None:
    """Return the nodes whose outputs an evaluation needs, distinct; None: about all."""
    return None if isinstance(split, LinkSplit) else torch.cat([split.val, split.test])
