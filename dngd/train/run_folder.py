"""The folder of a run: who may write there, and where its files are."""

from __future__ import annotations

import os
import time
from pathlib import Path

from dngd.config import TrainConfig
from dngd.errors import UserError
from dngd.graph import cache_folder
from dngd.train.checkpoint import check_same_run, replace_file


class RunFolder:
    """Paths of a run's files; see the README for what each holds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.health = path / "health.jsonl"
        self.result = path / "result.json"
        self.best_model = path / "model.safetensors"
        self.checkpoints = path / "checkpoints"
        self.report = path / "report.html"

    @property
    def holds_a_run(self) -> bool:
        """Whether a run was begun here."""
        return self.config.exists()


def spill_folders(config: TrainConfig, folder: RunFolder) -> list[Path]:
    """Return where exact evaluation's tables may lie on disk, best first.

    The cache is on this machine's own disk, as a rule; run folders are often where several machines see them.
    """
    return [cache_folder(config.cache_dir), folder.path]


def default_run_dir(config: TrainConfig) -> Path:
    """Return runs/DATASET-MODEL-OPTIMIZER-TIME below the working directory."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{Path(config.dataset).stem}-{config.model}-{config.optimizer}-{stamp}"


def check_run_folder(config: TrainConfig) -> Path:
    """Return the path of the run folder, which may not exist yet.

    Raises UserError if the folder holds a run and `resume` is off, a run that differs in a field that defines
    it, or something else.
    """
    path = (config.run_dir or default_run_dir(config)).expanduser().absolute()
    folder = RunFolder(path)
    if config.resume and config.run_dir is None:
        raise UserError("--resume needs --run-dir: say which run to go on with")
    if folder.holds_a_run and not config.resume:
        raise UserError(f"run folder {path} already holds a run; go on with --resume, or give another --run-dir")
    if folder.holds_a_run:
        check_same_run(TrainConfig.from_yaml(folder.config).identity(), config.identity())
    if path.exists() and not path.is_dir():
        raise UserError(f"run folder {path} is a file; give another --run-dir")
    foreign = path.is_dir() and not folder.holds_a_run and any(path.iterdir())
    if foreign:
        raise UserError(f"run folder {path} holds files that are no run's; give an empty or new --run-dir")
    return path


def prepare_run_folder(config: TrainConfig) -> TrainConfig:
    """Create the run folder, or check that it may be gone on with, and return the configuration with its path.

    Raises UserError, before anything is overwritten, if `check_run_folder` does or it cannot be written.
    """
    path = check_run_folder(config)
    folder = RunFolder(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"run folder {path} cannot be written: {error.strerror}; give another --run-dir") from None
    prepared = TrainConfig(**(config.model_dump() | {"run_dir": path}))
    # On resuming too: workers, epochs and the like may have changed, and the file says what is run.
    # S is written out: it stays what it was when the run goes on with other workers.
    kept = TrainConfig(**(prepared.model_dump() | {"resume": False, "num_shards": config.shards}))
    replace_file(folder.config, kept.to_yaml().encode())
    return prepared
