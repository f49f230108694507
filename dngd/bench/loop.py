"""`dngd bench loop`: a plain loop over PyG's own layers, full-batch or sampled, with Adam and with NaturalGradient.

What a person has who adds dngd's three lines to a script of their own: none of `dngd train`'s sampling, schedules,
operators or averages. All settings train the same model on the same graph, in turns, the clock running while one has
its turn; Adam at several rates, of which the best counts, NaturalGradient as it is made without an argument, with the
damping of `default_damping` for the graph, and with that for full batches and the rate it asks for. Dropout's draws go
with the setting's own steps, not with the turns. On a GPU the graph and all models lie there, and a turn ends when it
has done what it was given. Sampled batches are a NeighborLoader's, the same for all settings, drawn when they are
wanted: a step's time has all of it.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dngd.allocator import keep_freed_memory
from dngd.bench.competitors import Setting
from dngd.bench.device import features_on, wait_for
from dngd.bench.graphs import open_graph
from dngd.bench.machine import describe_machine, torch_threads
from dngd.bench.optimizers import BASELINE, SUBJECT
from dngd.bench.progress import BenchProgress
from dngd.bench.runs import RunRecord, evaluation_steps, interleaved, slices
from dngd.bench.scoring import Metric, Scored, choose_metric, score_logits
from dngd.bench.step import describe_graph
from dngd.bench.verdict import aggregate, best_label, judge, remarks
from dngd.config import TrainConfig
from dngd.errors import UserError
from dngd.graph import GraphStore, Split
from dngd.optim import NaturalGradient, default_damping
from dngd.sampling import NeighborLoader
from dngd.sampling.neighbor_loader import check_neighbors
from dngd.train.optimizers import fused
from dngd.train.plan import device_of

DEFAULT = "NaturalGradient"
"""NaturalGradient(model)."""
TOLD = "NaturalGradient+default_damping"
"""NaturalGradient(model, **default_damping(n, C))."""
FULL = "NaturalGradient+full_batch"
"""NaturalGradient(model, lr=0.2, **default_damping(n, C, full_batch=True))."""
GROUPS = (DEFAULT, TOLD, FULL)

LAYERS = ("gcn", "sage")
LONGEST_TURN = 10
WARMUP_STEPS = 4
DROPOUT = 0.5


@dataclass(frozen=True)
class LoopOptions:
    """What to train. datasets: (name or path, split). models: (gcn or sage, number of layers). rates: Adam's.

    num_neighbors: of sampled batches of batch_size seeds, nearest hop first; None: all training nodes each step.
    """

    datasets: Sequence[tuple[str, str]]
    models: Sequence[tuple[str, int]] = (("gcn", 2),)
    hidden: int = 64
    steps: int = 200
    rates: Sequence[float] = (1e-2, 3e-2, 1e-1)
    seeds: Sequence[int] = (0, 1, 2)
    num_neighbors: Sequence[int] | None = None
    batch_size: int = 512
    threads: int | None = None
    use_gpu: bool = False
    data_root: Path | None = None
    cache_dir: Path | None = None


class Stack(nn.Module):
    """PyG's GCNConv or SAGEConv layers with ReLU and dropout between them, as in PyG's own first examples."""

    def __init__(self, kind: str, widths: Sequence[int], *, cached: bool = True) -> None:
        super().__init__()
        from torch_geometric.nn import GCNConv, SAGEConv

        pairs = list(zip(widths, widths[1:]))
        made = [GCNConv(a, b, cached=cached) if kind == "gcn" else SAGEConv(a, b) for a, b in pairs]
        self.layers = nn.ModuleList(made)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """Return the logits of all nodes."""
        for layer in self.layers[:-1]:
            x = F.dropout(F.relu(layer(x, edge_index)), DROPOUT, self.training)
        logits: Tensor = self.layers[-1](x, edge_index)
        return logits


@dataclass(frozen=True)
class _Graph:
    """A graph as PyG has it, where it is trained on, split by one seed."""

    store: GraphStore
    split: Split
    metric: Metric
    x: Tensor
    edge_index: Tensor
    y: Tensor
    adjacency: Any = None
    """edge_index as a sparse matrix, [targets, sources], which PyG's layers multiply with: quicker, and of less memory;
    where nothing is trained on it."""

    @property
    def device(self) -> torch.device:
        return self.x.device

    def nodes(self, part: str) -> Tensor:
        """Return the indices of a part of the split, where the graph is."""
        nodes: Tensor = getattr(self.split, part)
        return nodes.to(self.device)


_Batch = tuple[Tensor, Tensor, Tensor, "Tensor | slice"]
"""Rows, edges, the seeds' labels, and which rows the seeds are."""


