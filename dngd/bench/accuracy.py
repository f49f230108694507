"""`dngd bench accuracy`: seconds and steps to a validation accuracy, tuned baselines against K-FAC's one setting.

A panel is a graph and a model. With protocol `full` or `quick` each baseline is searched over its grid
(dngd.bench.search). Its finalists, K-FAC's shipped setting and its variants are then trained with every seed, in turns
(dngd.bench.heat); only those runs' times and accuracies are reported. With protocol `given` exactly the settings of
the command are trained, in turns, without a search.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dngd.allocator import keep_freed_memory
from dngd.bench.competitors import Setting, make_settings, parse_rates
from dngd.bench.curves import LEAST_EVALUATIONS, SMOOTHING, TARGET_MARGIN, Curve, mean_curve, smoothed
from dngd.bench.earlier_search import EarlierSearch, finalists_of
from dngd.bench.graphs import PRODUCTS_SHAPED, scale_of
from dngd.bench.heat import Track, open_track, run_heat, samplers_of
from dngd.bench.machine import describe_machine, torch_threads
from dngd.bench.optimizers import BASELINE, SUBJECT
from dngd.bench.progress import BenchProgress
from dngd.bench.protocol import Lineage, Member, Protocol, borders_of, choose_protocol, family_of, lineages_of, rates_of
from dngd.bench.runs import RunRecord
from dngd.bench.search import SEARCH_EVALUATIONS, SEARCH_SMOOTHING, Grid, search, shortest_of
from dngd.bench.step import describe_config, describe_graph
from dngd.bench.training_file import TrainingFile, key_of
from dngd.bench.verdict import aggregate, best_label, judge, remarks
from dngd.config import TrainConfig
from dngd.errors import UserError
from dngd.train.divergence import MEASURED_SEEDS
from dngd.train.plan import device_of

GIVEN = "given"
GIVEN_SEEDS = (0, 1, 2)
RECORD_VERSION = 2
"""Of what a heat does; a change of it makes finished trainings of an --out folder void."""


@dataclass(frozen=True)
class AccuracyOptions:
    """What to compare.

    config: everything that the settings share; its dataset, seed, optimizer and learning rate do not matter, its
    epochs are K-FAC's (all settings' with protocol given). datasets: (name or path, split). models: (kind, number of
    layers). protocol: full, quick or given. seeds, first_epochs, max_epochs: None for the protocol's. rates:
    "adam=1e-3,3e-3;kfac=0.1". variants: "name:kfac.key=value,...;...". eval_steps: steps between evaluations; None:
    ever further apart (dngd.bench.runs.evaluation_steps). targets: None for the best of Adam less 0.005, and the best.
    folder: keeps finished trainings; None: nothing is kept. scale: of the graph products-shaped. search_only: leave the
    finals to a later call with the same folder; several searches may run beside each other, finals should not.
    finals_of: a result whose search is taken over, so that its finals alone are run anew.
    """

    config: TrainConfig
    datasets: Sequence[tuple[str, str]]
    models: Sequence[tuple[str, int]]
    optimizers: Sequence[str] = ("kfac", "adam", "adamw", "sgd")
    protocol: str = "full"
    seeds: Sequence[int] | None = None
    first_epochs: int | None = None
    max_epochs: int | None = None
    rates: str | None = None
    variants: str | None = None
    eval_steps: int | None = None
    targets: Sequence[float] | None = None
    metric: str = "auto"
    scale: float = 1.0
    threads: int | None = None
    folder: Path | None = None
    search_only: bool = False
    finals_of: Path | None = None


@dataclass(frozen=True)
class _Plan:
    """Options, checked. settings: trained as they are; searched: optimizers whose best is looked for; earlier: where it
    was found before."""

    options: AccuracyOptions
    protocol: Protocol | None
    seeds: tuple[int, ...]
    settings: tuple[Setting, ...]
    searched: tuple[str, ...]
    file: TrainingFile
    progress: BenchProgress
    earlier: EarlierSearch | None = None


@dataclass
class _Panel:
    """One graph and model at work; `track` is that of one seed at a time, since it holds tables of the graph's size."""

    plan: _Plan
    config: TrainConfig
    title: str
    place: str = ""
    """Which of how many panels, for the progress bar."""
    track_of: dict[int, Track] = field(default_factory=dict)

    earlier: Mapping[str, Any] | None = None
    """What an earlier search found here, if it is taken over."""

    def look_up(self) -> None:
        """Take over an earlier search, if one is given. Raises UserError if it was not of this graph and model."""
        if self.plan.earlier is not None:
            track = self.track(self.plan.seeds[0])
            fields = {"metric": track.metric, "fanout": list(track.config.fanouts)}
            graph = describe_graph(track.store, track.split)
            self.earlier = self.plan.earlier.panel(self.title, graph, fields)

    def track(self, seed: int) -> Track:
        if seed not in self.track_of:
            self.track_of.clear()
            options = self.plan.options
            own = self.config.model_copy(update={"seed": seed})
            self.track_of[seed] = open_track(own, options.metric, scale_of(own.dataset, options.scale))
        return self.track_of[seed]

    def heat(self, settings: Sequence[Setting], seed: int, density: int) -> list[RunRecord]:
        """Return a heat's records, from the file where it was run before. density: of evaluations."""
        track, options = self.track(seed), self.plan.options
        description = {
            "version": RECORD_VERSION,
            "graph": track.store.digest,
            "metric": track.metric,
            "seed": seed,
            "eval_steps": options.eval_steps,
            "density": density,
            "prefetch": track.config.prefetch,
            "threads": options.threads,
            **self._what_came_later(track, settings),
            "settings": {s.label: track.own_config(s).identity() | _length(track, s) for s in settings},
        }
        key = key_of(description)
        records = self.plan.file.get(key)
        if records is None:
            records = run_heat(track, settings, options.eval_steps, density, self._advance)
            self.plan.file.add(key, {"panel": self.title, "seed": seed}, records)
        else:
            for setting in settings:
                self.plan.progress.skip(track.total_steps(setting))
        return records

    def _what_came_later(self, track: Track, settings: Sequence[Setting]) -> dict[str, Any]:
        """Return what a heat depends on besides, where it is not as it always was before it could be chosen."""
        found: dict[str, Any] = {}
        if samplers_of(track.config):
            found["samplers"] = samplers_of(track.config)
        if track.config.use_gpu:
            found["gpu"] = torch.cuda.get_device_name()
        if any(track.own_config(setting).kl_bound is not None for setting in settings):
            found["measured_seeds"] = MEASURED_SEEDS
        return found

    def _advance(self, steps: int, label: str) -> None:
        self.plan.progress.advance(steps, f"{self.place} {self.title}: {label}")

    def train(self, members: Sequence[Member], seed: int) -> list[Curve]:
        """Train members, each alone; see dngd.bench.search."""
        settings = [member.setting(self.config) for member in members]
        self.begin(f"search, seed {seed}", settings, [seed])
        return [self.heat([setting], seed, SEARCH_EVALUATIONS)[0].curve for setting in settings]

    def begin(self, text: str, settings: Sequence[Setting], seeds: Sequence[int]) -> None:
        """Start the progress bar of a part of the work."""
        total = sum(self.track(seeds[0]).total_steps(setting) for setting in settings) * len(seeds)
        if settings:
            self.plan.progress.begin(total, f"{self.place} {self.title}: {text}")


