"""dngd report: which runs it takes, the table in the terminal, and the same as JSON."""

from __future__ import annotations

import codecs
import datetime
import json
import os
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dngd import cli
from dngd.cli import report as command
from dngd.cli.runs import _print_result
from tests.unit.report.run_folders import Page, record, result, write_run


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder of three runs, one of which goes on, and of what is none; the working directory is above it."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs"
    common = {"epochs": 8, "hidden": 64, "run_dir": "x", "seed": 0}
    slow = {**common, "optimizer": "adam", "lr": 0.01, "hidden": 32, "run_dir": "y"}
    write_run(folder / "b-slow", config=slow)
    fast = [record(10, 0.82), record(30, 0.85)]
    outcome = result() | {"best_val_accuracy": 0.85, "test_accuracy": 0.84, "train_seconds": 200.0}
    write_run(folder / "a-fast", config={**common, "optimizer": "kfac", "lr": None}, records=fast, outcome=outcome)
    going = {**common, "optimizer": "kfac", "lr": None, "kfac": {"damping": 0.5}}
    write_run(folder / "c-going", config=going, records=[record(10, 0.9)], outcome={})
    (folder / "data").mkdir()
    (folder / "data" / "x.npz").touch()
    (folder / "result.txt").touch()
    return folder


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(list(arguments))
    told = capsys.readouterr()
    assert exit_info.value.code == 0, told.err
    return told.out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(list(arguments))
    said = capsys.readouterr().err
    assert (exit_info.value.code, said.count("\n")) == (2, 1), said
    return said


def test_a_folder_of_runs_is_all_runs_in_it(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "report", "runs").splitlines()
    assert lines[0] == "runs: 3 runs, a-fast, b-slow, c-going"
    assert lines[-1] == "report.html"
    page = Page(Path("report.html").read_text(encoding="utf-8"))
    assert "3 runs compared" in page.text
    by_hand = printed(
        capsys, "report", *(f"runs/{name}" for name in ("a-fast", "b-slow", "c-going")), "--out", "h.html"
    )
    assert Path("h.html").read_bytes() == Path("report.html").read_bytes()
    assert by_hand.splitlines()[:-1] == lines[1:-1], "nothing was expanded, and nothing is said of it"
    assert printed(capsys, "report", "runs", "runs/a-fast/", "--json").count('"name": "a-fast"') == 1


