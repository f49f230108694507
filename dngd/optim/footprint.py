"""What a layer's curvature takes, from its sizes alone: before there is a model."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dngd.curvature import FactorLayout, FactorStatistics
from dngd.optim.inverses import PRECISIONS, InversePrecision, Wanted


@dataclass(frozen=True)
class Footprint:
    """Bytes of one layer's curvature in float32.

    statistics: one copy of its sums, also what a reduction sends. inverses: as kept. inverses_sent: as shared.
    a, g: the factors' structures in words.
    """

    statistics: int
    inverses: int
    inverses_sent: int
    a: str
    g: str


def layer_footprint(
    d_a: int, d_g: int, parts: tuple[int, ...], layout: FactorLayout, precision: InversePrecision, *, eigenbasis: bool
) -> Footprint:
    """Return the footprint of a layer with factors A [d_a, d_a] and G [d_g, d_g].

    parts: sizes of the input's own blocks (adding up to d_a), () for none. eigenbasis: whether bases are kept
    (EKFAC, Adam in the eigenbasis) instead of inverses.
    """
    layout = layout.for_eigenbases() if eigenbasis else layout
    a, g = layout.input_structure(d_a, parts), layout.output_structure(d_g)
    sums = FactorStatistics.zeros(a, g, dtype=torch.float32, device=torch.device("meta"))
    wanted = Wanted(eigenbasis=eigenbasis, dtype=PRECISIONS[precision])
    return Footprint(
        statistics=sum(t.numel() for t in sums.tensors()) * torch.float32.itemsize,
        inverses=sum(wanted.kept_bytes(structure, torch.float32) for structure in (a, g)),
        inverses_sent=sum(wanted.wire_bytes(structure, torch.float32) for structure in (a, g)),
        a=a.label,
        g=g.label,
    )
