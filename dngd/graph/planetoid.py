"""Importing the original Planetoid files: Cora, CiteSeer, PubMed.

The originals are Python 2 pickles. A pickle can run any code, so these are read by an unpickler that
knows seven names and builds plain arrays, one sparse container that does nothing, and lists.
Source of the format: Yang, Cohen, Salakhutdinov 2016; the node order is torch_geometric's.
"""

from __future__ import annotations

import collections
import hashlib
import pickle
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse
from typing_extensions import Unpack

from dngd.errors import UserError
from dngd.graph.canonical import as_array
from dngd.graph.import_options import ImportOptions, check_options, recorded
from dngd.graph.manifest import Provenance
from dngd.graph.npz import csr_features
from dngd.graph.store import GraphStore
from dngd.paths import expanded

PARTS = ("x", "tx", "allx", "y", "ty", "ally", "graph", "test.index")
_NUM_VALIDATION = 500
_KNOWN_NAMES = ("citeseer", "cora", "pubmed")


_ARRAY_CLASS = "numpy.ndarray"


class _Callable:
    """A function that a pickle may call but not change: it has no attributes to set, unlike a function."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)


class _SparseState:
    """Stands in for scipy's csr_matrix while unpickling: keeps the state, runs nothing."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise pickle.UnpicklingError("a sparse matrix has no state of named parts")
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Loads numpy arrays, csr matrices and dictionaries of lists; every other name is refused."""

    def __init__(self, file: Any, path: Path) -> None:
        super().__init__(file, encoding="latin1")
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _Callable(_reconstruct_array)
        if module == "numpy" and name in ("ndarray", "dtype"):
            # The class itself is only ever an argument of _reconstruct: a word in its place cannot be called.
            return _ARRAY_CLASS if name == "ndarray" else np.dtype
        if module == "_codecs" and name == "encode":
            # How Python 3 writes bytes into a protocol-2 pickle: files that someone saved again.
            return _Callable(_latin1_bytes)
        if module in ("scipy.sparse.csr", "scipy.sparse._csr") and name == "csr_matrix":
            return _SparseState
        if module == "collections" and name == "defaultdict":
            return _Callable(_list_dictionary)
        if module in ("__builtin__", "builtins") and name == "list":
            return list
        raise UserError(
            f"{self._path} calls for {module}.{name}, which no Planetoid file needs, so that it was not "
            "run; fetch the file again from its source"
        )


def _reconstruct_array(kind: Any, shape: Any, dtype: Any) -> npt.NDArray[Any]:
    if kind is not _ARRAY_CLASS or shape not in ((0,), [0]):
        raise pickle.UnpicklingError("an array is not built as numpy builds one")
    return np.ndarray((0,), dtype=np.dtype(dtype))


def _latin1_bytes(text: Any, encoding: Any) -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("bytes are not written as Python 3 writes them")
    return text.encode("latin1")


def _list_dictionary(factory: Any = None) -> dict[Any, Any]:
    if factory not in (None, list):
        raise pickle.UnpicklingError("a defaultdict makes something other than lists")
    return collections.defaultdict(list)


def import_planetoid(folder: str | Path, out: str | Path, **options: Unpack[ImportOptions]) -> GraphStore:
    """Convert `ind.NAME.{x,tx,allx,y,ty,ally,graph,test.index}` into a store at `out`.

    folder: the one that holds the files, or that has them in `raw/`. options: see `ImportOptions`; name: by default
    the NAME in the files' names.
    Features, topology, labels and the public masks are those that torch_geometric makes of the files (and
    dngd of the matching `.npz`): test nodes in their own order, isolated CiteSeer nodes that no file lists
    with zero features and label 0, and in no mask.
    Raises UserError if files are missing, damaged, do not fit together, or hold more than data.
    """
    raw, prefix = find_planetoid(expanded(folder))
    check_options(out, options, weighted=False)
    paths = {part: raw / f"ind.{prefix}.{part}" for part in PARTS}
    missing = [path.name for path in paths.values() if not path.is_file()]
    if missing:
        raise UserError(
            f"{raw} lacks {', '.join(missing)}; a Planetoid folder has ind.{prefix}.* for each of {', '.join(PARTS)}"
        )
    tables = {part: _matrix(paths[part]) for part in ("tx", "allx", "y", "ty", "ally")}
    adjacency = _load(paths["graph"])
    test_index = _test_index(paths["test.index"])
    num_nodes = int(test_index.max()) + 1
    order = _row_of_node(num_nodes, len(test_index), tables["allx"].shape[0], test_index, raw)
    if not isinstance(adjacency, dict) or len(adjacency) != num_nodes:
        raise UserError(f"{paths['graph']} does not list the neighbours of {num_nodes} nodes; fetch it again")
    one_hot = np.concatenate([_dense(tables["ally"]), _dense(tables["ty"]), np.zeros_like(_dense(tables["ty"])[:1])])
    features = scipy.sparse.vstack([tables["allx"], tables["tx"]], format="csr")
    features.resize(features.shape[0] + 1, features.shape[1])
    if not len(one_hot) == features.shape[0]:
        raise UserError(f"the features and labels of {raw} differ in length; fetch the files again")
    masks = {part: np.zeros(num_nodes, dtype=np.bool_) for part in ("train", "val", "test")}
    num_train = tables["y"].shape[0]
    masks["train"][:num_train] = True
    masks["val"][num_train : num_train + _NUM_VALIDATION] = True
    masks["test"][test_index] = True
    settings = ImportOptions(**{**options, "name": options.get("name") or prefix})
    return GraphStore.write(
        out,
        features=features[order],
        labels=one_hot[order].argmax(axis=1),
        num_classes=one_hot.shape[1],
        edge_index=_edge_index(adjacency, paths["graph"]),
        masks=masks,
        provenance=Provenance(
            source=f"ind.{prefix}.*",
            source_sha256=planetoid_sha256(raw, prefix),
            options=recorded("planetoid", options),
        ),
        **settings,
    )


def find_planetoid(folder: Path) -> tuple[Path, str]:
    """Return (folder with the files, NAME as the files spell it); UserError if there is not exactly one."""
    for raw in (folder, folder / "raw"):
        found = sorted(path.name[len("ind.") : -len(".graph")] for path in raw.glob("ind.*.graph"))
        if len(found) == 1:
            return raw, found[0]
        if found:
            raise UserError(f"{raw} holds {len(found)} Planetoid graphs ({', '.join(found)}); give a folder of one")
    raise UserError(
        f"{folder} holds no Planetoid files (ind.NAME.graph and its siblings, NAME such as "
        f"{', '.join(_KNOWN_NAMES)}), nor does its raw/; give the folder that has them"
    )


def planetoid_sha256(raw: Path, prefix: str) -> str:
    """Return one sha256 over the files' names and contents."""
    digest = hashlib.sha256()
    for part in PARTS:
        content = (raw / f"ind.{prefix}.{part}").read_bytes()
        digest.update(f"{part}:{len(content)}:".encode())
        digest.update(content)
    return digest.hexdigest()


