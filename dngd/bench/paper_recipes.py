"""What `dngd bench paper` trains: recipes, the rows of its table, and the grids that validation chooses from.

The paper's table is that of Izadi et al. 2020 (arXiv 2008.09624): a 2-layer GCN of width 16, each node's features
divided by their sum, dropout .5 between the layers, 200 epochs, 10 seeds, test accuracy at the lowest validation loss.
Its figures are the best cells of its sweeps; here validation accuracy chooses.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

Optimizer = Literal["adam", "sgd"]
Factors = Literal["paper", "dngd"]
Features = Literal["row", "l2", "raw"]

DATASETS = ("cora", "citeseer", "pubmed")
SPLITS = ("public", "complete")
PAPER: dict[tuple[str, str], tuple[float, float]] = {
    ("cora", "public"): (82.84, 0.87),
    ("citeseer", "public"): (74.28, 0.67),
    ("pubmed", "public"): (80.06, 0.34),
    ("cora", "complete"): (90.16, 0.59),
    ("citeseer", "complete"): (80.52, 0.14),
    ("pubmed", "complete"): (89.36, 0.57),
}
"""(data set, split) -> the paper's best test accuracy and its standard deviation over 10 runs, in per cent."""


@dataclass(frozen=True)
class Recipe:
    """One way to train.

    factors: None for none, "paper" for those of the paper's code, "dngd" for this project's (Monte-Carlo Fisher,
    unit scale; see dngd.optim.KFACPreconditioner). The preconditioned gradient goes to the optimizer, as in the paper's
    code, and weight decay is added behind it: to all weights or, with decay "first", to the first layer's. momentum: of
    sgd. damping: λ; of "dngd" a multiple of A's mean eigenvalue (scale "mean") or a share of its trace ("trace"), and
    damping_g one of G's. period: steps between two refreshes. semi: the weight λ_u of the other nodes in the last
    epoch, 0 for none; gamma: of its schedule; temperature: of soft labels, None: the arg-max. smoothing: of the true
    labels. features: "row" divides a node's features by their sum (if that is above 1), as the paper does, "l2" by
    their norm; "raw" leaves them. average: decay of a running mean of the weights, which is what is evaluated and what
    labels the other nodes; 0: the weights themselves.
    """

    optimizer: Optimizer
    lr: float
    factors: Factors | None = None
    weight_decay: float = 0.0
    decay: Literal["all", "first"] = "all"
    momentum: float = 0.9
    schedule: Literal["constant", "cosine"] = "constant"
    damping: float = 0.01
    damping_g: float = 0.1
    scale: Literal["trace", "mean"] = "trace"
    period: int = 50
    semi: float = 0.0
    gamma: float = 1.0
    temperature: float | None = None
    smoothing: float = 0.0
    hidden: int = 16
    num_layers: int = 2
    dropout: float = 0.5
    features: Features = "row"
    average: float = 0.0
    epochs: int = 200

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain data."""
        return asdict(self)


Grid = Sequence[Recipe]


@dataclass(frozen=True)
class Row:
    """A row of the table. grid: of a (data set, split), given the recipe that its base row chose there (None without
    one): what validation chooses from. base: that row's name."""

    name: str
    group: str
    grid: Callable[[str, str, Recipe | None], Grid]
    base: str | None = None


def variations(recipe: Recipe, **choices: Sequence[Any]) -> list[Recipe]:
    """Return the recipe with each combination of choices."""
    return [replace(recipe, **dict(zip(choices, values))) for values in itertools.product(*choices.values())]


def _plain(recipe: Recipe, **choices: Sequence[Any]) -> Callable[[str, str, Recipe | None], Grid]:
    return lambda dataset, split, base: variations(recipe, **choices)


def _with_gamma(dataset: str, split: str, base: Recipe | None) -> Grid:
    assert base is not None
    return variations(replace(base, semi=1.0), gamma=(1.0, 3.0, 6.0))


ADAM = Recipe("adam", 0.01, weight_decay=5e-4)
SGD = Recipe("sgd", 0.1)

