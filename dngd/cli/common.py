"""What the commands share: the console, `--json`, help texts from the configuration, sizes in words."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console

from dngd.config import TrainConfig

out = Console()

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output, nothing else there.")]


def field_help(name: str) -> str:
    """Return a configuration field's description with its default, for --help."""
    field = TrainConfig.model_fields[name]
    default = field.get_default(call_default_factory=True) if not field.is_required() else None
    shown = "" if default is None or default is False else f" [default: {default}]"
    return f"{field.description}{shown}"


def print_json(data: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(data) + "\n")


def size_text(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError
