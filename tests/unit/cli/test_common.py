"""What commands print, and what flags go on top of."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from dngd import cli
from dngd.cli.common import print_json


def test_numbers_that_json_does_not_have_are_null(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": math.nan, "b": [1.5, math.inf, {"c": (-math.inf, 2)}], "d": "NaN", "e": True})

    def refuse(text: str) -> None:
        raise AssertionError(text)

    found = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert found == {"a": None, "b": [1.5, None, {"c": [None, 2]}], "d": "NaN", "e": True}


def test_a_run_is_gone_on_with_however_its_folder_is_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["train", "--engine", "local", "--num-layers", "2", "--hidden", "8", "--fanout", "3,3", "--quiet", "--json"]
    for arguments in (
        [*run, "--dataset", "products-mini", "--epochs", "1", "--max-steps", "2", "--set", f"run_dir={tmp_path / 'r'}"],
        ["train", "--set", f"run_dir={tmp_path / 'r'}", "--resume", "--max-steps", "3", "--quiet", "--json"],
        [
            "train",
            "--run-dir",
            str(tmp_path / "r"),
            "--set",
            "resume=true",
            "--set",
            "max_steps=4",
            "--quiet",
            "--json",
        ],
    ):
        with pytest.raises(SystemExit) as exit_info:
            cli.main(arguments)
        told = capsys.readouterr()
        assert exit_info.value.code == 0, told.err
    assert json.loads(told.out)["steps"] == 4