def _full_batches(graph: _Graph) -> Iterator[_Batch]:
    nodes = graph.nodes("train")
    batch = graph.x, graph.edge_index, graph.y[nodes], nodes
    while True:
        yield batch


def _sampled_batches(options: LoopOptions, graph: _Graph, seed: int) -> Iterator[_Batch]:
    """Draw each batch when it is asked for, in this process, whatever the settings that have a turn between."""
    assert options.num_neighbors is not None
    loader = NeighborLoader(
        graph.store,
        options.num_neighbors,
        graph.split.train,
        options.batch_size,
        seed=seed,
        num_workers=0,
        prefetch=0,
    )
    with loader:
        while True:
            for batch in loader:
                seeds = slice(batch.batch_size)
                yield (
                    batch.x.to(graph.device),
                    batch.edge_index.to(graph.device),
                    batch.y[seeds].to(graph.device),
                    seeds,
                )


def _batches(options: LoopOptions, graph: _Graph, seed: int) -> Iterator[_Batch]:
    return _full_batches(graph) if options.num_neighbors is None else _sampled_batches(options, graph, seed)


@dataclass
class _Run:
    """A setting's run with one seed; seconds: of training so far, idle_seconds: of them, those on no processor.

    batches: rows, edges, labels and number of seeds of each step, without end.
    """

    setting: Setting
    seed: int
    graph: _Graph
    model: nn.Module
    optimizer: torch.optim.Optimizer
    random_state: Tensor
    batches: Iterator[_Batch]
    step: int = 0
    seconds: float = 0.0
    idle_seconds: float = 0.0
    evaluations: list[dict[str, Any]] = field(default_factory=list)

    def advance(self, last_step: int) -> None:
        """Take the steps up to last_step, on the clock."""
        graph = self.graph
        _set_random_state(graph.device, self.random_state)
        wait_for(graph.device)
        started, on_cpu = time.perf_counter(), time.process_time()
        self.model.train()
        while self.step < last_step:
            x, edge_index, labels, seeds = next(self.batches)
            self.optimizer.zero_grad()
            out = self.model(x, edge_index)
            F.cross_entropy(out[seeds], labels).backward()  # type: ignore[no-untyped-call]
            if isinstance(self.optimizer, NaturalGradient):
                self.optimizer.step(num_samples=len(labels))
            else:
                self.optimizer.step()
            self.step += 1
        wait_for(graph.device)
        taken = time.perf_counter() - started
        self.seconds += taken
        self.idle_seconds += max(0.0, taken - (time.process_time() - on_cpu))
        self.random_state = _random_state(graph.device)

    @torch.no_grad()
    def evaluate(self) -> None:
        """Add a point to the curve, off the clock."""
        self.model.eval()
        graph = self.graph
        logits = self.model(graph.x, graph.edge_index if graph.adjacency is None else graph.adjacency)
        found: dict[str, Scored] = {}
        for name in ("val", "test"):
            nodes = self.graph.nodes(name)
            found[name] = score_logits(logits[nodes], self.graph.y[nodes], self.graph.metric)
        self.evaluations.append(
            {
                "step": self.step,
                "seconds": self.seconds,
                "busy_seconds": self.seconds - self.idle_seconds,
                "val_score": found["val"].score,
                "test_score": found["test"].score,
            }
        )

    def record(self) -> RunRecord:
        """Return what is kept of the run when its model is gone."""
        columns = {key: [e[key] for e in self.evaluations] for key in self.evaluations[0]}
        data = {"seed": self.seed, **columns, "train_seconds": self.seconds, "idle_seconds": self.idle_seconds}
        return RunRecord(self.setting.label, data)

    def close(self) -> None:
        """Take hooks off the model."""
        if isinstance(self.optimizer, NaturalGradient):
            self.optimizer.preconditioner.close()
        self.batches.close()  # type: ignore[attr-defined]  # a generator


