"""GraphStore: a graph on disk, opened by memory map without copying.

    store = GraphStore.open("cora.store")
    store.indptr, store.indices        # compressed sparse columns: in-neighbours of each node
    store.features[rows], store.labels
    store.split("random:0.5/0.25/0.25", seed=0).train

The store owns reading. Checking and writing arrays is `writer.py`, splits are `splits.py`, full
verification is `verify.py`. A graph too large for arrays in memory is written by `builder.StoreBuilder`.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from dngd.errors import UserError
from dngd.graph import manifest as m
from dngd.graph.arrow_files import file_sha256, read_columns
from dngd.graph.canonical import Duplicates, FeatureType, SelfLoops
from dngd.graph.filesystems import is_remote
from dngd.graph.manifest import LabelNames, Manifest, Provenance, are_numbers, read_manifest
from dngd.graph.splits import Split, make_split
from dngd.graph.staging import is_temporary
from dngd.graph.writer import Progress, write_store
from dngd.paths import expanded


class GraphStore:
    """A read-only graph on disk. Open with `GraphStore.open`, create with `GraphStore.write`.

    >>> import tempfile, torch
    >>> folder = tempfile.mkdtemp() + "/path"
    >>> edges = torch.tensor([[0, 1, 2], [1, 2, 3]])
    >>> GraphStore.write(folder, features=torch.eye(4), labels=[0, 0, 1, 1], edge_index=edges, add_reverse=True)
    GraphStore(...)
    >>> store = GraphStore.open(folder)
    >>> store.num_nodes, store.num_edges, store.num_classes
    (4, 6, 2)
    >>> store.indices[store.indptr[1] : store.indptr[2]].tolist()  # the sources of the edges into node 1
    [0, 2]

    Tensors view the files through private copy-on-write mappings: opening reads no array, processes share
    the pages, and writing to a tensor changes only this process's view, never the file.
    Pickling sends the path alone; the receiver opens it again.

    Attributes:
        path: the folder. manifest: what it says of itself.
        indptr: int64 [num_nodes + 1]. indices: int64 [num_edges]; the sources of the edges into node v are
            indices[indptr[v]:indptr[v+1]], ascending.
        edge_weight: float32 [num_edges], in the order of indices, or None.
        features: float32, float16 or bfloat16 [num_nodes, num_features]; num_features is 0 for a graph of structure
            only.
        has_own_edges, has_own_labels: whether the edges or labels are in this process's memory instead of the files,
            see `with_edges` and `with_classes`.
        labels: int64 [num_nodes], -1 for unlabelled nodes; of several labels a node (is_multilabel) int8 [num_nodes,
            num_classes] of 0 and 1, -1 throughout for unlabelled nodes.
    """

    def __init__(self, path: Path, manifest: Manifest, columns: Mapping[str, Any]) -> None:
        """Wrap mapped columns; use `GraphStore.open`, which checks them."""
        self.path = path
        self.manifest = manifest
        self.indptr: Tensor = torch.from_numpy(columns["indptr"])
        self.indices: Tensor = torch.from_numpy(columns["indices"])
        self.labels: Tensor = torch.from_numpy(columns["labels"])
        weight = columns.get("edge_weight")
        self.edge_weight: Tensor | None = None if weight is None else torch.from_numpy(weight)
        features = columns.get("features", np.empty((manifest.num_nodes, 0), dtype=np.float32))
        self.features: Tensor = torch.from_numpy(features)
        if manifest.feature_dtype == "bfloat16":
            self.features = self.features.view(torch.bfloat16)
        self._node_ids: Any = columns.get("node_ids")
        self._node_ids_checked = False
        self._partitions: dict[int, Tensor] = {}
        self._masks: dict[str, Tensor] = {}
        self.has_own_edges = self.has_own_labels = False
        for mask, splits in manifest.masks.items():
            rows = [torch.from_numpy(columns[c]).view(torch.bool) for c in m.mask_columns(mask, splits)]
            self._masks[mask] = torch.stack(rows) if splits else rows[0]

    @classmethod
    def open(cls, path: str | Path) -> GraphStore:
        """Open a store. Its time does not depend on the graph's size.

        Checks the manifest (format version, its own checksum) and for each file that it lists the size, the
        checksum of Arrow's header and footer, column types and length. The values themselves are checked by
        `verify`. Raises UserError, naming the file and the fix, when one of these fails. Partitions are left for
        `partition` to open, so that a broken one, which can be made again, does not keep the graph from opening.

        An `s3://` or `gs://` address is copied into the cache folder (DNGD_CACHE_DIR) once, every byte checked on
        the way, and opened there.
        """
        if is_remote(path):
            # There, since a copy is opened by this method.
            from dngd.graph.remote import open_copy

            return open_copy(path)
        folder = expanded(path).absolute()
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder; give the folder of a graph store")
        if is_temporary(folder):
            raise UserError(f"{folder} is an unfinished write; remove it and import the graph again")
        manifest = read_manifest(folder)
        columns: dict[str, Any] = {}
        for name, entry in manifest.files.items():
            if not m.is_partition_file(name):
                columns.update(read_columns(folder / name, entry, m.REIMPORT.format(path=folder)))
        indptr = columns["indptr"]
        if indptr[0] != 0 or indptr[-1] != manifest.num_edges:
            raise UserError(
                f"{folder / m.INDPTR} runs from {indptr[0]} to {indptr[-1]} instead of 0 to "
                f"{manifest.num_edges}; " + m.REIMPORT.format(path=folder)
            )
        return cls(folder, manifest, columns)

    @classmethod
    def reopen(cls, path: str | Path, digest: str) -> GraphStore:
        """Open a store that another process has open. Raises UserError where another graph is at its path by now."""
        store = cls.open(path)
        if store.digest != digest:
            raise UserError(f"{path} was replaced since the store was opened; open the store again")
        return store

    @classmethod
    def write(
        cls,
        path: str | Path,
        *,
        features: Any,
        labels: Any = None,
        edge_index: Any = None,
        indptr: Any = None,
        indices: Any = None,
        name: str | None = None,
        num_nodes: int | None = None,
        num_classes: int | None = None,
        edge_weight: Any = None,
        masks: Mapping[str, Any] | None = None,
        directed: bool | None = None,
        self_loops: SelfLoops = "drop",
        duplicates: Duplicates = "drop",
        add_reverse: bool = False,
        feature_dtype: FeatureType = "float32",
        node_ids: Any = None,
        provenance: Provenance | None = None,
        overwrite: bool = False,
        progress: Progress | None = None,
    ) -> GraphStore:
        """Write arrays as a store at `path` and open it. Takes numpy, torch, lists, scipy sparse features.

        features: (nodes, width) numbers; None with num_nodes for structure only. feature_dtype: how they are stored,
            float32, float16 or bfloat16.
        labels: (nodes,) class numbers from 0, -1 unlabelled; several labels a node: (nodes, classes) of 0 and 1, rows
            of -1 unlabelled; None: none labelled.
        edge_index: (2, entries), row 0 -> row 1, any order; or indptr (nodes + 1,), indices (entries,), the
            in-neighbours of each node. edge_weight: (entries,), in the order of the entries.
        name: default the folder's name. num_classes: default the largest label + 1.
        masks: {"train" | "val" | "test": bool (nodes,) or (splits, nodes)}.
        directed: None measures it; False also requires each edge in both directions.
        self_loops: drop or keep. duplicates: drop, keep, or sum (of weights). The manifest counts both.
        add_reverse: add the reverse of each edge, before duplicates are treated.
        node_ids: the users' own names of the nodes, (nodes,) distinct whole numbers or strings; None: 0 to nodes - 1.
        overwrite: replace an existing store (never a folder with other files in it).
        progress: called with (stage, done, total), in the units of the stage.

        Equal graphs give byte-equal files whatever the order of the edges (with the same pyarrow).
        Raises UserError if the arrays do not make a graph or writing fails; leaves nothing behind then.
        """
        return cls.open(
            write_store(
                path,
                features=features,
                labels=labels,
                edge_index=edge_index,
                indptr=indptr,
                indices=indices,
                name=name,
                num_nodes=num_nodes,
                num_classes=num_classes,
                edge_weight=edge_weight,
                masks=masks,
                directed=directed,
                self_loops=self_loops,
                duplicates=duplicates,
                add_reverse=add_reverse,
                feature_dtype=feature_dtype,
                node_ids=node_ids,
                provenance=provenance,
                overwrite=overwrite,
                progress=progress,
            )
        )

    @property
    def name(self) -> str:
        """The graph's name."""
        return self.manifest.name

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return self.manifest.num_nodes

    @property
    def num_edges(self) -> int:
        """Number of stored edge entries; an undirected edge counts twice."""
        return self.manifest.num_edges

    @property
    def num_features(self) -> int:
        """Width of the feature table."""
        return self.manifest.num_features

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 when no node is labelled."""
        return self.manifest.num_classes

    @property
    def is_multilabel(self) -> bool:
        """Whether a node has several labels: a row of 0 and 1."""
        return self.manifest.is_multilabel

    @property
    def labelled(self) -> Tensor:
        """Which nodes have labels, bool [num_nodes]."""
        return (self.labels[:, 0] if self.is_multilabel else self.labels) >= 0

    @property
    def nbytes(self) -> int:
        """Bytes of all array files on the disk."""
        return sum(entry.bytes for entry in self.manifest.files.values())

    @property
    def digest(self) -> str:
        """sha256 over the graph's files' sha256: equal content, equal digest, whatever name, path or partitions."""
        files = sorted(self.manifest.files.items())
        lines = (f"{name} {entry.sha256}" for name, entry in files if not m.is_partition_file(name))
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    @property
    def split_masks(self) -> dict[str, Tensor]:
        """{train | val | test: bool (nodes,), or (splits, nodes)}, as far as the graph brings them."""
        return dict(self._masks)

    @property
    def node_ids(self) -> Any:
        """The users' own names of the nodes: numpy int64 [num_nodes], an Arrow string array, or None for 0, 1, 2, ...

        Views the file. Raises UserError if the strings of an altered file would be read out of bounds.
        """
        if isinstance(self._node_ids, pa.Array) and not self._node_ids_checked:
            try:
                self._node_ids.validate(full=True)
            except pa.ArrowInvalid as error:
                fix = m.REIMPORT.format(path=self.path)
                raise UserError(f"{self.path / m.NODE_IDS} holds broken strings ({error}); {fix}") from error
            self._node_ids_checked = True
        return self._node_ids

    def ids_of(self, first: int, last: int) -> Any:
        """Return the users' names of nodes first to last - 1 as an Arrow array of int64 or strings."""
        if not 0 <= first <= last <= self.num_nodes:
            raise ValueError(f"nodes {first} to {last} are not within 0 to {self.num_nodes}")
        names = self.node_ids
        if isinstance(names, pa.Array):
            return names.slice(first, last - first)
        return pa.array(np.arange(first, last) if names is None else names[first:last])

    @property
    def partitions(self) -> dict[int, m.PartitionInfo]:
        """Number of parts -> how that partition was made, its edge cut and the nodes of each part."""
        return {int(parts): info for parts, info in self.manifest.partitions.items()}

    def partition(self, parts: int) -> Tensor:
        """Return each node's part, int32 [num_nodes] in 0..parts-1; views the file, whose bytes are checked first.

        Raises UserError if the store has no partition in so many parts, or its file is broken or was replaced since
        the store was opened.
        """
        if parts not in self._partitions:
            if parts not in self.partitions:
                known = ", ".join(map(str, sorted(self.partitions))) or "none"
                raise UserError(
                    f"{self.path} has no partition in {parts} parts (it has: {known}); make it with "
                    f"`dngd data partition {self.path} --parts {parts}`"
                )
            name = m.partition_file(parts)
            fix = m.REPARTITION.format(path=self.path, parts=parts)
            entry = self.manifest.files[name]
            columns = read_columns(self.path / name, entry, fix)
            # Another partition in as many parts has the same header: processes must not take one another's for theirs.
            if file_sha256(self.path / name) != entry.sha256:
                raise UserError(
                    f"{self.path / name} was altered, or replaced since the store was opened; open the store again, or "
                    f"{fix}"
                )
            self._partitions[parts] = torch.from_numpy(columns["part"])
        return self._partitions[parts]

    def with_edges(self, indptr: Tensor, indices: Tensor, edge_weight: Tensor | None) -> GraphStore:
        """Return this graph with other edges, which stay in memory: all else are views of the same files.

        The arguments are as the attributes. Its path and digest are the files'; it cannot be pickled.
        """
        other = copy.copy(self)
        other.indptr, other.indices, other.edge_weight = indptr, indices, edge_weight
        other.manifest = self.manifest.model_copy(update={"num_edges": int(indptr[-1])})
        other.has_own_edges = True
        return other

    def with_classes(self, number: Tensor, num_classes: int) -> GraphStore:
        """Return this graph with its classes numbered anew, in memory: all else are views of the same files.

        number: int64 [the classes here], what each is called. num_classes: how many there are then, of which some may
        not occur; of several labels a node as many as here. It cannot be pickled.
        """
        other = copy.copy(self)
        if self.is_multilabel:
            assert num_classes == len(number), "a label that is not told is no 0"
            other.labels = torch.empty_like(self.labels)
            other.labels[:, number] = self.labels
        else:
            other.labels = torch.where(self.labels >= 0, number[self.labels.clamp_min(0)], -1)
        other.manifest = self.manifest.model_copy(update={"num_classes": num_classes})
        other.has_own_labels = True
        return other

    @property
    def label_names(self) -> LabelNames | None:
        """What the user calls the classes: text, or of a table the numbers that its labels are, if they are not 0 to
        num_classes - 1. None: class numbers, or they were not kept."""
        names = self.manifest.provenance.options.get("label_names")
        if self.has_own_labels or not isinstance(names, list) or len(names) != self.num_classes:
            return None
        if are_numbers(names):
            return tuple(names)
        return tuple(str(name) for name in names)

    def in_degrees(self) -> Tensor:
        """Return the number of edges into each node, int64 [num_nodes]."""
        return self.indptr.diff()

    def split(self, spec: str, seed: int = 0) -> Split:
        """Return the split that `spec` names: masks, masks:K, public, complete or random:0.5/0.25/0.25.

        seed matters for `random` only. Raises UserError if the graph has no such split or a part is empty.
        """
        return make_split(spec, labels=self.labels, masks=self._masks, graph=self.name, seed=seed)

    def verify(self, progress: Callable[[str, int, int], None] | None = None) -> list[str]:
        """Return every problem found by hashing all files and checking all values; empty when sound.

        Reads the whole store. progress: called with (file, bytes done, bytes in all).
        """
        from dngd.graph.verify import verify_store

        return verify_store(self.path, progress=progress)

    def __reduce__(self) -> tuple[Any, tuple[Path, str]]:
        if self.has_own_edges or self.has_own_labels:
            raise TypeError("a graph with edges or labels in memory cannot be pickled")
        return GraphStore.reopen, (self.path, self.digest)

    def __repr__(self) -> str:
        return (
            f"GraphStore({self.name!r}, nodes={self.num_nodes}, edges={self.num_edges}, "
            f"features={self.num_features}, classes={self.num_classes}, path={str(self.path)!r})"
        )
