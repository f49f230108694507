"""Which seed nodes are whose, and with which random seed: pure functions of (run seed, epoch, step, shard).

The world size does not appear: a step's global batch is num_shards logical shards, and ranks execute whole
shards, so any world size or resume point does the same work.
"""

from __future__ import annotations

import hashlib
import struct
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

_SAMPLING, _PERMUTATION, _UNLABELLED = 1, 2, 3


def derive_seed(run_seed: int, *words: int) -> int:
    """Return a random seed in [0, 2³¹) for these words, alike on every machine and Python version.

    BLAKE2b over the little-endian 64-bit words: streams of neighbouring words share nothing, and DGL takes
    no more than 31 bits. Each of run_seed and words is in [-2⁶³, 2⁶³).
    """
    packed = struct.pack(f"<{1 + len(words)}q", run_seed, *words)
    digest = hashlib.blake2b(packed, digest_size=4, person=b"dngd seed").digest()
    return int(struct.unpack("<I", digest)[0]) & 0x7FFFFFFF


def sampling_seed(run_seed: int, epoch: int, step: int, shard: int) -> int:
    """Return the random seed of a shard's neighbour draw."""
    return derive_seed(run_seed, _SAMPLING, epoch, step, shard)


def epoch_permutation(train_nodes: Tensor, run_seed: int, epoch: int) -> Tensor:
    """Return train_nodes in the epoch's order: int64 [n]; depends on the order of train_nodes too."""
    return _permuted(train_nodes, derive_seed(run_seed, _PERMUTATION, epoch))


def _permuted(nodes: Tensor, seed: int) -> Tensor:
    # RandomState's streams are frozen (NEP 19); torch.randperm and numpy's newer Generator may change.
    generator = np.random.RandomState(seed)
    return nodes[torch.from_numpy(generator.permutation(nodes.shape[0]))]


def steps_per_epoch(num_train: int, num_shards: int, batch_size: int) -> int:
    """Return ⌈num_train / (num_shards · batch_size)⌉; the last global batch of an epoch may be smaller."""
    return -(-num_train // (num_shards * batch_size))


@lru_cache(maxsize=4)
def shard_bounds(num_train: int, step: int, num_shards: int, batch_size: int) -> tuple[int, ...]:
    """Return num_shards + 1 positions in the epoch's permutation: shard s has [bounds[s], bounds[s + 1]).

    step: within the epoch. A partial global batch is divided as evenly as can be, larger parts first, so
    that no rank waits for another's full shard; with fewer seeds than shards the last shards are empty.
    """
    assert 0 <= step < steps_per_epoch(num_train, num_shards, batch_size), (step, num_train)
    first = step * num_shards * batch_size
    size = min(num_shards * batch_size, num_train - first)
    base, extra = divmod(size, num_shards)
    return tuple(first + shard * base + min(shard, extra) for shard in range(num_shards + 1))


def shard_seeds(
    train_nodes: Tensor, run_seed: int, epoch: int, step: int, num_shards: int, batch_size: int
) -> list[Tensor]:
    """Return each shard's seed nodes of one step: num_shards tensors int64 [≤ batch_size].

    Over an epoch's steps and shards each node of train_nodes occurs exactly once.
    """
    order = epoch_permutation(train_nodes, run_seed, epoch)
    bounds = shard_bounds(train_nodes.shape[0], step, num_shards, batch_size)
    return [order[first:last] for first, last in pairwise(bounds)]


class UnlabelledSeeds:
    """The nodes outside the training set that are seeds of each shard beside its labelled ones.

    nodes: int64 [n_u], distinct. per_shard: how many a shard gets. An epoch's steps take them in rounds, each in a
    random order of its own and without repetition; a round ends where fewer than a step's are left. A graph with fewer
    of them than a step wants gives all to each step, divided as evenly as can be.
    """

    def __init__(self, nodes: Tensor, run_seed: int, num_shards: int, per_shard: int) -> None:
        self._nodes = nodes
        self._run_seed = run_seed
        self._num_shards = num_shards
        self._per_shard = per_shard
        self._steps_per_round = max(1, nodes.shape[0] // (num_shards * per_shard))
        self._order: tuple[tuple[int, int], Tensor] | None = None

    def of(self, epoch: int, step: int, shard: int) -> Tensor:
        """Return a shard's: int64 [≤ per_shard], a function of (run seed, epoch, step within it, shard)."""
        number, step_in_round = divmod(step, self._steps_per_round)
        if self._order is None or self._order[0] != (epoch, number):
            seed = derive_seed(self._run_seed, _UNLABELLED, epoch, number)
            self._order = ((epoch, number), _permuted(self._nodes, seed))
        bounds = shard_bounds(self._nodes.shape[0], step_in_round, self._num_shards, self._per_shard)
        return self._order[1][bounds[shard] : bounds[shard + 1]]
