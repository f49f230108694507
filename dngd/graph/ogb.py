"""Importing OGB node-property sets: from their raw folder, or by name through the `ogb` package.

Two raw forms: csv.gz tables (ogbn-products, ogbn-arxiv) and npz arrays (ogbn-papers100M). Both are read in blocks.
OGB's own loader unpickles files and holds the whole graph in memory; of the package only its list of data sets and
its download function are used.
"""

from __future__ import annotations

import csv
import importlib.util
import shutil
import stat
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import Unpack

from dngd.errors import UserError
from dngd.graph.builder import RowBlocks, StoreBuilder
from dngd.graph.cache import cache_folder
from dngd.graph.canonical import canonical_labels
from dngd.graph.import_options import (
    ImportOptions,
    check_options,
    check_training_nodes,
    recorded,
    warn_of_empty_classes,
)
from dngd.graph.lock import file_lock
from dngd.graph.manifest import Provenance
from dngd.graph.npz import check_edge_index, dense_features
from dngd.graph.npz_members import NpzMembers
from dngd.graph.staging import StagedFolder
from dngd.graph.store import GraphStore
from dngd.graph.table_files import Table, open_table
from dngd.graph.table_readers import CsvStyle
from dngd.graph.table_values import numbers
from dngd.paths import expanded

Array = npt.NDArray[Any]

_PARTS = {"train": "train", "val": "valid", "test": "test"}
_WAIT_SECONDS = 3600.0
_NUM_FORMS = "raw/edge.csv.gz or raw/data.npz"


@dataclass(frozen=True)
class _Facts:
    """What OGB's list says of a data set that its files do not."""

    name: str
    num_nodes: int
    add_reverse: bool
    num_classes: int
    split: str


_KNOWN = (
    # Its raw file lists each undirected edge once; ogbn-arxiv and papers100M are directed.
    _Facts("ogbn-products", 2_449_029, True, 47, "sales_ranking"),
    _Facts("ogbn-arxiv", 169_343, False, 40, "time"),
    _Facts("ogbn-papers100M", 111_059_956, False, 172, "time"),
)
_FOREIGN = {
    "ogbn-proteins": "its features are of edges, and dngd trains on features of nodes",
    "ogbn-mag": "it has several types of nodes, and heterogeneous graphs are not supported",
}


def import_ogb(
    source: str | Path, out: str | Path, *, download_dir: str | Path | None = None, **options: Unpack[ImportOptions]
) -> GraphStore:
    """Convert an OGB node-property set into a store at `out`.

    source: a folder with raw/ and split/, or a name such as ogbn-products, which is downloaded once through the `ogb`
        package into download_dir (default: the cache folder) and kept there.
    options: see `ImportOptions`; add_reverse: default as OGB has it.
    Raises UserError if files are missing, damaged or do not fit together, the set is not one graph with node
    features, or it cannot be downloaded. Nothing is left behind then but the download.
    """
    check_options(out, options, weighted=False)
    folder = expanded(source)
    if not folder.is_dir():
        folder = _downloaded(str(source), download_dir)
    raw = folder / "raw" if (folder / "raw").is_dir() else folder
    root = raw.parent if raw.name == "raw" else folder
    with _open_raw(raw) as files:
        num_nodes, num_edges = files.counts()
        facts = next((known for known in _KNOWN if known.num_nodes == num_nodes), None)
        labels, num_classes = canonical_labels(files.labels(num_nodes), num_nodes, facts.num_classes if facts else None)
        if facts is None:
            warn_of_empty_classes(labels, num_classes, str(root))
        masks = _masks(root / "split", facts, num_nodes)
        check_training_nodes(masks, labels, str(root))
        settings = ImportOptions(**options)
        settings["name"] = options.get("name") or (facts.name if facts else root.name.replace("_", "-"))
        settings.setdefault("add_reverse", facts.add_reverse if facts else False)
        with StoreBuilder(out, num_nodes=num_nodes, **settings) as builder:
            count = 0
            for source_nodes, target_nodes in files.edges():
                builder.add_edges(source_nodes, target_nodes)
                count += len(source_nodes)
            if count != num_edges:
                raise UserError(
                    f"{raw} holds {count} edges but says {num_edges}; the files are incomplete: fetch them again"
                )
            return builder.finish(
                features=files.features(num_nodes, expanded(out).absolute().parent),
                labels=labels,
                num_classes=num_classes,
                masks=masks,
                provenance=Provenance(source=settings["name"] or "", options=recorded("ogb", settings)),
            )


def is_ogb_folder(folder: Path) -> bool:
    """Say whether a folder, or its raw/, holds a data set in one of OGB's raw forms."""
    return any((raw / name).is_file() for raw in (folder / "raw", folder) for name in ("edge.csv.gz", "data.npz"))


