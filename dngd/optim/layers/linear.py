"""`Z = M Wᵀ + b` as a module: torch's Linear and PyG's, on rows of any leading shape."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dngd.curvature import FactorLayout, SparseInput
from dngd.optim.capture import Capture
from dngd.optim.gradients import gradient_of
from dngd.optim.layers.base import CurvatureLayer


class LinearLayer(CurvatureLayer):
    """A module whose forward is `x Wᵀ + b` with W [d_out, d_in] in `weight` and b in `bias` (or None).

    Called several times in a step (a module used twice), its rows are those of all calls, and its
    gradient is their sum. parts: sizes of the input's own blocks (self and neighbour rows of SAGE), for a
    block-diagonal A.
    """

    kind: ClassVar[str] = "linear"

    def __init__(
        self, name: str, module: nn.Module, capture: Capture, layout: FactorLayout, *, parts: tuple[int, ...] = ()
    ) -> None:
        weight, bias = module.weight, module.bias
        assert isinstance(weight, nn.Parameter)
        self.weight: nn.Parameter = weight
        self.bias: nn.Parameter | None = bias if isinstance(bias, nn.Parameter) and bias.requires_grad else None
        has_ones = self.bias is not None
        sizes = (*parts[:-1], parts[-1] + int(has_ones)) if parts else ()
        super().__init__(
            name,
            capture,
            [p for p in (self.weight, self.bias) if p is not None],
            layout.input_structure(weight.shape[1] + int(has_ones), sizes),
            layout.output_structure(weight.shape[0]),
            has_ones=has_ones,
        )
        self.hook_output(module, with_kwargs=True)

    def on_forward(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
        """Note one call; the input may be given by position or by name."""
        rows = inputs[0] if inputs else next(iter(named.values()))
        self.capture.record(self, rows, output)

    def rows(self, payload: Tensor | SparseInput) -> Tensor:
        return payload.detach() if isinstance(payload, Tensor) else payload.dense().to(self.dtype)

    def rows_at(self, payload: Tensor | SparseInput, positions: Tensor) -> Tensor | SparseInput:
        if isinstance(payload, Tensor):
            return super().rows_at(payload, positions)
        return payload[positions] if self.basis is None else payload.dense(positions)

    def all_rows(self, payload: Tensor | SparseInput) -> Tensor | SparseInput:
        return super().all_rows(payload) if isinstance(payload, Tensor) or self.basis is not None else payload

    def sources(self, payload: Tensor | SparseInput) -> tuple[Tensor, ...]:
        if not isinstance(payload, Tensor):
            return payload.values, payload.columns, payload.indptr
        return () if payload.requires_grad else (payload,)

    def gradient(self) -> Tensor | None:
        return join_gradient(self.weight, self.bias)

    def set_gradient(self, value: Tensor) -> None:
        split_gradient(self.weight, self.bias, value)


def join_gradient(weight: nn.Parameter, bias: nn.Parameter | None) -> Tensor | None:
    """Return ∇[W | b], [d_out, d_in (+ 1)], a new tensor; None without a gradient.

    One that has none beside the other (frozen, say) stands as zeros.
    """
    main = gradient_of(weight)
    if bias is None:
        return None if main is None else main.clone()
    column = gradient_of(bias)
    if main is None and column is None:
        return None
    main = torch.zeros_like(weight) if main is None else main
    column = torch.zeros_like(bias) if column is None else column
    return torch.cat([main, column[:, None]], dim=1)


def split_gradient(weight: nn.Parameter, bias: nn.Parameter | None, value: Tensor) -> None:
    """Overwrite ∇W and ∇b in place with the columns of a [d_out, d_in (+ 1)] matrix."""
    main = gradient_of(weight)
    if main is not None:
        main.copy_(value[:, : weight.shape[1]])
    column = None if bias is None else gradient_of(bias)
    if column is not None:
        column.copy_(value[:, weight.shape[1]])
