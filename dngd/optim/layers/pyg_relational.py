"""PyG's RGCNConv and FastRGCNConv: a weight a relation, one layer.

`Z = Σ_r M_r W_r + X root + b`, with W_r [d_in, d_out] and M_r the aggregate of X over the edges of relation r: rows
`[M_1 | ... | M_R | X (| 1)]`, A block-diagonal with a block a relation and one of root and bias. With bases,
`W_r = Σ_b comp_rb V_b`, the weights are V and rows `N_b = Σ_r comp_rb M_r`; comp keeps the plain gradient.

Not handled, and left to the plain gradient: num_blocks; an aggregation other than sum and mean; a call
without float features, where the weight is a table of embeddings (said once, in a warning).
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from dngd.curvature import FactorLayout
from dngd.optim.capture import Capture
from dngd.optim.layers.adapter import Adapted, argument, class_path, trainable
from dngd.optim.layers.base import CurvatureLayer, InertHook
from dngd.optim.layers.bias import BiasLayer
from dngd.optim.layers.columns import join_columns, split_columns
from dngd.optim.layers.pyg import LINEAR_AGGREGATIONS

PATHS = {
    "torch_geometric.nn.conv.rgcn_conv.RGCNConv",
    "torch_geometric.nn.conv.rgcn_conv.FastRGCNConv",
}


def adapt_relational(name: str, module: nn.Module, capture: Capture, layout: FactorLayout) -> Adapted | None:
    """RGCNConv and FastRGCNConv; their bias alone where the rest cannot be handled."""
    if class_path(module) not in PATHS:
        return None
    conv: Any = module
    if conv.num_blocks is None and conv.aggr in LINEAR_AGGREGATIONS and trainable(name, conv, "weight") is not None:
        return Adapted([RelationalLayer(name, conv, capture, layout)])
    bias = trainable(name, conv, "bias")
    return None if bias is None else Adapted([BiasLayer(f"{name}.bias".lstrip("."), conv, bias, capture, layout)])


class RelationalCall(NamedTuple):
    """One call: node rows, edges, their relations, and what it is recognised by. References, not copies.

    one_mean: whether a mean was taken over the edges of all relations at once, as RGCNConv does on pyg-lib.
    """

    x_source: Tensor
    x_target: Tensor
    edge_index: Any
    edge_type: Tensor | None
    one_mean: bool
    sources: tuple[Any, ...]


class RelationalLayer(CurvatureLayer):
    """`Z = Σ_r M_r W_r + X root + b`; gradient [d_out, R·d_in (+ d_in) (+ 1)] of weight, root and bias."""

    kind: ClassVar[str] = "RGCNConv"

    def __init__(self, name: str, conv: Any, capture: Capture, layout: FactorLayout) -> None:
        self.conv = conv
        self.weight: nn.Parameter = conv.weight
        root, bias = trainable(name, conv, "root"), trainable(name, conv, "bias")
        self.has_root = root is not None
        num_blocks, d_in, d_out = self.weight.shape
        sizes = [d_in] * num_blocks + ([root.shape[0]] if root is not None else [])
        sizes[-1] += int(bias is not None)
        super().__init__(
            name,
            capture,
            [p for p in (self.weight, root, bias) if p is not None],
            layout.input_structure(sum(sizes), tuple(sizes)),
            layout.output_structure(d_out),
            has_ones=bias is not None,
        )
        self._one_mean = False
        self._is_featureless = False
        self.hook(conv.register_propagate_forward_pre_hook(InertHook(self, "on_propagate")))
        self.hook_output(conv, with_kwargs=True)

    def on_propagate(self, conv: Any, arguments: tuple[Any, Any, dict[str, Any]]) -> None:
        """Note whether RGCNConv goes through the relations in one pass (it never does in a compiled model)."""
        self._one_mean = arguments[2].get("edge_type_ptr") is not None

    def on_forward(self, conv: Any, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
        """Note one call."""
        one_mean, self._one_mean = self._one_mean, False
        x, edge_index, edge_type = (
            argument(inputs, named, i, key) for i, key in enumerate(("x", "edge_index", "edge_type"))
        )
        x_source, x_target = x if isinstance(x, tuple) else (x, x)
        if x_source is None or not (x_source.is_floating_point() and x_target.is_floating_point()):
            self._refuse_featureless()
            return
        is_constant = self.conv.num_bases is None and not (x_source.requires_grad or x_target.requires_grad)
        given = (x_source, x_target, edge_index, *(() if edge_type is None else (edge_type,)))
        call = RelationalCall(x_source, x_target, edge_index, edge_type, one_mean, given if is_constant else ())
        self.capture.record(self, call, output)

    def _refuse_featureless(self) -> None:
        if not self._is_featureless:
            warnings.warn(
                f"layer {self.name!r} is called without float features: its weight is a table of embeddings, and "
                "K-FAC leaves it to the optimizer's plain gradient",
                stacklevel=2,
            )
        self._is_featureless = True

    def rows(self, payload: RelationalCall) -> Tensor:
        aggregated = self._aggregate(payload)
        if self.conv.num_bases is not None:
            mixed = torch.einsum("rb,rnd->bnd", self.conv.comp.detach(), torch.stack(aggregated))
            aggregated = list(mixed.unbind())
        if self.has_root:
            aggregated.append(payload.x_target.detach())
        return torch.cat(aggregated, dim=1)

    def _aggregate(self, call: RelationalCall) -> list[Tensor]:
        """Return M_r, [num_targets, d_in], of each relation."""
        x, num_targets = call.x_source.detach(), call.x_target.shape[0]
        target, source, value = self._edges(call.edge_index)
        types = value if call.edge_type is None else call.edge_type
        assert types is not None
        out = []
        for r in range(self.conv.num_relations):
            chosen = (types == r).nonzero().view(-1)
            total = x.new_zeros(num_targets, x.shape[1]).index_add_(0, target[chosen], x[source[chosen]])
            if self.conv.aggr == "mean":
                total /= _degrees(target if call.one_mean else target[chosen], num_targets, total)
            out.append(total)
        return out

    def _edges(self, edges: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the receiving and the sending node of each edge, and the value that a sparse matrix holds there."""
        if not isinstance(edges, Tensor):  # torch_sparse's SparseTensor, transposed as PyG wants it
            row, column, value = edges.coo()
            return row, column, value
        if edges.layout != torch.strided:
            from torch_geometric.utils import to_edge_index

            indices, value = to_edge_index(edges)
            return indices[0], indices[1], value
        target, source = (1, 0) if self.conv.flow == "source_to_target" else (0, 1)
        return edges[target], edges[source], None

    def sources(self, payload: RelationalCall) -> tuple[Any, ...]:
        return payload.sources

    @property
    def keeps_plain_gradient(self) -> bool:
        return self._is_featureless

    def gradient(self) -> Tensor | None:
        return None if self._is_featureless else join_columns(self.parameters)

    def set_gradient(self, value: Tensor) -> None:
        split_columns(self.parameters, value)


def _degrees(target: Tensor, num_targets: int, like: Tensor) -> Tensor:
    """Return the number of edges at each receiving node, at least 1, as a column."""
    return torch.bincount(target, minlength=num_targets).clamp_(min=1).to(like)[:, None]
