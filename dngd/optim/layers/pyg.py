"""PyG's graph convolutions with one weight; those with a weight a relation are in pyg_relational.

- **GCNConv** `Z = Â X Wᵀ + b`: one layer. PyG transforms first and propagates then; K-FAC needs the rows
  whose product with W is Z, `M = Â X`, so these are made here, by the convolution's own forward without its
  parameters, and only in a step that reads them.
- **SAGEConv** `Z = M W_lᵀ + b + X W_rᵀ`: lin_l gets M already aggregated (whatever the aggregation; a list of them
  side by side), lin_r the node's own row, with `project=True` lin a node's row before the aggregation:
  two or three plain linear layers, found on their own. Their outputs are rows of Z before `normalize`.
- **GATConv, GATv2Conv**: the inner linear maps on node rows, as plain linear layers: a message is `α_ij W x_j` with
  an α that depends on W too, so that no aggregated row gives `∇W = Σ g mᵀ`; the transform itself does, at every
  node (lin_edge: at every edge). The free bias is a block of its own (GATv2Conv joins further ones to lin_l, lin_r);
  the attention vectors keep the plain gradient.
- Gated convolutions: inner linear maps and a free bias, likewise. Of Chebyshev and TAG convolutions the bias and those
  maps that PyG calls as modules; the others, of which it calls `forward`, keep the plain gradient, with a warning.
- **GINConv** and others made of modules only need nothing here.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dngd.curvature import FactorLayout
from dngd.optim.capture import Capture, flat_rows
from dngd.optim.layers.adapter import Adapted, argument, class_path, trainable
from dngd.optim.layers.base import CurvatureLayer
from dngd.optim.layers.bias import BiasLayer
from dngd.optim.layers.linear import join_gradient, split_gradient

GCN = "torch_geometric.nn.conv.gcn_conv.GCNConv"
WITH_FREE_BIAS = {
    GCN,
    "torch_geometric.nn.conv.gat_conv.GATConv",
    "torch_geometric.nn.conv.gatv2_conv.GATv2Conv",
    "torch_geometric.nn.conv.cheb_conv.ChebConv",
    "torch_geometric.nn.conv.tag_conv.TAGConv",
    "torch_geometric.nn.conv.res_gated_graph_conv.ResGatedGraphConv",
}
"""Convolutions whose last operation is `out + self.bias`."""

LINEAR_AGGREGATIONS = ("add", "sum", "mean")
"""Those that commute with a linear map."""


def adapt_pyg(name: str, module: nn.Module, capture: Capture, layout: FactorLayout) -> Adapted | None:
    """GCNConv, and the bias of convolutions that add one on its own."""
    path = class_path(module)
    if path not in WITH_FREE_BIAS:
        return None
    conv: Any = module
    if path == GCN and conv.aggr in LINEAR_AGGREGATIONS and trainable(name, conv.lin, "weight") is not None:
        return Adapted([GCNLayer(name, conv, capture, layout)], claimed=[conv.lin])
    bias = trainable(name, module, "bias")
    return None if bias is None else Adapted([BiasLayer(f"{name}.bias".lstrip("."), module, bias, capture, layout)])


class ConvolutionCall(NamedTuple):
    """The arguments of one call, and those of them by which it is recognised.

    These are references, as autograd keeps them: a backward pass after x or the edges were overwritten is refused.
    """

    x: Tensor
    edge_index: Any
    edge_weight: Tensor | None
    sources: tuple[Any, ...]


class GCNLayer(CurvatureLayer):
    """GCNConv as `Z = M Wᵀ + b`, `M = Â X`; gradient [d_out, d_in (+ 1)] of lin.weight and bias."""

    kind: ClassVar[str] = "GCNConv"

    def __init__(self, name: str, conv: Any, capture: Capture, layout: FactorLayout) -> None:
        self.conv = conv
        self.weight: nn.Parameter = conv.lin.weight
        self.bias = trainable(name, conv, "bias")
        has_ones = self.bias is not None
        super().__init__(
            name,
            capture,
            [p for p in (self.weight, self.bias) if p is not None],
            layout.input_structure(self.weight.shape[1] + int(has_ones)),
            layout.output_structure(self.weight.shape[0]),
            has_ones=has_ones,
        )
        self.hook_output(conv, with_kwargs=True)

    def on_forward(self, conv: Any, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
        """Note one call."""
        x, edge_index, edge_weight = (
            argument(inputs, named, i, key) for i, key in enumerate(("x", "edge_index", "edge_weight"))
        )
        weights = () if edge_weight is None else (edge_weight,)
        is_constant = not any(t.requires_grad for t in (x, *weights))
        sources = (x, edge_index, *weights) if is_constant else ()
        self.capture.record(self, ConvolutionCall(x, edge_index, edge_weight, sources), output)

    def features(self, payload: ConvolutionCall) -> Any:
        return payload.x

    def rows(self, payload: ConvolutionCall) -> Tensor:
        return self._made(payload, None)

    def rows_at(self, payload: ConvolutionCall, positions: Tensor) -> Tensor:
        return self._made(payload, positions)

    def _made(self, call: ConvolutionCall, positions: Tensor | None) -> Tensor:
        """Return `Â X`, or some of its rows as [k, d_in]: what forward makes of X without the parameters.

        forward itself, not __call__: hooks of the module are not for this pass. Under no_grad, as all of rows. Edges
        as a plain tensor are not propagated as PyG does, which would build a message of the input's width for each.
        """
        bare = self._bare()
        sums_itself = call.x.dim() == 2 and bare.node_dim in (-2, 0) and not _has_message_hooks(bare)

        def propagate(edge_index: Any, size: Any = None, **arguments: Any) -> Tensor:
            x, edge_weight = arguments["x"], arguments.get("edge_weight")
            if not sums_itself or type(edge_index) is not Tensor or edge_index.layout != torch.strided:
                out: Tensor = type(bare).propagate(bare, edge_index, size=size, **arguments)
                return out if positions is None else flat_rows(out)[positions]
            source, target = edge_index if bare.flow == "source_to_target" else reversed(edge_index.unbind())
            return neighbour_sums(
                x.to(self.dtype), source, target, edge_weight, positions, takes_mean=bare.aggr == "mean"
            )

        bare.__dict__["propagate"] = propagate
        rows: Tensor = bare.forward(call.x.detach(), call.edge_index, call.edge_weight)
        return rows

    def _bare(self) -> Any:
        """Return the convolution as it is now (normalisation kept from an earlier call included), its W = I and b = 0.

        A shallow copy: what its forward keeps (cached=True) does not reach the convolution.
        """
        bare: Any = object.__new__(type(self.conv))
        bare.__dict__ = {
            **self.conv.__dict__,
            "_modules": {**self.conv._modules, "lin": nn.Identity()},
            "_parameters": {**self.conv._parameters, "bias": None},
        }
        return bare

    def sources(self, payload: ConvolutionCall) -> tuple[Any, ...]:
        return payload.sources

    def gradient(self) -> Tensor | None:
        return join_gradient(self.weight, self.bias)

    def set_gradient(self, value: Tensor) -> None:
        split_gradient(self.weight, self.bias, value)


MESSAGE_HOOKS = (
    "_propagate_forward_pre_hooks",
    "_propagate_forward_hooks",
    "_message_forward_pre_hooks",
    "_message_forward_hooks",
    "_aggregate_forward_pre_hooks",
    "_aggregate_forward_hooks",
)


def _has_message_hooks(conv: Any) -> bool:
    """Return whether somebody watches, or changes, what the convolution sends along its edges."""
    return any(getattr(conv, name, None) for name in MESSAGE_HOOKS)


def neighbour_sums(
    x: Tensor,
    source: Tensor,
    target: Tensor,
    edge_weight: Tensor | None,
    positions: Tensor | None,
    *,
    takes_mean: bool = False,
) -> Tensor:
    """Return `m_v = Σ_{e: target_e = v} w_e x_{source_e}`, [n, d], or [k, d] at some v alone; zeros without edges.

    x: [n, d]. source, target: int64 [num_edges], in any order. edge_weight: w, [num_edges], or None for ones.
    positions: int64 [k], distinct. takes_mean: divide by the number of edges at v. Gathers and sums without building
    the messages, [num_edges, d].
    """
    num_rows = x.shape[0] if positions is None else positions.numel()
    if positions is not None:
        place = target.new_full((x.shape[0],), -1)
        place[positions] = torch.arange(num_rows, dtype=place.dtype, device=place.device)
        target = place[target]
        kept = (target >= 0).nonzero()[:, 0]
        source, target = source[kept], target[kept]
        edge_weight = None if edge_weight is None else edge_weight[kept]
    if target.numel() == 0:
        return x.new_zeros(num_rows, x.shape[1])
    target, order = target.sort(stable=True)
    lengths = torch.bincount(target, minlength=num_rows)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    sums: Tensor = F.embedding_bag(
        source[order].to(offsets.dtype),
        x,
        offsets,
        mode="sum",
        per_sample_weights=None if edge_weight is None else edge_weight.view(-1)[order].to(x.dtype),
        include_last_offset=True,
    )
    return sums / lengths.clamp_min(1).to(x.dtype)[:, None] if takes_mean else sums
