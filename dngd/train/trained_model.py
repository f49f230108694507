"""A run's best model from its folder, the graph that it is used on, and what evaluates it there."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dngd.comm import LocalCommunicator
from dngd.config import TrainConfig, address_of_run
from dngd.errors import UserError
from dngd.graph import GraphStore, resolve_dataset
from dngd.graph.manifest import LabelNames, are_numbers
from dngd.models import MODELS
from dngd.models.graph_batch import GraphShape
from dngd.paths import runs_inside_text
from dngd.train.checkpoint import PREFIX, said_in
from dngd.train.evaluation import EvaluationProgress, Evaluator
from dngd.train.objective import Objective
from dngd.train.parts import RunParts, make_module
from dngd.train.placement import PlacedFeatures, free_gpu_bytes, table_bytes, with_sparse
from dngd.train.remote_run import readable_folder
from dngd.train.run_folder import RunFolder, run_config, spill_folders
from dngd.train.scoring import CustomMetric, Metric
from dngd.train.surroundings import load_weights, make_surroundings


@dataclass(frozen=True)
class TrainedModel:
    """A run's best model. step: when it was evaluated. num_features, num_classes: what it takes and gives, in link
    prediction numbers of an embedding.
    is_multilabel: whether its outputs are of several labels a node. label_names: of its classes, where the graph that
    it was trained on had names, or numbers other than 0 to num_classes - 1. graph_digest: that graph's; None of
    files of an earlier dngd."""

    folder: RunFolder
    config: TrainConfig
    model: nn.Module
    step: int
    num_features: int
    num_classes: int
    is_multilabel: bool = False
    label_names: LabelNames | None = None
    graph_digest: str | None = None


def _no_run(folder: RunFolder, *, is_here: bool) -> str:
    """Return why a run cannot be used that is none. is_here: whether it would be on this machine, not at an address."""
    if is_here and not folder.path.exists():
        return f"run folder {folder.shown} does not exist; give a folder that dngd train wrote"
    inside = runs_inside_text(folder.path) if is_here else ""
    fix = "give one of them" if inside else "give a folder that dngd train wrote"
    return f"{folder.shown} is no run folder (it has no config.yaml){inside}; {fix}"


def load_trained(run: Path, parts: RunParts | None = None) -> TrainedModel:
    """Return the best model of a run, whose folder may be at an address. The graph is not needed for the widths.

    parts: with the module of a run that had one of its own. Raises UserError if the folder holds no run, no evaluated
    model yet, or a file that cannot be read.
    """
    folder = readable_folder(run)
    if not folder.holds_a_run:
        raise UserError(_no_run(folder, is_here=address_of_run(run) is None))
    if not folder.best_model.exists():
        raise UserError(
            f"run {folder.shown} has no model yet: it ended before its first evaluation; go on with --resume"
        )
    config = run_config(folder)
    parts = parts or RunParts()
    if config.model == "custom" and parts.module is None:
        raise UserError(
            f"run {run} trained a module of one's own, which its folder does not hold; from Python: "
            f"dngd.Trainer(config, module=...).evaluate(), or .predict()"
        )
    shown = f"{folder.shown}/{folder.best_model.name}"
    again = f"dngd train --run-dir {shlex.quote(address_of_run(run) or str(run))} --resume"
    needs_program = "custom" in (config.model, config.optimizer) or folder.own_parts.exists()
    again = "Trainer.resume()" if needs_program else again
    fix = f"{again} writes it anew from the newest checkpoint, or put back a copy of it"
    weights, said = _read_weights(folder.best_model, shown, fix)
    try:
        step = int(said["step"])
        names = _names(said["label_names"]) if "label_names" in said else None
        widths = (int(said["num_features"]), int(said["num_classes"])) if config.model == "custom" else None
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else f"a value that cannot be read ({error})"
        raise UserError(
            f"{shown} is not as dngd train wrote it, with {what} in what it says of itself; {fix}"
        ) from None
    if widths is None:
        kind = f"{config.model} of {config.num_layers} layers"
        fix = f"{folder.shown}/{folder.config.name} says {kind} of width {config.hidden}: put back the run's own files"
        widths = _widths(config, weights, shown, fix)
    else:
        fix = "give the module that the run was started with"
    shape = GraphShape(*widths)
    try:
        with torch.random.fork_rng(devices=[]):
            model = make_module(config, parts if config.model == "custom" else RunParts(), shape)
        load_weights(model, weights, shown, fix)
    except UserError:
        raise
    except (RuntimeError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"{shown} cannot be loaded into the run's model: {reason}; {fix}") from None
    is_multilabel = said.get("labels") == "several"
    return TrainedModel(folder, config, model, step, *widths, is_multilabel, names, said.get("graph_digest"))


def _read_weights(path: Path, shown: str, fix: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a safetensors file's tensors, and its metadata. Raises UserError for one that cannot be read."""
    try:
        # Its bytes: the library opens no file whose path is not UTF-8.
        data = path.read_bytes()
        return safetensors.torch.load(data), said_in(data)
    except OSError as error:
        raise UserError(f"{shown} cannot be read ({error.strerror}); {fix}") from None
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0].removeprefix("Error while deserializing header: ")[:80]
        size = f", in {path.stat().st_size} bytes" if path.is_file() else ""
        raise UserError(f"{shown} is damaged, or no safetensors file ({reason}{size}); {fix}") from None


