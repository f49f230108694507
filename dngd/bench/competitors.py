"""What `dngd bench accuracy` compares: learning-rate grids, K-FAC variants, seeds and targets, from text.

A setting is one optimizer with one learning rate and its own overrides; settings of one optimizer, or of one
K-FAC variant, make a group. Groups are compared by their best setting.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dngd.bench.optimizers import KNOWN, check_optimizers, default_rates, with_optimizer
from dngd.config import TrainConfig
from dngd.config_text import merge, parse_assignment
from dngd.errors import UserError
from dngd.graph import parse_split

SETTABLE = frozenset({"kfac", "dropout", "weight_decay", "momentum"})
"""Fields that --set may give in every benchmark: the others have flags of their own or do not matter there."""
SETTABLE_IN_RUNS = SETTABLE | {
    "average_share",
    "eval_rows",
    "lr_half_steps",
    "lr_schedule",
    "max_steps",
    "num_samplers",
    "prefetch",
    "warmup_steps",
}
SETTABLE_IN_VARIANTS = frozenset({"kfac", "lr", "weight_decay", "average_share"})


@dataclass(frozen=True)
class Setting:
    """One competitor. overrides: configuration fields of its own, nested. note: what else its label says."""

    group: str
    optimizer: str
    lr: float
    overrides: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def label(self) -> str:
        """Group (and optimizer, if that is another word), learning rate, note."""
        name = self.optimizer if self.note else self.group
        return " ".join(part for part in (f"{name} lr={self.lr:g}", self.note) if part)

    def config(self, base: TrainConfig, seed: int) -> TrainConfig:
        """Return the run's configuration. Raises UserError for a bad override."""
        fields = merge(base.model_dump(exclude_unset=True), {**self.overrides, "seed": seed})
        fields.pop("lr", None)
        return with_optimizer(TrainConfig(**fields), self.optimizer, self.lr)


def make_settings(
    base: TrainConfig, optimizers: Sequence[str], rates: str | None, variants: str | None
) -> list[Setting]:
    """Return every competitor, in the order named.

    rates: as of parse_rates. A variant without rates of its own takes those given for kfac, if any.
    variants: as of parse_variants. Raises UserError for a bad name, grid or variant.
    """
    names = check_optimizers(optimizers)
    grids = parse_rates(rates or "")
    others = parse_variants(variants or "", taken=KNOWN)
    for name in grids:
        if name not in names and name not in others:
            known = ", ".join([*names, *others])
            raise UserError(f"--lrs gives learning rates of {name!r}, which does not take part; take part: {known}")
    settings = [Setting(name, name, lr) for name in names for lr in grids.get(name, default_rates(name, base))]
    for name, overrides in others.items():
        fields = dict(overrides)
        own = fields.pop("lr", None)
        if own is not None and name in grids:
            raise UserError(f"variant {name!r} has lr={own} and --lrs gives it others; give them in one place")
        rates_of: tuple[float, ...]
        if own is not None:
            rates_of = (_rate(str(own), f"--variants {name}"),)
        else:
            # K-FAC's usual rate may depend on its settings.
            usual = default_rates("kfac", Setting(name, "kfac", 1.0, fields).config(base, base.seed))
            rates_of = grids.get(name, grids.get("kfac", usual))
        settings += [Setting(name, "kfac", lr, fields) for lr in rates_of]
    for setting in settings:
        setting.config(base, base.seed)  # a bad override is told before anything runs
    return settings


def parse_rates(text: str) -> dict[str, tuple[float, ...]]:
    """Return {"adam": (0.001, 0.01)} for "adam=1e-3,1e-2"; groups are separated by ';'. Raises UserError."""
    grids: dict[str, tuple[float, ...]] = {}
    for part in _parts(text, ";"):
        name, equals, values = (piece.strip() for piece in part.partition("="))
        if not equals or not name or not values:
            raise UserError(f"--lrs {part!r} is not OPTIMIZER=LR,LR,...; write e.g. --lrs 'adam=3e-3,1e-2;kfac=0.1'")
        if name in grids:
            raise UserError(f"--lrs names {name!r} twice; give its learning rates in one list")
        rates = tuple(_rate(value, f"--lrs {name}") for value in _parts(values, ","))
        if len(set(rates)) < len(rates):
            raise UserError(f"--lrs {part!r} repeats a learning rate; give each one once")
        grids[name] = rates
    return grids


