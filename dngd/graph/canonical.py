"""Checks and canonical forms of a graph's arrays, before anything is written.

Every function takes what users have (numpy, torch, lists, scipy sparse features) and returns the
one form that a store holds, or raises UserError. Nothing here touches a disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import scipy.sparse
import torch

from dngd.errors import UserError
from dngd.graph.manifest import MASK_NAMES

Array = npt.NDArray[Any]
Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]
Duplicates = Literal["drop", "sum", "keep"]
SelfLoops = Literal["drop", "keep"]
FeatureType = Literal["float32", "float16", "bfloat16"]

MAX_NODES = 3_037_000_499
"""The largest number whose square is an int64: an edge is sorted as destination · num_nodes + source."""
MAX_CLASSES = 1 << 16
"""A model has an output for each class: ids or times taken for classes would fill the memory."""
MAX_FEATURES = 1 << 24
"""Rows of features are dense, however they came."""

_BLOCK_BYTES = 1 << 25


def check_edge_options(self_loops: SelfLoops, duplicates: Duplicates, weighted: bool) -> None:
    """Raise UserError if an option is unknown, or weights that are not there are to be summed."""
    for option, value, allowed in (
        ("self_loops", self_loops, ("drop", "keep")),
        ("duplicates", duplicates, ("drop", "sum", "keep")),
    ):
        if value not in allowed:
            raise UserError(f"{option}={value!r} is not known; give one of {', '.join(allowed)}")
    if duplicates == "sum" and not weighted:
        raise UserError("duplicates='sum' needs edge weights to sum; give them, or duplicates='drop'")


def as_array(value: Any, what: str) -> Array:
    """Return value (numpy, torch, list) as a numpy array; UserError if it cannot be one."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        array: Array = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
        return array
    try:
        return np.asarray(value)
    except ValueError as error:
        raise UserError(f"{what} is not a rectangular array ({error}); give numbers in a regular shape") from error


def node_numbers(values: Any, num_nodes: int, what: str) -> Int64Array:
    """Return values as int64 node numbers; UserError if not whole numbers in 0..num_nodes-1."""
    array = as_array(values, what)
    if array.size == 0:
        return np.zeros(array.shape, dtype=np.int64)
    if array.dtype.kind not in "iu":
        raise UserError(f"{what} has dtype {array.dtype}; node numbers must be integers from 0: cast them first")
    if int(array.min()) < 0 or int(array.max()) >= num_nodes:
        flat = array.reshape(-1)
        bad = np.flatnonzero((flat < 0) | (flat >= num_nodes))
        raise UserError(
            f"{what} names node {flat[bad[0]]} ({len(bad)} such entries) but the graph has {num_nodes} "
            f"nodes, numbered 0 to {num_nodes - 1}; remove these edges or give the missing nodes features"
        )
    return array.astype(np.int64, copy=False)


def edge_pair(edge_index: Any, num_nodes: int) -> tuple[Int64Array, Int64Array]:
    """Return (source, destination) of an edge_index of shape (2, entries)."""
    array = as_array(edge_index, "edge_index")
    if array.ndim != 2 or array.shape[0] != 2:
        hint = "; transpose it" if array.ndim == 2 and array.shape[1] == 2 else ""
        raise UserError(
            f"edge_index has shape {array.shape} but must be (2, edges): sources in row 0, destinations in row 1{hint}"
        )
    ids = node_numbers(array, num_nodes, "edge_index")
    return ids[0], ids[1]


def csc_pair(indptr: Any, indices: Any, num_nodes: int) -> tuple[Int64Array, Int64Array]:
    """Return (source, destination) of compressed sparse columns: indptr [nodes + 1], indices [entries]."""
    pointers = as_array(indptr, "indptr")
    sources = node_numbers(indices, num_nodes, "indices")
    if pointers.shape != (num_nodes + 1,) or pointers.dtype.kind not in "iu":
        raise UserError(
            f"indptr has shape {pointers.shape} and dtype {pointers.dtype} but {num_nodes} nodes need "
            f"{num_nodes + 1} integers; check the number of nodes"
        )
    pointers = pointers.astype(np.int64)
    counts = pointers[1:] - pointers[:-1]
    if pointers[0] != 0 or pointers[-1] != len(sources) or (counts < 0).any():
        raise UserError(
            f"indptr runs from {pointers[0]} to {pointers[-1]} but must rise from 0 to the number of "
            f"indices, {len(sources)}; rebuild it"
        )
    return sources, np.repeat(np.arange(num_nodes, dtype=np.int64), counts)


