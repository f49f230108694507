"""DGL's GraphConv and SAGEConv, recognised by their class's path; DGL itself is not imported here.

Where DGL multiplies by the weight before it aggregates (a layer whose output is narrower than its input),
the rows are still the **aggregated** inputs, and where the module applies an activation or a norm of its own,
gradients are still those of Z before it. Aggregated rows come from a convolution of the same class without
a weight ("bare"), so that DGL's own code decides on norms, edge weights and blocks.

- **GraphConv** `Z = M W + b`, `M = D_in^-½ A D_out^-½ X` (or the norm chosen): one layer. One without a weight of its
  own is left alone.
- **SAGEConv** mean, pool, lstm: `Z = X W_selfᵀ + b + M W_neighᵀ`: fc_self and fc_neigh are linear layers of their own
  (pool: fc_pool a third, on rows before the aggregation); only where a mean follows fc_neigh is that a
  layer from here. gcn: `Z = M W_neighᵀ + b`, one layer from here.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from dngd.curvature import FactorLayout
from dngd.optim.capture import Capture
from dngd.optim.layers.adapter import Adapted, argument, class_path, trainable
from dngd.optim.layers.base import CurvatureLayer, InertHook
from dngd.optim.layers.columns import join_columns, split_columns
from dngd.optim.layers.linear import join_gradient, split_gradient

GRAPH_CONV = "dgl.nn.pytorch.conv.graphconv.GraphConv"
SAGE_CONV = "dgl.nn.pytorch.conv.sageconv.SAGEConv"


def adapt_dgl(name: str, module: nn.Module, capture: Capture, layout: FactorLayout) -> Adapted | None:
    """GraphConv, and the SAGEConv whose fc_neigh cannot be a linear layer of its own."""
    path = class_path(module)
    conv: Any = module
    if path == GRAPH_CONV:
        weight = trainable(name, conv, "weight")
        return None if weight is None else Adapted([GraphConvLayer(name, conv, weight, capture, layout)])
    if path != SAGE_CONV or trainable(f"{name}.fc_neigh", conv.fc_neigh, "weight") is None:
        return None
    transforms_first = conv._aggre_type == "mean" and conv._in_src_feats > conv._out_feats
    if conv._aggre_type != "gcn" and not transforms_first:
        return None
    return Adapted([SageNeighbourLayer(name, conv, capture, layout)], claimed=[conv.fc_neigh])


class GraphCall(NamedTuple):
    """One call: graph, features (or a pair), edge weights, and what it is recognised by. References, not copies."""

    graph: Any
    features: Any
    edge_weight: Tensor | None
    sources: tuple[Any, ...]


class _AggregatedLayer(CurvatureLayer):
    """What both share: rows from a bare convolution, and gradients of Z even if the module goes on from Z.

    goes_on_with: names of the module's attributes that may be applied to Z (activation, norm), first one
    first. A module among them is watched; a function is wrapped while forward runs.
    """

    def __init__(
        self,
        name: str,
        conv: Any,
        parameters: list[nn.Parameter],
        widths: tuple[int, int],
        capture: Capture,
        layout: FactorLayout,
        *,
        has_ones: bool,
        bare: nn.Module,
        goes_on_with: tuple[str, ...],
    ) -> None:
        d_in, d_out = widths
        super().__init__(
            name,
            capture,
            parameters,
            layout.input_structure(d_in + int(has_ones)),
            layout.output_structure(d_out),
            has_ones=has_ones,
        )
        self.bare = bare
        self._next = next((key for key in goes_on_with if getattr(conv, key) is not None), None)
        self._replaced: Any = None
        self._z: Tensor | None = None
        self._is_inside = False
        following = None if self._next is None else getattr(conv, self._next)
        if isinstance(following, nn.Module):
            self.hook(following.register_forward_pre_hook(InertHook(self, "on_following")))
        self.hook(conv.register_forward_pre_hook(InertHook(self, "on_enter")))
        # always_call: a wrapped function must be put back after an exception too.
        self.hook_output(conv, with_kwargs=True, always_call=True)

    def on_enter(self, conv: Any, inputs: tuple[Any, ...]) -> None:
        """Get ready to see Z."""
        self._is_inside, self._z = True, None
        following = None if self._next is None else getattr(conv, self._next)
        if self._next is None or following is None or isinstance(following, nn.Module) or not self.capture.active:
            return

        def watched(z: Tensor) -> Any:
            self._z = z
            return following(z)

        self._replaced = following
        setattr(conv, self._next, watched)

    def on_following(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Note Z, the input of the activation or norm."""
        if self._is_inside and self._z is None:
            self._z = inputs[0]

    def on_forward(self, conv: Any, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor | None) -> None:
        """Note one call."""
        z, self._z, self._is_inside = self._z, None, False
        if self._next is None:
            z = output
        if self._replaced is not None:
            setattr(conv, str(self._next), self._replaced)
            self._replaced = None
        features = self._features(argument(inputs, named, 1, "feat"))
        if output is not None and z is not None:
            graph = argument(inputs, named, 0, "graph")
            edge_weight = self._edge_weight(inputs, named)
            tensors = [*(features if isinstance(features, tuple) else (features,))]
            tensors += [] if edge_weight is None else [edge_weight]
            # A graph that is changed in place gets a new structure inside.
            structure = getattr(graph, "_graph", graph)
            sources = () if any(t.requires_grad for t in tensors) else (structure, *tensors)
            self.capture.record(self, GraphCall(graph, features, edge_weight, sources), z)

    def _features(self, given: Any) -> Any:
        """Return the features as they are aggregated."""
        return given

    def _edge_weight(self, inputs: tuple[Any, ...], named: dict[str, Any]) -> Tensor | None:
        raise AssertionError(f"{type(self).__name__} must say where its edge weights are given")

    def rows(self, payload: GraphCall) -> Tensor:
        # Under no_grad, as everything that asks for rows.
        rows: Tensor = self.bare(payload.graph, payload.features, edge_weight=payload.edge_weight)
        return rows

    def sources(self, payload: GraphCall) -> tuple[Any, ...]:
        return payload.sources


