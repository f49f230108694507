"""The manifest of a store: what `manifest.json` says, and how it is read and written.

The manifest is the last file written into a store and names every other file with its size, layout
and checksums, so that `open` can reject a truncated or altered store without reading the arrays.
It holds no machine path and no time: equal inputs give equal manifests.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from dngd.errors import UserError
from dngd.paths import printable

FORMAT_VERSION = 3
"""2 adds feature tables of 16-bit floats, the users' node ids and partitions to version 1, which is read as before; 3
adds several labels a node. Stores without these are written as version 2, which earlier releases read too."""
PLAIN_VERSION = 2
MANIFEST_NAME = "manifest.json"

INDPTR = "indptr.arrow"
INDICES = "indices.arrow"
EDGE_WEIGHT = "edge_weight.arrow"
FEATURES = "features.arrow"
LABELS = "labels.arrow"
SPLITS = "splits.arrow"
NODE_IDS = "node_ids.arrow"
FILE_NAMES = (INDPTR, INDICES, EDGE_WEIGHT, FEATURES, LABELS, SPLITS, NODE_IDS)
MASK_NAMES = ("train", "val", "test")
FEATURE_TYPES = ("float32", "float16", "bfloat16")
NODE_ID_TYPES = ("int64", "string", "large_string")
PARTITION_FORM = re.compile(r"partition\.([1-9][0-9]*)\.arrow")

LabelNames = tuple[str, ...] | tuple[int, ...]
"""What the user calls the classes, in the order of their numbers."""

PARTITION_TEMPORARY = ".partition.tmp-"
"""How the names begin of files that a killed write of a partition leaves in a store; the next one removes them."""

REIMPORT = "import the graph again, or see every problem with `dngd data verify {path}`"
REPARTITION = "make the partition again with `dngd data partition {path} --parts {parts} --overwrite`"


class FileEntry(BaseModel):
    """One Arrow IPC file: its size, its layout, and its checksums."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bytes: int = Field(gt=0, description="size of the file")
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="of the whole file")
    length: int = Field(ge=0, description="rows of its one record batch")
    columns: dict[str, str] = Field(
        description="column -> int64 | int32 | float32 | uint8 | string | large_string | float32[WIDTH] | "
        "float16[WIDTH] | bfloat16[WIDTH], which Arrow holds as uint16"
    )
    data_offset: int = Field(ge=0, description="first byte of the first column's values; 0 without rows")
    data_bytes: int = Field(ge=0, description="from there to the end of the last column's values")
    frame_sha256: str = Field(
        pattern="^[0-9a-f]{64}$",
        description="of the bytes before and after the values (Arrow's header and footer): what open checks",
    )


class Dropped(BaseModel):
    """What became of the edges that a simple graph has no place for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    policy: str = Field(description="drop | keep, or for duplicates also sum (their weights)")
    dropped: int = Field(ge=0, description="edge entries removed on the way in")
    kept: int = Field(ge=0, description="edge entries of this kind that the store holds")


class Provenance(BaseModel):
    """Where a store came from. `source` is a file name or generator, never a path of a machine."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = "arrays"
    source_sha256: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    dngd_version: str = Field(default_factory=lambda: dngd_version())

    @field_validator("source", mode="before")
    @classmethod
    def _of_any_file(cls, value: object) -> object:
        return printable(value) if isinstance(value, str) else value


