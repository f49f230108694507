"""Laws of splits: disjoint, labelled, of the asked size, the same for a seed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dngd.errors import UserError
from dngd.graph.splits import make_split, parse_split

PARTS = ("train", "val", "test")


def split(spec: str, labels: torch.Tensor, masks: dict[str, torch.Tensor] | None = None, seed: int = 0):  # type: ignore[no-untyped-def]
    return make_split(spec, labels=labels, masks=masks or {}, graph="g", seed=seed)


def mask(*nodes: int, size: int = 12) -> torch.Tensor:
    result = torch.zeros(size, dtype=torch.bool)
    result[list(nodes)] = True
    return result


@settings(max_examples=100, deadline=None)
@given(
    num_nodes=st.integers(40, 400),
    num_unlabelled=st.integers(0, 20),
    weights=st.tuples(*[st.integers(1, 9)] * 4),
    seed=st.integers(0, 2**40),
)
def test_random_splits(num_nodes: int, num_unlabelled: int, weights: tuple[int, ...], seed: int) -> None:
    labels = torch.arange(num_nodes) % 5
    labels[torch.randperm(num_nodes, generator=torch.Generator().manual_seed(1))[:num_unlabelled]] = -1
    total = sum(weights)
    fractions = [w / total for w in weights[:3]]
    spec = "random:" + "/".join(map(repr, fractions))
    num_labelled = num_nodes - num_unlabelled
    if min(fractions) * num_labelled < 2:
        return
    one, two = split(spec, labels, seed=seed), split(spec, labels, seed=seed)
    everything = torch.cat([getattr(one, part) for part in PARTS])
    assert len(everything.unique()) == len(everything)
    assert bool((labels[everything] >= 0).all())
    for part, fraction in zip(PARTS, fractions):
        nodes = getattr(one, part)
        assert nodes.dtype == torch.int64
        assert nodes.equal(nodes.sort().values)
        assert nodes.equal(getattr(two, part))
        assert abs(len(nodes) - fraction * num_labelled) <= 1
    other = split(spec, labels, seed=seed + 1)
    assert not all(getattr(one, part).equal(getattr(other, part)) for part in PARTS)


def test_random_fractions_that_add_up_to_one_use_every_labelled_node() -> None:
    for count in range(40, 140):
        parts = split("random:0.6/0.3/0.1", torch.zeros(count, dtype=torch.int64))
        assert sum(len(getattr(parts, part)) for part in PARTS) == count


def test_random_is_the_same_on_every_machine_and_numpy() -> None:
    parts = split("random:0.25/0.25/0.5", torch.zeros(12, dtype=torch.int64), seed=7)
    assert (parts.train.tolist(), parts.val.tolist()) == ([3, 6, 11], [4, 9, 10])


def test_every_node_is_equally_likely_to_train() -> None:
    counts = torch.zeros(20)
    for seed in range(800):
        counts[split("random:0.5/0.25/0.25", torch.zeros(20, dtype=torch.int64), seed=seed).train] += 1
    # chi-square of 19 degrees of freedom, variance of a draw of 10 in 20; .9999 quantile is about 52
    statistic = float(((counts - 400) ** 2 / (800 * 0.25)).sum()) * 19 / 20
    assert statistic < 52


def test_complete() -> None:
    labels = torch.zeros(1300, dtype=torch.int64)
    labels[[3, 299, 400]] = -1
    parts = split("complete", labels)
    assert (len(parts.train), int(parts.train[-1])) == (298, 298)
    assert (int(parts.val[0]), len(parts.val)) == (300, 499)
    assert parts.test.tolist() == list(range(800, 1300))
    assert parts.dropped_unlabelled == {"train": 2, "val": 1, "test": 0}


def test_masks_drop_unlabelled_nodes_and_count_them() -> None:
    labels = torch.tensor([0, 1, -1, 0, 1, 0, 1, 0, 1, -1, -1, 0])
    parts = split("masks", labels, {"train": mask(0, 1, 2), "val": mask(3, 9, 10), "test": mask(5)})
    assert (parts.train.tolist(), parts.val.tolist(), parts.test.tolist()) == ([0, 1], [3], [5])
    assert parts.dropped_unlabelled == {"train": 1, "val": 2, "test": 0}


def test_masks_of_several_splits() -> None:
    labels = torch.zeros(12, dtype=torch.int64)
    masks = {
        "train": torch.stack([mask(0), mask(1), mask(2)]),
        "val": torch.stack([mask(3), mask(4), mask(5)]),
        "test": mask(11),
    }
    parts = split("masks:2", labels, masks)
    assert (parts.train.tolist(), parts.val.tolist(), parts.test.tolist()) == ([2], [5], [11])
    first = split("masks", labels, masks)
    assert (first.train.tolist(), first.spec) == ([0], "masks:0")


FULL = {"train": mask(0), "val": mask(1), "test": mask(2)}
SEVERAL = {name: torch.stack([m, m]) for name, m in FULL.items()}


@pytest.mark.parametrize(
    ("spec", "masks", "message"),
    [
        ("masks", {}, "g has none; use --split random"),
        (
            "masks",
            {"train": mask(0), "test": mask(2)},
            "the val part of split masks of graph g is empty; use --split random",
        ),
        ("masks", {**FULL, "train": mask(10)}, r"train part .* is empty \(its 1 nodes have no label\)"),
        ("masks", {**FULL, "test": mask(0)}, "train and test parts .* share 1 nodes"),
        ("masks:2", SEVERAL, "has masks:0 to masks:1"),
        ("masks:1", FULL, "one split; use masks"),
        ("masks:-1", SEVERAL, "number from 0"),
        ("public", SEVERAL, "one public split but g has 2"),
        ("public", {}, "g has none"),
        ("complete", {}, "last 1000 nodes but graph g has 12"),
        ("random:0.98/0.01/0.01", {}, "the val part .* is empty; give larger fractions"),
        ("random:0.5/0.5", {}, "three fractions"),
        ("random:a/b/c", {}, "three fractions"),
        ("random", {}, "three fractions"),
        ("random:0.5/0.4/0.2", {}, r"add up to 1\.1"),
        ("random:0.5/0/0.2", {}, "above 0"),
        ("random:nan/0.2/0.2", {}, "above 0"),
        ("random:50/25/25", {}, "add up to 100"),
        ("mask", {}, "masks, masks:K, public, complete or random"),
    ],
)
def test_errors(spec: str, masks: dict[str, torch.Tensor], message: str) -> None:
    labels = torch.zeros(12, dtype=torch.int64)
    labels[10] = -1
    with pytest.raises(UserError, match=message):
        split(spec, labels, masks)


def test_a_graph_without_labels_has_no_split() -> None:
    with pytest.raises(UserError, match="no labelled node"):
        split("random:0.5/0.25/0.25", torch.full((12,), -1))


@pytest.mark.parametrize("spec", ["masks", "masks:3", "public", "complete", "random:0.5/0.25/0.25"])
def test_specifications_print_as_they_parse(spec: str) -> None:
    assert str(parse_split(spec)) == spec
