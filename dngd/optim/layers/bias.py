"""A bias that is added on its own, after an aggregation: a block with `A = [1]`."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from dngd.curvature import Dense, FactorLayout
from dngd.optim.capture import Capture
from dngd.optim.layers.base import CurvatureLayer
from dngd.optim.layers.columns import join_columns, split_columns


class BiasLayer(CurvatureLayer):
    """The block of b in `Z = f(X) + b`: `∇b = Σ_i g_i`, every row's input is 1, `A = [1]`, `G = (1/n) Σ g gᵀ`.

    For a bias whose rows are not those of the weight before it: an attention layer transforms nodes and
    adds its bias to aggregated messages. The module's output (the first of them, where it returns
    several) must be Z.
    """

    kind: ClassVar[str] = "bias"

    def __init__(
        self, name: str, module: nn.Module, bias: nn.Parameter, capture: Capture, layout: FactorLayout
    ) -> None:
        self.bias = bias
        super().__init__(name, capture, [bias], Dense(1), layout.output_structure(bias.numel()), has_ones=True)
        self.hook_output(module)

    def on_forward(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """Note one call."""
        z = output[0] if isinstance(output, tuple) else output
        self.capture.record(self, z.shape[:-1], z)

    def rows(self, payload: tuple[int, ...]) -> Tensor:
        return self.bias.new_empty(*payload, 0)

    def gradient(self) -> Tensor | None:
        return join_columns([self.bias])

    def set_gradient(self, value: Tensor) -> None:
        split_columns([self.bias], value)
