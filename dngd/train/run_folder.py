"""The folder of a run: who may write there, and where its files are. For one at an address see remote_run.py."""

from __future__ import annotations

import itertools
import os
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dngd.config import TrainConfig, address_of_run
from dngd.config_text import parse_yaml
from dngd.errors import UserError
from dngd.graph import GraphStore, cache_folder, folder_lock, graph_at
from dngd.graph.manifest import is_store_folder
from dngd.paths import expanded, runs_inside_text
from dngd.train.checkpoint import (
    STATE_NAME,
    check_same_run,
    complete_checkpoints,
    newest_state,
    replace_file,
)
from dngd.train.own_parts import OWN_PARTS_NAME, listed, note_of
from dngd.train.remote_files import CHECKPOINTS, RemoteFiles

CONFIG_NAME = "config.yaml"
CONFIG_FIX = "put back a copy of the run's own"
RESULT_NAME = "result.json"
FREE_MARK = ".failed-at-the-start"
"""Of a run that ended by an error before anything of it was kept: a new run may take its folder."""
LAST_FIELD = "resume"
"""A whole configuration ends with it, whichever dngd wrote it: fields that come later stand before it."""
BEFORE_THEY_CAME = {"output_rank": 0, "inverse_rank": 0}
"""What fields of kfac that came later were in runs whose files have none of them."""
OTHER_RUN_SECONDS = 120.0

_OWN_NAMES = frozenset(
    (
        *(CONFIG_NAME, "metrics.jsonl", "metrics.csv", "health.jsonl", RESULT_NAME, "model.safetensors"),
        OWN_PARTS_NAME,
        *("report.html", CHECKPOINTS, "ray", "mlflow.db", "mlflow-run", "wandb", "wandb-run"),
    )
)
_EVENT_FILES = "events.out.tfevents."


class RunFolder:
    """Paths of a run's files; see docs/training.md for what each holds.

    shown: what messages call the folder. What the methods stand for is to be done where the folder is the working copy
    of one elsewhere; here there is nothing to do.
    """

    def __init__(self, path: Path, shown: str | None = None) -> None:
        self.path = path
        self.shown = shown or str(path)
        self.config = path / CONFIG_NAME
        self.own_parts = path / OWN_PARTS_NAME
        self.metrics = path / "metrics.jsonl"
        self.health = path / "health.jsonl"
        self.result = path / RESULT_NAME
        self.best_model = path / "model.safetensors"
        self.checkpoints = path / "checkpoints"
        self.report = path / "report.html"
        self.failed = 0
        """How often files could not be sent."""

    @property
    def holds_a_run(self) -> bool:
        """Whether a run was begun here."""
        return self.config.is_file()

    def fetch(self) -> None:
        """Bring what the run has elsewhere, before it is gone on with."""

    def changed(self) -> None:
        """Hear that files other than checkpoints were written or removed."""

    def send_checkpoint(self, path: Path) -> None:
        """Bring a checkpoint that was written to where it belongs. Raises UserError if that fails."""

    def finish(self) -> None:
        """Return when all is where it belongs. Raises UserError if that fails."""


def spill_folders(config: TrainConfig, folder: RunFolder) -> list[Path]:
    """Return where exact evaluation's tables may lie on disk, best first.

    The cache is on this machine's own disk, as a rule; run folders are often where several machines see them.
    """
    return [cache_folder(config.cache_dir), folder.path]


def resume_command(config: TrainConfig, folder: RunFolder, own_parts: Iterable[str] = ()) -> str:
    """Return the command that goes on with a run; an address has its options there, without which it is not found.

    own_parts: what is the program's own, with which it has to go on itself.
    """
    if own_parts := list(own_parts):
        return f"Trainer.resume(), which needs the program's own {listed(own_parts)}"
    return f"dngd train --run-dir {shlex.quote(config.run_address or folder.shown)} --resume"