class _CsvFiles:
    """The csv.gz form: tables without headers."""

    def __init__(self, raw: Path) -> None:
        self._raw = raw

    def __enter__(self) -> _CsvFiles:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def counts(self) -> tuple[int, int]:
        counts = [_column(self._raw / f"num-{what}-list.csv.gz") for what in ("node", "edge")]
        return _one_graph(counts[0], self._raw), _one_graph(counts[1], self._raw)

    def labels(self, num_nodes: int) -> Array:
        path = self._raw / "node-label.csv.gz"
        table = _csv(path)
        return _labels(np.concatenate(list(_rows(table, len(table.schemas()[0].names)))))

    def edges(self) -> Iterator[tuple[Array, Array]]:
        table = _csv(self._raw / "edge.csv.gz")
        for _, _, batch in table.batches(["f0", "f1"], 16, dict.fromkeys(("f0", "f1"), "int64")):
            yield numbers(batch.column(0)), numbers(batch.column(1))

    def features(self, num_nodes: int, scratch: Path) -> RowBlocks | None:
        path = self._raw / "node-feat.csv.gz"
        if not path.is_file():
            return None
        table = _csv(path)
        width = len(table.schemas()[0].names)
        return RowBlocks(width, _rows(table, width))


class _NpzFiles:
    """The npz form."""

    def __init__(self, raw: Path) -> None:
        self._raw = raw
        self._data = NpzMembers(raw / "data.npz")

    def __enter__(self) -> _NpzFiles:
        return self

    def __exit__(self, *error: Any) -> None:
        self._data.__exit__(*error)

    def counts(self) -> tuple[int, int]:
        missing = [k for k in ("edge_index", "num_nodes_list", "num_edges_list") if k not in self._data.names]
        if missing:
            raise UserError(f"{self._data.path} lacks {', '.join(missing)}; it is not OGB's file: fetch it again")
        nodes, edges = (self._data.read(f"num_{what}_list") for what in ("nodes", "edges"))
        return _one_graph(nodes, self._raw), _one_graph(edges, self._raw)

    def labels(self, num_nodes: int) -> Array:
        path = self._raw / "node-label.npz"
        with NpzMembers(path) as members:
            if "node_label" not in members.names:
                raise UserError(f"{path} lacks node_label; it is not OGB's file: fetch it again")
            return _labels(members.read("node_label"))

    def edges(self) -> Iterator[tuple[Array, Array]]:
        check_edge_index(self._data, "edge_index")
        return self._data.pairs("edge_index")

    def features(self, num_nodes: int, scratch: Path) -> RowBlocks | None:
        if "node_feat" not in self._data.names:
            return None
        return dense_features(self._data, "node_feat", num_nodes, scratch)


def _open_raw(raw: Path) -> _CsvFiles | _NpzFiles:
    for foreign in ("triplet-type-list.csv.gz", "edge_index_dict.npz"):
        if (raw / foreign).is_file():
            raise UserError(f"{raw} has several types of nodes ({foreign}); heterogeneous graphs are not supported")
    if (raw / "data.npz").is_file():
        return _NpzFiles(raw)
    needed = [f"{name}.csv.gz" for name in ("edge", "num-node-list", "num-edge-list", "node-label")]
    missing = [name for name in needed if not (raw / name).is_file()]
    if missing:
        raise UserError(
            f"{raw} lacks {', '.join(missing)}; give the folder of an OGB node-property set, which has {_NUM_FORMS}"
        )
    return _CsvFiles(raw)


def _csv(path: Path) -> Table:
    return open_table(path, "raw", style=CsvStyle(delimiter=",", header=False))


def _rows(table: Table, width: int) -> Iterator[Array]:
    """Yield the rows of a table of numbers, (rows, width) float64."""
    names = [f"f{k}" for k in range(width)]
    for _, _, batch in table.batches(names, 8 * width, dict.fromkeys(names, "float64")):
        yield np.column_stack([numbers(column) for column in batch.columns])


def _column(path: Path) -> Array:
    return np.concatenate([rows[:, 0] for rows in _rows(_csv(path), 1)])


def _one_graph(counts: Array, raw: Path) -> int:
    if counts.size != 1:
        raise UserError(f"{raw} holds {counts.size} graphs; node classification needs one: give an ogbn-... set")
    return int(counts.reshape(-1)[0])


def _labels(labels: Array) -> Array:
    """Return labels as numbers [nodes], of several a node [nodes, classes]; NaN (unlabelled) as -1."""
    labels = labels if labels.ndim == 2 and labels.shape[1] > 1 else labels.reshape(-1)
    return np.where(np.isnan(labels), -1, labels) if labels.dtype.kind == "f" else labels


