"""Where a run's feature table lies: on the device, in the machine's memory, or on its disk.

On a GPU, `device` puts the whole table there. With `pinned` and `disk` it stays in the store's map, one copy a
machine: samplers take the first layer's rows M from it, and M, a fifth of what is gathered for it, is what crosses to
the GPU, from page-locked memory (dngd.train.page_lock). `disk` is for a table larger than memory. Both may keep
the hottest rows on the GPU (dngd.train.hot_rows).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from dngd.config import TrainConfig
from dngd.errors import UserError
from dngd.graph import GraphStore
from dngd.models import GNN, SparseRows
from dngd.sampling.cached_rows import CachedRows
from dngd.sampling.sparse_features import SparseShares, shares_of, sparse_table
from dngd.train.hot_rows import hottest_nodes, keep_rows, least_edge_share, rows_within

Where = Literal["memory_map", "device", "pinned", "disk"]


@dataclass(frozen=True)
class Placement:
    """A decision. where: memory_map is the store's map as it is, of a run on a CPU. device_bytes: of the table or of
    its cached rows on the GPU, at most."""

    where: Where
    device_bytes: int = 0


@dataclass(frozen=True)
class PlacedFeatures:
    """The table, placed. table: [N, F], on the device or the store's map. cache: rows that the device keeps of it.

    sparse: its entries that are not zero, where the first layer works on these alone.
    note: what a person may want to know of it; empty for a run on a CPU that works on the table as it is.
    """

    where: Where
    table: Tensor
    cache: CachedRows | None = None
    note: str = ""
    sparse: SparseRows | None = None

    @property
    def on_host(self) -> bool:
        """Whether the first layer's rows are taken on the host."""
        return self.where != "device"


def choose_placement(config: TrainConfig, table_size: int, free_bytes: int, other_bytes: int) -> Placement:
    """Return where the table goes.

    table_size: bytes, in its stored type. free_bytes: of the GPU (0 without one). other_bytes: what the run needs there
    beside the features. `auto` is the GPU if the table takes at most half of what is free and leaves room for the rest,
    else pinned; without a GPU it is the map as it is. The cache has config.feature_cache_bytes; by default, where the
    table has no room, a quarter of what is free as far as the rest leaves it.
    Raises UserError for `device` if the table does not fit, and for a cache of more than half of what is free.
    """
    wanted = config.feature_placement
    if not config.use_gpu:
        return Placement("disk" if wanted == "disk" else "memory_map")
    room = max(0, free_bytes - other_bytes)
    if wanted == "device" and table_size > free_bytes // 2:
        raise UserError(
            f"the feature table takes {_gib(table_size)} and the GPU has {_gib(free_bytes)} free, of which it may use "
            "half; use --feature-placement pinned, or import the graph with 16-bit features"
        )
    fits = table_size <= min(free_bytes // 2, room)
    if wanted == "device" or (wanted == "auto" and fits):
        return Placement("device", table_size)
    cache_bytes = config.feature_cache_bytes
    if cache_bytes is None:
        cache_bytes = 0 if fits else min(free_bytes // 4, room)
    elif cache_bytes > free_bytes // 2:
        raise UserError(
            f"feature_cache_bytes={cache_bytes} is above half of the GPU's free memory, {_gib(free_bytes)}; give less, "
            "or leave it out for a quarter"
        )
    return Placement("disk" if wanted == "disk" else "pinned", cache_bytes)


def place_features(store: GraphStore, placement: Placement, device: torch.device, *, sampled: bool) -> PlacedFeatures:
    """Put the table where it is to lie. sampled: whether batches are sampled; a cache is of no use otherwise."""
    where, size = placement.where, _gib(table_bytes(store.features))
    if where == "device":
        return PlacedFeatures(where, store.features.to(device), note=f"features: on the GPU ({size})")
    cache, kept = None, ""
    if sampled and where != "memory_map":
        cache, kept = _cache(store, placement, device)
    place = {"memory_map": "", "pinned": "in the machine's memory", "disk": "on the disk"}[where]
    on_gpu = device.type != "cpu" or kept
    note = f"features: {place} ({size}){kept}" if place and on_gpu else ""
    return PlacedFeatures(where, store.features, cache, note)


def sparse_shares(config: TrainConfig, store: GraphStore, model: nn.Module | None) -> SparseShares | None:
    """Return the likely shares of the features, and of the first layer's rows, that are not zero, where a run works on
    sparse features; else None. model: None for the built-in ones.

    That is on a CPU with the store's map, for a built-in model, where the configuration allows it and the graph's
    features are such (dngd.sampling.sparse_features).
    """
    if not config.sparse_features or config.use_gpu or config.feature_placement == "disk":
        return None
    if model is not None and not isinstance(model, GNN):
        return None
    return shares_of(store.features, store, config.fanouts[0])


def with_sparse(
    placed: PlacedFeatures, config: TrainConfig, store: GraphStore, model: nn.Module | None
) -> PlacedFeatures:
    """Return placed features with the table's entries, where a run works on these."""
    if sparse_shares(config, store, model) is None:
        return placed
    sparse = sparse_table(store.features)
    note = f"features: {100 * sparse.share:.2g} % of the table is not zero, and only that is worked on"
    return replace(placed, sparse=sparse, note=note)


def table_bytes(features: Tensor) -> int:
    """Return the bytes of a table in its stored type."""
    return features.numel() * features.element_size()


def free_gpu_bytes(device: torch.device) -> int:
    """Return the bytes that this process may still take of a GPU's memory; those that torch keeps unused count."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _cache(store: GraphStore, placement: Placement, device: torch.device) -> tuple[CachedRows | None, str]:
    """Return the hottest rows on the device, None where that would not pay; and that in words."""
    num_rows = rows_within(placement.device_bytes, store.features)
    if num_rows == 0:
        return None, ""
    hottest = hottest_nodes(store, num_rows)
    least = least_edge_share(store.features, on_disk=placement.where == "disk")
    share = f"{100 * hottest.edge_share:.0f} % of the edges come from"
    if hottest.edge_share < least:
        told = f"; none of it on the GPU, which could keep {num_rows} rows: {share} those, too few to be worth it"
        return None, f"{told} (below {100 * least:.0f} %)"
    return keep_rows(store.features, hottest.nodes, device), f"; {num_rows} rows on the GPU, which {share}"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
