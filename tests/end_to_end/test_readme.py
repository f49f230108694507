"""Every command and snippet of the README and of docs runs, the examples too (on small graphs), and links lead."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dngd import cli
from dngd.graph import GraphStore
from tests.helpers.graphs import small_store

ROOT = Path(__file__).parents[2]
PAGES = {path.stem: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}


def blocks(page: str) -> list[tuple[str, str]]:
    """Return a page's fenced blocks: language, text."""
    return re.findall(r"```(\w*)\n(.*?)```", PAGES[page], flags=re.DOTALL)


def commands(page: str) -> list[list[str]]:
    """Return the dngd commands of a page's blocks without a language; those of `sh` need what a test has not."""
    return [
        shlex.split(line, comments=True)
        for language, block in blocks(page)
        if not language
        for line in block.splitlines()
        if line.startswith("dngd ")
    ]


SNIPPETS = {
    f"{page}-{number}": block
    for page in PAGES
    for number, block in enumerate(b for language, b in blocks(page) if language == "python")
}


def test_the_pages_have_commands_and_snippets() -> None:
    assert {page for page in PAGES if commands(page)} >= {"README", "training", "graphs"}
    assert {command[1] for command in commands("README")} >= {"train", "evaluate", "predict", "report"}
    assert {name.partition("-")[0] for name in SNIPPETS} >= {"README", "python"}
    assert not any("@@" in text for text in PAGES.values()), "a placeholder"


