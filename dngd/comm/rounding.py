"""A sum over ranks with 16 bits an entry on the wire, and what rounding left over kept for the next sum."""

from __future__ import annotations

import torch
from torch import Tensor

from dngd.comm.communicator import Communicator, GroupName, Traffic


class RoundedReduction:
    """Sums one float32 buffer of every rank, rounded to `dtype` wherever it travels.

    Rank r rounds its term x_r to q_r and keeps `left = x_r - q_r`. Each rank adds up one chunk of all q_r, in float32
    and in rank order, rounds that and gives it to all; what this second rounding leaves over is its `late`. So

        total + Σ_r (left_r + late_r) = Σ_r x_r

    to the rounding of float32 alone, at any number of ranks: an all-reduce in `dtype` would round at every hop and keep
    nothing. Who adds the leftovers to its next term loses nothing in the long run (error feedback: Seide et al. 2014;
    Karimireddy et al. 2019). It sends what an all-reduce of the same bytes sends: an exchange and an all-gather.

    All ranks make one and finish it, in the same order as their other collectives. What overflows in `dtype` is lost:
    the total is not finite there, on all ranks alike, and the leftovers are 0.
    """

    def __init__(
        self, term: Tensor, dtype: torch.dtype, communicator: Communicator, kind: Traffic, group: GroupName
    ) -> None:
        self._comm = communicator
        self._kind: Traffic = kind
        self._group: GroupName = group
        self._size = term.numel()
        self._chunk = -(-term.numel() // communicator.world_size)
        rounded = torch.zeros(self._chunk * communicator.world_size, dtype=dtype, device=term.device)
        rounded[: self._size] = term
        self.left = _finite_or_zero(term - rounded[: self._size].to(term.dtype))
        self._sent = rounded
        self._received, self._work = communicator.exchange(rounded, kind, group)

    def finish(self) -> tuple[Tensor, Tensor]:
        """Return (total, late), both float32 of the term's size; all ranks enter."""
        self._work.wait()
        terms = self._received.view(self._comm.world_size, self._chunk).to(self.left.dtype)
        total = terms[0].clone()
        for term in terms[1:]:
            total += term
        rounded = total.to(self._sent.dtype)
        gathered, work = self._comm.all_gather(rounded, self._kind, self._group)
        late = self.left.new_zeros(self._chunk * self._comm.world_size)
        mine = slice(self._comm.rank * self._chunk, (self._comm.rank + 1) * self._chunk)
        late[mine] = _finite_or_zero(total - rounded.to(total.dtype))
        work.wait()
        return gathered[: self._size].to(total.dtype), late[: self._size]

    def tensors(self) -> list[Tensor]:
        """Return what is held until it is finished, for counting memory."""
        return [self._sent, self._received, self.left]


def _finite_or_zero(tensor: Tensor) -> Tensor:
    return torch.where(torch.isfinite(tensor), tensor, 0.0)
