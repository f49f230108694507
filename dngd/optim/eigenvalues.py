"""EKFAC: the second moments of the per-row gradients in the factors' eigenbasis, on a period of their own.

George et al. 2018: among all matrices `(Q_A ⊗ Q_G) diag(s) (Q_A ⊗ Q_G)ᵀ` the nearest to the Fisher has
`s = E[(Q_Gᵀ g mᵀ Q_A)²]`; K-FAC's is the special case s = e_G e_Aᵀ. The sums start again whenever a layer
adopts a new basis, and until the first of them are in use K-FAC's own eigenvalues are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dngd.comm import Communicator, flatten, unflatten
from dngd.curvature import entries_are_finite
from dngd.optim.layer_state import LayerState
from dngd.optim.layers import CurvatureLayer
from dngd.optim.schedules import Period, period_at


@dataclass
class ScaleState:
    """One layer's sums in the basis of refresh `basis_step`: this rank's sum and count, and the scales in use."""

    basis_step: int
    sum: Tensor
    count: float = 0.0
    scales: Tensor | None = None


class EigenvalueCorrection:
    """Keeps every layer's scales s, [d_g, d_a]. period: steps between two reductions of their sums."""

    def __init__(
        self,
        layers: Mapping[str, CurvatureLayer],
        states: Mapping[str, LayerState],
        communicator: Communicator,
        period: Period,
    ) -> None:
        self._layers = layers
        self._states = states
        self._comm = communicator
        self._period = period
        self.by_layer: dict[str, ScaleState] = {}

    def scales(self, name: str) -> Tensor | None:
        """Return s of a layer, None until the first sums in the present basis are reduced."""
        state = self.by_layer.get(name)
        return None if state is None else state.scales

    def commit(self, rho: float, num_samples: float, factor: float, absent: Collection[str] = ()) -> None:
        """Fold the pending sums: `S ← ρS + ΔS`, `c ← ρc + n`. factor: what turns them into the summed loss's.

        Of a step in which a layer has no gradient, since it was frozen, say, neither rows nor seeds count; nor of one
        in which it is `absent`.
        """
        is_measured = any(layer.pending is not None for layer in self._layers.values())
        for name, state in self.by_layer.items():
            pending = self._layers[name].pending_scales
            state.sum.mul_(rho)
            state.count *= rho
            if pending is not None and entries_are_finite([pending]):
                state.sum.add_(pending, alpha=factor)
                state.count += 0 if name in absent else num_samples
            elif pending is None and is_measured and self._layers[name].has_gradient and name not in absent:
                state.count += num_samples

    def advance(self, step: int) -> None:
        """Follow newly adopted bases; on its period reduce the sums, in layer order. All ranks enter."""
        self.follow_bases()
        if step % period_at(self._period, step) != 0:
            return
        names = list(self.by_layer)
        if not names:
            return
        like = self.by_layer[names[0]].sum
        counts = torch.tensor([self.by_layer[n].count for n in names], dtype=like.dtype, device=like.device)
        flat = flatten([*(self.by_layer[n].sum for n in names), counts])
        self._comm.all_reduce(flat, "factor", group="factor").wait()
        *sums, totals = unflatten(flat, [*(tuple(self.by_layer[n].sum.shape) for n in names), (len(names),)])
        for name, total, count in zip(names, sums, totals.tolist()):
            if count > 0:
                self.by_layer[name].scales = total / count

    def follow_bases(self) -> None:
        """Start again where a layer has a new basis, and let the layer measure in it."""
        for name, state in self._states.items():
            if state.launched_step < 0 or len(state.inverses) < 2:
                continue
            if name in self.by_layer and self.by_layer[name].basis_step == state.launched_step:
                continue
            layer = self._layers[name]
            layer.basis = (state.inverses["A"].tensors, state.inverses["G"].tensors)
            zeros = torch.zeros(state.g.dimension, state.a.dimension, dtype=layer.dtype, device=layer.device)
            self.by_layer[name] = ScaleState(state.launched_step, zeros)

    def restore(self, name: str, saved: ScaleState) -> None:
        """Put back a layer's sums and scales, after its inverses were restored."""
        state = self._states[name]
        self._layers[name].basis = (state.inverses["A"].tensors, state.inverses["G"].tensors)
        self.by_layer[name] = saved

    def forget(self) -> None:
        """Drop everything, before a state is loaded."""
        self.by_layer.clear()
        for layer in self._layers.values():
            layer.basis = None

    def tensors(self) -> list[Tensor]:
        """Return everything held, for counting memory."""
        return [t for s in self.by_layer.values() for t in (s.sum, s.scales) if t is not None]
