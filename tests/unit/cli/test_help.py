"""What --help says: all of it is shown, and a flag that may be left out tells what is in its place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import typer
from rich.text import Text

from dngd import cli
from dngd.cli.root import app
from dngd.config import TrainConfig


def texts_of(command: Any, name: str) -> Iterator[tuple[str, str]]:
    """Return a command's help, its parameters', and those of the commands below it, each with whose it is."""
    yield name, command.help or ""
    for parameter in command.params:
        yield f"{name} {parameter.name}", getattr(parameter, "help", None) or ""
    for word, below in getattr(command, "commands", {}).items():
        yield from texts_of(below, f"{name} {word}")


TEXTS = dict(texts_of(typer.main.get_command(app), "dngd"))


def test_the_help_of_every_command_is_looked_at() -> None:
    assert {"dngd train", "dngd bench accuracy", "dngd data import", "dngd train hidden"} <= set(TEXTS)


@pytest.mark.parametrize("whose", TEXTS)
def test_no_word_of_a_help_text_is_taken_for_markup(whose: str) -> None:
    """Rich shows nothing of "[default: 64]"."""
    assert Text.from_markup(TEXTS[whose]).plain == TEXTS[whose]


@pytest.mark.parametrize(
    "name", ["split", "hidden", "num_layers", "dropout", "batch_size", "epochs", "optimizer", "seed"]
)
def test_a_flag_of_train_tells_its_default(name: str) -> None:
    assert f"default: {TrainConfig.model_fields[name].default})" in TEXTS[f"dngd train {name}"]


def test_defaults_are_on_the_screen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "240")
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["train", "--help"])
    shown = capsys.readouterr().out
    assert exit_info.value.code == 0
    assert "width of the hidden layers (default: 256)" in shown, shown
    assert "(gcn or sage; default: gcn)" in shown, shown
    assert "(default: min(0.1, 1/classes)/√(training nodes))" in shown, shown
