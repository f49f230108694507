"""Graphs, digests and child scripts that the sampling tests share."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from hypothesis import strategies as st

from dngd.sampling.minibatch import LayerGraph, MiniBatch
from dngd.sampling.pipeline import SamplerPipeline
from dngd.sampling.topology import Topology

ROOT = Path(__file__).resolve().parents[3]


def topology(in_neighbours: list[list[int]], weighted: bool = False) -> Topology:
    """in_neighbours[v]: distinct sources of v's in-edges. An edge's weight is its id plus 1."""
    indptr = torch.tensor([0, *np.cumsum([len(sources) for sources in in_neighbours])], dtype=torch.int64)
    indices = torch.tensor([u for sources in in_neighbours for u in sources], dtype=torch.int64)
    weight = torch.arange(1, indices.shape[0] + 1, dtype=torch.float32) if weighted else None
    return Topology(indptr, indices, weight)


def skewed_graph(num_nodes: int = 400, seed: int = 0, weighted: bool = True) -> Topology:
    """Degrees from 0 to about num_nodes / 2, many small and few large."""
    generator = np.random.RandomState(seed)
    degrees = np.minimum((generator.pareto(0.8, num_nodes) * 3).astype(int), num_nodes // 2)
    graph = topology([generator.choice(num_nodes, degree, replace=False).tolist() for degree in degrees], weighted)
    return replace(graph, features=torch.from_numpy(generator.standard_normal((num_nodes, 5)).astype(np.float32)))


@st.composite
def graphs(draw: st.DrawFn) -> Topology:
    num_nodes = draw(st.integers(1, 20))
    nodes = st.integers(0, num_nodes - 1)
    sources = draw(st.lists(st.lists(nodes, unique=True), min_size=num_nodes, max_size=num_nodes))
    return topology(sources, weighted=draw(st.booleans()))


def in_neighbours(graph: Topology, node: int) -> list[int]:
    return graph.indices[int(graph.indptr[node]) : int(graph.indptr[node + 1])].tolist()


def layer_arrays(layer: LayerGraph) -> list[torch.Tensor]:
    arrays = [layer.indptr, layer.indices, layer.degrees, layer.dst_nodes]
    return arrays if layer.edge_weight is None else [*arrays, layer.edge_weight]


def digest(batches: Iterable[MiniBatch]) -> str:
    """sha256 of everything the batches hold."""
    total = hashlib.sha256()
    for batch in batches:
        total.update(repr((batch.coordinates, len(batch.layers))).encode())
        total.update(batch.seeds.numpy().tobytes())
        if batch.first_rows is not None:
            rows = batch.first_rows
            arrays = [rows] if isinstance(rows, torch.Tensor) else [rows.indptr, rows.columns, rows.values]
            for array in arrays:
                total.update(repr((array.dtype, tuple(rows.shape))).encode())
                total.update(array.numpy().tobytes())
        for layer in batch.layers:
            total.update(repr((layer.num_src, layer.num_dst, layer.global_indices)).encode())
            for array in layer_arrays(layer):
                total.update(repr((array.dtype, tuple(array.shape))).encode())
                total.update(array.contiguous().numpy().tobytes())
    return total.hexdigest()


def make_pipeline(num_samplers: int, **changes: object) -> SamplerPipeline:
    """A run of 7 steps an epoch over 4 shards, the last of which has 3 seeds; this rank executes three."""
    arguments: dict[str, object] = dict(
        store=skewed_graph(),
        train_nodes=torch.arange(0, 390, 2),
        fanouts=(3, 5, 2),
        run_seed=11,
        num_shards=4,
        batch_size=8,
        shards=[0, 1, 3],
        num_samplers=num_samplers,
        prefetch=2,
        timeout_seconds=60.0,
        aggregation="mean",
    )
    return SamplerPipeline(**{**arguments, **changes})  # type: ignore[arg-type]


def take(pipeline: SamplerPipeline, count: int) -> list[MiniBatch]:
    return [next(pipeline) for _ in range(count)]


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter in the repository's root."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
