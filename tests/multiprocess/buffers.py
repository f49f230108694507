"""What the ranks of test_buffer_worlds do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dngd.comm import Communicator, FlatGradients
from dngd.config import TrainConfig
from dngd.models import GraphBatch, GraphShape
from dngd.train import TrainingLoop
from dngd.train.buffers import share_buffers
from dngd.train.parts import RunParts
from dngd.train.progress import SilentReporter

TYPES = ("bool", "uint8", "int16", "uint16", "int32", "bfloat16", "float8_e4m3fn", "complex64", "float64")


def work(communicator: Communicator, argument: dict[str, Any]) -> Any:
    """Do what the argument's "do" says, of the functions below."""
    return globals()[argument["do"]](communicator, argument)


def share(communicator: Communicator, argument: dict[str, Any]) -> list[Any]:
    """Return a module's buffers after they are shared; they begin as the rank's number plus one, of each type."""
    own = float(communicator.rank + 1)
    module = nn.Module()
    for name in TYPES:
        module.register_buffer(f"of_{name}", torch.full((3,), own).to(getattr(torch, name)))
    module.register_buffer("repeated", torch.full((1, 2), own).expand(3, 2))
    module.register_buffer("part", torch.full((2, 1, 4), own)[:, :, 1:2].expand(2, 5, 1))
    module.register_buffer("empty", torch.zeros(0))
    module.register_buffer("sparse", (own * torch.eye(2)).to_sparse())
    share_buffers(module, communicator)
    return [buffer.to_dense().to(torch.complex64).real.tolist() for buffer in module.buffers()]


def reduce(communicator: Communicator, argument: dict[str, Any]) -> list[float]:
    """Return the gradient and the sums of a module of 16-bit floats."""
    net = nn.Linear(1, 1, bias=False).to(getattr(torch, argument["dtype"]))
    gradients = FlatGradients(net.parameters())
    (net.weight * 257).sum().backward()
    gradients.add_loss_(torch.tensor(3.0), 257)
    sums = gradients.reduce_(communicator)
    assert net.weight.grad is not None
    return [float(net.weight.grad), sums.loss_sum, sums.num_seeds]


class Zeroing(torch.optim.SGD):
    """Ends its step as some optimizers do."""

    def step(self, closure: Any = None) -> Any:
        out = super().step(closure)
        self.zero_grad()
        return out


class Mixing(nn.Module):
    """A mean of neighbours, its columns mixed by a sparse matrix that is not in the state."""

    def __init__(self, shape: GraphShape) -> None:
        super().__init__()
        self.linear = nn.Linear(shape.num_features, shape.num_classes)
        mix = torch.eye(shape.num_classes) + torch.eye(shape.num_classes).roll(1, 0)
        self.register_buffer("mix", mix.to_sparse(), persistent=False)

    def forward(self, batch: GraphBatch) -> Tensor:
        x = batch.x
        for edges in batch.layers:
            x = edges.mean(x) + x[: edges.num_dst]
        out: Tensor = torch.sparse.mm(self.mix, self.linear(x).t()).t()
        return out


def fit(communicator: Communicator, argument: dict[str, Any]) -> list[float]:
    """Train a module with a sparse buffer by an optimizer that forgets gradients; return the curve and the weights."""
    fields = argument["fields"] | {"run_dir": Path(argument["fields"]["run_dir"])}
    kind = Zeroing if argument["forgets"] else torch.optim.SGD
    parts = RunParts(module=Mixing, optimizer=lambda model: kind(model.parameters(), lr=0.1))
    loop = TrainingLoop(TrainConfig(**fields), communicator, SilentReporter(), parts=parts)
    curve = [value for r in loop.run().history for value in (r.train_loss, r.val_loss)]
    return curve + [float(parameter.detach().double().sum()) for parameter in loop.model.parameters()]
