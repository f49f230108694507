"""Splitting a graph's links: which pairs of nodes train, validate and test, and along which edges messages pass.

A link is an unordered pair {u, v} of different nodes with an edge in either direction. Its part is a function of
(seed, u, v) alone: a hash in [0, 1) falls into train, val, test or none of them. So both directions and all copies of
an edge agree, and parts have about, not exactly, their shares. The graph that messages pass along has the training
links' edges and the self loops: edges of validation and test links are not there for anyone to sample.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dngd.errors import UserError
from dngd.graph.splits import parse_fractions
from dngd.graph.store import GraphStore

Words = npt.NDArray[np.uint64]

_ENTRIES_AT_A_TIME = 1 << 22
_MOST_ROUNDS = 64
"""Of drawing negatives again that are links; a graph so dense that these do not do is refused."""
_TRAIN, _VAL, _TEST = range(3)


class HasEdges(Protocol):
    """A graph in CSC form, sources ascending."""

    @property
    def indptr(self) -> Tensor: ...
    @property
    def indices(self) -> Tensor: ...


@dataclass(frozen=True)
class LinkSplit:
    """The links of a graph in three parts.

    graph: what messages pass along. train: int64 [P], for each training link the number of one of its entries in
    graph.indices. val, test: int64 [n, 2], pairs u < v, ascending. val_negatives, test_negatives: int64 [n, 2], as many
    fixed pairs that are no links of the whole graph.
    """

    graph: GraphStore
    train: Tensor
    val: Tensor
    test: Tensor
    val_negatives: Tensor
    test_negatives: Tensor


def split_links(store: GraphStore, spec: str, seed: int) -> LinkSplit:
    """Return the links' split. spec: TRAIN/VAL/TEST, shares that add up to 1 at most.

    Raises UserError for other forms, a part without a link, or a graph with hardly a pair that is no link.
    """
    fractions = parse_fractions(f"link_split {spec!r}", spec, "0.8/0.1/0.1")
    num_kept, degrees = 0, torch.zeros(store.num_nodes, dtype=torch.int64)
    kept: list[Tensor] = []
    train: list[Tensor] = []
    pairs: dict[int, list[Tensor]] = {_VAL: [], _TEST: []}
    for sources, destinations in _entries(store):
        part = _part(sources, destinations, store.num_nodes, fractions, seed)
        stays = (part == _TRAIN) | (sources == destinations)
        kept.append(stays)
        degrees += torch.bincount(destinations[stays], minlength=store.num_nodes)
        stands = _stands_for_link(store, sources, destinations)
        places = stays.cumsum(0) - 1 + num_kept
        train.append(places[stands & (part == _TRAIN)])
        num_kept += int(stays.sum())
        for which, found in pairs.items():
            chosen = stands & (part == which)
            ends = torch.stack([sources[chosen], destinations[chosen]], dim=1)
            found.append(ends.sort(dim=1).values)
    entries = torch.cat([torch.empty(0, dtype=torch.int64), *train])
    held_out = {which: _ascending(found) for which, found in pairs.items()}
    sizes = {"train": entries.numel(), "val": len(held_out[_VAL]), "test": len(held_out[_TEST])}
    empty = [name for name, size in sizes.items() if size == 0]
    if empty:
        raise UserError(
            f"link_split {spec} leaves no {empty[0]} link of graph {store.name}, which has {sum(sizes.values())}; "
            "give that part a larger share, or a graph with more edges"
        )
    everywhere = torch.cat(kept)
    graph = store.with_edges(
        torch.cat([degrees.new_zeros(1), degrees.cumsum(0)]),
        store.indices[everywhere],
        None if store.edge_weight is None else store.edge_weight[everywhere],
    )
    negatives = [_negatives(store, sizes[name], seed, k) for k, name in enumerate(("val", "test"))]
    return LinkSplit(graph, entries, held_out[_VAL], held_out[_TEST], *negatives)


def find_entries(graph: HasEdges, sources: Tensor, destinations: Tensor) -> tuple[Tensor, Tensor]:
    """Return (first, last), int64 [n] each: entries first to last - 1 of graph.indices are the edges source ->
    destination; none where they are equal. Both: int64 [n], node numbers."""
    return _bound(graph, sources, destinations, after=False), _bound(graph, sources, destinations, after=True)


def _bound(graph: HasEdges, sources: Tensor, destinations: Tensor, *, after: bool) -> Tensor:
    """Return where in its destination's ascending sources each source stands, or the place after the last such."""
    low, high = graph.indptr[destinations], graph.indptr[destinations + 1]
    while bool((open_ := low < high).any()):
        middle = (low + high) // 2
        found = graph.indices[torch.where(open_, middle, 0)]
        right = open_ & ((found <= sources) if after else (found < sources))
        low = torch.where(right, middle + 1, low)
        high = torch.where(open_ & ~right, middle, high)
    return low


