"""A short measurement of the network: two sizes of each collective, a few times, on the factor group."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from dngd.comm.communicator import Communicator, Work
from dngd.comm.cost_model import Line, Network

SMALL_BYTES, LARGE_BYTES = 1024, 256 * 1024
REPEATS = 4


def probe_network(communicator: Communicator, device: torch.device) -> Network:
    """Return latency and bandwidth of this world's all-reduce and broadcast. All ranks enter; all get the same bits.

    32 collectives, 2 MiB in all: a third of a second at 100 Mbit/s. Ranks start each timed one together. Of the repeats
    every rank takes the fastest, and the ranks' mean is what all of them use; of a broadcast that of the receivers,
    since the source is done when its bytes are on their way.
    """
    sizes = (SMALL_BYTES, LARGE_BYTES)
    receives = communicator.rank != 0
    seconds = []
    for start, counts in ((_all_reduce, True), (_broadcast, receives)):
        for size in sizes:
            best = _fastest(communicator, start, torch.zeros(size // 4, dtype=torch.float32, device=device))
            seconds.append(best if counts else 0.0)
    agreed = torch.tensor(seconds, dtype=torch.float64, device=device)
    communicator.all_reduce(agreed, "state", group="factor").wait()
    sums = agreed.tolist()
    reduce_ranks, receivers = communicator.world_size, max(1, communicator.world_size - 1)
    return Network(
        all_reduce=Line.through((sizes[0], sums[0] / reduce_ranks), (sizes[1], sums[1] / reduce_ranks)),
        broadcast=Line.through((sizes[0], sums[2] / receivers), (sizes[1], sums[3] / receivers)),
    )


_Start = Callable[[Communicator, torch.Tensor], Work]


def _fastest(communicator: Communicator, start: _Start, buffer: torch.Tensor) -> float:
    best = float("inf")
    for _ in range(REPEATS):
        communicator.all_reduce(buffer.new_zeros(1), "state", group="factor").wait()
        _settle(buffer.device)
        started = time.perf_counter()
        start(communicator, buffer).wait()
        _settle(buffer.device)
        best = min(best, time.perf_counter() - started)
    return best


def _all_reduce(communicator: Communicator, buffer: torch.Tensor) -> Work:
    return communicator.all_reduce(buffer, "state", group="factor")


def _broadcast(communicator: Communicator, buffer: torch.Tensor) -> Work:
    return communicator.broadcast(buffer, 0, "state", group="factor")


def _settle(device: torch.device) -> None:
    """Wait until the device has nothing left to do: a collective's wait may only order streams."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
