"""Buffers of a module of one's own in a run of several shards and ranks: running statistics, and what else it keeps."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from dngd.comm import Communicator


class RunningStatistics:
    """The running means, variances and counts of a module's normalisation layers.

    Every shard of a step starts from those that the step began with, and the step ends with the mean over its shards
    of what they became, so that they do not depend on which rank had which shards. A dropped step leaves them as they
    were.
    """

    def __init__(self, model: nn.Module, communicator: Communicator) -> None:
        self._comm = communicator
        self._buffers: list[Tensor] = []
        for module in model.modules():
            if isinstance(module, _NormBase) and module.track_running_stats:
                self._buffers += [buffer for buffer in module.buffers(recurse=False) if buffer is not None]
        self._before: list[Tensor] = []
        # Each buffer's sum of changes, one after another, and how many shards they are of.
        device = self._buffers[0].device if self._buffers else torch.device("cpu")
        dtype = torch.float64 if any(b.dtype == torch.float64 for b in self._buffers) else torch.float32
        size = sum(buffer.numel() for buffer in self._buffers)
        self._changes = torch.zeros(size + 1, dtype=dtype, device=device)

    def begin_step(self) -> None:
        """Keep what every shard starts from."""
        if not self._buffers:
            return
        self._before = [buffer.clone() for buffer in self._buffers]
        self._changes.zero_()

    def end_shard(self) -> None:
        """Add what a shard changed, and go back to what the next one starts from."""
        if not self._buffers:
            return
        for buffer, before, change in zip(self._buffers, self._before, self._parts()):
            change += (buffer - before).to(change.dtype)
            buffer.copy_(before)
        self._changes[-1] += 1

    def end_step(self, *, finite: bool) -> None:
        """Make the buffers the mean over all ranks' shards; all ranks enter."""
        if not self._buffers:
            return
        self._comm.all_reduce(self._changes, "state").wait()
        if not finite or not float(self._changes[-1]):
            return
        self._changes[:-1] /= self._changes[-1].clone()
        for buffer, change in zip(self._buffers, self._parts()):
            buffer += change.to(buffer.dtype)

    def _parts(self) -> list[Tensor]:
        sizes = [buffer.numel() for buffer in self._buffers]
        return [part.view_as(b) for part, b in zip(torch.split(self._changes[:-1], sizes), self._buffers)]


def share_buffers(model: nn.Module, communicator: Communicator) -> None:
    """Give all ranks rank 0's dense buffers of a module, whatever it keeps in them. All ranks enter.

    Sparse ones stay as they are: checkpoints hold dense ones alone, and what is not in them has to be made alike.
    """
    if communicator.world_size == 1:
        return
    for buffer in model.buffers():
        if buffer.layout != torch.strided:
            continue
        once = _without_repeats(buffer.detach())
        whole = once.contiguous()
        communicator.broadcast(whole.view(-1), 0, "state").wait()
        if whole is not once:
            once.copy_(whole)


def _without_repeats(tensor: Tensor) -> Tensor:
    """Return a view that has each number in memory once: expand() repeats a dimension's first row, by a stride of 0."""
    for dimension, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dimension] > 1:
            tensor = tensor.narrow(dimension, 0, 1)
    return tensor
