"""The preconditioner's state as plain tensors, bitwise, at any world size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor

from dngd.comm.communicator import LocalCommunicator
from dngd.curvature import FactorStatistics
from dngd.errors import UserError
from dngd.optim.arguments import Method
from dngd.optim.eigenvalues import ScaleState
from dngd.optim.findings import Damping
from dngd.optim.inverses import StoredInverse
from dngd.optim.layer_state import LayerState
from dngd.optim.layers.base import ConstantInput
from dngd.optim.plan import Plan
from dngd.optim.refresh import Refresh
from dngd.optim.trust import KLTrustRegion, LevenbergMarquardt

if TYPE_CHECKING:
    from dngd.optim.preconditioner import KFACPreconditioner

State = dict[str, Tensor]


def preconditioner_state(pre: KFACPreconditioner) -> State:
    """Return the flat state of a drained preconditioner; keys "shared.…" and "local.…". All ranks enter."""
    out: State = {
        "shared.counters": _integers(
            pre.steps,
            pre.factor_steps,
            pre.dropped_steps,
            pre.dropped_in_a_row,
            pre.non_finite_statistics,
            pre.pipeline.discarded_statistics,
        ),
        "local.rank": _integers(pre.communicator.rank, pre.communicator.world_size),
    }
    plan = pre.plan().to_json().encode()
    out["shared.plan"] = torch.frombuffer(bytearray(plan), dtype=torch.uint8)
    out["shared.deferred"] = _integers(*(list(pre.states).index(name) for name in pre.deferred))
    out["shared.method"] = _integers(get_args(Method).index(pre.method))
    out["shared.participation"] = _integers(*pre.participation.state(pre.states))
    if isinstance(pre.damping, LevenbergMarquardt):
        out["shared.damping"] = torch.tensor([pre.damping.value], dtype=torch.float64, device="cpu")
    if isinstance(pre.kl_clip, KLTrustRegion):
        out["shared.kl_ratio"] = torch.tensor([pre.kl_clip.ratio], dtype=torch.float64, device="cpu")
    for name, state in pre.states.items():
        out.update(_layer_state(name, state))
        constant = pre.layers[name].constant
        out[f"local.constant.{name}"] = _integers(constant.repeats, constant.is_only_input, constant.was_seen)
        fingerprint = constant.fingerprint()
        if fingerprint is not None:
            out[f"local.input.{name}"] = _integers(fingerprint)
        if constant.reach is not None and (constant.repeats or fingerprint is not None):
            out[f"local.reach.{name}"] = constant.reach.clone()
    if pre.eigenvalues is not None:
        for name, scale in pre.eigenvalues.by_layer.items():
            out[f"local.scale_sum.{name}"] = scale.sum.clone()
            out[f"local.scale_count.{name}"] = torch.tensor(scale.count, dtype=torch.float64, device="cpu")
            out[f"shared.scale_basis.{name}"] = _integers(scale.basis_step)
            if scale.scales is not None:
                out[f"shared.scales.{name}"] = scale.scales.clone()
    for i, refresh in enumerate(pre.pipeline.under_way):
        assert refresh.stage == "ready", "drain the pipeline before taking its state"
        out[f"shared.refresh.{i}.steps"] = _integers(refresh.step, refresh.adopt_step)
        for name in refresh.layers:
            # An inversion that failed is kept as no tensor at all: the layer was part of the refresh.
            damping = refresh.dampings.get(name, (0.0, 0.0))
            out[f"shared.refresh.{i}.damping.{name}"] = torch.tensor(damping, dtype=torch.float64, device="cpu")
            for which in "AG":
                prefix = f"shared.refresh.{i}.{which}"
                for k, tensor in enumerate(refresh.late.get((name, which), ())):
                    out[f"local.late.{i}.{which}.{k}.{name}"] = tensor.clone()
                if (name, which) in refresh.probes:
                    out[f"{prefix}.probe.{name}"] = refresh.probes[name, which].clone()
    # An inverse that one rank alone holds is in every rank's state: any of them can restore any world.
    for position, (name, which), inverse in pre.pipeline.whole_inverses():
        place = "shared.inverse" if position is None else f"shared.refresh.{position}"
        _put_inverse(out, f"{place}.{which}", name, inverse)
    return out


def _layer_state(name: str, state: LayerState) -> State:
    out: State = {}
    _put_statistics(out, "shared.folded", name, state.folded)
    if state.unfolded is not None:
        _put_statistics(out, "local.unfolded", name, state.unfolded)
    out[f"shared.decay.{name}"] = torch.tensor([state.decay, *state.damping], dtype=torch.float64, device="cpu")
    out[f"shared.launched.{name}"] = _integers(state.launched_step, state.attempted_step)
    out[f"local.escalations.{name}"] = _integers(state.escalations, state.failed_inversions, state.reused_inversions)
    for which in "AG":
        if which in state.probes:
            out[f"shared.probe.{which}.{name}"] = state.probes[which].clone()
    return out


def load_preconditioner_state(pre: KFACPreconditioner, states: Sequence[State]) -> None:
    """Restore `pre` from the saved ranks' states; see KFACPreconditioner.load_state_dict. All ranks enter."""
    with _refused_by_all_or_none(pre):
        if not states:
            raise UserError("load_state_dict needs the state of at least one rank")
        shared = states[0]
        _check_same_layers(pre, shared)
        local = _merge_local(states, pre.communicator.rank, pre.communicator.world_size)
        _check_same_method(pre, shared)
    pre.pipeline.forget()
    for layer in pre.layers.values():
        layer.forget()
    counters = [int(v) for v in shared["shared.counters"]]
    pre.steps, pre.factor_steps, pre.dropped_steps, pre.dropped_in_a_row = counters[:4]
    pre.non_finite_statistics, pre.pipeline.discarded_statistics = counters[4:]
    if isinstance(pre.damping, LevenbergMarquardt) and "shared.damping" in shared:
        pre.damping.value = float(shared["shared.damping"])
    if isinstance(pre.kl_clip, KLTrustRegion) and "shared.kl_ratio" in shared:
        pre.kl_clip.ratio = float(shared["shared.kl_ratio"])
    saved_plan = shared.get("shared.plan")
    if saved_plan is not None:
        pre.adopt_plan(Plan.from_json(bytes(saved_plan.tolist()).decode()))
    names = list(pre.states)
    pre.deferred = [names[int(i)] for i in shared.get("shared.deferred", ())]
    # States of before it was kept: of layers that take part in all steps.
    usual = [value for _ in names for value in (0, -1)]
    saved_participation = shared.get("shared.participation")
    pre.participation.restore(names, usual if saved_participation is None else saved_participation.tolist())
    for name, state in pre.states.items():
        _load_layer(name, state, shared, local)
        constant = pre.layers[name].constant = ConstantInput()
        repeats, is_only_input, *others = (bool(v) for v in local[f"local.constant.{name}"])
        constant.was_seen = others[0] if others else True  # states of before it was kept
        fingerprint = local.get(f"local.input.{name}")
        constant.restored = None if fingerprint is None else int(fingerprint)
        # Of an input that came once, and left no fingerprint, it is not known whether it would have come again.
        constant.repeats = repeats
        is_known = repeats or fingerprint is not None or not constant.was_seen
        constant.is_only_input = is_only_input and is_known
        reach = local.get(f"local.reach.{name}")
        constant.reach = None if reach is None else reach.to(state.folded.counts.device, copy=True)
    if pre.eigenvalues is not None:
        pre.eigenvalues.forget()
        for name, state in pre.states.items():
            if f"local.scale_sum.{name}" in local and state.inverses:
                like = state.folded.counts
                scales = shared.get(f"shared.scales.{name}")
                saved = ScaleState(
                    int(shared[f"shared.scale_basis.{name}"]),
                    local[f"local.scale_sum.{name}"].to(like, copy=True),
                    float(local[f"local.scale_count.{name}"]),
                    None if scales is None else scales.to(like, copy=True),
                )
                pre.eigenvalues.restore(name, saved)
    same_world = int(shared["local.rank"][1]) == pre.communicator.world_size
    for i, refresh in enumerate(_refreshes(pre, shared)):
        _take_late(pre, i, refresh, local)
        if not same_world:
            _add_late(pre, refresh, shared)
        pre.pipeline.restore(refresh)


