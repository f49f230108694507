"""The graphs that benchmarks run on: any data set by name, and `products-shaped`, a generated stand-in.

`products-shaped` has the shape of ogbn-products: its numbers of nodes, edges, features and classes, its split
sizes, a power-law of degrees with its mean, median and maximum, and labels that neighbours share. It is no copy:
accuracies on it say nothing of ogbn-products, times of sampling and training steps do.

It is made in blocks, under 8 GiB of memory, and kept in the cache folder as a store. Each node stands in a table
as often as its weight says; an edge joins a random entry of the table and a random entry of the same class's part
of it (or, one time in five, of all of it).
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil

from dngd.errors import UserError
from dngd.graph import GraphStore, Provenance, cache_folder, open_or_build, resolve_dataset

PRODUCTS_SHAPED = "products-shaped"
MIN_SCALE = 0.001

IntArray = npt.NDArray[np.int64]

_GENERATOR_VERSION = 1
_BLOCK_PAIRS = 1 << 22
_BLOCK_ROWS = 1 << 17
_MAX_ROUNDS = 40
_DEGREE_EXPONENT = 2.5
_WEIGHT_UNIT = 4
_MAX_WEIGHT_RATIO = 1000.0
_CLASS_SIZE_EXPONENT = 0.9
_CENTRE_NORM = 1.5
_BYTES_AN_EDGE = 64
"""Peak memory of writing the store, measured: 6.6 GiB for 124 million, plus a margin."""


@dataclass(frozen=True)
class ShapeConfig:
    """What to generate. num_edges counts both directions; the counts are those of ogbn-products."""

    num_nodes: int = 2_449_029
    num_edges: int = 123_718_280
    num_classes: int = 47
    num_features: int = 100
    num_train: int = 196_615
    num_val: int = 39_323
    same_class: float = 0.8
    """Share of the edges drawn within a class; a few of the others are by chance."""
    label_noise: float = 0.06
    seed: int = 0

    def scaled(self, scale: float) -> ShapeConfig:
        """Return the same shape with scale times the nodes, edges and split sizes. Raises UserError out of range."""
        if not MIN_SCALE <= scale <= 1:
            raise UserError(f"scale={scale:g} is out of range; give {MIN_SCALE:g} to 1, the share of {PRODUCTS_SHAPED}")
        return replace(
            self,
            num_nodes=round(self.num_nodes * scale),
            num_edges=2 * round(self.num_edges * scale / 2),
            num_train=round(self.num_train * scale),
            num_val=round(self.num_val * scale),
        )


def open_graph(
    dataset: str, data_root: Path | None = None, cache_dir: Path | None = None, scale: float = 1.0
) -> GraphStore:
    """Open a data set by name or path, `products-shaped` included (generated on first use, kept in the cache).

    scale: of products-shaped alone, the share of its nodes and edges. Raises UserError for an unknown data set, and
    for a scale of any other graph.
    """
    if dataset != PRODUCTS_SHAPED:
        if scale != 1.0:
            raise UserError(f"scale={scale:g} makes a smaller {PRODUCTS_SHAPED} but dataset={dataset!r}; leave one out")
        return resolve_dataset(dataset, data_root, cache_dir)
    config = ShapeConfig().scaled(scale)

    def build(out: Path) -> GraphStore:
        _check_memory(config)
        return write_shape(out, config, scratch=cache_folder(cache_dir))

    return open_or_build(
        _cache_key(config),
        build,
        f"generating {PRODUCTS_SHAPED}",
        cache_dir,
    )


def _cache_key(config: ShapeConfig) -> str:
    content = json.dumps([_GENERATOR_VERSION, asdict(config)], sort_keys=True).encode()
    return f"{PRODUCTS_SHAPED}-{config.num_nodes}-{hashlib.sha256(content).hexdigest()[:16]}"


def _check_memory(config: ShapeConfig) -> None:
    needed, free = config.num_edges * _BYTES_AN_EDGE, psutil.virtual_memory().available
    if needed > free:
        raise UserError(
            f"generating {PRODUCTS_SHAPED} with {config.num_edges:,} edges takes about {needed / 2**30:.1f} GiB of "
            f"memory and {free / 2**30:.1f} GiB are free; make a smaller one with --scale {0.8 * free / needed:.2g}"
        )


def write_shape(out: Path, config: ShapeConfig, scratch: Path | None = None) -> GraphStore:
    """Generate the graph and write it as a store at `out`.

    scratch: folder of a temporary file of the features' size, removed again; None: the system's.
    Raises UserError if so many distinct edges cannot be found.
    """
    draws = [np.random.PCG64(np.random.SeedSequence([config.seed, part])) for part in range(5)]
    classes = _classes(config, draws[0])
    indptr, indices = _edges(config, classes, draws[1])
    with tempfile.TemporaryFile(dir=scratch) as file:
        return GraphStore.write(
            out,
            name=PRODUCTS_SHAPED,
            indptr=indptr,
            indices=indices,
            features=_features(config, classes, np.random.Generator(draws[2]), file),
            labels=_noisy(classes, config, draws[3]),
            num_classes=config.num_classes,
            masks=_masks(config, draws[4]),
            directed=False,
            overwrite=True,
            provenance=Provenance(source=f"dngd bench {PRODUCTS_SHAPED}", options=asdict(config)),
        )


def _uniform(draws: np.random.PCG64, count: int) -> npt.NDArray[np.float64]:
    """Return numbers in [0, 1) from raw draws, whose stream is the same in every numpy."""
    return (draws.random_raw(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _below(draws: np.random.PCG64, bounds: Any, count: int) -> IntArray:
    drawn: IntArray = (draws.random_raw(count) >> np.uint64(1)).astype(np.int64) % bounds
    return drawn


def _classes(config: ShapeConfig, draws: np.random.PCG64) -> npt.NDArray[np.int32]:
    """Return each node's class, [num_nodes]: sizes ∝ rank^-0.9, at least 8, in random node order."""
    shares = np.arange(1, config.num_classes + 1) ** -_CLASS_SIZE_EXPONENT
    sizes = 8 + np.floor((config.num_nodes - 8 * config.num_classes) * shares / shares.sum()).astype(np.int64)
    sizes[0] += config.num_nodes - sizes.sum()
    order = np.argsort(draws.random_raw(config.num_nodes), kind="stable")
    return np.repeat(np.arange(config.num_classes, dtype=np.int32), sizes)[order]


