"""Log lines that say which rank and step they come from."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from dngd.train.metrics import StepClock


class RankFormatter(logging.Formatter):
    """`INFO dngd.train.loop rank 1 step 120: text`; the step is the number of steps done when the line was written."""

    def __init__(self, rank: int, clock: StepClock) -> None:
        super().__init__()
        self._rank = rank
        self._clock = clock

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, with a traceback behind it where there is one."""
        text = super().format(record)
        return f"{record.levelname} {record.name} rank {self._rank} step {self._clock.activity.step}: {text}"


@contextlib.contextmanager
def rank_logs(rank: int, clock: StepClock) -> Iterator[None]:
    """Write dngd's log to this process's standard error from level INFO on, while the context is open.

    For processes that are dngd's own: in a program's own process its own settings hold.
    """
    logger = logging.getLogger("dngd")
    handler = logging.StreamHandler()
    handler.setFormatter(RankFormatter(rank, clock))
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]
