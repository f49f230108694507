"""Generated stand-ins for public graphs: their size, shape and split, not their content.

`ogbn-products` and `ogbn-papers100m` have the numbers of nodes, edges, features, classes and split nodes of the
originals (https://ogb.stanford.edu/docs/nodeprop), degrees by a power law up to a hub of their size, features that
tell something of the class, and neighbours that share it. Accuracies on them say nothing of the originals; times
of sampling and training do.

Everything is drawn in blocks and sorted on the disk, so that memory holds a table of a few numbers a node and never
the edges. Each node stands in a table as often as its weight says; an edge joins an entry of the table and an entry
of the same class's part of it (or now and then of all of it). Equal seeds give equal graphs on one machine with one
numpy.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil

from dngd.errors import UserError
from dngd.graph.builder import Progress, RowBlocks, StoreBuilder
from dngd.graph.key_sort import KeySort, keep_only
from dngd.graph.manifest import Provenance
from dngd.graph.store import GraphStore
from dngd.paths import expanded

IntArray = npt.NDArray[np.int64]
NodeArray = npt.NDArray[np.int32]
DrawPairs = Callable[[int], tuple[NodeArray, NodeArray]]

MIN_SCALE = 0.001

_BLOCK_PAIRS = 1 << 22
_BLOCK_ROWS = 1 << 17
_MAX_ROUNDS = 40
_DEGREE_EXPONENT = 2.5
_WEIGHT_UNIT = 4
_CLASS_SIZE_EXPONENT = 0.9
_MIN_CLASS_SIZE = 8
_CENTRE_NORM = 1.5
_MEAN_REFERENCES = 4.0
_BYTES_A_NODE = 120
_EDGE_BYTES = ((64, 700 << 20), (5, 3 << 29))
"""(an edge, at most) of a block of draws, and of sorting. With what a node takes, the peak memory with a margin:
measured 2.0 GiB for all of ogbn-products, 2.5 GiB for a tenth of ogbn-papers100m."""


@dataclass(frozen=True)
class LikeConfig:
    """What to generate. num_edges counts stored entries: both directions of an edge that has no direction."""

    num_nodes: int
    num_edges: int
    num_classes: int
    num_features: int
    num_train: int
    num_val: int
    num_test: int | None = None
    """None: all nodes that are left. Nodes of no part are unlabelled."""
    directed: bool = False
    max_weight_ratio: float = 1000.0
    """Of the largest to the smallest expected degree."""
    same_class: float = 0.8
    """Share of the edges drawn within a class; a few of the others are by chance."""
    label_noise: float = 0.06
    seed: int = 0


LIKE: dict[str, LikeConfig] = {
    "ogbn-products": LikeConfig(
        num_nodes=2_449_029,
        num_edges=123_718_280,
        num_classes=47,
        num_features=100,
        num_train=196_615,
        num_val=39_323,
    ),
    "ogbn-papers100m": LikeConfig(
        num_nodes=111_059_956,
        num_edges=1_615_685_872,
        num_classes=172,
        num_features=128,
        num_train=1_207_179,
        num_val=125_265,
        num_test=214_338,
        directed=True,
        max_weight_ratio=40_000.0,
        same_class=0.6,
    ),
}
"""The graphs that can be imitated, by name."""


def like_config(like: str, scale: float = 1.0, seed: int = 0) -> LikeConfig:
    """Return the shape of the graph `like` with scale times its nodes, edges and split sizes.

    Raises UserError for an unknown graph, a scale out of 0.001 to 1, or a negative seed.
    """
    config = LIKE.get(like.lower())
    if config is None:
        raise UserError(f"{like!r} is not known; give one of {', '.join(LIKE)}")
    if not MIN_SCALE <= scale <= 1:
        raise UserError(f"scale={scale:g} is out of range; give {MIN_SCALE:g} to 1, the share of {like}'s nodes")
    if seed < 0:
        raise UserError(f"seed={seed} is negative; give a whole number from 0")
    step = 1 if config.directed else 2
    return replace(
        config,
        num_nodes=round(config.num_nodes * scale),
        num_edges=step * round(config.num_edges * scale / step),
        num_train=round(config.num_train * scale),
        num_val=round(config.num_val * scale),
        num_test=None if config.num_test is None else round(config.num_test * scale),
        seed=seed,
    )


def write_like(
    out: str | Path,
    config: LikeConfig,
    *,
    name: str,
    source: str = "dngd data synth",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> GraphStore:
    """Generate the graph of `config` and write it as a store at `out`.

    source: named in the store's provenance. progress: stages "drawing", "features", "edges", "sorting".
    Raises UserError if memory or disk space do not suffice, before anything is drawn, or if so many distinct edges
    cannot be found.
    """
    target = expanded(out)
    _check_room(config, target)
    draws = [np.random.PCG64(np.random.SeedSequence([config.seed, part])) for part in range(5)]
    classes = _classes(config, draws[0])
    num_draws = config.num_edges if config.directed else config.num_edges // 2
    with StoreBuilder(
        target,
        name=name,
        num_nodes=config.num_nodes,
        add_reverse=not config.directed,
        directed=True if config.directed else None,
        overwrite=overwrite,
        progress=_with_total(progress, num_draws),
    ) as builder:
        draw = _citations if config.directed else _pairs
        _add_edges(builder, config, draw(config, classes, draws[1]), num_draws, progress)
        masks = _masks(config, draws[4])
        labels = _noisy(classes, config, draws[3])
        if config.num_test is not None:
            labels[~(masks["train"] | masks["val"] | masks["test"])] = -1
        return builder.finish(
            features=RowBlocks(config.num_features, _features(config, classes, np.random.Generator(draws[2]))),
            labels=labels,
            num_classes=config.num_classes,
            masks=masks,
            provenance=Provenance(source=source, options=asdict(config)),
        )


def _check_room(config: LikeConfig, target: Path) -> None:
    for_edges = sum(min(config.num_edges * each, most) for each, most in _EDGE_BYTES)
    needed = config.num_nodes * _BYTES_A_NODE + for_edges
    free = psutil.virtual_memory().available
    if needed > free:
        raise UserError(
            f"generating {config.num_edges:,} edges takes about {needed / 2**30:.1f} GiB of memory and "
            f"{free / 2**30:.1f} GiB are free; give a smaller --scale, by {0.8 * free / needed:.2g}"
        )
    parent = next(folder for folder in target.absolute().parents if folder.exists())
    # The finished store, the builder's temporary edges, and two copies of the distinct keys.
    needed = config.num_nodes * (4 * config.num_features + 32) + config.num_edges * (
        16 + (16 if config.directed else 8)
    )
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise UserError(
            f"generating {config.num_edges:,} edges takes {needed / 2**30:.1f} GiB of disk at {parent} and "
            f"{free / 2**30:.1f} GiB are free; free some space, choose another path, or a smaller --scale"
        )


def _with_total(progress: Progress | None, num_edges: int) -> Progress | None:
    """Return progress that knows the number of edges, which a builder does not."""
    if progress is None:
        return None
    return lambda stage, done, total: progress(stage, done, total or num_edges)


def _uniform(draws: np.random.PCG64, count: int) -> npt.NDArray[np.float64]:
    """Return numbers in [0, 1) from raw draws, whose stream is the same in every numpy."""
    return (draws.random_raw(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _below(draws: np.random.PCG64, bounds: Any, count: int) -> IntArray:
    drawn: IntArray = (draws.random_raw(count) >> np.uint64(1)).astype(np.int64) % bounds
    return drawn


def _classes(config: LikeConfig, draws: np.random.PCG64) -> NodeArray:
    """Return each node's class, [num_nodes]: sizes ∝ rank^-0.9, at least 8, in random node order."""
    shares = np.arange(1, config.num_classes + 1) ** -_CLASS_SIZE_EXPONENT
    spare = config.num_nodes - _MIN_CLASS_SIZE * config.num_classes
    sizes = _MIN_CLASS_SIZE + np.floor(spare * shares / shares.sum()).astype(np.int64)
    sizes[0] += config.num_nodes - sizes.sum()
    order = np.argsort(draws.random_raw(config.num_nodes), kind="stable")
    return np.repeat(np.arange(config.num_classes, dtype=np.int32), sizes)[order]


