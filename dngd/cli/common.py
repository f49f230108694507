"""What the commands share: the console, `--json`, help texts from the configuration, sizes, benchmarks' flags."""

from __future__ import annotations

import json
import math
import re
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from dngd.config import TrainConfig
from dngd.errors import UserError
from dngd.paths import expanded

out = Console(markup=False, emoji=False)
"""Standard output. Names and paths are printed as they are: no [markup] and no :emoji: in a string; use rich's Text."""


def error_console() -> Console:
    """Return standard error, likewise without markup in strings."""
    return Console(stderr=True, markup=False, emoji=False)


INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM
"""Exit codes, as a shell gives them to what a signal ended."""

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output, nothing else there.")]


class Interrupted(Exception):
    """Ctrl-C or SIGTERM, with a sentence of its own: the parser would make a bare exit code of a KeyboardInterrupt."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@contextmanager
def told_as_flags(*names: str) -> Iterator[None]:
    """Tell a UserError of a command in the command line's words: `duplicates='sum'` as `--duplicates sum`.

    names: arguments that have flags; num_nodes is --nodes.
    """
    # Not within a path, which may have folders such as name=x.
    argument = re.compile(rf"(?<![^\s(])({'|'.join(names)})=('[^']*'|[\w.+-]*\w)")

    def flag(found: re.Match[str]) -> str:
        name = "--" + found[1].removeprefix("num_").replace("_", "-")
        return name if found[2] == "True" else f"{name} {shlex.quote(found[2].strip(chr(39)))}"

    try:
        yield
    except UserError as error:
        raise UserError(argument.sub(flag, str(error))) from error


def field_help(name: str) -> str:
    """Return a configuration field's description, for --help."""
    return str(TrainConfig.model_fields[name].description)


def flag_help(name: str, choices: str = "") -> str:
    """Return a configuration field's description for a flag that leaves the field as it is where it is not given, with
    its default and, if told, its choices.

    In round brackets: of square ones in a help text rich makes markup, and shows nothing.
    """
    field = TrainConfig.model_fields[name]
    default = None if field.is_required() else field.get_default(call_default_factory=True)
    told = [choices] if choices else []
    if default is not None and default is not False:
        told.append(f"default: {default}")
    return f"{field.description} ({'; '.join(told)})" if told else str(field.description)


def print_json(data: dict[str, Any]) -> None:
    """Print one line of JSON, which has no NaN and no infinity: null."""
    sys.stdout.write(json.dumps(_finite(data), allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def size_text(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def expanded_or_none(path: Path | None) -> Path | None:
    """Return a path that was given with ~ expanded, see `expanded`."""
    return None if path is None else expanded(path)


def output_file(output: Path | None) -> Path | None:
    """Return a benchmark's --out, ~ expanded; raise UserError unless it can become a file, before the measurement."""
    output = expanded_or_none(output)
    if output is not None and (output.is_dir() or not output.absolute().parent.is_dir()):
        raise UserError(f"--out {output} is a folder or lies in none that exists; give the path of a file")
    return output


def bench_fields(flags: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration fields among a benchmark's flags."""
    names = ("data_root", "cache_dir", "split", "model", "num_layers", "hidden", "fanout", "batch_size", "prefetch")
    return {name: flags[name] for name in names if flags.get(name) is not None}
