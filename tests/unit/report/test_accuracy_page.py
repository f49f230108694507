"""The accuracy benchmark's page and picture: self-contained, every panel drawn, its numbers those of the result."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from dngd.errors import UserError
from dngd.report import check_file, write_accuracy_page, write_accuracy_svg
from dngd.report.accuracy_curves import shown_settings
from tests.unit.report.benchmark import panel, result
from tests.unit.report.run_folders import Page


def test_every_panel_has_both_charts_with_bands_and_targets(tmp_path: Path) -> None:
    found = result(panel("cora"), panel("pubmed", kfac_best=0.8))
    page = Page(write_accuracy_page(found, tmp_path / "page.html").read_text())
    page.check_self_contained()
    charts = page.all("svg", "chart")
    assert len(charts) == 4
    assert [
        sum(word in chart["aria-label"] for chart in charts) for word in ("cora", "pubmed", "seconds", "steps")
    ] == [
        2,
        2,
        2,
        2,
    ]
    assert len(page.all("polygon", "band")) == 2 * 3 + 2 * 3, "K-FAC, Adam and SGD have bands"
    guides = [line for line in page.all("line", "guide")]
    assert len(guides) == 2 * 4, "two targets a chart"
    primary = found["summary"][0]
    assert f"{primary['seconds_ratio']['median']:.2f}×" in page.text
    assert "worst never reached" in page.text
    assert "kfac never reaches the primary target" in page.text
    assert "adamw lr=0.003 constant, batch 256, 160 epochs" in page.text


def test_hostile_names_are_text(tmp_path: Path) -> None:
    hostile = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>"
    found = result(panel(hostile))
    found["config"][hostile] = hostile
    found["machine"]["cpu"] = hostile
    found["panels"][0]["remarks"] = [hostile]
    page = Page(write_accuracy_page(found, tmp_path / "page.html").read_text())
    page.check_self_contained()
    assert page.text.count("<script>alert('x')") >= 4, "shown, as text"
    ElementTree.parse(write_accuracy_svg(found, tmp_path / "plot.svg"))


def test_a_group_is_drawn_by_its_fastest_and_its_most_accurate_setting() -> None:
    shown = shown_settings(panel("cora"))
    assert [(one.group, one.dashed) for one in shown] == [
        ("kfac", False),
        ("adam", False),
        ("adam", True),
        ("sgd", False),
    ]
    assert shown[2].label.startswith("adamw")
    assert shown[1].colour == shown[2].colour != shown[0].colour


def test_the_axis_ends_where_the_comparison_does(tmp_path: Path) -> None:
    """SGD's long training does not squeeze the curves that are compared, nor does Adam's after the target."""
    markup = write_accuracy_page(result(panel("cora", adamw_best=0.89)), tmp_path / "page.html").read_text()
    chart = markup.split("against steps, cora")[1].split("</svg>")[0]
    ticks = [int(text) for text in re.findall(r'text-anchor="middle">(\d+)<', chart)]
    assert ticks[0] == 0
    assert 120 <= ticks[-1] <= 300, "K-FAC's whole run is 120 steps, Adam's 300, SGD's 400, AdamW's 600"


def test_the_picture_stands_alone(tmp_path: Path) -> None:
    found = result(*(panel(f"graph-{i}") for i in range(5)))
    path = write_accuracy_svg(found, tmp_path / "plot.svg")
    root = ElementTree.parse(path).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    charts = [node for node in root if node.tag.endswith("svg")]
    assert len(charts) == 5
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    for chart in charts:
        x, y, w, h = (float(chart.attrib[key]) for key in ("x", "y", "width", "height"))
        assert 0 <= x < x + w <= width
        assert 0 <= y < y + h <= height
    text = path.read_text()
    assert ".line.c1,.ring.c1{stroke" in text
    assert "prefers-color-scheme:dark" in text
    for forbidden in ("href", "url(", "@import", "<script"):
        assert forbidden not in text


def test_a_result_without_a_baseline_is_drawn(tmp_path: Path) -> None:
    found = result(panel("cora")) | {"summary": None}
    assert "Time to accuracy" in write_accuracy_page(found, tmp_path / "page.html").read_text()


def test_a_place_that_cannot_be_is_told_early(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder"):
        check_file(tmp_path)
    with pytest.raises(UserError, match="no folder that exists"):
        check_file(tmp_path / "missing" / "page.html")
    check_file(tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []
