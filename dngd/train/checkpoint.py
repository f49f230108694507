"""Checkpoints: written whole or not at all, verified before they are believed.

A checkpoint is a folder `checkpoints/step-00000120/` with `state.json` (format version, position, sha256 of every
other file), `model.safetensors`, `optimizer.safetensors`, `average.safetensors` where weights are averaged, and with
curvature `curvature-shared.safetensors` and one `curvature-rank-K.safetensors` a rank. It is built in a hidden folder,
flushed to disk, and renamed into place; a process killed at any moment, and a disk that is full, leave the last good
one. Random states are not in it: every stream is derived from (run seed, epoch, step, shard), so the position says
all. Only rank 0 touches the folder: the other ranks' parts travel through the communicator. Nothing in it is a pickle.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from dngd.comm import Communicator
from dngd.errors import UserError
from dngd.train.together import together

FORMAT_VERSION = 1
PREFIX = "step-"
STATE_NAME = "state.json"
UNFINISHED = ".writing-"
"""How the name begins of a folder that is to become a checkpoint."""


@dataclass
class Snapshot:
    """What a checkpoint holds.

    position: plain numbers and texts of the loop. identity: the fields that define the run. average: the weights'
    mean; None without one. curvature: the preconditioner's state, "shared.*" and this rank's "local.*"; None without
    one. best_model: the run's model.safetensors at that step (rank 0), so that a resumed run has its own best.
    On loading, `rank_curvatures` are the states of all the ranks that saved, in rank order.
    """

    step: int
    position: dict[str, Any]
    identity: dict[str, Any]
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    curvature: dict[str, Tensor] | None = None
    best_model: bytes | None = None
    average: dict[str, Tensor] | None = None
    rank_curvatures: list[dict[str, Tensor]] = field(default_factory=list)


@dataclass(frozen=True)
class HostSnapshot:
    """A snapshot in memory of its own: it stays as it is while training goes on.

    rank_locals: every rank's "local.*" state of the curvature.
    """

    snapshot: Snapshot
    rank_locals: list[bytes] | None


class CheckpointFolder:
    """The checkpoints of a run. keep: how many of the newest stay.

    send: called with the folder of a checkpoint that is whole, before older ones go; what it raises is a failure to
    write it. shown: what messages call the folder.
    """

    def __init__(
        self,
        path: Path,
        communicator: Communicator,
        *,
        keep: int,
        send: Callable[[Path], None] = lambda folder: None,
        shown: str | None = None,
    ) -> None:
        self._path = path
        self._comm = communicator
        self._keep = keep
        self._send = send
        self._shown = shown or str(path)
        self._sent: Path | None = None

    def capture(self, snapshot: Snapshot) -> HostSnapshot | None:
        """Copy a snapshot to the host, with every rank's own part, at rank 0; None elsewhere. All ranks enter."""
        rank_locals: list[bytes] | None = None
        if snapshot.curvature is not None:
            local = {k: v for k, v in snapshot.curvature.items() if k.startswith("local.")}
            rank_locals = self._comm.gather_bytes(_to_bytes(local))
        if self._comm.rank != 0:
            return None
        shared = snapshot.curvature
        if shared is not None:
            shared = host_copies({k: v for k, v in shared.items() if k.startswith("shared.")})
        copied = replace(
            snapshot,
            model=host_copies(snapshot.model),
            optimizer=host_copies(snapshot.optimizer),
            average=None if snapshot.average is None else host_copies(snapshot.average),
            curvature=shared,
        )
        return HostSnapshot(copied, rank_locals)

    def write(self, captured: HostSnapshot) -> None:
        """Write a checkpoint and drop the oldest beyond `keep`; rank 0 alone, from any thread, one at a time.

        Raises OSError if that fails: what was begun is removed, and the checkpoints already there stay.
        """
        snapshot, locals_by_rank = captured.snapshot, captured.rank_locals
        temporary = self._path / f"{UNFINISHED}{snapshot.step:08d}"
        try:
            self._write(snapshot, locals_by_rank, temporary)
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)  # it may hold the space that something else needs
            raise

    def _write(self, snapshot: Snapshot, locals_by_rank: list[bytes] | None, temporary: Path) -> None:
        files = {
            "model.safetensors": _to_bytes(snapshot.model),
            "optimizer.safetensors": _to_bytes(snapshot.optimizer),
        }
        if snapshot.average is not None:
            files["average.safetensors"] = _to_bytes(snapshot.average)
        if snapshot.curvature is not None:
            assert locals_by_rank is not None
            shared = {k: v for k, v in snapshot.curvature.items() if k.startswith("shared.")}
            files["curvature-shared.safetensors"] = _to_bytes(shared)
            files |= {f"curvature-rank-{k}.safetensors": data for k, data in enumerate(locals_by_rank)}
        if snapshot.best_model is not None:
            files["best-model.safetensors"] = snapshot.best_model
        self._path.mkdir(exist_ok=True)  # without its parent: a run folder that was removed is not to come back half
        final = self._path / f"{PREFIX}{snapshot.step:08d}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        for name, data in files.items():
            write_flushed(temporary / name, data)
        state = {
            "format_version": FORMAT_VERSION,
            "step": snapshot.step,
            "ranks": len(locals_by_rank or ()),
            "position": snapshot.position,
            "identity": snapshot.identity,
            "sha256": {name: digest(data) for name, data in files.items()},
        }
        state["checksum"] = digest(json.dumps(state, sort_keys=True).encode())
        write_flushed(temporary / STATE_NAME, json.dumps(state, indent=1).encode())
        flush_folder(temporary)
        if final.exists():
            shutil.rmtree(final)  # a resumed run rewrites a checkpoint that was damaged
        os.replace(temporary, final)
        flush_folder(self._path)
        try:
            self._send(final)
            self._sent = final
        finally:
            self._retire(final)

    def _retire(self, newest: Path) -> None:
        """Remove what is not to be kept: the newest stay, and the last one that was sent."""
        # Later ones were passed over when the run went on from an earlier one: damaged, and not to count as kept.
        passed_over = [path for path in self._complete() if path.name > newest.name]
        for later in passed_over:
            shutil.rmtree(later, ignore_errors=True)
        left_overs = [path for path in self._path.iterdir() if path.name.startswith(UNFINISHED)]
        for old in self._complete()[: -self._keep] + left_overs:
            if old != self._sent:
                shutil.rmtree(old, ignore_errors=True)

    def load_newest(
        self,
        *,
        limit_seconds: float = 1800.0,
        round_seconds: float = 30.0,
        tell: Callable[[str], None] = lambda text: None,
    ) -> tuple[Snapshot | None, list[str]]:
        """Return the newest checkpoint that verifies (None if there is none) and why newer ones were passed over.

        All ranks enter; rank 0 reads, the files' bytes travel through the communicator. limit_seconds: for the reading;
        round_seconds, tell: see `together`. Raises UserError for a checkpoint of a newer format, where all are damaged,
        and after limit_seconds.
        """
        is_reader = self._comm.rank == 0
        files, skipped = together(
            lambda progress: self._read_newest() if is_reader else ({}, []),
            self._comm,
            limit_seconds=limit_seconds,
            round_seconds=round_seconds,
            tell=tell,
            state="are done, the others read the checkpoint",
            fix="wait longer with --set stage_timeout_seconds=N, or put the run folder on faster storage",
        )
        header = {"skipped": skipped, "names": list(files)}
        payload = json.dumps(header).encode() if is_reader else None
        header = json.loads(self._comm.broadcast_bytes(payload))
        received = {name: self._comm.broadcast_bytes(files[name] if is_reader else None) for name in header["names"]}
        if not received:
            return None, header["skipped"]
        return _parse(received), header["skipped"]

    def run_folder_is_gone(self) -> UserError | None:
        """Return what ends the run if the folder that this one lies in is not there any longer."""
        return run_folder_is_gone(self._path.parent)

    def _complete(self) -> list[Path]:
        return complete_checkpoints(self._path)

    def _read_newest(self) -> tuple[dict[str, bytes], list[str]]:
        skipped: list[str] = []
        for folder in reversed(self._complete()):
            try:
                return read_verified(folder), skipped
            except DamagedError as error:
                skipped.append(f"checkpoint {folder.name} is damaged ({error}) and was passed over")
        if skipped:
            raise UserError(
                f"all checkpoints in {self._shown} are damaged, the newest: {skipped[0]}; remove the folder "
                "to start the run again from the beginning"
            )
        return {}, skipped


def run_folder_is_gone(path: Path) -> UserError | None:
    """Return what ends a run whose folder is not there any longer; None if it is, or cannot be looked at now."""
    try:
        path.stat()
    except FileNotFoundError:
        return UserError(
            f"the run folder {path} is gone: it was removed, renamed or unmounted during the run; put it back and go "
            "on with --resume, or start again"
        )
    except OSError:
        return None
    return None


def complete_checkpoints(path: Path) -> list[Path]:
    """Return the folders of the checkpoints in a folder of this machine, oldest first."""
    if not path.is_dir():
        return []
    return sorted(p for p in path.iterdir() if p.name.startswith(PREFIX) and p.is_dir())


_NOT_A_STATE = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What reading a damaged state.json raises."""


def newest_state(names: list[str], read: Callable[[str], bytes | None]) -> dict[str, Any] | None:
    """Return the `state.json` of the newest checkpoint in which it is what was written; None without one, and for a
    newer format. names: the checkpoints' folders, oldest first. read: returns a folder's state.json; None, or an
    OSError, if there is none."""
    for name in reversed(names):
        with contextlib.suppress(OSError, *_NOT_A_STATE, DamagedError):
            data = read(name)
            if data is not None:
                state = _state(data)
                return state if state["format_version"] <= FORMAT_VERSION else None
    return None


class DamagedError(Exception):
    """A checkpoint file that is not what was written."""


def read_verified(folder: Path) -> dict[str, bytes]:
    """Return the files of a checkpoint. Raises DamagedError unless they are what was written, UserError for a newer
    format."""
    try:
        return _verified(folder)
    except UserError:
        raise
    except RecursionError as error:
        raise DamagedError("it is nested too deeply") from error
    except (OSError, *_NOT_A_STATE) as error:
        raise DamagedError(str(error)) from error


def _verified(folder: Path) -> dict[str, bytes]:
    state_bytes = (folder / STATE_NAME).read_bytes()
    state = _state(state_bytes)
    if state["format_version"] > FORMAT_VERSION:
        raise UserError(
            f"checkpoint {folder} has format version {state['format_version']}, this dngd reads up to "
            f"{FORMAT_VERSION}; upgrade dngd"
        )
    files = {STATE_NAME: state_bytes}
    for name, expected in state["sha256"].items():
        data = (folder / name).read_bytes()
        if digest(data) != expected:
            raise DamagedError(f"{name} does not match its sha256")
        files[name] = data
    return files


def _state(data: bytes) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(data)
    checksum = state.pop("checksum")
    if digest(json.dumps(state, sort_keys=True).encode()) != checksum:
        raise DamagedError("state.json does not match its checksum")
    return state


def _parse(files: dict[str, bytes]) -> Snapshot:
    state = json.loads(files[STATE_NAME])
    try:
        ranks: list[dict[str, Tensor]] = []
        if "curvature-shared.safetensors" in files:
            shared = safetensors.torch.load(files["curvature-shared.safetensors"])
            for k in range(state["ranks"]):
                ranks.append(shared | safetensors.torch.load(files[f"curvature-rank-{k}.safetensors"]))
        return Snapshot(
            step=state["step"],
            position=state["position"],
            identity=state["identity"],
            model=safetensors.torch.load(files["model.safetensors"]),
            optimizer=safetensors.torch.load(files["optimizer.safetensors"]),
            average=safetensors.torch.load(files["average.safetensors"]) if "average.safetensors" in files else None,
            rank_curvatures=ranks,
            best_model=files.get("best-model.safetensors"),
        )
    except SafetensorError as error:
        raise UserError(f"checkpoint of step {state['step']} cannot be read: {error}") from None


HEADER_LENGTH_BYTES = 8
"""Of a safetensors file: what it begins with, the length of its JSON header, which is a multiple of it too."""

OWN_SETTINGS = "use the run's own settings, or another --run-dir for a new run"


def check_same_run(
    saved: dict[str, Any],
    wanted: dict[str, Any],
    fix: str = OWN_SETTINGS,
    given: Mapping[str, tuple[Any, Any]] = MappingProxyType({}),
) -> None:
    """Raise UserError if a checkpoint's identity differs from the run's, naming the first differences.

    given: fields that were given another value, with the run's value and this one, for those that an identity leaves
    out; what follows from them is named after all of these.
    """
    names = [key for key in sorted(saved.keys() | wanted.keys()) if saved.get(key) != wanted.get(key)]
    if not names:
        return
    causes = [key for key in names if key in given]
    first = causes or names[:3]
    values = {key: given.get(key, (None, None)) for key in first}
    shown = ", ".join(
        f"{key}={wanted.get(key, new)!r} (the run has {saved.get(key, old)!r})" for key, (old, new) in values.items()
    )
    others = [key for key in names if key not in first]
    if not causes:
        more = f" and {len(others)} more" if others else ""
    else:
        listed = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        more = f", which changes {listed} too" if others else ""
    raise UserError(f"cannot resume with another {shown}{more}; {fix}")


def host_copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of the host's own memory, none of which shares it with another (tied weights do)."""
    return {k: v.detach().to("cpu", copy=True).contiguous() for k, v in tensors.items()}