def _entries(store: GraphStore) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (sources, destinations) of all entries in blocks, each with all entries of its destinations."""
    marks = torch.arange(0, store.num_edges, _ENTRIES_AT_A_TIME)
    cuts = torch.unique(torch.cat([torch.searchsorted(store.indptr, marks), marks.new_tensor([0, store.num_nodes])]))
    for begin, end in zip(cuts.tolist(), cuts.tolist()[1:]):
        first, last = int(store.indptr[begin]), int(store.indptr[end])
        degrees = store.indptr[begin : end + 1].diff()
        yield store.indices[first:last], torch.repeat_interleave(torch.arange(begin, end), degrees)


def _stands_for_link(store: GraphStore, sources: Tensor, destinations: Tensor) -> Tensor:
    """Return which entries of a block stand for their link: one entry a link in the whole graph.

    The one from the lower to the higher node, or, where there is none, the other one; of copies the first.
    """
    repeats = torch.zeros(sources.numel(), dtype=torch.bool)
    repeats[1:] = (sources[1:] == sources[:-1]) & (destinations[1:] == destinations[:-1])
    stands = sources < destinations
    if store.manifest.directed:
        first, last = find_entries(store, destinations, sources)
        stands |= (sources > destinations) & (first == last)
    return stands & ~repeats


def _part(
    sources: Tensor, destinations: Tensor, num_nodes: int, fractions: tuple[float, float, float], seed: int
) -> Tensor:
    low, high = torch.minimum(sources, destinations), torch.maximum(sources, destinations)
    drawn = _uniform((low * num_nodes + high).numpy().astype(np.uint64), seed)
    ends = np.cumsum(fractions)
    ends[-1] = 1.0 if abs(ends[-1] - 1) < 1e-9 else ends[-1]
    return torch.from_numpy(np.searchsorted(ends, drawn, side="right"))


def _uniform(numbers: Words, seed: int) -> npt.NDArray[np.float64]:
    """Return a hash of each number (splitmix64's finalizer, twice, the second time with the seed) in [0, 1)."""
    mixed = _mixed(numbers)
    key = _mixed(np.array([seed], dtype=np.uint64))
    return (_mixed(mixed ^ key) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mixed(values: Words) -> Words:
    x = values + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _ascending(found: list[Tensor]) -> Tensor:
    pairs = torch.cat([torch.empty(0, 2, dtype=torch.int64), *found])
    order = np.lexsort((pairs[:, 1].numpy(), pairs[:, 0].numpy()))
    return pairs[torch.from_numpy(order)]


def draw_pairs(count: int, num_nodes: int, generator: np.random.RandomState) -> Tensor:
    """Return uniform ordered pairs of different nodes, int64 [count, 2]."""
    first = generator.randint(0, num_nodes, count, dtype=np.int64)
    step = generator.randint(1, num_nodes, count, dtype=np.int64)
    return torch.from_numpy(np.stack([first, (first + step) % num_nodes], axis=1))


def _negatives(store: GraphStore, count: int, seed: int, stream: int) -> Tensor:
    # RandomState's streams are frozen (NEP 19).
    generator = np.random.RandomState(np.array([seed, stream], dtype=np.uint32))
    pairs = draw_pairs(count, store.num_nodes, generator)
    for _ in range(_MOST_ROUNDS):
        is_link = torch.zeros(len(pairs), dtype=torch.bool)
        for a, b in ((0, 1), (1, 0)):
            first, last = find_entries(store, pairs[:, a], pairs[:, b])
            is_link |= first < last
        if not bool(is_link.any()):
            return pairs
        pairs[is_link] = draw_pairs(int(is_link.sum()), store.num_nodes, generator)
    raise UserError(
        f"graph {store.name} has hardly a pair of nodes that is no link, so that there is nothing to tell links from; "
        "link prediction needs a sparser graph"
    )
