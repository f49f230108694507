"""The graphs that benchmarks run on: any data set by name, and `products-shaped`, a generated stand-in.

`products-shaped` has the shape of ogbn-products (see `dngd.graph.synth_like`) and is kept in the cache folder as a
store. It is no copy: accuracies on it say nothing of ogbn-products, times of sampling and training steps do.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from dngd.errors import UserError
from dngd.graph import GraphStore, LikeConfig, like_config, open_or_build, resolve_dataset, write_like

PRODUCTS_SHAPED = "products-shaped"

_LIKE = "ogbn-products"
_GENERATOR_VERSION = 1
_KEY_FIELDS = (
    "num_nodes",
    "num_edges",
    "num_classes",
    "num_features",
    "num_train",
    "num_val",
    "same_class",
    "label_noise",
    "seed",
)


def open_graph(
    dataset: str,
    data_root: Path | None = None,
    cache_dir: Path | None = None,
    scale: float = 1.0,
    *,
    takes_multilabel: bool = False,
) -> GraphStore:
    """Open a data set by name or path, `products-shaped` included (generated on first use, kept in the cache).

    scale: of products-shaped alone, the share of its nodes and edges. takes_multilabel: whether the caller can train
    graphs with several labels a node. Raises UserError for an unknown data set, for a scale of any other graph, and
    for such a graph where the caller cannot.
    """
    if dataset != PRODUCTS_SHAPED:
        if scale != 1.0:
            raise UserError(f"scale={scale:g} makes a smaller {PRODUCTS_SHAPED} but dataset={dataset!r}; leave one out")
        store = resolve_dataset(dataset, data_root, cache_dir)
        if store.is_multilabel and not takes_multilabel:
            raise UserError(
                f"{store.name} has several labels a node, and benchmarks train graphs with one; dngd train takes it"
            )
        return store
    config = like_config(_LIKE, scale)

    def build(out: Path) -> GraphStore:
        return write_like(out, config, name=PRODUCTS_SHAPED, source=f"dngd bench {PRODUCTS_SHAPED}", overwrite=True)

    return open_or_build(_cache_key(config), build, f"generating {PRODUCTS_SHAPED}", cache_dir)


def scale_of(dataset: str, scale: float) -> float:
    """Return the scale of a data set among several, which is products-shaped's alone."""
    return scale if dataset == PRODUCTS_SHAPED else 1.0


def _cache_key(config: LikeConfig) -> str:
    fields = {name: getattr(config, name) for name in _KEY_FIELDS}
    content = json.dumps([_GENERATOR_VERSION, fields], sort_keys=True).encode()
    return f"{PRODUCTS_SHAPED}-{config.num_nodes}-{hashlib.sha256(content).hexdigest()[:16]}"
