"""Laws of partitions: balanced whatever the graph, few edges cut, streamed, and whole or absent in a store."""

from __future__ import annotations

import errno
import fcntl
import functools
import itertools
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dngd.errors import UserError
from dngd.graph import GraphStore, Partition, balance, describe, ldg, partition, partition_by_ldg, write_partition
from dngd.graph.balance import Limits, enforce, node_blocks
from dngd.graph.partition import PartitionTask, check_writable
from tests.helpers.mutants import assert_caught


def planted(num_nodes: int, communities: int, degree: int, inside: float, *, shuffled: bool, seed: int = 0) -> Any:
    """Return (edge_index with both directions, each node's community)."""
    rng = np.random.default_rng(seed)
    community = np.arange(num_nodes) * communities // num_nodes
    if shuffled:
        rng.shuffle(community)
    members = np.argsort(community, kind="stable")
    bounds = np.searchsorted(community[members], np.arange(communities + 1))
    one = rng.integers(0, num_nodes, num_nodes * degree // 2)
    c = community[one]
    near = members[bounds[c] + rng.integers(0, 2**40, len(one)) % (bounds[c + 1] - bounds[c])]
    other = np.where(rng.random(len(one)) < inside, near, rng.integers(0, num_nodes, len(one)))
    edges = np.stack([one, other])
    return np.concatenate([edges, edges[::-1]], axis=1), community


def plain(path: Path, edge_index: Any, num_nodes: int, **options: Any) -> GraphStore:
    return GraphStore.write(path, edge_index=edge_index, features=None, num_nodes=num_nodes, **options)


def cut_by_hand(store: GraphStore, part: torch.Tensor) -> float:
    destination = torch.repeat_interleave(torch.arange(store.num_nodes), store.in_degrees())
    differs = part[store.indices] != part[destination]
    return float(differs.double().mean()) if store.num_edges else 0.0


def assert_balanced(made: Partition, num_nodes: int, train: np.ndarray, slack: float) -> None:
    part, parts = made.assignment, made.parts
    assert part.dtype == torch.int32
    assert part.shape == (num_nodes,)
    assert int(part.min()) >= 0
    assert int(part.max()) < parts
    for nodes in (part, part[torch.from_numpy(train)]):
        share = len(nodes) / parts
        largest = int(nodes.bincount(minlength=parts).max()) if len(nodes) else 0
        assert largest <= max(np.ceil(share), (1 + slack) * share + 1e-6)


@st.composite
def graphs(draw: st.DrawFn) -> tuple[int, np.ndarray, np.ndarray]:
    """Nodes, entries (hubs, copies, loops, isolated nodes, none at all) and training nodes (none to all)."""
    num_nodes = draw(st.integers(1, 60))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    num_entries = draw(st.sampled_from([0, 1, 30, 300]))
    highest = draw(st.sampled_from([1, max(1, num_nodes // 3), num_nodes]))
    pairs = np.stack([rng.integers(0, highest, num_entries), rng.integers(0, num_nodes, num_entries)])
    train = np.flatnonzero(rng.random(num_nodes) < draw(st.sampled_from([0.0, 0.05, 0.5, 1.0])))
    return num_nodes, pairs, train


@settings(max_examples=60, deadline=None)
@given(
    graph=graphs(),
    parts=st.integers(1, 13),
    slack=st.sampled_from([0.0, 0.05, 0.5]),
    passes=st.integers(1, 4),
    seed=st.integers(0, 3),
)
def test_every_node_has_one_part_and_no_part_holds_too_many(
    graph: tuple[int, np.ndarray, np.ndarray], parts: int, slack: float, passes: int, seed: int
) -> None:
    num_nodes, pairs, train = graph
    with tempfile.TemporaryDirectory() as folder:
        store = plain(Path(folder) / "g", pairs, num_nodes, self_loops="keep", duplicates="keep")
        options: dict[str, Any] = {"train": torch.from_numpy(train), "slack": slack, "passes": passes, "seed": seed}
        made = partition_by_ldg(store, parts, **options)
        assert_balanced(made, num_nodes, train, slack)
        assert made.info.edge_cut == pytest.approx(cut_by_hand(store, made.assignment))
        assert made.info.nodes == made.assignment.bincount(minlength=parts).tolist()
        expected = made.assignment[torch.from_numpy(train)].bincount(minlength=parts).tolist() if len(train) else None
        assert made.info.train_nodes == expected
        assert torch.equal(partition_by_ldg(store, parts, **options).assignment, made.assignment)


@settings(max_examples=60, deadline=None)
@given(graph=graphs(), parts=st.integers(1, 13), slack=st.sampled_from([0.0, 0.05, 0.5]), seed=st.integers(0, 99))
def test_any_assignment_is_made_balanced(
    graph: tuple[int, np.ndarray, np.ndarray], parts: int, slack: float, seed: int
) -> None:
    num_nodes, pairs, train = graph
    destination = np.sort(pairs[1])
    indptr = np.searchsorted(destination, np.arange(num_nodes + 1))
    rng = np.random.default_rng(seed)
    part = rng.integers(0, rng.integers(1, parts + 1), num_nodes).astype(np.int32)
    mask = np.zeros(num_nodes, dtype=np.bool_)
    mask[train] = True
    limits = Limits.of(num_nodes, len(train), parts, slack)
    before, was_met = part.copy(), limits.met_by(part, mask)
    moved = enforce(part, mask, limits, indptr, pairs[0])
    assert limits.met_by(part, mask)
    assert int((part != before).sum()) <= moved
    assert (moved == 0) == was_met


def test_the_nodes_that_lose_least_are_moved() -> None:
    # Nodes 0 to 3 are a clique in part 0; 4 has both neighbours in part 1.
    pairs = [(a, b) for a in range(4) for b in range(4) if a != b] + [(5, 4), (6, 4), (4, 5), (4, 6)]
    source, destination = np.array(sorted(pairs, key=lambda pair: (pair[1], pair[0]))).T
    indptr = np.searchsorted(destination, np.arange(9))
    part = np.array([0, 0, 0, 0, 0, 1, 1, 1], dtype=np.int32)
    none = np.zeros(8, dtype=np.bool_)
    assert enforce(part, none, Limits.of(8, 0, 2, 0.0), indptr, source) == 1
    assert part.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_balance_law_catches_a_missing_repair(tmp_path: Path) -> None:
    store = plain(tmp_path / "g", np.array([[0, 1], [1, 0]]), 10)

    def law() -> None:
        task = PartitionTask.of(store, 3, torch.arange(5), 0.0, 0)
        made = task.finished(np.zeros(10, dtype=np.int32), "given", {})
        assert_balanced(made, 10, np.arange(5), 0.0)

    assert_caught(law, partition, "enforce", lambda *arguments: 0)


@pytest.mark.parametrize("shuffled", [True, False])
def test_planted_communities_are_found(tmp_path: Path, shuffled: bool) -> None:
    edges, community = planted(4000, 4, 24, 0.9, shuffled=shuffled)
    store = plain(tmp_path / "g", edges, 4000)
    best = cut_by_hand(store, torch.from_numpy(community))

    def law() -> None:
        made = partition_by_ldg(store, 4, train=torch.arange(0, 4000, 7))
        assert made.info.edge_cut <= 1.1 * best

    if shuffled:
        assert_caught(law, ldg._Stream, "_choose", lambda self, pairs, before: before)
    else:
        assert_caught(law, ldg._Stream, "restart_from_ranges_if_better", lambda self: None)


def test_the_seed_matters_and_a_single_part_holds_all(tmp_path: Path) -> None:
    edges, _ = planted(500, 2, 6, 0.5, shuffled=True)
    store = plain(tmp_path / "g", edges, 500)
    one, other = (partition_by_ldg(store, 4, seed=seed).assignment for seed in (0, 1))
    assert not torch.equal(one, other)
    alone = partition_by_ldg(store, 1)
    assert alone.info.nodes == [500]
    assert alone.info.edge_cut == 0.0


class Spied:
    """An array that notes which ranges are read from it."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array
        self.ranges: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, key: Any) -> Any:
        assert isinstance(key, slice), "the stream reads ranges"
        self.ranges.append((key.start, key.stop))
        return self._array[key]


def test_the_topology_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edges, _ = planted(8000, 4, 10, 0.9, shuffled=True)
    store = plain(tmp_path / "g", edges, 8000)
    monkeypatch.setattr(ldg, "node_blocks", functools.partial(node_blocks, max_edges=500))
    spied: Any = Spied(store.indices.numpy())
    train = np.zeros(8000, dtype=np.bool_)
    ldg.ldg_assignment(store.indptr.numpy(), spied, 4, train, slack=0.05, passes=2, seed=0)
    # Front to back: two passes, and two to compare the first one's cut.
    assert sum(start == 0 for start, _ in spied.ranges) == 4
    for (_, stop), (start, _) in itertools.pairwise([(0, store.num_edges), *spied.ranges]):
        assert start == (stop if stop < store.num_edges else 0)
    assert max(stop - start for start, stop in spied.ranges) <= 500


@given(degrees=st.lists(st.integers(0, 9), min_size=1, max_size=40), nodes=st.integers(1, 9), edges=st.integers(1, 12))
def test_blocks_cover_all_nodes_within_their_bounds(degrees: list[int], nodes: int, edges: int) -> None:
    indptr = np.concatenate([[0], np.cumsum(degrees)])
    blocks = list(node_blocks(indptr, nodes, edges))
    assert [node for start, end in blocks for node in range(start, end)] == list(range(len(degrees)))
    for start, end in blocks:
        assert end - start <= nodes
        assert indptr[end] - indptr[start] <= edges or end - start == 1


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.data())
def test_level_fill_lifts_the_lowest(sizes: list[int], data: st.DataObject) -> None:
    size = np.array(sizes)
    limit = size + np.array(data.draw(st.lists(st.integers(0, 9), min_size=len(sizes), max_size=len(sizes))))
    count = data.draw(st.integers(0, int((limit - size).sum())))
    given_out = ldg.level_fill(size, limit, count)
    filled = size + given_out
    assert given_out.sum() == count
    assert (given_out >= 0).all()
    assert (filled <= limit).all()
    raised = filled[given_out > 0]
    # Nobody was given anything while one with room stayed more than one below.
    if len(raised) and (filled < limit).any():
        assert raised.max() <= filled[filled < limit].min() + 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"parts": 0}, "parts=0"),
        ({"slack": -0.1}, "slack=-0.1"),
        ({"slack": float("nan")}, "slack=nan"),
        ({"passes": 0}, "passes=0"),
        ({"seed": -1}, "seed=-1"),
        ({"train": torch.tensor([30])}, "0 to 29"),
    ],
)
def test_bad_arguments_are_refused(small: GraphStore, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        partition_by_ldg(small, **{"parts": 2, **options})


# Storage


def hashes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_partition_is_added_beside_the_graph(small: GraphStore) -> None:
    before = hashes(small.path)
    assert b"partitions" not in before["manifest.json"]
    made = partition_by_ldg(small, 3, train=small.split_masks["train"].nonzero()[:, 0])
    store = write_partition(write_partition(small, partition_by_ldg(small, 11)), made)
    assert torch.equal(store.partition(3), made.assignment)
    assert store.partition(11).dtype == torch.int32
    assert store.partitions[3] == made.info
    assert list(store.partitions) == [3, 11]
    assert store.digest == small.digest
    after = hashes(small.path)
    assert set(after) - set(before) == {"partition.3.arrow", "partition.11.arrow"}
    assert all(after[name] == content for name, content in before.items() if name != "manifest.json")
    assert store.verify() == []
    shown = describe(store)["partitions"]["3"]
    assert shown["nodes_a_part"] == [min(made.info.nodes), max(made.info.nodes)]
    assert shown["edge_cut"] == made.info.edge_cut
    with pytest.raises(UserError, match=r"no partition in 5 parts \(it has: 3, 11\).*--parts 5"):
        store.partition(5)


def test_a_partition_is_replaced_only_on_demand(small: GraphStore) -> None:
    one, other = (partition_by_ldg(small, 4, seed=seed) for seed in (0, 5))
    assert not torch.equal(one.assignment, other.assignment)
    store = write_partition(small, one)
    for refused in (lambda: write_partition(store, other), lambda: check_writable(store, 4, overwrite=False)):
        with pytest.raises(UserError, match=r"partition in 4 parts already .*--overwrite"):
            refused()
    assert torch.equal(GraphStore.open(small.path).partition(4), one.assignment)
    assert torch.equal(write_partition(store, other, overwrite=True).partition(4), other.assignment)


def test_a_replaced_partition_is_not_taken_for_the_old_one(small: GraphStore) -> None:
    one, other = (partition_by_ldg(small, 4, seed=seed) for seed in (0, 5))
    stores = [write_partition(small, one), GraphStore.open(small.path)]
    stores[0].partition(4)
    write_partition(small, other, overwrite=True)
    assert torch.equal(stores[0].partition(4), one.assignment), "what was opened stays as it was"
    with pytest.raises(UserError, match="replaced since the store was opened"):
        stores[1].partition(4)
    assert torch.equal(GraphStore.open(small.path).partition(4), other.assignment)


def test_a_partition_of_another_graph_is_refused(small: GraphStore, tmp_path: Path) -> None:
    made = partition_by_ldg(small, 2)
    other = plain(tmp_path / "other", np.zeros((2, 0), dtype=int), 5)
    with pytest.raises(UserError, match="make it of this graph"):
        write_partition(other, made)
    with pytest.raises(UserError, match="other sizes"):
        write_partition(small, Partition(torch.zeros(30, dtype=torch.int32), made.info))
    GraphStore.write(small.path, edge_index=[[0], [1]], features=np.ones((30, 1)), overwrite=True)
    with pytest.raises(UserError, match="another graph by now"):
        write_partition(small, made)


def test_a_store_with_partitions_is_replaced_as_a_whole(small: GraphStore) -> None:
    write_partition(small, partition_by_ldg(small, 2))
    store = GraphStore.write(small.path, edge_index=[[0], [1]], features=np.ones((2, 1)), overwrite=True)
    assert store.partitions == {}
    assert not (store.path / "partition.2.arrow").exists()


def test_broken_partitions_are_found_and_made_again(small: GraphStore) -> None:
    made = partition_by_ldg(small, 4)
    path = write_partition(small, made).path / "partition.4.arrow"
    entry = GraphStore.open(small.path).manifest.files[path.name]
    whole = path.read_bytes()
    for position in range(0, len(whole), 41):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        store = GraphStore.open(small.path)  # the graph itself is sound
        problems = store.verify()
        assert problems
        assert all("partition.4.arrow" in p and "--parts 4 --overwrite" in p for p in problems), problems
        if not entry.data_offset <= position < entry.data_offset + entry.data_bytes:
            with pytest.raises(UserError, match=r"altered header or footer.*--parts 4 --overwrite"):
                store.partition(4)
        else:
            with pytest.raises(UserError, match=r"was altered.*--parts 4 --overwrite"):
                store.partition(4)
    for damage in (lambda: path.write_bytes(whole[:-1]), path.unlink):
        damage()
        assert any("partition.4.arrow" in problem for problem in GraphStore.open(small.path).verify())
    assert write_partition(GraphStore.open(small.path), made, overwrite=True).verify() == []


def test_verify_checks_the_parts_themselves(small: GraphStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store = write_partition(small, partition_by_ldg(small, 4))
    swapped = store.partition(4).clone()
    swapped[swapped == 0] = 1
    for part, said in (
        (torch.full((30,), 4, dtype=torch.int32), "parts 4 to 4, not 0 to 3"),
        (swapped, "other numbers"),
    ):
        monkeypatch.setattr(GraphStore, "partition", lambda self, parts, part=part: part)
        assert any(said in problem for problem in store.verify())


def at_each_call(point: int, die: Callable[[], None]) -> None:
    """Call `die` at the point-th step that changes the disk, before or after it."""
    count = itertools.count()

    def around(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            if function is opened and "w" not in arguments[1:2]:
                return function(*arguments, **options)
            if next(count) == point:
                die()
            result = function(*arguments, **options)
            if next(count) == point:
                die()
            return result

        return wrapper

    opened = Path.open
    os.fsync = around(os.fsync)
    for name in ("replace", "unlink", "open"):
        setattr(Path, name, around(getattr(Path, name)))


@pytest.mark.parametrize("replaced", [False, True])
def test_a_kill_at_any_moment_leaves_a_sound_store(small: GraphStore, replaced: bool) -> None:
    old, new = (partition_by_ldg(small, 4, seed=seed) for seed in (0, 5))
    small = write_partition(small, partition_by_ldg(small, 2))
    allowed: list[torch.Tensor | None] = [None, new.assignment]
    for point in itertools.count():
        if 4 not in GraphStore.open(small.path).partitions and replaced:
            write_partition(small, old)
            allowed.append(old.assignment)
        pid = os.fork()
        if pid == 0:
            try:
                at_each_call(point, lambda: os._exit(9))
                write_partition(small, new, overwrite=True)
                os._exit(0)
            finally:
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        store = GraphStore.open(small.path)
        assert store.verify() == [], point
        assert store.digest == small.digest
        assert 2 in store.partitions
        found = store.partition(4) if 4 in store.partitions else None
        assert any(found is a if a is None or found is None else torch.equal(found, a) for a in allowed), point
        if code == 0:
            break
        assert code == 9
        if not replaced and found is not None:
            # As if the next kill came to a store without it.
            small = write_partition(store, new, overwrite=True)
    assert point > 8
    assert found is not None
    left = {path.name for path in store.path.iterdir()} - {"manifest.json", *store.manifest.files}
    assert left == set(), "the write that went through removes what the killed ones left"


@pytest.mark.parametrize("where", ["write_columns", "_written"])
def test_a_full_disk_changes_nothing(small: GraphStore, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    store = write_partition(small, partition_by_ldg(small, 4))
    before = hashes(store.path)
    real = getattr(partition, where)

    def full(path: Path, *arguments: Any) -> Any:
        real(path, *arguments)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(partition, where, full)
    with pytest.raises(UserError, match=r"No space left on device.*free some space"):
        write_partition(store, partition_by_ldg(small, 4, seed=5), overwrite=True)
    assert hashes(store.path) == before


def test_a_read_only_store_is_told_before_the_work(small: GraphStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    check_writable(small, 4, overwrite=False)
    assert {path.name for path in small.path.iterdir()} == {"manifest.json", *small.manifest.files}
    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(UserError, match=r"Read-only file system.*--reorder --out"):
        check_writable(small, 4, overwrite=False)


def test_writers_at_once_lose_nothing(small: GraphStore) -> None:
    made = [partition_by_ldg(small, parts) for parts in range(2, 8)]
    threads = [threading.Thread(target=write_partition, args=(small, one)) for one in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store = GraphStore.open(small.path)
    assert list(store.partitions) == list(range(2, 8))
    assert store.verify() == []


def test_a_wait_for_another_writer_is_told_and_ends(small: GraphStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partition, "_WAIT_SECONDS", 0.3)
    told: list[str] = []
    made = partition_by_ldg(small, 2)
    lock = os.open(small.path, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(
        UserError, match=r"waited 0\.3 s for another process to finish: writing a partition into .* end it"
    ):
        write_partition(small, made, progress=lambda stage, *_: told.append(stage))
    assert set(told) == {f"waiting for another process to finish writing a partition into {small.path}"}
    os.close(lock)
    assert list(write_partition(small, made).partitions) == [2]


def test_limits_are_an_even_share_and_its_slack() -> None:
    assert balance.Limits.of(100, 7, 4, 0.05) == Limits(4, nodes=26, train=2)
    assert balance.Limits.of(100, 0, 4, 0.0) == Limits(4, nodes=25, train=0)
    assert balance.Limits.of(3, 3, 5, 0.0) == Limits(5, nodes=1, train=1)