@contextmanager
def _refused_by_all_or_none(pre: KFACPreconditioner) -> Iterator[None]:
    """Raise UserError on all ranks where the checks inside raise it on one: the others would wait for it later on."""
    refusal = None
    try:
        yield
    except UserError as error:
        refusal = error
    if pre.communicator.world_size > 1:
        refusals = torch.tensor([float(refusal is not None)], dtype=torch.float64, device=pre.device)
        pre.communicator.all_reduce(refusals, "state", group="factor").wait()
        if refusal is None and float(refusals) > 0:
            raise UserError(
                "another rank was given a state that it cannot load; with several ranks each saves and loads its own "
                "state_dict(): that of one rank lacks what the others have not yet summed"
            )
    if refusal is not None:
        raise refusal


def _load_layer(name: str, state: LayerState, shared: State, local: State) -> None:
    device = state.folded.counts.device
    _take_statistics(shared, "shared.folded", name, state.folded)
    decay, *damping = shared[f"shared.decay.{name}"].tolist()
    state.decay, state.damping = decay, (damping[0], damping[1])
    has_unfolded = f"local.unfolded.counts.{name}" in local
    if state.unfolded is not None:
        state.unfolded.zero_()
        if has_unfolded:
            _take_statistics(local, "local.unfolded", name, state.unfolded)
    elif has_unfolded:
        # Several ranks' sums become one rank's, which folds everything at once.
        rest = state.folded.clone()
        _take_statistics(local, "local.unfolded", name, rest)
        state.folded.decay_(state.decay)
        state.folded.add_(rest)
        state.decay = 1.0
    state.launched_step, state.attempted_step = (int(v) for v in shared[f"shared.launched.{name}"])
    counts = [int(v) for v in local[f"local.escalations.{name}"]]
    state.escalations, state.failed_inversions, state.reused_inversions = counts
    # All ranks have them now, whoever had them when they were saved; a layer's next refresh goes by the plan.
    state.inverses, state.probes, state.forms, state.holder = {}, {}, {}, None
    for which in "AG":
        inverse = _take_inverse(shared, f"shared.inverse.{which}", name, device)
        if inverse is not None:
            state.inverses[which] = inverse
        probe = shared.get(f"shared.probe.{which}.{name}")
        if probe is not None:
            state.probes[which] = probe.to(device, copy=True)


