"""A step's preconditioned gradients: computed here, or on the rank that alone holds a layer's inverses."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dngd.comm import Communicator
from dngd.curvature import Tensors, precondition_in_eigenbasis, precondition_with_inverses
from dngd.errors import UserError
from dngd.optim.arguments import Method
from dngd.optim.eigenvalues import EigenvalueCorrection
from dngd.optim.inverses import Inverses
from dngd.optim.layer_state import LayerState
from dngd.optim.layers import CurvatureLayer


class Directions:
    """Makes every layer's direction `(G + λ_G I)⁻¹ ∇W (A + λ_A I)⁻¹` from the inverses in use.

    on_timed: told each layer's seconds. was_measured: whether a layer took part in a factor step. unit_scale: whether a
    direction is multiplied by λ_A·λ_G, so that its part in eigenvalues far below the damping is the gradient's. strict:
    whether a layer whose rows K-FAC never saw is an error, not a warning.
    """

    def __init__(
        self,
        method: Method,
        layers: Mapping[str, CurvatureLayer],
        states: Mapping[str, LayerState],
        eigenvalues: EigenvalueCorrection | None,
        communicator: Communicator,
        on_timed: Callable[[str, float], None],
        was_measured: Callable[[str], bool],
        *,
        unit_scale: bool,
        strict: bool,
    ) -> None:
        self._unit_scale = unit_scale
        self._method: Method = method
        self._layers = layers
        self._states = states
        self._eigenvalues = eigenvalues
        self._comm = communicator
        self._on_timed = on_timed
        self._was_measured = was_measured
        self._strict = strict
        self._unmeasured: set[str] = set()

    def take(
        self,
        gradient_scale: float,
        *,
        measures_gpu: bool,
        inverses: Inverses | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return (gradients, directions) of the layers that have a gradient, [d_g, d_a] each; all ranks enter.

        gradient_scale: what turns `.grad` into the mean loss's gradient. measures_gpu: whether to wait for a GPU
        around each layer, which works on while the clock is read. inverses: of A and of G by layer, in the precision to
        compute with; None: those in use.
        """
        gradients: dict[str, Tensor] = {}
        directions: dict[str, Tensor] = {}
        holders: dict[str, int] = {}
        for name, layer in self._layers.items():
            holder = self._states[name].holder
            if holder is not None:
                holders[name] = holder
            gradient = layer.gradient()
            if gradient is None:
                continue
            gradients[name] = gradient * gradient_scale if gradient_scale != 1.0 else gradient
            if holder is None or holder == self._comm.rank:
                own = None if inverses is None else inverses[name]
                directions[name] = self._timed(layer, gradients[name], measures_gpu, own)
        if holders:
            directions |= share_directions(self._layers, holders, directions, self._comm)
        return gradients, directions

    def _timed(
        self, layer: CurvatureLayer, gradient: Tensor, measures_gpu: bool, inverses: tuple[Tensors, Tensors] | None
    ) -> Tensor:
        state = self._states[layer.name]
        on_gpu = layer.device.type == "cuda"
        if self._comm.world_size == 1 or len(state.inverses) < 2 or (on_gpu and not measures_gpu):
            return self._direction(layer, state, gradient, inverses)
        if on_gpu:
            torch.cuda.synchronize(layer.device)
        started = time.perf_counter()
        direction = self._direction(layer, state, gradient, inverses)
        if on_gpu:
            torch.cuda.synchronize(layer.device)
        self._on_timed(layer.name, time.perf_counter() - started)
        return direction

    def _direction(
        self,
        layer: CurvatureLayer,
        state: LayerState,
        gradient: Tensor,
        inverses: tuple[Tensors, Tensors] | None,
    ) -> Tensor:
        """Return a layer's preconditioned gradient; the gradient itself while there is no inverse."""
        if len(state.inverses) < 2:
            self._check_measured(layer, state, gradient)
            return gradient
        if inverses is None:
            a, g = (state.inverses[which].expanded(layer.dtype) for which in "AG")
        else:
            a, g = inverses
        working = gradient.to(layer.dtype)
        if self._method == "kfac":
            out = precondition_with_inverses(working, layer.a, a, layer.g, g)
        else:
            scales = None if self._eigenvalues is None else self._eigenvalues.scales(layer.name)
            out = precondition_in_eigenbasis(working, a, g, scales, *state.damping)
        if self._unit_scale:
            out = out * (state.damping[0] * state.damping[1])
        # Sums over it round by its layout, which does not travel.
        return out.to(gradient.dtype).contiguous()

    def _check_measured(self, layer: CurvatureLayer, state: LayerState, gradient: Tensor) -> None:
        """Say once that a layer has a gradient and no rows: its weight is used in a way that K-FAC cannot see."""
        if state.attempted_step < 0 or layer.name in self._unmeasured or not self._was_measured(layer.name):
            return
        if float(state.folded.counts.min()) > 0:
            return
        if not bool(gradient.any()):
            return  # no seed reaches it yet
        self._unmeasured.add(layer.name)
        text = (
            f"layer {layer.name!r} has a gradient, but K-FAC saw no call of it and leaves it its plain gradient; is "
            "its weight used by a function instead of the module, was the model compiled or run before the "
            "preconditioner was made, or is the layer inside an activation checkpoint?"
        )
        if self._strict:
            raise UserError("strict: " + text)
        warnings.warn(text, stacklevel=2)


def share_directions(
    layers: Mapping[str, CurvatureLayer],
    holders: Mapping[str, int],
    computed: Mapping[str, Tensor],
    communicator: Communicator,
) -> dict[str, Tensor]:
    """Return the direction, [d_g, d_a], of every layer in `holders`; one broadcast a holder, in rank order.

    holders: the rank that preconditions each layer. computed: this rank's own directions, in the gradients'
    precision. All ranks enter with the same holders. What is sent depends on nothing else: a layer that has no gradient
    on its holder is sent as zeros, so that no rank waits for a buffer of another size.
    """
    by_holder: dict[int, list[str]] = {}
    for name in layers:
        if name in holders:
            by_holder.setdefault(holders[name], []).append(name)
    buffers, works = {}, []
    for holder, names in sorted(by_holder.items()):
        if holder == communicator.rank:
            parts = [computed[n] if n in computed else _empty(layers[n]).zero_() for n in names]
            buffer = torch.cat([part.contiguous().view(-1).view(torch.uint8) for part in parts])
        else:
            buffer = torch.cat([_empty(layers[n]).view(-1).view(torch.uint8) for n in names])
        buffers[holder] = buffer
        works.append(communicator.broadcast(buffer, holder, "preconditioned"))
    for work in works:
        work.wait()
    out = {}
    for holder, names in by_holder.items():
        offset = 0
        for name in names:
            shape, dtype = _shape(layers[name]), layers[name].parameters[0].dtype
            size = math.prod(shape) * dtype.itemsize
            # Views of other types want aligned storage; a slice of the buffer need not be.
            out[name] = buffers[holder][offset : offset + size].clone().view(dtype).view(shape)
            offset += size
    return out


def _shape(layer: CurvatureLayer) -> tuple[int, int]:
    return layer.g.dimension, layer.a.dimension


def _empty(layer: CurvatureLayer) -> Tensor:
    return torch.empty(_shape(layer), dtype=layer.parameters[0].dtype, device=layer.device)