def _edges(
    config: ShapeConfig, classes: npt.NDArray[np.int32], draws: np.random.PCG64
) -> tuple[IntArray, npt.NDArray[np.int32]]:
    """Return (indptr, indices) of exactly num_edges distinct entries, both directions of each edge."""
    power = -1.0 / (_DEGREE_EXPONENT - 1.0)
    weights = np.minimum((1.0 - _uniform(draws, config.num_nodes)) ** power, _MAX_WEIGHT_RATIO)
    order = np.argsort(classes, kind="stable").astype(np.int32)
    counts = np.floor(weights[order] * _WEIGHT_UNIT).astype(np.int64)
    table = np.repeat(order, counts)
    bounds = np.searchsorted(classes[table], np.arange(config.num_classes + 1))
    starts, sizes = bounds[:-1], bounds[1:] - bounds[:-1]

    def block(count: int) -> IntArray:
        one = table[_below(draws, len(table), count)]
        c = classes[one]
        same = _uniform(draws, count) < config.same_class
        at = np.where(same, starts[c] + _below(draws, sizes[c], count), _below(draws, len(table), count))
        other = table[at]
        low, high = np.minimum(one, other), np.maximum(one, other)
        keys: IntArray = (low.astype(np.int64) * config.num_nodes + high)[low != high]
        return keys

    keys = _distinct(block, config.num_edges // 2)
    return _both_directions(keys, config.num_nodes)


def _distinct(block: Any, wanted: int) -> IntArray:
    """Return `wanted` distinct keys, ascending; surplus ones are left out evenly over their range."""
    keys = np.empty(0, dtype=np.int64)
    for _ in range(_MAX_ROUNDS):
        missing = wanted - len(keys)
        if missing <= 0:
            break
        parts, num_new, target = [keys], 0, int(missing * 1.02) + 64
        while num_new < target:
            parts.append(block(min(_BLOCK_PAIRS, target - num_new + 64)))
            num_new += len(parts[-1])
        keys = np.concatenate(parts)
        del parts
        keys.sort()
        first = np.ones(len(keys), dtype=np.bool_)
        np.not_equal(keys[1:], keys[:-1], out=first[1:])
        keys = keys[first]
    if len(keys) < wanted:
        raise UserError(f"only {len(keys)} of {wanted} distinct edges could be found; give a larger scale")
    surplus = len(keys) - wanted
    if surplus:
        keep = np.ones(len(keys), dtype=np.bool_)
        keep[np.arange(surplus) * len(keys) // surplus] = False
        keys = keys[keep]
    return keys


def _both_directions(keys: IntArray, num_nodes: int) -> tuple[IntArray, npt.NDArray[np.int32]]:
    """Return (indptr, indices), ascending within a node, from keys low · num_nodes + high."""
    entries = np.empty(2 * len(keys), dtype=np.int64)
    entries[: len(keys)] = keys
    for start in range(0, len(keys), _BLOCK_PAIRS):
        part = keys[start : start + _BLOCK_PAIRS]
        low = part // num_nodes
        entries[len(keys) + start : len(keys) + start + len(part)] = (part - low * num_nodes) * num_nodes + low
    entries.sort()
    indptr = np.searchsorted(entries, np.arange(num_nodes + 1, dtype=np.int64) * num_nodes)
    indices = np.empty(len(entries), dtype=np.int32)
    for start in range(0, len(entries), _BLOCK_PAIRS):
        indices[start : start + _BLOCK_PAIRS] = entries[start : start + _BLOCK_PAIRS] % num_nodes
    return indptr.astype(np.int64), indices


def _features(
    config: ShapeConfig, classes: npt.NDArray[np.int32], normal: np.random.Generator, file: Any
) -> npt.NDArray[np.float32]:
    """Return a class centre of norm 1.5 plus unit noise a node, [num_nodes, num_features], in a mapped file."""
    shape = (config.num_nodes, config.num_features)
    centres = normal.standard_normal((config.num_classes, config.num_features))
    centres = (centres * (_CENTRE_NORM / np.linalg.norm(centres, axis=1, keepdims=True))).astype(np.float32)
    table = np.memmap(file, dtype=np.float32, mode="w+", shape=shape)
    for rows in _row_blocks(config.num_nodes):
        block = normal.standard_normal((rows.stop - rows.start, shape[1]), dtype=np.float32)
        block += centres[classes[rows]]
        table[rows] = block
    return table


def _row_blocks(num_rows: int) -> Iterator[slice]:
    for start in range(0, num_rows, _BLOCK_ROWS):
        yield slice(start, min(start + _BLOCK_ROWS, num_rows))


def _noisy(classes: npt.NDArray[np.int32], config: ShapeConfig, draws: np.random.PCG64) -> IntArray:
    """Return the classes with about the wanted share replaced by another class."""
    labels = classes.astype(np.int64)
    chosen = _uniform(draws, config.num_nodes) < config.label_noise
    step = 1 + _below(draws, config.num_classes - 1, int(chosen.sum()))
    labels[chosen] = (labels[chosen] + step) % config.num_classes
    return labels


def _masks(config: ShapeConfig, draws: np.random.PCG64) -> dict[str, npt.NDArray[np.bool_]]:
    order = np.argsort(draws.random_raw(config.num_nodes), kind="stable")
    ends = (0, config.num_train, config.num_train + config.num_val, config.num_nodes)
    masks = {}
    for name, start, end in zip(("train", "val", "test"), ends, ends[1:]):
        masks[name] = np.zeros(config.num_nodes, dtype=np.bool_)
        masks[name][order[start:end]] = True
    return masks