def run_loop_bench(options: LoopOptions, progress: BenchProgress | None = None) -> dict[str, Any]:
    """Train on every graph and model and return curves, targets and comparisons as plain data.

    Raises UserError for options that cannot be, before anything is trained.
    """
    progress = progress or BenchProgress()
    _check(options)
    _device_of(options)
    for dataset, split in options.datasets:
        _open(options, dataset, split, options.seeds[0])
    panels = []
    with torch_threads(options.threads):
        machine = describe_machine(keeps_memory=keep_freed_memory(), device=_device_of(options))
        for kind, num_layers in options.models:
            for dataset, split in options.datasets:
                panels.append(_run_panel(options, dataset, split, kind, num_layers, progress))
    return {
        "benchmark": "loop",
        "machine": machine,
        "config": {
            "datasets": [list(pair) for pair in options.datasets],
            "models": [list(pair) for pair in options.models],
            "hidden": options.hidden,
            "steps": options.steps,
            "rates": list(options.rates),
            "seeds": list(options.seeds),
            "num_neighbors": None if options.num_neighbors is None else list(options.num_neighbors),
            "batch_size": None if options.num_neighbors is None else options.batch_size,
        },
        "panels": panels,
        "summary": {group: aggregate(panels, group) for group in _groups(options)},
    }


def _device_of(options: LoopOptions) -> torch.device:
    return device_of(TrainConfig(dataset="", engine="local", use_gpu=options.use_gpu))


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(device: torch.device, state: Tensor) -> None:
    torch.cuda.set_rng_state(state, device) if device.type == "cuda" else torch.set_rng_state(state)


def _check(options: LoopOptions) -> None:
    for flag, value in (("steps", options.steps), ("hidden", options.hidden)):
        if value < 1:
            raise UserError(f"{flag}={value} is below 1; give at least 1")
    if not options.datasets or not options.rates or not options.seeds:
        raise UserError(
            "a loop needs a data set, a learning rate of Adam's and a seed; give --datasets, --lrs, --seeds"
        )
    if options.num_neighbors is not None:
        check_neighbors(options.num_neighbors)
        if options.batch_size < 1:
            raise UserError(f"batch-size={options.batch_size} is below 1; give at least 1")
        wrong = [f"{kind}:{n}" for kind, n in options.models if n != len(options.num_neighbors)]
        if wrong:
            raise UserError(
                f"model {wrong[0]} has another number of layers than --num-neighbors has hops, "
                f"{len(options.num_neighbors)}; give a number for each"
            )
    for kind, num_layers in options.models:
        if kind not in LAYERS or num_layers < 1:
            raise UserError(f"model {kind}:{num_layers} is unknown; give gcn or sage with at least one layer, as gcn:2")


def _groups(options: LoopOptions) -> tuple[str, ...]:
    """Return the settings besides Adam's: those for full batches are left out of sampled ones."""
    return GROUPS if options.num_neighbors is None else GROUPS[:2]


def _settings(options: LoopOptions) -> list[Setting]:
    adam = [Setting(BASELINE, BASELINE, rate) for rate in options.rates]
    return [*adam, *(Setting(group, SUBJECT, 0.2 if group == FULL else 0.1) for group in _groups(options))]


def _open(options: LoopOptions, dataset: str, split_name: str, seed: int) -> _Graph:
    store = open_graph(dataset, options.data_root, options.cache_dir)
    if store.num_features == 0:
        raise UserError(f"graph {store.name} has no features, which the layers take; give --datasets with some")
    targets = torch.repeat_interleave(torch.arange(store.num_nodes), store.indptr.diff())
    device = _device_of(options)
    adjacency = None
    if options.num_neighbors is not None:
        ones, size = torch.ones(store.num_edges), (store.num_nodes, store.num_nodes)
        adjacency = torch.sparse_csr_tensor(store.indptr, store.indices.long(), ones, size).to(device)
    return _Graph(
        store,
        store.split(split_name, seed),
        choose_metric("auto", store),
        features_on(device, store).float().clone(),
        torch.stack([store.indices.long(), targets]).to(device),
        store.labels.long().clone().to(device),
        adjacency,
    )


