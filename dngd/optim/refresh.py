"""The life of a refresh: reduce statistics, invert, share, adopt, at fixed distances from its launch.

A refresh launched at step t is adopted by all ranks at step t + d, d = inverse_delay, waiting if it is
late. Its stages start at steps that depend on t and d alone, on the main thread, so that every rank
enqueues the same collectives in the same order: the all-reduce at t, the inversion (in a thread when
d > 0) at t + ⌈d/3⌉, the broadcasts of the inverses at t + ⌈2d/3⌉. Who inverts and what is shared says the plan
(dngd.optim.plan) in force at t, to the end of that refresh.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dngd.comm import Communicator, RoundedReduction, Work, flatten, unflatten
from dngd.comm.assignment import Factor
from dngd.curvature import FactorStatistics, FactorStructure, Tensors, entries_are_finite
from dngd.optim.findings import Damping, Findings, device_of
from dngd.optim.inverses import HELD_ELSEWHERE, Decomposition, StoredInverse, Wanted, decompose, from_bytes, to_bytes
from dngd.optim.layer_state import LayerState
from dngd.optim.plan import Plan

Job = tuple[FactorStructure, Tensors, float, Wanted]
"""A factor to invert: structure, averages, λ, and the form that is wanted."""


@dataclass
class Refresh:
    """One refresh under way. `inverses[factor]` is None for an inversion that failed.

    plan: in force at its launch; None for a refresh that was restored, whose inverses all ranks have.
    reduced: sums that travel as they are; rounded: those that travel rounded, in the layers' order, and reduction,
    which carries them. late: what rounding their sum left to this rank, owed to its unfolded sums at the adoption.
    """

    step: int
    adopt_step: int
    layers: tuple[str, ...]
    damping: Damping
    decays: dict[str, float]
    reduced: Tensor
    reduce_work: Work
    plan: Plan | None = None
    rounded: tuple[Factor, ...] = ()
    reduction: RoundedReduction | None = None
    late: dict[Factor, Tensors] = field(default_factory=dict)
    inversion: Future[dict[Factor, Decomposition]] | None = None
    share_buffers: dict[int, Tensor] = field(default_factory=dict)
    share_works: list[Work] = field(default_factory=list)
    inverses: dict[Factor, StoredInverse | None] = field(default_factory=dict)
    probes: dict[Factor, Tensor] = field(default_factory=dict)
    dampings: dict[str, tuple[float, float]] = field(default_factory=dict)
    wanted: dict[Factor, Wanted] = field(default_factory=dict)
    stage: str = "reduce"

    def stage_step(self, thirds: int) -> int:
        """Return the step at which `thirds` thirds of the delay have passed."""
        return self.step + math.ceil((self.adopt_step - self.step) * thirds / 3)

    def holder(self, layer: str) -> int | None:
        """Return the one rank that keeps a layer's inverses; None where all ranks do."""
        return None if self.plan is None else self.plan.holder(layer)


