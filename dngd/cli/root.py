"""The command line's root: the commands together, and what errors become.

Exit codes: 0 done; 1 training failed; 2 a mistake that the user can mend, told in one sentence; 130 Ctrl-C; 143
SIGTERM, of train.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from dngd import __version__
from dngd.cli.bench import bench_app
from dngd.cli.common import INTERRUPTED, Interrupted, out
from dngd.cli.data import data_app
from dngd.cli.report import report
from dngd.cli.runs import doctor, evaluate, export, predict, train
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

INTERRUPTED_HINT = "interrupted before the end; run the same command again for the whole result"
"""Of commands without a sentence of their own; train has one."""

PATH_FIXES = {
    errno.EACCES: "give a path that you may read and write, or have its permissions changed",
    errno.EPERM: "give a path that you may read and write, or have its permissions changed",
    errno.ENAMETOOLONG: "give a shorter path",
    errno.ELOOP: "mend the link, or give another path",
    errno.ENOTDIR: "a part of it is a file; give another path",
    errno.EROFS: "give a path on a file system that can be written",
    errno.ENOSPC: "free space, or give a path on another disk",
}
"""What mends an error of the file system; others than these are not the user's."""

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
    """Run the command line, its modules imported."""
    _print_what_can_be()
    try:
        code = app(args=list(arguments) if arguments is not None else None, standalone_mode=False)
        if sys.stdout is not None:  # it is None where the shell closed it
            sys.stdout.flush()
    except UserError as error:
        _fail(str(error), 2)
    except TrainingError as error:
        _fail(str(error), 1)
    except _UsageError as error:
        if not (sentence := _sentence(error)):
            sys.exit(2)  # no command at all: the help is on the screen already
        _fail(f"{sentence} (see {_help_command(error, sys.argv[1:] if arguments is None else arguments)})", 2)
    except Interrupted as error:
        _fail(str(error), error.code)
    except (KeyboardInterrupt, typer.Abort):
        _fail(INTERRUPTED_HINT, INTERRUPTED)
    except MemoryError as error:
        _fail(f"out of memory ({error or 'no details'}); ask for less, or use a machine with more", 1)
    except BrokenPipeError:  # what read the output has ended, as head does
        _give_up_output()
        sys.exit(1)
    except OSError as error:
        if (told := _path_sentence(error)) is None:
            raise
        _give_up_output()
        _fail(told, 2)
    else:
        if code == INTERRUPTED:  # typer turns Ctrl-C into this code
            _fail(INTERRUPTED_HINT, INTERRUPTED)
        sys.exit(code if isinstance(code, int) else 0)


def _print_what_can_be() -> None:
    """Have a question mark printed for what standard output's encoding has not, such as λ or a table's lines in ASCII;
    standard error escapes it by itself."""
    stream = sys.stdout
    # In the C locale Python's UTF-8 gives back the bytes of a file name as they are.
    if isinstance(stream, io.TextIOWrapper) and (stream.encoding.lower(), stream.errors) != (
        "utf-8",
        "surrogateescape",
    ):
        stream.reconfigure(errors="replace")


def _sentence(error: Exception) -> str:
    """Return a parser's complaint on one line, with the option that it is about."""
    format_message = getattr(error, "format_message", None)
    text = str(format_message() if format_message else error)
    return " ".join(text.split())


def _help_command(error: Exception, arguments: Sequence[str]) -> str:
    """Return what lists the options and arguments, or the commands, of the command that a complaint is about."""
    names: list[str] = []
    context = getattr(error, "ctx", None)
    while context is not None and context.parent is not None:  # the root is called as the program was started
        names.insert(0, str(context.info_name))
        context = context.parent
    if getattr(error, "ctx", None) is None:  # of an option without its value, say
        names = _command_in(arguments)
    return " ".join(["dngd", *names, "--help"])


def _command_in(arguments: Sequence[str]) -> list[str]:
    """Return the names of the command, and of the groups that it is in, that arguments begin with."""
    names: list[str] = []
    inside: Any = typer.main.get_command(app)
    for text in arguments:
        if text.startswith("-"):  # the root's options have no values
            continue
        inside = getattr(inside, "commands", {}).get(text)
        if inside is None:
            break
        names.append(text)
    return names


def _path_sentence(error: OSError) -> str | None:
    """Return what is wrong with a path, and the fix; None for an error that is not the user's."""
    if error.errno not in PATH_FIXES:
        return None
    if isinstance(error.filename, str | bytes):
        return f"{os.fsdecode(error.filename)}: {error.strerror}; {PATH_FIXES[error.errno]}"
    if error.errno == errno.ENOSPC:  # writing to an open file names none
        return f"output cannot be written: {error.strerror}; free space, or send it elsewhere"
    return None


def _give_up_output() -> None:
    """Write what standard output holds, or drop it: Python would try again at its end, and print a traceback."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, code: int) -> None:
    sys.stderr.write(f"dngd: {message}\n")
    sys.exit(code)
