"""Writing a store from streams: edges in blocks of any order, features in blocks of rows.

    with StoreBuilder("web.store", num_nodes=n) as builder:
        for source, destination in edge_blocks:
            builder.add_edges(source, destination)
        store = builder.finish(features=RowBlocks(100, feature_blocks), labels=labels)

Peak memory stays below 1.5 times the bytes of the finished topology (plus a floor for small graphs, and the
labels, masks and ids that the caller holds), whatever the number of features and the order of the edges.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dngd.errors import UserError
from dngd.graph import manifest as m
from dngd.graph.arrow_files import write_columns, write_labels
from dngd.graph.canonical import (
    MAX_NODES,
    Duplicates,
    FeatureType,
    SelfLoops,
    as_array,
    canonical_labels,
    canonical_masks,
    check_edge_options,
    edge_weights,
)
from dngd.graph.edge_sort import EdgeSort
from dngd.graph.features import RowBlocks, write_features
from dngd.graph.node_ids import canonical_node_ids
from dngd.graph.staging import StagedFolder, check_target
from dngd.paths import expanded, is_utf8, printable

if TYPE_CHECKING:
    from dngd.graph.store import GraphStore

__all__ = ["Progress", "RowBlocks", "StoreBuilder"]

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total), in the units of the stage; total 0: not known."""