def run_accuracy_bench(options: AccuracyOptions, progress: BenchProgress | None = None) -> dict[str, Any]:
    """Train on every graph and model and return curves, targets and comparisons as plain data.

    With search_only: only what became of each grid. Raises UserError for options that cannot be, before anything is
    trained.
    """
    plan = _plan(options, progress or BenchProgress())
    panels = _panels(plan)
    results = []
    with torch_threads(options.threads):
        machine = describe_machine(keeps_memory=keep_freed_memory(), device=device_of(options.config))
        for number, panel in enumerate(panels, 1):
            panel.place = f"{number}/{len(panels)}"
            results.append(_run_panel(panel))
            panel.track_of.clear()
    if options.search_only:
        return {"benchmark": "accuracy", "machine": machine, "config": _described(plan), "searches": results}
    subject = SUBJECT if SUBJECT in options.optimizers else None
    return {
        "benchmark": "accuracy",
        "machine": machine,
        "config": _described(plan),
        "trainings_from_file": plan.file.found,
        "panels": results,
        "summary": None if subject is None else aggregate(results, subject),
    }


def _plan(options: AccuracyOptions, progress: BenchProgress) -> _Plan:
    if not options.datasets:
        raise UserError("no data set is named; give --datasets, e.g. --datasets products-mini")
    if options.scale != 1.0 and PRODUCTS_SHAPED not in [dataset for dataset, _ in options.datasets]:
        raise UserError(
            f"--scale {options.scale:g} makes a smaller {PRODUCTS_SHAPED}, which is not among --datasets; leave it out"
        )
    settings = make_settings(options.config, options.optimizers, options.rates, options.variants)
    if options.eval_steps is not None and options.eval_steps < 1:
        raise UserError(f"eval_steps={options.eval_steps} is out of range; give at least 1, or leave it out")
    file = TrainingFile(options.folder)
    if options.search_only and (options.folder is None or options.protocol == GIVEN):
        raise UserError(
            "--search-only keeps its trainings for the finals, and needs a protocol that searches; give --out FOLDER, "
            "and --protocol full or quick"
        )
    if options.finals_of is not None and (options.search_only or options.protocol == GIVEN):
        raise UserError("--finals-of takes over a search; leave --search-only and --protocol given out")
    if options.protocol == GIVEN:
        seeds = GIVEN_SEEDS if options.seeds is None else tuple(options.seeds)
        plan = _Plan(options, None, seeds, tuple(settings), (), file, progress)
    else:
        rates = parse_rates(options.rates or "")
        protocol = choose_protocol(
            options.protocol,
            rates={name: values for name, values in rates.items() if name in options.optimizers},
            seeds=options.seeds,
            first_epochs=options.first_epochs,
            max_epochs=options.max_epochs,
        )
        own = tuple(setting for setting in settings if setting.optimizer == SUBJECT)
        several = next((s.group for s in own if sum(s.group == other.group for other in own) > 1), None)
        if several is not None:
            raise UserError(
                f"{several} has several learning rates but is compared in one setting, the same for every graph; give "
                "one rate, name variants, or use --protocol given"
            )
        searched = tuple(name for name in options.optimizers if name != SUBJECT)
        earlier = None if options.finals_of is None else EarlierSearch(options.finals_of)
        plan = _Plan(options, protocol, protocol.seeds, own, searched, file, progress, earlier)
        if earlier is not None:
            earlier.check(_described(plan), searched)
    baselines = {setting.group for setting in plan.settings} | {family_of(name) for name in plan.searched}
    if options.targets is None and BASELINE not in baselines:
        raise UserError(
            f"targets come from {BASELINE}'s best accuracy, which takes no part; give --targets, or add {BASELINE}"
        )
    return plan