class _WeightedNodes:
    """Draws nodes by power-law weights, from all of them or from one class."""

    def __init__(self, config: LikeConfig, classes: NodeArray, draws: np.random.PCG64) -> None:
        power = -1.0 / (_DEGREE_EXPONENT - 1.0)
        weights = np.minimum((1.0 - _uniform(draws, config.num_nodes)) ** power, config.max_weight_ratio)
        order = np.argsort(classes, kind="stable").astype(np.int32)
        counts = np.floor(weights[order] * _WEIGHT_UNIT).astype(np.int64)
        del weights
        entries = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        bounds = entries[np.searchsorted(classes[order], np.arange(config.num_classes + 1))]
        self._starts, self._sizes = bounds[:-1], bounds[1:] - bounds[:-1]
        self._table = np.repeat(order, counts)

    def any(self, draws: np.random.PCG64, count: int) -> NodeArray:
        return self._table[_below(draws, len(self._table), count)]

    def partner(
        self, of_class: NodeArray, same: npt.NDArray[np.bool_], draws: np.random.PCG64, count: int
    ) -> NodeArray:
        """Draw a node of the given class where `same`, else any node."""
        within = self._starts[of_class] + _below(draws, self._sizes[of_class], count)
        return self._table[np.where(same, within, _below(draws, len(self._table), count))]


def _pairs(config: LikeConfig, classes: NodeArray, draws: np.random.PCG64) -> DrawPairs:
    """Return what draws edges without direction, as (lower, higher) node."""
    nodes = _WeightedNodes(config, classes, draws)

    def block(count: int) -> tuple[NodeArray, NodeArray]:
        one = nodes.any(draws, count)
        same = _uniform(draws, count) < config.same_class
        other = nodes.partner(classes[one], same, draws, count)
        return np.minimum(one, other), np.maximum(one, other)

    return block


