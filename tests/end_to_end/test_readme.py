"""Every command and snippet of the README runs, and the examples too (on small graphs)."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from dngd import cli
from dngd.graph import GraphStore
from tests.helpers.graphs import small_store

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [
    shlex.split(line, comments=True)
    for language, block in BLOCKS
    if not language
    for line in block.splitlines()
    if line.startswith("dngd ") and "ray job submit" not in line
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's working folder: `examples` beside the place where runs go."""
    path = tmp_path_factory.mktemp("readme")
    (path / "examples").symlink_to(ROOT / "examples")
    return path


def test_the_readme_has_commands() -> None:
    assert {command[1] for command in COMMANDS} >= {"train", "data"}


@pytest.mark.data
def test_commands(
    folder: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In order, in one folder. A `train` is planned and refused or accepted as for real, but not trained: whole runs
    are the other tests'; everything else is done."""
    monkeypatch.chdir(folder)
    for command in COMMANDS:
        arguments = [argument.replace("DATA", str(data_root)) for argument in command[1:]]
        if arguments[0] == "train" and "--dry-run" not in arguments:
            arguments.append("--dry-run")
        with pytest.raises(SystemExit) as exit_info:
            cli.main(arguments)
        assert exit_info.value.code == 0, f"{shlex.join(command)}: {capsys.readouterr().err}"


@pytest.mark.parametrize("block", [b for language, b in BLOCKS if language == "python"], ids=["trainer", "loop"])
def test_snippets(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: GraphStore) -> None:
    monkeypatch.chdir(tmp_path)
    if "Trainer" in block:
        larger = small_store(tmp_path / "store", nodes=3000, edges=30000)
        assert '"products-mini"' in block
        exec(block.replace('"products-mini"', repr(str(larger.path))), {})
        assert list((tmp_path / "runs").iterdir())
        return
    import torch
    from torch import nn

    model = nn.Linear(4, 3)
    seeds = torch.arange(8)
    loss = nn.functional.cross_entropy(model(torch.randn(8, 4)), torch.randint(3, (8,)))
    before = model.weight.detach().clone()
    exec(block, {"model": model, "seeds": seeds, "loss": loss})
    assert not torch.equal(model.weight, before)


def test_plain_torch_example(
    store: GraphStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = []
    for flags in ([], ["--adam"]):
        monkeypatch.setattr(sys, "argv", ["plain_torch.py", "--dataset", str(store.path), "--steps", "20", *flags])
        runpy.run_path(str(ROOT / "examples" / "plain_torch.py"), run_name="__main__")
        losses.append([float(value) for value in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)])
    assert all(len(curve) == 2 and curve[1] < curve[0] for curve in losses)


def test_the_demos_configuration_is_valid() -> None:
    from dngd import TrainConfig

    config = TrainConfig.from_yaml(ROOT / "examples" / "products_mini.yaml")
    assert (config.dataset, config.engine, config.num_workers) == ("products-mini", "ray", 2)


def test_no_machine_is_named() -> None:
    """Nothing in the project holds an absolute path of a machine or a registry's host."""
    danger = re.compile(r"/(home|root|work|Users)/[a-z]|https?://[\w.]*pypi")
    for path in ROOT.rglob("*"):
        parts = path.relative_to(ROOT).parts
        if any(part.startswith(".") and part != ".ci" for part in parts) or parts[0] in {"runs", "dist", "build"}:
            continue
        if path.is_file() and path.suffix in {".py", ".md", ".toml", ".yaml", ".txt", ""} and os.access(path, os.R_OK):
            assert not danger.search(path.read_text(errors="ignore")), path
