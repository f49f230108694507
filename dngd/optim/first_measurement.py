"""What the first measured step tells of a loop that uses K-FAC wrongly: said in a warning, once."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from dngd.curvature import read_together
from dngd.optim.arguments import LossReduction
from dngd.optim.capture import Capture
from dngd.optim.layers import CurvatureLayer

LEAST_RATIO = 1e-3
"""Of a gradient's norm to what its rows' norms give without anything in common, see was_scaled."""


def check_first_measurement(
    layers: Mapping[str, CurvatureLayer],
    capture: Capture,
    num_samples: float,
    loss_reduction: LossReduction,
    device: torch.device,
) -> None:
    """Warn of a GradScaler that K-FAC was not told of, and of a num_samples that cannot be the loss's.

    Before the pending rows are committed; the first takes a host synchronisation, on `device`. Nothing can be said of
    the paper's factors, nor of a scale where the loss is a sum: by now `.grad` may be a mean over others' seeds, too.
    """
    if capture.variant != "dngd":
        return
    may_be_scaled = capture.fisher == "empirical" and capture.loss_scale is None and loss_reduction == "mean"
    if may_be_scaled and was_scaled(layers, device):
        warnings.warn(
            "the gradients are far smaller than those that K-FAC saw in the backward pass, so that G is too large and "
            "steps are too short; with a GradScaler give loss_scale=scaler.get_scale (gradients that were clipped to "
            "less than a thousandth, and a model at its optimum, look alike)",
            stacklevel=3,
        )
    if num_samples == 0 and any(reach.num_reached for reach in (capture.seen or {}).values()):
        warnings.warn(
            "step(num_samples=0), but the loss has a gradient; give the number of seeds that it averages over, or the "
            "layers keep their plain gradient (0 is of a rank without seeds)",
            stacklevel=3,
        )
        return
    reached = rows_instead_of_seeds(capture, num_samples)
    if reached:
        warnings.warn(
            f"step(num_samples={num_samples:.10g}), but the loss has a gradient at the first {reached} rows alone; "
            "give the number of seeds that it averages over (of a batch of PyG's NeighborLoader: batch.batch_size), or "
            "K-FAC takes its curvature for larger than it is",
            stacklevel=3,
        )


def rows_instead_of_seeds(capture: Capture, num_samples: float) -> int:
    """Return at how many rows the loss has a gradient, if num_samples counts others too; else 0.

    As of a sampled batch, whose seeds are its first rows and a minority: the layer with fewest of them, which is the
    last one, has a gradient at its first rows alone, and num_samples is all that it has. Zeros among the rows may be
    those of a loss that is satisfied, and other numbers of samples those of pairs of rows: nothing is said of these.
    """
    layers = [reach for reach in (capture.seen or {}).values() if reach.num_reached]
    if not layers:
        return 0
    last = min(layers, key=lambda reach: reach.num_reached)
    is_doubtful = last.are_first and num_samples == last.num_rows and 2 * last.num_reached < num_samples
    return last.num_reached if is_doubtful else 0


def was_scaled(layers: Mapping[str, CurvatureLayer], device: torch.device) -> bool:
    """Return whether the pending rows are of a loss that was scaled, and the gradients not any more, as a GradScaler
    leaves them; one host synchronisation, on `device`.

    A layer's gradient is `Σ g mᵀ` over n rows, of norm `r √(Σ‖g‖² Σ‖m‖²)` with r <= 1, and about 1/√n where rows have
    nothing in common. Scaled by S in between, it is r/S: told where r is below 1/(1000 √n) in every layer.
    """
    found: list[Tensor] = []
    for layer in layers.values():
        gradient = layer.gradient()
        if layer.pending is not None and gradient is not None:
            traces = [layer.a.diagonal(layer.pending.a).sum(), layer.g.diagonal(layer.pending.g).sum()]
            norm = torch.linalg.vector_norm(gradient, dtype=layer.dtype)
            found += [number.to(device) for number in (*traces, norm, layer.pending.counts[0])]
    numbers = iter(read_together(found))
    ratios = []
    for inputs, gradients, norm, rows in zip(numbers, numbers, numbers, numbers):
        size = math.sqrt(inputs) * math.sqrt(gradients)
        if 0 < size < math.inf and norm > 0:
            ratios.append(norm * math.sqrt(rows) / size)
    return bool(ratios) and max(ratios) < LEAST_RATIO
