"""The page: self-contained and well formed whatever the runs hold; its numbers are the runs'."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dngd.errors import UserError
from dngd.report import check_file, check_page, write_report
from dngd.report.accuracy_page import render_accuracy
from dngd.report.document import write_file
from dngd.report.run_files import read_run
from tests.unit.report.benchmark import panel
from tests.unit.report.benchmark import result as accuracy_result
from tests.unit.report.run_folders import Page, record, result, write_run


def page_of(*runs: Path) -> Page:
    out = write_report(runs, runs[0].parent / "out" / "report.html")
    page = Page(out.read_text(encoding="utf-8"))
    page.check_self_contained()
    return page


def test_a_finished_run(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run"))
    for words in (
        "81.25%",
        "80.25%",
        "15 s",
        "4,321",
        "kfac.damping",
        "0.01",
        "2.13.0",
        "3 GiB",
        "7 KiB",
        "a processor",
    ):
        assert words in page.text, words
    assert "unfinished" not in page.text
    charts = page.all("svg", "chart")
    assert len(charts) == 6
    assert all(chart["role"] == "img" and "run" in chart["aria-label"] for chart in charts)
    assert len(page.all("circle", "ring")) == 2, "the best evaluation is ringed in both accuracy charts"


def test_hostile_names_are_text(tmp_path: Path) -> None:
    hostile = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>&amp;\x00"
    outcome = result()
    outcome["versions"] = {hostile: hostile}
    outcome["phase_ms"] |= {hostile: 1.0}
    outcome["bytes"] |= {hostile: 1}
    config = {"dataset": hostile, "model": hostile, hostile: {hostile: [hostile]}}
    folders = [tmp_path / name / "<script>\"'&" for name in ("a", "b")]
    runs = [write_run(folder, config=config, outcome=outcome) for folder in folders]
    for chosen in (runs[:1], runs):
        page = page_of(*chosen)
        assert "<script>alert('x')" in page.text, "shown, as text"
        assert "\x00" not in page.markup


def test_an_unfinished_run_shows_what_there_is(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run", outcome={}))
    assert "unfinished" in page.text
    assert "81.25%" in page.text
    assert "80.25%" in page.text
    assert "Known when a run has finished" in page.text


def test_a_run_that_only_began(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run", records=[], outcome={}))
    assert page.text.count("nothing to draw yet") == 4
    assert "unfinished" in page.text


def test_a_resumed_run_is_not_told_by_its_old_result(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", records=[record(30, 0.8125), record(40, 0.9)], outcome=result(steps=30))
    page = page_of(run)
    assert "unfinished" in page.text
    assert "90.00%" in page.text


@pytest.mark.parametrize("digest", ["one", None])
def test_a_run_with_a_checkpoint_beyond_its_result_is_unfinished(tmp_path: Path, digest: str | None) -> None:
    run = write_run(tmp_path / "run")
    write_state(run, 30, digest)
    assert read_run(run, "run").finished, "the last step's checkpoint is the result's"
    write_state(run, 35, digest)
    assert not read_run(run, "run").finished
    (run / "checkpoints" / "step-00000035" / "state.json").write_text("{")
    assert read_run(run, "run").finished, "what cannot be read is not gone on with"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e308])
def test_values_that_have_no_place_break_the_line(tmp_path: Path, value: float) -> None:
    records = [record(10, 0.5), record(20, 0.75, loss=value), record(30, value), record(40, 0.75, loss=0.5)]
    outcome = result(steps=40) | {"seeds_per_second": value, "best_val_accuracy": value}
    outcome["phase_ms"]["forward"] = value
    page = page_of(write_run(tmp_path / "run", records=records, outcome=outcome))
    assert "values not finite, left out" in page.text
    loss = [line["d"] for line in page.all("path", "line") if "M" in line["d"] and line["d"].count(" ") > 1]
    assert any(path.count("M") == 2 for path in loss), "a gap, not a line across it"


def test_a_diverged_run_says_so(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run", records=[record(10, 0.5), record(30, 0.4, loss=math.nan)]))
    assert "loss not finite" in page.text


def test_a_single_evaluation_shows_its_points(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run", records=[record(30, 0.8125)]))
    assert len(page.all("circle", "target")) == 8, "two measures in four charts"
    assert page.all("rect", "dot"), "the dashed line's only point has a marker"


def test_several_runs_share_plots_and_a_table(tmp_path: Path) -> None:
    slow = write_run(tmp_path / "slow", config={"optimizer": "adam"})
    records = [record(10, 0.82), record(30, 0.85)]
    fast = write_run(tmp_path / "fast", config={"optimizer": "kfac"}, records=records)
    page = page_of(slow, fast)
    assert "2 runs compared" in page.text
    assert "81.25%, reached by all" in page.text
    assert "the last took 3×" in page.text
    assert len(page.all("svg", "chart")) == 6
    assert all("slow" in c["aria-label"] and "fast" in c["aria-label"] for c in page.all("svg", "chart"))
    solid = {line["class"] for line in page.all("path", "line") if "dashed" not in line["class"]}
    assert {"line c0", "line c1"} <= solid
    assert "1 settings" not in page.text
    assert "3 settings that all runs share" in page.text


def test_a_run_counts_once(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert "runs compared" not in page_of(run, tmp_path / "." / "run").text


def test_runs_of_different_data_are_not_ranked(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, config={"dataset": name}) for name in ("cora", "pubmed")]
    page = page_of(*runs)
    assert "do not compare" in page.text
    assert "reached by all" not in page.text
    assert "Best val accuracy" not in page.text


def write_state(run: Path, step: int, digest: object) -> None:
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"step": step, "position": {"graph_digest": digest}}))


@pytest.mark.parametrize(
    ("datasets", "digests", "compare"),
    [
        (("a/cora", "b/cora"), ("one", "other"), False),
        (("cora", "copy-of-cora"), ("one", "one"), True),
        (("a/cora", "b/cora"), ("one", None), True),
        (("cora", "pubmed"), ("one", None), False),
        (("cora", "cora"), ("one", 7), True),
    ],
)
def test_graphs_are_told_apart_by_their_content(
    tmp_path: Path, datasets: tuple[str, str], digests: tuple[str, object], compare: bool
) -> None:
    runs = [write_run(tmp_path / f"run-{n}", config={"dataset": name}) for n, name in enumerate(datasets)]
    for run, digest in zip(runs, digests):
        write_state(run, 10, "an older one's")
        if digest is None:
            shutil.rmtree(run / "checkpoints")
        else:
            write_state(run, 20, digest)
    if digests[1] == 7:
        shutil.rmtree(runs[1] / "checkpoints" / "step-00000010")
    assert ("do not compare" not in page_of(*runs).text) is compare


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b'{"position": 3}', b"[" * 100_000])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, content: bytes) -> None:
    run = write_run(tmp_path / "run")
    write_state(run, 10, "one")
    write_state(run, 20, "other")
    (run / "checkpoints" / "step-00000020" / "state.json").write_bytes(content)
    assert read_run(run, "run").graph_digest == "one"


def test_only_pages_of_ours_and_empty_files_are_replaced(tmp_path: Path) -> None:
    page = write_report([write_run(tmp_path / "run")], tmp_path / "report.html")
    long = write_report([write_run(tmp_path / ("&" * 250))], tmp_path / "long.html")
    bench = write_file(tmp_path / "bench.html", render_accuracy(accuracy_result(panel("cora"))))
    (tmp_path / "empty.html").touch()
    (tmp_path / "link.html").symlink_to(page)
    for name in (page, long, bench, tmp_path / "empty.html", tmp_path / "link.html", tmp_path / "new.html"):
        check_page(name)
    whole = page.read_bytes()
    for content in (
        b"how I use dngd",
        whole.replace(b"dngd report</title>", b"report</title>"),
        whole.replace(b"<title>", b"<title>my notes</title><title>"),
        b"\n" + whole,
        whole[:200],
    ):
        (tmp_path / "notes.html").write_bytes(content)
        with pytest.raises(UserError, match="is no dngd report"):
            check_page(tmp_path / "notes.html")


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "pages").mkdir()
    (tmp_path / "report.html").symlink_to(tmp_path / "pages" / "one.html")
    write_report([write_run(tmp_path / "run")], tmp_path / "report.html")
    assert (tmp_path / "report.html").is_symlink()
    assert [path.name for path in (tmp_path / "pages").iterdir()] == ["one.html"]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("check", [check_page, check_file, lambda out: write_file(out, "")])
def test_a_pipe_is_neither_read_nor_replaced(tmp_path: Path, check: Callable[[Path], object]) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(UserError, match="is a pipe or a device"):
            check(path)
    assert (tmp_path / "pipe").is_fifo()


def named(records: list[dict[str, float]], metric: str) -> list[dict[str, Any]]:
    return [line | {"metric": metric} for line in records]


@pytest.mark.parametrize(
    ("metric", "words", "title"),
    [
        ("roc_auc", "ROC-AUC", "ROC-AUC against steps"),
        ("macro_f1", "macro-F1", "Macro-F1 against steps"),
        ("average_precision", "average precision", "Average precision against steps"),
    ],
)
@pytest.mark.parametrize("is_finished", [True, False])
def test_the_page_says_what_the_metric_is(
    tmp_path: Path, metric: str, words: str, title: str, is_finished: bool
) -> None:
    records = named([record(10, 0.5), record(30, 0.8125)], metric)
    outcome = result() | {"metric": metric} if is_finished else {}
    page = page_of(write_run(tmp_path / "run", config={"metric": metric}, records=records, outcome=outcome))
    for text in (title, f"Best val {words}", f"Test {words}", f"validation {words} 81.25%", f"test {words} is that of"):
        assert text in page.text, text
    assert "accuracy" not in page.text.lower()
    assert sum(f"validation and test {words}" in chart["aria-label"] for chart in page.all("svg", "chart")) == 2


def test_a_metric_of_ones_own_is_no_percentage(tmp_path: Path) -> None:
    """Its name stands in the run's lines alone, and its values may lie anywhere."""
    records = named([record(10, -3.5), record(30, 12.25)], "lift_at_ten")
    outcome = result() | {"metric": "lift_at_ten", "best_val_accuracy": 12.25}
    page = page_of(write_run(tmp_path / "run", config={"metric": "accuracy"}, records=records, outcome=outcome))
    assert "Lift at ten against steps" in page.text
    assert "12.25" in page.text
    assert "1225" not in page.text
    assert "accuracy" not in page.text.lower().replace("metric accuracy", "")


