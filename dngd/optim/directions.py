"""Preconditioned gradients of layers whose inverses one rank alone holds: that rank computes, all of them get."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dngd.comm import Communicator
from dngd.optim.layers import CurvatureLayer


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
