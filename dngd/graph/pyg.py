"""Importing a graph of PyTorch Geometric: a `Data` object, a dataset of one graph, or a file that PyG saved.

Read are `edge_index`, `x`, `y`, `train_mask`, `val_mask`, `test_mask` ([N] or [N, splits]), `edge_weight`, and `n_id`
(node ids) where it is there; `edge_attr` is not. Files are read with `weights_only=True` and nothing beyond PyG's own
data classes, so that a file cannot run code.
"""

from __future__ import annotations

import operator
import pickle
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Unpack

from dngd.errors import UserError
from dngd.graph.arrays import GraphArrays, import_arrays, masks_of
from dngd.graph.arrow_files import file_sha256
from dngd.graph.canonical import as_array
from dngd.graph.import_options import ImportOptions, recorded
from dngd.graph.manifest import Provenance
from dngd.graph.store import GraphStore
from dngd.paths import printable

# What a pickled Data or HeteroData names of PyG's, as far as the installed PyG has it.
_DATA_CLASSES = (
    "Data",
    "HeteroData",
    "DataEdgeAttr",
    "DataTensorAttr",
    "AttrType",
    "BaseStorage",
    "EdgeStorage",
    "GlobalStorage",
    "NodeStorage",
    "TensorAttr",
    "EdgeAttr",
    "EdgeLayout",
)
_ZIP = b"PK\x03\x04"
_TOO_OLD = (AttributeError, ImportError)


def import_pyg(source: Any, out: str | Path, **options: Unpack[ImportOptions]) -> GraphStore:
    """Convert a PyG graph into a store at `out`.

    source: a `torch_geometric.data.Data`, a dataset with one graph, or the path of a `.pt` file of one of them
        (`torch.save(data)`, or a dataset's processed/data.pt). options: see `ImportOptions`; name: default the file's
        name, or `pyg`.
    Raises UserError if it is no single homogeneous graph, or the file holds anything but PyG's data.
    """
    what, sha256 = "the graph", None
    name = "pyg"
    if isinstance(source, str | Path):
        path = Path(source)
        data = _load(path)
        what, name, sha256 = str(path), printable(path.stem), file_sha256(path)
    else:
        data = source
    values = _mapping(data, what)
    if values.get("edge_attr") is not None:
        one_each = getattr(values["edge_attr"], "shape", (0, 2))[1:] in ((), (1,))
        fix = "; if it is a weight for each edge, give it as edge_weight" if one_each else ""
        warnings.warn(f"edge_attr of {what} is left out: models here use no edge features{fix}", stacklevel=2)
    settings = ImportOptions(**{**options, "name": options.get("name") or name})
    provenance = Provenance(
        source=Path(source).name if sha256 else type(source).__name__,
        source_sha256=sha256,
        options=recorded("pyg", options),
    )
    return import_arrays(_arrays(values, what), what, out, provenance, settings)


def arrays_of(data: Any, what: str) -> GraphArrays:
    """Return what a `Data` object holds, as it is. Raises UserError if it is no single homogeneous graph."""
    return _arrays(_mapping(data, what), what)


def _load(path: Path) -> Any:
    if not path.is_file():
        raise UserError(
            f"{path} is not a file; give the .pt file of a PyG graph, such as a dataset's processed/data.pt"
        )
    with path.open("rb") as file:
        begin = file.read(len(_ZIP))
    if begin != _ZIP and not begin.startswith(pickle.PROTO):
        raise UserError(f"{path} is no .pt file of PyG, or is damaged (it begins otherwise); save it again")
    try:
        with _only_data_classes():
            return torch.load(path, map_location="cpu", weights_only=True, mmap=begin == _ZIP)
    except _TOO_OLD as error:
        raise UserError(
            f"{path} cannot be read safely with torch {torch.__version__} and this PyG ({error}); upgrade both, or "
            "give the Data object to dngd.graph.import_pyg"
        ) from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than PyG's own data classes and tensors, and is not loaded because it could run code "
            f"({_first_line(error)}); load it yourself if you trust it, and give the Data object to "
            "dngd.graph.import_pyg"
        ) from error
    except MemoryError:
        raise
    # A damaged pickle can raise nearly anything.
    except Exception as error:
        raise UserError(f"{path} is no .pt file of PyG, or is damaged ({_first_line(error)}); save it again") from error


