"""The paper's table: every row's hyperparameters chosen on validation, then trained with all seeds; and its seconds.

For each (data set, split) and row every recipe of the row's grid is trained with the first seeds; the one with the
highest mean validation accuracy (at its lowest validation loss; ties: the lower loss) is trained with all seeds. Test
accuracy is looked at nowhere else than in what is reported.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dngd.bench.machine import describe_machine, torch_threads
from dngd.bench.paper_cache import Finished
from dngd.bench.paper_recipes import ADAM, DATASETS, PAPER, ROWS, SGD, SPLITS, Recipe, Row
from dngd.bench.paper_training import Outcome, train
from dngd.bench.paper_work import Place, Workforce, graph_of, worker_pool
from dngd.bench.progress import BenchProgress
from dngd.errors import UserError

PARTS = ("tuned", "alike", "wide", "table", "seconds")
TIMED = {
    "Adam": ADAM,
    "Adam + K-FAC": replace(ADAM, factors="dngd"),
    "Adam + K-FAC, paper's factors": replace(ADAM, factors="paper"),
    "SGD": SGD,
    "SGD + K-FAC": replace(SGD, factors="dngd"),
}
QUICK_EPOCHS = 5


@dataclass(frozen=True)
class PaperOptions:
    """What to run.

    parts: of PARTS. num_seeds: seeds 0, 1, ... of what is reported. grid_seeds: how many of them choose. rounds: turns
    of each optimizer in "seconds". processes: that train at a time. quick: a smoke run of a few epochs, one recipe a
    row; its figures mean nothing. folder: keeps finished trainings.
    """

    datasets: Sequence[str] = DATASETS
    splits: Sequence[str] = SPLITS
    parts: Sequence[str] = PARTS
    num_seeds: int = 10
    grid_seeds: int = 3
    rounds: int = 3
    processes: int = 1
    threads: int = 1
    quick: bool = False
    folder: Path | None = None
    data_root: Path | None = None
    cache_dir: Path | None = None

    def __post_init__(self) -> None:
        for name, given, known in (
            ("--datasets", self.datasets, DATASETS),
            ("--splits", self.splits, SPLITS),
            ("--parts", self.parts, PARTS),
        ):
            unknown = [value for value in given if value not in known]
            if unknown or not given:
                raise UserError(f"{name} {','.join(given)!r} is not valid; use some of: {', '.join(known)}")
        for name, value, least in (
            ("--num-seeds", self.num_seeds, 2),
            ("--grid-seeds", self.grid_seeds, 1),
            ("--rounds", self.rounds, 1),
            ("--processes", self.processes, 1),
        ):
            if value < least:
                raise UserError(f"{name} {value} is too small; give at least {least}")
        if self.grid_seeds > self.num_seeds:
            raise UserError(f"--grid-seeds {self.grid_seeds} is above --num-seeds {self.num_seeds}; give at most that")

    @property
    def rows(self) -> list[Row]:
        """The rows of the table that are wanted."""
        return [row for row in ROWS if row.group in self.parts]

    def place(self, dataset: str, split: str) -> Place:
        """Return a data set and split with where to look for it."""
        return Place(dataset, split, self.data_root, self.cache_dir)

    def grid(self, row: Row, place: Place, base: Recipe | None) -> list[Recipe]:
        """Return a row's recipes at a place."""
        recipes = list(row.grid(place.dataset, place.split, base))
        return [replace(recipes[0], epochs=QUICK_EPOCHS)] if self.quick else recipes

    def trainings(self, row: Row, place: Place) -> int:
        """Return how many trainings a row takes at a place."""
        recipes = len(self.grid(row, place, ADAM if row.base else None))
        return recipes * self.grid_seeds + self.num_seeds - self.grid_seeds


def run_paper_bench(options: PaperOptions, progress: BenchProgress | None = None) -> dict[str, Any]:
    """Train what is asked for and return every choice, figure and time as plain data."""
    progress = progress or BenchProgress()
    finished = Finished(options.folder)
    places = [options.place(dataset, split) for split in options.splits for dataset in options.datasets]
    with torch_threads(options.threads):
        machine = describe_machine(keeps_memory=False)
        seconds = _seconds(options, progress) if "seconds" in options.parts else None
        total = sum(options.trainings(row, place) for row in options.rows for place in places)
        if total:
            progress.begin(total, "starting")
        with worker_pool(options.processes) as pool:
            workforce = Workforce(finished, pool, progress)
            cells = [_cell(options, place, workforce) for place in places] if total else []
    return {
        "benchmark": "paper",
        "machine": machine,
        "config": {
            "datasets": list(options.datasets),
            "splits": list(options.splits),
            "parts": list(options.parts),
            "seeds": list(range(options.num_seeds)),
            "grid_seeds": list(range(options.grid_seeds)),
            "quick": options.quick,
            "test_accuracy_at": "lowest validation loss",
            "chosen_by": "mean validation accuracy of the grid's seeds",
        },
        "cells": cells,
        "seconds": seconds,
    }


