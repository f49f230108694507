"""Synthetic graphs that are learnable, but not at once: a degree-corrected block model with features.

Classes of skewed sizes lie in groups of related classes and split into communities. An edge joins two
nodes of one class (mostly of one community), or of two classes (mostly of one group); nodes take part
by power-law weights, and a share of them, the mixed nodes, has most of its edges outside its class.
Features are community means under noise, with a spectrum that decays over the axes, then turned by
reflections, so that the signal is spread over directions of very different variance and no axis is one
of them. A share of the labels is replaced by another class.

Reproducibility: topology, labels and masks are made from raw PCG64 draws and integer arithmetic, and are
bitwise the same for a seed on every machine and numpy version (up to rounding of one power function on
integer boundaries). Features use numpy's normal sampler and matrix products: the same up to the last
bits of float32 across machines, bitwise on one machine with one numpy.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dngd.errors import UserError
from dngd.graph.canonical import MAX_CLASSES, MAX_FEATURES, MAX_NODES
from dngd.graph.manifest import Provenance
from dngd.graph.store import GraphStore
from dngd.graph.writer import Progress

Array = npt.NDArray[Any]
IntArray = npt.NDArray[np.int64]

_COMMUNITIES_PER_CLASS = 3
_CLASSES_PER_GROUP = 5
_CLASS_SIZE_EXPONENT = 0.9
_DEGREE_EXPONENT = 2.5
_MAX_WEIGHT_RATIO = 200.0
_WEIGHT_UNIT = 64
_SAME_COMMUNITY = 0.7
_SAME_GROUP = 0.6
_MIXED_NODES = 0.2
_MIXED_FACTOR = 12
_SPECTRUM_EXPONENT = 0.8
_GROUP_NORM, _CLASS_NORM, _COMMUNITY_NORM = 1.2, 1.5, 1.1
_OFFSET = 0.5
_NUM_REFLECTIONS = 4
_MASK_SHARES = {"train": 0.4, "val": 0.1, "test": 0.5}
_MAX_ROUNDS = 60
_MIN_CLASS_SIZE = 8


@dataclass(frozen=True)
class SynthConfig:
    """What to generate. num_edges counts stored entries, two for each undirected edge."""

    num_nodes: int = 60_000
    num_edges: int = 1_500_000
    num_classes: int = 47
    num_features: int = 100
    homophily: float = 0.8
    """Share of the edges whose ends carry the same stored label, noise included."""
    label_noise: float = 0.06
    """Share of the nodes whose stored label is another class, drawn evenly."""
    seed: int = 0

    def check(self) -> None:
        """Raise UserError if no such graph can be made."""
        if self.num_classes < 2:
            raise UserError(f"num_classes={self.num_classes} leaves nothing to learn; give at least 2")
        if self.num_nodes < _MIN_CLASS_SIZE * self.num_classes:
            raise UserError(
                f"num_nodes={self.num_nodes} is too few for {self.num_classes} classes; give at least "
                f"{_MIN_CLASS_SIZE * self.num_classes}, or fewer classes"
            )
        if self.num_classes > MAX_CLASSES or self.num_nodes > MAX_NODES:
            name, most = ("num_nodes", MAX_NODES) if self.num_nodes > MAX_NODES else ("num_classes", MAX_CLASSES)
            raise UserError(f"{name}={getattr(self, name)} is above {most}, the most that there may be; give fewer")
        if not 1 <= self.num_features <= MAX_FEATURES:
            raise UserError(f"num_features={self.num_features} is out of range; give 1 to {MAX_FEATURES}")
        if self.num_edges < 2 or self.num_edges % 2:
            raise UserError(
                f"num_edges={self.num_edges} is not an even number above 0; each undirected edge counts twice"
            )
        most_edges = self.num_nodes * (self.num_nodes - 1)
        if self.num_edges > most_edges:
            raise UserError(
                f"num_edges={self.num_edges} is above {most_edges}, all that {self.num_nodes} nodes can have; give "
                "fewer, or more nodes"
            )
        if not 0 <= self.label_noise < 0.5:
            raise UserError(f"label_noise={self.label_noise:g} is out of range; give 0 up to, not including, 0.5")
        highest = (1 - self.label_noise) ** 2
        if not 0 <= self.homophily <= highest:
            raise UserError(
                f"homophily={self.homophily:g} is out of range; with label_noise={self.label_noise:g} it can be 0 to "
                f"{highest:.3f}: lower one of the two"
            )
        if self.seed < 0:
            raise UserError(f"seed={self.seed} is negative; give a whole number from 0")


PRODUCTS_MINI = SynthConfig()
"""About 1/40 of ogbn-products in nodes, with its classes and feature width."""

BUILT_IN: dict[str, SynthConfig] = {"products-mini": PRODUCTS_MINI}


@dataclass(frozen=True)
class SynthGraph:
    """The arrays of a generated graph."""

    edge_index: IntArray
    """[2, num_edges], each edge in both directions"""
    features: npt.NDArray[np.float32]
    """[num_nodes, num_features]"""
    labels: IntArray
    """[num_nodes], with noise"""
    true_labels: IntArray
    """[num_nodes], without; not stored"""
    masks: dict[str, npt.NDArray[np.bool_]]


def synthesize(config: SynthConfig = PRODUCTS_MINI) -> SynthGraph:
    """Generate the graph of `config`. Raises UserError if its counts cannot be met."""
    config.check()
    draws = [np.random.PCG64(np.random.SeedSequence([config.seed, part])) for part in range(5)]
    groups, classes, communities = _memberships(config, draws[0])
    edge_index = _edges(config, groups, classes, communities, draws[1])
    return SynthGraph(
        edge_index=edge_index,
        features=_features(config, groups, classes, communities, np.random.Generator(draws[2])),
        labels=_noisy(classes, config, draws[3]),
        true_labels=classes,
        masks=_masks(config.num_nodes, draws[4]),
    )


def write_synth(
    out: str | Path,
    *,
    name: str = "products-mini",
    num_nodes: int = PRODUCTS_MINI.num_nodes,
    num_edges: int = PRODUCTS_MINI.num_edges,
    num_classes: int = PRODUCTS_MINI.num_classes,
    num_features: int = PRODUCTS_MINI.num_features,
    homophily: float = PRODUCTS_MINI.homophily,
    label_noise: float = PRODUCTS_MINI.label_noise,
    seed: int = PRODUCTS_MINI.seed,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> GraphStore:
    """Generate a graph and write it as a store at `out`. The defaults are products-mini's."""
    config = SynthConfig(
        num_nodes=num_nodes,
        num_edges=num_edges,
        num_classes=num_classes,
        num_features=num_features,
        homophily=homophily,
        label_noise=label_noise,
        seed=seed,
    )
    graph = synthesize(config)
    return GraphStore.write(
        out,
        name=name,
        edge_index=graph.edge_index,
        features=graph.features,
        labels=graph.labels,
        num_classes=num_classes,
        masks=graph.masks,
        directed=False,
        overwrite=overwrite,
        progress=progress,
        provenance=Provenance(source="dngd synth", options={"format": "synth", **asdict(config)}),
    )


