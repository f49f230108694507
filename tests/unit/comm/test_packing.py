"""Packing and bucketing are exact inverses; plans are the same everywhere."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dngd.comm import (
    assign_owners,
    buckets,
    flatten,
    shards_of_rank,
    unflatten,
)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 4), max_size=3), max_size=6))
def test_flatten_round_trip(shapes: list[list[int]]) -> None:
    tensors = [torch.randn(shape) for shape in shapes]
    for tensor, back in zip(tensors, unflatten(flatten(tensors), shapes)):
        assert torch.equal(tensor, back)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 50), st.integers(1, 100))
def test_buckets_cover_a_buffer_once(size: int, bucket_bytes: int) -> None:
    flat = torch.zeros(size)
    for bucket in buckets(flat, bucket_bytes):
        assert 0 < bucket.numel() <= max(1, bucket_bytes // 4)
        bucket += 1
    assert torch.equal(flat, torch.ones(size))


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.tuples(st.text(max_size=3), st.sampled_from("AG")), st.integers(1, 500)), st.integers(1, 9))
def test_owners_are_balanced(dimensions: dict[tuple[str, str], int], world_size: int) -> None:
    costs = {factor: float(d) ** 3 for factor, d in dimensions.items()}
    owners = assign_owners(costs, world_size)
    assert owners.keys() == costs.keys()
    assert owners == assign_owners(dict(reversed(costs.items())), world_size), "depends on the order of a dict"
    loads = [sum(cost for f, cost in costs.items() if owners[f] == rank) for rank in range(world_size)]
    lower_bound = max([sum(costs.values()) / world_size, *costs.values()], default=0)
    assert max(loads) <= (4 / 3) * lower_bound * 1.5 + 1e-9


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30))
def test_every_shard_has_one_rank(num_shards: int, world_size: int) -> None:
    if world_size > num_shards:
        with pytest.raises(ValueError, match="at most"):
            shards_of_rank(num_shards, 0, world_size)
        return
    runs = [list(shards_of_rank(num_shards, rank, world_size)) for rank in range(world_size)]
    assert [shard for run in runs for shard in run] == list(range(num_shards))
    assert all(runs)
    assert max(map(len, runs)) - min(map(len, runs)) <= 1
