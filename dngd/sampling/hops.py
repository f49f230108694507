"""Sampling hop by hop, each node's neighbours once: what PyG's models take as one graph."""

from __future__ import annotations

from torch import Tensor

from dngd.sampling.minibatch import Drawn, LayerGraph
from dngd.sampling.sampler import MAX_SEED, NeighborSampler, one_dgl_thread


class HopSampler(NeighborSampler):
    """Draws neighbours of the nodes that the hop before reached first, where NeighborSampler draws anew for all.

    Layer graph l's destinations are the nodes at one distance from the seeds, its sources rows of Drawn.nodes: the
    seeds, then those of each hop in the order in which they are met.
    """

    def draw(self, seeds: Tensor, rng_seed: int, excluded: Tensor | None = None) -> Drawn:
        """Return one layer graph a fanout, outermost first, and the nodes; see NeighborSampler.sample for the rest.

        excluded: None.
        """
        assert 0 <= rng_seed <= MAX_SEED, rng_seed
        assert excluded is None, "edges are left out of layer graphs alone"
        layers: list[LayerGraph] = []
        nodes, known = seeds, 0
        with one_dgl_thread():
            self._dgl.seed(rng_seed)
            for fanout in reversed(self.fanouts):
                reached = nodes[known:]
                degrees, indptr = self._bounds(reached, fanout)
                frontier, edge_ids = self._draw(reached, fanout, indptr)
                block = self._dgl.to_block(frontier, nodes)
                indices, _ = block.edges()
                known, nodes = nodes.shape[0], block.srcdata[self._dgl.NID]
                weight = None if self._edge_weight is None else self._edge_weight[edge_ids]
                sizes = {"num_src": nodes.shape[0], "num_dst": reached.shape[0]}
                layers.append(
                    LayerGraph(
                        indptr,
                        indices,
                        **sizes,
                        degrees=degrees,
                        edge_weight=weight,
                        dst_nodes=reached.contiguous(),
                        global_indices=False,
                    )
                )
        return Drawn(tuple(reversed(layers)), nodes=nodes)