def default_run_dir(config: TrainConfig) -> Path:
    """Return runs/DATASET-MODEL-OPTIMIZER-TIME below the working directory, with -2, -3, ... if that is there."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    first = Path("runs") / f"{Path(config.dataset).stem}-{config.model}-{config.optimizer}-{stamp}"
    return next(path for path in _numbered(first) if not path.exists())


def _numbered(path: Path) -> Iterator[Path]:
    yield path
    for number in itertools.count(2):
        yield path.with_name(f"{path.name}-{number}")


def saved_fields(run_dir: Path) -> dict[str, Any] | None:
    """Return the fields of the configuration that a run folder, here or at an address, holds; None without a run.

    Raises UserError for a file that is not as a run writes it.
    """
    address = address_of_run(run_dir)
    if address is None:
        path = RunFolder(expanded(run_dir)).config
        return _fields_in(_content(path), str(path)) if path.is_file() else None
    files = RemoteFiles(address)
    content = files.read(CONFIG_NAME)
    return None if content is None else _fields_in(content, f"{files.shown}/{CONFIG_NAME}")


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"configuration file {path} cannot be read: {error.strerror}; {CONFIG_FIX}") from None


def _fields_in(content: bytes, shown: str) -> dict[str, Any]:
    fields = parse_yaml(content, shown, CONFIG_FIX)
    if LAST_FIELD not in fields:  # at the end of a line YAML does not show that it was cut short
        raise UserError(f"configuration file {shown} is cut short: it has no {LAST_FIELD!r}; {CONFIG_FIX}")
    fields = {"sparse_features": False} | fields  # of a run from before there was the field: its curve goes on
    if isinstance(fields.get("kfac"), dict):
        fields["kfac"] = BEFORE_THEY_CAME | fields["kfac"]
    try:
        TrainConfig(**fields)
    except UserError as error:
        raise UserError(f"configuration file {shown} is not as a run writes it ({error}); {CONFIG_FIX}") from None
    return fields


def run_config(folder: RunFolder) -> TrainConfig:
    """Return the configuration of the run in a folder. Raises UserError if its file is not as a run writes it."""
    return TrainConfig(**_fields_in(_content(folder.config), f"{folder.shown}/{folder.config.name}"))


def check_run_folder(config: TrainConfig) -> Path:
    """Return the path of the run folder, which may not exist yet, or its address.

    Raises UserError if the folder holds a run and `resume` is off (but for one that failed before anything was kept), a
    run that differs in a field that defines it, or something else, and if nothing can be written to an address.
    """
    if config.resume and config.run_dir is None:
        raise UserError("--resume needs --run-dir: say which run to go on with")
    remote = None if config.run_address is None else RemoteFiles(config.run_address)
    path = config.run_dir or default_run_dir(config)
    path = path if remote is not None else expanded(path).absolute()
    shown = path if remote is None else remote.shown
    saved = saved_fields(path)
    is_free = remote is None and not config.resume and (path / FREE_MARK).exists()
    if saved is not None and is_free and _kept_nothing(path):
        return path  # as after a mistake in the model: there is nothing to go on with, and nothing to lose
    if saved is not None and not config.resume:
        raise UserError(f"run folder {shown} already holds a run; go on with --resume, or give another --run-dir")
    if saved is not None:
        begun = TrainConfig(**saved)
        check_same_run(begun.identity(), config.identity(), given=config.given_since(begun))
        # What was left open in a configuration that another dngd wrote may stand for something else by now.
        reached = _newest_state(path, remote)
        if reached is not None:
            fix = (
                f"{shown}/{CONFIG_NAME} has another, or leaves open what stood for something else when the run began: "
                "write the run's own in there, or give another --run-dir"
            )
            check_same_run(reached["identity"], config.identity(), fix)
    if remote is None and path.exists() and not path.is_dir():
        raise UserError(f"run folder {shown} is a file; give another --run-dir")
    if saved is None and (remote.names() if remote is not None else path.is_dir() and any(path.iterdir())):
        inside = runs_inside_text(path) if remote is None else ""
        if inside:
            fix = "go on with one of them" if config.resume else f"give a folder of its own, such as {path / 'new'}"
            raise UserError(f"run folder {shown} is no run itself{inside}; {fix}")
        raise UserError(f"run folder {shown} holds files that are no run's; give an empty or new --run-dir")
    checkpoints = RunFolder(path).checkpoints
    if remote is None and os.path.lexists(checkpoints) and not checkpoints.is_dir():
        raise UserError(
            f"{checkpoints} is no folder, where the run's checkpoints belong; move it away, or give another --run-dir"
        )
    if saved is not None:
        _check_not_lost(path, remote, shown)
    if remote is not None:
        remote.check_writable()
    return path


def _kept_nothing(path: Path) -> bool:
    """Whether a run in a folder has no evaluation, checkpoint, model or result."""
    run = RunFolder(path)
    lines = run.metrics.exists() and run.metrics.stat().st_size > 0
    return not (lines or run.result.exists() or run.best_model.exists() or complete_checkpoints(run.checkpoints))


def _leave_free(path: Path) -> None:
    """Mark the folder of a run that ended by an error with nothing kept, so that a new one may take its place."""
    with suppress(OSError):
        if RunFolder(path).holds_a_run and _kept_nothing(path):
            (path / FREE_MARK).touch()


def _remove_begun(path: Path) -> None:
    """Remove what such a run left, and its loggers' names of it, which the new one would be added to."""
    names = ("health.jsonl", "metrics.csv", OWN_PARTS_NAME, "mlflow-run", "wandb-run", FREE_MARK)
    for file in (*(path / name for name in names), *(path / "tensorboard").glob(f"{_EVENT_FILES}*")):
        file.unlink(missing_ok=True)