def test_runs_of_several_metrics_share_no_axis(tmp_path: Path) -> None:
    auc = named([record(10, 0.5), record(30, 0.9)], "roc_auc")
    outcomes = {"one": result(), "two": result() | {"metric": "roc_auc", "best_val_accuracy": 0.9}, "three": result()}
    runs = [
        write_run(tmp_path / name, outcome=outcome, records=auc if name == "two" else None)
        for name, outcome in outcomes.items()
    ]
    page = page_of(*runs)
    assert "different metrics (accuracy, ROC-AUC), which do not compare" in page.text
    labels = [chart["aria-label"] for chart in page.all("svg", "chart")]
    for words, drawn in (("accuracy", {"one", "three"}), ("ROC-AUC", {"two"}), ("loss", {"one", "two", "three"})):
        charts = [label for label in labels if f" {words} against" in label]
        assert len(charts) == 2, words
        assert all({name for name in outcomes if name in label.split(": ")[1]} == drawn for label in charts)
    assert {"best val accuracy", "best val ROC-AUC"} <= {word.strip() for word in page.words}
    assert "reached by all" not in page.text
    assert "Best val" not in page.text
    assert "<strong>90.00%</strong>" not in page.markup, "the only value of its metric is not the best of several"
    assert page.markup.count("<strong>81.25%</strong>") == 2