def _panels(plan: _Plan) -> list[_Panel]:
    """Return the panels, each graph and split opened once so that a mistake is told before hours of training."""
    options = plan.options
    panels = []
    for kind, num_layers in options.models:
        for dataset, split in options.datasets:
            # Not model_copy: the fields are checked together.
            fields = options.config.model_dump(exclude_unset=True)
            fields |= {"dataset": dataset, "split": split, "model": kind, "num_layers": num_layers}
            panel = _Panel(plan, TrainConfig(**fields), "")
            track = panel.track(plan.seeds[0])
            panel.title = f"{track.store.name} {kind} {num_layers} layers"
            panel.look_up()
            for setting in plan.settings:
                total = track.total_steps(setting)
                if options.eval_steps is not None and not 1 <= options.eval_steps <= total:
                    raise UserError(
                        f"eval_steps={options.eval_steps} is out of range; a run has {total} steps: give 1 to {total}"
                    )
            panel.track_of.clear()
            panels.append(panel)
    return panels


def _run_panel(panel: _Panel) -> dict[str, Any]:
    plan = panel.plan
    settings = list(plan.settings)
    searches: dict[str, Any] = {}
    borders: dict[str, list[str]] = {}
    if panel.earlier is None:
        _search(panel, settings, searches, borders)
    else:
        assert plan.protocol is not None
        rates = {name: rates_of(name, plan.protocol, panel.config) for name in plan.searched}
        found, borders = finalists_of(panel.earlier, plan.protocol, rates)
        settings += found
        searches = dict(panel.earlier["search"])
    if plan.options.search_only:
        return {"name": panel.title, "search": searches}
    panel.begin("finals", settings, plan.seeds)
    runs = [run for seed in plan.seeds for run in panel.heat(settings, seed, LEAST_EVALUATIONS)]
    track = panel.track(plan.seeds[0])
    first_order = {setting.group for setting in settings if setting.optimizer != SUBJECT}
    judged = judge(settings, runs, plan.options.targets, sorted(first_order))
    for label in _leading(judged, first_order):
        judged["settings"][label]["borders"] = borders.get(label, [])
    result = {
        "name": panel.title,
        "dataset": track.store.name,
        "model": panel.config.model,
        "num_layers": panel.config.num_layers,
        "metric": track.metric,
        "graph": describe_graph(track.store, track.split),
        "fanout": list(track.config.fanouts),
        "scale": scale_of(panel.config.dataset, plan.options.scale),
        "batch_size": track.batch_size(settings[0]),
        "steps_per_epoch": track.steps_per_epoch(settings[0]),
        **judged,
        "search": searches,
    }
    told = [] if plan.earlier is None else [f"the baselines' settings were searched before: {plan.earlier.path.name}"]
    return result | {"remarks": told + remarks(result, SUBJECT)}


