"""GCN's coefficients in the whole graph for PyG's convolutions, which take those of the edges that they see."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dngd.errors import UserError
from dngd.models.graph_batch import LayerEdges

TAKES_COEFFICIENTS = ("GCNConv", "GCN2Conv", "APPNP", "TAGConv", "LGConv", "FAConv", "DNAConv")
"""PyG's convolutions that normalise by gcn_norm, and with normalize=False take what it returns as edge weights."""

REFUSED = {
    "SGConv": "APPNP or GCNConv, which take the whole graph's coefficients",
    "SSGConv": "APPNP or GCNConv, which take the whole graph's coefficients",
    "ARMAConv": "GCNConv or TAGConv, which take the whole graph's coefficients",
    "MixHopConv": "TAGConv, which takes the whole graph's coefficients",
    "ChebConv": "TAGConv, which takes the whole graph's coefficients",
    "PDNConv": "it with normalize=False",
    "EGConv": "it with aggregators other than symnorm",
    "LINKX": "a model without weights of single nodes",
}
"""Name -> what to use in place of what normalises by the degrees of all rows, and takes no others."""


class WholeGraphNorm:
    """A forward pre-hook of convolutions with normalize=False: replaces a batch's edges by those with self loops, and
    edge weights by GCN's coefficients in the whole graph.

    Outside of a batch it does what normalize=True does. Copies know of no batch.
    """

    def __init__(self) -> None:
        self._edges: LayerEdges | None = None
        self._is_inside = False
        self._made: dict[tuple[float, bool], tuple[Tensor, Tensor]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return WholeGraphNorm, ()

    @contextlib.contextmanager
    def of(self, edges: LayerEdges) -> Iterator[None]:
        """Normalise the edges of this batch; those of the last one stay known, for checkpointed activations."""
        self._edges, self._is_inside = edges, True
        self._made.clear()
        try:
            yield
        finally:
            self._is_inside = False

    def __call__(self, conv: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        places = places_of(conv)
        given = {name: args[place] for name, place in places.items() if place < len(args)} | kwargs
        edge_index, edge_weight = given["edge_index"], given.get("edge_weight")
        num_rows = given["x"].size(conv.node_dim)
        may_be = self._is_inside or bool(getattr(edge_index, "numel", lambda: 1)())  # no edges are the first of any
        is_known = is_weighted = False
        if may_be and self._edges is not None and _is_of(self._edges.edge_index, edge_index, 1):
            is_weighted = edge_weight is not None and _is_of(self._edges.edge_weight, edge_weight, 0)
            is_known = edge_weight is None or is_weighted or _are_ones(edge_weight, edge_index.shape[1])
        made: tuple[Any, Tensor | None]
        if is_known:
            loops = _self_weight(conv, edge_weight is not None)
            made = self._coefficients(edge_index, num_rows, loops, weighted=is_weighted)
        elif self._is_inside:
            raise UserError(
                f"{type(conv).__name__} got other edges or edge weights than the batch's, of whose degrees in the "
                "whole graph nothing is known; pass edge_index and edge_weight on as they are (in place of dropping "
                "edges: fanout draws some), or make it with normalize=False"
            )
        else:
            made = _as_pyg_does(conv, given["x"], edge_index, edge_weight)
        new = list(args)
        for name, value in zip(("edge_index", "edge_weight"), made):
            if places[name] < len(new):
                new[places[name]] = value
            else:
                kwargs = kwargs | {name: value}
        return tuple(new), kwargs

    def _coefficients(
        self, edge_index: Tensor, num_rows: int, loops: float, *, weighted: bool
    ) -> tuple[Tensor, Tensor]:
        """Return edges and coefficients. edge_index: the batch's, or the first ones of them; num_rows: of x. loops: the
        self loops' weight. weighted: by the batch's edge weights."""
        edges = self._edges
        assert edges is not None
        if (loops, weighted) not in self._made:
            self._made[loops, weighted] = edges.gcn_coefficients(loops, weighted=weighted)
        coefficients, selves = self._made[loops, weighted]
        num_loops = min(edges.num_dst, num_rows) if loops else 0
        # Rows whose in-edges are not there see themselves, unchanged; zeros would make a BatchNorm's means another.
        outer = torch.arange(min(edges.num_dst, num_rows), num_rows, device=edge_index.device)
        own = torch.cat([torch.arange(num_loops, device=edge_index.device), outer])
        values = [coefficients[: edge_index.shape[1]], selves[:num_loops], selves.new_ones(outer.numel())]
        return torch.cat([edge_index, own.expand(2, -1)], dim=1), torch.cat(values)


def _is_of(whole: Tensor | None, part: Any, dim: int) -> bool:
    """Whether a tensor is another one, a copy of it, or the beginning of it along a dimension."""
    if _begins(whole, part, dim):
        return True
    if whole is None or not isinstance(part, Tensor) or part.layout != torch.strided:
        return False
    return whole.dtype == part.dtype and whole.device == part.device and torch.equal(whole, part)


def _are_ones(weight: Any, count: int) -> bool:
    return isinstance(weight, Tensor) and weight.shape == (count,) and bool((weight == 1).all())


def _begins(whole: Tensor | None, part: Any, dim: int) -> bool:
    """Whether a tensor is another one, or the beginning of it along a dimension: the same memory."""
    if whole is None or not isinstance(part, Tensor) or part.layout != torch.strided or part.dim() != whole.dim():
        return False
    same_rest = [n for i, n in enumerate(part.shape) if i != dim] == [n for i, n in enumerate(whole.shape) if i != dim]
    if not same_rest or part.shape[dim] > whole.shape[dim] or part.dtype != whole.dtype:
        return False
    return part.numel() == 0 or (part.data_ptr() == whole.data_ptr() and part.stride() == whole.stride())


def _as_pyg_does(conv: Any, x: Tensor, edge_index: Any, edge_weight: Tensor | None) -> tuple[Any, Tensor | None]:
    """Return the edges and coefficients that a convolution with normalize=True makes of what it gets."""
    from torch_geometric.nn.conv.gcn_conv import gcn_norm

    loops = bool(getattr(conv, "add_self_loops", False))
    improved = bool(getattr(conv, "improved", False))
    made = gcn_norm(edge_index, edge_weight, x.size(conv.node_dim), improved, loops, conv.flow, x.dtype)
    return made if isinstance(made, tuple) else (made, None)


def _self_weight(conv: Any, weighted: bool) -> float:
    """Return the weight of the self loops that a convolution adds, 0 for none."""
    if not getattr(conv, "add_self_loops", False):
        return 0.0
    # gcn_norm gives loops the weight 2 of improved=True beside other weights alone; without any, all are 1.
    return 2.0 if getattr(conv, "improved", False) and weighted else 1.0


def check_sampled(module: nn.Module, shown: str, where: str = "") -> None:
    """Raise UserError for a convolution that cannot be right on sampled in-neighbours. shown: its name in the sentence.
    where: what the convolutions that may take its place are to be in."""
    conv: Any = module
    if getattr(conv, "flow", "source_to_target") != "source_to_target" and pyg_name(module, "MessagePassing"):
        raise UserError(
            f"{shown} has flow={conv.flow}, and neighbours are sampled along in-edges; make it with "
            "flow='source_to_target'"
        )
    kind = pyg_name(module, *REFUSED)
    if kind is not None and always_normalises(conv, kind):
        raise UserError(
            f"{shown} normalises by degrees of the whole graph, which a sample does not have, or has weights of "
            f"single nodes; use {REFUSED[kind]}{where}, or write forward(batch: dngd.GraphBatch)"
        )


def always_normalises(conv: Any, kind: str) -> bool:
    """Return whether a convolution of REFUSED normalises as it was made."""
    if kind == "PDNConv":
        return bool(conv.normalize)
    return kind != "EGConv" or "symnorm" in conv.aggregators


def pyg_name(module: nn.Module, *names: str) -> str | None:
    """Return the first of the names that is a module's class in PyG, or one that it is derived from."""
    for cls in type(module).__mro__:
        if cls.__module__.startswith("torch_geometric.") and cls.__name__ in names:
            return cls.__name__
    return None


def places_of(module: nn.Module) -> dict[str, int]:
    """Return where a module's forward takes its arguments, by name."""
    return {name: place for place, name in enumerate(inspect.signature(module.forward).parameters)}