@pytest.mark.data
@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_commands(
    page: str,
    tmp_path: Path,
    data_root: Path,
    store: GraphStore,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In order, in one folder with `examples`. A `train` is planned, not trained (whole runs are the other tests'), but
    for the pair that begins a run and resumes it, which is trained on a small graph; everything else is done."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    assert sum("--resume" in command for command in commands(page)) <= 1
    for command in commands(page):
        arguments = [argument.replace("DATA", str(data_root)) for argument in command[1:]]
        if arguments[0] == "train" and "--run-dir" in arguments:
            arguments += [
                "--dataset",
                str(store.path),
                "--engine",
                "local",
                "--batch-size",
                "30",
                "--num-samplers",
                "0",
            ]
            arguments += ["--max-steps", "8" if "--resume" in arguments else "4", "--quiet"]
        elif arguments[0] == "train" and "--dry-run" not in arguments:
            arguments.append("--dry-run")
        with pytest.raises(SystemExit) as exit_info:
            cli.main(arguments)
        assert exit_info.value.code == 0, f"{shlex.join(command)}: {capsys.readouterr().err}"


@pytest.mark.parametrize("block", SNIPPETS.values(), ids=SNIPPETS.keys())
def test_snippets(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: GraphStore) -> None:
    monkeypatch.chdir(tmp_path)
    if "Trainer" in block:
        larger = small_store(tmp_path / "store", nodes=3000, edges=30000)
        assert '"products-mini"' in block
        exec(block.replace('"products-mini"', repr(str(larger.path))), {})
        assert list((tmp_path / "runs").iterdir())
        return
    if "NeighborLoader" in block:
        names: dict[str, Any] = {}
        exec(block, names)
        assert names["optimizer"].preconditioner.steps == 2 * len(names["loader"]) > 2
        return
    import torch
    from torch import nn

    model = nn.Linear(4, 3)
    seeds = torch.arange(8)
    loss = nn.functional.cross_entropy(model(torch.randn(8, 4)), torch.randint(3, (8,)))
    before = model.weight.detach().clone()
    exec(block, {"model": model, "seeds": seeds, "loss": loss, "n": len(seeds), "C": 3})
    assert not torch.equal(model.weight, before)


LINKED = ["README.md", "CONTRIBUTING.md", "cluster/README.md", *(f"docs/{n}.md" for n in PAGES if n != "README")]


def heading_anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, as code hosts make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKED)
def test_links_lead_somewhere(page: str) -> None:
    """Relative links name files of the project, and their anchors are headings there."""
    here = ROOT / page
    links = re.findall(r"\]\(([^)\s]+)\)", here.read_text())
    for link in links:
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (here.parent / path).resolve() if path else here
        assert target.exists(), f"{page}: {link}"
        assert not anchor or anchor in heading_anchors(target.read_text()), f"{page}: {link}"


@pytest.mark.parametrize("example", ["plain_torch.py", "pyg_loop.py"])
def test_loop_examples(
    example: str, store: GraphStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The loss falls with either optimizer, and exactly three lines are marked as the ones that differ."""
    losses = []
    for flags in ([], ["--adam"]):
        monkeypatch.setattr(sys, "argv", [example, "--dataset", str(store.path), "--steps", "20", *flags])
        runpy.run_path(str(ROOT / "examples" / example), run_name="__main__")
        losses.append([float(value) for value in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)])
    assert all(len(curve) >= 2 and curve[-1] < curve[0] for curve in losses)
    text = (ROOT / "examples" / example).read_text()
    assert [line[-3:] for line in text.splitlines() if re.search(r"# [123]$", line)] == ["# 1", "# 2", "# 3"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_demo(tmp_path: Path) -> None:
    """`make demo`'s command on a machine without a cluster: two Ray workers, a table, a report."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    command = [sys.executable, "-m", "dngd.cli", "train", "--config", str(ROOT / "examples" / "products_mini.yaml")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    [run] = (tmp_path / "runs").iterdir()
    result = json.loads((run / "result.json").read_text())
    assert result["world_size"] == 2
    assert result["best_val_accuracy"] > 0.85, "features alone reach .44"
    assert f"run folder  {run}" in done.stdout
    assert (run / "report.html").exists()


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("engine", "num_workers", "batch_size"), [("local", 1, 512), ("local", 2, 256), ("ray", 2, 256)]
)
def test_computers_in_ten_epochs(
    data_root: Path, tmp_path: Path, engine: str, num_workers: int, batch_size: int
) -> None:
    """K-FAC's defaults pass .895 on Amazon Computers."""
    command = [
        sys.executable,
        "-m",
        "dngd.cli",
        "train",
        "--dataset",
        "amazon_computers",
        "--data-root",
        str(data_root),
    ]
    command += [
        "--split",
        "random:0.5/0.25/0.25",
        "--model",
        "gcn",
        "--num-layers",
        "2",
        "--fanout",
        "10,10",
        "--hidden",
        "256",
    ]
    command += (
        f"--batch-size {batch_size} --epochs 10 --optimizer kfac --seed 0 --engine {engine} --hidden 256 --json".split()
    )
    command += ["--num-workers", str(num_workers), "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["best_val_accuracy"] >= 0.895


def test_no_machine_is_named() -> None:
    """Nothing in the project holds an absolute path of a machine or a registry's host."""
    danger = re.compile(r"/(home|root|work|Users)/[a-z]|https?://[\w.]*pypi")
    for path in ROOT.rglob("*"):
        parts = path.relative_to(ROOT).parts
        if any(part.startswith(".") and part != ".ci" for part in parts) or parts[0] in {"runs", "dist", "build"}:
            continue
        if path.is_file() and path.suffix in {".py", ".md", ".toml", ".yaml", ".txt", ""} and os.access(path, os.R_OK):
            assert not danger.search(path.read_text(errors="ignore")), path


def test_questions_quote_the_messages_that_dngd_says() -> None:
    quoted = re.findall(r"^- \*\*`(.+?)`\*\*", PAGES["questions"], flags=re.MULTILINE)
    assert len(quoted) >= 8
    said = " ".join(path.read_text() for path in sorted((ROOT / "dngd").rglob("*.py")))
    said = re.sub(r'"\s*\n\s*f?"', "", said)  # sentences over several lines
    for message in quoted:
        for part in message.split(" ... "):
            assert part in re.sub(r"\{[^{}]*\}", "{}", said), f"{part!r} is said nowhere"
