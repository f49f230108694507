"""dngd.NeighborLoader: PyG's batches in a loop of one's own, against the graph that they are of."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch_geometric import EdgeIndex
from torch_geometric.data import Data, HeteroData
from torch_geometric.nn import GCN, GraphSAGE

import dngd
from dngd.errors import TrainingError, UserError
from dngd.graph import GraphStore

NUM_NODES = 120
ROOT = Path(__file__).parents[3]


def graph(*, weighted: bool = False) -> Data:
    """A directed graph with self loops, edges of several copies, and nodes without in-edges."""
    generator = torch.Generator().manual_seed(3)
    source = torch.randint(NUM_NODES, (700,), generator=generator)
    target = (torch.rand(700, generator=generator) ** 2 * (NUM_NODES - 10)).long()
    data = Data(
        x=torch.randn(NUM_NODES, 5, generator=generator),
        y=torch.randint(4, (NUM_NODES,), generator=generator),
        edge_index=torch.stack([source, target]),
        train_mask=torch.rand(NUM_NODES, generator=generator) < 0.6,
        name="made up",
    )
    if weighted:
        data.edge_weight = torch.rand(700, generator=generator)
    return data


def batches(data: Any, *, epochs: int = 1, **options: Any) -> list[Data]:
    settings = {"num_neighbors": [3, 2], "batch_size": 16, "num_workers": 0} | options
    with dngd.NeighborLoader(data, **settings) as loader:
        return [batch for _ in range(epochs) for batch in loader]


def content(batch: Data) -> list[Any]:
    return [
        (key, value.tolist() if isinstance(value, Tensor) else value) for key, value in sorted(batch.to_dict().items())
    ]


def in_edges(edge_index: Tensor, weight: Tensor | None, names: Tensor, node: int) -> Counter[tuple[int, float]]:
    """A row's in-edges as (source's name, weight), each with how often it is there."""
    into = edge_index[1] == node
    weights = torch.ones(int(into.sum())) if weight is None else weight[into]
    return Counter(zip(names[edge_index[0, into]].tolist(), weights.tolist()))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_all_neighbours_are_the_graph(weighted: bool, num_workers: int) -> None:
    data = graph(weighted=weighted)
    names = torch.arange(NUM_NODES)
    for batch in batches(data, num_neighbors=[-1, -1], num_workers=num_workers):
        inner = sum(batch.num_sampled_nodes[:2])
        for row, node in enumerate(batch.n_id.tolist()):
            found = in_edges(batch.edge_index, batch.get("edge_weight"), batch.n_id, row)
            wanted = in_edges(data.edge_index, data.get("edge_weight"), names, node)
            assert found == (wanted if row < inner else Counter()), (row, node)
    model = GraphSAGE(5, 8, num_layers=2, out_channels=4)
    with torch.no_grad():
        whole = model(data.x, data.edge_index)
        for batch in batches(data, num_neighbors=[-1, -1]):
            seeds = batch.n_id[: batch.batch_size]
            assert torch.allclose(model(batch.x, batch.edge_index)[: batch.batch_size], whole[seeds], atol=1e-5)


def test_neighbours_are_drawn_by_hop() -> None:
    data = graph()
    known = set(map(tuple, data.edge_index.t().tolist()))
    degrees = torch.bincount(data.edge_index[1], minlength=NUM_NODES)
    for batch in batches(data, epochs=3):
        assert set(map(tuple, batch.n_id[batch.edge_index].t().tolist())) <= known
        ends = np.cumsum([0, *batch.num_sampled_nodes])
        assert ends[-1] == batch.num_nodes
        assert batch.num_sampled_nodes[0] == batch.batch_size
        assert sum(batch.num_sampled_edges) == batch.num_edges
        drawn = torch.bincount(batch.edge_index[1], minlength=batch.num_nodes)
        for hop, fanout in enumerate((3, 2, 0)):
            rows = slice(ends[hop], ends[hop + 1])
            assert torch.equal(drawn[rows], degrees[batch.n_id[rows]].clamp(max=fanout)), hop
        assert torch.unique(batch.n_id).numel() == batch.num_nodes
        # Nearest first: a row of hop h + 1 is a source of an edge into hop h.
        for hop in (0, 1):
            edges = slice(sum(batch.num_sampled_edges[:hop]), sum(batch.num_sampled_edges[: hop + 1]))
            into = batch.edge_index[1, edges]
            assert ends[hop] <= int(into.min()) <= int(into.max()) < ends[hop + 1]
            reached = set(batch.edge_index[0, edges].tolist())
            assert set(range(ends[hop + 1], ends[hop + 2])) <= reached


def test_each_hop_has_its_own_number() -> None:
    """PyG's order: the seeds' neighbours first."""
    data = graph()
    [batch] = batches(data, num_neighbors=[4, 1], batch_size=NUM_NODES, input_nodes=torch.arange(5))[:1]
    drawn = torch.bincount(batch.edge_index[1], minlength=batch.num_nodes)
    assert int(drawn[:5].max()) == 4
    assert int(drawn[5:].max()) == 1


def test_rows_can_be_trimmed() -> None:
    data = graph()
    model = GraphSAGE(5, 8, num_layers=2, out_channels=4)
    for batch in batches(data):
        hops = {
            "num_sampled_nodes_per_hop": batch.num_sampled_nodes,
            "num_sampled_edges_per_hop": batch.num_sampled_edges,
        }
        whole, trimmed = model(batch.x, batch.edge_index), model(batch.x, batch.edge_index, **hops)
        assert trimmed.shape[0] < whole.shape[0]
        assert torch.allclose(whole[: batch.batch_size], trimmed[: batch.batch_size], atol=1e-6)


def test_a_batch_has_what_the_graph_has_of_its_nodes() -> None:
    data = graph(weighted=True)
    for batch in batches(data):
        for name in ("x", "y", "train_mask"):
            assert torch.equal(batch[name], data[name][batch.n_id]), name
        assert batch.name == "made up"
    data.edge_attr = torch.ones(700, 3)
    with pytest.warns(UserWarning, match="batches are without edge_attr, which are of the edges") as told:
        [batch, *_] = batches(data)
    assert "edge_attr" not in batch
    assert len(told) == 1
    assert told[0].filename == __file__


def test_an_epoch_has_each_seed_once_in_its_own_order() -> None:
    data = graph()
    train = data.train_mask.nonzero()[:, 0]
    with dngd.NeighborLoader(data, [2], data.train_mask, 16, num_workers=0) as loader:
        assert len(loader) == -(-train.numel() // 16)
        orders = [torch.cat([b.n_id[: b.batch_size] for b in loader]) for _ in range(2)]
        assert loader.epoch == 2
    for order in orders:
        assert torch.equal(order.sort().values, train)
    assert not torch.equal(*orders)
    given = train.flip(0)
    kept = batches(data, num_neighbors=[2], input_nodes=given, shuffle=False, epochs=2)
    assert torch.equal(torch.cat([b.n_id[: b.batch_size] for b in kept]), given.repeat(2))
    everything = torch.cat([b.n_id[: b.batch_size] for b in batches(data, shuffle=False)])
    assert torch.equal(everything, torch.arange(NUM_NODES))


def test_batches_are_the_same_with_any_number_of_workers_and_from_any_epoch() -> None:
    data = graph(weighted=True)
    wanted = [content(batch) for batch in batches(data, epochs=3, num_workers=1)]
    assert len({str(batch) for batch in wanted}) == len(wanted)
    for num_workers in (0, 2):
        assert [content(batch) for batch in batches(data, epochs=3, num_workers=num_workers)] == wanted
    with dngd.NeighborLoader(data, [3, 2], batch_size=16, num_workers=1) as loader:
        length = len(loader)
        for batch in loader:  # left in the middle
            assert content(batch) == wanted[0]
            break
        assert [content(batch) for batch in loader] == wanted[length : 2 * length]
        assert [content(batch) for batch in loader] == wanted[2 * length :]
        loader.epoch = 1
        assert [content(batch) for batch in loader] == wanted[length : 2 * length]
    assert [content(batch) for batch in batches(data, epochs=3, seed=1)] != wanted


def test_ranks_share_an_epoch() -> None:
    data = graph()
    seeds = torch.arange(35)  # of the last step's 3 the ranks get 1, 1, 1, 0
    parts = [
        batches(data, input_nodes=seeds, batch_size=8, rank=rank, world_size=4, num_workers=0) for rank in range(4)
    ]
    assert [len(part) for part in parts] == [2] * 4
    assert [part[-1].batch_size for part in parts] == [1, 1, 1, 0]
    found = torch.cat([b.n_id[: b.batch_size] for part in parts for b in part])
    assert torch.equal(found.sort().values, seeds)
    model = GCN(5, 8, num_layers=2, out_channels=4)
    empty = parts[3][-1]
    assert model(empty.x, empty.edge_index)[: empty.batch_size].shape == (0, 4)


def test_a_store_is_read_where_it_is(tmp_path: Path) -> None:
    data = graph()
    written = {"features": data.x.numpy(), "labels": data.y.numpy(), "edge_index": data.edge_index.numpy()}
    store = GraphStore.write(tmp_path / "g", **written, duplicates="keep", self_loops="keep", feature_dtype="float16")
    wanted = [content(batch) for batch in batches(data, num_workers=1)]
    for given in (store, str(tmp_path / "g")):
        for batch, of_data in zip(batches(given, num_workers=1), wanted, strict=True):
            assert batch.x.dtype == torch.float32
            assert torch.equal(batch.x, data.x[batch.n_id].half().float())
            others = [pair for pair in of_data if pair[0] not in ("x", "train_mask", "name")]
            assert [pair for pair in content(batch) if pair[0] != "x"] == others
    rows = (np.arange(NUM_NODES)[:, None] % [2, 3] == 0).astype(np.int8)
    several = GraphStore.write(tmp_path / "m", **(written | {"labels": rows}))
    for batch in batches(several):
        assert torch.equal(batch.y, torch.from_numpy(rows)[batch.n_id].float())


def test_nodes_without_features_or_edges_are_counted() -> None:
    """PyG's own count is of what edges name: labels and masks would be taken for the graph's as a whole."""
    whole = graph()
    data = Data(edge_index=whole.edge_index % (NUM_NODES - 3), y=whole.y, train_mask=whole.train_mask)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = batches(data)
    for batch in found:
        assert torch.equal(batch.y, whole.y[batch.n_id])
        assert torch.equal(batch.train_mask, whole.train_mask[batch.n_id])
        assert "x" not in batch
    assert sum(batch.batch_size for batch in found) == NUM_NODES


def test_arrays_and_lists_of_the_nodes_are_theirs() -> None:
    data = graph()
    data.test_mask = data.train_mask.numpy()
    data.titles = [f"node {k}" for k in range(NUM_NODES)]
    data.neg_edge_index = torch.zeros(2, NUM_NODES, dtype=torch.int64)
    with pytest.warns(UserWarning, match="batches are without neg_edge_index, which are of the edges, or numbers of"):
        found = batches(data)
    for batch in found:
        assert torch.equal(batch.test_mask, data.train_mask[batch.n_id])
        assert batch.titles == [f"node {k}" for k in batch.n_id.tolist()]


def test_an_edge_index_of_pygs_own_class(tmp_path: Path) -> None:
    """It has no memory at the address that it tells."""
    data = graph()
    wanted = [content(batch) for batch in batches(data)]
    data.edge_index = EdgeIndex(data.edge_index, sparse_size=(NUM_NODES, NUM_NODES))
    assert [content(batch) for batch in batches(data)] == wanted
    assert dngd.graph.import_pyg(data, tmp_path / "g").num_edges > 0


def test_gradients_are_not_passed_on_and_that_is_said() -> None:
    data = graph(weighted=True)
    data.x = data.x.clone().requires_grad_() * 2
    data.edge_weight = data.edge_weight.requires_grad_()
    data.n_id = torch.arange(NUM_NODES)
    with pytest.warns(UserWarning, match="requires a gradient") as told:
        found = batches(data)
    said = " ".join(str(one.message) for one in told)
    assert "look rows of an embedding up by batch.n_id" in said
    assert "the graph has an n_id" in said
    assert "edge_weight requires a gradient" in said
    assert not any(batch.x.requires_grad or batch.edge_weight.requires_grad for batch in found)


def test_a_batch_that_is_kept_does_not_change() -> None:
    with dngd.NeighborLoader(graph(weighted=True), [3, 2], batch_size=8, num_workers=1) as loader:
        kept = [(batch, content(batch)) for _ in range(3) for batch in loader]
    assert all(content(batch) == before for batch, before in kept)


def test_neighbours_are_drawn_alike_often() -> None:
    """One node with ten in-neighbours, of which three are drawn: each pair of them as often as another."""
    data = Data(x=torch.ones(11, 1), edge_index=torch.stack([torch.arange(1, 11), torch.zeros(10, dtype=torch.int64)]))
    found: Counter[frozenset[int]] = Counter()
    with dngd.NeighborLoader(data, [2], torch.tensor([0]), num_workers=0) as loader:
        for _ in range(4500):
            [batch] = loader
            found[frozenset(batch.n_id[1:].tolist())] += 1
    assert len(found) == 45
    chi = sum((count - 100) ** 2 / 100 for count in found.values())
    assert chi < 85, "of 44 degrees of freedom, above which one of 5,000 is"


def test_two_loops_at_once_are_refused() -> None:
    with dngd.NeighborLoader(graph(), [3, 2], batch_size=16, num_workers=0) as loader:
        with pytest.raises(UserError, match="another loop over this NeighborLoader was begun"):
            list(zip(loader, loader))
        assert len(list(loader)) == len(loader)


def test_a_copy_has_workers_of_its_own() -> None:
    loader = dngd.NeighborLoader(graph(), [3, 2], batch_size=16, num_workers=1)
    first = [content(batch) for batch in loader]
    for made in (copy.deepcopy(loader), copy.copy(loader), pickle.loads(pickle.dumps(loader))):  # noqa: S301  # the test's own
        assert made.epoch == 1
        made.epoch = 0
        assert [content(batch) for batch in made] == first
        made.close()
    assert len(list(loader)) == len(loader)
    loader.close()


FORKS = """
import os, torch, dngd
from tests.unit.sampling.test_neighbor_loader import batches, content, graph

