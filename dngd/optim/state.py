"""The preconditioner's state as plain tensors, bitwise, at any world size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dngd.comm.assignment import Factor
from dngd.comm.communicator import LocalCommunicator
from dngd.errors import UserError
from dngd.optim.refresh import Damping, LayerState, Refresh

if TYPE_CHECKING:
    from dngd.optim.preconditioner import KFACPreconditioner

STATISTICS = ("a_sum", "g_sum", "counts")


def preconditioner_state(pre: KFACPreconditioner) -> dict[str, Tensor]:
    """Return the flat state of a drained preconditioner; keys "shared.…" and "local.…"."""
    out: dict[str, Tensor] = {
        "shared.counters": torch.tensor([pre.steps, pre.factor_steps, pre.dropped_steps], dtype=torch.int64)
    }
    for name, state in pre.states.items():
        out.update(_layer_state(name, state))
    for i, refresh in enumerate(pre.pipeline.under_way):
        assert refresh.stage == "ready", "drain the pipeline before taking its state"
        out[f"shared.refresh.{i}.steps"] = torch.tensor([refresh.step, refresh.adopt_step], dtype=torch.int64)
        for (name, which), inverse in refresh.inverses.items():
            # An inversion that failed is kept as an empty tensor: the layer was part of the refresh.
            kept = torch.zeros(0) if inverse is None else inverse.clone()
            out[f"shared.refresh.{i}.{which}.{name}"] = kept
    return out


def _layer_state(name: str, state: LayerState) -> dict[str, Tensor]:
    out = {}
    for key in STATISTICS:
        out[f"shared.folded.{key}.{name}"] = getattr(state.folded, key).clone()
        out[f"local.unfolded.{key}.{name}"] = getattr(state.unfolded, key).clone()
    out[f"shared.decay.{name}"] = torch.tensor(state.decay, dtype=torch.float64)
    out[f"shared.launched.{name}"] = torch.tensor([state.launched_step, state.attempted_step], dtype=torch.int64)
    out[f"local.escalations.{name}"] = torch.tensor([state.escalations, state.failed_inversions], dtype=torch.int64)
    if state.a_inverse is not None and state.g_inverse is not None:
        out[f"shared.inverse.A.{name}"] = state.a_inverse.clone()
        out[f"shared.inverse.G.{name}"] = state.g_inverse.clone()
    return out


def load_preconditioner_state(pre: KFACPreconditioner, states: Sequence[dict[str, Tensor]]) -> None:
    """Restore `pre` from the saved ranks' states; see KFACPreconditioner.load_state_dict."""
    if not states:
        raise UserError("load_state_dict needs the state of at least one rank")
    shared = states[0]
    _check_same_layers(pre, shared)
    local = _merge_local(states, pre.communicator.rank, pre.communicator.world_size)
    pre.pipeline.forget()
    for layer in pre.layers.values():
        layer.pending = None
    pre.steps, pre.factor_steps, pre.dropped_steps = (int(v) for v in shared["shared.counters"])
    for name, state in pre.states.items():
        for key in STATISTICS:
            getattr(state.folded, key).copy_(shared[f"shared.folded.{key}.{name}"])
            getattr(state.unfolded, key).copy_(local[f"local.unfolded.{key}.{name}"])
        state.decay = float(shared[f"shared.decay.{name}"])
        state.launched_step, state.attempted_step = (int(v) for v in shared[f"shared.launched.{name}"])
        state.escalations, state.failed_inversions = (int(v) for v in local[f"local.escalations.{name}"])
        state.a_inverse = state.g_inverse = None
        if f"shared.inverse.A.{name}" in shared:
            device = state.folded.a_sum.device
            state.a_inverse = shared[f"shared.inverse.A.{name}"].to(device, copy=True)
            state.g_inverse = shared[f"shared.inverse.G.{name}"].to(device, copy=True)
    for refresh in _refreshes(pre, shared):
        pre.pipeline.restore(refresh)


def _refreshes(pre: KFACPreconditioner, shared: dict[str, Tensor]) -> list[Refresh]:
    out = []
    i = 0
    while (steps := shared.get(f"shared.refresh.{i}.steps")) is not None:
        inverses: dict[Factor, Tensor | None] = {}
        names: list[str] = []
        for name, state in pre.states.items():
            for which, statistic in (("A", state.folded.a_sum), ("G", state.folded.g_sum)):
                saved = shared.get(f"shared.refresh.{i}.{which}.{name}")
                if saved is not None:
                    inverses[name, which] = saved.to(statistic) if saved.numel() else None
                    names += [name] if which == "A" else []
        out.append(
            Refresh(
                step=int(steps[0]),
                adopt_step=int(steps[1]),
                layers=tuple(names),
                damping=Damping(1.0, "tikhonov", 1.0),  # spent: the inversion is done
                decays={},
                reduced=torch.zeros(0),
                reduce_work=LocalCommunicator().all_reduce(torch.zeros(0), "factor"),
                inverses=inverses,
                stage="ready",
            )
        )
        i += 1
    return out


def _merge_local(states: Sequence[dict[str, Tensor]], rank: int, world_size: int) -> dict[str, Tensor]:
    if len(states) == world_size:
        return states[rank]
    keys = [key for key in states[0] if key.startswith("local.")]
    if rank == 0:
        return {key: torch.stack([state[key] for state in states]).sum(dim=0) for key in keys}
    return {key: torch.zeros_like(states[0][key]) for key in keys}


def _check_same_layers(pre: KFACPreconditioner, shared: dict[str, Tensor]) -> None:
    prefix = "shared.folded.a_sum."
    saved = {k.removeprefix(prefix): tuple(v.shape) for k, v in shared.items() if k.startswith(prefix)}
    here = {name: tuple(state.folded.a_sum.shape) for name, state in pre.states.items()}
    if saved != here:
        raise UserError(
            f"the saved curvature has layers {saved}, this model has {here}; "
            "load the state into the model that it was saved from"
        )
