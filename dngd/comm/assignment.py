"""Which rank inverts which factor.

A plan is a pure function of the factors' costs and the world size, so every rank computes the same
one without talking. Longest processing time first: at most 4/3 of the best makespan (Graham 1969).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Factor = tuple[str, str]
"""(layer name, "A" or "G")."""


def assign_owners(costs: Mapping[Factor, float], world_size: int) -> dict[Factor, int]:
    """Return the owner rank of each factor: most costly first, each to the least loaded rank.

    Ties go to the lower rank and, between factors, to the lower name: the plan is the same everywhere.
    """
    loads = [0.0] * world_size
    owners: dict[Factor, int] = {}
    for factor in sorted(costs, key=lambda item: (-costs[item], item)):
        rank = min(range(world_size), key=lambda r: (loads[r], r))
        owners[factor] = rank
        loads[rank] += costs[factor]
    return owners


def shards_of_rank(num_shards: int, rank: int, world_size: int) -> Sequence[int]:
    """Return the logical shards that a rank executes, as a contiguous run; whole shards only.

    Raises ValueError for more ranks than shards: some rank would have nothing to do.
    """
    if world_size > num_shards:
        raise ValueError(f"{world_size} ranks cannot share {num_shards} shards; use at most {num_shards} workers")
    return range(rank * num_shards // world_size, (rank + 1) * num_shards // world_size)
