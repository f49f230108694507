"""The kinds of failure that dngd reports without a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake that the user can mend.

    The message is one sentence with the value received, what is allowed, and the fix. The command
    line prints it alone and exits with code 2.
    """


class TrainingError(RuntimeError):
    """Training could not go on (divergence, a lost worker, a wait that passed its limit); exit code 1."""


class RunInterrupted(KeyboardInterrupt):
    """Ctrl-C ended a run after a whole step, whose checkpoint is written; the message says how to go on.

    step: the number of steps that are done. run_dir: the run's folder. The command line exits with code 130, or 143
    where it was SIGTERM.
    """

    def __init__(self, message: str, step: int, run_dir: str) -> None:
        super().__init__(message)
        self.step = step
        self.run_dir = run_dir


class DivergedError(TrainingError):
    """Training went wrong in a way that doing the same steps again would not mend."""
