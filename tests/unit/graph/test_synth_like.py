"""Generated stand-ins for public graphs: exact counts, skewed degrees, learnable labels, one seed one graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import psutil
import pytest
import scipy.sparse
import torch

from dngd.errors import UserError
from dngd.graph import LIKE, GraphStore, describe, like_config, synth_like, verify_store, write_like

PRODUCTS_DIGESTS = {
    "indptr.arrow": "1160bb1d5cf20f81bef7cf453702817225a62924da54d6a8c74418c1409e34ea",
    "indices.arrow": "39cf4ee5e698ed768a19cd6b431eab6af0bb23c343ca9b0f53fa665ddea41e17",
    "labels.arrow": "9d303cfd763cefdc70d91492f55c46e3a256ebeb59e48281650da3b961f0c001",
    "splits.arrow": "17a6c4f9db35d27c4d33d1e8c72d7c4badab739ed95035be456d81c6f9fcca0d",
}
"""Of a thousandth of ogbn-products, made in memory by the generator that the committed benchmark figures used."""


@pytest.fixture(scope="module")
def products(tmp_path_factory: pytest.TempPathFactory) -> GraphStore:
    return write_like(tmp_path_factory.mktemp("like") / "g", like_config("ogbn-products", 0.004), name="p")


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> GraphStore:
    return write_like(tmp_path_factory.mktemp("like") / "g", like_config("ogbn-papers100M", 0.001), name="p")


def test_the_sizes_are_those_of_ogb() -> None:
    one, two = LIKE["ogbn-products"], LIKE["ogbn-papers100m"]
    assert (one.num_nodes, one.num_edges, one.num_features, one.num_classes) == (2_449_029, 123_718_280, 100, 47)
    assert (one.num_train, one.num_val, one.num_nodes - one.num_train - one.num_val) == (196_615, 39_323, 2_213_091)
    assert (two.num_nodes, two.num_edges, two.num_features, two.num_classes) == (111_059_956, 1_615_685_872, 128, 172)
    assert (two.num_train, two.num_val, two.num_test) == (1_207_179, 125_265, 214_338)
    assert like_config("ogbn-products") == one
    assert like_config("ogbn-papers100m", 0.1).num_edges == 161_568_587
    assert like_config("ogbn-products", 0.0015).num_edges % 2 == 0


def test_products_counts_are_exact_and_degrees_skewed(products: GraphStore) -> None:
    info = describe(products)
    assert (info["num_nodes"], info["num_edges"], info["num_features"]) == (9_796, 494_874, 100)
    assert not info["directed"]
    assert info["duplicates"]["dropped"] == info["self_loops"]["dropped"] == 0
    assert info["homophily"] > 0.6
    assert info["in_degree"]["max"] > 20 * info["in_degree"]["median"]
    split = products.split("masks")
    assert [len(part) for part in (split.train, split.val, split.test)] == [786, 157, 8_853]
    assert info["num_labelled"] == 9_796
    assert verify_store(products.path) == []


def test_products_are_what_the_benchmarks_measured_on(tmp_path: Path) -> None:
    """The draws are raw bits of PCG64, the same in every numpy; the features' normal numbers are not."""
    store = write_like(tmp_path / "g", like_config("ogbn-products", 0.001), name="p")
    assert {name: store.manifest.files[name].sha256 for name in PRODUCTS_DIGESTS} == PRODUCTS_DIGESTS


def test_papers_are_a_citation_graph_with_few_labels(papers: GraphStore) -> None:
    info = describe(papers)
    assert (info["num_nodes"], info["num_edges"], info["num_features"], info["num_classes"]) == (
        111_060,
        1_615_686,
        128,
        172,
    )
    assert info["directed"]
    masks = papers.split_masks
    assert [int(masks[name].sum()) for name in ("train", "val", "test")] == [1_207, 125, 214]
    labelled = papers.labels >= 0
    assert labelled.equal(masks["train"] | masks["val"] | masks["test"])
    assert int(labelled.sum()) == 1_207 + 125 + 214
    # A few are cited very often, none cites so many; some are never cited, and some cite nothing.
    references = torch.bincount(papers.indices, minlength=papers.num_nodes)
    assert int(papers.in_degrees().max()) > 500 * float(papers.in_degrees().double().mean())
    assert int(references.max()) < 40 * float(references.double().mean())
    assert 0 < int((papers.in_degrees() == 0).sum()) < papers.num_nodes // 20
    assert papers.num_nodes // 10 < int((references == 0).sum()) < papers.num_nodes // 3
    assert verify_store(papers.path) == []


