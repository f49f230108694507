"""The command line: argument parsing and printing only. `root.py` is its root."""

from dngd.cli.root import app, main

__all__ = ["app", "main"]