@contextmanager
def _only_data_classes() -> Iterator[None]:
    """Let torch's restricted unpickler know PyG's data classes and nothing else; process-wide, while it lasts."""
    import torch_geometric.data as home
    from torch_geometric.data import data, storage

    allowed: list[Any] = [
        getattr(part, name) for name in _DATA_CLASSES for part in (home, data, storage) if hasattr(part, name)
    ]
    # Storages remember which attributes are a node's in a defaultdict, which the unpickler makes but cannot fill.
    allowed.append((_plain_dictionary, "collections.defaultdict"))
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(allowed)
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _plain_dictionary(factory: Any = None) -> dict[Any, Any]:
    return {}


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "global" in line]
    called = re.search(r"GLOBAL ([\w.]+\.\w+)", " ".join(lines))
    if called:
        return f"it calls for {called.group(1)}"
    return (lines or str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _mapping(data: Any, what: str, *, is_inner: bool = False) -> dict[str, Any]:
    """Return a graph's attributes by name, of the forms that PyG has for it.

    is_inner: data is what a list or a file of a dataset holds, and so none of these itself.
    """
    if isinstance(data, str | bytes) or (is_inner and isinstance(data, list | tuple)):
        raise UserError(_foreign(data, what))
    if isinstance(data, tuple) and data:
        return _of_saved_dataset(data, what)
    if isinstance(data, dict):
        return _of_one_type(data, what)
    if any(base.__name__ == "HeteroData" for base in type(data).__mro__):
        raise UserError(_heterogeneous(what))
    if isinstance(data, list) or (
        not isinstance(data, Tensor)
        and not hasattr(data, "edge_index")
        and hasattr(data, "__len__")
        and hasattr(data, "__getitem__")
    ):
        # A dataset, or a list of graphs.
        if len(data) != 1:
            raise UserError(f"{what} holds {len(data)} graphs; give one, say dataset[0]")
        return _mapping(data[0], what, is_inner=True)
    to_dict = getattr(data, "to_dict", None)
    if to_dict is None:
        raise UserError(_foreign(data, what))
    values: dict[str, Any] = to_dict()
    if values.get("num_nodes") is None and values.get("x") is None and values.get("edge_index") is not None:
        # Without an array of one row a node PyG counts what edges name, and warns: see _num_nodes.
        with suppress(IndexError, UserWarning), warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            values["num_nodes"] = data.num_nodes
    return values


def _foreign(data: Any, what: str) -> str:
    return f"{what} is a {type(data).__name__}, not a PyG graph; give a torch_geometric.data.Data"


def _of_saved_dataset(data: tuple[Any, ...], what: str) -> dict[str, Any]:
    """Return the graph of an InMemoryDataset's file: (data, slices), or (data's dictionary, slices, its class)."""
    values = _mapping(data[0], what, is_inner=True)
    slices = data[1] if len(data) > 1 else None
    if isinstance(slices, dict):
        counts = {len(cut) - 1 for cut in slices.values() if hasattr(cut, "__len__") and getattr(cut, "ndim", 1) != 0}
        if counts - {1}:
            raise UserError(f"{what} holds {max(counts)} graphs; give one, say torch.save(dataset[0], FILE)")
    return values


def _of_one_type(values: dict[Any, Any], what: str) -> dict[str, Any]:
    """Return a graph's attributes. Raises UserError for those of a HeteroData: a mapping for each type of nodes, and of
    edges under (source, relation, target)."""
    has_types = "edge_index" not in values and any(isinstance(value, dict) for value in values.values())
    if has_types or any(isinstance(key, tuple) for key in values):
        raise UserError(_heterogeneous(what))
    return values


def _heterogeneous(what: str) -> str:
    return (
        f"{what} has several types of nodes or edges, which dngd does not train on yet; give one type's graph, say "
        "data.to_homogeneous()"
    )


def _arrays(values: dict[str, Any], what: str) -> GraphArrays:
    if values.get("edge_index") is None:
        fix = "convert its adj_t by torch_geometric.utils" if values.get("adj_t") is not None else "give it one"
        raise UserError(f"{what} has no edge_index (it has: {', '.join(map(str, values)) or 'nothing'}); {fix}")
    edges = values["edge_index"]
    edges = edges.as_tensor() if hasattr(edges, "as_tensor") else edges  # PyG's EdgeIndex has no memory of its own
    if not isinstance(edges, Tensor) or edges.dim() != 2 or edges.shape[0] != 2:
        raise UserError(f"edge_index of {what} must be a tensor of shape [2, edges], sources in row 0")
    for key in ("x", "y", "edge_weight", "n_id"):
        if values.get(key) is not None and not isinstance(values[key], Tensor):
            raise UserError(f"{key} of {what} is a {type(values[key]).__name__}, not a tensor; convert it")
    if values.get("x") is not None and values["x"].dim() == 0:
        raise UserError(f"x of {what} is a single number; give a table of numbers [nodes, width]")
    masks = {part: _mask(mask, f"the {part} mask of {what}") for part, mask in masks_of(values).items()}
    return GraphArrays(
        num_nodes=_num_nodes(values, edges, masks, what),
        source=edges[0],
        destination=edges[1],
        features=_table(values.get("x")),
        labels=values.get("y"),
        edge_weight=values.get("edge_weight"),
        masks=masks,
        node_ids=values.get("n_id"),
    )


def _num_nodes(values: dict[str, Any], edges: Tensor, masks: dict[str, Tensor], what: str) -> int:
    """Return the number of nodes: rows of x, else what the graph says, else of y, n_id and the masks, else what edges
    name: isolated last nodes are in none of these."""
    if values.get("x") is not None:
        return int(values["x"].shape[0])
    said = values.get("num_nodes")
    if said is not None:
        try:
            return operator.index(said)
        except TypeError:
            raise UserError(f"num_nodes of {what} is {said!r}; give one whole number above 0") from None
    rows = {key: values[key] for key in ("y", "n_id") if values.get(key) is not None}
    rows |= {f"{part}_mask": mask for part, mask in masks.items()}
    # A mask of several splits has them as columns, or as rows.
    counts = {key: value.shape[: 2 if key.endswith("mask") else 1] for key, value in rows.items() if value.dim()}
    least = int(edges.max()) + 1 if edges.layout == torch.strided and edges.numel() else 0
    if not counts:
        if not least:
            raise UserError(f"{what} has no edges, and nothing that tells its nodes; give it num_nodes")
        return least
    for count in next(iter(counts.values())):
        if count >= least and all(count in other for other in counts.values()):
            return int(count)
    told = ", ".join(f"{key} {' x '.join(map(str, sizes))}" for key, sizes in counts.items())
    named = f" and edge_index names node {least - 1}" if least else ""
    raise UserError(
        f"{what} does not tell how many nodes it has: {told} entries{named}; set data.num_nodes = N, with N entries in "
        "each"
    )


def _mask(mask: Any, what: str) -> Tensor:
    """Return a mask that is a tensor, a numpy array or a list."""
    if isinstance(mask, Tensor):
        return mask
    values = as_array(mask, what)
    kinds = {"b": np.bool_, "i": np.int64, "u": np.int64, "f": np.float64}
    if values.dtype.kind not in kinds:
        raise UserError(f"{what} is a {type(mask).__name__} of {values.dtype}; give a true or false for each node")
    return torch.from_numpy(np.ascontiguousarray(values, dtype=kinds[values.dtype.kind]))


def _table(features: Tensor | None) -> Tensor | None:
    return features[:, None] if features is not None and features.dim() == 1 else features