def _search(panel: _Panel, settings: list[Setting], searches: dict[str, Any], borders: dict[str, list[str]]) -> None:
    """Look for the best of each family, and add its finalists to the settings, with what became of the others."""
    plan = panel.plan
    grid_of: dict[str, list[Lineage]] = {}
    for name in plan.searched:
        assert plan.protocol is not None
        found = lineages_of(name, plan.protocol, panel.config, panel.track(plan.seeds[0]).num_train)
        grid_of.setdefault(family_of(name), []).extend(found)
    for family, lineages in grid_of.items():
        assert plan.protocol is not None
        grid, finalists = search(lineages, plan.protocol, panel.train)
        searches[family] = _describe_search(grid, finalists, panel.config)
        shortest = shortest_of(grid)
        for member in finalists:
            setting, own = member.setting(panel.config), member.lineage
            settings.append(setting)
            borders[setting.label] = borders_of(member, lineages, is_capped=own in grid.capped, shortest=shortest[own])


def _leading(judged: Mapping[str, Any], groups: set[str]) -> set[str]:
    """Return the settings that speak for their group: the fastest to a target, and the most accurate."""
    labels = {best_label(judged, group) for group in groups}
    for compared in judged["comparison"]:
        for group in groups:
            found = compared["groups"][group]
            labels |= {found[key] for key in ("seconds_setting", "steps_setting") if found[key] is not None}
    return labels


def _describe_search(grid: Grid, finalists: Sequence[Member], base: TrainConfig) -> dict[str, Any]:
    """Return what became of each setting of a grid: trained with how many seeds, and its best validation on them."""
    settings = []
    for member, curves in grid.curves.items():
        best = max(smoothed(mean_curve(curves), SEARCH_SMOOTHING).accuracy)
        setting = member.setting(base)
        settings.append({"label": setting.label, "seeds": len(curves), "best": best, "final": member in finalists})
    return {"settings": settings, "steps": sum(c.steps[-1] for curves in grid.curves.values() for c in curves)}


def _length(track: Track, setting: Setting) -> dict[str, Any]:
    own = track.own_config(setting)
    return {"epochs": own.epochs, "max_steps": own.max_steps}


def _described(plan: _Plan) -> dict[str, Any]:
    options, protocol = plan.options, plan.protocol
    varied = ("dataset", "seed", "split", "model", "num_layers", "fanout")
    shared = {k: v for k, v in describe_config(options.config).items() if k not in varied}
    names = ["epochs", "max_steps", "lr_schedule", "warmup_steps", "lr_half_steps", "average_share", "momentum"]
    return shared | {
        **{name: getattr(options.config, name) for name in [*names, "prefetch"]},
        "protocol": options.protocol,
        "finals_of": None if plan.earlier is None else plan.earlier.path.name,
        "seeds": list(plan.seeds),
        "datasets": [list(pair) for pair in options.datasets],
        "models": [list(pair) for pair in options.models],
        "smoothing": f"centred mean over {2 * SMOOTHING + 1} evaluations, fewer at the ends, of the mean over seeds",
        "target_margin": TARGET_MARGIN,
        "grid": None
        if protocol is None
        else {
            "rates": {name: list(rates_of(name, protocol, options.config)) for name in plan.searched},
            "schedules": list(protocol.schedules),
            "batches": list(protocol.batches),
            "first_epochs": protocol.first_epochs,
            "max_epochs": protocol.max_epochs,
            "keep": list(protocol.keep),
            "tolerance": protocol.tolerance,
            "slack": protocol.slack,
        },
    }
