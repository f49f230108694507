"""A checkpoint that takes longer to read than a collective may last, on real processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.ranks import run_ranks


@pytest.mark.slow
def test_a_checkpoint_is_read_for_longer_than_a_collective_may_last(tmp_path: Path) -> None:
    arguments = [{"folder": str(tmp_path / "a")}, {"folder": str(tmp_path / "b"), "mutant": True}]
    loaded, mutant = run_ranks("tests.multiprocess.slow_reading:load", 2, arguments)
    assert loaded == [{"step": 3, "w": [0.0, 1.0, 2.0, 3.0, 4.0], "skipped": []}] * 2
    assert "failed after 1 s" in mutant[1]["error"], "the test can tell"