def _cell(options: PaperOptions, place: Place, workforce: Workforce) -> dict[str, Any]:
    mean, deviation = PAPER[place.dataset, place.split]
    chosen: dict[str, Recipe] = {}
    rows = []
    for row in options.rows:
        grid = options.grid(row, place, None if row.base is None else chosen[row.base])
        tried = workforce.outcomes_of(place, grid, range(options.grid_seeds))
        best = max(range(len(grid)), key=lambda i: _standing(tried[i]))
        chosen[row.name] = grid[best]
        runs = tried[best] + workforce.outcomes(place, grid[best], range(options.grid_seeds, options.num_seeds))
        test = _spread([100 * run.test_accuracy for run in runs])
        rows.append(
            {
                "name": row.name,
                "group": row.group,
                "recipe": grid[best].to_json(),
                "grid": [
                    {
                        "recipe": recipe.to_json(),
                        "val_accuracy": 100 * statistics.fmean(run.val_accuracy for run in outcomes),
                        "val_loss": _finite(statistics.fmean(run.val_loss for run in outcomes)),
                    }
                    for recipe, outcomes in zip(grid, tried)
                ],
                "test_accuracy": test,
                "val_accuracy": _spread([100 * run.val_accuracy for run in runs]),
                "test_accuracy_at_highest_val_accuracy": _spread([100 * run.test_accuracy_there for run in runs]),
                "seconds": statistics.median(run.seconds for run in runs),
                "passes_the_paper": test["mean"] > mean,
                "runs": [
                    {
                        "seed": seed,
                        "test_accuracy": 100 * run.test_accuracy,
                        "val_accuracy": 100 * run.val_accuracy,
                        "val_loss": _finite(run.val_loss),
                        "epoch": run.epoch,
                        "highest_val_accuracy": 100 * run.highest_val_accuracy,
                        "test_accuracy_at_highest_val_accuracy": 100 * run.test_accuracy_there,
                    }
                    for seed, run in enumerate(runs)
                ],
            }
        )
    paper = {"mean": mean, "std": deviation}
    return {"dataset": place.dataset, "split": place.split, "paper": paper, "rows": rows}


def _standing(outcomes: Sequence[Outcome]) -> tuple[float, float]:
    """Return what validation orders recipes by, higher is better."""
    accuracy = statistics.fmean(outcome.val_accuracy for outcome in outcomes)
    return accuracy, -statistics.fmean(outcome.val_loss for outcome in outcomes)


def _spread(values: Sequence[float]) -> dict[str, float]:
    """Return mean, standard deviation, and the mean's standard error by it: of the seeds, not of the test nodes."""
    deviation = statistics.stdev(values)
    return {"mean": statistics.fmean(values), "std": deviation, "standard_error": deviation / math.sqrt(len(values))}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _seconds(options: PaperOptions, progress: BenchProgress) -> dict[str, Any]:
    """Return the seconds of a training by data set and optimizer, taken in turns, with an evaluation after each epoch
    and of the steps alone, and their ratios to Adam's (K-FAC with SGD: to SGD's)."""
    epochs = QUICK_EPOCHS if options.quick else ADAM.epochs
    progress.begin(len(options.datasets) * len(TIMED) * options.rounds, "seconds")
    out: dict[str, Any] = {"epochs": epochs, "rounds": options.rounds, "datasets": {}}
    for dataset in options.datasets:
        graph = graph_of(options.place(dataset, "public"), "row")
        for recipe in TIMED.values():
            train(graph, replace(recipe, epochs=QUICK_EPOCHS), 0)
        taken: dict[str, list[Outcome]] = {name: [] for name in TIMED}
        for number in range(options.rounds):
            names = list(TIMED)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                taken[name].append(train(graph, replace(TIMED[name], epochs=epochs), number))
                progress.advance(1, f"{dataset} {name}")
        medians = {name: statistics.median(run.seconds for run in runs) for name, runs in taken.items()}
        steps = {name: statistics.median(run.step_seconds for run in runs) for name, runs in taken.items()}
        plain = {name: name.partition(" + ")[0] for name in TIMED}
        out["datasets"][dataset] = {
            name: {
                "seconds": [run.seconds for run in taken[name]],
                "step_seconds": [run.step_seconds for run in taken[name]],
                "median": medians[name],
                "over_plain": medians[name] / medians[plain[name]],
                "steps_median": steps[name],
                "steps_over_plain": steps[name] / steps[plain[name]],
            }
            for name in TIMED
        }
    return out
