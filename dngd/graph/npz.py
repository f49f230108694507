"""Importing a graph from one `.npz` file of plain arrays.

Keys: `edge_index` (2, E) and `num_nodes`; features as `x` (N, F) or as compressed sparse rows
`x_indptr, x_indices, x_data, x_shape`, or none; `edge_weight` (E,); `y` (N,), -1 or NaN unlabelled; `train_mask`,
`val_mask` (or `valid_mask`), `test_mask` of booleans, or 0 and 1, (N,) or (splits, N). Other keys are ignored. Pickled
arrays are never loaded. Edges and features are read in blocks, so that they may be larger than memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse
from typing_extensions import Unpack

from dngd.errors import UserError
from dngd.graph.arrays import MASK_FORMS, masks_of
from dngd.graph.arrow_files import file_sha256
from dngd.graph.builder import RowBlocks, StoreBuilder
from dngd.graph.canonical import MAX_NODES, as_table, canonical_labels, canonical_masks, check_width
from dngd.graph.import_options import (
    ImportOptions,
    check_options,
    check_training_nodes,
    recorded,
    warn_of_empty_classes,
)
from dngd.graph.manifest import Provenance
from dngd.graph.npz_members import NpzMembers
from dngd.graph.store import GraphStore
from dngd.paths import expanded, printable

Array = npt.NDArray[Any]

_SPARSE_KEYS = ("x_indptr", "x_indices", "x_data", "x_shape")
_BLOCK_VALUES = 1 << 22


def import_npz(path: str | Path, out: str | Path, **options: Unpack[ImportOptions]) -> GraphStore:
    """Convert the `.npz` at `path` into a store at `out`. Sparse features become dense in row blocks.

    options: see `ImportOptions`; name: default the file's name without `.npz`.
    Raises UserError if the file is missing, truncated, lacks keys, holds pickled arrays, or makes no graph.
    """
    source = Path(path)
    with NpzMembers(source) as members:
        missing = [key for key in ("edge_index", "num_nodes") if key not in members.names]
        if missing:
            raise UserError(
                f"{source} lacks {' and '.join(missing)} (it has: {', '.join(members.names) or 'nothing'}); "
                "add them: edge_index of shape (2, edges) and num_nodes"
            )
        _warn_of_unused(members, source)
        num_nodes = _num_nodes(members.read("num_nodes"), source)
        weighted = "edge_weight" in members.names
        check_options(out, options, weighted=weighted)
        num_edges = check_edge_index(members, "edge_index")
        weights = _weights(members, num_edges) if weighted else None
        features = _features(members, num_nodes, expanded(out).absolute().parent)
        labels, num_classes = canonical_labels(members.read("y") if "y" in members.names else None, num_nodes, None)
        found = {key: members.read(key) for forms in MASK_FORMS.values() for key in forms if key in members.names}
        warn_of_empty_classes(labels, num_classes, str(source))
        masks = dict(canonical_masks(masks_of(found), num_nodes))
        check_training_nodes(masks, labels if "y" in members.names else None, str(source))
        settings = ImportOptions(**{**options, "name": options.get("name") or printable(source.stem)})
        with StoreBuilder(out, num_nodes=num_nodes, weighted=weighted, **settings) as builder:
            for ends in members.pairs("edge_index"):
                builder.add_edges(*ends, None if weights is None else next(weights))
            return builder.finish(
                features=features,
                labels=labels,
                num_classes=num_classes,
                masks=masks,
                provenance=Provenance(
                    source=source.name, source_sha256=file_sha256(source), options=recorded("npz", options)
                ),
            )


def _warn_of_unused(members: NpzMembers, source: Path) -> None:
    """Say which arrays are left out where features or labels are missing: they may have another name."""
    masks = {key for forms in MASK_FORMS.values() for key in forms}
    known = {"edge_index", "num_nodes", "edge_weight", "x", *_SPARSE_KEYS, "y", *masks}
    unused = [name for name in members.names if name not in known]
    lacks = [name for name in ("x", "y") if name not in members.names and f"{name}_data" not in members.names]
    if unused and lacks:
        warnings.warn(
            f"{source} has no {' and no '.join(lacks)}, and {', '.join(unused)} {'is' if len(unused) == 1 else 'are'} "
            "not used: features are called x, labels y, splits train_mask, val_mask and test_mask",
            stacklevel=3,
        )


def check_edge_index(members: NpzMembers, key: str) -> int:
    """Return the number of edges of an array (2, edges) of integers; raises UserError if it is something else."""
    header = members.header(key)
    if len(header.shape) != 2 or header.shape[0] != 2:
        hint = "; transpose it" if len(header.shape) == 2 and header.shape[1] == 2 else ""
        raise UserError(
            f"{key} of {members.path} has shape {header.shape} but must be (2, edges): sources in row 0, destinations "
            f"in row 1{hint}"
        )
    if header.dtype.kind not in "iu" and header.shape[1]:
        raise UserError(
            f"{key} of {members.path} has dtype {header.dtype}; node numbers must be integers from 0: cast them first"
        )
    return header.shape[1]


def dense_features(members: NpzMembers, key: str, num_nodes: int, scratch: Path) -> RowBlocks | None:
    """Return a dense feature table (nodes, width) as row blocks; raises UserError if it is something else."""
    header = members.header(key)
    if len(header.shape) != 2 or header.dtype.kind not in "iufb":
        raise UserError(
            f"{key} of {members.path} has shape {header.shape} and dtype {header.dtype} but must be a table of numbers "
            f"(nodes, width); give {as_table('x', len(header.shape))}"
        )
    check_rows(header.shape[0], num_nodes, members.path)
    return RowBlocks(header.shape[1], members.rows(key, scratch)) if header.shape[1] else None


def check_rows(num_rows: int, num_nodes: int, path: Path) -> None:
    """Raise UserError if a feature table has not one row for each node."""
    if num_rows != num_nodes:
        raise UserError(
            f"the features of {path} have {num_rows} rows but the graph has {num_nodes} nodes; give one row for each "
            "node"
        )


def csr_features(indptr: Array, indices: Array, data: Array, shape: Any, *, path: Path) -> Any:
    """Return a checked scipy csr_matrix; raises UserError if the parts do not fit together.

    The check matters: scipy's compiled code trusts the indices and would read outside its arrays.
    """
    try:
        rows, columns = (int(size) for size in shape)
        for what, array in (("indptr", indptr), ("indices", indices)):
            if array.dtype.kind not in "iu":
                raise ValueError(f"{what} has dtype {array.dtype}")
        if data.dtype.kind not in "iufb":
            raise ValueError(f"data has dtype {data.dtype}")
        wide = np.int32 if max(columns, len(indices)) < 2**31 else np.int64
        matrix = scipy.sparse.csr_matrix(
            (data, indices.astype(wide, copy=False), indptr.astype(wide, copy=False)), shape=(rows, columns)
        )
        matrix.check_format(full_check=True)
    except (ValueError, TypeError, OverflowError) as error:
        raise _misfit(path, str(error)) from error
    return matrix


def _misfit(path: Path, reason: str) -> UserError:
    return UserError(
        f"the sparse features of {path} do not fit together ({reason}); give indptr [rows + 1], indices and data "
        "[entries] of compressed sparse rows"
    )


def _num_nodes(value: Array, path: Path) -> int:
    if value.size != 1 or value.dtype.kind not in "iu" or not 1 <= int(value.reshape(())) <= MAX_NODES:
        raise UserError(f"num_nodes of {path} is {value.tolist()}; it must be one whole number from 1 to {MAX_NODES}")
    return int(value.reshape(()))


def _weights(members: NpzMembers, num_edges: int) -> Iterator[Array]:
    """Yield the weights in blocks as long as those of the edges."""
    header = members.header("edge_weight")
    if header.shape not in ((num_edges,), (num_edges, 1)) or header.dtype.kind not in "iufb":
        raise UserError(
            f"edge_weight of {members.path} has shape {header.shape} and dtype {header.dtype} but must be one number "
            f"for each of the {num_edges} edges"
        )
    return members.values("edge_weight", members.pair_lengths("edge_index"))


def _features(members: NpzMembers, num_nodes: int, scratch: Path) -> RowBlocks | None:
    present = [key for key in _SPARSE_KEYS if key in members.names]
    if "x" in members.names:
        return dense_features(members, "x", num_nodes, scratch)
    if not present:
        return None
    missing = [key for key in _SPARSE_KEYS if key not in members.names]
    if missing:
        raise UserError(
            f"{members.path} has {', '.join(present)} but lacks {', '.join(missing)}; sparse features need all of "
            f"{', '.join(_SPARSE_KEYS)}, or give a dense x"
        )
    return _sparse_features(members, num_nodes)


def _sparse_features(members: NpzMembers, num_nodes: int) -> RowBlocks | None:
    shape, indptr = members.read("x_shape"), members.read("x_indptr")
    if shape.shape != (2,) or shape.dtype.kind not in "iu" or indptr.dtype.kind not in "iu":
        raise _misfit(members.path, f"x_shape is {shape.tolist()}, x_indptr has dtype {indptr.dtype}")
    num_rows, width = (int(size) for size in shape)
    lengths = [members.header(key).shape for key in ("x_indices", "x_data")]
    pointers = indptr.astype(np.int64)
    if (
        pointers.shape != (num_rows + 1,)
        or pointers[0] != 0
        or (np.diff(pointers) < 0).any()
        or any(length != (pointers[-1],) for length in lengths)
    ):
        raise _misfit(members.path, f"x_indptr {indptr.shape} with {lengths[0]} indices and {lengths[1]} data")
    check_rows(num_rows, num_nodes, members.path)
    check_width(width, str(members.path))
    return RowBlocks(width, _sparse_blocks(members, pointers, width)) if width else None


def _sparse_blocks(members: NpzMembers, pointers: Array, width: int) -> Iterator[Array]:
    rows = max(1, _BLOCK_VALUES // width)
    starts = range(0, len(pointers) - 1, rows)
    cuts = [pointers[start : start + rows + 1] for start in starts]
    lengths = [int(cut[-1] - cut[0]) for cut in cuts]
    parts = (members.values(key, iter(lengths)) for key in ("x_indices", "x_data"))
    for cut, indices, data in zip(cuts, *parts):
        yield csr_features(cut - cut[0], indices, data, (len(cut) - 1, width), path=members.path).toarray()
