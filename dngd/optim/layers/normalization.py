"""Scale and shift of BatchNorm and LayerNorm: `y_i = γ ∘ x̂_i + β`, one block for both.

Row i's own gradient is the vector `u_i = [g_i ∘ x̂_i | g_i]`, `[∇γ | ∇β] = Σ_i u_i`: in the form of a linear layer
with `A = [1]` and `G = (1/n) Σ u uᵀ`, which is exact for a seed a row. x̂, the normalised input, is computed
again from the layer's input, without a graph and without touching running statistics.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dngd.curvature import Dense, Diagonal, FactorLayout
from dngd.optim.capture import Capture
from dngd.optim.gradients import gradient_of
from dngd.optim.layers.adapter import Adapted, class_path, trainable
from dngd.optim.layers.base import CurvatureLayer

PYG_LAYER_NORM = "torch_geometric.nn.norm.layer_norm.LayerNorm"
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

MAX_DENSE = 256
"""The widest G that is kept whole; beyond it the diagonal."""


def adapt_normalization(name: str, module: nn.Module, capture: Capture, layout: FactorLayout) -> Adapted | None:
    """torch's BatchNorm (which PyG's wraps) and LayerNorm, and PyG's LayerNorm where each node is normalised alone.

    PyG's LayerNorm over a whole graph (mode="graph") is left to the plain gradient.
    """
    if type(module) not in BATCH_NORMS and not _is_layer_norm(module):
        return None
    scale, shift = trainable(name, module, "weight"), trainable(name, module, "bias")
    if scale is None and shift is None:
        return None
    return Adapted([NormalizationLayer(name, module, scale, shift, capture)])


def _is_layer_norm(module: nn.Module) -> bool:
    is_pyg = class_path(module) == PYG_LAYER_NORM and getattr(module, "mode", None) == "node"
    return type(module) is nn.LayerNorm or is_pyg


class NormalizedInput(NamedTuple):
    """One call: the input, and for BatchNorm the statistics it was normalised with (None: the batch's own)."""

    x: Tensor
    mean: Tensor | None
    variance: Tensor | None


class NormalizationLayer(CurvatureLayer):
    """Scale γ and shift β, d entries each; gradient [2d, 1] (or [d, 1] if only one of them is trained)."""

    kind: ClassVar[str] = "normalization"

    def __init__(
        self,
        name: str,
        module: nn.Module,
        scale: nn.Parameter | None,
        shift: nn.Parameter | None,
        capture: Capture,
    ) -> None:
        self.scale, self.shift = scale, shift
        self.is_layer_norm = _is_layer_norm(module)
        parameters = [p for p in (scale, shift) if p is not None]
        self.width = parameters[0].numel()
        self.normalized_shape = tuple(parameters[0].shape)
        self.eps = float(getattr(module, "eps", 1e-5))
        size = self.width * len(parameters)
        g = Dense(size) if size <= MAX_DENSE else Diagonal(size)
        super().__init__(name, capture, parameters, Dense(1), g, has_ones=True)
        self.hook_output(module, with_kwargs=True)

    def on_forward(self, module: Any, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
        """Note one call."""
        x = inputs[0] if inputs else next(iter(named.values()))
        mean = variance = None
        if not self.is_layer_norm and not module.training and module.running_mean is not None:
            # Copies: a later call in training mode would move them.
            mean, variance = module.running_mean.clone(), module.running_var.clone()
        self.capture.record(self, NormalizedInput(x, mean, variance), output)

    def rows(self, payload: NormalizedInput) -> Tensor:
        return payload.x.new_empty(*self._by_row(payload.x).shape[:-1], 0)

    def gradients(self, payload: NormalizedInput, gradient: Tensor) -> Tensor:
        g = self._by_row(gradient).to(self.dtype)
        if self.scale is None:
            return g
        scaled = g * self._by_row(self._normalized(payload))
        return scaled if self.shift is None else torch.cat([scaled, g], dim=-1)

    def _normalized(self, payload: NormalizedInput) -> Tensor:
        """Return x̂ in the input's shape."""
        x = payload.x.detach().to(self.dtype)
        if self.is_layer_norm:
            return F.layer_norm(x, self.normalized_shape, eps=self.eps)
        uses_batch = payload.mean is None
        return F.batch_norm(x, payload.mean, payload.variance, training=uses_batch, momentum=0.0, eps=self.eps)

    def _by_row(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the input's shape as [..., d]: channels last, LayerNorm's own dimensions as one."""
        if self.is_layer_norm:
            return tensor.flatten(tensor.dim() - len(self.normalized_shape))
        return tensor.movedim(1, -1)

    def gradient(self) -> Tensor | None:
        found = [gradient_of(p) for p in self.parameters]
        if all(g is None for g in found):
            return None
        parts = [torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, found)]
        return torch.cat([part.reshape(-1) for part in parts])[:, None]

    def set_gradient(self, value: Tensor) -> None:
        for parameter, part in zip(self.parameters, torch.split(value[:, 0], self.width)):
            gradient = gradient_of(parameter)
            if gradient is not None:
                gradient.copy_(part.view(parameter.shape))