class StoreBuilder:
    """A context that builds one store; leaving it without `finish` (an error, Ctrl-C) leaves nothing behind.

    Edges of a block are checked when they are added; what `GraphStore.write` says of self_loops, duplicates,
    directed, add_reverse and the determinism of the files holds here too.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        name: str | None = None,
        num_nodes: int,
        weighted: bool = False,
        add_reverse: bool = False,
        self_loops: SelfLoops = "drop",
        duplicates: Duplicates = "drop",
        directed: bool | None = None,
        feature_dtype: FeatureType = "float32",
        overwrite: bool = False,
        progress: Progress | None = None,
        memory_bytes: int | None = None,
    ) -> None:
        """Check the options and that the target can be written.

        num_nodes: edges name nodes 0 to num_nodes - 1. weighted: each edge brings a weight.
        add_reverse: add the reverse of each edge that is no self loop, before duplicates are treated.
        memory_bytes: of sorting edges; None: a fraction of the topology, at least 32 MiB.
        Raises UserError.
        """
        target = expanded(path)
        if isinstance(name, str) and not name.strip():
            raise UserError("name='' is empty; give the graph a name, or leave it out to take the folder's")
        if name is not None and not is_utf8(name):
            raise UserError(f"name={printable(name)!r} is no Unicode text; give the graph another name")
        check_edge_options(self_loops, duplicates, weighted)
        if feature_dtype not in m.FEATURE_TYPES:
            raise UserError(f"feature_dtype={feature_dtype!r} is not known; give one of {', '.join(m.FEATURE_TYPES)}")
        if not 1 <= num_nodes <= MAX_NODES:
            raise UserError(f"num_nodes={num_nodes} is out of range; give 1 to {MAX_NODES}")
        if add_reverse and directed:
            raise UserError("directed=True contradicts add_reverse=True; leave one of the two out")
        check_target(target, overwrite, m.is_store_file)
        self._name = name or target.name
        self._num_nodes, self._weighted = num_nodes, weighted
        self._feature_dtype: FeatureType = feature_dtype
        self._progress = progress
        self._sort_options: dict[str, Any] = {
            "weighted": weighted,
            "add_reverse": add_reverse,
            "directed": directed,
            "self_loops": self_loops,
            "duplicates": duplicates,
            "memory_bytes": memory_bytes,
            "progress": progress,
        }
        self._target = target
        self._folder = StagedFolder(target, overwrite)
        self._edges: EdgeSort | None = None
        self._num_added = 0

    def __enter__(self) -> StoreBuilder:
        self._folder.__enter__()
        self._edges = EdgeSort(self._folder.path, self._num_nodes, **self._sort_options)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._edges is not None:
            self._edges.close()
            self._edges = None
        self._folder.__exit__(kind, error, trace)

    @property
    def scratch(self) -> Path:
        """The folder that the store is built in, within its context: for temporary files of the caller."""
        self._open_edges()
        return self._folder.path

    def add_edges(self, source: Any, destination: Any, weight: Any = None) -> None:
        """Add edges source[e] -> destination[e]: integers [entries], weight numbers [entries] if weighted.

        Blocks may have any size. Raises UserError naming the first bad edge, counted over all blocks from 0.
        """
        edges = self._open_edges()
        one, other = self._nodes(source, "source"), self._nodes(destination, "destination")
        if len(one) != len(other):
            raise UserError(
                f"a block of edges has {len(one)} sources and {len(other)} destinations; give one of each an edge"
            )
        if (weight is not None) != self._weighted:
            state = "no weights though weighted=True" if self._weighted else "weights though weighted=False"
            raise UserError(f"a block of edges has {state}; give all edges weights, or none")
        self._check_range(one, other)
        edges.add(one, other, None if weight is None else edge_weights(weight, len(one), self._num_added))
        self._num_added += len(one)
        if self._progress is not None:
            self._progress("edges", self._num_added, 0)

    def finish(
        self,
        *,
        features: RowBlocks | None = None,
        labels: Any = None,
        num_classes: int | None = None,
        masks: Mapping[str, Any] | None = None,
        node_ids: Any = None,
        provenance: m.Provenance | None = None,
    ) -> GraphStore:
        """Write everything, put the store in its place, and open it.

        features: None for a graph of structure only. The others as in `GraphStore.write`.
        Labels, masks, ids and features are checked before the edges are sorted. Raises UserError.
        """
        from dngd.graph.store import GraphStore

        self.write(
            features=features,
            labels=labels,
            num_classes=num_classes,
            masks=masks,
            node_ids=node_ids,
            provenance=provenance,
        )
        return GraphStore.open(self._target)

    def write(
        self,
        *,
        features: RowBlocks | None = None,
        labels: Any = None,
        num_classes: int | None = None,
        masks: Mapping[str, Any] | None = None,
        node_ids: Any = None,
        provenance: m.Provenance | None = None,
    ) -> Path:
        """Do as `finish` but do not open the store; return its path."""
        edges, folder = self._open_edges(), self._folder.path
        num_nodes = self._num_nodes
        classes, num_classes = canonical_labels(labels, num_nodes, num_classes)
        split_masks = canonical_masks(masks, num_nodes)
        names = canonical_node_ids(node_ids, num_nodes)
        num_features = features.width if features is not None else 0
        files: dict[str, m.FileEntry] = {}
        if features is not None and num_features:
            path = folder / m.FEATURES
            files[m.FEATURES] = write_features(path, features, num_nodes, self._feature_dtype, self._progress)
        files[m.LABELS] = write_labels(folder / m.LABELS, classes)
        if split_masks:
            files[m.SPLITS] = write_columns(folder / m.SPLITS, _mask_columns(split_masks))
        if names is not None:
            files[m.NODE_IDS] = write_columns(folder / m.NODE_IDS, {"node_ids": names})
        num_labelled = int(np.count_nonzero((classes if classes.ndim == 1 else classes[:, 0]) >= 0))
        version = m.PLAIN_VERSION if classes.ndim == 1 else m.FORMAT_VERSION
        mask_splits = {mask: 0 if v.ndim == 1 else len(v) for mask, v in split_masks.items()}
        del classes, split_masks, names, labels, masks, node_ids
        topology = edges.write()
        self._edges = None
        files.update(topology.files)
        manifest = m.Manifest(
            format_version=version,
            name=self._name,
            num_nodes=num_nodes,
            num_edges=topology.num_edges,
            num_features=num_features,
            num_classes=num_classes,
            num_labelled=num_labelled,
            directed=topology.directed,
            self_loops=topology.self_loops,
            duplicates=topology.duplicates,
            masks=mask_splits,
            files={file: files[file] for file in m.FILE_NAMES if file in files},
            provenance=provenance or m.Provenance(),
        )
        with (folder / m.MANIFEST_NAME).open("w", encoding="utf-8", newline="\n") as file:
            file.write(manifest.to_text())
            file.flush()
            os.fsync(file.fileno())
        self._folder.commit()
        return self._target

    def _open_edges(self) -> EdgeSort:
        if self._edges is None:
            raise RuntimeError("StoreBuilder is used outside of its `with` block, or after finish()")
        return self._edges

    def _nodes(self, values: Any, what: str) -> npt.NDArray[Any]:
        array = as_array(values, f"the {what} nodes of a block of edges")
        if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
            raise UserError(
                f"the {what} nodes of a block of edges have shape {array.shape} and dtype {array.dtype}; give "
                "integers [edges], numbered from 0"
            )
        return array if array.dtype.kind in "iu" else array.astype(np.int64)

    def _check_range(self, source: npt.NDArray[Any], destination: npt.NDArray[Any]) -> None:
        for ends in (source, destination):
            if len(ends) and (int(ends.min()) < 0 or int(ends.max()) >= self._num_nodes):
                break
        else:
            return
        bad = np.zeros(len(source), dtype=np.bool_)
        for ends in (source, destination):
            bad |= (ends < 0) | (ends >= self._num_nodes)
        at = int(np.flatnonzero(bad)[0])
        raise UserError(
            f"edge {self._num_added + at} (counted from 0) joins {source[at]} -> {destination[at]} but the graph has "
            f"{self._num_nodes} nodes, numbered 0 to {self._num_nodes - 1} ({int(bad.sum())} such edges in this "
            "block); remove these edges or add the missing nodes"
        )


def _mask_columns(masks: Mapping[str, npt.NDArray[np.bool_]]) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    for mask, values in masks.items():
        names = m.mask_columns(mask, 0 if values.ndim == 1 else len(values))
        columns.update(zip(names, values.reshape(-1, values.shape[-1]).view(np.uint8)))
    return columns
