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

_SAMPLING, _PERMUTATION = 1, 2


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
    # RandomState's streams are frozen (NEP 19); torch.randperm and numpy's newer Generator may change.
    generator = np.random.RandomState(derive_seed(run_seed, _PERMUTATION, epoch))
    return train_nodes[torch.from_numpy(generator.permutation(train_nodes.shape[0]))]


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
