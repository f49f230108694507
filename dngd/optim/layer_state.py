"""What the preconditioner keeps of one layer, from step to step."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dngd.curvature import FactorStatistics, FactorStructure
from dngd.optim.inverses import StoredInverse, Wanted


@dataclass
class LayerState:
    """Everything the preconditioner keeps for one layer.

    a, g: the factors' structures. has_ones: whether A's last row is the bias's 1. unfolded: this rank's sums since the
    last launch; None on a single rank,
    where every sum is folded at once. folded: the sums over all ranks up to the last fold. decay: product
    of ρ since the last launch, which the next fold owes to `folded`. inverses: in use, by "A" and "G";
    launched_step: when their refresh was launched (-1: none yet). attempted_step: launch of the last
    refresh that ended, well or not; the same on all ranks, while escalations, failed and reused
    inversions count on the owner rank alone. probes: `M p` of the factors that were last inverted, p a fixed
    vector, and damping (λ_A, λ_G): what tells a factor that did not change. holder: the one rank that has the
    inverses in use and applies them; None where every rank has them. forms: of the inverses in use, alike on all
    ranks, also on those that do not have them.
    """

    a: FactorStructure
    g: FactorStructure
    unfolded: FactorStatistics | None
    folded: FactorStatistics
    has_ones: bool = False
    decay: float = 1.0
    inverses: dict[str, StoredInverse] = field(default_factory=dict)
    launched_step: int = -1
    attempted_step: int = -1
    escalations: int = 0
    failed_inversions: int = 0
    reused_inversions: int = 0
    probes: dict[str, Tensor] = field(default_factory=dict)
    damping: tuple[float, float] = (0.0, 0.0)
    holder: int | None = None
    forms: dict[str, Wanted] = field(default_factory=dict)

    def structure(self, which: str) -> FactorStructure:
        """Return the structure of factor "A" or "G"."""
        return self.a if which == "A" else self.g

    def is_exact(self, which: str, computed: torch.dtype) -> bool:
        """Return whether the inverse in use is kept as computed; the same on all ranks."""
        if which in self.forms:
            return self.forms[which].dtype is None
        return self.inverses[which].is_exact(computed)