def _load(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            return _Unpickler(file, path).load()
    except UserError:
        raise
    # A damaged pickle can raise nearly anything from the pickle machine or numpy's __setstate__.
    except Exception as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); fetch it again") from error


def _matrix(path: Path) -> Any:
    """Return a two-dimensional numeric array or a checked csr_matrix."""
    value = _load(path)
    if isinstance(value, _SparseState):
        state = value.state
        try:
            indptr, indices, data = (np.asarray(state[key]) for key in ("indptr", "indices", "data"))
            return csr_features(indptr, indices, data, state.get("_shape", state.get("shape")), path=path)
        except KeyError as error:
            raise UserError(f"{path} holds a sparse matrix without {error}; fetch it again") from error
    if not isinstance(value, np.ndarray) or value.ndim != 2 or value.dtype.kind not in "iufb":
        raise UserError(f"{path} holds no table of numbers; fetch it again")
    return value


def _dense(table: Any) -> npt.NDArray[Any]:
    return table.toarray() if scipy.sparse.issparse(table) else as_array(table, "labels")


def _test_index(path: Path) -> npt.NDArray[np.int64]:
    try:
        values = np.array([int(line) for line in path.read_text().split()], dtype=np.int64)
    except ValueError as error:
        raise UserError(f"{path} holds something other than node numbers ({error}); fetch it again") from error
    if len(values) == 0 or values.min() < 0 or len(np.unique(values)) != len(values):
        raise UserError(f"{path} is empty or names a node twice; fetch it again")
    return values


def _row_of_node(
    num_nodes: int, num_test: int, num_other: int, test_index: npt.NDArray[np.int64], raw: Path
) -> npt.NDArray[np.int64]:
    """Return for each node its row in [allx; tx; one zero row]: test node test_index[k] is row k of tx."""
    if int(test_index.min()) != num_other:
        raise UserError(
            f"the test nodes of {raw} start at {int(test_index.min())} but allx has {num_other} rows; "
            "fetch the files again"
        )
    order = np.full(num_nodes, num_other + num_test, dtype=np.int64)
    order[:num_other] = np.arange(num_other)
    order[test_index] = num_other + np.arange(num_test)
    return order


def _edge_index(adjacency: dict[Any, Iterable[Any]], path: Path) -> npt.NDArray[np.int64]:
    try:
        lists = {int(node): list(neighbours) for node, neighbours in adjacency.items()}
        lengths = [len(neighbours) for neighbours in lists.values()]
        row = np.repeat(np.fromiter(lists, dtype=np.int64, count=len(lists)), lengths)
        column = np.fromiter(chain.from_iterable(lists.values()), dtype=np.int64, count=sum(lengths))
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path} is not a dictionary of lists of node numbers ({error}); fetch it again") from error
    return np.stack([row, column])
