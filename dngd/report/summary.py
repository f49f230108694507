"""What a page says about a run: headline numbers, and when it reached the accuracy that all runs reached.

"accuracy" in names of fields is, as in the run's files, the run's metric, whichever it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import PurePath
from typing import Any

from dngd.report.run_files import Evaluation, RunFiles
from dngd.report.text import since_last_start


@dataclass(frozen=True)
class Summary:
    """Headline numbers: of result.json, and for an unfinished run of its evaluations so far; None: not known.

    test_accuracy: at the best validation accuracy. best: index of the first evaluation that has it.
    """

    run: RunFiles
    best: int | None
    best_val_accuracy: float | None
    test_accuracy: float | None
    train_seconds: float | None
    seconds_to_best_val: float | None
    steps: float | None
    epochs: float | None
    seeds_per_second: float | None
    world_size: float | None
    dropped_steps: float | None

    @property
    def caption(self) -> str:
        """The run in a few words: data set, model, optimizer."""
        config = self.run.config
        words = [dataset_name(config), config.get("model"), config.get("optimizer")]
        return " · ".join(str(word) for word in words if word is not None)


def summarise(run: RunFiles) -> Summary:
    """Return a run's headline numbers."""
    records = run.evaluations
    best = best_evaluation(records)
    at_best = records[best] if best is not None else None
    last = records[-1] if records else None

    def pick(key: str, record: Evaluation | None, attribute: str) -> float | None:
        value = run.number(key)
        return value if value is not None or record is None else float(getattr(record, attribute))

    return Summary(
        run=run,
        best=best,
        best_val_accuracy=pick("best_val_accuracy", at_best, "val_accuracy"),
        test_accuracy=pick("test_accuracy", at_best, "test_accuracy"),
        train_seconds=pick("train_seconds", last, "train_seconds"),
        seconds_to_best_val=pick("seconds_to_best_val", at_best, "train_seconds"),
        steps=pick("steps", last, "step"),
        epochs=pick("epochs", last, "epoch"),
        seeds_per_second=run.number("seeds_per_second"),
        world_size=run.number("world_size"),
        dropped_steps=run.number("dropped_steps"),
    )


def measured(run: RunFiles) -> str | None:
    """Return, in words, of which steps the milliseconds, seeds a second and bytes are; None where they are of all."""
    after, last = run.number("measured_from_step"), run.number("steps")
    return None if not after or last is None or after >= last else since_last_start(after, last)


def has_lost(run: RunFiles) -> bool:
    """Whether the loss of the last evaluation is not finite."""
    return any(not (math.isfinite(r.val_loss) and math.isfinite(r.train_loss)) for r in run.evaluations[-1:])


def best_evaluation(records: Sequence[Evaluation]) -> int | None:
    """Return the index of the first evaluation of the best validation accuracy; NaN is never best."""
    finite = [index for index, record in enumerate(records) if math.isfinite(record.val_accuracy)]
    return max(finite, key=lambda index: records[index].val_accuracy, default=None)


def dataset_name(config: dict[str, Any]) -> str | None:
    """Return the data set as a name: the last part of a path, without .npz."""
    value = config.get("dataset")
    return None if value is None else (PurePath(str(value)).name or str(value)).removesuffix(".npz")


def same_nodes(runs: Sequence[RunFiles]) -> bool:
    """Whether the runs are scored on the same: graph, task and split; for a random split the same seed."""

    def split_of(run: RunFiles) -> tuple[str, ...]:
        if run.config.get("task") == "link":
            return ("link", str(run.config.get("link_split")), str(run.config.get("seed")))
        split = str(run.config.get("split"))
        drawn = str(run.config.get("seed")) if split.startswith("random") else ""
        return ("node", split, drawn)

    return len({split_of(run) for run in runs}) <= 1 and all(same_graph(*pair) for pair in combinations(runs, 2))


def same_graph(one: RunFiles, other: RunFiles) -> bool:
    """Whether two runs are about one graph: the same content where both tell of it, else data sets of one name."""
    if one.graph_digest is not None and other.graph_digest is not None:
        return one.graph_digest == other.graph_digest
    return dataset_name(one.config) == dataset_name(other.config)


def metrics_of(runs: Sequence[RunFiles]) -> list[str]:
    """Return the metrics of the runs, each once, in their order."""
    return list(dict.fromkeys(run.metric for run in runs))


def same_task(runs: Sequence[RunFiles]) -> bool:
    """Whether the runs' metrics may be compared."""
    return same_nodes(runs) and len(metrics_of(runs)) <= 1


def common_target(summaries: Sequence[Summary]) -> float | None:
    """Return the value of the validation metric that every run reached: the worst of their bests.

    None for a single run, for runs of different tasks or metrics, and if a run has no finite evaluation.
    """
    if len(summaries) < 2 or not same_task([summary.run for summary in summaries]):
        return None
    bests = [s.run.evaluations[s.best].val_accuracy for s in summaries if s.best is not None]
    return min(bests) if len(bests) == len(summaries) else None


def first_at(run: RunFiles, target: float) -> Evaluation | None:
    """Return the first evaluation with at least a value of the validation metric."""
    return next((record for record in run.evaluations if record.val_accuracy >= target), None)