def _names(text: str) -> LabelNames:
    """Return a JSON list of names, or of whole numbers. Raises ValueError for other JSON, or none."""
    names = json.loads(text)
    if not isinstance(names, list) or not (are_numbers(names) or all(isinstance(name, str) for name in names)):
        raise ValueError(f"label_names is {text[:40]}")
    return tuple(names)


def _widths(config: TrainConfig, weights: dict[str, Tensor], shown: str, fix: str) -> tuple[int, int]:
    """Return how many numbers a built-in model takes and gives. Raises UserError for weights of another model."""
    ends = ("layers.0.linear.weight", f"layers.{config.num_layers - 1}.linear.weight")
    for name in ends:
        if name not in weights or weights[name].dim() != 2:
            raise UserError(f"{shown} is of another model, which has no matrix {name}; {fix}")
    first, last = (weights[name] for name in ends)
    return first.shape[1] // (2 if MODELS[config.model].aggregation == "mean" else 1), last.shape[0]


def open_graph(
    trained: TrainedModel,
    dataset: str | None = None,
    data_root: Path | None = None,
    cache_dir: Path | None = None,
) -> GraphStore:
    """Open the run's graph, or another that its model fits.

    dataset, data_root, cache_dir: as for training; None: the run's own, which has to be the very graph. A graph with
    fewer classes than the model's, or without labels, fits. Where both have names of the classes, or one has numbers
    for names and the other class numbers, the graph's are numbered as the model's are, by name. Raises
    UserError if there is no such graph, if it is not the run's own where that is asked for, or if its features or
    classes are not the model's.
    """
    config = trained.config
    name = config.dataset if dataset is None else dataset
    try:
        store = resolve_dataset(name, data_root or config.data_root_in_use, cache_dir or config.cache_dir)
    except UserError as error:
        if dataset is None:
            raise UserError(f"the run's graph was not found: {error}; or give where it is now with --dataset") from None
        raise
    if dataset is None and trained_on(trained) not in (None, store.digest):
        raise UserError(
            f"run {trained.folder.path} was trained on another graph than the {store.name} that is at {store.path} now "
            f"(it has other content); give the run's own with --data-root or --dataset, or this one with --dataset"
        )
    if store.num_features != trained.num_features:
        raise UserError(
            f"graph {store.name} has {store.num_features} features a node but the model of run {trained.folder.path} "
            f"was trained on {trained.num_features}; give a graph with the same features"
        )
    if config.task == "link":
        return store
    if store.is_multilabel != trained.is_multilabel and bool(store.labelled.any()):
        kinds = {True: "several labels a node", False: "one label a node"}
        raise UserError(
            f"graph {store.name} has {kinds[store.is_multilabel]} but the model of run {trained.folder.path} was "
            f"trained on {kinds[trained.is_multilabel]}; give a graph with the same labels"
        )
    if trained.label_names is None and (dataset is None or trained_on(trained) == store.digest):
        return store
    known = _names_or_numbers(trained.label_names, store.label_names, trained.num_classes)
    names = _names_or_numbers(store.label_names, trained.label_names, store.num_classes)
    if known is not None and names is not None and store.num_classes:
        return _by_name(trained, store, known, names)
    if store.num_classes > trained.num_classes:
        raise UserError(
            f"graph {store.name} has {store.num_classes} classes but the model of run {trained.folder.path} knows "
            f"{trained.num_classes}; give a graph with the same classes"
        )
    if 0 < store.num_classes < trained.num_classes and not store.is_multilabel:
        return store.with_classes(torch.arange(store.num_classes), trained.num_classes)
    return store


