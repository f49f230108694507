"""Names of run folders."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

import dngd
from dngd.train.run_folder import default_run_dir


def test_runs_that_begin_in_one_second_have_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda form: "20260102-030405")
    config = dngd.TrainConfig(dataset="cora")
    names = []
    for _ in range(3):
        folder = default_run_dir(config)
        folder.mkdir(parents=True)
        names.append(str(folder))
    first = "runs/cora-gcn-kfac-20260102-030405"
    assert names == [first, f"{first}-2", f"{first}-3"]
