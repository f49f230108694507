"""nn.Embedding: a linear layer on one-hot rows, whose A is a diagonal of counts."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dngd.curvature import Diagonal, FactorLayout, SparseInput
from dngd.optim.capture import Capture
from dngd.optim.layers.adapter import Adapted, trainable
from dngd.optim.layers.base import CurvatureLayer
from dngd.optim.layers.columns import join_columns, split_columns


def adapt_embedding(name: str, module: nn.Module, capture: Capture, layout: FactorLayout) -> Adapted | None:
    """nn.Embedding; not with sparse gradients, nor where the table or its gradient is rescaled by use."""
    weight = trainable(name, module, "weight") if type(module) is nn.Embedding else None
    if weight is None or not isinstance(module, nn.Embedding):
        return None
    if module.sparse or module.max_norm is not None or module.scale_grad_by_freq:
        return None
    return Adapted([EmbeddingLayer(name, module, weight, capture, layout)])


class EmbeddingLayer(CurvatureLayer):
    """`z_i = E[v_i] = Eᵀ e_{v_i}`, table E [V, d]: `A = diag(count_v / r)`, exact; gradient [d, V].

    Rows are kept as indices. Rows of padding_idx get no gradient from autograd and take no part. Where rows
    of one sample are merged (reduce), an embedding keeps them apart: a mean of one-hot rows is none.
    """

    kind: ClassVar[str] = "embedding"
    merges_samples: ClassVar[bool] = False

    def __init__(
        self, name: str, module: nn.Embedding, weight: nn.Parameter, capture: Capture, layout: FactorLayout
    ) -> None:
        self.weight = weight
        self.padding_idx = module.padding_idx
        num_entries, d = self.weight.shape
        super().__init__(
            name, capture, [self.weight], Diagonal(num_entries), layout.output_structure(d), has_ones=False
        )
        self.hook_output(module, with_kwargs=True)

    def on_forward(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
        """Note one call."""
        self.capture.record(self, inputs[0] if inputs else next(iter(named.values())), output)

    def rows(self, payload: Tensor) -> Tensor:
        return payload[..., None]

    def gradients(self, payload: Tensor, gradient: Tensor) -> Tensor:
        if self.padding_idx is None:
            return gradient
        return gradient.masked_fill((payload == self.padding_idx)[..., None], 0.0)

    def add(self, rows: Tensor | SparseInput, gradients: Tensor, weight: float, *, with_inputs: bool) -> None:
        """Add indices [r, 1] and gradients: `Σ m mᵀ` of one-hot rows counts how often each index came."""
        assert isinstance(rows, Tensor)
        pending = self._pending()
        if with_inputs:
            counts = torch.bincount(rows[:, 0], minlength=self.a.dimension)
            pending.a[0].add_(counts.to(self.dtype), alpha=weight)
            pending.counts[0] += weight * rows.shape[0]
        self.g.accumulate_(pending.g, gradients, weight=weight)
        if self.basis is not None:
            # A's eigenbasis is the identity, so that row i only meets column v_i of EKFAC's scales.
            g_basis = self.basis[1]
            rotated = gradients @ g_basis[0] if len(g_basis) == 2 else gradients
            scales = gradients.new_zeros(gradients.shape[1], self.a.dimension)
            scales.index_add_(1, rows[:, 0].long(), rotated.square().T)
            self._add_scales(scales * weight)

    def gradient(self) -> Tensor | None:
        return join_columns([self.weight])

    def set_gradient(self, value: Tensor) -> None:
        split_columns([self.weight], value)
