"""Neighbour sampling: from seed nodes to mini-batches of layer graphs. The only package that imports dgl.

Importing it is cheap (no torch, no dgl) and makes a plain `import dgl` work afterwards, see dgl_import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dngd.sampling.dgl_import import PartStatus, dgl_parts, import_dgl, install_import_hook

if TYPE_CHECKING:
    from dngd.sampling.link_seeds import LinkSeeds
    from dngd.sampling.minibatch import BatchCoordinates, LayerGraph, MiniBatch, SeedPairs
    from dngd.sampling.neighbor_loader import NeighborLoader
    from dngd.sampling.partitioning import parse_order, partition_nodes, reorder_by
    from dngd.sampling.pipeline import SamplerPipeline
    from dngd.sampling.sampler import NeighborSampler
    from dngd.sampling.schedule import (
        UnlabelledSeeds,
        derive_seed,
        epoch_permutation,
        shard_seeds,
        steps_per_epoch,
    )

_HOME = {
    "BatchCoordinates": "minibatch",
    "LayerGraph": "minibatch",
    "LinkSeeds": "link_seeds",
    "MiniBatch": "minibatch",
    "SamplerPipeline": "pipeline",
    "SeedPairs": "minibatch",
    "UnlabelledSeeds": "schedule",
    "NeighborLoader": "neighbor_loader",
    "NeighborSampler": "sampler",
    "derive_seed": "schedule",
    "epoch_permutation": "schedule",
    "parse_order": "partitioning",
    "partition_nodes": "partitioning",
    "reorder_by": "partitioning",
    "shard_seeds": "schedule",
    "steps_per_epoch": "schedule",
}

__all__ = [
    "BatchCoordinates",
    "LayerGraph",
    "LinkSeeds",
    "MiniBatch",
    "NeighborLoader",
    "NeighborSampler",
    "PartStatus",
    "SamplerPipeline",
    "SeedPairs",
    "UnlabelledSeeds",
    "derive_seed",
    "dgl_parts",
    "epoch_permutation",
    "import_dgl",
    "parse_order",
    "partition_nodes",
    "reorder_by",
    "shard_seeds",
    "steps_per_epoch",
]

install_import_hook()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
