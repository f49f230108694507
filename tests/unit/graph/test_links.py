"""The split of links: what each part is, for any graph, and that held-out links leave no edge behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dngd.errors import UserError
from dngd.graph import GraphStore, links, split_links
from dngd.graph.links import LinkSplit, find_entries
from dngd.sampling.topology import SharedTopology, open_shared
from tests.helpers.mutants import assert_caught

PROPERTY = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(path: Path, edges: Any, num_nodes: int, **options: Any) -> GraphStore:
    """Loops and copies of edges stay."""
    kept = {"self_loops": "keep", "duplicates": "keep", "overwrite": True} | options
    return GraphStore.write(path, edge_index=np.asarray(edges).T, features=np.eye(num_nodes, 3), **kept)


def edges_of(graph: GraphStore) -> list[tuple[int, int]]:
    destinations = torch.repeat_interleave(torch.arange(graph.num_nodes), graph.indptr.diff())
    return list(zip(graph.indices.tolist(), destinations.tolist()))


def links_of(edges: Any) -> set[tuple[int, int]]:
    return {(min(u, v), max(u, v)) for u, v in edges if u != v}


def as_set(pairs: torch.Tensor) -> set[tuple[int, int]]:
    return {(u, v) for u, v in pairs.tolist()}


def train_links(split: LinkSplit) -> list[tuple[int, int]]:
    edges = edges_of(split.graph)
    return [(min(edges[e]), max(edges[e])) for e in split.train.tolist()]


def law_of_parts(store: GraphStore, split: LinkSplit, *, is_whole: bool) -> None:
    everything = edges_of(store)
    train, val, test = train_links(split), as_set(split.val), as_set(split.test)
    assert len(set(train)) == len(train), "a link stands once among the training links"
    assert len(set(train) | val | test) == len(train) + len(val) + len(test)
    together = set(train) | val | test
    assert together == links_of(everything) if is_whole else together <= links_of(everything)
    expected = [(u, v) for u, v in everything if u == v or (min(u, v), max(u, v)) in set(train)]
    assert edges_of(split.graph) == expected, "the graph has all entries of training links, loops, and nothing else"
    for negatives, positives in ((split.val_negatives, split.val), (split.test_negatives, split.test)):
        assert len(negatives) == len(positives)
        assert not links_of(negatives.tolist()) & links_of(everything)
        assert bool((negatives[:, 0] != negatives[:, 1]).all())


@PROPERTY
@given(seed=st.integers(0, 2**31 - 1), is_directed=st.booleans(), spec=st.sampled_from(["0.6/0.2/0.2", "0.4/0.3/0.2"]))
def test_parts_of_any_graph(tmp_path_factory: pytest.TempPathFactory, seed: int, is_directed: bool, spec: str) -> None:
    generator = np.random.default_rng(seed)
    num_nodes = int(generator.integers(40, 80))
    edges = generator.integers(0, num_nodes, (150, 2))
    edges = np.concatenate([edges, edges[:20]])  # copies
    store = write(tmp_path_factory.mktemp("g") / "g", edges, num_nodes, add_reverse=not is_directed)
    split = split_links(store, spec, seed % 7)
    law_of_parts(store, split, is_whole=spec.startswith("0.6"))


def test_blocks_make_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edges = np.random.default_rng(0).integers(0, 60, (400, 2))
    store = write(tmp_path / "g", edges, 60, edge_weight=np.arange(400.0))
    whole = split_links(store, "0.8/0.1/0.1", 0)
    monkeypatch.setattr(links, "_ENTRIES_AT_A_TIME", 7)
    small = split_links(store, "0.8/0.1/0.1", 0)
    for name in ("train", "val", "test", "val_negatives", "test_negatives"):
        assert torch.equal(getattr(whole, name), getattr(small, name)), name
    assert torch.equal(whole.graph.indices, small.graph.indices)
    assert whole.graph.edge_weight is not None
    assert store.edge_weight is not None
    weights = {(u, v, w) for (u, v), w in zip(edges_of(store), store.edge_weight.tolist())}
    assert {(u, v, w) for (u, v), w in zip(edges_of(whole.graph), whole.graph.edge_weight.tolist())} <= weights


def test_a_links_part_is_its_own(tmp_path: Path) -> None:
    """It depends on neither other edges nor the direction; seeds give other parts; shares are about what was asked."""
    edges = np.random.default_rng(0).integers(0, 500, (5000, 2))
    edges = edges[edges[:, 0] != edges[:, 1]]
    store = write(tmp_path / "a", edges, 500)
    split = split_links(store, "0.7/0.2/0.1", 5)
    half = split_links(write(tmp_path / "b", edges[:2500, ::-1], 500), "0.7/0.2/0.1", 5)

    def law() -> None:
        assert as_set(half.val) == as_set(split.val) & links_of(edges[:2500])
        law_of_parts(store, split_links(store, "0.7/0.2/0.1", 5), is_whole=True)

    original = links._part
    # Of the direction, two ways in which an edge of a held-out link could stay.
    assert_caught(law, links, "_part", lambda s, d, n, f, seed: original(s, torch.where(s < d, d, d + 1), n, f, seed))
    total = len(links_of(edges))
    assert abs(len(split.val) / total - 0.2) < 5 * (0.2 * 0.8 / total) ** 0.5
    assert as_set(split_links(store, "0.7/0.2/0.1", 6).val) != as_set(split.val)


def test_entries_are_found(tmp_path: Path) -> None:
    store = write(tmp_path / "g", [(0, 1), (0, 1), (2, 1), (1, 0), (3, 3)], 5)
    first, last = find_entries(store, torch.tensor([0, 2, 1, 1, 3, 4, 0]), torch.tensor([1, 1, 0, 2, 3, 0, 4]))
    assert (last - first).tolist() == [2, 1, 1, 0, 1, 0, 0]
    assert store.indices[first[0] : last[0]].tolist() == [0, 0]


def test_sampler_processes_see_the_edges_that_are_left(tmp_path: Path) -> None:
    """And the features of the file; the whole store, which its path would open, has the held-out edges."""
    store = write(tmp_path / "g", np.random.default_rng(0).integers(0, 60, (400, 2)), 60)
    graph = split_links(store, "0.6/0.2/0.2", 0).graph
    shared = SharedTopology(graph)
    opened, extra = open_shared(shared.description, {fd: fd for fd in shared.fds})
    shared.close()
    assert extra == {}
    assert torch.equal(opened.indices, graph.indices)
    assert torch.equal(opened.indptr, graph.indptr)
    assert torch.equal(opened.features, store.features)  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="cannot be pickled"):
        graph.__reduce__()
    assert graph.num_edges == graph.indices.numel() < store.num_edges


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("0.8/0.2", "link_split '0.8/0.2' does not give three fractions"),
        ("0.8/0.2/0.2", r"add up to 1\.2"),
        ("random:0.8/0.1/0.1", "does not give three fractions"),
        ("0.98/0.01/0.01", "leaves no (val|test) link of graph"),
    ],
)
def test_bad_splits(tmp_path: Path, spec: str, message: str) -> None:
    store = write(tmp_path / "g", [(0, 1), (1, 2), (2, 3)], 4)
    with pytest.raises(UserError, match=message):
        split_links(store, spec, 0)


def test_a_complete_graph_is_refused(tmp_path: Path) -> None:
    edges = [(u, v) for u in range(12) for v in range(12) if u != v]
    with pytest.raises(UserError, match="hardly a pair of nodes that is no link"):
        split_links(write(tmp_path / "g", edges, 12), "0.6/0.2/0.2", 0)
