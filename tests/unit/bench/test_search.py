"""The search for the best of a grid, over trainings whose outcomes are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from dngd.bench.curves import Curve
from dngd.bench.protocol import (
    ADAMW_DECAY,
    FULL,
    Lineage,
    Member,
    Protocol,
    borders_of,
    choose_protocol,
    lineages_of,
)
from dngd.bench.search import Grid, leaders, median_paces, search, still_racing
from dngd.config import TrainConfig
from dngd.errors import UserError

PROTOCOL = Protocol(
    "test", {}, ("cosine", "constant"), (1.0,), first_epochs=5, max_epochs=80, keep=(2, 1), seeds=(0, 1, 2)
)
BASE = TrainConfig(dataset="x", engine="local", batch_size=512)


def lineage(lr: float, schedule: str = "cosine", batch_size: int = 64, optimizer: str = "adam") -> Lineage:
    assert schedule in ("cosine", "constant")
    return Lineage(optimizer, lr, schedule, batch_size)  # type: ignore[arg-type]


def rise(best: float, half_life: float, epochs: int, pace: float = 1.0) -> Curve:
    """A curve that rises to `best`, half of the way in each half_life epochs; an epoch is ten steps."""
    steps = tuple(range(0, 10 * epochs + 1))
    return Curve(
        steps, tuple(pace * step for step in steps), tuple(best * (1 - 0.5 ** (s / 10 / half_life)) for s in steps)
    )


class Trainings:
    """Trains by a formula and remembers what it was asked for."""

    def __init__(self, outcome: Callable[[Member, int], Curve]) -> None:
        self.outcome = outcome
        self.asked: list[tuple[Member, int]] = []

    def __call__(self, members: Sequence[Member], seed: int) -> list[Curve]:
        self.asked += [(member, seed) for member in members]
        return [self.outcome(member, seed) for member in members]

    def epochs_of(self, lineage: Lineage) -> list[int]:
        return sorted({member.epochs for member, _ in self.asked if member.lineage == lineage})


def test_a_lineage_is_trained_for_longer_while_that_helps() -> None:
    quick, slow, poor = lineage(0.01), lineage(0.001), lineage(1.0)
    shapes = {quick: (0.90, 1.0), slow: (0.92, 8.0), poor: (0.50, 1.0)}
    trainings = Trainings(lambda member, _: rise(*shapes[member.lineage], member.epochs))
    grid, finalists = search([quick, slow, poor], PROTOCOL, trainings)
    assert trainings.epochs_of(poor) == [5, 10], "far below the best, and it gains little"
    assert trainings.epochs_of(quick) == [5, 10, 20], "the last doubling gains less than a tenth of a point"
    assert trainings.epochs_of(slow) == [5, 10, 20, 40, 80], "it gains by every doubling"
    assert finalists[0] == Member(slow, 80)
    assert grid.capped == {slow}


def test_what_gains_until_the_longest_length_is_marked() -> None:
    own = lineage(0.01)
    grid, _ = search([own], PROTOCOL, Trainings(lambda member, _: rise(0.9, 200.0, member.epochs)))
    assert grid.capped == {own}
    grid, _ = search([own], PROTOCOL, Trainings(lambda member, _: rise(0.9, 0.5, member.epochs)))
    assert grid.capped == set()


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
@pytest.mark.parametrize(
    ("first", "longest", "lengths"), [(5, 30, [5, 10, 20, 30]), (5, 9, [5, 9]), (20, 30, [20, 30]), (5, 5, [5])]
)
def test_the_longest_length_is_reached_and_marked(first: int, longest: int, lengths: list[int], schedule: str) -> None:
    own = lineage(0.01, schedule)
    protocol = replace(PROTOCOL, first_epochs=first, max_epochs=longest)
    trainings = Trainings(lambda member, _: rise(0.9, 200.0, member.epochs))
    grid, finalists = search([own], protocol, trainings)
    skipped = 1 if schedule == "constant" and len(lengths) > 1 else 0  # it is the beginning of the second
    assert [epochs for epochs in trainings.epochs_of(own) if epochs >= first] == lengths[skipped:]
    assert grid.capped == {own}, "with one length nothing shows that it was enough"
    assert finalists[0] == Member(own, longest)
    known = [0.9 * (1 - 0.5 ** (epochs / 200.0)) for epochs in lengths]
    if skipped:  # each training tells of the length before it, too
        known = [value for pair in zip(known, known[1:]) for value in pair]
    assert grid.bests[own] == pytest.approx(known, rel=0.02)


def test_a_low_rate_that_catches_up_is_not_given_up() -> None:
    """It is far behind at first, but as much as its last doubling gained, from each that is left, brings it near."""
    lead, late = lineage(0.01), lineage(0.001)
    for gain, left, goes_on in ((0.2, 1, True), (0.19, 1, False), (0.1, 2, True), (0.05, 3, False), (0.05, 4, True)):
        grid = Grid(bests={lead: [0.9, 0.9], late: [0.7 - gain, 0.7]})
        assert still_racing(grid, [lead, late], PROTOCOL, left) == ([late] if goes_on else []), (gain, left)


def test_a_constant_rate_is_kept_in_its_longest_training_alone() -> None:
    own = lineage(0.01, "constant")
    trainings = Trainings(lambda member, _: rise(0.9, 4.0, member.epochs))
    grid, _ = search([own], PROTOCOL, trainings)
    assert trainings.epochs_of(own) == [10, 20, 40, 80], "five epochs are the beginning of ten"
    assert list(grid.curves) == [Member(own, 80)]


def test_short_cosines_stay_in_the_grid_and_may_be_the_fastest() -> None:
    own = lineage(0.01)

    def outcome(member: Member, _: int) -> Curve:
        return rise(0.9, member.epochs / 10, member.epochs)

    trainings = Trainings(outcome)
    _, finalists = search([own], replace(PROTOCOL, keep=(2, 2)), trainings)
    assert Member(own, 1) in finalists
    assert trainings.epochs_of(own)[:5] == [1, 2, 3, 5, 10], "halved while the shortest is among the fastest"


def test_lengths_are_halved_only_where_the_shortest_is_fast() -> None:
    """And not of a constant rate, of which a shorter training is the beginning."""
    quick, slow, constant = lineage(0.01), lineage(0.001), lineage(0.01, "constant")

    def outcome(member: Member, _: int) -> Curve:
        if member.lineage == slow:
            return rise(0.89, 4.0, member.epochs)
        enough = member.epochs >= 3 or member.lineage == constant
        return rise(0.9 if enough else 0.6, member.epochs / 10, member.epochs)

    trainings = Trainings(outcome)
    search([quick, slow, constant], replace(PROTOCOL, max_epochs=10), trainings)
    assert trainings.epochs_of(quick) == [2, 3, 5, 10], "two epochs reach no target: one is not tried"
    assert trainings.epochs_of(slow) == [5, 10]
    assert trainings.epochs_of(constant) == [10]


def test_a_fast_setting_that_misses_the_target_on_the_first_seed_goes_on() -> None:
    """It reaches the target in the mean over seeds, and is the fastest to it."""
    quick, accurate = lineage(0.03), lineage(0.01)
    bests = {(quick, 0): 0.893, (quick, 1): 0.899, (accurate, 0): 0.9, (accurate, 1): 0.9}

    def outcome(member: Member, seed: int) -> Curve:
        return rise(bests[member.lineage, seed], 0.5 if member.lineage == quick else 2.0, member.epochs)

    fields = {"max_epochs": 20, "first_epochs": 20, "keep": (1, 1)}
    _, finalists = search([quick, accurate], replace(PROTOCOL, **fields), Trainings(outcome))
    assert {member.lineage for member in finalists} == {quick, accurate}


def test_seeds_are_spent_on_the_leaders_alone() -> None:
    """Five settings; two a respect go on to the second seed, one a respect to all."""
    bests = {0.1: 0.90, 0.2: 0.88, 0.3: 0.86, 0.4: 0.70, 0.5: 0.60}
    own = [lineage(lr, "constant") for lr in bests]
    trainings = Trainings(lambda member, _: rise(bests[member.lineage.lr], 0.5, member.epochs))
    search(own, replace(PROTOCOL, max_epochs=5), trainings)
    second = {member.lineage.lr for member, seed in trainings.asked if seed == 1}
    assert 0.1 in second
    assert 0.2 in second
    assert not second & {0.4, 0.5}
    assert {seed for _, seed in trainings.asked} == {0, 1}, "all seeds are the finals' business"


def test_the_second_seed_is_heard() -> None:
    """Ahead on the first seed alone is not enough."""
    bests = {(0.1, 0): 0.90, (0.2, 0): 0.899, (0.1, 1): 0.80, (0.2, 1): 0.89}
    trainings = Trainings(lambda member, seed: rise(bests[member.lineage.lr, seed], 0.5, member.epochs))
    _, finalists = search([lineage(0.1), lineage(0.2)], replace(PROTOCOL, max_epochs=5), trainings)
    assert finalists[0].lineage.lr == 0.2


def test_a_leader_is_accurate_or_fast() -> None:
    """The most accurate is slow; another is quick to half a point below; a third is neither."""
    accurate, quick, neither = (Member(lineage(lr), 20) for lr in (0.1, 0.2, 0.3))
    grid = Grid(
        curves={
            accurate: [rise(0.900, 2.0, 20)],
            quick: [rise(0.8975, 0.5, 20)],
            neither: [rise(0.89, 1.0, 20)],
        }
    )
    assert leaders(grid.curves, 1, grid) == [accurate, quick]
    assert leaders(grid.curves, 3, grid)[-1] == neither


def test_seconds_are_of_the_optimizers_pace_not_of_one_training() -> None:
    """A training that the machine slowed is not called slow: same steps, same optimizer, same batch size."""
    slowed, other = Member(lineage(0.1), 20), Member(lineage(0.2), 20)
    third = Member(lineage(0.3), 20)
    grid = Grid(
        curves={
            slowed: [rise(0.9, 0.5, 20, pace=9.0)],
            other: [rise(0.9, 1.0, 20, pace=1.0)],
            third: [rise(0.5, 1.0, 20, pace=1.0)],
        }
    )
    assert median_paces(grid) == {("adam", 64): 1.0}
    assert leaders(grid.curves, 1, grid) == [slowed], "it needs half of the other's steps"


def test_the_full_grid_is_the_one_that_was_asked_for() -> None:
    own = lineages_of("adam", FULL, BASE, num_train=10_000)
    assert {x.lr for x in own} == {1e-3, 3e-3, 1e-2, 2e-2, 3e-2}
    assert {x.schedule for x in own} == {"cosine", "constant"}
    assert {x.batch_size for x in own} == {256, 512, 1024}
    assert len(own) == len(set(own)) == 30
    assert len(FULL.seeds) == 5


def test_batches_larger_than_the_training_set_become_it_once() -> None:
    assert {x.batch_size for x in lineages_of("adam", FULL, BASE, num_train=600)} == {256, 512, 600}
    assert {x.batch_size for x in lineages_of("adam", FULL, BASE, num_train=300)} == {256, 300}
    full = TrainConfig(dataset="x", engine="local", batch_size="full")
    assert {x.batch_size for x in lineages_of("adam", FULL, full, num_train=300)} == {None}


def test_a_member_is_trained_as_it_says() -> None:
    member = Member(Lineage("adamw", 0.003, "constant", 256), 40)
    own = member.setting(BASE).config(BASE, 3)
    assert (own.optimizer, own.learning_rate, own.lr_schedule) == ("adamw", 0.003, "constant")
    assert (own.batch_size, own.epochs, own.seed, own.weight_decay) == (256, 40, 3, ADAMW_DECAY)
    assert member.setting(BASE).group == "adam", "Adam's time is the least of both"
    assert "adamw" in member.setting(BASE).label
    adam = Member(Lineage("adam", 0.003, "constant", 256), 40).setting(BASE)
    assert adam.config(BASE, 3).weight_decay == 0
    assert adam.label != member.setting(BASE).label


def test_borders_are_marked() -> None:
    own = lineages_of("adam", FULL, BASE, 10_000) + lineages_of("adamw", FULL, BASE, 10_000)

    def borders(lr: float, batch_size: int, *, is_capped: bool = False, shortest: int = 10) -> list[str]:
        return borders_of(Member(lineage(lr, batch_size=batch_size), 20), own, is_capped=is_capped, shortest=shortest)

    assert borders(1e-2, 512) == []
    assert borders(3e-2, 512) == ["learning rate"]
    assert borders(1e-3, 256) == ["learning rate", "batch size"]
    assert borders(1e-2, 512, is_capped=True) == ["epochs"]
    assert borders(1e-2, 512, shortest=20) == ["epochs"]
    constant = Member(lineage(1e-2, "constant", 512), 20)
    assert borders_of(constant, own, is_capped=False, shortest=20) == [], "its beginning is the shorter one"


@pytest.mark.parametrize(
    ("name", "first", "last", "message"),
    [("slow", None, None, "'slow' is unknown"), ("full", 0, None, "--first-epochs"), ("full", 20, 10, "--max-epochs")],
)
def test_bad_protocols_are_told(name: str, first: int | None, last: int | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        choose_protocol(name, rates={}, seeds=None, first_epochs=first, max_epochs=last)


def test_parts_of_a_protocol_may_be_given() -> None:
    own = choose_protocol("full", rates={"adam": (0.5,)}, seeds=(7,), first_epochs=1, max_epochs=2)
    assert (own.rates["adam"], own.seeds, own.first_epochs, own.max_epochs) == ((0.5,), (7,), 1, 2)
    assert own.rates["sgd"] == FULL.rates["sgd"]
