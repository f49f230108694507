"""A graph on disk: an Arrow store with a manifest, its importers, splits and synthetic graphs.

    from dngd.graph import GraphStore, resolve_dataset

    store = resolve_dataset("cora", data_root="data")
    split = store.split("public")

A store is a folder of Arrow IPC files (compressed sparse column topology, features, labels, masks) and a
`manifest.json` with their checksums. It is opened by memory map, without copying, and shared between
processes. This package imports nothing of dngd but its errors.
"""

from dngd.graph.catalog import available_datasets, cache_folder, open_or_build, resolve_dataset
from dngd.graph.describe import describe
from dngd.graph.manifest import FORMAT_VERSION, Manifest, Provenance
from dngd.graph.npz import import_npz
from dngd.graph.planetoid import import_planetoid
from dngd.graph.splits import SPLIT_FORMS, Split, SplitSpec, parse_split
from dngd.graph.store import GraphStore
from dngd.graph.synth import PRODUCTS_MINI, SynthConfig, SynthGraph, synthesize, write_synth
from dngd.graph.verify import verify_store

__all__ = [
    "FORMAT_VERSION",
    "PRODUCTS_MINI",
    "SPLIT_FORMS",
    "GraphStore",
    "Manifest",
    "Provenance",
    "Split",
    "SplitSpec",
    "SynthConfig",
    "SynthGraph",
    "available_datasets",
    "cache_folder",
    "describe",
    "import_npz",
    "import_planetoid",
    "open_or_build",
    "parse_split",
    "resolve_dataset",
    "synthesize",
    "verify_store",
    "write_synth",
]