def _run_panel(
    options: LoopOptions, dataset: str, split: str, kind: str, num_layers: int, progress: BenchProgress
) -> dict[str, Any]:
    settings = _settings(options)
    graph = _open(options, dataset, split, options.seeds[0])
    name = f"{graph.store.name} {kind} {num_layers} layers"
    if options.num_neighbors is not None:
        neighbours = ",".join(map(str, options.num_neighbors))
        name += f", batches of {options.batch_size} seeds and {neighbours} neighbours"
    progress.begin(options.steps * len(settings) * len(options.seeds), name)
    runs: list[RunRecord] = []
    for seed in options.seeds:
        runs += _run_seed(options, _open(options, dataset, split, seed), kind, num_layers, seed, progress)
    judged = judge(settings, runs, None, [BASELINE])
    label = best_label(judged, BASELINE)
    judged["settings"][label]["borders"] = _borders(options, judged["settings"][label])
    panel = {
        "name": name,
        "dataset": graph.store.name,
        "model": kind,
        "num_layers": num_layers,
        "metric": graph.metric,
        "graph": describe_graph(graph.store, graph.split),
        **judged,
    }
    # What concerns no group alone is said by each.
    said = dict.fromkeys(remark for group in _groups(options) for remark in remarks(panel, group))
    return panel | {"remarks": list(said)}


def _borders(options: LoopOptions, of: Mapping[str, Any]) -> list[str]:
    """Return where Adam's best setting lies at the border of what was tried, so that a better one may lie beyond."""
    at_rate = len(options.rates) > 1 and of["lr"] in (min(options.rates), max(options.rates))
    found = {"learning rate": at_rate, "steps": of["best"]["step"] == options.steps}
    return [name for name, is_there in found.items() if is_there]


def _run_seed(
    options: LoopOptions, graph: _Graph, kind: str, num_layers: int, seed: int, progress: BenchProgress
) -> list[RunRecord]:
    """Train all settings with one seed, in turns."""
    torch.manual_seed(seed)
    widths = [graph.store.num_features, *[options.hidden] * (num_layers - 1), graph.store.num_classes]
    initial = Stack(kind, widths, cached=options.num_neighbors is None).to(graph.device)
    settings = _settings(options)
    points = evaluation_steps(options.steps)
    _warm_up(options, graph, initial)
    runs = []
    for setting in settings:
        model = copy.deepcopy(initial)
        torch.manual_seed(seed)
        optimizer, batches = _optimizer(setting, model, graph), _batches(options, graph, seed)
        runs.append(_Run(setting, seed, graph, model, optimizer, _random_state(graph.device), batches))
    for run in runs:
        run.evaluate()
    evaluated = set(points)
    for place, last_step in interleaved([slices(points, LONGEST_TURN)] * len(runs)):
        run = runs[place]
        taken = last_step - run.step
        run.advance(last_step)
        if last_step in evaluated:
            run.evaluate()
        progress.advance(taken, f"{graph.store.name} {kind} {num_layers} layers, seed {seed}: {run.setting.label}")
    for run in runs:
        run.close()
    return [run.record() for run in runs]


def _optimizer(setting: Setting, model: nn.Module, graph: _Graph) -> torch.optim.Optimizer:
    if setting.group == BASELINE:
        return fused(torch.optim.Adam, list(model.parameters()), lr=setting.lr)
    if setting.group == DEFAULT:
        return NaturalGradient(model)
    is_full = setting.group == FULL
    damping = default_damping(len(graph.split.train), graph.store.num_classes, full_batch=is_full)
    return NaturalGradient(model, lr=setting.lr, **damping)


def _warm_up(options: LoopOptions, graph: _Graph, initial: nn.Module) -> None:
    """Take a few steps of each kind on throw-away copies: the first ones pay for what is set up but once."""
    for setting in (Setting(BASELINE, BASELINE, 1e-3), Setting(DEFAULT, SUBJECT, 0.1)):
        model = copy.deepcopy(initial)
        optimizer, batches = _optimizer(setting, model, graph), _batches(options, graph, 0)
        run = _Run(setting, 0, graph, model, optimizer, _random_state(graph.device), batches)
        run.advance(WARMUP_STEPS)
        run.close()
