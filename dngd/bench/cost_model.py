"""A model of a training step's time over a network. Pure functions on numbers; what it says is no measurement.

    step = compute + α · rounds + bytes / (η · bandwidth) + γ · bytes

rounds and bytes are a rank's, a step's, over all of its collectives, one after another and none hidden behind compute:

- all-reduce of B bytes on n ranks: 2(n-1) rounds, 2(n-1)/n · B bytes through each link. That is gloo's algorithm when
  none is named, as torch names none (gloo/allreduce.cc, ring: reduce-scatter and all-gather of n chunks, each in two
  or more segments that are on their way in turns, so that a chunk costs one latency);
- broadcast: ⌈log₂ n⌉ rounds and ⌈log₂ n⌉ · B bytes through the source's link (gloo/broadcast.cc, a binomial tree that
  passes on whole buffers).

α is the latency of a round, η the share of a link's nominal rate that payload gets, γ the time that the hosts
themselves take for a byte. The three are fitted; compute, rounds and bytes are measured or worked out.

Patarasuk & Yuan 2009 (ring all-reduce is bandwidth-optimal); Thakur, Rabenseifner & Gropp 2005 (α-β model).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Load:
    """What a rank's link carries in a step. rounds: latencies one after another. link_bytes: through one direction."""

    rounds: float
    link_bytes: float

    def __add__(self, other: Load) -> Load:
        return Load(self.rounds + other.rounds, self.link_bytes + other.link_bytes)

    def times(self, per_step: float) -> Load:
        """Return the load of something that happens per_step times a step."""
        return Load(self.rounds * per_step, self.link_bytes * per_step)


NO_LOAD = Load(0.0, 0.0)


def all_reduce(ranks: int, payload_bytes: float, calls: float = 1.0) -> Load:
    """Return the load of all-reducing payload_bytes, in all, in that many calls. ranks: at least 1."""
    assert ranks >= 1, ranks
    return Load(2 * (ranks - 1) * calls, 2 * (ranks - 1) / ranks * payload_bytes)


def half_all_reduce(ranks: int, calls: float = 1.0) -> Load:
    """Return the latencies of as many calls of a reduce-scatter, an exchange or an all-gather: half of a ring's."""
    assert ranks >= 1, ranks
    return Load((ranks - 1) * calls, 0.0)


def broadcast(ranks: int, payload_bytes: float, calls: float = 1.0) -> Load:
    """Return the load of broadcasting payload_bytes, in all, in that many calls. ranks: at least 1."""
    assert ranks >= 1, ranks
    depth = (ranks - 1).bit_length()
    return Load(depth * calls, depth * payload_bytes)


@dataclass(frozen=True)
class Network:
    """What a network does to a load. latency_seconds: α of a round. efficiency: η, payload's share of the nominal
    rate. host_seconds_per_byte: γ."""

    latency_seconds: float
    efficiency: float
    host_seconds_per_byte: float = 0.0

    def seconds(self, load: Load, bytes_per_second: float) -> float:
        """Return the time of a load over links of a nominal rate."""
        return (
            self.latency_seconds * load.rounds
            + load.link_bytes / (self.efficiency * bytes_per_second)
            + self.host_seconds_per_byte * load.link_bytes
        )


@dataclass(frozen=True)
class Observation:
    """A measured step. bytes_per_second: nominal rate of the links."""

    compute_seconds: float
    load: Load
    bytes_per_second: float
    step_seconds: float


def fit_network(observations: Sequence[Observation]) -> Network:
    """Return the network that explains measured steps best: least squares of the relative errors, α, 1/η, γ >= 0.

    With three unknowns every set of them that stays positive is tried. Raises ValueError unless there are as many
    observations as unknowns, and where no observation needs the links' rate.
    """
    if len(observations) < 3:
        raise ValueError(f"{len(observations)} observations cannot tell three unknowns; give at least 3")
    weights = np.array([1.0 / one.step_seconds for one in observations])
    columns = np.array(
        [[one.load.rounds, one.load.link_bytes / one.bytes_per_second, one.load.link_bytes] for one in observations]
    )
    rest = np.array([one.step_seconds - one.compute_seconds for one in observations])
    # Of one size each, or latencies (per round) and bytes would differ by ten orders of magnitude.
    units = np.abs(columns).max(axis=0)
    units[units == 0] = 1.0
    best: tuple[float, np.ndarray] | None = None
    for size in range(1, 4):
        for chosen in itertools.combinations(range(3), size):
            picked = list(chosen)
            matrix = (columns / units)[:, picked] * weights[:, None]
            found, *_ = np.linalg.lstsq(matrix, rest * weights, rcond=None)
            if (found < 0).any():
                continue
            error = float(np.square(matrix @ found - rest * weights).sum())
            values = np.zeros(3)
            values[picked] = found / units[picked]
            if best is None or error < best[0]:
                best = error, values
    if best is None or best[1][1] <= 0:
        raise ValueError("the steps took no longer on slower links: there is no rate to be fitted")
    latency, per_nominal_second, per_byte = (float(value) for value in best[1])
    return Network(latency, 1.0 / per_nominal_second, per_byte)


def predict_step(compute_seconds: float, load: Load, bytes_per_second: float, network: Network) -> float:
    """Return the model's time of a step."""
    return compute_seconds + network.seconds(load, bytes_per_second)


def relative_error(predicted: float, measured: float) -> float:
    """Return `|predicted - measured| / measured`."""
    return abs(predicted - measured) / measured