def _check_not_lost(path: Path, remote: RemoteFiles | None, shown: Path | str) -> None:
    """Raise UserError if a run that has a result, evaluations or a model has no checkpoint any longer: going on would
    begin anew, in their place. One that was killed before its first checkpoint may: its folder of checkpoints is there,
    and empty. At an address there are no folders: of runs there the finished ones are refused."""
    folder = RunFolder(path)
    if remote is None:
        names = [checkpoint.name for checkpoint in complete_checkpoints(folder.checkpoints)]
        is_finished = folder.result.is_file()
        never_had_any = _kept_nothing(path) or folder.checkpoints.is_dir()
    else:
        # One that was not sent whole is among them too.
        names = remote.checkpoints()
        is_finished, never_had_any = RESULT_NAME in remote.names(), True
    if names or (never_had_any and not is_finished):
        return
    state = "is finished" if is_finished else "was evaluated"
    raise UserError(
        f"the run in {shown} {state}, but its {CHECKPOINTS} are gone: there is nothing to go on from, and its "
        "model and log would be replaced; put the newest checkpoint back, or train anew in another --run-dir"
    )


def reached_step(config: TrainConfig) -> int:
    """Return the step of the newest checkpoint in a run folder, here or at an address, whose state.json is good; 0
    without one."""
    assert config.run_dir is not None
    remote = None if config.run_address is None else RemoteFiles(config.run_address)
    state = _newest_state(config.run_dir if remote is not None else expanded(config.run_dir), remote)
    return 0 if state is None else int(state["step"])


def check_graph_of_run(config: TrainConfig, store: GraphStore) -> None:
    """Raise UserError if the run that is gone on with was trained on another graph: before its folder is touched."""
    if not config.resume:
        return
    assert config.run_dir is not None
    remote = None if config.run_address is None else RemoteFiles(config.run_address)
    path = config.run_dir if remote is not None else expanded(config.run_dir)
    state = _newest_state(path, remote)
    if state is not None:
        check_same_graph(state["position"], store, str(path) if remote is None else remote.shown)


def check_same_graph(position: Mapping[str, Any], store: GraphStore, shown: str) -> None:
    """Raise UserError if a checkpoint's position is of another graph than the store. shown: the run, as told."""
    if position["graph_digest"] != store.digest:
        raise UserError(
            f"the run in {shown} was trained on another graph ({position['graph']!r} with other "
            f"content than this {store.name!r}); resume with the --dataset that it was started with"
        )


def _newest_state(path: Path, remote: RemoteFiles | None) -> dict[str, Any] | None:
    if remote is not None:
        return newest_state(remote.checkpoints(), lambda name: remote.read(f"{CHECKPOINTS}/{name}/{STATE_NAME}"))
    folder = RunFolder(path).checkpoints
    names = [checkpoint.name for checkpoint in complete_checkpoints(folder)]
    return newest_state(names, lambda name: (folder / name / STATE_NAME).read_bytes())


def check_output(out: Path, runs: Sequence[Path], *, file: str | None = None, page: str | None = None) -> None:
    """Raise UserError if a command's result would take the place of a file of a run, lie in a graph's store, or replace
    what is no file.

    out: as --out gave it. runs: the folders or addresses of those that the command reads; others are told by what they
    hold. file: the name of what is written, if that lies in out. page: the name that it may have in these runs.
    """
    if (address := address_of_run(out)) is not None:
        raise UserError(f"--out {address} is an address; give a path on this machine, and copy it there")
    path = out if file is None else out / file
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"--out {out} is a pipe or a device; give the path of a file")
    own = {Path(os.path.realpath(run)) for run in runs if address_of_run(run) is None}
    # A link stays and what it leads to is written: neither is to be a run's.
    for place in (Path(os.path.realpath(path.parent)) / path.name, Path(os.path.realpath(path))):
        for folder in place.parents:
            name = place.relative_to(folder).parts[0]
            if is_store_folder(folder):
                raise UserError(
                    f"--out {out} lies in the graph store {folder}, which is to stay whole; give another path"
                )
            if folder in own and name == page:
                continue
            if _is_runs_own(name) and (folder in own or _looks_like_a_run(folder, name)):
                raise UserError(f"--out {out} would take the place of {name} of the run in {folder}; give another path")