class GraphConvLayer(_AggregatedLayer):
    """GraphConv; gradient [d_out, d_in (+ 1)] of weight [d_in, d_out] and bias."""

    kind: ClassVar[str] = "GraphConv"

    def __init__(self, name: str, conv: Any, weight: nn.Parameter, capture: Capture, layout: FactorLayout) -> None:
        bias = trainable(name, conv, "bias")
        bare = _without_parameters(
            conv,
            _in_feats=conv._in_feats,
            _out_feats=conv._out_feats,
            _norm=conv._norm,
            _allow_zero_in_degree=True,
            weight=None,
            bias=None,
            _activation=None,
        )
        super().__init__(
            name,
            conv,
            [p for p in (weight, bias) if p is not None],
            (weight.shape[0], weight.shape[1]),
            capture,
            layout,
            has_ones=bias is not None,
            bare=bare,
            goes_on_with=("_activation",),
        )

    def _edge_weight(self, inputs: tuple[Any, ...], named: dict[str, Any]) -> Tensor | None:
        edge_weight: Tensor | None = argument(inputs, named, 3, "edge_weight")
        return edge_weight

    def gradient(self) -> Tensor | None:
        return join_columns(self.parameters)

    def set_gradient(self, value: Tensor) -> None:
        split_columns(self.parameters, value)


class SageNeighbourLayer(_AggregatedLayer):
    """SAGEConv's fc_neigh on aggregated rows; gradient [d_out, d_in (+ 1)] of its weight and, for gcn, the bias."""

    kind: ClassVar[str] = "SAGEConv neighbours"

    def __init__(self, name: str, conv: Any, capture: Capture, layout: FactorLayout) -> None:
        self.weight: nn.Parameter = conv.fc_neigh.weight
        self.bias = trainable(name, conv, "bias")
        bare = _without_parameters(
            conv,
            _in_src_feats=conv._in_src_feats,
            _out_feats=conv._in_src_feats,
            _aggre_type=conv._aggre_type,
            feat_drop=nn.Identity(),
            fc_neigh=nn.Identity(),
            fc_self=_Nothing(),
            bias=None,
            activation=None,
            norm=None,
        )
        super().__init__(
            f"{name}.fc_neigh".lstrip("."),
            conv,
            [p for p in (self.weight, self.bias) if p is not None],
            (self.weight.shape[1], self.weight.shape[0]),
            capture,
            layout,
            has_ones=self.bias is not None,
            bare=bare,
            goes_on_with=("activation", "norm"),
        )
        self._dropped: list[Tensor] = []
        # After the user's hooks, whose result is what the convolution goes on with.
        self.hook(conv.feat_drop.register_forward_hook(InertHook(self, "on_dropout")))

    def on_dropout(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Note the features that are left after dropout, of source and then of target nodes."""
        self._dropped.append(output)

    def _features(self, given: Any) -> Any:
        dropped, self._dropped = tuple(self._dropped), []
        return dropped if isinstance(given, tuple) else dropped[0] if dropped else given

    def _edge_weight(self, inputs: tuple[Any, ...], named: dict[str, Any]) -> Tensor | None:
        edge_weight: Tensor | None = argument(inputs, named, 2, "edge_weight")
        return edge_weight

    def gradient(self) -> Tensor | None:
        return join_gradient(self.weight, self.bias)

    def set_gradient(self, value: Tensor) -> None:
        split_gradient(self.weight, self.bias, value)


class _Nothing(nn.Module):
    """In the place of fc_self: adds nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(())


def _without_parameters(conv: nn.Module, **attributes: Any) -> nn.Module:
    """Return a module of conv's class with these attributes only.

    Not by its constructor, which would draw initial weights from the user's random stream.
    """
    bare = type(conv).__new__(type(conv))
    nn.Module.__init__(bare)
    for key, value in attributes.items():
        setattr(bare, key, value)
    return bare
