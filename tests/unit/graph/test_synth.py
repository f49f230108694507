"""Properties of generated graphs."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch

from dngd.errors import UserError
from dngd.graph import GraphStore, SynthConfig, describe, synthesize, write_synth

SMALL = SynthConfig(num_nodes=600, num_edges=6000, num_classes=7, num_features=12, homophily=0.7, label_noise=0.1)
SMALL_DIGEST = "9d74a8fc0b9a55c23521b37d195ef4fec37c30d71c849ffda8b96439b3b975fa"


def test_products_mini_is_what_it_says(products_mini: GraphStore) -> None:
    info = describe(products_mini)
    assert (info["num_nodes"], info["num_edges"], info["num_classes"]) == (60_000, 1_500_000, 47)
    assert products_mini.num_features == 100
    assert not info["directed"]
    assert abs(info["homophily"] - 0.8) < 0.02
    assert info["in_degree"]["max"] > 20 * info["in_degree"]["median"]
    assert max(info["class_counts"]) > 5 * float(np.median(info["class_counts"]))
    assert min(info["class_counts"]) > 100
    split = products_mini.split("masks")
    assert [len(part) for part in (split.train, split.val, split.test)] == [24_000, 6_000, 30_000]


def test_products_mini_features_are_ill_conditioned_and_correlated(products_mini: GraphStore) -> None:
    covariance = torch.cov(products_mini.features.T.double())
    values = torch.linalg.eigvalsh(covariance)
    assert float(values[-1] / values[0]) > 500
    correlation = covariance / covariance.diag().sqrt().outer(covariance.diag().sqrt())
    off_diagonal = correlation - torch.eye(len(correlation))
    assert float(off_diagonal.abs().max()) > 0.3


def test_neighbours_tell_more_than_features_alone(products_mini: GraphStore) -> None:
    """Nearest class mean, whitened: on a node's own features, and on its neighbours' mean."""
    x, y = products_mini.features, products_mini.labels
    adjacency = scipy.sparse.csr_matrix(
        (np.ones(products_mini.num_edges, np.float32), products_mini.indices.numpy(), products_mini.indptr.numpy())
    )
    around = (torch.from_numpy(adjacency @ x.numpy()) + x) / (products_mini.in_degrees() + 1)[:, None]
    split = products_mini.split("masks")

    def accuracy(features: torch.Tensor) -> float:
        train, labels = features[split.train], y[split.train]
        means = torch.zeros(47, 100).index_add_(0, labels, train) / torch.bincount(labels, minlength=47)[:, None]
        precision = torch.linalg.inv(torch.cov((train - means[labels]).T))
        prior = torch.bincount(labels, minlength=47).log()
        scores = features[split.val] @ precision @ means.T - 0.5 * (means @ precision * means).sum(1) + prior
        return float((scores.argmax(1) == y[split.val]).float().mean())

    alone, with_neighbours = accuracy(x), accuracy(around)
    assert alone < 0.55
    assert with_neighbours > alone + 0.2
    assert with_neighbours < 1 - 0.06


def test_topology_labels_and_masks_are_the_same_everywhere() -> None:
    graph = synthesize(SMALL)
    digest = hashlib.sha256()
    for part in (graph.edge_index, graph.labels, *graph.masks.values()):
        digest.update(np.ascontiguousarray(part).tobytes())
    assert digest.hexdigest() == SMALL_DIGEST


def test_one_seed_one_graph() -> None:
    one, two, other = (synthesize(dataclasses.replace(SMALL, seed=s)) for s in (3, 3, 4))
    assert np.array_equal(one.edge_index, two.edge_index)
    assert np.array_equal(one.features, two.features)
    assert not np.array_equal(one.edge_index, other.edge_index)
    assert not np.array_equal(one.labels, other.labels)


def test_counts_are_exact(tmp_path: Path) -> None:
    graph = synthesize(SMALL)
    assert int((graph.labels != graph.true_labels).sum()) == 60
    assert {tuple(e) for e in graph.edge_index.T.tolist()} == {tuple(e[::-1]) for e in graph.edge_index.T.tolist()}
    true = graph.true_labels[graph.edge_index]
    assert float((true[0] == true[1]).mean()) == pytest.approx(0.7 / 0.9**2, abs=1e-3)
    store = write_synth(tmp_path / "g", name="s", **dataclasses.asdict(SMALL))
    assert store.num_edges == SMALL.num_edges
    assert store.manifest.duplicates.dropped == store.manifest.self_loops.dropped == 0
    assert store.verify() == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 1}, "at least 2"),
        ({"num_nodes": 20}, "too few for 7 classes"),
        ({"num_features": 0}, "num_features=0"),
        ({"num_edges": 7}, "even number"),
        ({"label_noise": 0.5}, "label_noise=0.5"),
        ({"homophily": 0.9}, r"it can be 0 to 0\.810"),
        ({"homophily": float("nan")}, "homophily=nan"),
        ({"seed": -1}, "seed=-1"),
        ({"num_nodes": 10**20}, f"num_nodes={10**20} is above 3037000499, the most"),
        ({"num_classes": 10**5, "num_nodes": 10**6}, "num_classes=100000 is above 65536, the most"),
        ({"num_features": 10**11}, "num_features=100000000000 is out of range; give 1 to 16777216"),
        ({"num_edges": 10**30}, rf"num_edges={10**30} is above \d+, all that \d+ nodes can have"),
        ({"num_edges": 300_000}, "distinct edges within classes"),
    ],
)
def test_impossible_graphs_are_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        synthesize(dataclasses.replace(SMALL, **change))  # type: ignore[arg-type]