class RefreshPipeline:
    """Launches refreshes and moves those under way forward. Owns no statistics: it edits the LayerStates.

    factor_wire: type in which sums travel where their damping makes up for it; None: as they are. plan: who inverts
    and what is shared, for refreshes launched from now on. on_inverted: told each inversion's
    seconds. wanted: whether factors are inverted or decomposed, and how the result is stored. change_threshold: a
    factor whose relative change since its last inversion, measured on one fixed vector, is at most this is
    not inverted again, as long as its damping changed no more; 0 still skips factors that did not change
    beyond rounding (inputs that never change).
    """

    def __init__(
        self,
        states: Mapping[str, LayerState],
        plan: Plan,
        communicator: Communicator,
        wanted: Wanted,
        change_threshold: float = 0.0,
        factor_wire: torch.dtype | None = None,
        on_inverted: Callable[[Factor, float], None] = lambda factor, seconds: None,
    ) -> None:
        self._states = states
        self.plan = plan
        self._on_inverted = on_inverted
        self._comm = communicator
        self._wanted = wanted
        self._exact = replace(wanted, dtype=None)
        self._findings = Findings(states, communicator, wanted, change_threshold, factor_wire)
        self._factor_wire = factor_wire
        self.discarded_statistics = 0
        """Refreshes whose reduced statistics were not finite and were left out, on all ranks alike."""
        self._under_way: list[Refresh] = []
        self._executor: ThreadPoolExecutor | None = None

    @property
    def under_way(self) -> tuple[Refresh, ...]:
        """The refreshes launched and not yet adopted, oldest first."""
        return tuple(self._under_way)

    def inverse_bytes(self, structure: FactorStructure, computed: torch.dtype) -> int:
        """Return the bytes in which a factor's inverse is kept."""
        return self._wanted.kept_bytes(structure, computed)

    def launch(self, step: int, layers: Sequence[str], damping: Damping, delay: int) -> None:
        """Start reducing the named layers' unfolded statistics; locally only what rounding leaves over stays."""
        exact: list[Tensor] = []
        rounded: dict[Factor, Tensors] = {}
        decays = {}
        bears = self._findings.bear_rounding(layers, damping)
        for name in layers:
            state = self._states[name]
            decays[name], state.decay = state.decay, 1.0
            if state.unfolded is None:
                continue
            for which, sums in (("A", state.unfolded.a), ("G", state.unfolded.g)):
                if (name, which) in bears:
                    rounded[name, which] = sums
                else:
                    exact += sums
            exact.append(state.unfolded.counts)
        reduced = flatten(exact)
        terms = [tensor for sums in rounded.values() for tensor in sums]
        reduction = None
        work = self._comm.all_reduce(reduced, "factor", group="factor")
        if terms:
            assert self._factor_wire is not None
            reduction = RoundedReduction(flatten(terms), self._factor_wire, self._comm, "factor", "factor")
        for name in layers:
            unfolded = self._states[name].unfolded
            if unfolded is not None:
                unfolded.zero_()
        if reduction is not None:
            for tensor, left in zip(terms, unflatten(reduction.left, [tuple(t.shape) for t in terms])):
                tensor.copy_(left)
        refresh = Refresh(
            step,
            step + delay,
            tuple(layers),
            damping,
            decays,
            reduced,
            work,
            self.plan,
            rounded=tuple(rounded),
            reduction=reduction,
        )
        self._under_way.append(refresh)
        if self._comm.world_size == 1:
            # Nothing to wait for, and the folded sums of a single rank move on with the next commit.
            self._start_inversion(refresh)

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
        """Drop every refresh under way (before a state is loaded); all ranks enter."""
        self.drain()
        self._under_way = []

    def restore(self, refresh: Refresh) -> None:
        """Put back a refresh that was drained when its state was saved."""
        self._under_way.append(refresh)

    def close(self) -> None:
        """Stop the inversion thread."""
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)
            self._executor = None

    def change_plan(self, plan: Plan) -> None:
        """Go by another plan from the next launch on; all ranks enter.

        Where another rank is to hold a layer's inverses, what one rank alone holds, in use or under way, is sent to
        all of them first: a factor that does not change is not inverted again, so that whoever owns it next must have
        its inverse.
        """
        states = self._states.values()
        held = [(name, state.holder) for name, state in self._states.items()]
        held += [(name, refresh.holder(name)) for refresh in self._under_way for name in refresh.layers]
        if any(holder is not None and holder != plan.holder(name) for name, holder in held):
            self.drain()
            for position, (name, which), inverse in list(self.whole_inverses()):
                if position is not None:
                    self._under_way[position].inverses[name, which] = inverse
                elif inverse is not None:
                    self._states[name].inverses[which] = inverse
            for refresh in self._under_way:
                refresh.plan = None
            for state in states:
                state.holder = None
        self.plan = plan

    def whole_inverses(self) -> Iterator[tuple[int | None, Factor, StoredInverse | None]]:
        """Yield (position of the refresh under way or None for those in use, factor, inverse) of every inverse.

        What one rank alone holds is broadcast for it. All ranks enter, after `drain`, and read to the end.
        """
        for name, state in self._states.items():
            for which in "AG":
                inverse = state.inverses.get(which)
                if inverse is not None and state.holder is not None:
                    inverse = self._fetched((name, which), inverse, state.holder, state.forms[which])
                yield None, (name, which), inverse
        for i, refresh in enumerate(self._under_way):
            for name in refresh.layers:
                for which in "AG":
                    inverse = refresh.inverses.get((name, which))
                    holder = refresh.holder(name)
                    if inverse is not None and holder is not None:
                        form = self._form(refresh, (name, which))
                        inverse = self._fetched((name, which), inverse, holder, form)
                    yield i, (name, which), inverse

    def _fetched(self, factor: Factor, inverse: StoredInverse, holder: int, form: Wanted) -> StoredInverse:
        state = self._states[factor[0]]
        structure, computed = state.structure(factor[1]), state.folded.counts.dtype
        if holder == self._comm.rank:
            buffer = to_bytes(structure, inverse, form)
        else:
            size = form.wire_bytes(structure, computed)
            buffer = torch.empty(size, dtype=torch.uint8, device=state.folded.counts.device)
        self._comm.broadcast(buffer, holder, "state", group="factor").wait()
        return from_bytes(structure, buffer, form, computed)

    def _start_inversion(self, refresh: Refresh) -> None:
        refresh.reduce_work.wait()
        self._fold(refresh)
        # Averages are new tensors: the folded sums may move on before the thread reads them.
        jobs = self._damped_factors(refresh)
        if refresh.adopt_step > refresh.step:
            if self._executor is None:
                self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="dngd-invert")
            refresh.inversion = self._executor.submit(_decompose_on, _current_stream(jobs), jobs)
        else:
            refresh.inversion = Future()
            refresh.inversion.set_result(_decompose_all(jobs))
        refresh.stage = "invert"

    def _fold(self, refresh: Refresh) -> None:
        states = [self._states[name] for name in refresh.layers]
        if self._comm.world_size == 1 or all(state.unfolded is None for state in states):
            if not entries_are_finite([tensor for state in states for tensor in state.folded.tensors()]):
                # A single rank's sums have no sound part to go back to: its average starts again.
                self.discarded_statistics += 1
                for state in states:
                    if not entries_are_finite(state.folded.tensors()):
                        state.folded.zero_()
            return
        exact = iter(self._unpacked(refresh, refresh.reduced, rounded=False))
        total = refresh.reduced.new_zeros(0)
        if refresh.reduction is not None:
            total, late = refresh.reduction.finish()
            left_over = iter(self._unpacked(refresh, late, rounded=True))
            for name, which in refresh.rounded:
                sums = self._states[name].folded.sums(which)
                refresh.late[name, which] = tuple(next(left_over).clone() for _ in sums)
        added = iter(self._unpacked(refresh, total, rounded=True))
        # Rows can overflow where gradients did not. The reduced sums are alike on all ranks, so all of them
        # forget these statistics together; the folded ones stay sound.
        sound = entries_are_finite([refresh.reduced, total])
        self.discarded_statistics += not sound
        for name, state in zip(refresh.layers, states):
            state.folded.decay_(refresh.decays[name])
            if sound:
                for which in "AG":
                    parts = added if (name, which) in refresh.rounded else exact
                    for tensor in state.folded.sums(which):
                        tensor += next(parts)
                state.folded.counts += next(exact)
        refresh.reduced = refresh.reduced.new_zeros(0)
        refresh.reduction = None

    def _unpacked(self, refresh: Refresh, flat: Tensor, *, rounded: bool) -> list[Tensor]:
        """Return the sums (and counts, which are not rounded) that a flat buffer holds, in the layers' order."""
        shapes: list[tuple[int, ...]] = []
        for name in refresh.layers:
            folded = self._states[name].folded
            for which in "AG":
                if ((name, which) in refresh.rounded) == rounded:
                    shapes += [tuple(t.shape) for t in folded.sums(which)]
            if not rounded:
                shapes.append(tuple(folded.counts.shape))
        return unflatten(flat, shapes) if flat.numel() else []

    def _damped_factors(self, refresh: Refresh) -> dict[Factor, Job]:
        jobs: dict[Factor, Job] = {}
        plan = refresh.plan
        assert plan is not None, "a restored refresh is inverted already"
        kept: dict[Factor, float] = {}
        for m in self._findings.measure(refresh.layers, refresh.damping):
            which, state = m.factor[1], self._states[m.factor[0]]
            # The next comparison is with what was inverted, or small changes would add up unseen.
            refresh.probes[m.factor] = state.probes[which] if m.is_unchanged else m.probe
            keeps_damping = m.is_unchanged and not self._wanted.eigenbasis
            kept[m.factor] = state.damping["AG".index(which)] if keeps_damping else m.damping
            is_exact = m.is_unchanged and state.is_exact(which, m.averages[0].dtype)
            refresh.wanted[m.factor] = self._wanted if m.rounds and not is_exact else self._exact
            if not plan.inverts(m.factor, self._comm.rank):
                continue
            if m.is_unchanged:
                refresh.inverses[m.factor] = state.inverses[which]
                state.reused_inversions += plan.owners[m.factor] == self._comm.rank
            else:
                jobs[m.factor] = (state.structure(which), m.averages, m.damping, refresh.wanted[m.factor])
        refresh.dampings = {name: (kept[name, "A"], kept[name, "G"]) for name, which in kept if which == "A"}
        return jobs

    def _start_sharing(self, refresh: Refresh) -> None:
        assert refresh.inversion is not None
        assert refresh.plan is not None
        for factor, result in refresh.inversion.result().items():
            state = self._states[factor[0]]
            if refresh.plan.owners[factor] == self._comm.rank:
                state.escalations += result.escalations
                state.failed_inversions += result.stored is None
            refresh.inverses[factor] = result.stored
            self._on_inverted(factor, result.seconds)
        device = device_of(self._states, refresh.layers)
        for name in refresh.layers:
            for which in "AG":
                if self._comm.world_size == 1 or refresh.plan.strategies[name] == "replicate":
                    refresh.inverses.setdefault((name, which), None)
        if self._comm.world_size == 1:
            refresh.stage = "ready"
            return
        for owner, factors in self._by_owner(refresh).items():
            if owner == self._comm.rank:
                buffer = torch.cat([self._packed(refresh, factor) for factor in factors])
            else:
                size = sum(1 + self._wire_bytes(refresh, factor) for factor in factors)
                buffer = torch.empty(size, dtype=torch.uint8, device=device)
            refresh.share_buffers[owner] = buffer
            refresh.share_works.append(self._comm.broadcast(buffer, owner, "inverse", group="factor"))
        refresh.stage = "share"

    def _by_owner(self, refresh: Refresh) -> dict[int, list[Factor]]:
        """Return what each owner tells the others, by owner: nothing of the layers that every rank inverts."""
        assert refresh.plan is not None
        by_owner: dict[int, list[Factor]] = {}
        for name in refresh.layers:
            if refresh.plan.strategies[name] != "replicate":
                for factor in ((name, "A"), (name, "G")):
                    by_owner.setdefault(refresh.plan.owners[factor], []).append(factor)
        return dict(sorted(by_owner.items()))

    def _form(self, refresh: Refresh, factor: Factor) -> Wanted:
        """Return the form in which a factor's inverse travels; of a factor without statistics nothing does."""
        return refresh.wanted.get(factor, self._wanted)

    def _wire_bytes(self, refresh: Refresh, factor: Factor) -> int:
        """Return the bytes of an inverse on the wire; none where its owner keeps it."""
        state = self._states[factor[0]]
        if refresh.holder(factor[0]) is not None:
            return 0
        return self._form(refresh, factor).wire_bytes(state.structure(factor[1]), state.folded.counts.dtype)

    def _packed(self, refresh: Refresh, factor: Factor) -> Tensor:
        """Return one byte that says whether there is an inverse, and it (or zeros) unless its owner keeps it."""
        state = self._states[factor[0]]
        device = state.folded.counts.device
        inverse = refresh.inverses.get(factor)
        flag = torch.tensor([inverse is not None], dtype=torch.uint8, device=device)
        size = self._wire_bytes(refresh, factor)
        if inverse is None or size == 0:
            return torch.cat([flag, torch.zeros(size, dtype=torch.uint8, device=device)])
        return torch.cat([flag, to_bytes(state.structure(factor[1]), inverse, self._form(refresh, factor))])

    def _receive(self, refresh: Refresh) -> None:
        for work in refresh.share_works:
            work.wait()
        for owner, factors in self._by_owner(refresh).items():
            buffer = refresh.share_buffers[owner]
            offset = 0
            for factor in factors:
                state, size = self._states[factor[0]], self._wire_bytes(refresh, factor)
                arrived = bool(buffer[offset] > 0)
                body = buffer[offset + 1 : offset + 1 + size]
                offset += 1 + size
                if not arrived:
                    refresh.inverses[factor] = None
                elif size > 0:
                    refresh.inverses[factor] = from_bytes(
                        state.structure(factor[1]), body, self._form(refresh, factor), state.folded.counts.dtype
                    )
                elif owner != self._comm.rank:
                    refresh.inverses[factor] = HELD_ELSEWHERE
        refresh.share_buffers.clear()
        refresh.stage = "ready"

    def _adopt(self, refresh: Refresh) -> None:
        for name in refresh.layers:
            state = self._states[name]
            state.attempted_step = refresh.step
            self._pay_back(refresh, name, state)
            a_inverse, g_inverse = refresh.inverses[name, "A"], refresh.inverses[name, "G"]
            if a_inverse is None or g_inverse is None:
                continue  # the last good pair stays; counted where the inversion failed
            state.inverses = {"A": a_inverse, "G": g_inverse}
            state.launched_step = refresh.step
            state.holder = refresh.holder(name)
            state.forms = {which: self._form(refresh, (name, which)) for which in "AG"} if refresh.plan else {}
            if name in refresh.dampings:
                state.damping = refresh.dampings[name]
            for which in "AG":
                if (name, which) in refresh.probes:
                    state.probes[which] = refresh.probes[name, which]
        refresh.stage = "adopted"

    def late_statistics(self, name: str) -> FactorStatistics | None:
        """Return what rounding left to this rank of a layer's sums and is not in its unfolded ones yet."""
        for refresh in self._under_way:
            if (name, "A") in refresh.late or (name, "G") in refresh.late:
                late = self._states[name].folded.clone()
                late.zero_()
                for which in "AG":
                    for tensor, part in zip(late.sums(which), refresh.late.get((name, which), ())):
                        tensor.copy_(part)
                late.decay_(self._states[name].decay)
                return late
        return None

    def _pay_back(self, refresh: Refresh, name: str, state: LayerState) -> None:
        """Add what rounding the sum left over to this rank's unfolded sums.

        At the adoption, a step that all runs have: when a state is saved in between, the numbers stay the same.
        """
        for which in "AG":
            late = refresh.late.pop((name, which), None)
            if late is not None and state.unfolded is not None:
                for tensor, part in zip(state.unfolded.sums(which), late):
                    tensor.add_(part, alpha=state.decay)


def _decompose_all(
    jobs: Mapping[Factor, Job],
) -> dict[Factor, Decomposition]:
    out = {}
    for factor, job in jobs.items():
        started = time.perf_counter()
        result = decompose(*job)
        out[factor] = replace(result, seconds=time.perf_counter() - started)
    return out


def _current_stream(jobs: Mapping[Factor, Job]) -> torch.cuda.Stream | None:
    """Return this thread's stream on the averages' GPU; None on a CPU."""
    devices = {job[1][0].device for job in jobs.values()}
    return next((torch.cuda.current_stream(device) for device in devices if device.type == "cuda"), None)


def _decompose_on(stream: torch.cuda.Stream | None, jobs: Mapping[Factor, Job]) -> dict[Factor, Decomposition]:
    """Decompose in the order of another thread's stream, which made the averages and reads the inverses."""
    with nullcontext() if stream is None else torch.cuda.stream(stream):
        return _decompose_all(jobs)