@pytest.mark.parametrize("which", ["products", "papers"])
def test_neighbours_tell_the_class(which: str, request: pytest.FixtureRequest) -> None:
    """Nearest class mean of own and neighbours' mean features, fitted to the training nodes: far above guessing."""
    store: GraphStore = request.getfixturevalue(which)
    x, y = store.features, store.labels
    adjacency = scipy.sparse.csr_matrix(
        (np.ones(store.num_edges, np.float32), store.indices.numpy(), store.indptr.numpy()),
        shape=(store.num_nodes, store.num_nodes),
    )
    split = store.split("masks")
    num_train, rows = len(split.train), torch.cat([split.train, split.test])
    own, classes = x[rows], y[split.train].unique()
    degrees = store.in_degrees()[rows].clamp(min=1)[:, None]
    around = torch.from_numpy(adjacency[rows.numpy()] @ x.numpy()) / degrees

    def accuracy(table: torch.Tensor) -> float:
        means = torch.stack([table[:num_train][y[split.train] == c].mean(0) for c in classes])
        scores = table[num_train:] @ means.T - 0.5 * means.square().sum(1)
        return float((classes[scores.argmax(1)] == y[split.test]).float().mean())

    most_frequent = float(y[split.test].bincount().max()) / len(split.test)
    alone, both = accuracy(own), accuracy(torch.cat([own, 3 * around], 1))
    assert alone > 5 / store.num_classes
    assert both > 1.5 * max(alone, most_frequent)


def test_one_seed_one_graph_whatever_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = like_config("ogbn-products", 0.001, seed=5)
    one = write_like(tmp_path / "one", config, name="g")
    with monkeypatch.context() as patch:
        patch.setattr("dngd.graph.key_sort._LEAST_BYTES", 1 << 15)
        two = write_like(tmp_path / "two", config, name="g")
    assert one.digest == two.digest
    other = write_like(tmp_path / "other", like_config("ogbn-products", 0.001, seed=6), name="g")
    assert not other.labels.equal(one.labels)
    assert not other.indices[:1000].equal(one.indices[:1000])


@pytest.mark.parametrize(("total", "wanted"), [(1000, 1000), (1000, 997), (1001, 500), (64, 1), (10, 3)])
def test_surplus_is_left_out_evenly_whatever_the_chunks(total: int, wanted: int) -> None:
    surplus = total - wanted
    want = [k * total // surplus for k in range(surplus)]
    for size in (1, 7, 64, total):
        found = [
            int(position)
            for start in range(0, total, size)
            for position in synth_like._surplus_within(start, min(start + size, total), surplus, total)
        ]
        assert found == want


@pytest.mark.parametrize("scale", [0.0, -1.0, 1.5, float("nan"), 1e-6])
def test_a_scale_out_of_range_is_refused(scale: float) -> None:
    with pytest.raises(UserError, match=r"give 0\.001 to 1"):
        like_config("ogbn-products", scale)


def test_unknown_graphs_and_seeds_are_refused() -> None:
    with pytest.raises(UserError, match=r"'cora' is not known; give one of ogbn-products, ogbn-papers100m"):
        like_config("cora")
    with pytest.raises(UserError, match="seed=-1"):
        like_config("ogbn-products", seed=-1)


def test_room_is_checked_before_anything_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = like_config("ogbn-papers100m", 0.1)
    monkeypatch.setattr(synth_like, "_classes", lambda *_: pytest.fail("drawn"))
    with monkeypatch.context() as patch:
        patch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1 << 30}))
        with pytest.raises(UserError, match=r"GiB of memory and 1\.0 GiB are free; give a smaller --scale"):
            write_like(tmp_path / "new" / "g", config, name="g")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1 << 40}))
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Disk", (), {"free": 2 << 30}))
    with pytest.raises(UserError, match=rf"GiB of disk at {tmp_path} and 2\.0 GiB are free"):
        write_like(tmp_path / "new" / "g", config, name="g")
    assert list(tmp_path.iterdir()) == []


def test_too_many_distinct_edges_are_refused(tmp_path: Path) -> None:
    config = synth_like.LikeConfig(
        num_nodes=100, num_edges=9_900, num_classes=3, num_features=2, num_train=10, num_val=5, same_class=0.99
    )
    with pytest.raises(UserError, match="of 4950 distinct edges could be found"):
        write_like(tmp_path / "g", config, name="g")
    assert list(tmp_path.iterdir()) == []
