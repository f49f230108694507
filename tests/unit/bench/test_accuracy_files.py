"""Several results of the accuracy benchmark as one: every graph once, ratios over all, and what cannot go together."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from dngd.bench.accuracy_files import combine_results
from dngd.errors import UserError
from tests.unit.report.benchmark import panel, result


def written(folder: Path, name: str, content: Any) -> Path:
    path = folder / name
    path.write_text(json.dumps(content))
    return path


def test_ratios_are_over_the_graphs_of_all_files(tmp_path: Path) -> None:
    first = written(tmp_path, "first.json", result(panel("cora"), panel("pubmed")))
    second = written(tmp_path, "second.json", result(panel("physics", kfac_best=0.8)))
    found = combine_results([first, second])
    assert [one["name"] for one in found["panels"]] == ["cora", "pubmed", "physics"]
    primary = found["summary"][0]
    ratios = [row["seconds_ratio"] for row in primary["panels"]]
    assert ratios[:2] == [result(panel("cora"))["summary"][0]["panels"][0]["seconds_ratio"]] * 2
    assert ratios[2] == 0.0, "never reached counts as 0"
    assert primary["never"] == 1
    assert primary["seconds_ratio"] == {"median": median(ratios), "worst": 0.0, "best": max(ratios)}


def test_a_graph_counts_once(tmp_path: Path) -> None:
    path = written(tmp_path, "one.json", result(panel("cora")))
    with pytest.raises(UserError, match="holds cora for the second time"):
        combine_results([path, path])


def test_results_measured_in_different_ways_are_refused(tmp_path: Path) -> None:
    other = result(panel("pubmed"))
    other["config"]["protocol"] = "quick"
    paths = [written(tmp_path, "one.json", result(panel("cora"))), written(tmp_path, "two.json", other)]
    with pytest.raises(UserError, match=r"two\.json was measured with protocol=quick, .*one\.json with full"):
        combine_results(paths)


def test_each_graph_counts_with_the_adam_that_was_tuned_more(tmp_path: Path) -> None:
    quick = result(panel("cora", kfac_best=0.8), panel("pubmed"))
    quick["config"] |= {"protocol": "quick", "seeds": [0]}
    paths = [written(tmp_path, "quick.json", quick), written(tmp_path, "full.json", result(panel("cora")))]
    for order in (paths, paths[::-1]):
        found = combine_results(order, best_tuned=True)
        assert {one["name"] for one in found["panels"]} == {"cora", "pubmed"}
        primary = found["summary"][0]
        assert primary["never"] == 0, "quick's Cora, where K-FAC never comes there, does not count"
        assert [text.split(":")[0] for text in found["remarks"]] == ["the protocol is not the same in all"]
        assert "protocol" not in found["config"]
    with pytest.raises(UserError, match="holds cora for the second time"):
        combine_results([paths[1], written(tmp_path, "again.json", result(panel("cora")))], best_tuned=True)


def test_settings_of_kfac_that_differ_are_told(tmp_path: Path) -> None:
    paths = []
    for name, kfac in (
        ("a", {"rank": 64, "kl_clip": 0.03}),
        ("b", {"rank": None, "kl_clip": 0.03}),
        ("c", {"rank": 64}),
    ):
        found = result(panel(name))
        found["config"]["kfac"] = kfac
        paths.append(written(tmp_path, f"{name}.json", found))
    assert combine_results([paths[0], paths[2]])["remarks"] == []
    assert combine_results(paths)["remarks"] == [
        f"K-FAC's rank is not the same in all: 64 in {paths[0]}, None in {paths[1]}, 64 in {paths[2]}"
    ]


def test_what_a_setting_was_before_it_could_be_said_is_told(tmp_path: Path) -> None:
    paths = []
    for name, kfac in (("a", {"rank": 64}), ("b", {"rank": 64, "output_rank": None})):
        found = result(panel(name))
        found["config"]["kfac"] = kfac
        paths.append(written(tmp_path, f"{name}.json", found))
    assert combine_results(paths)["remarks"] == [
        f"K-FAC's output_rank is not the same in all: 0 in {paths[0]}, None in {paths[1]}"
    ]


def test_lengths_and_fanouts_that_differ_are_told(tmp_path: Path) -> None:
    paths = []
    for name, epochs, longest, fanout in (("a", 10, 40, [10, 10]), ("b", 5, 16, [5, 5])):
        one = panel(name) | {"fanout": fanout}
        found = result(one)
        found["config"] |= {"epochs": epochs, "lr_half_steps": 20.0, "grid": {"first_epochs": 2, "max_epochs": longest}}
        paths.append(written(tmp_path, f"{name}.json", found))
    before = result(panel("c"))  # of a version that did not write these
    paths.append(written(tmp_path, "c.json", before))
    one, other, _ = paths
    assert combine_results(paths)["remarks"] == [
        f"K-FAC's length in epochs is not the same in all: 10 in {one}, 5 in {other}",
        f"the baselines' range of epochs is not the same in all: 2 to 40 in {one}, 2 to 16 in {other}",
        f"the fanout of 2 layers is not the same in all: [10, 10] in {one}, [5, 5] in {other}",
    ]


def without_adam() -> dict[str, Any]:
    found = copy.deepcopy(result(panel("cora")))
    for compared in found["panels"][0]["comparison"]:
        del compared["groups"]["adam"]
    return found


@pytest.mark.parametrize(
    "content",
    [
        {},
        [],
        None,
        {"benchmark": "step"},
        {"benchmark": "accuracy", "panels": [], "config": {}},
        {"benchmark": "accuracy", "panels": [{"name": "cora"}], "config": {}},
        without_adam(),
    ],
    ids=["empty", "list", "null", "another", "no-panels", "bare-panel", "no-adam"],
)
def test_what_is_no_result_is_said(tmp_path: Path, content: Any) -> None:
    with pytest.raises(UserError, match="no result of K-FAC and Adam on some graph; give a file that"):
        combine_results([written(tmp_path, "some.json", content)])


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "text.json").write_text("{")
    with pytest.raises(UserError, match=r"text\.json holds no JSON; give a file"):
        combine_results([tmp_path / "text.json"])
    with pytest.raises(UserError, match=r"gone\.json cannot be read: No such file or directory"):
        combine_results([tmp_path / "gone.json"])
    with pytest.raises(UserError, match="no result is named"):
        combine_results([])
