"""Finds the best settings of a baseline without training all of its grid with all seeds. No training here.

1. Lengths. Every lineage (optimizer, learning rate, schedule, batch size) is trained with the first seed for
   `first_epochs` and for twice as long, whatever it showed. It is then trained for twice as long again (at last for
   `max_epochs`), anew with its schedule stretched, for as long as the last doubling gained at least `tolerance` and as
   much from each doubling that is left up to `max_epochs` would bring it within `slack` of the best of its family: the
   budget is where validation stops improving, setting by setting, and a rate that is too low for short trainings is
   followed to long ones. Shorter cosine schedules stay in the grid, since they may reach a target sooner: while one of
   the shortest of its lineage is among the first `keep` to a target, half of its length, rounded up, is trained too. A
   constant rate's shorter training is the beginning of its longer one, which takes its place.
2. Seeds. All settings are compared on the first seed; the leaders are trained with the second and compared on both;
   the leaders of those go on to all seeds, in turns with K-FAC. A leader is one of the first `keep` in any of five
   respects: best accuracy, fewest seconds to just below the best, to the primary target, and to one and two margins
   below that, since on few seeds a fast setting may miss what it reaches in the mean over all. Targets are those of the
   settings compared, on the seeds compared.

So every lineage is trained whole at least once, and a setting is left out only with `keep` others before it in each of
the five respects, on the very seeds (splits, batches) that it was trained with: one that is the fastest in the mean
over all seeds, but neither on the first nor on the first two, may still be lost. Among those left, the most favourable
is the baseline, anew for each target: the least of several noisy times, which errs in the baseline's favour. Seconds
are steps times the median pace of the optimizer at that batch size, so that the machine's moods do not choose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from dngd.bench.curves import TARGET_MARGIN, Curve, default_targets, first_reach, mean_curve, smoothed
from dngd.bench.protocol import Lineage, Member, Protocol

Train = Callable[[Sequence[Member], int], list[Curve]]
"""Trains members with a seed, each alone, and returns their validation curves."""

SEARCH_EVALUATIONS = 10
"""Evaluations before a target: half of what the finals have, since exact evaluation takes longer than training."""
SEARCH_SMOOTHING = 1
"""Neighbours on each side of a smoothed value: about the finals' share of the steps so far."""

NEAR_BEST = 0.001
"""One target lies this far below the best, which as a rule one setting alone reaches."""
MARGINS_BELOW = (0, 1, 2)
"""The other targets lie so many margins below the primary one."""


@dataclass
class Grid:
    """What a search knows: each member's curves, one a seed in the protocol's order, and where lengths ended."""

    curves: dict[Member, list[Curve]] = field(default_factory=dict)
    bests: dict[Lineage, list[float]] = field(default_factory=dict)
    capped: set[Lineage] = field(default_factory=set)
    """Lineages that were still improving, and near enough to the best, at max_epochs."""


def search(lineages: Sequence[Lineage], protocol: Protocol, train: Train) -> tuple[Grid, list[Member]]:
    """Return what was found of one family's grid, and its finalists, best accuracy first."""
    grid = Grid()
    find_lengths(grid, lineages, protocol, train)
    find_shorter(grid, protocol, train)
    return grid, narrow(grid, protocol, train)


def find_lengths(grid: Grid, lineages: Sequence[Lineage], protocol: Protocol, train: Train) -> None:
    """Train lineages with the first seed, twice as long each time while that helps."""
    racing, lengths = list(lineages), lengths_of(protocol)
    for place, epochs in enumerate(lengths):
        is_first, left = place == 0, len(lengths) - 1 - place
        # The beginning of a constant rate's next training is this one.
        members = [Member(own, epochs) for own in racing if own.schedule == "cosine" or not (is_first and left)]
        shorter = 0 if is_first else lengths[place - 1]
        for member, curve in zip(members, train(members, protocol.seeds[0])):
            _take(grid, member, curve, shorter)
        if not is_first:
            racing = still_racing(grid, racing, protocol, max(1, left))
        if left == 0:
            grid.capped |= set(racing)  # with one length nothing shows that it was enough


