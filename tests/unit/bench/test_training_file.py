"""Finished trainings on disk: found again, whole lines only."""

from __future__ import annotations

from pathlib import Path

import pytest

from dngd.bench.runs import RunRecord
from dngd.bench.training_file import FILE_NAME, TrainingFile, key_of
from dngd.errors import UserError

RECORD = RunRecord("adam lr=0.01", {"step": [0, 5], "seconds": [0.0, 1.0], "val_score": [0.1, 0.5]})


def test_what_was_added_is_found_by_another_process(tmp_path: Path) -> None:
    TrainingFile(tmp_path / "new" / "folder").add("a", {"panel": "x"}, [RECORD])
    file = TrainingFile(tmp_path / "new" / "folder")
    assert file.get("a") == [RECORD]
    assert file.get("b") is None
    assert file.found == 1


def test_a_line_cut_short_is_dropped_and_written_over(tmp_path: Path) -> None:
    TrainingFile(tmp_path).add("a", {}, [RECORD])
    path = tmp_path / FILE_NAME
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: len(whole) // 2])
    file = TrainingFile(tmp_path)
    assert file.get("a") == [RECORD]
    file.add("b", {}, [RECORD])
    assert path.read_bytes().count(b"\n") == 2
    assert TrainingFile(tmp_path).get("b") == [RECORD]


def test_two_processes_may_add_to_one_file(tmp_path: Path) -> None:
    one, two = TrainingFile(tmp_path), TrainingFile(tmp_path)
    one.add("a", {}, [RECORD])
    two.add("b", {}, [RECORD])
    one.add("c", {}, [RECORD])
    found = TrainingFile(tmp_path)
    assert all(found.get(key) == [RECORD] for key in "abc")


def test_another_file_of_that_name_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    path.write_text("something else\n")
    with pytest.raises(UserError, match="line 1 of"):
        TrainingFile(tmp_path)
    assert path.read_text() == "something else\n"


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="another --out"):
        TrainingFile(tmp_path / "file" / "folder")


def test_without_a_folder_nothing_is_written(tmp_path: Path) -> None:
    file = TrainingFile(None)
    file.add("a", {}, [RECORD])
    assert file.get("a") == [RECORD]
    assert list(tmp_path.iterdir()) == []


def test_a_key_is_of_the_content() -> None:
    assert key_of({"a": 1, "b": [2]}) == key_of({"b": [2], "a": 1})
    assert key_of({"a": 1}) != key_of({"a": 2})
