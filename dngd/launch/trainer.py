"""`Trainer`: one call from a configuration to a trained model, on either engine."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor, nn

from dngd.comm import LocalCommunicator
from dngd.config import TrainConfig
from dngd.errors import UserError
from dngd.paths import expanded
from dngd.report import metric_words, write_report
from dngd.train import RunPlan, RunResult, check_run_folder, hold_run_folder, make_plan, run_rank
from dngd.train.callbacks import Callback
from dngd.train.evaluate_run import evaluate_run
from dngd.train.interrupt import CtrlC
from dngd.train.loggers import check_loggers
from dngd.train.objective import CustomLoss
from dngd.train.own_parts import check_own_parts
from dngd.train.parts import ModuleFactory, OptimizerFactory, RunParts, WrappedModel
from dngd.train.plan import check_device, check_fits, with_samplers
from dngd.train.predict import Predictions, predict_run, probabilities_of_run
from dngd.train.progress import ConsoleReporter, QuietReporter, Reporter
from dngd.train.remote_run import readable_folder, send_report
from dngd.train.run_folder import check_graph_of_run, reached_step
from dngd.train.scoring import CustomMetric
from dngd.train.supervision import Supervision
from dngd.train.task import split_of
from dngd.train.together import StageMessages, open_dataset
from dngd.train.trained_model import load_trained


class Trainer:
    """Trains what a TrainConfig describes, with a module, optimizer, loss, metric and callbacks of one's own if wanted.

    >>> import dngd, tempfile
    >>> config = dngd.TrainConfig(
    ...     dataset="products-mini", engine="local", num_layers=2, hidden=32, batch_size=512, max_steps=20,
    ...     run_dir=tempfile.mkdtemp() + "/run",
    ... )
    >>> result = dngd.Trainer(config, quiet=True).fit()
    >>> result.steps, result.test_accuracy > 0.5
    (20, True)

    config: the run.
    module: a model of PyG, forward(x, edge_index) (see PyGModel), or a torch.nn.Module over GraphBatch (see there, and
        PyGStack for PyG's layers), or a function of a GraphShape that returns either; its weights are then drawn from
        the run's seed. A module that is given is copied: `fit` leaves it as it is, `best_model` returns the trained
        one. The configuration's num_layers is the number of its graph layers; hidden and dropout are not used.
    optimizer: a function of the module (a model of PyG itself) that returns a torch optimizer. Its groups' rates are
        the peaks that lr_schedule and warmup_steps bend; gradients are those of the mean loss, summed over workers.
    loss: a function (outputs [n, C], labels) -> each seed's loss [n], in place of cross-entropy. With optimizer kfac
        the Fisher must then be the empirical one.
    metric: a function (outputs [n, C], labels) -> a number, larger is better, of all validation (or test) nodes at
        once, in place of the configuration's metric.
        Of link prediction outputs and labels of both are [m, 1], of pairs: logits, and 1 of links.
    callbacks: see Callback.
    reporter: hears of the progress; None shows a progress bar on a terminal's standard error and log lines elsewhere.
    quiet: shows nothing; what has gone wrong is a Python warning.

    With engine ray all of these are pickled to the workers. Raises UserError for parts that do not fit the
    configuration.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        module: nn.Module | ModuleFactory | None = None,
        optimizer: OptimizerFactory | None = None,
        loss: CustomLoss | None = None,
        metric: CustomMetric | None = None,
        callbacks: Sequence[Callback] = (),
        reporter: Reporter | None = None,
        quiet: bool = False,
    ) -> None:
        if not isinstance(callbacks, Iterable):
            raise UserError(f"callbacks is a {type(callbacks).__name__}; give a list of them, [callback]")
        self._parts = RunParts(module, optimizer, loss, metric, tuple(callbacks))
        self.config = self._parts.complete(config)
        self._reporter = QuietReporter() if quiet and reporter is None else reporter
        self._run_dir = config.run_dir

    def plan(self, tell: Callable[[str], None] | None = None) -> RunPlan:
        """Return what the run will need, without starting it.

        Raises UserError for what `fit` refuses before it starts anything: configuration, run folder, data, split,
        batch size and this machine's memory. A cluster is not asked. tell: hears of what takes long.
        """
        config = self.config
        check_run_folder(config)
        check_own_parts(config, self._parts.own())
        check_loggers(config.loggers)
        if config.engine == "local":
            check_device(config)
        store = open_dataset(config, StageMessages(tell or (lambda text: None)))
        check_graph_of_run(config, store)
        plan = make_plan(config, store, split_of(config, store), self._parts.own_module(config, store))
        # On a cluster the workers check their own nodes; a local Ray puts them all on this machine.
        elsewhere = config.engine == "ray" and bool(config.ray.address or os.environ.get("RAY_ADDRESS"))
        workers_here = config.num_workers if config.engine == "ray" and not elsewhere else 1
        plan, config = with_samplers(plan, config, workers_here)
        if not elsewhere:
            check_fits(plan, config, workers_here)
        return plan

    def fit(self) -> RunResult:
        """Train to the end and return the result; the run folder then holds all of it.

        Raises UserError for a mistake in the configuration, the data or the folder, before anything is
        overwritten; TrainingError if training cannot go on; RunInterrupted (a KeyboardInterrupt) after a first Ctrl-C,
        which lets the step end and writes a checkpoint. A second one stops at once.
        """
        if self._reporter is not None:
            result = self._run(self._reporter)
        else:
            metric = metric_words(self._parts.metric_name(self.config))
            with ConsoleReporter(Console(file=sys.stderr), metric) as reporter:
                result = self._run(reporter)
        run = self._run_folder()
        folder = readable_folder(run)
        try:
            report = write_report([folder.path], folder.report)
        except UserError as error:
            raise UserError(
                f"the run is finished, but {str(error).rpartition('; ')[0]}; free space or fix permissions, then write "
                f"it by dngd report {folder.shown} --out FILE"
            ) from None
        send_report(run, report)
        return result

    def resume(self) -> RunResult:
        """Go on from the run folder's newest good checkpoint, and return the result, as `fit` does.

        The run is the last one of this Trainer, or the one in config.run_dir. Raises UserError without either, and for
        a run with other settings or another module.
        """
        self.config = TrainConfig(**(self.config.model_dump() | {"run_dir": self._run_folder(), "resume": True}))
        return self.fit()

    def evaluate(self, dataset: str | None = None) -> dict[str, Any]:
        """Return {"step", "metric", "train", "val", "test"}: loss and metric of the run's best model, each part's as
        {"loss": ..., metric: ...}, on all neighbours. Link prediction has no "train".

        dataset: another graph, or where the run's is now. Raises UserError if there is no run with a model.
        """
        return evaluate_run(
            self._run_folder(),
            data_root=self.config.data_root,
            cache_dir=self.config.cache_dir,
            dataset=dataset,
            parts=self._parts,
        )

    def predict(self, nodes: Tensor | None = None, dataset: str | None = None) -> Tensor:
        """Return what the run's best model gives nodes, on all neighbours: probabilities float32 [n, C], or in link
        prediction embeddings [n, d].

        nodes: int64 [n], distinct; None for all. Rows are in the order of nodes. Of several labels a node each column
        is a probability by itself. dataset: another graph with the same features. Raises UserError if there is no run
        with a model, or no such node. `predict_file` writes a file, block by block.
        """
        return probabilities_of_run(
            self._run_folder(),
            nodes,
            data_root=self.config.data_root,
            cache_dir=self.config.cache_dir,
            dataset=dataset,
            parts=self._parts,
        )

    def predict_file(
        self, out: str | Path, *, nodes: str = "all", pairs: str | Path | None = None, probabilities: bool = False
    ) -> Predictions:
        """Write what the run's best model gives nodes to a Parquet file, with the nodes' own ids; see `dngd predict`.

        nodes: all, train, val, test or unlabelled. pairs: of link prediction, a table of the pairs to predict.
        probabilities: those of all classes too. Raises UserError if there is no run with a model, no such node, or a
        file that is there already.
        """
        return predict_run(
            self._run_folder(),
            expanded(out),
            nodes=nodes,
            pairs=None if pairs is None else expanded(pairs),
            data_root=self.config.data_root,
            cache_dir=self.config.cache_dir,
            probabilities=probabilities,
            parts=self._parts,
        )

    def best_model(self) -> nn.Module:
        """Return the module with the weights of the best evaluation, on the CPU and in evaluation mode.

        A model of PyG normalises by itself again: on a whole graph, model(x, edge_index) gives what dngd
        does, but where self loops were kept, which PyG counts as those that it would add. Raises
        UserError if there is no run with a model.
        """
        model = load_trained(self._run_folder(), self._parts).model
        return (model.plain() if isinstance(model, WrappedModel) else model).eval()

    def export(self, out: str | Path, *, format: str = "safetensors", overwrite: bool = False) -> Path:
        """Write the run's best model for use without dngd; see dngd.train.export_run.

        format: safetensors (weights), or pyg, a folder with a plain PyG module. Raises UserError if there is no run
        with a model, or for pyg of a module of one's own.
        """
        from dngd.train.export import export_run  # imports PyG, which takes seconds

        return export_run(self._run_folder(), expanded(out), format=format, overwrite=overwrite, parts=self._parts)

    def _run_folder(self) -> Path:
        if self._run_dir is None:
            raise UserError("there is no run yet: call fit() first, or name its folder with TrainConfig(run_dir=...)")
        return self._run_dir

    def _run(self, reporter: Reporter) -> RunResult:
        # Bad input is refused before a folder is made or a worker started.
        reporter.message(f"reading {self.config.dataset}")
        plan = self.plan(reporter.message)
        if self.config.resume and (reached := reached_step(self.config)) > plan.total_steps:
            raise UserError(
                f"run {self.config.run_dir} has taken {reached} steps and is asked for {plan.total_steps}; give at "
                "least as many by --epochs, and by --max-steps if it is set"
            )
        if self.config.engine == "local":
            with self._prepared(reporter) as config:
                supervision = Supervision(stops=CtrlC(reporter.message))
                return run_rank(config, LocalCommunicator(), reporter, supervision=supervision, parts=self._parts)
        from dngd.launch.ray_train import on_cluster, run_on_ray  # importing Ray takes seconds

        with on_cluster(self.config, reporter), self._prepared(reporter) as config:
            return run_on_ray(config, reporter, self._parts)

    @contextmanager
    def _prepared(self, reporter: Reporter) -> Iterator[TrainConfig]:
        with hold_run_folder(self.config, reporter.message, self._parts.own()) as config:
            self._run_dir = config.run_dir
            yield config
