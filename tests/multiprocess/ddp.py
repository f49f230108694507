"""What the ranks of test_ddp do: a plain torch loop around a DDP-wrapped module."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dngd.comm import Communicator
from dngd.optim import KFACPreconditioner

STEPS, BATCH = 5, 12


def train(comm: Communicator, argument: dict[str, Any]) -> dict[str, Any]:
    """Train on this rank's slice of every batch. argument: fisher, and options of the preconditioner.

    Told: names of layers, factors and preconditioned gradients of every step, weights, and whether a parameter's
    hook ran (or a gradient changed) while the outputs were observed.
    """
    torch.manual_seed(0)
    net: nn.Module = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    if comm.world_size > 1:
        net = DistributedDataParallel(net)
    pre = KFACPreconditioner(
        net, damping=0.1, factor_update_period=2, inverse_update_period=3, dense_steps=1, **argument
    )
    assert pre.communicator is not comm
    assert pre.communicator.world_size == comm.world_size
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.9)
    disturbed = False
    gradients = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(BATCH, 4, generator=generator, dtype=torch.float64).chunk(comm.world_size)[comm.rank]
        y = torch.randint(3, (BATCH,), generator=generator).chunk(comm.world_size)[comm.rank]
        optimizer.zero_grad(set_to_none=False)
        z = net(x)
        before = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
        pre.observe(z, key=comm.rank)
        after = [p.grad for p in net.parameters()]
        for old, new in zip(before, after):
            disturbed |= (old is None) != (new is None) or (old is not None and not torch.equal(old, new))
        F.cross_entropy(z, y).backward()
        pre.step(num_samples=len(y))
        gradients.append([p.grad.flatten().tolist() for p in net.parameters() if p.grad is not None])
        optimizer.step()
    factors = pre.factors()
    pre.close()
    return {
        "names": list(pre.layers),
        "factors": {name: [t.flatten().tolist() for t in pair] for name, pair in factors.items()},
        "gradients": gradients,
        "weights": [p.detach().flatten().tolist() for p in net.parameters()],
        "disturbed": disturbed,
    }