_PLAIN_ROWS = (
    Row("Adam", "table", _plain(ADAM, lr=(0.005, 0.01, 0.03), weight_decay=(5e-4, 2e-3))),
    # Beside the bias features that are divided by their sum are small; no rate of SGD serves both, so it has raw ones
    Row("SGD", "table", _plain(SGD, lr=(0.1, 0.3, 0.5, 1.0), weight_decay=(0.0, 5e-4), features=("row", "raw"))),
    Row(
        "Adam + K-FAC, paper's factors",
        "table",
        _plain(replace(ADAM, factors="paper"), lr=(0.01,), damping=(1e-3, 1e-2, 1e-1, 1.0)),
    ),
    Row(
        "SGD + K-FAC, paper's factors",
        "table",
        _plain(replace(SGD, factors="paper"), lr=(0.01, 0.1), damping=(1e-3, 1e-2, 1e-1)),
    ),
    Row(
        "Adam + K-FAC",
        "table",
        _plain(replace(ADAM, factors="dngd"), lr=(0.01, 0.03), damping=(3e-3, 3e-2, 3e-1)),
    ),
    Row(
        "SGD + K-FAC",
        "table",
        _plain(replace(SGD, factors="dngd", weight_decay=5e-4), lr=(1.0, 4.0), damping=(3e-3, 3e-2, 3e-1)),
    ),
)


