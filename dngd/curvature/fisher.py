"""Which vectors are back-propagated to measure G, and what they estimate.

For a loss `ℓ(z, y) = -log p(y | z)` and the model's outputs z_s of seed s:

- **empirical**: the gradients of the losses themselves, at the true labels.
- **monte_carlo**: labels sampled from the model's own prediction, `∇_z ℓ(z_s, ŷ_s)`, ŷ_s ~ p(· | z_s). Its
  expectation is the Fisher.
- **ggn**: columns v_c of a square root of the loss's Hessian, `Σ_c v_c v_cᵀ = ∇²ℓ`, one backward a column
  with a random sign a seed, which leaves `Σ_s` in expectation where seeds share rows and changes
  nothing where they share none. For these losses the generalised Gauss-Newton matrix is the Fisher.

A weight w_s multiplies each vector by √w_s, so that the Fisher gets w_s.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

FisherKind = Literal["empirical", "monte_carlo", "ggn"]
LossKind = Literal["cross_entropy", "binary_cross_entropy", "squared_error"]
"""cross_entropy: over softmax(z); binary_cross_entropy: summed over independent sigmoid(z) columns;
squared_error: `‖z - y‖²`, summed over columns (torch's mse_loss further divides by their number)."""


def sampled_gradient(outputs: Tensor, loss: LossKind, generator: torch.Generator) -> Tensor:
    """Return `∇_z ℓ(z_s, ŷ_s)` for labels ŷ_s drawn from the model's prediction.

    outputs: z, [n, C]. generator: on the CPU, so that draws do not depend on the device.
    """
    z = outputs.detach().float() if outputs.dtype != torch.float64 else outputs.detach()
    if loss == "cross_entropy":
        probabilities = z.softmax(dim=1)
        labels = torch.multinomial(_drawable(probabilities), 1, generator=generator).to(z.device)
        return probabilities.scatter_add(1, labels, -torch.ones_like(labels, dtype=z.dtype))
    if loss == "binary_cross_entropy":
        probabilities = z.sigmoid()
        return probabilities - torch.bernoulli(_drawable(probabilities), generator=generator).to(z.device)
    # p(y | z) ∝ exp(-‖z - y‖²) is a normal with variance 1/2; ∇ = 2 (z - y).
    return (2**0.5) * torch.randn(z.shape, generator=generator, dtype=z.dtype, device="cpu").to(z.device)


def _drawable(probabilities: Tensor) -> Tensor:
    """Return probabilities on the CPU, a label of any kind where the model's output was not finite: the gradient
    stays so, and drops the step."""
    return torch.where(probabilities.isfinite().all(dim=1, keepdim=True), probabilities, 1.0).cpu()


def hessian_columns(outputs: Tensor, loss: LossKind) -> Iterator[Tensor]:
    """Yield v_c, [n, C], c = 1 ... C, with `Σ_c v_c v_cᵀ = ∇²_z ℓ` for every seed.

    cross_entropy: `v_c = √p_c (e_c - p)`; binary_cross_entropy: `√(p_c (1 - p_c)) e_c`; squared_error: `√2 e_c`.
    """
    z = outputs.detach().float() if outputs.dtype != torch.float64 else outputs.detach()
    for c in range(z.shape[1]):
        if loss == "cross_entropy":
            p = z.softmax(dim=1)
            column = -p
            column[:, c] += 1.0
            yield column * p[:, c : c + 1].sqrt()
            continue
        column = torch.zeros_like(z)
        if loss == "binary_cross_entropy":
            p_c = z[:, c].sigmoid()
            column[:, c] = (p_c * (1 - p_c)).sqrt()
        else:
            column[:, c] = 2**0.5
        yield column


def random_signs(count: int, generator: torch.Generator) -> Tensor:
    """Return independent signs ±1, [count]."""
    return torch.randint(0, 2, (count,), generator=generator, device="cpu").mul_(2).sub_(1)
