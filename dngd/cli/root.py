"""The command line's root: the commands together, and what errors become.

Exit codes: 0 done; 1 training failed; 2 a mistake that the user can mend, told in one sentence; 130 Ctrl-C.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from dngd import __version__
from dngd.cli.bench import bench_app
from dngd.cli.common import Interrupted, out
from dngd.cli.data import data_app
from dngd.cli.runs import doctor, evaluate, export, predict, report, train
from dngd.cli.submit import SETTINGS as SUBMIT_SETTINGS
from dngd.cli.submit import submit
from dngd.errors import TrainingError, UserError

app = typer.Typer(
    name="dngd",
    help="Train graph neural networks on large graphs with natural gradients (K-FAC), on Ray Train and DGL.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
for command in (train, evaluate, predict, export, report, doctor):
    app.command()(command)
app.command(context_settings=SUBMIT_SETTINGS)(submit)
app.add_typer(data_app, name="data")
app.add_typer(bench_app, name="bench")

INTERRUPTED = 130
RESUME_HINT = "interrupted; a run goes on from its newest checkpoint with dngd train --run-dir RUN --resume"

# Newer typer brings a click of its own, older ones use the installed one: the base class of either.
_UsageError: type[Exception] = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


def _version(show: bool) -> None:
    if show:
        out.print(f"dngd {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Log what goes on inside.")] = False,
) -> None:
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; the `dngd` script."""
    try:
        code = app(args=list(arguments) if arguments is not None else None, standalone_mode=False)
    except UserError as error:
        _fail(str(error), 2)
    except TrainingError as error:
        _fail(str(error), 1)
    except _UsageError as error:
        if not (sentence := _sentence(error)):
            sys.exit(2)  # no command at all: the help is on the screen already
        _fail(f"{sentence} (see dngd --help)", 2)
    except Interrupted as error:
        _fail(str(error), INTERRUPTED)
    except (KeyboardInterrupt, typer.Abort):
        _fail(RESUME_HINT, INTERRUPTED)
    except MemoryError as error:
        _fail(f"out of memory ({error or 'no details'}); ask for less, or use a machine with more", 1)
    else:
        if code == INTERRUPTED:  # typer turns Ctrl-C into this code
            _fail(RESUME_HINT, INTERRUPTED)
        sys.exit(code if isinstance(code, int) else 0)


def _sentence(error: Exception) -> str:
    """Return a parser's complaint on one line, with the option that it is about."""
    format_message = getattr(error, "format_message", None)
    text = str(format_message() if format_message else error)
    return " ".join(text.split())


def _fail(message: str, code: int) -> None:
    sys.stderr.write(f"dngd: {message}\n")
    sys.exit(code)
