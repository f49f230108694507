"""Reading run folders, axes, phases, formats."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dngd.errors import UserError
from dngd.report import write_report
from dngd.report.axes import linear_axis, log_axis, value_axis
from dngd.report.charts import OTHER, phase_parts, run_style
from dngd.report.run_files import read_run, read_runs, unique_names
from dngd.report.summary import summarise
from dngd.report.text import byte_size, duration, escape, number, percent, tick
from tests.unit.report.run_folders import Page, record, result, write_run


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    for folder, words in ((tmp_path / "other", "holds no run"), (tmp_path / "none", "does not exist")):
        with pytest.raises(UserError, match=words) as error:
            read_runs([folder])
        assert str(folder) in str(error.value)
    with pytest.raises(UserError, match="no run folder"):
        read_runs([])


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.yaml", "a: [", "is not YAML"),
        ("config.yaml", "- a", "holds a list"),
        ("result.json", "{", "is not JSON"),
        ("result.json", "[]", "holds a list"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, file: str, content: str, words: str) -> None:
    run = write_run(tmp_path / "run")
    (run / file).write_text(content)
    with pytest.raises(UserError, match=words) as error:
        read_run(run, "run")
    assert file in str(error.value)


def test_a_line_cut_short_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", outcome={})
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(record(40, 0.9))[:40])
    read = read_run(run, "run")
    assert [evaluation.step for evaluation in read.evaluations] == [10, 20, 30]
    assert summarise(read).best == 2
    assert not read.finished


def test_the_best_evaluation_is_the_first_of_the_best_and_never_nan(tmp_path: Path) -> None:
    accuracies = [0.5, math.nan, 0.8, 0.8, 0.7]
    records = [record(10 * i, accuracy) for i, accuracy in enumerate(accuracies)]
    assert summarise(read_run(write_run(tmp_path / "run", records=records, outcome={}), "run")).best == 2


def test_names_tell_folders_apart() -> None:
    assert unique_names([Path("/a/x/run"), Path("/a/y/run"), Path("/a/other")]) == ["x/run", "y/run", "other"]


def test_no_phase_counts_twice(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"), "run")
    parts = phase_parts(run)
    assert parts["optimizer"] == pytest.approx(4.0 - 1.0 - 1.5)
    optimizer = [value for name, value in parts.items() if name.startswith("optimizer")]
    assert len(optimizer) == 3
    assert sum(optimizer) == pytest.approx(4.0)
    step, checkpoint = result()["step_ms"]["mean"], result()["phase_ms"]["checkpoint"]
    assert sum(parts.values()) == pytest.approx(step + checkpoint)
    assert parts[OTHER] == pytest.approx(1.0)


def test_32_runs_look_different() -> None:
    assert len({run_style(index) for index in range(32)}) == 32


finite = st.floats(-1e29, 1e29) | st.floats(-1.0, 1.0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(allow_nan=True, allow_infinity=True) | finite, max_size=8), st.booleans())
@example([0.0, 5e-324], False)
@example([-1e-308, 2e-308], True)
@example([0.0, 3e-290], False)
@example([1e-289], False)
def test_a_linear_axis_holds_its_values(values: list[float], from_zero: bool) -> None:
    axis = linear_axis(values, from_zero=from_zero)
    assert axis.low < axis.high
    assert len(axis.ticks) <= 9
    slack = 1e-6 * (axis.high - axis.low)
    assert all(axis.low - slack <= value <= axis.high + slack for value in axis.ticks)
    for value in values:
        if math.isfinite(value) and abs(value) <= 1e30:
            assert axis.low <= value <= axis.high
            assert 0 <= axis.share(value) <= 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(1e-12, 1e12), min_size=1, max_size=8))
def test_a_logarithmic_axis_holds_its_values(values: list[float]) -> None:
    axis = log_axis(values)
    assert axis.low < min(values)
    assert axis.high > max(values)
    assert len(axis.ticks) <= 7
    shares = [axis.share(value) for value in sorted(values)]
    assert shares == sorted(shares)


@pytest.mark.parametrize("values", [[0.0], [1.0], [5.0], [-3.0], [0.2, 7.0]])
def test_bounds_never_turn_an_axis_over(values: list[float]) -> None:
    axis = linear_axis(values, bounds=(0.0, 1.0))
    assert axis.low < axis.high


def test_a_diverging_loss_is_drawn_on_a_logarithmic_axis() -> None:
    assert value_axis([0.3, 1e6]).log
    assert not value_axis([0.3, 2.0]).log
    assert not value_axis([0.0, 1e6]).log


def test_formats() -> None:
    assert [number(v) for v in (None, 0.0, 0.01234, 4.5, 12345.6, math.nan)] == [
        "–",
        "0",
        "0.0123",
        "4.5",
        "12,346",
        "NaN",
    ]
    assert [percent(0.8927), percent(None), percent(math.inf)] == ["89.27%", "–", "∞"]
    assert [duration(4.56), duration(125.4), duration(12000)] == ["4.56 s", "2 min 5 s", "3 h 20 min"]
    assert [byte_size(512), byte_size(1536), byte_size(None)] == ["512 B", "1.5 KiB", "–"]
    assert [tick(v) for v in (0.05, 250, 12000, 3e6)] == ["0.05", "250", "12k", "3M"]
    assert escape('<a href="\'\x00">') == "&lt;a href=&quot;&#x27;\ufffd&quot;&gt;"


@pytest.mark.parametrize(
    "damaged",
    [
        b"\xff" * 20,
        b"\0" * 50,
        b"[]",
        b"[" * 5000,
        b'{"epoch": 1.0, "st',
        b'{"epoch": 2.0}',
        json.dumps(record(20, 0.9) | {"val_accuracy": "0.9"}).encode(),
        json.dumps(record(20, 0.9) | {"step": "20"}).encode(),
        json.dumps(record(20, 0.9) | {"step": None}).encode(),
        json.dumps(record(20, 0.9) | {"train_loss": [1.0]}).encode(),
        json.dumps(record(20, 0.9) | {"step": float("nan")}).encode(),
    ],
)
def test_damaged_evaluations_are_left_out_and_told(tmp_path: Path, damaged: bytes) -> None:
    """All good lines are on the page, before and after; a last line is what a killed process was at."""
    run = write_run(tmp_path / "run")
    file = run / "metrics.jsonl"
    first, second, third = file.read_bytes().splitlines()
    file.write_bytes(b"\n".join([first, damaged, third, damaged, second, b""]))
    found = read_run(run, "run")
    assert [evaluation.step for evaluation in found.evaluations] == [10, 30, 20]
    page = Page(write_report([run], tmp_path / "report.html").read_text())
    assert "Left out: 2 damaged lines of metrics.jsonl." in page.text
    both = Page(write_report([run, write_run(tmp_path / "good")], tmp_path / "both.html").read_text())
    assert "Left out of run: 2 damaged lines of metrics.jsonl." in both.text
    file.write_bytes(b"\n".join([first, second, third, damaged]))
    found = read_run(run, "run")
    assert [evaluation.step for evaluation in found.evaluations] == [10, 20, 30]
    assert found.left_out == ()