torch.set_num_threads(1)  # a pool of threads does not survive a fork
wanted = [content(batch) for batch in batches(graph(), epochs=2, num_workers=1)]
loader = dngd.NeighborLoader(graph(), [3, 2], batch_size=16, num_workers=1)
assert [content(batch) for batch in loader] == wanted[: len(loader)]
child = os.fork()
if not child:
    os._exit(0 if [content(batch) for batch in loader] == wanted[len(loader) :] else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
pipeline = loader._pipeline
assert [content(batch) for batch in loader] == wanted[len(loader) :]
assert loader._pipeline is pipeline
print("alike")
"""


def test_a_forked_process_has_workers_of_its_own() -> None:
    """And leaves its parent's alone. In a process without the threads that tests leave."""
    command = [sys.executable, "-W", "ignore", "-c", FORKS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "alike\n"), done.stderr


def test_what_follows_from_the_batch_size_cannot_be_changed() -> None:
    loader = dngd.NeighborLoader(graph(), [3, 2], batch_size=16, num_workers=0)
    with pytest.raises(AttributeError):
        loader.batch_size = 5  # type: ignore[misc]
    with pytest.raises(UserError, match="epoch=-1 is too small"):
        loader.epoch = -1


def test_a_worker_that_dies_is_said_and_the_next_loop_has_another() -> None:
    data = graph()
    with dngd.NeighborLoader(data, [3, 2], batch_size=2, num_workers=1, prefetch=1) as loader:
        it = iter(loader)
        next(it)
        pipeline = loader._pipeline
        assert pipeline is not None
        os.kill(pipeline.pids[0], signal.SIGKILL)
        with pytest.raises(TrainingError, match=r"epoch 0, step \d+"):
            list(it)
        assert len(list(loader)) == len(loader)


def test_workers_end_with_the_loader() -> None:
    loader = dngd.NeighborLoader(graph(), [3, 2], batch_size=16, num_workers=1)
    next(iter(loader))
    pipeline = loader._pipeline
    assert pipeline is not None
    [pid] = pipeline.pids
    del loader, pipeline
    gc.collect()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"num_neighbors": []},
            "num_neighbors=[] is not valid; give a number for each hop, nearest to the seeds first",
        ),
        ({"num_neighbors": [3, 0]}, "num_neighbors=[3, 0] is not valid"),
        ({"num_neighbors": 3}, "num_neighbors=3 is not valid"),
        ({"num_neighbors": "15"}, "num_neighbors='15' is not valid"),
        ({"num_neighbors": [1.5, 2]}, "num_neighbors=[1.5, 2] is not valid"),
        ({"batch_size": 2.0}, "batch_size=2.0 is no whole number"),
        ({"seed": None}, "seed=None is no whole number"),
        ({"timeout_seconds": 0}, "timeout_seconds=0 is too small"),
        ({"world_size": 0}, "world_size=0 is too small"),
        ({"input_nodes": ("paper", torch.arange(3))}, "input_nodes is a tuple; give numbers of nodes"),
        ({"input_nodes": torch.ones(NUM_NODES, dtype=torch.uint8)}, "input_nodes is uint8; give a mask as mask.bool()"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"num_workers": -1}, "num_workers=-1 is too small; give at least 0"),
        ({"num_workers": 1, "prefetch": 0}, "prefetch=0 is too small; give at least 1"),
        ({"rank": 2, "world_size": 2}, "rank=2 is not one of world_size=2; give 0 to 1"),
        ({"input_nodes": torch.zeros(NUM_NODES, dtype=torch.bool)}, "input_nodes names no node"),
        ({"input_nodes": torch.ones(3, dtype=torch.bool)}, "mask of shape [3], and the graph has 120 nodes"),
        ({"input_nodes": torch.tensor([0, 120])}, "input_nodes names node 120, and the graph's are 0 to 119"),
        ({"input_nodes": torch.tensor([-1])}, "input_nodes names node -1"),
        ({"input_nodes": torch.tensor([4, 4])}, "more than once"),
        ({"input_nodes": torch.ones(3)}, "input_nodes is float32 of shape [3]"),
        ({"graph": HeteroData()}, "the graph is"),
        ({"graph": [graph()]}, "the graph is a list; give a torch_geometric.data.Data (of a dataset dataset[0])"),
        ({"graph": Data(x=torch.ones(3, 1))}, "no edge_index"),
        (
            {"graph": Data(x=torch.ones(3, 1), edge_index=torch.tensor([[0], [3]]))},
            "names node 3, and its nodes are 0 to 2",
        ),
        ({"graph": Data(x=torch.ones(3, 1), edge_index=torch.tensor([[0], [-1]]))}, "names node -1"),
        ({"graph": Data(x=torch.ones(3, 1), edge_index=torch.ones(2, 1))}, "edge_index of the graph is float32"),
        (
            {"graph": Data(x=torch.ones(3, 1), edge_index=torch.tensor([[0], [1]]), edge_weight=torch.ones(2))},
            "edge_weight of the graph has 2 entries for 1 edges",
        ),
        ({"graph": "no-such-graph"}, "no-such-graph"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], words: str) -> None:
    settings = {"graph": graph(), "num_neighbors": [3, 2], "batch_size": 16, "num_workers": 0} | changes
    with pytest.raises(UserError) as caught:
        dngd.NeighborLoader(**settings)
    assert words in str(caught.value)
