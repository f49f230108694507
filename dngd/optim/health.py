"""What a person needs to see why training with curvature goes wrong, and a table of what is preconditioned."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dngd.curvature import FactorStructure, Tensors
from dngd.optim.layer_state import LayerState
from dngd.optim.layers import CurvatureLayer

if TYPE_CHECKING:
    from dngd.optim.preconditioner import KFACPreconditioner

POWER_ITERATIONS = 30


def layer_health(layer: CurvatureLayer, state: LayerState, pre: KFACPreconditioner) -> dict[str, float]:
    """Return one layer's numbers; computed when asked for, from the statistics that this rank holds.

    staleness: steps since the launch of the inverse in use (-1: none yet). a_condition, g_condition:
    (σ_max + λ)/λ, an upper bound of the damped factors' condition numbers, with σ_max by power iteration, which stays
    a few percent below where the largest eigenvalues lie close (NaN before the first refresh). a_damping_share,
    g_damping_share: `λ d / (tr M + λ d)`, how much of the damped factor is damping: near 1 the layer takes plain
    gradient steps. escalations, failed_inversions, reused_inversions: of the factors this rank owns. scale: ν of the
    last step, the KL clip's and norm constraint's.
    non_finite_statistics, dropped_steps: of the whole preconditioner.
    """
    out = {
        "staleness": float(pre.steps - state.launched_step) if state.launched_step >= 0 else -1.0,
        "escalations": float(state.escalations),
        "failed_inversions": float(state.failed_inversions),
        "reused_inversions": float(state.reused_inversions),
        "scale": float(pre.last_scale),
        "non_finite_statistics": float(pre.non_finite_statistics + pre.pipeline.discarded_statistics),
        "dropped_steps": float(pre.dropped_steps),
    }
    averages = state.folded.averages()
    for which, i in (("a", 0), ("g", 1)):
        lam = state.damping[i]
        known = averages is not None and lam > 0
        structure = state.structure(which.upper())
        sigma = _largest_eigenvalue(structure, averages[i]) if known and averages is not None else float("nan")
        trace = float(structure.diagonal(averages[i]).sum()) if averages is not None else float("nan")
        total = trace + lam * structure.dimension
        out[f"{which}_condition"] = (sigma + lam) / lam if known else float("nan")
        out[f"{which}_damping_share"] = lam * structure.dimension / total if known and total > 0 else float("nan")
    return out


def _largest_eigenvalue(structure: FactorStructure, averages: Tensors) -> float:
    generator = torch.Generator().manual_seed(structure.dimension)
    vector: Tensor = torch.rand(structure.dimension, generator=generator, device="cpu").to(averages[0])
    times, value = structure.operator(averages), 0.0
    for _ in range(POWER_ITERATIONS):
        vector = times(vector / torch.linalg.vector_norm(vector).clamp_min(1e-30))
        value = float(torch.linalg.vector_norm(vector))
        if value == 0.0:
            break
    return value


def layer_table(pre: KFACPreconditioner) -> str:
    """Return a plain-text table: layer, kind, factors, bytes of statistics and inverses, inversion flops, owners."""
    header = ["layer", "kind", "A", "G", "memory", "inversion", "owners"]
    rows = [header]
    for name, layer in pre.layers.items():
        state = pre.states[name]
        held = [*state.folded.tensors(), *(state.unfolded.tensors() if state.unfolded is not None else ())]
        size = sum(t.numel() * t.element_size() for t in held)
        size += sum(pre.pipeline.inverse_bytes(s, layer.dtype) for s in (state.a, state.g))
        cost = layer.a.inversion_cost + layer.g.inversion_cost
        rows.append(
            [
                name,
                layer.kind,
                layer.a.label,
                layer.g.label,
                f"{size / 2**20:.2f} MiB",
                f"{cost / 1e6:.1f} Mflop",
                f"{pre.plan().owners[name, 'A']}, {pre.plan().owners[name, 'G']}",
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    if pre.left_over:
        lines.append("plain gradient: " + ", ".join(pre.left_over))
    return "\n".join(lines)
