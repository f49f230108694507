"""Damping where only the training set's size and the number of classes are known."""

from __future__ import annotations

import math
from typing import TypedDict

UNKNOWN_DAMPING = 1e-3
UNKNOWN_G_RATIO = 30.0
A_SHARE = 0.1
A_SHARE_OF_CLASSES = 1.0
G_SHARE = 0.5
FULL_BATCH_G_SHARE = 0.01


class RelativeDamping(TypedDict):
    """Arguments of NaturalGradient and KFACPreconditioner with damping_mode="relative"."""

    damping: float
    damping_g_ratio: float


def default_damping(
    num_samples: int | None = None,
    num_classes: int | None = None,
    *,
    damping: float | None = None,
    full_batch: bool = False,
) -> RelativeDamping:
    """Return λ_A = min(0.1, 1/C)/√n of tr A and λ_G = 0.5/C of tr G, n training samples and C classes.

    >>> default_damping(num_samples=10_000, num_classes=5)
    {'damping': 0.001, 'damping_g_ratio': 100.0}

    Give them on as `NaturalGradient(model, **default_damping(len(train_nodes), num_classes))`.

    What λ_A leaves to be fitted are directions of the input that n labels can tell from noise: with few labels weaker
    damping fits the noise, with many stronger damping only takes longer. What tells C classes apart are at least C - 1
    of these directions, each with a smaller share of tr A the more there are. G of a softmax over C classes has about C
    eigenvalues that matter, and tr G/C is their mean: λ_G half as large evens them out only in part, alike for few
    classes and many.

    full_batch: whether each step is of all n samples: λ_G is then 0.01 of tr G, which took the fewest steps to Adam's
    accuracy in such loops (docs/defaults.md, 33, with lr=0.2, which NaturalGradient is to be given).

    n unknown: λ_A = 1e-3. C unknown: λ_A as for few classes, λ_G/λ_A = 30. damping: λ_A itself; λ_G as before.
    """
    if damping is None:
        share = min(A_SHARE, A_SHARE_OF_CLASSES / num_classes) if num_classes else A_SHARE
        damping = UNKNOWN_DAMPING if not num_samples else share / math.sqrt(num_samples)
    if full_batch:
        ratio = FULL_BATCH_G_SHARE / damping
    else:
        ratio = UNKNOWN_G_RATIO if not num_classes else G_SHARE / num_classes / damping
    return {"damping": damping, "damping_g_ratio": ratio}
