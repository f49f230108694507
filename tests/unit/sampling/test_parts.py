"""Seeds, the wire and the feature table."""

from __future__ import annotations

import socket
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dngd.sampling import wire
from dngd.sampling.sampler import NeighborSampler
from dngd.sampling.schedule import derive_seed, epoch_permutation
from tests.unit.sampling.graphs import layer_arrays, skewed_graph

SEEDS = [1180557743, 1522250250, 1091564262]
ORDER = [6, 2, 0, 4, 1, 3, 7, 5]


def test_seeds_and_orders_are_the_same_everywhere() -> None:
    """Written down: another machine or Python that derives others would break every resumed run."""
    assert [derive_seed(0), derive_seed(0, 1), derive_seed(7, 1, 2, 3)] == SEEDS
    assert epoch_permutation(torch.arange(8), 3, 5).tolist() == ORDER


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=5))
def test_seeds_fit_dgl(words: list[int]) -> None:
    assert 0 <= derive_seed(*words) < 2**31


def test_seeds_of_neighbouring_coordinates_do_not_collide() -> None:
    seeds = {derive_seed(0, epoch, step, shard) for epoch in range(20) for step in range(20) for shard in range(5)}
    assert len(seeds) >= 1999  # 2000 draws of 31 bits: one collision has a chance of .001


@pytest.mark.parametrize("seeds", [[], [3, 1, 2], list(range(300))])
def test_layers_survive_the_wire(seeds: list[int]) -> None:
    graph = skewed_graph()
    sampler = NeighborSampler(graph.indptr, graph.indices, graph.edge_weight, (5, -1))
    layers = sampler.sample(torch.tensor(seeds, dtype=torch.int64), 5)
    sizes, arrays = wire.pack_layers(layers)
    near, far = socket.socketpair()
    with near, far:
        # more than a socket's buffer holds
        sender = threading.Thread(target=wire.send, args=(near, {"layers": sizes}, arrays))
        sender.start()
        header, received = wire.receive(far)
        sender.join()
    for sent, got in zip(layers, wire.unpack_layers(header["layers"], iter(received)), strict=True):
        assert (sent.num_src, sent.num_dst, sent.global_indices) == (
            got.num_src,
            got.num_dst,
            got.global_indices,
        )
        for one, other in zip(layer_arrays(sent), layer_arrays(got), strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)


def test_a_closed_end_is_an_error() -> None:
    near, far = socket.socketpair()
    with far:
        near.sendall(b"123")
        near.close()
        with pytest.raises(wire.ConnectionLostError):
            wire.receive(far)
