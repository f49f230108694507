"""`Trainer`: one call from a configuration to a trained model, on either engine."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from dngd.comm import LocalCommunicator
from dngd.config import TrainConfig
from dngd.report import write_report
from dngd.train import RunPlan, RunResult, check_run_folder, make_plan, prepare_run_folder, run_rank
from dngd.train.plan import check_device, check_fits
from dngd.train.progress import ConsoleReporter, Reporter, SilentReporter
from dngd.train.remote_run import readable_folder, send_report
from dngd.train.together import StageMessages, open_dataset


class Trainer:
    """Trains what a TrainConfig describes.

    ::

        import dngd
        result = dngd.Trainer(dngd.TrainConfig(dataset="products-mini", engine="local")).fit()
        print(result.test_accuracy, result.run_dir)

    config: the run. reporter: hears of the progress; None shows a progress bar on a terminal's standard
    error and log lines elsewhere. quiet: shows nothing.
    """

    def __init__(self, config: TrainConfig, *, reporter: Reporter | None = None, quiet: bool = False) -> None:
        self.config = config
        self._reporter = SilentReporter() if quiet and reporter is None else reporter

    def plan(self, tell: Callable[[str], None] | None = None) -> RunPlan:
        """Return what the run will need, without starting it.

        Raises UserError for what `fit` refuses before it starts anything: configuration, run folder, data, split,
        batch size and this machine's memory. A cluster is not asked. tell: hears of what takes long.
        """
        config = self.config
        check_run_folder(config)
        if config.engine == "local":
            check_device(config)
        store = open_dataset(config, StageMessages(tell or (lambda text: None)))
        plan = make_plan(config, store, store.split(config.split, config.seed))
        # On a cluster the workers check their own nodes; a local Ray puts them all on this machine.
        elsewhere = config.engine == "ray" and bool(config.ray.address or os.environ.get("RAY_ADDRESS"))
        if not elsewhere:
            check_fits(plan, config, config.num_workers if config.engine == "ray" else 1)
        return plan

    def fit(self) -> RunResult:
        """Train to the end and return the result; the run folder then holds all of it.

        Raises UserError for a mistake in the configuration, the data or the folder, before anything is
        overwritten; TrainingError if training cannot go on.
        """
        if self._reporter is not None:
            result = self._run(self._reporter)
        else:
            with ConsoleReporter(Console(file=sys.stderr)) as reporter:
                result = self._run(reporter)
        # The configuration's address has options, such as an endpoint, that the result's is without.
        run = self.config.run_dir if self.config.run_address else Path(result.run_dir)
        assert run is not None
        folder = readable_folder(run)
        send_report(run, write_report([folder.path], folder.report))
        return result

    def _run(self, reporter: Reporter) -> RunResult:
        # Bad input is refused before a folder is made or a worker started.
        reporter.message(f"reading {self.config.dataset}")
        self.plan(reporter.message)
        if self.config.engine == "local":
            return run_rank(prepare_run_folder(self.config), LocalCommunicator(), reporter)
        from dngd.launch.ray_train import on_cluster, run_on_ray  # importing Ray takes seconds

        with on_cluster(self.config, reporter):
            return run_on_ray(prepare_run_folder(self.config), reporter)