class PartitionInfo(BaseModel):
    """One assignment of the nodes to parts; the parts themselves are in the file `partition.PARTS.arrow`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str = Field(min_length=1, description="metis | ldg | given (by the caller)")
    edge_cut: float = Field(ge=0, le=1, description="share of the stored edges that join two parts; 0 without edges")
    nodes: list[int] = Field(min_length=1, description="of each part")
    train_nodes: list[int] | None = Field(description="of each part; None: not balanced by training nodes")
    options: dict[str, Any] = Field(default_factory=dict, description="how it was made: slack, seed, ...")


class Manifest(BaseModel):
    """The content of `manifest.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["dngd-graph"] = "dngd-graph"
    format_version: int = PLAIN_VERSION
    name: str = Field(min_length=1)
    num_nodes: int = Field(gt=0)
    num_edges: int = Field(ge=0, description="stored entries: an undirected edge counts twice")
    num_features: int = Field(ge=0)
    num_classes: int = Field(ge=0)
    num_labelled: int = Field(ge=0)
    directed: bool = Field(description="false: each edge is stored in both directions")
    edge_direction: Literal["in"] = Field(
        default="in", description="indices[indptr[v]:indptr[v+1]] are the sources of the edges into v"
    )
    self_loops: Dropped
    duplicates: Dropped
    masks: dict[str, int] = Field(
        default_factory=dict, description="mask -> number of splits; 0 for one mask of shape (nodes,)"
    )
    files: dict[str, FileEntry]
    provenance: Provenance = Field(default_factory=Provenance)
    partitions: dict[str, PartitionInfo] = Field(default_factory=dict, description="number of parts -> partition")

    def to_text(self) -> str:
        """Return the exact text of `manifest.json`, checksum included."""
        body = self.model_dump(mode="json")
        if not self.partitions:
            del body["partitions"]  # as in version 1
        body["checksum"] = _checksum(body)
        return json.dumps(body, indent=2, ensure_ascii=False) + "\n"

    def expected_columns(self) -> dict[str, tuple[int, dict[str, str]]]:
        """Return file name -> (rows, columns) as the counts require them."""
        expected: dict[str, tuple[int, dict[str, str]]] = {
            INDPTR: (self.num_nodes + 1, {"indptr": "int64"}),
            INDICES: (self.num_edges, {"indices": "int64"}),
            LABELS: (self.num_nodes, {"labels": self._stored_type(LABELS, "labels", self._label_types())}),
        }
        if EDGE_WEIGHT in self.files:
            expected[EDGE_WEIGHT] = (self.num_edges, {"edge_weight": "float32"})
        if self.num_features:
            kind = self._stored_type(FEATURES, "features", [f"{t}[{self.num_features}]" for t in FEATURE_TYPES])
            expected[FEATURES] = (self.num_nodes, {"features": kind})
        if self.masks:
            columns = {c: "uint8" for mask, splits in self.masks.items() for c in mask_columns(mask, splits)}
            expected[SPLITS] = (self.num_nodes, columns)
        if NODE_IDS in self.files:
            kind = self._stored_type(NODE_IDS, "node_ids", NODE_ID_TYPES)
            expected[NODE_IDS] = (self.num_nodes, {"node_ids": kind})
        for parts in self.partitions:
            expected[partition_file(int(parts))] = (self.num_nodes, {"part": "int32"})
        return expected

    @property
    def is_multilabel(self) -> bool:
        """Whether a node has a row of 0 and 1, one entry a class, instead of one class."""
        entry = self.files.get(LABELS)
        return entry is not None and entry.columns.get("labels", "").startswith("int8[")

    def _label_types(self) -> list[str]:
        is_later = self.format_version > PLAIN_VERSION
        return ["int64", f"int8[{self.num_classes}]"] if is_later and self.num_classes else ["int64"]

    @property
    def feature_dtype(self) -> str:
        """float32, float16 or bfloat16."""
        entry = self.files.get(FEATURES)
        return entry.columns["features"].partition("[")[0] if entry else FEATURE_TYPES[0]

    @property
    def node_id_type(self) -> str | None:
        """int64, string or large_string; None where nodes have no ids but their numbers."""
        entry = self.files.get(NODE_IDS)
        return entry.columns["node_ids"] if entry else None

    def _stored_type(self, file: str, column: str, allowed: Sequence[str]) -> str:
        """Return the type that the file lists for its column if it is one of those allowed, else the first of them."""
        entry = self.files.get(file)
        listed = entry.columns.get(column, "") if entry else ""
        return listed if listed in allowed else allowed[0]


def are_numbers(names: Sequence[Any]) -> bool:
    """Say whether names of classes are whole numbers."""
    return bool(names) and all(isinstance(name, int) and not isinstance(name, bool) for name in names)


def partition_file(parts: int) -> str:
    """Return the name of the file that holds the assignment of nodes to so many parts."""
    return f"partition.{parts}.arrow"


def is_store_file(name: str) -> bool:
    """Say whether a file of this name can be part of a store, or be left in it by a killed write."""
    return name == MANIFEST_NAME or name in FILE_NAMES or is_partition_file(name)


def is_store_folder(folder: Path) -> bool:
    """Say whether a folder looks like a store, whole or damaged."""
    return (folder / MANIFEST_NAME).exists() and (folder / INDPTR).exists()


def is_partition_file(name: str) -> bool:
    """Say whether a file of this name belongs to a partition, finished or not."""
    return PARTITION_FORM.fullmatch(name) is not None or name.startswith(PARTITION_TEMPORARY)


def mask_columns(mask: str, num_splits: int) -> list[str]:
    """Return the column names of one mask: `train`, or `train.0`, `train.1`, ... for several splits."""
    return [mask] if num_splits == 0 else [f"{mask}.{k}" for k in range(num_splits)]


def dngd_version() -> str:
    """Return the installed version of dngd, or `unknown` when it runs without being installed."""
    try:
        return metadata.version("dngd")
    except metadata.PackageNotFoundError:
        return "unknown"


def read_manifest(folder: Path) -> Manifest:
    """Read and check `folder/manifest.json`.

    Raises UserError if it is missing, unreadable, altered (its own checksum), inconsistent, or of a newer
    format than this dngd knows.
    """
    path = folder / MANIFEST_NAME
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"{folder} holds no {MANIFEST_NAME}, so it is not a dngd graph store; "
            "give the folder that `dngd data import --out` or `dngd data synth --out` wrote"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
    return parse_manifest(raw, path, REIMPORT.format(path=folder))


def parse_manifest(content: bytes, path: Path | str, fix: str) -> Manifest:
    """Check the content of a `manifest.json`. path, fix: what messages call it, and the remedy that they name.

    Raises UserError as `read_manifest` does.
    """
    try:
        raw = content.decode("utf-8")
        body = json.loads(raw)
    except RecursionError:
        raise UserError(f"{path} is not valid JSON (it is nested too deeply); {fix}") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); {fix}") from error
    if not isinstance(body, dict) or body.get("format") != "dngd-graph":
        raise UserError(f"{path} does not describe a dngd graph store (no format 'dngd-graph'); {fix}")
    version = body.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise UserError(
            f"{path} has store format version {version} but this dngd ({dngd_version()}) reads up to "
            f"{FORMAT_VERSION}; upgrade dngd, or import the graph again with this one"
        )
    checksum = body.pop("checksum", None)
    try:
        is_whole = checksum == _checksum(body)
    except (UnicodeEncodeError, RecursionError):  # half characters such as \ud800, which dngd does not write
        is_whole = False
    if not is_whole:
        raise UserError(f"{path} was altered after it was written (its checksum does not match); {fix}")
    try:
        manifest = Manifest.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path} is not valid at '{where}' ({first['msg']}); {fix}") from error
    # Catches bytes that JSON ignores (white space), so that no altered byte goes unnoticed.
    if manifest.to_text() != raw:
        raise UserError(f"{path} was altered after it was written (its text is not as dngd writes it); {fix}")
    _check_files(manifest, path, fix)
    return manifest


def _check_files(manifest: Manifest, path: Path | str, fix: str) -> None:
    expected = manifest.expected_columns()
    if set(manifest.files) != set(expected):
        raise UserError(
            f"{path} lists the files {sorted(manifest.files)} but its counts call for {sorted(expected)}; {fix}"
        )
    for name, (length, columns) in expected.items():
        entry = manifest.files[name]
        if entry.length != length or entry.columns != columns:
            raise UserError(
                f"{path} lists {name} with {entry.length} rows of {entry.columns} but its counts call for "
                f"{length} rows of {columns}; {fix}"
            )
    for parts, info in manifest.partitions.items():
        if len(info.nodes) != int(parts) or sum(info.nodes) != manifest.num_nodes:
            raise UserError(
                f"{path} lists a partition in {parts} parts with {len(info.nodes)} parts of {sum(info.nodes)} nodes in "
                f"all, of {manifest.num_nodes}; {fix}"
            )


def _checksum(body: dict[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