def _is_runs_own(name: str) -> bool:
    return name in _OWN_NAMES or name.startswith(_EVENT_FILES)


def _looks_like_a_run(folder: Path, name: str) -> bool:
    """Whether a folder holds a run, which something is to be written into by this name. Other programs have a
    config.yaml too, and checkpoints; a run that has only begun has no more than the first."""
    run = RunFolder(folder)
    return run.holds_a_run and (
        name == CONFIG_NAME or run.metrics.exists() or bool(complete_checkpoints(run.checkpoints))
    )


@contextmanager
def hold_run_folder(
    config: TrainConfig, tell: Callable[[str], None], own_parts: Mapping[str, str] = MappingProxyType({})
) -> Iterator[TrainConfig]:
    """Do what `prepare_run_folder` does, and keep the folder to this process while the block runs.

    Another process that trains there, on this machine or on one that shares its locks, is waited for:
    OTHER_RUN_SECONDS at most, since one that died with its machine may still seem to be there. Where the file system
    has no locks, and at an address, nobody is kept out. tell: hears of the wait. Raises UserError after it.
    """
    path = check_run_folder(config)
    if config.run_address is not None:
        yield prepare_run_folder(config, own_parts)
        return
    _make_folder(path)
    told = False

    def tell_once(text: str) -> None:
        nonlocal told
        if not told:
            tell(text)
        told = True

    with folder_lock(path, purpose=f"the run in {path}", wait_seconds=OTHER_RUN_SECONDS, on_wait=tell_once):
        prepared = prepare_run_folder(config.model_copy(update={"run_dir": path}), own_parts)
        try:
            yield prepared
        except BaseException:
            _leave_free(path)
            raise


def prepare_run_folder(config: TrainConfig, own_parts: Mapping[str, str] = MappingProxyType({})) -> TrainConfig:
    """Create the run folder, or check that it may be gone on with, and return the configuration with its path, and with
    all paths of this machine absolute: workers, and who goes on with the run, have other working directories.

    own_parts: the program's own, by kind with their names; kept for `check_own_parts`.
    Raises UserError, before anything is overwritten, if `check_run_folder` does or it cannot be written.
    """
    path = check_run_folder(config)
    saved = saved_fields(path) if config.resume and "sparse_features" not in config.model_fields_set else None
    # As the run began: its curve rounds by it.
    begun = {} if saved is None else {"sparse_features": saved["sparse_features"]}
    prepared = TrainConfig(**(config.model_dump() | _absolute(config) | begun | {"run_dir": path}))
    # On resuming too: workers, epochs and the like may have changed, and the file says what is run.
    # S is written out: it stays what it was when the run goes on with other workers.
    kept = TrainConfig(**(prepared.model_dump() | {"resume": False, "num_shards": config.shards}))
    note = note_of(own_parts)
    # Before config.yaml: a folder with that alone would go on without them.
    if prepared.run_address is not None:
        if note is not None:
            RemoteFiles(prepared.run_address).write(OWN_PARTS_NAME, note)
        RemoteFiles(prepared.run_address).write(CONFIG_NAME, kept.to_yaml().encode())
        return prepared
    _make_folder(path)
    if config.resume:
        (path / FREE_MARK).unlink(missing_ok=True)
    else:
        _remove_begun(path)
    if note is not None:
        replace_file(RunFolder(path).own_parts, note)
    replace_file(RunFolder(path).config, kept.to_yaml().encode())
    return prepared


def _absolute(config: TrainConfig) -> dict[str, Any]:
    """Return the fields that are paths, absolute; a data set that is a name or an address stays as it is."""
    found: dict[str, Any] = {
        name: expanded(path).absolute()
        for name in ("data_root", "cache_dir", "stage_dir")
        if (path := getattr(config, name)) is not None
    }
    if (graph := graph_at(config.dataset)) is not None:
        found["dataset"] = str(graph.absolute())
    return found


def _make_folder(path: Path) -> None:
    """Make a folder, unless it is there, and see that it can be written. Raises UserError if it cannot."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"run folder {path} cannot be written: {error.strerror}; give another --run-dir") from None
