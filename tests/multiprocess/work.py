"""What the ranks of tests/multiprocess do. A small net in float64 (unless "single"), so differences are mistakes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dngd.comm import Communicator, FlatGradients, shards_of_rank
from dngd.curvature import FactorLayout
from dngd.optim import NaturalGradient, directions, refresh
from dngd.train.optimizers import load_moments, moments

NUM_SHARDS, STEPS = 4, 12


def shard(step: int, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of one shard at one step; sizes differ, and some shards are empty."""
    generator = torch.Generator().manual_seed(1000 * step + index)
    n = int(torch.randint(0, 6, (1,), generator=generator)) if index else 5
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (n,), generator=generator)


def train(comm: Communicator, argument: dict[str, Any]) -> dict[str, Any]:
    """Train on the shards and return losses, final weights and factors, health and the number of drops."""
    mutate = argument.get("mutant")
    if mutate == "swapped_collectives" and comm.rank == 1:
        _swap_share_order()
    torch.manual_seed(0)
    dtype = torch.float32 if argument.get("single") else torch.float64
    net: Any = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)
    if argument.get("side"):
        net = Branched(net).to(dtype)
    if mutate == "sends_only_with_rows":
        _send_only_with_rows()
    optimizer = NaturalGradient(
        net,
        0.1,
        loss_reduction="sum",
        damping=0.05,
        kl_clip=1e-2,
        factor_decay=0.8,
        factor_update_period=argument.get("factor_period", 2),
        inverse_update_period=argument.get("inverse_period", 5),
        dense_steps=argument.get("dense_steps", 3),
        inverse_delay=argument.get("delay", 0),
        layout=FactorLayout(**argument.get("layout", {})),
        communicator=comm,
        **argument.get("options", {}),
    )
    sent_before = Counter(comm.bytes_sent)
    gradients = FlatGradients(net.parameters())
    losses = []
    start = 0
    if "state" in argument:
        start = _restore(argument["state"], net, optimizer)
    for step in range(start, argument.get("steps", STEPS)):
        gradients.zero_()
        here = 0
        for index in shards_of_rank(NUM_SHARDS, comm.rank, comm.world_size):
            x, y = shard(step, index)
            x = x.to(dtype)
            if argument.get("poison_step") == step and index == 0:
                x = x * float("nan")  # shard 0 is never empty: one rank's rows, so its gradients too
            if not len(y):
                continue
            outputs = net(x, index == 0) if argument.get("side") else net(x)
            optimizer.observe(outputs, key=comm.rank if mutate == "key_of_rank" else index)
            loss = F.cross_entropy(outputs, y, reduction="sum")
            loss.backward()
            if argument.get("overflow_step") == step and index == 0:
                pending = next(iter(optimizer.preconditioner.layers.values())).pending
                assert pending is not None
                pending.a[0][0] = float("inf")  # gradients are finite, Σ m mᵀ is not
            gradients.add_loss_(loss, len(y))
            here += len(y)
        sums = gradients.reduce_(comm)
        if mutate == "per_rank_means" and here:
            for p in net.parameters():
                p.grad.mul_(sums.num_seeds / comm.world_size / here)
        optimizer.step(num_samples=here, finite=sums.finite, mean_gradients=True)
        losses.append(sums.loss_sum / sums.num_seeds)
    pre = optimizer.preconditioner
    factors = pre.factors()
    state = pre.state_dict()
    return {
        "losses": losses,
        "weights": [p.detach().flatten().tolist() for p in net.parameters()],
        "factors": {name: [t.flatten().tolist() for t in pair] for name, pair in factors.items()},
        "dropped": pre.dropped_steps,
        "non_finite": pre.non_finite_statistics,
        "staleness": {name: values["staleness"] for name, values in pre.health().items()},
        "state": {
            "step": pre.steps,
            "curvature": {
                key: [str(t.dtype).removeprefix("torch."), list(t.shape), t.flatten().tolist()]
                for key, t in state.items()
            },
            "weights": [p.detach().flatten().tolist() for p in net.parameters()],
            "moments": {key: [list(t.shape), t.flatten().tolist()] for key, t in moments(optimizer).items()},
        },
        "plan": pre.plan().to_json(),
        "held": sum(t.nbytes for s in pre.states.values() for i in s.inverses.values() for t in i.tensors),
        "exchanged": state_bytes(comm),
        "bytes": dict(comm.bytes_sent - sent_before),
    }


def _restore(states: list[dict[str, Any]], net: nn.Module, optimizer: NaturalGradient) -> int:
    with torch.no_grad():
        for p, weights in zip(net.parameters(), states[0]["weights"], strict=True):
            p.copy_(torch.tensor(weights, dtype=torch.float64).view_as(p))
    saved = states[0]["moments"]
    load_moments(optimizer, {k: torch.tensor(v, dtype=torch.float64).view(shape) for k, (shape, v) in saved.items()})
    ranks = [
        {k: torch.tensor(v, dtype=getattr(torch, dtype)).view(shape) for k, (dtype, shape, v) in s["curvature"].items()}
        for s in states
    ]
    optimizer.preconditioner.load_state_dict(*ranks)
    return int(states[0]["step"])


class Branched(nn.Module):
    """The net with a layer beside its middle that not every shard passes."""

    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.start, self.rest = net[:2], net[2:]
        self.side = nn.Linear(5, 5)

    def forward(self, x: torch.Tensor, side: bool) -> torch.Tensor:
        hidden = self.start(x)
        out: torch.Tensor = self.rest(hidden + self.side(hidden) if side else hidden)
        return out


def _send_only_with_rows() -> None:
    """A rank whose shards did not pass the layer "side" leaves it out of the exchange of directions."""
    original = directions.share_directions

    def partial(layers: Any, holders: Any, computed: Any, comm: Communicator) -> Any:
        known = {n: h for n, h in holders.items() if n != "side" or comm.rank == 0}
        return original(layers, known, computed, comm) | {n: computed[n] for n in computed if n not in known}

    directions.share_directions = partial


def _swap_share_order() -> None:
    """This rank broadcasts the owners' buffers in the opposite order."""
    original = refresh.RefreshPipeline._by_owner

    def swapped(self: Any, item: Any) -> Any:
        return dict(reversed(original(self, item).items()))

    refresh.RefreshPipeline._by_owner = swapped  # type: ignore[method-assign]


def state_bytes(comm: Communicator) -> dict[str, Any]:
    """Exercise the byte collectives with payloads of different lengths."""
    gathered = comm.gather_bytes(bytes([comm.rank]) * (3 * comm.rank))
    received = comm.broadcast_bytes(b"from rank 0" if comm.rank == 0 else None)
    return {
        "gathered": None if gathered is None else [list(g) for g in gathered],
        "received": received.decode(),
    }