def test_many_runs_look_different(tmp_path: Path) -> None:
    page = page_of(*(write_run(tmp_path / f"run-{i}") for i in range(9)))
    assert {f"line c{i}" for i in range(8)} <= {line["class"] for line in page.all("path", "line")}


def test_many_evaluations_stay_small(tmp_path: Path) -> None:
    records = [record(step, 0.8 - 1 / (step + 2)) for step in range(1200)]
    page = page_of(write_run(tmp_path / "run", records=records, outcome=result(1200)))
    assert len(page.all("circle", "target")) <= 8 * 102
    assert len(page.markup) < 1_000_000


def test_a_single_process_sends_nothing(tmp_path: Path) -> None:
    outcome = result() | {"world_size": 1, "bytes": {"gradient": 0, "factor": 0, "inverse": 0}}
    page = page_of(write_run(tmp_path / "run", outcome=outcome))
    assert "a single process sends nothing" in page.text
    assert "single process" not in page_of(write_run(tmp_path / "two", outcome=outcome | {"world_size": 2})).text


OPEN = {"lr": None, "max_steps": None, "kfac": {"damping": None, "kl_bound": None, "kl_clip": "auto", "rank": 8}}
IN_USE = {"lr": 0.3, "kfac.damping": 0.003162277, "kfac.kl_bound": 0.1, "kfac.kl_clip": None, "kfac.damping_g": 0.0125}
IN_USE |= {"batch_size": 600, "kfac.strategy": {"layers.0": "replicate", "layers.1": "share_inverse"}}