def _refreshes(pre: KFACPreconditioner, shared: State) -> list[Refresh]:
    out = []
    i = 0
    while (steps := shared.get(f"shared.refresh.{i}.steps")) is not None:
        prefix = f"shared.refresh.{i}"
        names = [name for name in pre.states if f"{prefix}.damping.{name}" in shared]
        refresh = Refresh(
            step=int(steps[0]),
            adopt_step=int(steps[1]),
            layers=tuple(names),
            damping=Damping(1.0, "tikhonov", 1.0),  # spent: the inversion is done
            decays={},
            reduced=torch.zeros(0, device="cpu"),
            reduce_work=LocalCommunicator().all_reduce(torch.zeros(0, device="cpu"), "factor"),
            stage="ready",
        )
        for name in names:
            device = pre.states[name].folded.counts.device
            damping = shared[f"{prefix}.damping.{name}"].tolist()
            refresh.dampings[name] = (damping[0], damping[1])
            for which in "AG":
                refresh.inverses[name, which] = _take_inverse(shared, f"{prefix}.{which}", name, device)
                probe = shared.get(f"{prefix}.{which}.probe.{name}")
                if probe is not None:
                    refresh.probes[name, which] = probe.to(device, copy=True)
        out.append(refresh)
        i += 1
    return out


def _take_late(pre: KFACPreconditioner, position: int, refresh: Refresh, local: State) -> None:
    for name in refresh.layers:
        folded = pre.states[name].folded
        for which in "AG":
            keys = [f"local.late.{position}.{which}.{k}.{name}" for k in range(len(folded.sums(which)))]
            if keys[0] in local:
                refresh.late[name, which] = tuple(local[key].to(folded.counts.device, copy=True) for key in keys)