def edge_weights(values: Any, num_entries: int, first_edge: int = 0) -> Float32Array:
    """Return values as finite float32 [num_entries], or raise UserError. first_edge: number of the first one."""
    array = as_array(values, "edge_weight")
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.shape != (num_entries,) or array.dtype.kind not in "iufb":
        raise UserError(
            f"edge_weight has shape {array.shape} and dtype {array.dtype} but must be one number for each of "
            f"the {num_entries} edges"
        )
    with np.errstate(over="ignore"):
        array = array.astype(np.float32, copy=False)
    bad = np.flatnonzero(~np.isfinite(array))
    if len(bad):
        raise UserError(
            f"{len(bad)} edge weights are NaN or infinite, the first is that of edge {first_edge + bad[0]}; "
            "replace them by finite float32 numbers"
        )
    return array


def canonical_labels(values: Any, num_nodes: int, num_classes: int | None) -> tuple[Array, int]:
    """Return (labels, number of classes): int64 [num_nodes] with -1 for unlabelled, or of several labels a node int8
    [num_nodes, num_classes] of 0 and 1 with rows of -1.

    values: NaN is unlabelled too; None: no node is labelled. num_classes None: the largest label + 1, or the width; at
    most MAX_CLASSES.
    """
    if num_classes is not None and not 0 <= num_classes <= MAX_CLASSES:
        state = "is negative" if num_classes < 0 else f"is above {MAX_CLASSES}, the most that there may be"
        raise UserError(f"num_classes={num_classes} {state}; give the number of classes, or leave it out")
    if values is None:
        return np.full(num_nodes, -1, dtype=np.int64), num_classes or 0
    array = as_array(values, "labels")
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim == 2:
        return _label_rows(array, num_nodes, num_classes)
    if array.shape != (num_nodes,):
        raise UserError(f"labels have shape {array.shape} but the graph has {num_nodes} nodes; give one a node")
    if array.dtype.kind == "f":
        array = _whole_labels(array)
    if array.dtype.kind not in "iub":
        raise UserError(
            f"labels have dtype {array.dtype}, which are no whole numbers; give class numbers from 0, -1 for "
            "unlabelled nodes"
        )
    _refuse_large(array)
    given = num_classes is not None
    classes = max(int(array.max()) + 1, 0) if num_classes is None else num_classes
    bad = np.flatnonzero((array < -1) | (array >= classes))
    if len(bad):
        raise UserError(
            f"label {array[bad[0]]} of node {bad[0]} is out of range ({len(bad)} such labels); classes are 0 "
            f"to {classes - 1}{f' (num_classes={classes})' if given else ''} and -1 means unlabelled: mend the labels"
            f"{' or num_classes' if given else ''}"
        )
    return array.astype(np.int64, copy=False), classes


def classes_met(labels: Int64Array, num_classes: int) -> npt.NDArray[np.bool_]:
    """Return which classes have a node: bool [num_classes]. labels: [nodes], -1 unlabelled."""
    met = np.zeros(num_classes + 1, dtype=np.bool_)
    met[labels] = True  # -1 is the place behind the classes
    return met[:num_classes]


def _whole_labels(labels: Array) -> Int64Array:
    """Return labels of floating point as whole numbers, NaN as -1, or raise UserError."""
    labels = np.where(np.isnan(labels), -1, labels)
    bad = np.flatnonzero(np.isinf(labels) | (labels != np.trunc(labels)))
    if len(bad):
        raise UserError(
            f"label {labels[bad[0]]} of node {bad[0]} is no whole number ({len(bad)} such labels); give class numbers "
            "from 0, -1 or NaN for unlabelled nodes"
        )
    _refuse_large(labels)
    return labels.astype(np.int64)


def _refuse_large(labels: Array) -> None:
    """Raise UserError if labels, whole numbers of any type, are beyond what classes can be."""
    at = int(labels.argmax())
    if int(labels[at]) >= MAX_CLASSES:
        count = int((labels >= MAX_CLASSES).sum())
        raise UserError(
            f"label {int(labels[at])} of node {at} is beyond {MAX_CLASSES - 1}, the largest class number "
            f"({count} such labels); these are probably ids, times or amounts: choose other labels (of a table by "
            "--label-column), or number the classes from 0"
        )


def check_width(width: int, what: str) -> None:
    """Raise UserError if rows of features are too wide to be written out. what: whose they are, for messages."""
    if width > MAX_FEATURES:
        raise UserError(
            f"the features of {what} have {width} columns, and sparse ones become dense; give at most {MAX_FEATURES}"
        )


def as_table(name: str, num_dimensions: int) -> str:
    """Return the expression that makes rows of numbers of what is none, for messages."""
    forms = {0: f"{name} of one row a node", 1: f"{name}[:, None]", 2: f"{name}.astype('float32')"}
    return forms.get(num_dimensions, f"{name}.reshape(len({name}), -1)")