def test_settings_left_open_have_the_value_in_use(tmp_path: Path) -> None:
    config = OPEN | {"batch_size": "full"}
    page = page_of(write_run(tmp_path / "run", config=config, outcome=result() | {"resolved": IN_USE}))
    for words in (
        "lr default (0.3)",
        "max_steps null",
        "kfac.damping default (0.003162)",
        "kfac.kl_bound default (0.1)",
        "kfac.kl_clip auto (none)",
        "kfac.rank 8",
        "batch_size full (600)",
        "kfac.damping_g 0.0125",
        "kfac.strategy layers.0: replicate, layers.1: share_inverse",
    ):
        assert words in page.text, words
    given = OPEN | {"lr": 0.3, "kfac": {"damping": 0.003162277}}
    assert "default (" not in page_of(write_run(tmp_path / "given", config=given)).text


def test_runs_that_do_not_tell_the_values_in_use(tmp_path: Path) -> None:
    """Runs of an earlier dngd, and such as are not finished: what the others tell does not make a difference."""
    told = write_run(tmp_path / "told", config=OPEN, outcome=result() | {"resolved": IN_USE})
    earlier = write_run(tmp_path / "earlier", config=OPEN)
    going = write_run(tmp_path / "going", config=OPEN, outcome={})
    odd = write_run(tmp_path / "odd", config=OPEN, outcome=result() | {"resolved": [1]})
    assert "lr null" in page_of(earlier).text
    assert "lr null" in page_of(odd).text
    page = page_of(earlier, told, going)
    assert "none differ" in page.text
    assert "lr default (0.3)" in page.text
    other = write_run(tmp_path / "other", config=OPEN, outcome=result() | {"resolved": IN_USE | {"lr": 0.1}})
    page = page_of(earlier, told, other)
    assert "none differ" not in page.text
    assert "lr null default (0.3) default (0.1)" in page.text, "the same default, which stood for something else"


def test_the_file_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, out = write_run(tmp_path / "run"), tmp_path / "report.html"
    out.write_text("the old page")

    def fail(*_: object) -> None:
        assert out.read_text() == "the old page"
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("dngd.report.document.os.replace", fail)
        with pytest.raises(UserError, match="No space left"):
            write_report([run], out)
    assert out.read_text() == "the old page"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "run"]
    assert write_report([run], out) == out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "run"]
    assert out.read_text().startswith("<!DOCTYPE html>")


def test_the_same_runs_give_the_same_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert page_of(run).markup == page_of(run).markup


def test_a_folder_as_out_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder"):
        write_report([write_run(tmp_path / "run")], tmp_path)


def test_an_integer_beyond_floats_is_infinite(tmp_path: Path) -> None:
    outcome = result() | {"seeds_per_second": 10**400, "peak_rss_bytes": -(10**400)}
    assert "∞" in page_of(write_run(tmp_path / "run", outcome=outcome)).text


def test_result_of_odd_types(tmp_path: Path) -> None:
    outcome = {name: "text" for name in result()} | {"steps": [1], "phase_ms": {"forward": None, "x": True}}
    page = page_of(write_run(tmp_path / "run", outcome=json.loads(json.dumps(outcome))))
    assert "81.25%" in page.text, "falls back to the evaluations"


@pytest.mark.parametrize("content", ["seed: !!timestamp x", "a: &x {b: *x}", "a: " + "[" * 5000])
def test_a_configuration_that_cannot_be_read_is_named(tmp_path: Path, content: str) -> None:
    run = write_run(tmp_path / "run")
    (run / "config.yaml").write_text(content)
    with pytest.raises(UserError, match=r"config\.yaml is .*; (mend|write out what is meant,) or remove it"):
        write_report([run], tmp_path / "page.html")


def test_aliases_of_aliases_are_refused_at_once(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    lines = [f"a{i}: &a{i} {{p: *a{i - 1}, q: *a{i - 1}}}" for i in range(1, 60)]
    (run / "config.yaml").write_text("\n".join(["a0: &a0 {x: 1}", *lines]))
    with pytest.raises(
        UserError, match=r"config\.yaml has aliases that stand for more than 10000 values; .* remove it"
    ):
        write_report([run], tmp_path / "page.html")
    (run / "config.yaml").write_text("model: &m gcn\nkfac: {x: *m, y: *m}\n")
    assert read_run(run, "run").config["kfac.y"] == "gcn"