def weights_file(tensors: Mapping[str, Tensor], said: Mapping[str, str]) -> bytes:
    """Return the content of a safetensors file of the host's tensors, and of metadata that is said of them: the same
    bytes for the same content (the library writes metadata in an order that differs from call to call)."""
    data: bytes = safetensors.torch.save(dict(tensors), dict(said))
    end = HEADER_LENGTH_BYTES + int.from_bytes(data[:HEADER_LENGTH_BYTES], "little")
    header = json.loads(data[HEADER_LENGTH_BYTES:end])
    header["__metadata__"] = dict(sorted(said.items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_LENGTH_BYTES)
    return len(text).to_bytes(HEADER_LENGTH_BYTES, "little") + text + data[end:]


def said_in(data: bytes) -> dict[str, str]:
    """Return the metadata of a safetensors file; none has an entry in those that `weights_file` did not make."""
    end = HEADER_LENGTH_BYTES + int.from_bytes(data[:HEADER_LENGTH_BYTES], "little")
    said: dict[str, str] = json.loads(data[HEADER_LENGTH_BYTES:end]).get("__metadata__", {})
    return said


def _to_bytes(tensors: dict[str, Tensor]) -> bytes:
    data: bytes = safetensors.torch.save({k: v.detach().cpu().contiguous() for k, v in tensors.items()})
    return data


def digest(data: bytes) -> str:
    """Return the sha256 of a file's content."""
    return hashlib.sha256(data).hexdigest()


def write_flushed(path: Path, data: bytes) -> None:
    """Write a file and wait until it is on disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def flush_folder(path: Path) -> None:
    """Wait until a folder's entries are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.writing")
    try:
        write_flushed(temporary, data)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