def _citations(config: LikeConfig, classes: NodeArray, draws: np.random.PCG64) -> DrawPairs:
    """Return what draws citations, as (cited, citing) node: many papers cite few, none cites very many."""
    cited = _WeightedNodes(config, classes, draws)
    numbers = np.floor(-_MEAN_REFERENCES * np.log1p(-_uniform(draws, config.num_nodes))).astype(np.int64)
    citing = np.repeat(np.arange(config.num_nodes, dtype=np.int32), numbers)
    del numbers

    def block(count: int) -> tuple[NodeArray, NodeArray]:
        one = citing[_below(draws, len(citing), count)]
        same = _uniform(draws, count) < config.same_class
        return cited.partner(classes[one], same, draws, count), one

    return block


def _add_edges(
    builder: StoreBuilder, config: LikeConfig, draw: DrawPairs, wanted: int, progress: Progress | None
) -> None:
    """Draw exactly the wanted number of distinct pairs and give them to the builder.

    A pair is the key first · n + second. Surplus ones are left out evenly over the range of the keys.
    """
    with KeySort(builder.scratch, distinct=True) as keys:
        surplus = _draw_distinct(keys, draw, wanted, config.num_nodes, progress) - wanted
        start = 0
        for chunk, _ in keys.chunks():
            kept = np.ones(len(chunk), dtype=np.bool_)
            kept[_surplus_within(start, start + len(chunk), surplus, wanted + surplus) - start] = False
            start += len(chunk)
            chunk = chunk[: keep_only(kept, chunk)]
            first = chunk // config.num_nodes
            # A citation goes into the cited node: a node's in-neighbours are the papers that cite it.
            builder.add_edges(chunk - first * config.num_nodes, first)


def _draw_distinct(keys: KeySort, draw: DrawPairs, wanted: int, num_nodes: int, progress: Progress | None) -> int:
    """Add keys until at least `wanted` differ; return how many do. Raises UserError if there are not so many."""
    num_distinct = 0
    for _ in range(_MAX_ROUNDS):
        missing = wanted - num_distinct
        if missing <= 0:
            return num_distinct
        num_new, target = 0, int(missing * 1.02) + 64
        while num_new < target:
            first, second = draw(min(_BLOCK_PAIRS, target - num_new + 64))
            new = (first.astype(np.int64) * num_nodes + second)[first != second]
            keys.add(new)
            num_new += len(new)
            if progress is not None:
                progress("drawing", min(num_distinct + num_new, wanted), wanted)
        num_distinct = keys.merge()
    if num_distinct >= wanted:
        return num_distinct
    raise UserError(f"only {num_distinct} of {wanted} distinct edges could be found; give a larger scale")


def _surplus_within(start: int, stop: int, surplus: int, total: int) -> IntArray:
    """Return those of the positions k · total // surplus, k < surplus, that lie in start..stop-1."""
    if not surplus:
        return np.empty(0, dtype=np.int64)
    first, last = (-(-bound * surplus // total) for bound in (start, stop))
    positions = np.arange(max(first - 1, 0), min(last + 1, surplus), dtype=np.int64) * total // surplus
    return positions[(positions >= start) & (positions < stop)]


def _features(config: LikeConfig, classes: NodeArray, normal: np.random.Generator) -> Iterator[npt.NDArray[np.float32]]:
    """Yield blocks of rows: a class centre of norm 1.5 plus unit noise."""
    centres = normal.standard_normal((config.num_classes, config.num_features))
    centres = (centres * (_CENTRE_NORM / np.linalg.norm(centres, axis=1, keepdims=True))).astype(np.float32)
    for start in range(0, config.num_nodes, _BLOCK_ROWS):
        of_class = classes[start : start + _BLOCK_ROWS]
        block = normal.standard_normal((len(of_class), config.num_features), dtype=np.float32)
        block += centres[of_class]
        yield block


def _noisy(classes: NodeArray, config: LikeConfig, draws: np.random.PCG64) -> IntArray:
    """Return the classes with about the wanted share replaced by another class."""
    labels = classes.astype(np.int64)
    chosen = _uniform(draws, config.num_nodes) < config.label_noise
    step = 1 + _below(draws, config.num_classes - 1, int(chosen.sum()))
    labels[chosen] = (labels[chosen] + step) % config.num_classes
    return labels


def _masks(config: LikeConfig, draws: np.random.PCG64) -> dict[str, npt.NDArray[np.bool_]]:
    order = np.argsort(draws.random_raw(config.num_nodes), kind="stable")
    num_seen = config.num_train + config.num_val
    last = config.num_nodes if config.num_test is None else num_seen + config.num_test
    ends = (0, config.num_train, num_seen, last)
    masks = {}
    for name, start, end in zip(("train", "val", "test"), ends, ends[1:]):
        masks[name] = np.zeros(config.num_nodes, dtype=np.bool_)
        masks[name][order[start:end]] = True
    return masks
