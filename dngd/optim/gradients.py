"""Which gradients count in a step: not those that frozen parameters have left over; and which are of zeros."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dngd.curvature import extremes
from dngd.optim.foreach import norms_of

if TYPE_CHECKING:
    from dngd.optim.layers.base import CurvatureLayer


def gradient_of(parameter: Tensor) -> Tensor | None:
    """Return a parameter's gradient; None of a frozen one, whose `.grad` is of a step before."""
    return parameter.grad if parameter.requires_grad else None


class StepGradients:
    """What is known of a step's gradients, as they came from backward: something else may take their place in `.grad`.

    A layer whose gradient is of zeros takes no part in a step: a head that is not used in it, whose gradients were set
    to zero and not to None, or whose loss has weight 0.
    """

    def __init__(self) -> None:
        self._sizes: dict[int, list[Tensor]] = {}
        """Of a parameter's gradient, by the parameter's id: numbers (0-d) that are all 0 only where it is of zeros."""
        self._zeros: set[int] = set()
        """Parameters whose gradients the host knows to be of zeros."""

    def forget(self) -> None:
        """Get ready for another step, or other gradients."""
        self._sizes, self._zeros = {}, set()

    def are_finite(self, parameters: Iterable[Tensor], device: torch.device) -> bool | None:
        """Return whether all gradients are finite, by their norms, None without any; one host synchronisation, which
        also tells those of zeros.

        device: as norms_of's. A gradient whose sum of squares overflows counts as not finite.
        """
        gradients = {id(p): g for p in parameters if (g := gradient_of(p)) is not None}
        if not gradients:
            return None
        norms = norms_of([g.coalesce().values() if g.is_sparse else g for g in gradients.values()], device)
        values = torch.stack(norms).tolist()
        self._sizes = {key: [norm] for key, norm in zip(gradients, norms)}
        self._zeros = {key for key, value in zip(gradients, values) if value == 0}
        return all(map(math.isfinite, values))

    def note(self, layers: Iterable[CurvatureLayer]) -> None:
        """Note the gradients of layers, without a host synchronisation."""
        self.forget()
        for layer in layers:
            for parameter in layer.parameters:
                gradient = gradient_of(parameter)
                if gradient is not None:
                    self._sizes[id(parameter)] = extremes([gradient.detach()])

    def sizes(self, layers: Mapping[str, CurvatureLayer]) -> dict[str, list[Tensor]]:
        """Return, of the layers that have a gradient, numbers (0-d) that are all 0 only where it is of zeros; no host
        synchronisation."""
        if not self._sizes:
            self.note(layers.values())
        found = {
            name: [size for parameter in layer.parameters for size in self._sizes.get(id(parameter), ())]
            for name, layer in layers.items()
        }
        return {name: sizes for name, sizes in found.items() if sizes}

    def is_zero(self, layer: CurvatureLayer) -> bool:
        """Return whether the host knows that a layer's gradient, which it has, is of zeros."""
        if not self._zeros:
            return False
        return all(id(p) in self._zeros for p in layer.parameters if gradient_of(p) is not None)