def _masks(folder: Path, facts: _Facts | None, num_nodes: int) -> dict[str, npt.NDArray[np.bool_]] | None:
    """Return the standard split, or None if there is no split folder."""
    found = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if not found:
        return None
    chosen = facts.split if facts is not None and facts.split in found else found[0]
    if len(found) > 1 and (facts is None or chosen != facts.split):
        raise UserError(f"{folder} holds {len(found)} splits ({', '.join(found)}); leave the one to import there")
    masks = {}
    for part, name in _PARTS.items():
        path = folder / chosen / f"{name}.csv.gz"
        if not path.is_file():
            raise UserError(f"{path} is missing; fetch the data set again")
        nodes = _column(path)
        if len(nodes) and (nodes.min() < 0 or nodes.max() >= num_nodes or (nodes != np.trunc(nodes)).any()):
            raise UserError(f"{path} names nodes outside 0 to {num_nodes - 1}; fetch the data set again")
        masks[part] = np.zeros(num_nodes, dtype=np.bool_)
        masks[part][nodes.astype(np.int64)] = True
    return masks


def _downloaded(name: str, download_dir: str | Path | None) -> Path:
    """Return the folder of a data set, fetching it first if it is not there."""
    if name in _FOREIGN:
        raise UserError(f"{name} cannot be imported: {_FOREIGN[name]}")
    if not name.startswith("ogbn-"):
        raise UserError(
            f"{name} is neither a folder nor an OGB node-property set; give a folder with {_NUM_FORMS}, or one of "
            f"{', '.join(known.name for known in _KNOWN)}"
        )
    root = expanded(download_dir) if download_dir is not None else cache_folder() / "downloads"
    target = root / name.replace("-", "_")
    if is_ogb_folder(target):
        return target
    # What is there is replaced by the download.
    if target.is_symlink() or (target.exists() and not (target.is_dir() and not any(target.iterdir()))):
        raise UserError(
            f"{target}, where {name} would be put, exists and holds no {_NUM_FORMS}; move it away, or choose another "
            "download_dir"
        )
    url, folder_in_zip = _address(name)
    with file_lock(root / f"{target.name}.lock", purpose=f"downloading {name}", wait_seconds=_WAIT_SECONDS):
        if not is_ogb_folder(target):
            with StagedFolder(target, overwrite=True) as staged:
                archive = _fetch(name, url, staged.path)
                _extract(archive, folder_in_zip, staged.path)
                archive.unlink()
                staged.commit()
    return target


def _address(name: str) -> tuple[str, str]:
    """Return (url, folder inside the zip file) from the ogb package's list, without importing the package."""
    spec = importlib.util.find_spec("ogb")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"{name} is downloaded through the ogb package, which is not installed; install it by pip install "
            "'dngd[ogb]', or give the folder of a data set fetched elsewhere"
        )
    path = Path(spec.submodule_search_locations[0]) / "nodeproppred" / "master.csv"
    with path.open(newline="", encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    names = [known for known in head[1:] if known not in _FOREIGN]
    if name not in names:
        raise UserError(f"{name} is not in OGB's list; give one of {', '.join(names)}")
    facts = {row[0]: row[head.index(name)] for row in rows}
    return facts["url"], facts["download_name"]


def _fetch(name: str, url: str, folder: Path) -> Path:
    try:
        from ogb.utils.url import download_url

        return Path(download_url(url, str(folder), log=False))
    # ogb turns any failure on the way, Ctrl-C too, into a RuntimeError; a server without a length, into a TypeError.
    except (OSError, RuntimeError, ValueError, TypeError, ImportError) as error:
        raise UserError(
            f"{name} could not be downloaded from {url} ({error}); check the network, or fetch and unpack the file "
            "elsewhere and give its folder"
        ) from error


def _extract(archive: Path, inner: str, folder: Path) -> None:
    """Unpack what lies below `inner` in the zip file into the folder; refuses members that lead outside it."""
    try:
        with zipfile.ZipFile(archive) as packed:
            for member in packed.infolist():
                path = PurePosixPath(member.filename)
                is_link = stat.S_ISLNK(member.external_attr >> 16)
                if path.is_absolute() or ".." in path.parts or "\\" in member.filename or is_link:
                    raise UserError(
                        f"{archive.name} has a member {member.filename!r} that leads outside; it was not unpacked"
                    )
                if member.is_dir() or path.parts[0] != inner or len(path.parts) == 1:
                    continue
                target = folder.joinpath(*path.parts[1:])
                target.parent.mkdir(parents=True, exist_ok=True)
                with packed.open(member) as content, target.open("wb") as file:
                    shutil.copyfileobj(content, file, 1 << 20)
    except (zipfile.BadZipFile, EOFError, RuntimeError) as error:
        raise UserError(f"{archive.name} is damaged or incomplete ({error}); start again to fetch it anew") from error
    if not is_ogb_folder(folder):
        raise UserError(f"{archive.name} holds no {_NUM_FORMS} below {inner}/; OGB has changed its files: report this")
