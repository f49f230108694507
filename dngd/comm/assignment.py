"""Which rank inverts which factor.

An assignment is a pure function of the factors' costs and the world size, so ranks that hold the same costs make the
same one without talking. Longest processing time first: at most 4/3 of the best makespan (Graham 1969).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

Factor = tuple[str, str]
"""(layer name, "A" or "G")."""


def assign_owners(
    costs: Mapping[Factor, float], world_size: int, groups: Iterable[Collection[Factor]] | None = None
) -> dict[Factor, int]:
    """Return the owner rank of each factor: most costly first, each to the least loaded rank.

    groups: factors that are inverted at the same time (those of one refresh); None: all of them. What the others wait
    for is the busiest rank of a group, so that load within the group counts first, and the load of all groups
    so far decides between equals; the most costly group comes first. Further ties go to the lower rank and, between
    factors, to the lower name: the plan is the same everywhere.
    """
    parts = [list(costs)] if groups is None else [list(group) for group in groups]
    loads = [0.0] * world_size
    owners: dict[Factor, int] = {}
    for group in sorted(parts, key=lambda factors: (-sum(sorted(costs[f] for f in factors)), sorted(factors))):
        here = [0.0] * world_size
        for factor in sorted(group, key=lambda item: (-costs[item], item)):
            rank = min(range(world_size), key=lambda r: (here[r], loads[r], r))
            owners[factor] = rank
            here[rank] += costs[factor]
            loads[rank] += costs[factor]
    return owners


def shards_of_rank(num_shards: int, rank: int, world_size: int) -> Sequence[int]:
    """Return the logical shards that a rank executes, as a contiguous run; whole shards only.

    Raises ValueError for more ranks than shards: some rank would have nothing to do.
    """
    if world_size > num_shards:
        raise ValueError(f"{world_size} ranks cannot share {num_shards} shards; use at most {num_shards} workers")
    return range(rank * num_shards // world_size, (rank + 1) * num_shards // world_size)
