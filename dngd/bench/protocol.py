"""How baselines are tuned: grids of learning rates, schedules, batch sizes and lengths, and how many seeds see them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from dngd.bench.competitors import Setting
from dngd.bench.optimizers import default_rates
from dngd.config import TrainConfig
from dngd.errors import UserError

Schedule = Literal["cosine", "constant"]

ADAMW_DECAY = 0.01
"""torch's own default; without decay AdamW is Adam."""

FAMILY = {"adamw": "adam"}
"""Optimizers that are compared as one: the least time of either counts."""

_ADAM = (1e-3, 3e-3, 1e-2, 2e-2, 3e-2)
_SGD = (1e-2, 3e-2, 1e-1, 3e-1, 1.0)


@dataclass(frozen=True)
class Protocol:
    """A search for the best of a baseline, the same for every graph.

    rates: by optimizer; others take their default grid. batches: multiples of the batch size. first_epochs: the length
    that is tried first; further ones double it, up to max_epochs, or halve it. keep: how many of a family's settings go
    on to a second seed, and then to all seeds, for each reason to go on (see dngd.bench.search). tolerance: a doubling
    that gains less than this is the last. slack: distance from the best within which a setting is trained for longer.
    """

    name: str
    rates: Mapping[str, tuple[float, ...]]
    schedules: tuple[Schedule, ...]
    batches: tuple[float, ...]
    first_epochs: int
    max_epochs: int
    keep: tuple[int, int]
    seeds: tuple[int, ...]
    tolerance: float = 0.001
    slack: float = 0.005

    def __post_init__(self) -> None:
        if not 1 <= self.first_epochs <= self.max_epochs:
            raise UserError(
                f"lengths from {self.first_epochs} to {self.max_epochs} epochs are none; give --first-epochs of at "
                "least 1, and at most --max-epochs"
            )


FULL = Protocol(
    "full",
    rates={"adam": _ADAM, "adamw": _ADAM, "sgd": _SGD},
    schedules=("cosine", "constant"),
    batches=(0.5, 1.0, 2.0),
    first_epochs=5,
    max_epochs=160,
    keep=(8, 3),
    seeds=(0, 1, 2, 3, 4),
)
"""The protocol of the README's comparison: hours a graph."""

QUICK = Protocol(
    "quick",
    rates={"adam": (3e-3, 1e-2, 3e-2), "adamw": (3e-3, 1e-2, 3e-2), "sgd": (3e-2, 1e-1, 3e-1)},
    schedules=("cosine",),
    batches=(1.0,),
    first_epochs=5,
    max_epochs=40,
    keep=(4, 2),
    seeds=(0, 1, 2),
)
"""A first look: a coarser grid, which may leave a baseline below its best."""

PROTOCOLS = {"full": FULL, "quick": QUICK}


def choose_protocol(
    name: str,
    *,
    rates: Mapping[str, tuple[float, ...]],
    seeds: Sequence[int] | None,
    first_epochs: int | None,
    max_epochs: int | None,
) -> Protocol:
    """Return a protocol with some of its parts replaced. Raises UserError for an unknown name or bad lengths."""
    if name not in PROTOCOLS:
        raise UserError(f"--protocol {name!r} is unknown; use full, quick or given")
    base = PROTOCOLS[name]
    return replace(
        base,
        rates={**base.rates, **rates},
        seeds=base.seeds if seeds is None else tuple(seeds),
        first_epochs=base.first_epochs if first_epochs is None else first_epochs,
        max_epochs=max(base.max_epochs, first_epochs or 0) if max_epochs is None else max_epochs,
    )


@dataclass(frozen=True)
class Lineage:
    """A setting without its length. batch_size: seeds a step, or None for the full batch."""

    optimizer: str
    lr: float
    schedule: Schedule
    batch_size: int | None

    @property
    def family(self) -> str:
        """The name under which it is compared."""
        return family_of(self.optimizer)


@dataclass(frozen=True)
class Member:
    """A lineage trained for a number of epochs: one point of the grid."""

    lineage: Lineage
    epochs: int

    def setting(self, base: TrainConfig) -> Setting:
        """Return what is trained. base: the configuration that all settings share."""
        own = self.lineage
        fields: dict[str, object] = {"lr_schedule": own.schedule, "epochs": self.epochs}
        if own.batch_size is not None:
            fields["batch_size"] = own.batch_size
        if own.optimizer == "adamw" and base.weight_decay == 0:
            fields["weight_decay"] = ADAMW_DECAY
        batch = "full batch" if own.batch_size is None else f"batch {own.batch_size}"
        note = f"{own.schedule}, {batch}, {self.epochs} epochs"
        return Setting(own.family, own.optimizer, own.lr, fields, note)


def family_of(optimizer: str) -> str:
    """Return the name under which an optimizer is compared."""
    return FAMILY.get(optimizer, optimizer)


def lineages_of(optimizer: str, protocol: Protocol, config: TrainConfig, num_train: int) -> list[Lineage]:
    """Return an optimizer's grid on a graph with so many training nodes.

    A multiple of the batch size that is larger than the training set becomes the training set; sizes that coincide
    count once.
    """
    sizes: list[int | None]
    if config.batch_size == "full":
        sizes = [None]
    else:
        assert isinstance(config.batch_size, int)
        found = (min(num_train, max(1, round(multiple * config.batch_size))) for multiple in protocol.batches)
        sizes = list(dict.fromkeys(found))
    rates = rates_of(optimizer, protocol, config)
    return [Lineage(optimizer, lr, schedule, size) for schedule in protocol.schedules for size in sizes for lr in rates]


def rates_of(optimizer: str, protocol: Protocol, config: TrainConfig) -> tuple[float, ...]:
    """Return the learning rates of an optimizer's grid."""
    return protocol.rates.get(optimizer) or default_rates(optimizer, config)


def borders_of(member: Member, lineages: Sequence[Lineage], *, is_capped: bool, shortest: int) -> list[str]:
    """Return in which respects a setting lies at its grid's border, so that a better one may lie beyond it.

    lineages: the whole grid. is_capped: whether it was still improving at the longest length. shortest: the least
    epochs that its lineage was trained for.
    """
    own = member.lineage
    of_optimizer = [other for other in lineages if other.optimizer == own.optimizer]
    found = []
    rates = sorted({other.lr for other in of_optimizer})
    if len(rates) > 1 and own.lr in (rates[0], rates[-1]):
        found.append("learning rate")
    sizes = sorted({other.batch_size for other in of_optimizer if other.batch_size is not None})
    if len(sizes) > 1 and own.batch_size in (sizes[0], sizes[-1]):
        found.append("batch size")
    if is_capped or (own.schedule == "cosine" and 1 < member.epochs == shortest):
        found.append("epochs")
    return found
