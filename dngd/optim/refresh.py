"""The life of a refresh: reduce statistics, invert, share, adopt, at fixed distances from its launch.

A refresh launched at step t is adopted by all ranks at step t + d, d = inverse_delay, waiting if it is
late. Its stages start at steps that depend on t and d alone, on the main thread, so that every rank
enqueues the same collectives in the same order: the all-reduce at t, the inversion (in a thread when
d > 0) at t + ⌈d/3⌉, the broadcasts of the inverses at t + ⌈2d/3⌉.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dngd.comm import (
    Communicator,
    Work,
    flatten,
    pack_triangle,
    triangle_size,
    unflatten,
    unpack_triangle,
)
from dngd.comm.assignment import Factor
from dngd.curvature import DampingMode, FactorStatistics, InverseResult, damped_inverse, damping_split


@dataclass
class LayerState:
    """Everything the preconditioner keeps for one layer.

    unfolded: this rank's sums since the last launch. folded: the sums over all ranks up to the last
    fold. decay: product of ρ since the last launch, which the next fold owes to `folded`.
    a_inverse, g_inverse: in use; launched_step: when their refresh was launched (-1: none yet).
    attempted_step: launch of the last refresh that ended, well or not; the same on all ranks, while
    escalations and failed_inversions count on the owner rank alone.
    """

    unfolded: FactorStatistics
    folded: FactorStatistics
    decay: float = 1.0
    a_inverse: Tensor | None = None
    g_inverse: Tensor | None = None
    launched_step: int = -1
    attempted_step: int = -1
    escalations: int = 0
    failed_inversions: int = 0


@dataclass(frozen=True)
class Damping:
    """What a refresh adds to the factors; see dngd.curvature.damping."""

    value: float
    mode: DampingMode
    g_ratio: float


@dataclass
class Refresh:
    """One refresh under way. `inverses[factor]` is None for an inversion that failed."""

    step: int
    adopt_step: int
    layers: tuple[str, ...]
    damping: Damping
    decays: dict[str, float]
    reduced: Tensor
    reduce_work: Work
    inversion: Future[dict[Factor, InverseResult]] | None = None
    share_buffers: dict[int, Tensor] = field(default_factory=dict)
    share_works: list[Work] = field(default_factory=list)
    inverses: dict[Factor, Tensor | None] = field(default_factory=dict)
    stage: str = "reduce"

    def stage_step(self, thirds: int) -> int:
        """Return the step at which `thirds` thirds of the delay have passed."""
        return self.step + math.ceil((self.adopt_step - self.step) * thirds / 3)


class RefreshPipeline:
    """Launches refreshes and moves those under way forward. Owns no statistics: it edits the LayerStates."""

    def __init__(
        self, states: Mapping[str, LayerState], owners: Mapping[Factor, int], communicator: Communicator
    ) -> None:
        self._states = states
        self._owners = owners
        self._comm = communicator
        self.discarded_statistics = 0
        """Refreshes whose reduced statistics were not finite and were left out, on all ranks alike."""
        self._under_way: list[Refresh] = []
        self._executor: ThreadPoolExecutor | None = None

    @property
    def under_way(self) -> tuple[Refresh, ...]:
        """The refreshes launched and not yet adopted, oldest first."""
        return tuple(self._under_way)

    def launch(self, step: int, layers: Sequence[str], damping: Damping, delay: int) -> None:
        """Start reducing the named layers' unfolded statistics, and forget them locally."""
        parts: list[Tensor] = []
        for name in layers:
            unfolded = self._states[name].unfolded
            parts += [pack_triangle(unfolded.a_sum), pack_triangle(unfolded.g_sum), unfolded.counts]
        reduced = flatten(parts)
        decays = {}
        for name in layers:
            state = self._states[name]
            state.unfolded.zero_()
            decays[name], state.decay = state.decay, 1.0
        work = self._comm.all_reduce(reduced, "factor", group="factor")
        self._under_way.append(Refresh(step, step + delay, tuple(layers), damping, decays, reduced, work))

    def advance(self, step: int) -> None:
        """Do every stage that is due at this step, in launch order, and adopt what has arrived."""
        for refresh in self._under_way:
            if refresh.stage == "reduce" and step >= refresh.stage_step(1):
                self._start_inversion(refresh)
            if refresh.stage == "invert" and step >= refresh.stage_step(2):
                self._start_sharing(refresh)
            if refresh.stage == "share" and step >= refresh.adopt_step:
                self._receive(refresh)
            if refresh.stage == "ready" and step >= refresh.adopt_step:
                self._adopt(refresh)
        self._under_way = [refresh for refresh in self._under_way if refresh.stage != "adopted"]

    def drain(self) -> None:
        """Bring every refresh to "ready" without adopting it; all ranks enter. The numbers do not change:
        a refresh works on what was frozen at its launch."""
        for refresh in self._under_way:
            if refresh.stage == "reduce":
                self._start_inversion(refresh)
            if refresh.stage == "invert":
                self._start_sharing(refresh)
            if refresh.stage == "share":
                self._receive(refresh)

    def forget(self) -> None:
        """Drop every refresh under way, after its collectives are over; all ranks enter."""
        self.drain()
        self._under_way.clear()

    def restore(self, refresh: Refresh) -> None:
        """Take up a refresh that a checkpoint holds as "ready"."""
        self._under_way.append(refresh)

    def close(self) -> None:
        """Stop the inversion thread."""
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)
            self._executor = None

    def _start_inversion(self, refresh: Refresh) -> None:
        refresh.reduce_work.wait()
        self._fold(refresh)
        mine = [f for name in refresh.layers for f in ((name, "A"), (name, "G")) if self._is_mine(f)]
        # Snapshot the factors now: the folded sums may move on before the thread reads them.
        jobs = self._damped_factors(refresh, mine)
        if refresh.adopt_step > refresh.step:
            if self._executor is None:
                self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="dngd-invert")
            refresh.inversion = self._executor.submit(_invert_all, jobs)
        else:
            refresh.inversion = Future()
            refresh.inversion.set_result(_invert_all(jobs))
        refresh.stage = "invert"

    def _is_mine(self, factor: Factor) -> bool:
        return self._owners[factor] == self._comm.rank

    def _fold(self, refresh: Refresh) -> None:
        sizes: list[tuple[int, ...]] = []
        for name in refresh.layers:
            folded = self._states[name].folded
            sizes += [
                (triangle_size(folded.a_sum.shape[0]),),
                (triangle_size(folded.g_sum.shape[0]),),
                (2,),
            ]
        parts = iter(unflatten(refresh.reduced, sizes))
        # Rows can overflow where gradients did not. The reduced sums are alike on all ranks, so all of them
        # forget these statistics together; the folded ones stay sound.
        sound = bool(torch.isfinite(refresh.reduced).all())
        self.discarded_statistics += not sound
        for name in refresh.layers:
            folded = self._states[name].folded
            folded.decay_(refresh.decays[name])
            if not sound:
                continue
            folded.a_sum += unpack_triangle(next(parts), folded.a_sum.shape[0])
            folded.g_sum += unpack_triangle(next(parts), folded.g_sum.shape[0])
            folded.counts += next(parts)

    def _damped_factors(self, refresh: Refresh, wanted: Sequence[Factor]) -> dict[Factor, tuple[Tensor, Tensor]]:
        jobs: dict[Factor, tuple[Tensor, Tensor]] = {}
        for name in refresh.layers:
            factors = self._states[name].folded.factors()
            if factors is None:
                continue
            damping = refresh.damping
            lambda_a, lambda_g = damping_split(factors.A, factors.G, damping.value, damping.mode, damping.g_ratio)
            if (name, "A") in wanted:
                jobs[name, "A"] = (factors.A, lambda_a)
            if (name, "G") in wanted:
                jobs[name, "G"] = (factors.G, lambda_g)
        return jobs

    def _start_sharing(self, refresh: Refresh) -> None:
        assert refresh.inversion is not None
        results = refresh.inversion.result()
        for (name, _), result in results.items():
            self._states[name].escalations += result.escalations
            self._states[name].failed_inversions += result.inverse is None
        mine = {factor: result.inverse for factor, result in results.items()}
        if self._comm.world_size == 1:
            refresh.inverses = {f: mine.get(f) for n in refresh.layers for f in ((n, "A"), (n, "G"))}
            refresh.stage = "ready"
            return
        for owner, factors in self._by_owner(refresh).items():
            if owner == self._comm.rank:
                buffer = flatten([part for factor in factors for part in self._packed(factor, mine.get(factor))])
            else:
                size = sum(1 + triangle_size(self._dimension(factor)) for factor in factors)
                buffer = torch.empty(size, dtype=refresh.reduced.dtype, device=refresh.reduced.device)
            refresh.share_buffers[owner] = buffer
            refresh.share_works.append(self._comm.broadcast(buffer, owner, "inverse", group="factor"))
        refresh.stage = "share"

    def _by_owner(self, refresh: Refresh) -> dict[int, list[Factor]]:
        by_owner: dict[int, list[Factor]] = {}
        for name in refresh.layers:
            for factor in ((name, "A"), (name, "G")):
                by_owner.setdefault(self._owners[factor], []).append(factor)
        return dict(sorted(by_owner.items()))

    def _dimension(self, factor: Factor) -> int:
        folded = self._states[factor[0]].folded
        return (folded.a_sum if factor[1] == "A" else folded.g_sum).shape[0]

    def _packed(self, factor: Factor, inverse: Tensor | None) -> list[Tensor]:
        folded = self._states[factor[0]].folded
        if inverse is None:
            return [folded.counts.new_zeros(1 + triangle_size(self._dimension(factor)))]
        return [folded.counts.new_ones(1), pack_triangle(inverse)]

    def _receive(self, refresh: Refresh) -> None:
        for work in refresh.share_works:
            work.wait()
        for owner, factors in self._by_owner(refresh).items():
            sizes = [(size,) for f in factors for size in (1, triangle_size(self._dimension(f)))]
            parts = iter(unflatten(refresh.share_buffers[owner], sizes))
            for factor in factors:
                arrived, triangle = bool(next(parts) > 0), next(parts)
                inverse = unpack_triangle(triangle, self._dimension(factor)) if arrived else None
                refresh.inverses[factor] = inverse
        refresh.share_buffers.clear()
        refresh.stage = "ready"

    def _adopt(self, refresh: Refresh) -> None:
        for name in refresh.layers:
            self._states[name].attempted_step = refresh.step
            a_inverse, g_inverse = refresh.inverses[name, "A"], refresh.inverses[name, "G"]
            if a_inverse is None or g_inverse is None:
                continue  # the last good pair stays; counted where the inversion failed
            state = self._states[name]
            state.a_inverse, state.g_inverse, state.launched_step = a_inverse, g_inverse, refresh.step
        refresh.stage = "adopted"


def _invert_all(jobs: Mapping[Factor, tuple[Tensor, Tensor]]) -> dict[Factor, InverseResult]:
    results = {}
    for factor, (matrix, damping) in jobs.items():
        usable = bool(torch.isfinite(damping)) and bool(damping > 0)
        results[factor] = damped_inverse(matrix, damping) if usable else InverseResult(None, float(damping), 0)
    return results