_SHARPENED: dict[str, Any] = {"semi": 1.0, "gamma": 2.0, "temperature": 0.5}
"""Soft labels p²/Σp² of the other nodes."""
_LATE: dict[str, Any] = {"semi": 2.0, "gamma": 3.0, "temperature": 0.33}
_NATURAL = replace(SGD, lr=8.0, factors="dngd", scale="mean", damping=1000.0, damping_g=1.0, weight_decay=5e-4)
"""λ_A = 1000 mean eigenvalues of the features: beside the bias only a few directions of A are shortened."""
_MUCH_DROPOUT = replace(_NATURAL, **(_SHARPENED | {"temperature": 0.7}), dropout=0.8, average=0.95)
_PUBMED = replace(_NATURAL, lr=4.0, damping=300.0, weight_decay=1e-3, **(_SHARPENED | {"semi": 0.5}))
_COMPLETE = replace(_NATURAL, weight_decay=2e-4)
_ANNEALED = replace(SGD, factors="dngd", schedule="cosine", features="raw", dropout=0.4)
TUNED: dict[tuple[str, str], Grid] = {
    ("cora", "public"): [
        _MUCH_DROPOUT,
        replace(_MUCH_DROPOUT, lr=16.0),
        replace(_NATURAL, **(_SHARPENED | {"temperature": 0.85}), smoothing=0.1),
    ],
    ("citeseer", "public"): [
        replace(_NATURAL, **_LATE),
        replace(_NATURAL, **_LATE, average=0.9),
        replace(_NATURAL, **(_LATE | {"temperature": 0.5})),
    ],
    ("pubmed", "public"): [
        _PUBMED,
        replace(_PUBMED, features="raw", weight_decay=2e-3),
        replace(_PUBMED, features="raw", weight_decay=2e-3, dropout=0.7, average=0.95),
    ],
    ("cora", "complete"): [
        _COMPLETE,
        replace(_COMPLETE, lr=16.0, average=0.95),
        replace(_COMPLETE, lr=32.0, average=0.97),
    ],
    ("citeseer", "complete"): [
        replace(_COMPLETE, lr=16.0, damping=300.0, average=0.95),
        replace(_COMPLETE, lr=11.0, damping=300.0, damping_g=3.0, average=0.97),
        replace(_COMPLETE, damping=300.0, features="l2", dropout=0.7, weight_decay=1e-3),
    ],
    ("pubmed", "complete"): [
        replace(_ANNEALED, lr=60.0, weight_decay=1e-5, damping=0.02),
        replace(_NATURAL, lr=70.0, weight_decay=2e-5, damping=100.0, damping_g=0.3, features="raw"),
        replace(_NATURAL, lr=70.0, weight_decay=1e-5, damping=100.0, damping_g=0.3, features="raw", average=0.95),
    ],
}
"""Candidates at the paper's architecture, kept from a search that saw validation accuracies alone: mild whitening,
momentum SGD on the preconditioned gradient, weight decay behind it."""
_FLAT = replace(ADAM, weight_decay=2e-4, features="l2")
ALIKE: dict[tuple[str, str], Grid] = {
    ("cora", "public"): [
        replace(ADAM, **(_SHARPENED | {"gamma": 3.0})),
        replace(ADAM, lr=0.02, **(_SHARPENED | {"temperature": 0.85})),
    ],
    ("citeseer", "public"): [replace(ADAM, **(_SHARPENED | {"temperature": 0.33}))],
    ("pubmed", "public"): [replace(ADAM, weight_decay=1e-3, **_SHARPENED)],
    ("cora", "complete"): [replace(_FLAT, lr=0.005, dropout=0.6, **_SHARPENED)],
    ("citeseer", "complete"): [replace(_FLAT, decay="first", **(_SHARPENED | {"semi": 0.5}))],
    ("pubmed", "complete"): [
        replace(_FLAT, weight_decay=2e-5, dropout=0.3),
        replace(ADAM, lr=0.02, weight_decay=2e-5),
    ],
}
"""Adam's own candidates, from a shorter search of the same kind."""
_WIDE_FLAT = replace(_COMPLETE, damping=300.0, features="l2", weight_decay=1e-3, average=0.95)
WIDE: dict[tuple[str, str], Grid] = {
    ("cora", "public"): [replace(_MUCH_DROPOUT, hidden=64)],
    ("citeseer", "public"): [replace(_NATURAL, **_LATE, hidden=64, dropout=0.7)],
    ("pubmed", "public"): [replace(_PUBMED, features="raw", weight_decay=2e-3, hidden=64, dropout=0.7)],
    ("cora", "complete"): [replace(_COMPLETE, average=0.95, hidden=256, dropout=0.8)],
    ("citeseer", "complete"): [
        replace(_WIDE_FLAT, hidden=64, dropout=0.7),
        replace(_WIDE_FLAT, hidden=256, dropout=0.8),
    ],
    ("pubmed", "complete"): [
        replace(
            _NATURAL,
            lr=70.0,
            weight_decay=1e-5,
            damping=100.0,
            damping_g=0.3,
            features="raw",
            average=0.95,
            hidden=64,
            dropout=0.7,
        )
    ],
}
"""Wider candidates from the same search; on Cora three layers had lower validation accuracy."""


def _tuned(dataset: str, split: str, base: Recipe | None) -> Grid:
    return TUNED[dataset, split]


def _tuned_any_width(dataset: str, split: str, base: Recipe | None) -> Grid:
    return [*TUNED[dataset, split], *WIDE[dataset, split]]


def _adam_alike(dataset: str, split: str, base: Recipe | None) -> Grid:
    """Return Adam's own candidates, and Adam with all else that the K-FAC candidates have."""
    plain: dict[str, Any] = {"optimizer": "adam", "factors": None, "scale": "trace", "damping": 0.01, "damping_g": 0.1}
    decay = 5e-4 if split == "public" else 2e-5 if dataset == "pubmed" else 2e-4
    alike = [replace(recipe, lr=0.01, weight_decay=decay, **plain) for recipe in TUNED[dataset, split]]
    return list(dict.fromkeys([*ALIKE[dataset, split], *alike]))


ROWS: tuple[Row, ...] = (
    Row("K-FAC, tuned, hidden 16", "tuned", _tuned),
    Row("Adam, tuned alike, hidden 16", "alike", _adam_alike),
    Row("K-FAC, tuned, any width", "wide", _tuned_any_width),
    *_PLAIN_ROWS,
    *(Row(f"{row.name}, semi-supervised", "table", _with_gamma, row.name) for row in _PLAIN_ROWS),
)
