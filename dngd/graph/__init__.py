"""A graph on disk: an Arrow store with a manifest, its importers, splits and synthetic graphs.

    from dngd.graph import GraphStore, resolve_dataset

    store = resolve_dataset("cora", data_root="data")
    split = store.split("public")

A store is a folder of Arrow IPC files (compressed sparse column topology, features, labels, masks) and a
`manifest.json` with their checksums. It is opened by memory map, without copying, and shared between
processes. This package imports nothing of dngd but its errors.
"""

from dngd.graph.builder import Progress, RowBlocks, StoreBuilder
from dngd.graph.cache import cache_folder, open_or_build
from dngd.graph.catalog import available_datasets, graph_at, resolve_dataset
from dngd.graph.checked import open_checked
from dngd.graph.describe import describe
from dngd.graph.dgl_graph import import_dgl
from dngd.graph.import_options import ImportOptions
from dngd.graph.links import LinkSplit, split_links
from dngd.graph.lock import folder_lock
from dngd.graph.manifest import FORMAT_VERSION, Manifest, PartitionInfo, Provenance
from dngd.graph.npz import import_npz
from dngd.graph.ogb import import_ogb
from dngd.graph.partition import Partition, partition_by_ldg, write_partition
from dngd.graph.planetoid import import_planetoid
from dngd.graph.pyg import import_pyg
from dngd.graph.reorder import order_by_degree, order_by_partition, reorder_store
from dngd.graph.splits import SPLIT_FORMS, Split, SplitSpec, parse_split
from dngd.graph.store import GraphStore
from dngd.graph.synth import PRODUCTS_MINI, SynthConfig, SynthGraph, synthesize, write_synth
from dngd.graph.synth_like import LIKE, LikeConfig, like_config, write_like
from dngd.graph.table_columns import TableColumns
from dngd.graph.table_readers import CsvStyle
from dngd.graph.tables import import_tables
from dngd.graph.verify import verify_store

__all__ = [
    "FORMAT_VERSION",
    "LIKE",
    "PRODUCTS_MINI",
    "SPLIT_FORMS",
    "CsvStyle",
    "GraphStore",
    "ImportOptions",
    "LikeConfig",
    "LinkSplit",
    "Manifest",
    "Partition",
    "PartitionInfo",
    "Progress",
    "Provenance",
    "RowBlocks",
    "Split",
    "SplitSpec",
    "StoreBuilder",
    "SynthConfig",
    "SynthGraph",
    "TableColumns",
    "available_datasets",
    "cache_folder",
    "describe",
    "folder_lock",
    "graph_at",
    "import_dgl",
    "import_npz",
    "import_ogb",
    "import_planetoid",
    "import_pyg",
    "import_tables",
    "like_config",
    "open_checked",
    "open_or_build",
    "order_by_degree",
    "order_by_partition",
    "parse_split",
    "partition_by_ldg",
    "reorder_store",
    "resolve_dataset",
    "split_links",
    "synthesize",
    "verify_store",
    "write_like",
    "write_partition",
    "write_synth",
]
