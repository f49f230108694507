"""`dngd bench` at the command line: JSON that parses, tables, mistakes in one sentence with exit code 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from dngd.bench.tables import print_pipeline
from dngd.cli import main
from dngd.graph import GraphStore
from tests.unit.report.benchmark import panel as accuracy_panel
from tests.unit.report.benchmark import result as accuracy_result


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit_info:
        main(["bench", *arguments])
    captured = capsys.readouterr()
    assert isinstance(exit_info.value.code, int)
    return exit_info.value.code, captured.out, captured.err


STEP = "step --num-layers 2 --hidden 8 --fanout 3,3 --batch-size 50 --steps 4 --warmup 0 --set kfac.inverse_delay=0"
STEP += " --set kfac.inverse_update_period=4 --set kfac.kl_bound_period=2 --threads 1"
ACCURACY = "accuracy --protocol given --model gcn --split masks --hidden 8 --batch-size full --epochs 3 --seeds 0,1"
ACCURACY += " --optimizers kfac,adam --lrs adam=0.01 --threads 1"


def test_step_prints_json_and_nothing_else(store: GraphStore, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run([*STEP.split(), "--dataset", str(store.path), "--json"], capsys)
    assert (code, err) == (0, "")
    result = json.loads(out, parse_constant=pytest.fail)
    assert result["benchmark"] == "step"
    assert set(result["optimizers"]) == {"adam", "kfac"}
    assert {"cpus", "threads", "versions"} <= set(result["machine"])
    assert {"torch", "dngd"} <= set(result["machine"]["versions"])


def test_step_prints_a_table(store: GraphStore, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run([*STEP.split(), "--dataset", str(store.path)], capsys)
    assert code == 0
    assert "whole periods of 4 steps" in out
    assert "ends within K-FAC's first, denser phase" in out
    for word in ("p99/p50", "state / parameters", "kfac refresh"):
        assert word in out


def test_accuracy_writes_what_it_prints(store: GraphStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, picture = tmp_path / "page.html", tmp_path / "plot.svg"
    arguments = [*ACCURACY.split(), "--datasets", str(store.path), "--json", "--out", str(tmp_path / "kept")]
    code, out, err = run([*arguments, "--report", str(page), "--svg", str(picture)], capsys)
    assert (code, err) == (0, "")
    result = json.loads(out, parse_constant=pytest.fail)
    assert json.loads((tmp_path / "kept" / "result.json").read_text()) == result
    assert result["config"]["seeds"] == [0, 1]
    (panel,) = result["panels"]
    assert len(panel["settings"]["adam lr=0.01"]["runs"]) == 2
    assert "Time to accuracy" in page.read_text()
    assert picture.read_text().startswith("<svg ")


def test_accuracy_prints_a_table(store: GraphStore, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run([*ACCURACY.split(), "--datasets", str(store.path), "--targets", "0.01,1"], capsys)
    assert code == 0
    assert "never" in out
    assert "kfac never gets there" in out
    assert "those count as 0" not in out, "Adam does not reach 1 either"
    assert "worst" in out


PIPELINE = "pipeline --num-layers 2 --hidden 8 --fanout 3,3 --batch-size 50 --rows open --rounds 1 --threads 1"


def test_pipeline_prints_json_and_a_table(
    store: GraphStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With real processes; the rows that time contenders are in test_pipeline_bench."""
    path = tmp_path / "result.json"
    arguments = [*PIPELINE.split(), "--dataset", str(store.path)]
    code, out, err = run([*arguments, "--json", "--out", str(path)], capsys)
    assert (code, err) == (0, "")
    result = json.loads(out, parse_constant=pytest.fail)
    assert json.loads(path.read_text()) == result
    assert result["benchmark"] == "pipeline"
    assert result["rows"]["open"]["store"]["warm_seconds"] > 0
    print_pipeline(result, Console())
    assert "GraphStore.open, store of" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("pipeline --rows speed", "--rows names 'speed'"),
        ("pipeline --processes 1,x", "--processes '1,x'"),
        ("pipeline --processes 1,1", "--processes '1,1'"),
        ("pipeline --fanout 3,3", "num_layers=3"),
        ("pipeline --scale 7", "give 0.001 to 1"),
        ("pipeline --out /no/such/folder/x.json", "--out"),
        ("step --optimizers kfac,lion", "optimizer 'lion' is unknown"),
        ("step --set kfac.dampin=1", "did you mean kfac.damping?"),
        ("step --set seed=1", "seed cannot be set here"),
        ("step --fanout 3,3", "num_layers=3"),
        ("step --scale 7", "give 0.001 to 1"),
        ("step --dataset nowhere", "nowhere"),
        ("step --batch-size some", "batch_size"),
        ("accuracy --seeds x", "--seeds 'x'"),
        ("accuracy --lrs adam:1", "--lrs 'adam:1'"),
        ("accuracy --targets 2", "--targets '2'"),
        ("accuracy --optimizers kfac", "add adam"),
        ("accuracy --out README.md", "README.md is a file"),
        ("accuracy --report /no/such/folder/x.html", "/no/such/folder"),
        ("accuracy --models gcn", "--models 'gcn'"),
        ("accuracy --models gcn:2 --model gcn", "leave one out"),
        ("accuracy --models gat:2", "model='gat'"),
        ("accuracy --datasets cora@half", "split 'half'"),
        ("accuracy --datasets cora,cora", "named twice"),
        ("accuracy --max-epochs 1", "--max-epochs"),
    ],
)
def test_mistakes_are_told_in_one_sentence(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(arguments.split(), capsys)
    assert code == 2
    assert out == ""
    assert message in err
    assert err.startswith("dngd: ")
    assert err.count("\n") == 1


def test_accuracy_overview_of_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = []
    for name in ("cora", "pubmed"):
        content = accuracy_result(accuracy_panel(name))
        content["config"]["smoothing"] = "none"
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps(content))
    picture = tmp_path / "all.svg"
    texts = [str(path) for path in paths]
    code, out, err = run(["accuracy-overview", *texts, "--svg", str(picture)], capsys)
    assert (code, err) == (0, "")
    assert "median" in out
    assert "cora" in out
    assert "pubmed" in out
    warned = accuracy_panel("cora")["remarks"]
    assert warned
    for name in ("cora", "pubmed"):
        assert all(f"{name}: {remark}." in " ".join(out.split()) for remark in warned), "what its own table warns of"
    assert picture.read_text().count("Adam's seconds over K-FAC's".replace("'", "&#x27;")) == 2
    code, out, _ = run(["accuracy-overview", *texts, "--json"], capsys)
    assert code == 0
    assert [one["name"] for one in json.loads(out)["panels"]] == ["cora", "pubmed"]
    code, _, err = run(["accuracy-overview", texts[0], texts[0]], capsys)
    assert code == 2
    assert "cora for the second time; leave one of its results out" in " ".join(err.split())
