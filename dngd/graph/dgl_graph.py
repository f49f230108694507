"""Importing a DGL graph. It is used through its own methods: nothing here imports dgl.

Read are its edges, the node data `feat` (or `features`, `x`, `h`), `label` (or `labels`, `y`), `train_mask`,
`val_mask`, `test_mask`, and the edge data `weight` (or `edge_weight`, `w`); node data `_ID` become the nodes' ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from dngd.errors import UserError
from dngd.graph.arrays import GraphArrays, import_arrays, masks_of
from dngd.graph.import_options import ImportOptions, recorded
from dngd.graph.manifest import Provenance
from dngd.graph.store import GraphStore

_FEATURES = ("feat", "features", "x", "h")
_LABELS = ("label", "labels", "y")
_WEIGHTS = ("weight", "edge_weight", "w")


def import_dgl(
    graph: Any,
    out: str | Path,
    *,
    source: str = "DGLGraph",
    source_sha256: str | None = None,
    **options: Unpack[ImportOptions],
) -> GraphStore:
    """Convert a homogeneous DGLGraph into a store at `out`.

    source, source_sha256: what the store's provenance says. options: see `ImportOptions`; name: default `dgl`.
    Raises UserError if it is no DGLGraph, has several types of nodes or edges, or makes no graph.
    """
    what = f"the graph of {source}"
    if not all(hasattr(graph, name) for name in ("edges", "ndata", "edata", "num_nodes")):
        raise UserError(f"{what} is a {type(graph).__name__}; give a DGLGraph")
    if len(graph.ntypes) != 1 or len(graph.canonical_etypes) != 1:
        raise UserError(
            f"{what} has {len(graph.ntypes)} types of nodes and {len(graph.canonical_etypes)} of edges, which dngd "
            "does not train on yet; give one type's graph, say dgl.to_homogeneous(graph)"
        )
    begin, end = graph.edges(order="eid")
    nodes: Mapping[str, Tensor] = graph.ndata
    arrays = GraphArrays(
        num_nodes=int(graph.num_nodes()),
        source=begin,
        destination=end,
        features=_table(_first(nodes, _FEATURES)),
        labels=_first(nodes, _LABELS),
        edge_weight=_first(graph.edata, _WEIGHTS),
        masks=masks_of(nodes),
        node_ids=_first(nodes, ("_ID",)),
    )
    settings = ImportOptions(**{**options, "name": options.get("name") or "dgl"})
    provenance = Provenance(source=source, source_sha256=source_sha256, options=recorded("dgl", options))
    return import_arrays(arrays, what, out, provenance, settings)


def _first(data: Mapping[str, Tensor], names: tuple[str, ...]) -> Tensor | None:
    return next((data[name] for name in names if name in data), None)


def _table(features: Tensor | None) -> Tensor | None:
    return features[:, None] if features is not None and features.dim() == 1 else features
