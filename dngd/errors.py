"""The kinds of failure that dngd reports without a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake that the user can mend.

    The message is one sentence with the value received, what is allowed, and the fix. The command
    line prints it alone and exits with code 2.
    """


class TrainingError(RuntimeError):
    """Training could not go on (divergence, a lost worker, a wait that passed its limit); exit code 1."""


class DivergedError(TrainingError):
    """Training went wrong in a way that doing the same steps again would not mend."""
