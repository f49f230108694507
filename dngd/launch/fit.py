"""Ray's `fit` in a thread of its own: its caller waits by the run's limits, whatever Ray's controller does.

Within `fit` Ray waits for its controller without a limit, and so it does after Ctrl-C. A controller that is stopped, or
that waits for a worker that is, would hold the program for ever.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

from dngd.errors import TrainingError

LOOK_SECONDS = 0.2
END_SECONDS = 15.0
"""For `fit` to end once its controller is killed. One that does not is left behind, and ends with the program."""


class Limits(Protocol):
    """What of a Watch the wait needs."""

    given_up: str | None

    def end_controller(self) -> None:
        """Let Ray's controller be killed, without waiting for that."""


def fit_in_thread(fit: Callable[[], Any], limits: Limits) -> None:
    """Call fit in a thread and wait until it ends or the run is given up; from any thread.

    Raises what fit raises, and TrainingError with the reason if the run is given up. What a signal's handler raises
    here ends Ray's controller, and is raised on.
    """
    errors: list[BaseException] = []
    ended = threading.Event()

    def run() -> None:
        try:
            fit()
        except BaseException as error:
            errors.append(error)
        finally:
            ended.set()

    threading.Thread(target=run, name="dngd-fit", daemon=True).start()
    try:
        while limits.given_up is None and not ended.wait(LOOK_SECONDS):
            pass
    except BaseException:
        limits.end_controller()
        ended.wait(END_SECONDS)
        raise
    if limits.given_up is not None and not (ended.wait(END_SECONDS) and not errors):
        raise TrainingError(limits.given_up)
    if errors:
        raise errors[0]
