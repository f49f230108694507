"""Draws layer graphs with DGL: uniform, without replacement, one DGL thread.

Owns the traps of DGL's sampling: its random stream depends on the seed *and* on the number of the calling
thread in the order in which threads first used it, and is not repeatable with several OpenMP threads (see
`canonical`); its fused sampler corrupts int32 graphs from the second batch on, so the graph is int64 and the
fused path is not used; seeds beyond 31 bits raise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dngd.errors import UserError
from dngd.sampling.dgl_import import import_dgl
from dngd.sampling.left_out import LeftOut, left_out_by
from dngd.sampling.minibatch import Drawn, LayerGraph

MAX_SEED = 2**31 - 1
_CHECK_SEED = 7
_CHECK_DRAW = (535753550, 685039283, 846369551, 886634191)
"""What dgl 2.1.0 draws for _CHECK_SEED in the first thread that uses its generator."""


def check_fanouts(fanouts: Sequence[int]) -> tuple[int, ...]:
    """Return fanouts as a tuple. Raises UserError unless there is one, and each is -1 (all) or at least 1."""
    checked = tuple(int(fanout) for fanout in fanouts)
    if not checked or any(fanout < 1 and fanout != -1 for fanout in checked):
        raise UserError(
            f"fanout={checked} is not valid; give one number a layer, input side first, each at least 1, "
            f"or -1 for all neighbours"
        )
    return checked


def canonical() -> bool:
    """Whether the calling thread draws the stream that every other machine and sampler process draws.

    That is: DGL's stream number 0, which the first thread to use DGL's generator in a process gets. The
    answer never changes for a thread. Calling it makes this thread use the generator.
    """
    dgl = import_dgl()
    with one_dgl_thread():
        dgl.seed(_CHECK_SEED)
        drawn = dgl.random.choice(10**9, len(_CHECK_DRAW), replace=True)
    return tuple(drawn.tolist()) == _CHECK_DRAW


@contextmanager
def one_dgl_thread() -> Iterator[None]:
    """Run DGL with one OpenMP thread.

    DGL and torch share one OpenMP runtime, so that DGL's setting is torch's too, in the same thread.
    """
    utils: Any = import_dgl().utils
    before = utils.get_num_threads()
    if before == 1:
        yield
        return
    utils.set_num_threads(1)
    try:
        yield
    finally:
        utils.set_num_threads(before)


class NeighborSampler:
    """Samples layer graphs from a graph in CSC form, which is not copied.

    indptr: int64 [N + 1]; indices: int64 [E]; edge_weight: float32 [E] or None.
    fanouts: entry i is layer i, input side first; each destination gets min(fanout, in-degree) distinct
        in-edges, all of them for -1; so distinct in-neighbours where the graph has no parallel edges.
    """

    def __init__(self, indptr: Tensor, indices: Tensor, edge_weight: Tensor | None, fanouts: Sequence[int]) -> None:
        assert (indptr.dtype, indices.dtype) == (torch.int64, torch.int64), (indptr.dtype, indices.dtype)
        self._dgl = import_dgl()
        self.fanouts = check_fanouts(fanouts)
        self.num_nodes = indptr.shape[0] - 1
        self._indptr = indptr
        self._indices = indices
        self._edge_weight = edge_weight
        no_edge_ids = torch.empty(0, dtype=torch.int64)
        self._graph = self._dgl.graph(("csc", (indptr, indices, no_edge_ids)), num_nodes=self.num_nodes)

    def draw(self, seeds: Tensor, rng_seed: int, excluded: Tensor | None = None) -> Drawn:
        """Return what is drawn for a batch's seeds; see sample."""
        return Drawn(self.sample(seeds, rng_seed, excluded))

    def sample(self, seeds: Tensor, rng_seed: int, excluded: Tensor | None = None) -> tuple[LayerGraph, ...]:
        """Return one layer graph a fanout, input side first, drawn for seeds: int64 [n], distinct, n >= 0.

        excluded: int64, ascending, entries of indices that are left out. They are drawn and then dropped, so that a
        destination with some has up to min(fanout, in-degree) of its other in-edges, fewer where some were drawn.
        rng_seed: in [0, 2³¹). In a canonical thread the result is a function of the arguments alone.
        """
        assert 0 <= rng_seed <= MAX_SEED, rng_seed
        assert (seeds.dtype, seeds.dim()) == (torch.int64, 1), (seeds.dtype, seeds.shape)
        assert torch.unique(seeds).shape == seeds.shape, "seeds must be distinct"
        layers: list[LayerGraph] = []
        left_out = left_out_by(self._indptr, self._edge_weight, excluded)
        with one_dgl_thread():
            self._dgl.seed(rng_seed)
            dst_nodes = seeds
            for layer in reversed(range(len(self.fanouts))):
                drawn, src_nodes = self._sample_layer(
                    dst_nodes, self.fanouts[layer], excluded, left_out, is_input=layer == 0
                )
                layers.append(drawn)
                dst_nodes = src_nodes
        return tuple(reversed(layers))

    def _sample_layer(
        self, dst_nodes: Tensor, fanout: int, excluded: Tensor | None, left_out: LeftOut | None, is_input: bool
    ) -> tuple[LayerGraph, Tensor]:
        """Return the layer graph into dst_nodes, and the global ids of its sources (none for the input)."""
        degrees, indptr = self._bounds(dst_nodes, fanout)
        frontier, edge_ids = self._draw(dst_nodes, fanout, indptr)
        if excluded is not None and left_out is not None:
            degrees = degrees - left_out.counts_of(dst_nodes)
            frontier, edge_ids, indptr = self._without(excluded, frontier, edge_ids, indptr)
        if is_input:
            indices, _ = frontier.edges()
            src_nodes = dst_nodes.new_empty(0)
        else:
            block = self._dgl.to_block(frontier, dst_nodes)
            indices, _ = block.edges()
            src_nodes = block.srcdata[self._dgl.NID]
        assert indices.shape[0] == int(indptr[-1]), (indices.shape, int(indptr[-1]))
        graph = LayerGraph(
            indptr=indptr,
            indices=indices,
            num_src=self.num_nodes if is_input else src_nodes.shape[0],
            num_dst=dst_nodes.shape[0],
            degrees=degrees,
            edge_weight=None if self._edge_weight is None else self._edge_weight[edge_ids],
            dst_nodes=dst_nodes,
            global_indices=is_input,
            left_out=left_out,
        )
        return graph, src_nodes

    def _bounds(self, dst_nodes: Tensor, fanout: int) -> tuple[Tensor, Tensor]:
        """Return the nodes' in-degrees, int64 [n], and where each one's drawn edges begin and end, int64 [n + 1]."""
        degrees = self._indptr[dst_nodes + 1] - self._indptr[dst_nodes]
        indptr = torch.zeros(dst_nodes.shape[0] + 1, dtype=torch.int64)
        torch.cumsum(degrees if fanout == -1 else degrees.clamp(max=fanout), 0, out=indptr[1:])
        return degrees, indptr

    def _without(self, excluded: Tensor, frontier: Any, edge_ids: Tensor, indptr: Tensor) -> tuple[Any, Tensor, Tensor]:
        """Return the sampled edges, their ids and rows without the excluded ones."""
        places = torch.searchsorted(excluded, edge_ids).clamp(max=excluded.numel() - 1)
        stays = excluded[places] != edge_ids
        kept = torch.cat([indptr.new_zeros(1), stays.cumsum(0)])[indptr]
        sources, destinations = frontier.edges()
        edges = (sources[stays], destinations[stays])
        return self._dgl.graph(edges, num_nodes=self.num_nodes), edge_ids[stays], kept

    def _draw(self, dst_nodes: Tensor, fanout: int, indptr: Tensor) -> tuple[Any, Tensor]:
        """Return the sampled edges as a DGL graph on all nodes, and their ids; rows as in indptr."""
        if fanout != -1 and dst_nodes.shape[0] > 0:
            frontier = self._dgl.sampling.sample_neighbors(self._graph, dst_nodes, fanout)
            return frontier, frontier.edata[self._dgl.EID]
        # DGL shuffles each row even where it takes all of it: slower, and another rounding a batch.
        rows = torch.repeat_interleave(indptr.diff())
        edge_ids = torch.arange(rows.shape[0]) + (self._indptr[dst_nodes] - indptr[:-1])[rows]
        edges = (self._indices[edge_ids], dst_nodes[rows])
        return self._dgl.graph(edges, num_nodes=self.num_nodes), edge_ids
