"""The pipeline's edges: arguments, failures in a child, empty shards, stores on disk."""

from __future__ import annotations

import threading
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from dngd.errors import TrainingError, UserError
from dngd.graph.store import GraphStore
from dngd.sampling import pipeline as pipeline_module
from dngd.sampling import process
from dngd.sampling.pipeline import SamplerPipeline
from dngd.sampling.sampler import NeighborSampler
from dngd.sampling.topology import Topology
from tests.unit.sampling.graphs import digest, make_pipeline, skewed_graph, take, topology


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw in this process whatever thread of this test run used DGL first."""
    monkeypatch.setattr(pipeline_module, "inline_sampling_is_canonical", lambda: True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fanouts": ()}, "fanout="),
        ({"fanouts": (3, 0)}, "fanout=(3, 0)"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"num_shards": 0}, "num_shards=0"),
        ({"num_samplers": -1}, "num_samplers=-1"),
        ({"prefetch": -1}, "prefetch=-1"),
        ({"prefetch": 0, "num_samplers": 1}, "prefetch=0"),
        ({"shards": []}, "shards=[]"),
        ({"shards": [4]}, "shards=[4]"),
        ({"start": (0, 7)}, "7 steps"),
        ({"train_nodes": torch.arange(0)}, "no training nodes"),
        ({"train_nodes": torch.tensor([0, 400])}, "training node 400"),
        ({"train_nodes": torch.tensor([0, 0])}, "more than once"),
    ],
)
def test_arguments_that_cannot_be(changes: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=r".") as caught:
        make_pipeline(changes.pop("num_samplers", 0), **changes)  # type: ignore[arg-type]
    assert words in str(caught.value)


@pytest.mark.usefixtures("inline")
def test_order_is_steps_then_shards_for_ever() -> None:
    seen = [batch.coordinates for batch in islice(make_pipeline(0, start=(2, 5)), 9)]
    expected = [(2, 5), (2, 6), (3, 0)]
    assert [(at.epoch, at.step, at.shard) for at in seen] == [(*at, s) for at in expected for s in (0, 1, 3)]


@pytest.mark.usefixtures("inline")
def test_empty_shards_and_lonely_nodes() -> None:
    lonely = replace(topology([[] for _ in range(3)], weighted=True), features=torch.ones(3, 2))
    batches = take(make_pipeline(0, store=lonely, train_nodes=torch.tensor([2]), shards=[0, 1, 2, 3]), 4)
    assert [batch.seeds.tolist() for batch in batches] == [[2], [], [], []]
    for batch in batches:
        for layer in batch.layers:
            assert layer.num_dst == len(batch.seeds)
            assert layer.num_edges == 0
            assert layer.indptr.tolist() == [0] * (len(batch.seeds) + 1)
            assert layer.edge_weight is not None
        assert batch.first_rows is not None
        # A node without neighbours: its own row, and zeros for their mean.
        assert batch.first_rows.tolist() == [[1.0, 1.0, 0.0, 0.0]] * len(batch.seeds)


@pytest.mark.usefixtures("inline")
def test_a_thread_that_draws_nothing_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    drawing = threading.Event()
    monkeypatch.setattr(NeighborSampler, "sample", lambda *_: drawing.wait(10))
    try:
        with pytest.raises(TrainingError, match=r"epoch 0, step 0, shard 0.*within 0.05 s"):
            next(make_pipeline(0, timeout_seconds=0.05))
    finally:
        drawing.set()


@pytest.mark.usefixtures("inline")
def test_the_training_thread_keeps_its_threads() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        batches = make_pipeline(0)
        take(batches, 2)
        assert torch.get_num_threads() == 2
        found: list[int] = []
        thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert found == [2]
    finally:
        torch.set_num_threads(before)


def test_a_store_on_disk_gives_the_batches_of_its_arrays_and_a_childs_exception_reaches_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = skewed_graph()
    store = GraphStore.write(
        tmp_path / "graph",
        features=graph.features,
        labels=torch.zeros(400, dtype=torch.int64),
        indptr=graph.indptr,
        indices=graph.indices,
        edge_weight=graph.edge_weight,
        self_loops="keep",
    )
    in_memory = Topology(store.indptr, store.indices, store.edge_weight, store.features)
    with make_pipeline(1, store=str(tmp_path / "graph")) as opened, make_pipeline(1, store=in_memory) as sent:
        assert digest(take(opened, 6)) == digest(take(sent, 6))
        at = sent._pending[-1].coordinates
        monkeypatch.setattr(SamplerPipeline, "_rng_seed", lambda self, at: -1)
        with pytest.raises(TrainingError) as caught:
            take(sent, 6)
    assert f"epoch {at.epoch}, step {at.step + (at.shard == 3)}, shard" in str(caught.value)
    assert "AssertionError: -1" in str(caught.value)
    assert "sampler.py" in str(caught.value)


def test_a_child_that_cannot_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho out of luck\nexit 3\n")
    broken.chmod(0o700)
    monkeypatch.setattr(process.sys, "executable", str(broken))
    with make_pipeline(1) as batches, pytest.raises(TrainingError, match="exited with code 3") as caught:
        take(batches, 1)
    assert "out of luck" in str(caught.value)
    assert "epoch 0, step 0, shard 0" in str(caught.value)


def test_a_store_that_the_child_cannot_open(tmp_path: Path) -> None:
    class Gone:
        path = tmp_path / "gone"
        indptr, indices, edge_weight = skewed_graph().indptr, skewed_graph().indices, None

    with make_pipeline(1, store=Gone()) as batches, pytest.raises(TrainingError, match="gone"):
        take(batches, 1)


def test_closed_is_closed() -> None:
    batches = make_pipeline(1)
    batches.close()
    batches.close()
    with pytest.raises(TrainingError, match="closed"):
        next(batches)


def test_a_store_that_was_replaced_is_not_mixed_with_what_is_open(tmp_path: Path) -> None:
    """Sampler processes open it by its path, as unpickling does."""
    edges = torch.stack([torch.arange(30), (torch.arange(30) + 1) % 30])
    store = GraphStore.write(tmp_path / "g", features=torch.ones(30, 2), edge_index=edges)
    reopen, given = store.__reduce__()
    assert torch.equal(reopen(*given).indices, store.indices)
    same = GraphStore.write(tmp_path / "g", features=torch.ones(30, 2), edge_index=edges, overwrite=True)
    assert torch.equal(reopen(*given).indices, same.indices)
    take(make_pipeline(1, store=store, train_nodes=torch.arange(30)), 1)
    GraphStore.write(tmp_path / "g", features=torch.ones(30, 2), edge_index=edges.flip(0), overwrite=True)
    with pytest.raises(UserError, match=r"g was replaced since the store was opened; open the store again"):
        reopen(*given)
    with pytest.raises(
        TrainingError, match=r"cannot read the graph: .*g was replaced since the store was opened; open"
    ):
        take(make_pipeline(1, store=store, train_nodes=torch.arange(30)), 1)
