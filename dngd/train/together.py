"""What each rank does alone, for longer than a collective may last: fetching a graph, say, before the first step.

The ranks wait for each other in many short rounds of a gather and a broadcast, each far below the collectives' limit,
so that a node which takes an hour is neither taken for dead nor waited for without end.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

from dngd.comm import Communicator
from dngd.config import TrainConfig
from dngd.errors import TrainingError, UserError
from dngd.graph import GraphStore, Progress, resolve_dataset

FIRST_ROUND_SECONDS = 0.05
MOST_ROUND_SECONDS = 2.0
TELL_SECONDS = 10.0
MOST_NAMED = 3

T = TypeVar("T")


class StageMessages:
    """A progress callback that tells of what takes long, every ten seconds or so."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._last = time.monotonic()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if time.monotonic() - self._last >= TELL_SECONDS:
            self._last = time.monotonic()
            self._tell(stage_text(stage, done, total))


def stage_text(stage: str, done: int, total: int) -> str:
    """Return a stage of a progress callback in words."""
    return f"{stage}: {100 * done / total:.0f} %" if total else stage


def open_dataset(config: TrainConfig, progress: Progress) -> GraphStore:
    """Open a run's graph, copied or converted first if need be. Raises UserError; see `resolve_dataset`."""
    return resolve_dataset(
        config.dataset,
        config.data_root_in_use,
        config.cache_dir,
        config.stage_timeout_seconds,
        stage_dir=config.stage_dir,
        progress=progress,
    )


def check_same_everywhere(store: GraphStore, communicator: Communicator) -> None:
    """Raise UserError at all ranks if one of them has opened another graph than rank 0. All ranks enter.

    By the manifests' sha256: nodes may have the graph at different paths, not in different versions.
    """
    if communicator.world_size == 1:
        return
    own = {"digest": store.digest, "place": f"{store.path} on {os.uname().nodename}"}
    gathered = communicator.gather_bytes(json.dumps(own).encode())
    told = None if gathered is None else _difference([json.loads(item) for item in gathered]).encode()
    if said := communicator.broadcast_bytes(told):
        raise UserError(said.decode())


def _difference(opened: list[dict[str, str]]) -> str:
    """Return which ranks have another graph than rank 0, in a sentence; "" if none has."""
    others = [rank for rank, one in enumerate(opened) if one["digest"] != opened[0]["digest"]]
    if not others:
        return ""
    named = ", ".join(f"rank {rank} ({opened[rank]['place']})" for rank in others[:MOST_NAMED])
    more = f" and {len(others) - MOST_NAMED} more" if len(others) > MOST_NAMED else ""
    return (
        f"the workers read different graphs: {named}{more} and rank 0 ({opened[0]['place']}) have files of other "
        "content; put the same files on every node, whose own $DNGD_DATA_ROOT comes before the driver's"
    )


@dataclass(frozen=True)
class _State:
    """How far a rank is. failure: why it failed, for_users: whether a user can mend that."""

    done: bool
    text: str
    failure: str = ""
    for_users: bool = False


class _Alone(Generic[T]):
    """One rank's work, in a thread."""

    def __init__(self, work: Callable[[Progress], T]) -> None:
        self._work = work
        self._results: list[T] = []
        self._text = "starting"
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name="dngd-alone", daemon=True)
        self.thread.start()

    def state(self) -> _State:
        if self.error is not None:
            lines = str(self.error).strip().splitlines() or [type(self.error).__name__]
            return _State(True, self._text, lines[0], isinstance(self.error, UserError))
        return _State(bool(self._results), self._text)

    def result(self) -> T:
        return self._results[0]

    def _run(self) -> None:
        try:
            self._results.append(self._work(self._hear))
        except BaseException as error:
            self.error = error

    def _hear(self, stage: str, done: int, total: int) -> None:
        self._text = stage_text(stage, done, total)


def together(
    work: Callable[[Progress], T],
    communicator: Communicator,
    *,
    limit_seconds: float,
    round_seconds: float,
    tell: Callable[[str], None],
    state: str = "have the graph",
    fix: str = "wait longer with --set stage_timeout_seconds=N, or put the graph where the nodes read it faster",
) -> T:
    """Return what `work` returns at this rank, once it has returned at all ranks. All ranks enter.

    work: called once at each rank, with a progress callback, in a thread where there are other ranks; it must not
    communicate. round_seconds: most time between two rounds, well below the collectives' limit. tell: hears at rank 0
    how far the others are. For messages: state, of those that are done, and fix, of what takes too long.
    Raises what work raised, at the other ranks a UserError or TrainingError of it; UserError at all ranks when
    limit_seconds have passed.
    """
    if communicator.world_size == 1:
        return work(StageMessages(tell))
    alone = _Alone(work)
    began = told = time.monotonic()
    seconds = FIRST_ROUND_SECONDS
    while True:
        alone.thread.join(seconds)
        seconds = min(2 * seconds, round_seconds, MOST_ROUND_SECONDS)
        gathered = communicator.gather_bytes(json.dumps(asdict(alone.state())).encode())
        verdict = None
        if gathered is not None:
            verdict = _verdict(gathered, state)
            if verdict["kind"] == "wait" and time.monotonic() - began >= limit_seconds:
                verdict = {"kind": "user", "text": f"{verdict['text']} after {limit_seconds:.0f} s; {fix}"}
        payload = None if verdict is None else json.dumps(verdict).encode()
        verdict = json.loads(communicator.broadcast_bytes(payload))
        if verdict["kind"] == "ready":
            return alone.result()
        if verdict["kind"] != "wait":
            if isinstance(alone.error, Exception):
                raise alone.error
            raise (UserError if verdict["kind"] == "user" else TrainingError)(verdict["text"])
        if time.monotonic() - told >= TELL_SECONDS:
            told = time.monotonic()
            tell(verdict["text"])


def _verdict(gathered: list[bytes], done: str) -> dict[str, Any]:
    """Return what rank 0 makes of all ranks' states: "kind" (ready, wait, user or training) and "text"."""
    states = [_State(**json.loads(item)) for item in gathered]
    failed = next(((rank, state) for rank, state in enumerate(states) if state.failure), None)
    if failed is not None:
        rank, state = failed
        if state.for_users:
            return {"kind": "user", "text": state.failure}
        return {"kind": "training", "text": f"rank {rank}: {state.failure}"}
    missing = [rank for rank, state in enumerate(states) if not state.done]
    if not missing:
        return {"kind": "ready", "text": ""}
    # One that waits for another process says less than that other one.
    shown = min(missing, key=lambda rank: states[rank].text.startswith("waiting"))
    how_many = f"{len(states) - len(missing)} of {len(states)} workers {done}"
    return {"kind": "wait", "text": f"{how_many}; rank {shown} is {states[shown].text}"}
