"""Which parts of a model have curvature: the adapters, in order, and the walk over the modules."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from dngd.curvature import FactorLayout
from dngd.errors import UserError
from dngd.optim.capture import Capture
from dngd.optim.layers.adapter import Adapted, Adapter, class_path, trainable
from dngd.optim.layers.base import CurvatureLayer
from dngd.optim.layers.dgl import adapt_dgl
from dngd.optim.layers.embedding import adapt_embedding
from dngd.optim.layers.linear import LinearLayer
from dngd.optim.layers.normalization import adapt_normalization
from dngd.optim.layers.pyg import adapt_pyg
from dngd.optim.layers.pyg_relational import adapt_relational

LINEAR_MAPS = ("torch_geometric.nn.dense.linear.Linear", "dngd.models.sparse_rows.RowsLinear")
"""Classes of others that compute what nn.Linear does."""


def adapt_linear(name: str, module: nn.Module, capture: Capture, layout: FactorLayout) -> Adapted | None:
    """torch's nn.Linear (not its subclasses, which may compute something else), PyG's and this package's own."""
    if type(module) is not nn.Linear and class_path(module) not in LINEAR_MAPS:
        return None
    if trainable(name, module, "weight") is None:
        return None
    parts = tuple(getattr(module, "input_parts", ()))
    return Adapted([LinearLayer(name, module, capture, layout, parts=parts)])


# Containers come before the linear maps inside them, which they may claim.
ADAPTERS: list[Adapter] = [
    adapt_pyg,
    adapt_relational,
    adapt_dgl,
    adapt_embedding,
    adapt_normalization,
    adapt_linear,
]


WRAPPERS = {
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
}
"""What wraps a whole model, and under which name; parameters keep the names of the model itself."""


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model itself, by whose names its parameters are told."""
    while (attribute := WRAPPERS.get(class_path(model))) is not None:
        model = getattr(model, attribute)
    return model


def find_layers(model: nn.Module, capture: Capture, layout: FactorLayout) -> tuple[list[CurvatureLayer], list[str]]:
    """Return the layers that have curvature and the names of the trainable parameters left over.

    Raises UserError if a parameter is shared between two layers, or no layer is supported.
    """
    layers: list[CurvatureLayer] = []
    try:
        return layers, _find(unwrapped(model), capture, layout, layers)
    except BaseException:
        for layer in layers:
            layer.remove()
        raise


def _find(model: nn.Module, capture: Capture, layout: FactorLayout, layers: list[CurvatureLayer]) -> list[str]:
    """Append to `layers` those that have curvature; return the names of the trainable parameters left over."""
    covered: dict[int, str] = {}
    for adapted in _adapt_all(model, capture, layout):
        layers += adapted.layers
        for layer in adapted.layers:
            for parameter in layer.parameters:
                if id(parameter) in covered:
                    raise UserError(
                        f"layers {covered[id(parameter)]!r} and {layer.name!r} share a parameter; K-FAC needs one set "
                        "of factors a weight, so give each layer its own weight, or use one module twice"
                    )
                covered[id(parameter)] = layer.name
    _check_owners(model, covered)
    left_over = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in covered]
    if not layers:
        raise UserError(
            f"{type(model).__name__} has no layer that K-FAC supports; supported are trainable Linear, graph "
            "convolutions of PyG and DGL, Embedding, BatchNorm and LayerNorm; use a first-order optimizer such as "
            "torch.optim.Adam for it"
        )
    return left_over


def _check_owners(model: nn.Module, covered: dict[int, str]) -> None:
    """Raise UserError if a covered parameter also belongs to a module without factors: its rows there go unseen."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(parameter), []).append(f"{name}.{key}".lstrip("."))
    for key_id, names in owners.items():
        if key_id in covered and len(names) > 1:
            raise UserError(
                f"{' and '.join(names)} share a parameter; K-FAC needs one set of factors a weight, so give each "
                "module its own weight, or use one module twice"
            )


def _adapt_all(model: nn.Module, capture: Capture, layout: FactorLayout) -> Iterator[Adapted]:
    claimed: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in claimed:
            continue
        for adapter in ADAPTERS:
            adapted = adapter(name, module, capture, layout)
            if adapted is not None:
                claimed.update(id(inner) for inner in adapted.claimed)
                yield adapted
                break
