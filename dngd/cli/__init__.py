"""The command line: argument parsing and printing only. `root.py` is its root.

Nothing is imported before `main` is called: a Ctrl-C while the rest is imported, which takes a second, ends quietly too.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; the `dngd` script. arguments: those of the process where none are given."""
    try:
        from dngd.cli import root
    except KeyboardInterrupt:
        sys.stderr.write("dngd: interrupted before it began\n")
        sys.exit(130)
    root.main(arguments)
