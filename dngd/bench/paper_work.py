"""Trainings to be done, in this process or in several, and none of them twice."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from dngd.bench.graphs import open_graph
from dngd.bench.paper_cache import Finished, training_key
from dngd.bench.paper_graph import PaperGraph
from dngd.bench.paper_recipes import Features, Recipe
from dngd.bench.paper_training import Outcome, train
from dngd.bench.progress import BenchProgress
from dngd.errors import TrainingError

TRAINING_SECONDS = 900.0
"""Within which one of a pool's trainings ends; each takes seconds."""


@dataclass(frozen=True)
class Place:
    """A data set and split, and where to find it."""

    dataset: str
    split: str
    data_root: Path | None
    cache_dir: Path | None


@lru_cache(maxsize=2)
def graph_of(place: Place, features: Features) -> PaperGraph:
    """Return a place's graph, kept for the next training."""
    store = open_graph(place.dataset, place.data_root, place.cache_dir)
    return PaperGraph.make(store, store.split(place.split, 0), features)


@lru_cache
def graph_digest(place: Place) -> str:
    """Return the digest of a place's graph."""
    return str(open_graph(place.dataset, place.data_root, place.cache_dir).digest)


def train_at(place: Place, recipe: Recipe, seed: int) -> Outcome:
    """Train once."""
    return train(graph_of(place, recipe.features), recipe, seed)


class Workforce:
    """Does trainings. finished: those done before, and where new ones are kept. pool: None for this process.
    limit_seconds: of the wait for any of the pool's trainings to end."""

    def __init__(
        self,
        finished: Finished,
        pool: ProcessPoolExecutor | None,
        progress: BenchProgress,
        limit_seconds: float = TRAINING_SECONDS,
    ) -> None:
        self._limit_seconds = limit_seconds
        self._finished = finished
        self._pool = pool
        self._progress = progress

    def outcomes(self, place: Place, recipe: Recipe, seeds: Sequence[int]) -> list[Outcome]:
        """Return the outcomes of a recipe's seeds, in order."""
        return self.outcomes_of(place, [recipe], seeds)[0]

    def outcomes_of(self, place: Place, recipes: Sequence[Recipe], seeds: Sequence[int]) -> list[list[Outcome]]:
        """Return the outcomes of each recipe's seeds, in order."""
        asked = {
            (i, seed): training_key(graph_digest(place), place.split, recipe, seed)
            for i, recipe in enumerate(recipes)
            for seed in seeds
        }
        missing = {key: at for at, key in asked.items() if key not in self._finished.outcomes}
        self._progress.skip(len(asked) - len(missing))
        for key, outcome in self._done(place, [(key, recipes[i], seed) for key, (i, seed) in missing.items()]):
            self._finished.put(key, outcome)
            self._progress.advance(1, f"{place.dataset} {place.split}")
        return [[self._finished.outcomes[asked[i, seed]] for seed in seeds] for i in range(len(recipes))]

    def _done(self, place: Place, work: Sequence[tuple[str, Recipe, int]]) -> Iterator[tuple[str, Outcome]]:
        if self._pool is None:
            for key, recipe, seed in work:
                yield key, train_at(place, recipe, seed)
            return
        waiting = {self._pool.submit(train_at, place, recipe, seed): key for key, recipe, seed in work}
        while waiting:
            ended, _ = wait(waiting, timeout=self._limit_seconds, return_when=FIRST_COMPLETED)
            if not ended:
                raise TrainingError(
                    f"none of the trainings of {place.dataset} {place.split} at work ended within "
                    f"{self._limit_seconds:g} s; use fewer --processes"
                )
            for future in ended:
                key = waiting.pop(future)
                try:
                    outcome = future.result()
                except BrokenExecutor:
                    raise TrainingError(
                        f"a process that trains {place.dataset} {place.split} was killed (out of memory, perhaps); use "
                        "fewer --processes (what --out keeps is not trained again)"
                    ) from None
                yield key, outcome


@contextmanager
def worker_pool(processes: int) -> Iterator[ProcessPoolExecutor | None]:
    """Yield a pool of processes with one torch thread each; None for one: the caller's own. Unfinished work is given
    up at the end, and after an error its processes are killed."""
    if processes == 1:
        yield None
        return
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        processes, mp_context=multiprocessing.get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    )
    try:
        yield pool
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