def parse_variants(text: str, taken: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Return {"mc": {"kfac": {"fisher": "monte_carlo"}}} for "mc:kfac.fisher=monte_carlo".

    Variants are separated by ';', a variant's assignments by ','. taken: names that are in use already.
    Raises UserError for anything else, and for fields other than kfac.*, lr and weight_decay.
    """
    variants: dict[str, dict[str, Any]] = {}
    for part in _parts(text, ";"):
        name, colon, body = (piece.strip() for piece in part.partition(":"))
        if not colon or not name or not body:
            raise UserError(
                f"--variants {part!r} is not NAME:KEY=VALUE,...; write e.g. --variants 'mc:kfac.damping=0.1'"
            )
        if name in variants or name in taken:
            raise UserError(f"--variants names {name!r}, which is in use already; give every variant its own name")
        variants[name] = parse_fields(_parts(body, ","), SETTABLE_IN_VARIANTS, "--variants")
    return variants


def parse_fields(assignments: Sequence[str], allowed: frozenset[str], flag: str) -> dict[str, Any]:
    """Return the nested fields of KEY=VALUE texts. Raises UserError for a key outside of `allowed`."""
    fields: dict[str, Any] = {}
    for text in assignments:
        parsed = parse_assignment(text)
        key = next(iter(parsed))
        if key not in allowed:
            names = ", ".join(sorted(f"{name}.*" if name == "kfac" else name for name in allowed))
            raise UserError(f"{flag} {text!r}: {key} cannot be set here; {flag} takes {names}")
        fields = merge(fields, parsed)
    return fields


def parse_names(text: str) -> tuple[str, ...]:
    """Return the parts of a comma-separated list."""
    return tuple(_parts(text, ","))


def parse_seeds(text: str) -> tuple[int, ...]:
    """Return the run seeds of "0,1,2". Raises UserError unless they are distinct whole numbers from 0."""
    seeds = _parts(text, ",")
    if not seeds or not all(part.isascii() and part.isdigit() for part in seeds):
        raise UserError(f"--seeds {text!r} is not a list of whole numbers from 0; write e.g. --seeds 0,1,2")
    numbers = tuple(int(part) for part in seeds)
    if len(set(numbers)) < len(numbers):
        raise UserError(f"--seeds {text!r} repeats a seed; runs of one seed are equal: give different ones")
    return numbers


def parse_counts(text: str, flag: str) -> tuple[int, ...]:
    """Return the distinct whole numbers of "0,1,2". Raises UserError for anything else."""
    parts = _parts(text, ",")
    if not parts or not all(part.isascii() and part.isdigit() for part in parts) or len(set(parts)) < len(parts):
        raise UserError(f"{flag} {text!r} is not a list of distinct whole numbers from 0; write e.g. {flag} 0,1,2")
    return tuple(map(int, parts))


def parse_targets(text: str) -> tuple[float, ...]:
    """Return the accuracies of "0.9,0.91". Raises UserError unless each is above 0 and at most 1."""
    targets = []
    for part in _parts(text, ","):
        try:
            value = float(part)
        except ValueError:
            value = math.nan
        if not 0 < value <= 1:
            raise UserError(f"--targets {part!r} is no validation accuracy; give numbers above 0, at most 1")
        targets.append(value)
    if not targets:
        raise UserError(f"--targets {text!r} is empty; write e.g. --targets 0.85,0.9, or leave it out")
    return tuple(targets)


def parse_datasets(text: str, split: str) -> tuple[tuple[str, str], ...]:
    """Return (data set, split) pairs of "cora,products-shaped@masks". split: of those that name none.

    Raises UserError for a data set without a name or named twice, and for a split that is none.
    """
    found = []
    for part in _parts(text, ","):
        name, at, own = part.rpartition("@")
        pair = (name, str(parse_split(own))) if at and "/" not in own.partition(":")[0] else (part, split)
        if not pair[0] or pair in found:
            raise UserError(f"--datasets {part!r} has no name or is named twice; write e.g. cora,products-shaped@masks")
        found.append(pair)
    return tuple(found)


def parse_models(text: str) -> tuple[tuple[str, int], ...]:
    """Return (kind, layers) pairs of "gcn:2,sage:3". Raises UserError for anything else."""
    found = []
    for part in _parts(text, ","):
        kind, colon, layers = part.partition(":")
        if not colon or not (layers.isascii() and layers.isdigit()) or (kind, int(layers)) in found:
            raise UserError(f"--models {part!r} is not KIND:LAYERS, each once; write e.g. --models gcn:2,sage:3")
        found.append((kind, int(layers)))
    if not found:
        raise UserError(f"--models {text!r} is empty; write e.g. --models gcn:2,sage:3")
    return tuple(found)


def _rate(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value > 0 and math.isfinite(value)):
        raise UserError(f"{where}: {text!r} is no learning rate; give numbers above 0")
    return value


def _parts(text: str, separator: str) -> list[str]:
    return [part.strip() for part in text.split(separator) if part.strip()]
