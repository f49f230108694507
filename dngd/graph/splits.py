"""Splits: which labelled nodes train, validate and test.

A specification is text, as on the command line: `masks`, `masks:K`, `public`, `complete`,
`random:TRAIN/VAL/TEST`. Unlabelled nodes are in no part of any split.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dngd.errors import UserError

SPLIT_FORMS = "masks, masks:K, public, complete or random:TRAIN/VAL/TEST (such as random:0.5/0.25/0.25)"
SplitKind = Literal["masks", "public", "complete", "random"]

_COMPLETE_HELD_OUT = 1000
_ROUNDING = 1e-9


@dataclass(frozen=True)
class SplitSpec:
    """A parsed specification. index: the K of masks:K. fractions: those of random."""

    kind: SplitKind
    index: int | None = None
    fractions: tuple[float, float, float] | None = None

    def __str__(self) -> str:
        if self.fractions is not None:
            return "random:" + "/".join(f"{f:g}" for f in self.fractions)
        return self.kind if self.index is None else f"{self.kind}:{self.index}"


@dataclass(frozen=True)
class Split:
    """Disjoint parts of the labelled nodes: int64 node numbers, ascending."""

    train: Tensor
    val: Tensor
    test: Tensor
    spec: str
    """What was asked for, resolved: `masks:0` where several splits exist and none was named."""
    dropped_unlabelled: dict[str, int] = field(default_factory=dict)
    """Part -> nodes that the masks name but that have no label."""


def parse_split(spec: str) -> SplitSpec:
    """Parse a specification; raises UserError for anything but the forms in SPLIT_FORMS."""
    kind, colon, rest = spec.strip().partition(":")
    if kind == "masks":
        if not colon:
            return SplitSpec("masks")
        if not (rest.isascii() and rest.isdigit()):
            raise UserError(f"split {spec!r} does not name a split by a number from 0; write masks:0, masks:1, ...")
        return SplitSpec("masks", index=int(rest))
    if kind in ("public", "complete") and not colon:
        return SplitSpec("public" if kind == "public" else "complete")
    if kind == "random":
        return SplitSpec("random", fractions=parse_fractions(f"split {spec!r}", rest, "random:0.5/0.25/0.25"))
    raise UserError(f"split {spec!r} is not known; use {SPLIT_FORMS}")


def parse_fractions(what: str, text: str, example: str) -> tuple[float, float, float]:
    """Return three shares of a text A/B/C. what, example: for the UserError that other texts raise."""
    try:
        values = [float(part) for part in text.split("/")]
    except ValueError:
        values = []
    if len(values) != 3:
        raise UserError(f"{what} does not give three fractions; write TRAIN/VAL/TEST, such as {example}")
    total = math.fsum(values)
    if not all(0 < v <= 1 for v in values) or total > 1 + _ROUNDING:
        raise UserError(
            f"{what} has fractions that add up to {total:g}; each must be above 0 and at most 1, and their sum at most "
            f"1: write such as {example}"
        )
    return values[0], values[1], values[2]


def make_split(spec: str, *, labels: Tensor, masks: Mapping[str, Tensor], graph: str, seed: int = 0) -> Split:
    """Return the split that `spec` names.

    labels: int64 [nodes], or int8 [nodes, classes], -1 unlabelled. masks: {part: bool (nodes,) or (splits,
    nodes)}. graph: its name, for messages. seed: of `random`, which draws from the labelled nodes; the same on every
    machine and numpy.
    `complete`: all but the last 1,000 nodes train, the next 500 validate, the last 500 test (Chen 2018).
    Raises UserError if the graph has no such split, parts overlap, or a part is empty.
    """
    parsed = parse_split(spec)
    labelled = (labels if labels.ndim == 1 else labels[:, 0]) >= 0
    if not bool(labelled.any()):
        raise UserError(
            f"graph {graph} has no labelled node, so that no split can be made of it; import it with labels"
        )
    if parsed.kind == "random":
        parts = _random_parts(parsed, labelled, seed)
    elif parsed.kind == "complete":
        parts = _complete_parts(labels, graph)
    else:
        parsed, parts = _mask_parts(parsed, masks, graph)
    dropped = {}
    for name, nodes in parts.items():
        keep = labelled[nodes]
        dropped[name] = int((~keep).sum())
        parts[name] = nodes[keep]
    _check_parts(parts, dropped, parsed, graph)
    return Split(parts["train"], parts["val"], parts["test"], spec=str(parsed), dropped_unlabelled=dropped)


def _random_parts(parsed: SplitSpec, labelled: Tensor, seed: int) -> dict[str, Tensor]:
    if seed < 0:
        raise UserError(f"seed={seed} is negative; give a whole number from 0")
    assert parsed.fractions is not None
    nodes = labelled.nonzero()[:, 0].numpy()
    # Sorting raw 64-bit draws: unlike Generator.permutation, their stream is the same in every numpy.
    order = np.argsort(np.random.PCG64(seed).random_raw(len(nodes)), kind="stable")
    ends = [math.floor(math.fsum(parsed.fractions[: k + 1]) * len(nodes) + _ROUNDING * len(nodes)) for k in range(3)]
    starts = [0, *ends[:2]]
    return {
        name: torch.from_numpy(np.sort(nodes[order[start:end]]))
        for name, start, end in zip(("train", "val", "test"), starts, ends)
    }


def _complete_parts(labels: Tensor, graph: str) -> dict[str, Tensor]:
    num_nodes = len(labels)
    if num_nodes <= _COMPLETE_HELD_OUT:
        raise UserError(
            f"split complete holds out the last {_COMPLETE_HELD_OUT} nodes but graph {graph} has "
            f"{num_nodes}; use --split random:0.5/0.25/0.25"
        )
    first = num_nodes - _COMPLETE_HELD_OUT
    middle = first + _COMPLETE_HELD_OUT // 2
    return {
        "train": torch.arange(first),
        "val": torch.arange(first, middle),
        "test": torch.arange(middle, num_nodes),
    }


def _mask_parts(parsed: SplitSpec, masks: Mapping[str, Tensor], graph: str) -> tuple[SplitSpec, dict[str, Tensor]]:
    if not masks:
        raise UserError(
            f"split {parsed} needs the graph's own masks but {graph} has none; use --split random:0.5/0.25/0.25"
        )
    several = {len(mask) for mask in masks.values() if mask.ndim == 2}
    if parsed.kind == "public" and several:
        raise UserError(
            f"split public means one public split but {graph} has {max(several)}; "
            f"use masks:0 to masks:{min(several) - 1}"
        )
    if parsed.index is not None and not several:
        if parsed.index != 0:
            raise UserError(f"split {parsed} does not exist: {graph} has one split; use masks")
    elif several and (parsed.index or 0) >= min(several):
        raise UserError(
            f"split {parsed} does not exist: {graph} has masks:0 to masks:{min(several) - 1}; use one of these"
        )
    if several and parsed.index is None:
        parsed = SplitSpec("masks", index=0)
    parts = {}
    for name in ("train", "val", "test"):
        mask = masks.get(name)
        if mask is None:
            parts[name] = torch.empty(0, dtype=torch.int64)
        else:
            parts[name] = (mask if mask.ndim == 1 else mask[parsed.index or 0]).nonzero()[:, 0]
    return parsed, parts


def _check_parts(parts: Mapping[str, Tensor], dropped: Mapping[str, int], parsed: SplitSpec, graph: str) -> None:
    for name, nodes in parts.items():
        if len(nodes) == 0:
            why = f" (its {dropped[name]} nodes have no label)" if dropped[name] else ""
            fix = "give larger fractions" if parsed.kind == "random" else "use --split random:0.5/0.25/0.25"
            raise UserError(f"the {name} part of split {parsed} of graph {graph} is empty{why}; {fix}")
    largest = max(int(nodes.max()) for nodes in parts.values())
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        # A byte a node: torch.isin would sort copies of both.
        is_in_one = torch.zeros(largest + 1, dtype=torch.bool)
        is_in_one[parts[one]] = True
        shared = int(is_in_one[parts[other]].sum())
        if shared:
            raise UserError(
                f"the {one} and {other} parts of split {parsed} of graph {graph} share {shared} nodes; "
                "mend the masks, or use --split random:0.5/0.25/0.25"
            )