def _add_late(pre: KFACPreconditioner, refresh: Refresh, shared: State) -> None:
    """Pay back at once what rounding left to the ranks of another world: with one rank there are no unfolded sums."""
    for (name, which), late in refresh.late.items():
        state = pre.states[name]
        target = state.folded if state.unfolded is None else state.unfolded
        decay = float(shared[f"shared.decay.{name}"][0])
        for tensor, part in zip(target.sums(which), late):
            tensor.add_(part, alpha=decay)
    refresh.late.clear()


def _integers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu")


def _put_statistics(out: State, prefix: str, name: str, statistics: FactorStatistics) -> None:
    for which, tensors in (("a", statistics.a), ("g", statistics.g)):
        for i, tensor in enumerate(tensors):
            out[f"{prefix}.{which}.{i}.{name}"] = tensor.clone()
    out[f"{prefix}.counts.{name}"] = statistics.counts.clone()


def _take_statistics(saved: State, prefix: str, name: str, statistics: FactorStatistics) -> None:
    for which, tensors in (("a", statistics.a), ("g", statistics.g)):
        for i, tensor in enumerate(tensors):
            tensor.copy_(saved[f"{prefix}.{which}.{i}.{name}"])
    statistics.counts.copy_(saved[f"{prefix}.counts.{name}"])


def _put_inverse(out: State, prefix: str, name: str, inverse: StoredInverse | None) -> None:
    if inverse is None:
        return
    for i, tensor in enumerate(inverse.tensors):
        out[f"{prefix}.{i}.{name}"] = tensor.clone()
    out[f"{prefix}.scales.{name}"] = torch.tensor(inverse.scales, dtype=torch.float64, device="cpu")


def _take_inverse(saved: State, prefix: str, name: str, device: torch.device) -> StoredInverse | None:
    scales = saved.get(f"{prefix}.scales.{name}")
    if scales is None:
        return None
    tensors = tuple(saved[f"{prefix}.{i}.{name}"].to(device, copy=True) for i in range(scales.numel()))
    return StoredInverse(tensors, tuple(scales.tolist()))


def _merge_local(states: Sequence[State], rank: int, world_size: int) -> State:
    saved_ranks = [tuple(int(v) for v in state["local.rank"]) for state in states]
    if saved_ranks == [(rank, world_size)]:
        return states[0]
    if saved_ranks != [(r, len(states)) for r in range(len(states))]:
        raise UserError(
            f"the state given is of ranks {[r for r, _ in saved_ranks]} of {saved_ranks[0][1]}; give this rank's own "
            f"(rank {rank} of {world_size}), or those of all ranks that saved, in rank order"
        )
    if len(states) == world_size:
        return states[rank]
    # Other ranks have other shards: what their rows were, and which were reached, says nothing about this one's.
    others = ("local.reach.", "local.input.")
    keys = [key for key in states[0] if key.startswith("local.") and not key.startswith(others)]
    if rank == 0:
        return {key: torch.stack([state[key] for state in states]).sum(dim=0) for key in keys}
    return {key: torch.zeros_like(states[0][key]) for key in keys}


def _check_same_method(pre: KFACPreconditioner, shared: State) -> None:
    saved = shared.get("shared.method")
    methods = get_args(Method)
    if saved is not None and methods[int(saved)] != pre.method:
        raise UserError(
            f"the saved curvature is of method={methods[int(saved)]!r}, this one's is {pre.method!r}; load it into an "
            "optimizer that was made with the same method and update"
        )


def _check_same_layers(pre: KFACPreconditioner, shared: State) -> None:
    prefix = "shared.folded."
    saved = {k.removeprefix(prefix): tuple(v.shape) for k, v in shared.items() if k.startswith(prefix)}
    wanted: State = {}
    for name, state in pre.states.items():
        _put_statistics(wanted, "shared.folded", name, state.folded)
    here = {k.removeprefix(prefix): tuple(v.shape) for k, v in wanted.items()}
    if saved != here:
        differ = sorted(set(saved.items()) ^ set(here.items()))[:4]
        raise UserError(
            f"the saved curvature is of other layers or sizes than this model's (first differences: {differ}); "
            "load the state into the model that it was saved from, with the same layout"
        )
