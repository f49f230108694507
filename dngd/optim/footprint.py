"""What a layer's curvature takes, from its sizes alone: before there is a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from dngd.curvature import FactorLayout, FactorStatistics
from dngd.optim.findings import bears_rounding
from dngd.optim.inverses import PRECISIONS, WIRES, FactorWire, InversePrecision, Wanted
from dngd.optim.plan import LayerSizes, StrategyChoice, initial_strategies, make_plan


@dataclass(frozen=True)
class Footprint:
    """Bytes of one layer's curvature in float32.

    statistics: one copy of its sums. statistics_sent: what a reduction sends, once the factors are known (the first
    one, and factors whose damping could not bear rounding, travel in float32). inverses: as kept. inverses_sent: as
    shared. inversion_flops: of A and G. a, g: the factors' structures in words.
    """

    statistics: int
    statistics_sent: int
    inverses: int
    inverses_sent: int
    inversion_flops: tuple[float, float]
    a: str
    g: str


def layer_footprint(
    d_a: int,
    d_g: int,
    parts: tuple[int, ...],
    layout: FactorLayout,
    precision: InversePrecision,
    *,
    eigenbasis: bool,
    factor_wire: FactorWire = "float32",
    shares: tuple[float, float] | None = None,
) -> Footprint:
    """Return the footprint of a layer with factors A [d_a, d_a] and G [d_g, d_g].

    parts: sizes of the input's own blocks (adding up to d_a), () for none. eigenbasis: whether bases are kept
    (EKFAC, Adam in the eigenbasis) instead of inverses. shares: λ of A and of G as shares of their traces, which say
    whether they may be rounded; None: unknown, as if they all might.
    """
    layout = layout.for_eigenbases() if eigenbasis else layout
    a, g = layout.input_structure(d_a, parts), layout.output_structure(d_g)
    sums = FactorStatistics.zeros(a, g, dtype=torch.float32, device=torch.device("meta"))
    wanted = Wanted(eigenbasis=eigenbasis, dtype=PRECISIONS[precision])
    wire = WIRES[factor_wire]
    sent = 2 * torch.float32.itemsize  # the counts
    kept = shared = 0
    for structure, tensors, share in ((a, sums.a, shares and shares[0]), (g, sums.g, shares and shares[1])):
        bears = wire is not None and structure.bears_rounding and (share is None or bears_rounding(share, wire))
        sent += (wire if wire is not None and bears else torch.float32).itemsize * sum(t.numel() for t in tensors)
        form = wanted if eigenbasis or share is None or wanted.rounds(1.0, share) else replace(wanted, dtype=None)
        kept += form.kept_bytes(structure, torch.float32)
        shared += form.wire_bytes(structure, torch.float32)
    return Footprint(
        statistics_sent=sent,
        inversion_flops=(a.inversion_cost, g.inversion_cost),
        statistics=sum(t.numel() for t in sums.tensors()) * torch.float32.itemsize,
        inverses=kept,
        inverses_sent=shared,
        a=a.label,
        g=g.label,
    )


def inverse_bytes_held(footprints: Mapping[str, Footprint], strategy: StrategyChoice, world_size: int) -> int:
    """Return the most bytes of inverses that a rank keeps, by the assumed plan that a run starts with."""
    sizes = {name: LayerSizes(f.inversion_flops, f.inverses_sent, 0) for name, f in footprints.items()}
    plan = make_plan(0, sizes, initial_strategies(sizes, strategy), world_size)
    held = [0] * world_size
    for name, footprint in footprints.items():
        holder = plan.holder(name)
        for rank in range(world_size):
            held[rank] += footprint.inverses if holder in (None, rank) else 0
    return max(held)
