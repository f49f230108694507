"""From a shard's training links to its mini-batch: negatives, the nodes to embed, and the edges that must not be seen.

A link that is to be predicted must not be an edge that messages pass along: all entries of a batch's links, in both
directions, are left out of its layer graphs.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dngd.graph.links import draw_pairs, find_entries
from dngd.sampling.minibatch import BatchCoordinates, MiniBatch, SeedPairs
from dngd.sampling.schedule import derive_seed
from dngd.sampling.topology import HasTopology

_NEGATIVES = 4


class LinkSeeds:
    """graph: what messages pass along, sources ascending. negatives: uniform pairs a link. run_seed: of their draw."""

    def __init__(self, graph: HasTopology, negatives: int, run_seed: int) -> None:
        self._graph = graph
        self._num_nodes = graph.indptr.shape[0] - 1
        self._negatives = negatives
        self._run_seed = run_seed

    def batch(self, links: Tensor, at: BatchCoordinates) -> MiniBatch:
        """Return the mini-batch of links, still without layers.

        links: int64 [n], entries of the graph's indices. Seeds are the end nodes of links and negatives, each once,
        ascending. Negatives are a function of (run seed, epoch, step, shard) and n.
        """
        positives = torch.stack([self._graph.indices[links], self._destinations(links)], dim=1)
        words = (self._run_seed, _NEGATIVES, at.epoch, at.step, at.shard)
        generator = np.random.RandomState(derive_seed(*words))
        negatives = draw_pairs(self._negatives * len(links), self._num_nodes, generator)
        seeds, rows = torch.unique(torch.cat([positives, negatives]), return_inverse=True)
        pairs = SeedPairs(rows, len(links))
        return MiniBatch(seeds, layers=(), coordinates=at, pairs=pairs, excluded=self._entries_of(positives))

    def _destinations(self, entries: Tensor) -> Tensor:
        found: Tensor = torch.searchsorted(self._graph.indptr, entries, right=True) - 1
        return found

    def _entries_of(self, pairs: Tensor) -> Tensor:
        """Return all entries between the ends of pairs, in both directions and with copies: int64, ascending."""
        sources = torch.cat([pairs[:, 0], pairs[:, 1]])
        destinations = torch.cat([pairs[:, 1], pairs[:, 0]])
        first, last = find_entries(self._graph, sources, destinations)
        counts = last - first
        begins = torch.repeat_interleave(first - (counts.cumsum(0) - counts), counts)
        found: Tensor = torch.unique(begins + torch.arange(begins.numel()))
        return found