def _names_or_numbers(own: LabelNames | None, other: LabelNames | None, num_classes: int) -> list[str] | None:
    """Return names of classes as text; of classes without, their numbers where the others' names are numbers."""
    if own is None and (other is None or not are_numbers(other)):
        return None
    return [str(name) for name in (range(num_classes) if own is None else own)]


def _by_name(trained: TrainedModel, store: GraphStore, known: list[str], names: list[str]) -> GraphStore:
    """Return a graph with its classes numbered as the model's are. known: the model's classes; names: the graph's."""
    if known == names:
        return store
    number = {name: place for place, name in enumerate(known)}
    unknown = [name for name in names if name not in number]
    if unknown and not store.is_multilabel:
        # Classes between numbers with gaps that no node has, of a store that is not numbered without.
        met = set(torch.unique(store.labels).tolist())
        unknown = [name for place, name in enumerate(names) if name not in number and place in met]
    if unknown:
        raise UserError(
            f"graph {store.name} has class {unknown[0]!r}{f' and {len(unknown) - 1} more' if len(unknown) > 1 else ''} "
            f"which the model of run {trained.folder.path} does not know; its classes are "
            f"{', '.join(known[:10])}{', ...' if len(known) > 10 else ''}: name the graph's alike"
        )
    if store.is_multilabel and len(names) < len(known):
        lacking = next(name for name in known if name not in names)
        raise UserError(
            f"graph {store.name} does not tell label {lacking!r} of its nodes, which the model of run "
            f"{trained.folder.path} knows; give it all of {', '.join(known[:10])}{', ...' if len(known) > 10 else ''}, "
            "or no labels"
        )
    return store.with_classes(torch.tensor([number.get(name, 0) for name in names]), len(known))  # 0: no node has it


def split_warning(trained: TrainedModel, store: GraphStore) -> str | None:
    """Return what is to be said of the run's split taken in a graph that it was not trained on; None for nothing.

    A split that is drawn goes by the nodes' places: in the same graph in another order, nodes that the model learnt
    from are in its other parts.
    """
    spec = trained.config.split if trained.config.task == "node" else trained.config.link_split
    if spec.startswith(("masks", "public")) or trained_on(trained) in (None, store.digest):
        return None
    return (
        f"graph {store.name} is not the one that run {trained.folder.path} was trained on, and its split {spec} is "
        "drawn anew: if it is the same graph in another order, or with other edges, what the model learnt from is in "
        "all parts"
    )


MANY = 10
"""A tenth of the nodes is many: what they need is most of the feature table."""


def evaluator_of(
    trained: TrainedModel,
    store: GraphStore,
    nodes: Tensor | None,
    progress: EvaluationProgress | None = None,
    objective: Objective | None = None,
    metric: Metric | CustomMetric = "accuracy",
) -> Evaluator:
    """Return what evaluates the model once in this process: on a GPU if the run used one and there is one here.

    nodes: those that it will be asked for, None for all. objective, metric: of scores. Raises UserError if there is no
    room for its tables.
    """
    config, model = trained.config, trained.model
    device = torch.device("cuda" if config.use_gpu and torch.cuda.is_available() else "cpu")
    model.to(device)
    placed = PlacedFeatures("memory_map", _placed(store.features, device))
    if nodes is None or nodes.numel() * MANY >= store.num_nodes:
        placed = with_sparse(placed, config, store, model)  # for a few nodes the whole table need not be read
    _, evaluator = make_surroundings(
        config,
        store,
        model,
        LocalCommunicator(),
        device=device,
        features=placed.table,
        sparse=placed.sparse,
        folders=spill_folders(config, trained.folder),
        keeps_first=False,
        progress=progress,
        objective=objective,
        metric=metric,
    )
    evaluator.check(model, nodes)
    return evaluator


def trained_on(trained: TrainedModel) -> str | None:
    """Return the digest of the graph that the run was trained on, from its newest checkpoint, or else its model's file;
    None if none has it."""
    checkpoints = trained.folder.checkpoints
    for state in sorted(checkpoints.glob(f"{PREFIX}*/state.json"), reverse=True):
        try:
            return str(json.loads(state.read_text())["position"]["graph_digest"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
    return trained.graph_digest


def _placed(features: Tensor, device: torch.device) -> Tensor:
    if device.type == "cpu" or table_bytes(features) > free_gpu_bytes(device) // 2:
        return features
    return features.to(device)
