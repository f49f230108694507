"""Folding a step's captured rows into the running sums, once the step is known to count."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dngd.curvature import extremes, read_together
from dngd.optim.foreach import add_together, scale_together
from dngd.optim.layer_state import LayerState
from dngd.optim.layers import CurvatureLayer


def fold_pending(
    layers: Mapping[str, CurvatureLayer],
    states: Mapping[str, LayerState],
    sound: Mapping[str, bool],
    *,
    decay: float,
    gradient_scale: float,
    num_samples: float,
    absent: Collection[str] = (),
    shared_count: float | None = None,
) -> None:
    """Make each layer's sums and counts on this rank `S ← ρS + ΔS`, `c ← ρc + Δc`, from what its hooks left pending.

    A layer without pending sums, or with unsound ones, still decays. sound: whether a layer's pending sums are finite.
    decay: ρ. gradient_scale: turns the rows' gradients into those of the summed loss. num_samples: n, the seeds that G
    is over. absent: layers whose G they do not count to. shared_count: n of the paper's variant, in which A has it
    too.
    """
    # Seeds that do not reach a layer are seeds of its G too, whichever rank they were on; not so where the layer
    # has no gradient at all, since it was frozen, say, or one of zeros: it takes no step to which they would count.
    is_measured = any(layer.pending is not None for layer in layers.values())
    targets = {}
    for name, state in states.items():
        targets[name] = state.folded if state.unfolded is None else state.unfolded
        if state.unfolded is not None:
            state.decay *= decay
    scale_together([tensor for target in targets.values() for tensor in target.tensors()], decay)
    sums = {name: layer.pending for name, layer in layers.items() if layer.pending is not None and sound[name]}
    scale_together([tensor for pending in sums.values() for tensor in pending.g], gradient_scale * gradient_scale)
    for name, pending in sums.items():
        pending.counts[1].fill_(0.0 if name in absent else num_samples)  # an assignment would wait for the GPU
        if shared_count is not None:
            pending.counts.fill_(shared_count)
    add_together(
        [tensor for name in sums for tensor in targets[name].tensors()],
        [tensor for pending in sums.values() for tensor in pending.tensors()],
    )
    for name, layer in layers.items():
        state, target = states[name], targets[name]
        if name in sums:
            if layer.only_constant and layer.constant.is_only_input and state.unfolded is None:
                # The average of what never changes is its latest value: rows that were not reached at first
                # do not linger in it, and the factor stays as it is. Its weight c goes on as ever.
                # Where no row was ever reached both counts are 0, and so are the sums.
                pending = sums[name]
                share = target.counts[0] / pending.counts[0].clamp_min(1)
                for mine, latest in zip(target.a, pending.a):
                    torch.mul(latest, share, out=mine)
        elif layer.pending is None and is_measured and layer.has_gradient and name not in absent:
            target.counts[1] += num_samples


class Found(NamedTuple):
    """sound: for each layer with pending sums, whether they are finite. absent: the layers that take no part."""

    sound: dict[str, bool]
    absent: set[str]


def look_at_pending(
    layers: Mapping[str, CurvatureLayer], gradients: Mapping[str, Sequence[Tensor]], device: torch.device
) -> Found:
    """Return what is found of the pending sums and of the layers' gradients; one host synchronisation, on `device`.

    gradients: of layers that have one, numbers (0-d) that are all zero only where it is. Layers without rows of a
    nonzero gradient on this rank, and with one of zeros (which all ranks know alike), are absent: a head that is not
    used in this step, with gradients that were set to zero and not to None, or a loss of weight 0. Of a layer that is
    reached on another rank alone the gradient, a sum over ranks, is not zero.

    `|Σ m_i m_j| <= max(Σ m_i², Σ m_j²)`: a sum that overflows shows on the diagonal.
    """
    numbers: dict[tuple[str, str], list[Tensor]] = {}
    for name, layer in layers.items():
        if layer.pending is not None:
            numbers["A", name] = extremes([layer.a.diagonal(layer.pending.a)])
            numbers["G", name] = extremes([layer.g.diagonal(layer.pending.g)])
        if name in gradients:
            numbers["gradient", name] = list(gradients[name])
    read = iter(read_together([number.to(device) for own in numbers.values() for number in own]))
    values = {key: [next(read) for _ in own] for key, own in numbers.items()}
    sound = {
        name: all(map(math.isfinite, values["A", name] + values["G", name])) for kind, name in values if kind == "G"
    }
    absent = {name for name in gradients if not any(values["gradient", name]) and not any(values.get(("G", name), ()))}
    return Found(sound, absent)