def _uniform(draws: np.random.PCG64, count: int) -> npt.NDArray[np.float64]:
    """Return numbers in [0, 1) from the top 53 bits of raw draws."""
    return (draws.random_raw(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _below(draws: np.random.PCG64, bounds: Array | int, count: int) -> IntArray:
    """Return whole numbers in [0, bounds). The bias is below bounds / 2^63."""
    raw = (draws.random_raw(count) >> np.uint64(1)).astype(np.int64)
    return raw % bounds


def _shuffled(draws: np.random.PCG64, count: int) -> IntArray:
    return np.argsort(draws.random_raw(count), kind="stable")


def _memberships(config: SynthConfig, draws: np.random.PCG64) -> tuple[IntArray, IntArray, IntArray]:
    """Return each node's group, class and community (numbered through all classes); [num_nodes] each."""
    shares = np.arange(1, config.num_classes + 1) ** -_CLASS_SIZE_EXPONENT
    spare = config.num_nodes - _MIN_CLASS_SIZE * config.num_classes
    sizes = _MIN_CLASS_SIZE + np.floor(spare * shares / shares.sum()).astype(np.int64)
    sizes[0] += config.num_nodes - sizes.sum()
    # A class's number says nothing of its size, nor a node's number of its class.
    sizes = sizes[_shuffled(draws, config.num_classes)]
    classes = np.repeat(np.arange(config.num_classes), sizes)[_shuffled(draws, config.num_nodes)]
    communities = classes * _COMMUNITIES_PER_CLASS + _below(draws, _COMMUNITIES_PER_CLASS, config.num_nodes)
    return classes // _CLASSES_PER_GROUP, classes, communities


def _edges(
    config: SynthConfig, groups: IntArray, classes: IntArray, communities: IntArray, draws: np.random.PCG64
) -> IntArray:
    """Return [2, num_edges]: exactly the wanted numbers of edges within and between classes."""
    num_nodes = config.num_nodes
    power = -1.0 / (_DEGREE_EXPONENT - 1.0)
    weights = np.minimum((1.0 - _uniform(draws, num_nodes)) ** power, _MAX_WEIGHT_RATIO)
    weights = np.floor(weights * _WEIGHT_UNIT).astype(np.int64)
    mixed = _uniform(draws, num_nodes) < _MIXED_NODES
    # Communities are numbered within classes, and classes within groups: each is a run of this order.
    order = np.argsort(communities, kind="stable")
    within = _WeightedRuns(np.where(mixed, np.maximum(weights // 4, 1), weights)[order])
    between = _WeightedRuns(np.where(mixed, weights * _MIXED_FACTOR, weights)[order])
    runs = {
        "community": _run_bounds(communities[order]),
        "class": _run_bounds(classes[order]),
        "group": _run_bounds(groups[order]),
    }
    num_pairs = config.num_edges // 2
    num_same = round(num_pairs * config.homophily / (1 - config.label_noise) ** 2)

    def draw_same(count: int) -> tuple[IntArray, IntArray]:
        one = within.draw(draws, np.zeros(count, np.int64), np.full(count, num_nodes))
        near = _uniform(draws, count) < _SAME_COMMUNITY
        starts = np.where(near, runs["community"][0][one], runs["class"][0][one])
        ends = np.where(near, runs["community"][1][one], runs["class"][1][one])
        return one, within.draw(draws, starts, ends)

    def draw_other(count: int) -> tuple[IntArray, IntArray]:
        one = between.draw(draws, np.zeros(count, np.int64), np.full(count, num_nodes))
        near = _uniform(draws, count) < _SAME_GROUP
        starts = np.where(near, runs["group"][0][one], 0)
        ends = np.where(near, runs["group"][1][one], num_nodes)
        other = between.draw(draws, starts, ends)
        apart = classes[order[one]] != classes[order[other]]
        return one[apart], other[apart]

    pairs = [
        _distinct_pairs(draw, wanted, num_nodes, what)
        for draw, wanted, what in (
            (draw_same, num_same, "within classes"),
            (draw_other, num_pairs - num_same, "between classes"),
        )
    ]
    low, high = (order[np.concatenate(ends)] for ends in zip(*pairs))
    return np.stack([np.concatenate([low, high]), np.concatenate([high, low])])


class _WeightedRuns:
    """Draws positions of a run [start, end) in proportion to whole-number weights."""

    def __init__(self, weights: IntArray) -> None:
        self._sums = np.concatenate([np.zeros(1, np.int64), np.cumsum(weights)])

    def draw(self, draws: np.random.PCG64, starts: IntArray, ends: IntArray) -> IntArray:
        low, high = self._sums[starts], self._sums[ends]
        points = low + _below(draws, high - low, len(starts))
        return np.searchsorted(self._sums, points, side="right") - 1


def _run_bounds(ordered: IntArray) -> tuple[IntArray, IntArray]:
    """Return for each position of a sorted array the start and end of its run of equal values."""
    return np.searchsorted(ordered, ordered, "left"), np.searchsorted(ordered, ordered, "right")


def _distinct_pairs(draw: Any, wanted: int, num_nodes: int, what: str) -> tuple[IntArray, IntArray]:
    """Return the first `wanted` distinct unordered pairs that `draw` gives, without self loops."""
    kept = np.zeros(0, dtype=np.int64)
    num_found = 0
    for _ in range(_MAX_ROUNDS):
        if len(kept) >= wanted:
            kept = kept[:wanted]
            return kept // num_nodes, kept % num_nodes
        one, other = draw(int((wanted - len(kept)) * 1.3) + 64)
        key = np.minimum(one, other) * np.int64(num_nodes) + np.maximum(one, other)
        kept = np.concatenate([kept, key[one != other]])
        # Keep first occurrences in the order drawn: cutting a sorted list would favour low numbers.
        before = num_found
        kept = kept[np.sort(np.unique(kept, return_index=True)[1])]
        num_found = len(kept)
        # Hardly anything new: these classes have no more pairs, and further rounds would take for ever.
        if 50 * (num_found - before + 1) < wanted - num_found:
            break
    raise UserError(
        f"only {len(kept)} of {wanted} distinct edges {what} could be found; give fewer edges or more nodes"
    )


def _features(
    config: SynthConfig,
    groups: IntArray,
    classes: IntArray,
    communities: IntArray,
    normal: np.random.Generator,
) -> npt.NDArray[np.float32]:
    """Return offset + (means + noise) · diag(s) · reflections, s_j ∝ j^-0.8, scaled to unit noise variance."""
    width = config.num_features
    means = np.zeros((int(communities.max()) + 1, width))
    of_class = np.arange(len(means)) // _COMMUNITIES_PER_CLASS
    of_group = of_class // _CLASSES_PER_GROUP
    for parent, norm in (
        (of_group, _GROUP_NORM),
        (of_class, _CLASS_NORM),
        (np.arange(len(means)), _COMMUNITY_NORM),
    ):
        centres = normal.standard_normal((int(parent.max()) + 1, width))
        means += norm * (centres / np.linalg.norm(centres, axis=1, keepdims=True))[parent]
    scale = np.arange(1, width + 1) ** -_SPECTRUM_EXPONENT
    scale = (scale / np.sqrt(np.mean(scale**2))).astype(np.float32)
    features = normal.standard_normal((config.num_nodes, width), dtype=np.float32)
    features += means.astype(np.float32)[communities]
    features *= scale
    for _ in range(_NUM_REFLECTIONS):
        axis = normal.standard_normal(width)
        axis = (axis / np.linalg.norm(axis)).astype(np.float32)
        features -= np.outer(features @ (2 * axis), axis)
    features += np.float32(_OFFSET) * normal.standard_normal(width).astype(np.float32)
    return features


def _noisy(classes: IntArray, config: SynthConfig, draws: np.random.PCG64) -> IntArray:
    """Return the classes with exactly the wanted share replaced by another class."""
    count = round(config.label_noise * config.num_nodes)
    chosen = _shuffled(draws, config.num_nodes)[:count]
    labels = classes.copy()
    step = 1 + _below(draws, config.num_classes - 1, count)
    labels[chosen] = (labels[chosen] + step) % config.num_classes
    return labels


def _masks(num_nodes: int, draws: np.random.PCG64) -> dict[str, npt.NDArray[np.bool_]]:
    order = _shuffled(draws, num_nodes)
    masks, start, share = {}, 0, 0.0
    for name, part in _MASK_SHARES.items():
        share += part
        end = round(num_nodes * share)
        masks[name] = np.zeros(num_nodes, dtype=np.bool_)
        masks[name][order[start:end]] = True
        start = end
    return masks
