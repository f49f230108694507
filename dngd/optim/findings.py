"""What the ranks find, alike, of the factors of a refresh: what may be rounded on the way, and what did not change.

Everything is computed from reduced numbers, which all ranks hold alike, and agreed on where ranks round differently:
what comes over the wire, and in how many bytes, follows from it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.linalg import vector_norm

from dngd.comm import Agreement, Communicator
from dngd.comm.assignment import Factor
from dngd.curvature import DampingMode, Tensors, damping_split, read_together, vectors_on_host
from dngd.optim.inverses import Wanted
from dngd.optim.layer_state import LayerState

LEAST_COUNT = 1e-20
"""Decayed number of a layer's rows below which nothing is made of its sums, and its last inverses stay: it was frozen a
thousand factor steps ago, and what is left is soon below what a float32 can hold."""


@dataclass(frozen=True)
class Damping:
    """What a refresh adds to the factors; see dngd.curvature.damping."""

    value: float
    mode: DampingMode
    g_ratio: float

    def split(self, state: LayerState, a_diagonal: Tensor, g_diagonal: Tensor) -> tuple[Tensor, Tensor]:
        """Return (λ_A, λ_G) of a layer whose factors have these diagonals."""
        return damping_split(a_diagonal, g_diagonal, self.value, self.mode, self.g_ratio, has_ones=state.has_ones)


@dataclass(frozen=True)
class Measured:
    """What is found of a reduced factor; is_unchanged and rounds by all ranks alike, once they agreed.

    averages: M. damping: λ. probe: `M p`. is_unchanged: since its inversion; rounds: its inverse may be rounded.
    """

    factor: Factor
    averages: Tensors
    damping: float
    probe: Tensor
    is_unchanged: bool
    rounds: bool


def bears_rounding(damping: float, wire: torch.dtype, trace: float = 1.0) -> bool:
    """Return whether a factor M with this λ and trace may travel rounded to `wire`: where `λ >= 2u·tr M`.

    With each entry's relative error at most u, once on its own rank and once as a sum, `‖E‖ <= 2u·tr M`:
    `M + E + λI` then stays positive definite even if every error had the worst sign. Errors of random signs add up to
    far less, and error feedback takes them back at the next refresh. bfloat16 has u = 2⁻⁸: a share of 1/128 passes.
    """
    return damping >= torch.finfo(wire).eps * trace


def device_of(states: Mapping[str, LayerState], layers: Sequence[str]) -> torch.device:
    """Return where the layers' statistics are."""
    return states[layers[0]].folded.counts.device


class Findings:
    """See the module. The arguments are those of RefreshPipeline."""

    def __init__(
        self,
        states: Mapping[str, LayerState],
        communicator: Communicator,
        wanted: Wanted,
        change_threshold: float,
        factor_wire: torch.dtype | None,
    ) -> None:
        self._states = states
        self._comm = communicator
        self._agreement = Agreement(communicator)
        self._wanted = wanted
        self._change_threshold = change_threshold
        self._factor_wire = factor_wire

    def bear_rounding(self, layers: Sequence[str], damping: Damping) -> set[Factor]:
        """Return the factors whose sums may travel rounded, alike on all ranks."""
        if self._factor_wire is None or self._comm.world_size == 1:
            return set()
        found = {
            (name, which): bears
            for name in layers
            for which, bears in self._bears_rounding(self._states[name], damping).items()
        }
        agreed = self._agreement.of_all(list(found.values()), device_of(self._states, layers))
        return {factor for factor, bears in zip(found, agreed) if bears}

    def _bears_rounding(self, state: LayerState, damping: Damping) -> dict[str, bool]:
        """Return for each factor whether its sums may travel rounded, by the folded sums.

        The first reduction, of a factor that nothing is known of, is not rounded.
        """
        out = {"A": False, "G": False}
        averages_known = float(state.folded.counts.min()) > 0
        if self._factor_wire is None or state.folded.counts.dtype != torch.float32 or not averages_known:
            return out
        diagonals = [
            state.structure(which).diagonal(state.folded.sums(which)) / state.folded.counts[i]
            for i, which in enumerate("AG")
        ]
        split = damping.split(state, *diagonals)
        for which, diagonal, lam in zip("AG", diagonals, split):
            is_damped = bears_rounding(float(lam), self._factor_wire, float(diagonal.sum()))
            out[which] = state.structure(which).bears_rounding and is_damped
        return out

    def measure(self, layers: Sequence[str], damping: Damping) -> list[Measured]:
        """Return those factors of these layers that have statistics. All ranks enter, and find the same."""
        found = self._measured(layers, damping)
        answers = [answer for m in found for answer in (m.is_unchanged, m.rounds)]
        agreed = iter(self._agreement.of_all(answers, device_of(self._states, layers)))
        return [replace(m, is_unchanged=next(agreed), rounds=next(agreed)) for m in found]

    def _measured(self, layers: Sequence[str], damping: Damping) -> list[Measured]:
        # Each read makes the host wait for a GPU: one for the counts, one for all that is found of the factors. What
        # follows from the diagonals takes many small steps, each of which costs it more there than here.
        fewest = read_together([self._states[name].folded.counts.min() for name in layers])
        factors: list[tuple[Factor, Tensors, Tensor]] = []
        vectors: list[Tensor] = []
        for name, count in zip(layers, fewest):
            if not count > LEAST_COUNT:
                continue
            state = self._states[name]
            for which, sums in zip("AG", state.folded.quotients()):
                structure = state.structure(which)
                probe, before = structure.probe(sums), state.probes.get(which)
                factors.append(((name, which), sums, probe))
                # Of a factor without a probe nothing is known, and neither norm is asked for.
                norms = [] if before is None else [vector_norm(probe - before)[None], vector_norm(before)[None]]
                vectors += [structure.diagonal(sums), *norms]
        found = iter(vectors_on_host(vectors))
        diagonals: dict[Factor, Tensor] = {}
        moves: dict[Factor, list[float]] = {}
        for (name, which), _, _ in factors:
            diagonals[name, which] = next(found)
            moves[name, which] = [float(next(found)) for _ in range(2 * (which in self._states[name].probes))]
        dampings: dict[Factor, float] = {}
        for name in dict.fromkeys(name for name, _ in diagonals):
            split = damping.split(self._states[name], diagonals[name, "A"], diagonals[name, "G"])
            dampings[name, "A"], dampings[name, "G"] = map(float, split)
        out = []
        for factor, sums, probe in factors:
            state, which = self._states[factor[0]], factor[1]
            lam, old = dampings[factor], state.damping["AG".index(which)]
            is_unchanged = False
            if which in state.inverses and which in state.probes:
                moved, size = moves[factor]
                is_unchanged = self._is_unchanged(moved, size, old, lam, probe.dtype)
            rounds = self._wanted.rounds(float(diagonals[factor].sum()), lam)
            out.append(Measured(factor, sums, lam, probe, is_unchanged, rounds))
        return out

    def _is_unchanged(self, moved: float, size: float, old_damping: float, damping: float, dtype: torch.dtype) -> bool:
        """Return whether `‖(M - M₀) p‖ <= t ‖M₀ p‖` and λ moved by no more, t the threshold or a sum's rounding.

        moved, size: these norms; where M p is not finite, neither is the first. dtype: of the sums.
        """
        rounding = 200 * torch.finfo(dtype).eps
        limit = max(self._change_threshold, rounding)
        is_near = math.isfinite(moved) and moved / max(size, 1e-300) <= limit
        # An eigenbasis does not depend on the damping.
        return is_near and (self._wanted.eigenbasis or abs(damping - old_damping) <= limit * old_damping)
