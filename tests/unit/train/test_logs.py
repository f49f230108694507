"""Log lines name rank and step."""

from __future__ import annotations

import logging

import pytest

from dngd.train.logs import rank_logs
from dngd.train.metrics import StepClock


def test_lines_name_rank_and_step(capsys: pytest.CaptureFixture[str]) -> None:
    clock = StepClock()
    logger = logging.getLogger("dngd.train.test")
    with rank_logs(3, clock):
        logger.info("begins")
        clock.at_step(17)
        logger.warning("%d rows", 5)
    logger.info("nobody hears this")
    assert capsys.readouterr().err.splitlines() == [
        "INFO dngd.train.test rank 3 step 0: begins",
        "WARNING dngd.train.test rank 3 step 17: 5 rows",
    ]