def test_a_run_is_taken_alone_whatever_lies_in_it(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(runs / "a-fast" / "inner")
    assert printed(capsys, "report", "runs/a-fast") == "report.html\n"


def test_a_folder_of_one_run(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(runs.parent / "one" / "run")
    assert printed(capsys, "report", "one") == "one: 1 run, run\nreport.html\n"


def test_a_folder_without_runs_is_refused(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given in ("runs/data", "."):
        assert f"folder {given} holds no run" in refused(capsys, "report", given)
    assert "does not exist" in refused(capsys, "report", "rnus")
    (runs / "bench").mkdir()
    (runs / "bench" / "result.json").write_text('{"benchmark": "step"}')  # as dngd bench writes it
    assert not Path("report.html").exists()
    os.symlink("nowhere", runs / "broken")
    assert printed(capsys, "report", "runs").startswith("runs: 3 runs, ")


def test_no_file_of_a_run_that_was_found_is_replaced(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "take the place of health.jsonl" in refused(capsys, "report", "runs", "--out", "runs/a-fast/health.jsonl")
    assert printed(capsys, "report", "runs", "--out", "runs/a-fast/report.html").endswith("/report.html\n")


def test_the_table_has_a_row_a_run(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "report", "runs").splitlines()[1:-1]
    head, rows = " ".join(lines[:-3]), [line.split("  ") for line in lines[-3:]]
    for words in ("state", "differs in", "best val", "accuracy", "test accuracy", "training", "81.25%", "step"):
        assert words in head
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    finished, seconds = ["finished", "gcn"], ["15 s", "15 s", "9 ms"]
    going = ["epoch 1 of 8", "gcn", "kfac"]
    differs = "hidden=64, kfac.damping=0.01, lr=null"
    assert cells == [
        ["a-fast", *finished, "kfac", differs, "85.00%", "84.00%", "3 min 20 s", "5 s", "9 ms"],
        ["b-slow", *finished, "adam", "hidden=32, kfac.damping=0.01, lr=0.01", "81.25%", "80.25%", *seconds],
        ["c-going", *going, differs.replace("0.01", "0.5"), "90.00%", "89.00%", "5 s", "5 s", "–"],
    ]


def test_the_same_as_json(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told: dict[str, Any] = json.loads(printed(capsys, "report", "runs", "--json", "--out", "p.html"))
    assert (told["page"], told["target"]) == ("p.html", 0.8125)
    assert Path("p.html").exists()
    fast, slow, going = told["runs"]
    assert (fast["seconds_to_target"], fast["steps_to_target"]) == (5.0, 10)
    assert (slow["seconds_to_target"], slow["optimizer"], slow["differs"]["lr"]) == (15.0, "adam", "0.01")
    assert (going["finished"], going["state"], going["steps"], going["step_ms"]) == (False, "epoch 1 of 8", 10, None)
    assert (going["metric"], going["best_val_accuracy"]) == ("accuracy", 0.9)
    alone = json.loads(printed(capsys, "report", "runs/a-fast", "--json"))
    assert (alone["target"], [run["name"] for run in alone["runs"]]) == (None, ["a-fast"])


def test_runs_of_several_metrics_name_them(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(runs / "d-links", config={"metric": "roc_auc"}, outcome=result() | {"metric": "roc_auc"})
    told = printed(capsys, "report", "runs")
    assert "81.25% ROC-AUC" in told
    assert "85.00% accuracy" in told
    assert "time to" not in told


def test_what_differs_stands_below_on_a_narrow_terminal(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for width, below in ((80, True), (200, False)):
        console = Console(markup=False, emoji=False, force_terminal=True, color_system=None, width=width)
        monkeypatch.setattr(command, "out", console)
        lines = printed(capsys, "report", "runs").splitlines()
        assert ("c-going: hidden=64, kfac.damping=0.5, lr=null" in lines) == below
        assert max(map(len, lines)) <= width
        row = next(line for line in lines if line.startswith("c-going  "))
        assert ("kfac.damping" in row) != below
        assert "90.00%" in row


def test_a_single_process_is_not_said_to_send(capsys: pytest.CaptureFixture[str]) -> None:
    """With several, what each kind took; kinds that were not sent are left out."""
    outcome = result() | {"metric": "accuracy", "recoveries": 0, "failed_checkpoints": 0, "measured_from_step": 0}
    _print_result(outcome | {"world_size": 1, "bytes": {"gradient": 0, "factor": 0, "inverse": 0}})
    told = capsys.readouterr().out
    assert "sent" not in told
    assert "rank 0" not in told
    _print_result(outcome | {"bytes": {"gradient": 4096, "factor": 2048, "inverse": 0}})
    told = capsys.readouterr().out
    assert "gradient 4.0 KiB, factor 2.0 KiB " in told
    assert "sent by rank 0" in told
    assert "inverse" not in told


def test_of_a_resumed_run_it_is_said_which_steps_were_measured(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the table and the page, of one run and of several, and at the end of training; where it is not all steps."""
    words = "of steps 1,201 to 1,300, since the last start"
    write_run(runs / "d-resumed", outcome=result(1300) | {"measured_from_step": 1200})
    write_run(runs / "e-whole", outcome=result() | {"measured_from_step": 0})
    told = printed(capsys, "report", "runs")
    assert f"d-resumed: milliseconds {words}\n" in told
    assert told.count("since the last start") == 1
    assert Page(Path("report.html").read_text()).text.count(f"and bytes of d-resumed are {words}.") == 2
    assert "since the last start" not in printed(capsys, "report", "runs/d-resumed")
    text = Page(Path("report.html").read_text()).text
    assert f"Milliseconds, seeds a second and bytes are {words}." in text
    assert f"9 ms each (p50), {words}" in text
    assert f"all workers, {words}" in text
    told = printed(capsys, "report", "runs/d-resumed", "runs/e-whole", "--json")
    assert [row["measured"] for row in json.loads(told)["runs"]] == [words, None]
    outcome = result(1300) | {"metric": "accuracy", "recoveries": 0, "failed_checkpoints": 0}
    _print_result(outcome | {"measured_from_step": 1200})
    assert words in capsys.readouterr().out
    _print_result(outcome | {"measured_from_step": 0})
    assert "since" not in capsys.readouterr().out


def test_kinds_that_are_no_text(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A config.yaml of a person's own may hold what YAML makes of a date, bytes or a set."""
    write_run(runs / "d", config={"model": datetime.date(2020, 1, 1), "optimizer": {"a"}})
    write_run(runs / "e", config={"model": b"gcn", "optimizer": None})
    rows = json.loads(printed(capsys, "report", "runs/d", "runs/e", "--json"))["runs"]
    assert [(row["model"], row["optimizer"]) for row in rows] == [("2020-01-01", "{'a'}"), ("b'gcn'", None)]
    assert "2020-01-01" in printed(capsys, "report", "runs/d", "runs/e")


def test_a_byte_order_mark(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("config.yaml", "result.json", "metrics.jsonl"):
        file = runs / "a-fast" / name
        file.write_bytes(codecs.BOM_UTF8 + file.read_bytes())
    [row] = json.loads(printed(capsys, "report", "runs/a-fast", "--json"))["runs"]
    assert (row["state"], row["step_ms"], row["steps"]) == ("finished", 9.0, 30)
