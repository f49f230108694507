"""The pages in a real browser: they render, everything is where it belongs, and nothing goes wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dngd.report import write_accuracy_page, write_accuracy_svg, write_report
from tests.helpers.browser import Browser, browser_on_path
from tests.unit.report.benchmark import panel, result
from tests.unit.report.run_folders import health, record, write_run

COMMAND = browser_on_path()
pytestmark = pytest.mark.skipif(COMMAND is None, reason="no chromium or google-chrome on PATH")

LONG = "a-rather-long-name-of-a-run-that-somebody-chose-with-care-and-that-has-no-blank"

GEOMETRY = """
(() => {
  const box = node => { const r = node.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
  const charts = [...document.querySelectorAll('svg.chart')];
  return {
    title: document.title,
    overflow: document.documentElement.scrollWidth - window.innerWidth,
    ground: getComputedStyle(document.body || document.documentElement).backgroundColor,
    sections: [...document.querySelectorAll('h2')].map(node => node.textContent),
    charts: charts.map(chart => ({
      name: chart.getAttribute('aria-label'),
      box: box(chart),
      shapes: [...chart.querySelectorAll('.line, .fill, .dot')].map(box),
      texts: [...chart.querySelectorAll('text')].map(node => [node.textContent, box(node)]),
      strokes: [...chart.querySelectorAll('.line')].map(node => getComputedStyle(node).stroke),
    })),
  };
})()
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert COMMAND is not None
    with Browser(COMMAND) as started:
        yield started


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One run, several of them with hard names and gaps, the benchmark's page, and its picture."""
    folder = tmp_path_factory.mktemp("pages")
    kfac = write_run(folder / "kfac", config={"optimizer": "kfac"}, health=health())
    gaps = [record(10, 0.5), record(20, float("nan"), loss=float("inf")), record(30, 0.7)]
    others = [
        write_run(folder / LONG, config={"optimizer": "adam", "dataset": "cora"}, records=gaps),
        write_run(folder / "<b>&\"unfinished'", outcome={}),
    ]
    found = result(panel("cora"), panel(LONG, kfac_best=0.8), panel("tolokers", metric="roc_auc"), panel("pubmed"))
    return {
        "one": write_report([kfac], folder / "one.html"),
        "several": write_report([kfac, *others], folder / "several.html"),
        "benchmark": write_accuracy_page(found, folder / "benchmark.html"),
        "picture": write_accuracy_svg(found, folder / "picture.svg"),
    }


def inside(inner: list[float], outer: list[float], slack: float = 2.0) -> bool:
    return (
        inner[0] >= outer[0] - slack
        and inner[1] >= outer[1] - slack
        and inner[2] <= outer[2] + slack
        and inner[3] <= outer[3] + slack
    )


def check(found: Any, width: int, charts: int) -> None:
    """Charts of a sane size within the window; all that is drawn, and all text, within its chart."""
    assert found["overflow"] <= 0, "the page scrolls sideways"
    assert len(found["charts"]) == charts
    for chart in found["charts"]:
        left, top, right, bottom = chart["box"]
        assert right - left > min(250, 0.6 * width), chart["name"]
        assert bottom - top > 60, chart["name"]
        assert left >= 0, chart["name"]
        assert right <= width + 1, chart["name"]
        assert chart["shapes"], f"nothing is drawn in {chart['name']}"
        for shape in chart["shapes"]:
            assert inside(shape, chart["box"]), (chart["name"], shape)
        for text, place in chart["texts"]:
            assert inside(place, chart["box"], slack=6), (chart["name"], text, place, chart["box"])
        for stroke in chart["strokes"]:
            assert stroke != "none", f"a line without a colour in {chart['name']}"


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (420, True)])
@pytest.mark.parametrize(("page", "charts"), [("one", 10), ("several", 10), ("benchmark", 8)])
def test_a_page_renders(
    browser: Browser, pages: dict[str, Path], page: str, charts: int, width: int, dark: bool
) -> None:
    found, wrong = browser.look(pages[page], GEOMETRY, width=width, dark=dark)
    assert wrong == []
    check(found, width, charts)
    assert found["ground"] == ("rgb(18, 22, 28)" if dark else "rgb(246, 247, 249)")
    if page != "benchmark":
        wanted = ["Learning", "Cost of a step", "Factor health", "Configuration", "Environment"]
        assert [title for title in found["sections"] if title != "Comparison"] == wanted


def test_the_picture_renders(browser: Browser, pages: dict[str, Path]) -> None:
    found, wrong = browser.look(pages["picture"], GEOMETRY.replace("svg.chart", "svg svg.chart"), width=1500)
    assert wrong == []
    check(found | {"overflow": 0}, 1500, 4)
    boxes = [chart["box"] for chart in found["charts"]]
    for place, one in enumerate(boxes):
        for other in boxes[place + 1 :]:
            beside = one[2] <= other[0] or other[2] <= one[0]
            assert beside or one[3] <= other[1] or other[3] <= one[1], "charts overlap"


def test_what_goes_wrong_is_seen(browser: Browser, tmp_path: Path) -> None:
    """The judge itself: a script, an image from elsewhere, a chart that is pushed out of the window."""
    page = tmp_path / "page.html"
    page.write_text("<title>x</title><script>console.error('no')</script><img src='missing.png'>")
    _, wrong = browser.look(page, "1", width=800)
    assert any("console error" in text for text in wrong)
    assert any("missing.png" in text for text in wrong)
    style = "margin-left:700px;width:400px"
    chart = f"<svg class=chart viewBox='0 0 480 300' style='{style}'><path class=line d='M0 0H900'/></svg>"
    page.write_text(f"<style>.line{{stroke:red}}</style>{chart}")
    found, _ = browser.look(page, GEOMETRY, width=800)
    with pytest.raises(AssertionError, match="sideways"):
        check(found, 800, 1)
    with pytest.raises(AssertionError):
        check(found | {"overflow": 0}, 1200, 1)