def _label_rows(array: Array, num_nodes: int, num_classes: int | None) -> tuple[Array, int]:
    """Return the rows of several labels a node; NaN stands for -1."""
    if array.shape[0] != num_nodes or array.shape[1] == 0:
        raise UserError(f"labels have shape {array.shape} but the graph has {num_nodes} nodes; give one row a node")
    if num_classes not in (None, array.shape[1]):
        raise UserError(f"labels have {array.shape[1]} columns but num_classes={num_classes}; leave num_classes out")
    if array.dtype.kind == "f":
        array = np.where(np.isnan(array), -1, array)
    if array.dtype.kind not in "biuf" or (array.dtype.kind != "b" and not np.isin(array, (-1, 0, 1)).all()):
        raise UserError(
            f"labels have shape {array.shape} and values other than 0 and 1; give a row of 0 and 1 a node, one column "
            "a class (-1 throughout for unlabelled nodes), or one class number a node"
        )
    rows = array.astype(np.int8)
    unknown = (rows < 0).sum(axis=1)
    partly = np.flatnonzero((unknown > 0) & (unknown < rows.shape[1]))
    if len(partly):
        raise UserError(
            f"the labels of node {partly[0]} are partly -1 ({len(partly)} such nodes); give 0 or 1 for every class, or "
            "-1 throughout for an unlabelled node"
        )
    known = rows[unknown == 0]
    if len(known) and rows.shape[1] > 1 and (known.sum(axis=1) == 1).all():
        raise UserError(
            f"labels have shape {array.shape} and exactly one 1 in every row: these are one-hot rows of single labels; "
            "give labels.argmax(1)"
        )
    return rows, rows.shape[1]


def canonical_masks(masks: Mapping[str, Any] | None, num_nodes: int) -> dict[str, npt.NDArray[np.bool_]]:
    """Return {train | val | test: bool (nodes,) or (splits, nodes)} in that order of names."""
    result: dict[str, npt.NDArray[np.bool_]] = {}
    given = dict(masks or {})
    unknown = sorted(set(given) - set(MASK_NAMES))
    if unknown:
        raise UserError(f"mask {unknown[0]!r} is not known; masks are named {', '.join(MASK_NAMES)}: rename it")
    for name in MASK_NAMES:
        if given.get(name) is None:
            continue
        array = as_array(given[name], f"{name} mask")
        if array.ndim not in (1, 2) or array.shape[-1] != num_nodes or array.shape[0] == 0:
            turned = array.ndim == 2 and array.shape[0] == num_nodes
            raise UserError(
                f"the {name} mask has shape {array.shape} but must be ({num_nodes},) or (splits, {num_nodes})"
                + ("; transpose it" if turned else "; give one entry for each node")
            )
        fix = "give booleans, or 0 and 1 (node numbers are turned into a mask by `mask[numbers] = True`)"
        if array.dtype.kind not in "biuf":
            raise UserError(f"the {name} mask has dtype {array.dtype}; {fix}")
        if array.dtype.kind != "b":
            bad = np.argwhere((array != 0) & (array != 1))
            if len(bad):
                raise UserError(
                    f"the {name} mask has {array[tuple(bad[0])]} for node {bad[0][-1]} ({len(bad)} such entries); {fix}"
                )
        result[name] = array.astype(np.bool_, copy=False)
    return result


class FeatureTable:
    """A feature table of any kind (dense or scipy sparse), read in dense row blocks.

    Only one block is dense at a time, so a sparse table needs no memory for its dense form.
    """

    def __init__(self, features: Any, num_nodes: int | None) -> None:
        """features: (nodes, width) numbers, scipy sparse, or None with num_nodes for no features."""
        self._sparse: Any = None
        self._dense: Array | None = None
        if features is None:
            if num_nodes is None:
                raise UserError("a graph without features does not tell its size; give num_nodes")
            self.shape = (num_nodes, 0)
        elif scipy.sparse.issparse(features):
            self._sparse = scipy.sparse.csr_matrix(features)
            self.shape = (int(features.shape[0]), int(features.shape[1]))
            check_width(self.shape[1], "the graph")
        else:
            self._dense = as_array(features, "features")
            if self._dense.ndim != 2 or self._dense.dtype.kind not in "iufb":
                raise UserError(
                    f"features have shape {self._dense.shape} and dtype {self._dense.dtype} but must be a table of "
                    f"numbers (nodes, width); give {as_table('features', self._dense.ndim)}"
                )
            self.shape = (self._dense.shape[0], self._dense.shape[1])
        if num_nodes is not None and self.shape[0] != num_nodes:
            raise UserError(
                f"features have {self.shape[0]} rows but the graph has {num_nodes} nodes; give one row for each node"
            )
        if self.shape[0] == 0:
            raise UserError("the graph has no nodes; give at least one")

    def blocks(self) -> Iterator[Array]:
        """Yield consecutive row blocks of about 32 MiB, of the table's own type."""
        rows = max(1, _BLOCK_BYTES // max(8 * self.shape[1], 1))
        for start in range(0, self.shape[0], rows):
            if self._sparse is not None:
                yield self._sparse[start : start + rows].toarray()
            elif self._dense is not None:
                yield self._dense[start : start + rows]