def find_shorter(grid: Grid, protocol: Protocol, train: Train) -> None:
    """Train half of a cosine's length with the first seed while its shortest is one of the fastest to a target."""
    while True:
        shortest = shortest_of(grid)
        halves = [
            Member(member.lineage, (member.epochs + 1) // 2)
            for member in fastest(grid.curves, protocol.keep[0], grid)
            if member.lineage.schedule == "cosine" and 1 < member.epochs == shortest[member.lineage]
        ]
        if not halves:
            return
        for member, curve in zip(halves, train(halves, protocol.seeds[0])):
            grid.curves[member] = [curve]


def shortest_of(grid: Grid) -> dict[Lineage, int]:
    """Return the shortest length, in epochs, that each lineage was trained for."""
    found: dict[Lineage, int] = {}
    for member in grid.curves:
        found[member.lineage] = min(member.epochs, found.get(member.lineage, member.epochs))
    return found


def lengths_of(protocol: Protocol) -> list[int]:
    """Return the lengths in epochs: the first, twice as long each time, and at last max_epochs, whatever it is."""
    lengths = [protocol.first_epochs]
    while 2 * lengths[-1] <= protocol.max_epochs:
        lengths.append(2 * lengths[-1])
    if lengths[-1] < protocol.max_epochs:
        lengths.append(protocol.max_epochs)
    return lengths


def still_racing(grid: Grid, racing: Sequence[Lineage], protocol: Protocol, left: int) -> list[Lineage]:
    """Return the lineages that `left` further doublings may bring to the best of all, or beyond it."""
    lead = max(max(bests) for bests in grid.bests.values())
    out = []
    for lineage in racing:
        before, now = grid.bests[lineage][-2:]
        gain = now - before
        if gain >= protocol.tolerance and now + left * gain >= lead - protocol.slack:
            out.append(lineage)
    return out


def narrow(grid: Grid, protocol: Protocol, train: Train) -> list[Member]:
    """Train the leaders with a second seed, and return the leaders of those, best accuracy first."""
    alive = list(grid.curves)
    for number, keep in enumerate(protocol.keep[: len(protocol.seeds)], 1):
        if number > 1:
            for member, curve in zip(alive, train(alive, protocol.seeds[number - 1])):
                grid.curves[member].append(curve)
        alive = leaders({member: grid.curves[member][:number] for member in alive}, keep, grid)
    return alive


def leaders(curves: Mapping[Member, Sequence[Curve]], keep: int, grid: Grid) -> list[Member]:
    """Return the members among the first `keep` in any respect, best accuracy first.

    curves: one a seed, the same seeds for all.
    """
    means = _means(curves)
    by_accuracy = sorted(means, key=lambda member: -max(means[member].accuracy))
    chosen = {*by_accuracy[:keep], *fastest(curves, keep, grid)}
    return [member for member in by_accuracy if member in chosen]


def fastest(curves: Mapping[Member, Sequence[Curve]], keep: int, grid: Grid) -> list[Member]:
    """Return the members among the first `keep` to any target, each once.

    curves: one a seed, the same seeds for all.
    """
    paces, means = median_paces(grid), _means(curves)
    primary, best = default_targets(list(means.values()))
    found: dict[Member, None] = {}
    for target in (best - NEAR_BEST, *(primary - margins * TARGET_MARGIN for margins in MARGINS_BELOW)):
        seconds = {
            member: reach.steps * paces[_kind(member)]
            for member, mean in means.items()
            if (reach := first_reach(mean, target)) is not None
        }
        found |= dict.fromkeys(sorted(seconds, key=seconds.__getitem__)[:keep])
    return list(found)


def _means(curves: Mapping[Member, Sequence[Curve]]) -> dict[Member, Curve]:
    return {member: smoothed(mean_curve(own), SEARCH_SMOOTHING) for member, own in curves.items()}


def median_paces(grid: Grid) -> dict[tuple[str, int | None], float]:
    """Return the median seconds a step of each optimizer and batch size, over all its trainings."""
    found: dict[tuple[str, int | None], list[float]] = {}
    for member, curves in grid.curves.items():
        found.setdefault(_kind(member), []).extend(curve.seconds[-1] / curve.steps[-1] for curve in curves)
    return {kind: float(np.median(values)) for kind, values in found.items()}


def _kind(member: Member) -> tuple[str, int | None]:
    return member.lineage.optimizer, member.lineage.batch_size


def _take(grid: Grid, member: Member, curve: Curve, shorter: int) -> None:
    """Note a first seed's training, and the best validation by its length. shorter: epochs of the length before, 0 for
    the first, whose constant rate's training this one has in its beginning."""
    lineage = member.lineage
    bests = grid.bests.setdefault(lineage, [])
    smooth = smoothed(curve, SEARCH_SMOOTHING)
    if lineage.schedule == "constant":
        for beginning in [other for other in grid.curves if other.lineage == lineage]:
            del grid.curves[beginning]
        end = smooth.steps[-1] * shorter / member.epochs
        if shorter:
            bests.append(max(accuracy for step, accuracy in zip(smooth.steps, smooth.accuracy) if step <= end))
    grid.curves[member] = [curve]
    bests.append(max(smooth.accuracy))
