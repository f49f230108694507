"""Small graphs for tests."""

from __future__ import annotations

from pathlib import Path

from dngd.graph import GraphStore, write_synth


def small_store(path: Path, *, nodes: int = 600, edges: int = 6000, classes: int = 5, seed: int = 0) -> GraphStore:
    """Write a learnable graph of a few hundred nodes and open it."""
    return write_synth(
        path,
        name="small",
        num_nodes=nodes,
        num_edges=edges,
        num_classes=classes,
        num_features=16,
        homophily=0.8,
        label_noise=0.05,
        seed=seed,
    )
