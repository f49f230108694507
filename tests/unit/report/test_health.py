"""Factor health on the page: what is known is drawn, a layer or a run a line."""

from __future__ import annotations

from pathlib import Path

from dngd.report import write_report
from dngd.report.run_files import read_run
from tests.unit.report.run_folders import Page, health, write_run


def section(page: Page) -> str:
    return page.markup.split("<h2>Factor health</h2>")[1].split("<h2>Configuration</h2>")[0]


def test_one_run_has_a_line_a_layer(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", health=health())
    page = Page(write_report([run], tmp_path / "report.html").read_text())
    page.check_self_contained()
    own = section(page)
    for words in ("Damping share", "Condition number", "Step scale", "Staleness", "layers.0", "layers.1"):
        assert words in own, words
    share = own.split("Line chart of Damping share")[1].split("</svg>")[0]
    assert share.count('class="line') == 4, "A and G of two layers"
    assert share.count("dashed") == 2, "G's"
    scale = own.split("Line chart of Step scale")[1].split("</svg>")[0]
    assert scale.count('class="line') == 1, "the model's step has one scale"
    assert "75.00%" in own, "the last numbers are in the table"
    assert "statistics not finite 4" in own


def test_several_runs_have_a_line_each_the_largest_over_layers(tmp_path: Path) -> None:
    lines = health()
    for line in lines:
        line["layers"]["layers.1"]["a_condition"] = 77.0
    runs = [write_run(tmp_path / name, health=lines) for name in ("a", "b")]
    runs.append(write_run(tmp_path / "adam"))
    page = Page(write_report(runs, tmp_path / "report.html").read_text())
    chart = section(page).split("Line chart of Condition number")[1].split("</svg>")[0]
    assert chart.count('class="line') == 4, "A and G of two runs; the third has no factors"
    assert "a a condition\n77" in chart
    assert "b: layers.1" in section(page)


def test_what_is_not_known_yet_is_left_out(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", health=health()), "run")
    steps = [step for step, layers in run.health if "a_condition" in layers["layers.1"]]
    assert steps == [20, 30]
    page = Page(write_report([tmp_path / "run"], tmp_path / "report.html").read_text())
    chart = section(page).split("Line chart of Staleness")[1].split("</svg>")[0]
    assert "layers.1 staleness\n5 at step 20" in chart
    assert "-1" not in chart


def test_a_first_order_run_has_none(tmp_path: Path) -> None:
    page = Page(write_report([write_run(tmp_path / "run")], tmp_path / "report.html").read_text())
    assert "a first-order optimizer" in section(page)


def test_damaged_lines_are_left_out_and_counted(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", health=health())
    for tail in (
        '{"step": 40, "lay',
        "[]",
        '{"step": 40}',
        '{"step": 40, "layers": 3}',
        '{"step": 1e999, "layers": {}}',
        '{"step": 1' + "0" * 400 + ', "layers": {}}',
        '{"step": true, "layers": {}}',
    ):
        lines = (run / "health.jsonl").read_text().splitlines()[:3]
        (run / "health.jsonl").write_text("\n".join([*lines, tail]) + "\n")
        found = read_run(run, "run")
        assert [step for step, _ in found.health] == [10, 20, 30], tail
        assert found.left_out == (), "as a killed process leaves the last line"
        (run / "health.jsonl").write_text("\n".join([lines[0], tail, lines[1], tail, lines[2]]) + "\n")
        found = read_run(run, "run")
        assert [step for step, _ in found.health] == [10, 20, 30], tail
        assert found.left_out == ("2 damaged lines of health.jsonl",)
        (run / "health.jsonl").write_text("\n".join(lines) + "\n")
