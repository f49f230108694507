"""From a module's forward and backward pass to the statistics of its layers.

An `nn.Linear` that receives aggregated rows M is a graph layer's transform `Z = M Wᵀ + b`: its input
rows and output gradients are all that the curvature needs. Both are taken in the backward pass, from
the same call, so a forward pass without a backward leaves no trace.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dngd.curvature import FactorStatistics, input_gram, output_gram
from dngd.errors import UserError


class LinearLayer:
    """One `nn.Linear` seen by the preconditioner: its sizes, its gradient as a matrix, its captured rows.

    name: dotted path in the model. d_a = d_in + has_bias, d_g = d_out. `pending` holds what was
    captured since the last commit or discard: Σ m mᵀ, Σ g gᵀ (of the loss as back-propagated) and
    the row count in counts[0].
    """

    def __init__(self, name: str, module: nn.Linear, is_capturing: Callable[[], bool]) -> None:
        self.name = name
        self.module = module
        self.has_bias = module.bias is not None
        self.d_a = module.in_features + int(self.has_bias)
        self.d_g = module.out_features
        self.pending: FactorStatistics | None = None
        self._is_capturing = is_capturing
        self._handle: RemovableHandle = module.register_forward_hook(self._on_forward)

    @property
    def dtype(self) -> torch.dtype:
        """The statistics' precision: the weight's, but never below float32."""
        dtype = self.module.weight.dtype
        return dtype if dtype in (torch.float32, torch.float64) else torch.float32

    @property
    def device(self) -> torch.device:
        """The weight's device."""
        return self.module.weight.device

    def empty_statistics(self) -> FactorStatistics:
        """Return zero statistics of this layer's sizes."""
        return FactorStatistics.zeros(self.d_a, self.d_g, dtype=self.dtype, device=self.device)

    def gradient(self) -> Tensor | None:
        """Return ∇[W | b] as [d_g, d_a], a new tensor; None if the backward pass did not reach the layer."""
        if self.module.weight.grad is None:
            return None
        if not self.has_bias:
            return self.module.weight.grad.clone()
        assert self.module.bias.grad is not None
        return torch.cat([self.module.weight.grad, self.module.bias.grad[:, None]], dim=1)

    def set_gradient(self, value: Tensor) -> None:
        """Overwrite ∇W and ∇b in place with a [d_g, d_a] matrix."""
        assert self.module.weight.grad is not None
        self.module.weight.grad.copy_(value[:, : self.module.in_features])
        if self.has_bias:
            assert self.module.bias.grad is not None
            self.module.bias.grad.copy_(value[:, self.module.in_features])

    def remove(self) -> None:
        """Take the hook off the module."""
        self._handle.remove()

    def _on_forward(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not (self._is_capturing() and torch.is_grad_enabled() and output.requires_grad):
            return
        rows = inputs[0].detach()
        output.register_hook(  # type: ignore[no-untyped-call]
            lambda gradient: self._on_backward(rows, gradient.detach())
        )

    def _on_backward(self, rows: Tensor, gradients: Tensor) -> None:
        if not self._is_capturing():
            return
        flat_rows = rows.reshape(-1, rows.shape[-1]).to(self.dtype)
        flat_gradients = gradients.reshape(-1, gradients.shape[-1]).to(self.dtype)
        if self.pending is None:
            self.pending = self.empty_statistics()
        self.pending.a_sum.add_(input_gram(flat_rows, self.has_bias))
        self.pending.g_sum.add_(output_gram(flat_gradients))
        self.pending.counts[0].add_(flat_rows.shape[0])


def find_layers(model: nn.Module, is_capturing: Callable[[], bool]) -> tuple[list[LinearLayer], list[str]]:
    """Return the layers that can be preconditioned and the names of the trainable parameters left over.

    Raises UserError if a weight is shared between two layers, or no layer is supported.
    """
    layers: list[LinearLayer] = []
    covered: dict[int, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or not module.weight.requires_grad:
            continue
        if module.bias is not None and not module.bias.requires_grad:
            continue
        for parameter in module.parameters(recurse=False):
            if id(parameter) in covered:
                raise UserError(
                    f"layers {covered[id(parameter)]!r} and {name!r} share a parameter; K-FAC needs one set of "
                    "factors a weight, so give each layer its own weight"
                )
            covered[id(parameter)] = name
        layers.append(LinearLayer(name, module, is_capturing))
    left_over = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in covered]
    if not layers:
        raise UserError(
            f"{type(model).__name__} has no layer that K-FAC supports (trainable nn.Linear); "
            "use a first-order optimizer such as torch.optim.Adam for it"
        )
    return layers, left_over
