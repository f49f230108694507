"""Importing a graph from one `.npz` file of plain arrays.

Keys: `edge_index` (2, E) and `num_nodes`; features as `x` (N, F) or as compressed sparse rows
`x_indptr, x_indices, x_data, x_shape`, or none; `y` (N,), -1 unlabelled; `train_mask`, `val_mask`,
`test_mask`, (N,) or (splits, N). Other keys are ignored. Pickled arrays are never loaded.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse

from dngd.errors import UserError
from dngd.graph.arrow_files import file_sha256
from dngd.graph.canonical import Duplicates, SelfLoops
from dngd.graph.manifest import Provenance
from dngd.graph.store import GraphStore
from dngd.graph.writer import Progress

_SPARSE_KEYS = ("x_indptr", "x_indices", "x_data", "x_shape")
_READ_ERRORS = (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, NotImplementedError)


def import_npz(
    path: str | Path,
    out: str | Path,
    *,
    name: str | None = None,
    overwrite: bool = False,
    self_loops: SelfLoops = "drop",
    duplicates: Duplicates = "drop",
    progress: Progress | None = None,
) -> GraphStore:
    """Convert the `.npz` at `path` into a store at `out`. Sparse features become dense in row blocks.

    name: default the file's name without `.npz`.
    Raises UserError if the file is missing, truncated, lacks keys, holds pickled arrays, or makes no graph.
    """
    source = Path(path)
    arrays = read_npz(source)
    num_nodes = _num_nodes(arrays["num_nodes"], source)
    return GraphStore.write(
        out,
        name=name or source.stem,
        num_nodes=num_nodes,
        edge_index=arrays["edge_index"],
        features=_features(arrays, source),
        labels=arrays.get("y"),
        masks={part: arrays[f"{part}_mask"] for part in ("train", "val", "test") if f"{part}_mask" in arrays},
        self_loops=self_loops,
        duplicates=duplicates,
        overwrite=overwrite,
        progress=progress,
        provenance=Provenance(
            source=source.name,
            source_sha256=file_sha256(source),
            options={"format": "npz", "self_loops": self_loops, "duplicates": duplicates},
        ),
    )


def read_npz(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Return the known arrays of the file, all read; raises UserError if they cannot be."""
    known = ("edge_index", "num_nodes", "x", *_SPARSE_KEYS, "y", "train_mask", "val_mask", "test_mask")
    if not path.is_file():
        raise UserError(f"{path} is not a file; give the path of an .npz file")
    key = ""
    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise UserError(f"{path} holds a single array; save the graph's arrays by numpy.savez")
        with loaded as file:
            missing = [key for key in ("edge_index", "num_nodes") if key not in file.files]
            if missing:
                raise UserError(
                    f"{path} lacks {' and '.join(missing)} (it has: {', '.join(file.files) or 'nothing'}); "
                    "add them: edge_index of shape (2, edges) and num_nodes"
                )
            result = {}
            for key in (k for k in known if k in file.files):
                result[key] = file[key]
            return result
    except UserError:
        raise
    except _READ_ERRORS as error:
        if "allow_pickle" in str(error):
            if not key:
                raise UserError(f"{path} is no npz file; save the graph's arrays by numpy.savez") from error
            what = f"array {key!r} of {path} is"
            raise UserError(
                f"{what} pickled, which is never loaded because it could run code; save it as plain numbers "
                "(not dtype object) by numpy.savez"
            ) from error
        what = f"array {key!r} of {path}" if key else str(path)
        raise UserError(f"{what} cannot be read ({error}); the file is truncated or damaged: fetch it again") from error


def _num_nodes(value: npt.NDArray[Any], path: Path) -> int:
    if value.size != 1 or value.dtype.kind not in "iu" or int(value.reshape(())) < 1:
        raise UserError(f"num_nodes of {path} is {value.tolist()}; it must be one whole number above 0")
    return int(value.reshape(()))


def _features(arrays: dict[str, npt.NDArray[Any]], path: Path) -> Any:
    present = [key for key in _SPARSE_KEYS if key in arrays]
    if "x" in arrays:
        return arrays["x"]
    if not present:
        return None
    missing = [key for key in _SPARSE_KEYS if key not in arrays]
    if missing:
        raise UserError(
            f"{path} has {', '.join(present)} but lacks {', '.join(missing)}; sparse features need all of "
            f"{', '.join(_SPARSE_KEYS)}, or give a dense x"
        )
    return csr_features(*(arrays[key] for key in _SPARSE_KEYS), path=path)


def csr_features(
    indptr: npt.NDArray[Any], indices: npt.NDArray[Any], data: npt.NDArray[Any], shape: Any, *, path: Path
) -> Any:
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
        raise UserError(
            f"the sparse features of {path} do not fit together ({error}); give indptr [rows + 1], indices "
            "and data [entries] of compressed sparse rows"
        ) from error
    return matrix
