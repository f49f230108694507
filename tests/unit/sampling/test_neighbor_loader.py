"""dngd.NeighborLoader: PyG's batches in a loop of one's own, against the graph that they are of."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch_geometric.data import Data, HeteroData
from torch_geometric.nn import GCN, GraphSAGE

import dngd
from dngd.errors import TrainingError, UserError
from dngd.graph import GraphStore

NUM_NODES = 120


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
    with pytest.warns(UserWarning, match="batches are without edge_attr of the edges") as told:
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
        for batch, of_data in zip(batches(given, num_workers=1), wanted):
            assert batch.x.dtype == torch.float32
            assert torch.equal(batch.x, data.x[batch.n_id].half().float())
            assert {k: v for k, v in content(batch) if k != "x"}.items() <= {
                k: v for k, v in of_data if k not in ("x", "train_mask", "name")
            }.items()


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
