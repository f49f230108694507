"""The accuracy benchmark on a tiny graph: equal work for all, in turns, clock stopped during evaluation."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from dngd.bench import AccuracyOptions, heat, run_accuracy_bench
from dngd.bench.competitors import Setting
from dngd.bench.heat import run_heat
from dngd.bench.learner import Learner
from dngd.bench.runs import FullFeed, Run, SampledFeed, evaluation_steps, interleaved, slices
from dngd.bench.scoring import Scored
from dngd.config import TrainConfig
from dngd.errors import UserError
from dngd.graph import GraphStore


def config(**changes: Any) -> TrainConfig:
    fields: dict[str, Any] = {"dataset": "", "model": "gcn", "num_layers": 2, "hidden": 8, "fanout": (4, 4)}
    return TrainConfig(**(fields | {"batch_size": 60, "epochs": 4, "engine": "local"} | changes))


def options_for(store: GraphStore, base: TrainConfig, **changes: Any) -> AccuracyOptions:
    """Two-layer GCNs on a store's masks with the settings given, no search, where nothing else is said."""
    fields: dict[str, Any] = {"models": [("gcn", 2)], "protocol": "given", "optimizers": ("kfac", "adam")}
    return AccuracyOptions(base, [(str(store.path), "masks")], **(fields | changes))


def test_evaluations_are_at_multiples_and_at_the_end() -> None:
    assert evaluation_steps(10, 4) == [4, 8, 10]
    assert evaluation_steps(8, 4) == [4, 8]


def test_evaluations_are_dense_at_first_and_a_twentieth_apart_later() -> None:
    points = evaluation_steps(1000)
    assert points[:40] == list(range(1, 41))
    assert points[-1] == 1000
    assert all(after - before <= max(1, before / 20) for before, after in zip(points, points[1:]))
    assert len(points) < 120
    assert len(evaluation_steps(1000, density=10)) < 0.6 * len(points)
    assert evaluation_steps(400) == [point for point in points if point < 400] + [400], "the same for every length"


def test_runs_advance_by_equal_shares_of_their_length() -> None:
    turns = interleaved([[1, 2, 3, 4], [50, 100]])
    assert turns.index((0, 2)) < turns.index((1, 100))
    assert turns.index((1, 50)) < turns.index((0, 3))
    assert [step for run, step in turns if run == 0] == [1, 2, 3, 4]
    assert [step for run, step in turns if run == 1] == [50, 100]


def test_turns_end_at_every_evaluation_and_are_short() -> None:
    assert slices([5, 10, 12], 50) == [5, 10, 12]
    ends = slices([120, 130], 50)
    assert ends == [40, 80, 120, 130]


def test_sampled_runs_do_equal_work_in_turns(store: GraphStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variant that changes nothing has the very same curve as what it varies: same weights, batches, dropout."""
    turns: list[tuple[str, int]] = []
    real = Run.advance

    def advance(self: Run, last_step: int) -> None:
        turns.append((self.setting.label, last_step))
        real(self, last_step)

    monkeypatch.setattr(Run, "advance", advance)
    result = run_accuracy_bench(
        options_for(
            store,
            config(kfac={"inverse_delay": 0}),
            optimizers=("kfac",),
            seeds=(1,),
            rates="kfac=0.1",
            variants="same:kfac.inverse_delay=0",
            eval_steps=5,
            targets=(0.01, 1.0),
            threads=1,
        )
    )
    one, two = "kfac lr=0.1", "same lr=0.1"
    assert turns == [(one, 5), (two, 5), (two, 10), (one, 10), (two, 15), (one, 15), (one, 16), (two, 16)]
    (data,) = result["panels"]
    kfac, same = (data["settings"][label]["runs"][0] for label in (one, two))
    assert kfac["step"] == same["step"] == [0, 5, 10, 15, 16]
    for key in ("val_score", "val_accuracy", "val_loss", "test_accuracy"):
        assert kfac[key] == same[key]
    assert kfac["val_score"] == kfac["val_accuracy"], "five classes are compared by accuracy"
    for run in (kfac, same):
        assert run["seconds"] == sorted(run["seconds"])
        assert 0 < run["seconds"][0] == kfac["seconds"][0] < 1, "the first batch's draw"
        assert run["sample_wait_seconds"] <= run["train_seconds"] == run["seconds"][-1]
        assert all(0 <= busy <= whole for busy, whole in zip(run["busy_seconds"], run["seconds"]))
    low, high = data["comparison"]
    assert low["groups"]["kfac"]["steps"] == 0
    assert high["groups"]["kfac"]["seconds"] is None
    assert high["groups"]["kfac"]["seconds_ratio"] is None


def test_what_is_on_the_clock(store: GraphStore) -> None:
    """Steps, waits for batches, and what an optimizer has going on beside them; not what stands between turns."""

    class Slow:
        def __call__(self, *_: object, **__: object) -> None:
            time.sleep(0.02)

    competitor = SimpleNamespace(finish_background=Slow(), step_optimizer=SimpleNamespace(average=None))
    learner = SimpleNamespace(model=None, competitor=competitor, step=Slow(), device=torch.device("cpu"))
    feed = SimpleNamespace(next=Slow(), look_ahead=lambda: None)
    run = Run(Setting("adam", "adam", 0.01), config(), cast(Learner, learner), cast(FullFeed, feed), 10, seconds=5.0)
    run.advance(2)
    assert 5.1 <= run.seconds < 5.4, "two batches, two steps, one end of the turn"
    assert 0.04 <= run.wait_seconds < 0.1
    assert 0.03 <= run.idle_seconds < 0.1, "the steps slept; the waits for batches count as these"
    before = run.seconds
    scores = {"val": Scored(1.0, 0.5, 0.75), "test": Scored(1.0, 0.25, 0.5)}

    def score(_: object) -> dict[str, Scored]:
        time.sleep(0.02)
        return scores

    run.evaluate(score)
    assert run.seconds == before
    run.advance(3)
    assert run.seconds - before < 0.16


def test_nothing_works_in_anothers_time(store: GraphStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Warmed up before any turn; after each the sampler has drawn what it may before the next one, or an evaluation."""
    log: list[str] = []

    def noted(name: str, owner: object, attribute: str) -> None:
        real = getattr(owner, attribute)

        def call(*arguments: Any, **named: Any) -> Any:
            log.append(name)
            return real(*arguments, **named)

        monkeypatch.setattr(owner, attribute, call)

    noted("warm", heat, "_warm_up")
    noted("start", SampledFeed, "start")
    noted("settle", SampledFeed, "settle")
    noted("turn", Run, "advance")
    noted("evaluate", Run, "evaluate")
    fields: dict[str, Any] = {"seeds": (0,), "rates": "adam=0.01", "eval_steps": 8, "targets": (0.1,), "threads": 1}
    run_accuracy_bench(options_for(store, config(), **fields))
    assert log[0] == "warm"
    assert log[1:7] == ["evaluate", "start", "settle"] * 2
    assert log[7:] == ["turn", "settle", "evaluate"] * 4


def test_evaluation_is_off_the_clock() -> None:
    step_optimizer = SimpleNamespace(average=None)
    learner = cast(Learner, SimpleNamespace(model=None, competitor=SimpleNamespace(step_optimizer=step_optimizer)))
    run = Run(Setting("adam", "adam", 0.01), config(), learner, cast(FullFeed, None), 1, seconds=2.0, idle_seconds=0.5)
    scores = {"val": Scored(float("nan"), 0.5, 0.75), "test": Scored(1.0, 0.25, 0.5)}
    run.evaluate(lambda _: scores)
    assert run.seconds == 2.0
    point = {"step": 0, "seconds": 2.0, "busy_seconds": 1.5, "val_score": 0.75, "val_accuracy": 0.5, "val_loss": None}
    assert run.evaluations == [point | {"test_score": 0.5, "test_accuracy": 0.25}]


def test_full_batch_default_targets_and_means_over_seeds(store: GraphStore) -> None:
    result = run_accuracy_bench(
        options_for(
            store,
            config(batch_size="full", fanout=None, epochs=20),
            seeds=(0, 3),
            rates="adam=0.01,0.03",
            threads=1,
        )
    )
    (data,) = result["panels"]
    assert (data["batch_size"], data["steps_per_epoch"]) == (240, 1)
    settings = data["settings"]
    assert list(settings) == ["kfac lr=0.3", "adam lr=0.01", "adam lr=0.03"]
    adam = [of for of in settings.values() if of["group"] == "adam"]
    best = max(of["best"]["mean"] for of in adam)
    assert data["targets"] == pytest.approx([best - 0.005, best])
    for of in settings.values():
        assert [run["seed"] for run in of["runs"]] == [0, 3]
        means = [sum(pair) / 2 for pair in zip(*(run["val_score"] for run in of["runs"]))]
        smooth = [sum(means[i - 2 : i + 3]) / 5 for i in range(2, 19)]
        assert of["mean_curve"]["val_score"][2:-2] == pytest.approx(smooth)
        assert of["best"]["mean"] == pytest.approx(max(of["mean_curve"]["val_score"]))
        assert of["final"]["mean"] == pytest.approx(means[-1])
        assert len(of["mean_curve"]["step"]) == 21
        at = of["mean_curve"]["step"].index(of["best"]["step"])
        assert of["test_at_best"]["mean"] == pytest.approx(sum(run["test_score"][at] for run in of["runs"]) / 2)
    # Some setting of Adam reaches Adam's own best, and is the one it is compared by.
    assert data["comparison"][1]["groups"]["adam"]["seconds"] is not None
    assert data["comparison"][1]["groups"]["adam"]["seconds_ratio"] == 1.0


SEARCHED: dict[str, Any] = {
    "protocol": "quick",
    "seeds": (0, 1),
    "first_epochs": 1,
    "max_epochs": 2,
    "rates": "adam=0.003,0.03;adamw=0.003,0.03",
    "optimizers": ("kfac", "adam", "adamw"),
    "eval_steps": 4,
    "threads": 1,
}


def test_a_search_ends_in_finals_and_a_killed_one_goes_on(
    store: GraphStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the finals, then started again: no training is done twice, and the outcome is that of one go."""
    heats: list[tuple[str, ...]] = []
    is_killed = True

    def heat(track: Any, settings: Any, *rest: Any) -> Any:
        heats.append(tuple(setting.label for setting in settings))
        if is_killed and sum(len(labels) > 1 for labels in heats) == 2:
            raise KeyboardInterrupt
        return run_heat(track, settings, *rest)

    monkeypatch.setattr("dngd.bench.accuracy.run_heat", heat)
    options = options_for(store, config(epochs=2), folder=tmp_path / "out", **SEARCHED)
    with pytest.raises(KeyboardInterrupt):
        run_accuracy_bench(options)
    path, before = tmp_path / "out" / "trainings.jsonl", heats[:-1]
    assert len(path.read_text().splitlines()) == len(before) > 6
    with open(path, "a") as file:
        file.write('{"key": "cut sho')
    heats.clear()
    is_killed = False
    result = run_accuracy_bench(options)
    assert len(heats) == 1
    assert result["trainings_from_file"] == sum(map(len, before))
    (panel,) = result["panels"]
    finals = [before[-1], heats[0]]
    assert finals[0] == finals[1] == tuple(panel["settings"])
    assert finals[0][0] == "kfac lr=0.3"
    groups = {of["group"] for of in panel["settings"].values()}
    assert groups == {"kfac", "adam"}, "Adam and AdamW are one"
    for of in panel["settings"].values():
        assert [run["seed"] for run in of["runs"]] == [0, 1]
    searched = panel["search"]["adam"]["settings"]
    assert {of["label"] for of in searched if of["final"]} == set(finals[0]) - {"kfac lr=0.3"}
    best = max(of["best"]["mean"] for of in panel["settings"].values() if of["group"] == "adam")
    assert panel["targets"] == pytest.approx([best - 0.005, best])
    leading = {panel["comparison"][k]["groups"]["adam"]["seconds_setting"] for k in (0, 1)}
    assert leading
    assert all("learning rate" in panel["settings"][label]["borders"] for label in leading), "of two rates each is one"
    heats.clear()
    again = run_accuracy_bench(options)
    assert heats == []
    assert again["panels"] == result["panels"]
    assert json.loads(json.dumps(again)) == again


def test_a_search_may_be_done_before_the_finals(store: GraphStore, tmp_path: Path) -> None:
    fields = SEARCHED | {"optimizers": ("kfac", "adam"), "rates": "adam=0.01,0.03", "folder": tmp_path, "max_epochs": 1}
    searched = run_accuracy_bench(options_for(store, config(epochs=1), search_only=True, **fields))
    ((panel,), done) = (searched["searches"], len((tmp_path / "trainings.jsonl").read_text().splitlines()))
    assert done == sum(of["seeds"] for of in panel["search"]["adam"]["settings"]) == 4
    whole = run_accuracy_bench(options_for(store, config(epochs=1), **fields))
    assert whole["trainings_from_file"] == done
    assert whole["panels"][0]["search"] == panel["search"]


@pytest.fixture(scope="module")
def searched_before(store: GraphStore, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A result of a search over Adam and AdamW, and its file."""
    path = tmp_path_factory.mktemp("before") / "before.json"
    result = run_accuracy_bench(options_for(store, config(epochs=2), **SEARCHED))
    path.write_text(json.dumps(result))
    return result, path


def test_finals_of_an_earlier_search_are_those_of_its_settings(
    store: GraphStore, searched_before: tuple[dict[str, Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No search: the same settings with all seeds, the same curves but for their seconds, the same borders."""
    before, path = searched_before
    heats: list[tuple[str, ...]] = []

    def heat(track: Any, settings: Any, *rest: Any) -> Any:
        heats.append(tuple(setting.label for setting in settings))
        return run_heat(track, settings, *rest)

    monkeypatch.setattr("dngd.bench.accuracy.run_heat", heat)
    after = run_accuracy_bench(options_for(store, config(epochs=2), finals_of=path, **SEARCHED))
    (old,), (new,) = before["panels"], after["panels"]
    assert heats == [tuple(old["settings"])] * 2
    assert list(new["settings"]) == list(old["settings"])
    for label, own in old["settings"].items():
        mine = new["settings"][label]
        assert mine["overrides"] == own["overrides"]
        assert mine["best"] == own["best"], "curves are bitwise those of before"
        assert mine["final"] == own["final"]
        if "borders" in own and "borders" in mine:
            assert mine["borders"] == own["borders"]
        if "borders" in mine:
            assert "learning rate" in mine["borders"], (
                "also of those that did not lead before: of two rates each is one"
            )
    assert new["search"] == old["search"]
    assert "searched before: before.json" in new["remarks"][0]
    assert after["config"]["finals_of"] == "before.json"


def test_finals_of_a_search_of_other_optimizers(store: GraphStore, tmp_path: Path) -> None:
    """Those whose rates no protocol names have their own grid."""
    fields = SEARCHED | {"optimizers": ("kfac", "adam", "muon"), "rates": "adam=0.01", "max_epochs": 1, "seeds": (0,)}
    before = run_accuracy_bench(options_for(store, config(epochs=1), **fields))
    path = tmp_path / "before.json"
    path.write_text(json.dumps(before))
    after = run_accuracy_bench(options_for(store, config(epochs=1), finals_of=path, **fields))
    assert list(after["panels"][0]["settings"]) == list(before["panels"][0]["settings"])
    assert {of["group"] for of in after["panels"][0]["settings"].values()} == {"kfac", "adam", "muon"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"optimizers": ("kfac", "adam"), "rates": "adam=0.003,0.03"},
            r"searched adam, adamw, the command adam; give --optimizers",
        ),
        ({"seeds": (0, 1, 2)}, r"seeds=\[0, 1\], the command says \[0, 1, 2\]"),
        ({"max_epochs": 8}, "grid="),
        ({"protocol": "given"}, "leave --search-only and --protocol given out"),
        ({"models": [("sage", 2)]}, "has no .* sage 2 layers, but .* gcn 2 layers"),
        ({"config": {"hidden": 4}}, "hidden=8, the command says 4"),
        ({"config": {"fanout": (3, 3)}}, r"fanout=\[4, 4\], here it is \[3, 3\]"),
        ({"digest": "0"}, "digest=0, here it is"),
        ({"grid": None}, "without a search"),
        ({"text": "{}"}, "no result of K-FAC and Adam"),
    ],
)
def test_a_search_of_something_else_is_refused(
    store: GraphStore,
    searched_before: tuple[dict[str, Any], Path],
    tmp_path: Path,
    changes: dict[str, Any],
    message: str,
) -> None:
    result = json.loads(json.dumps(searched_before[0]))
    if "digest" in changes:
        result["panels"][0]["graph"]["digest"] = changes["digest"]
    if "grid" in changes:
        result["config"]["grid"] = None
    path = tmp_path / "file.json"
    path.write_text(changes.get("text", json.dumps(result)))
    fields = SEARCHED | {k: v for k, v in changes.items() if k not in ("config", "digest", "grid", "text")}
    with pytest.raises(UserError, match=message):
        run_accuracy_bench(
            options_for(store, config(**({"epochs": 2} | changes.get("config", {}))), finals_of=path, **fields)
        )


def test_other_settings_are_not_taken_from_the_folder(store: GraphStore, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"optimizers": ("adam",), "rates": "adam=0.01", "seeds": (0,), "threads": 1}
    fields |= {"folder": tmp_path, "eval_steps": 4}
    run_accuracy_bench(options_for(store, config(epochs=1), **fields))
    for changed, found in (({}, 1), ({"dropout": 0.25}, 0), ({"weight_decay": 0.1}, 0), ({"epochs": 2}, 0)):
        result = run_accuracy_bench(options_for(store, config(**({"epochs": 1} | changed)), **fields))
        assert result["trainings_from_file"] == found, changed


def test_the_scale_is_products_shapeds_alone(store: GraphStore, tmp_path: Path) -> None:
    """Among several data sets: the others keep their size."""
    base = config(epochs=1, max_steps=2, cache_dir=tmp_path)
    datasets = [(str(store.path), "masks"), ("products-shaped", "masks")]
    fields: dict[str, Any] = {"scale": 0.001, "optimizers": ("adam",), "seeds": (0,), "rates": "adam=0.01"}
    result = run_accuracy_bench(replace(options_for(store, base, **fields), datasets=datasets))
    found = [(panel["graph"]["num_nodes"], panel["scale"], panel["fanout"]) for panel in result["panels"]]
    assert found == [(store.num_nodes, 1.0, [4, 4]), (2449, 0.001, [4, 4])]
    assert {"lr_half_steps", "average_share", "momentum"} <= result["config"].keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizers": ("kfac",)}, "give --targets, or add adam"),
        ({"eval_steps": 0}, "eval_steps=0 is out of range"),
        ({"eval_steps": 1000}, "a run has 16 steps"),
        ({"eval_steps": 0, "protocol": "quick", "optimizers": ("adam",)}, "eval_steps=0 is out of range"),
        ({"rates": "adam=big"}, "no learning rate"),
        ({"datasets": ()}, "no data set"),
        ({"datasets": (("no-such-graph", "masks"),)}, "no-such-graph"),
        ({"threads": 0}, "threads=0"),
        ({"metric": "f1"}, "'f1' is unknown"),
        ({"metric": "roc_auc"}, "has 5"),
        ({"protocol": "quick", "rates": "kfac=0.1,0.2"}, "kfac has several learning rates"),
        ({"protocol": "thorough"}, "'thorough' is unknown"),
        ({"protocol": "quick", "search_only": True}, "give --out FOLDER"),
        ({"scale": 0.05}, "not among --datasets"),
    ],
)
def test_bad_options_are_told_before_training(store: GraphStore, options: dict[str, Any], message: str) -> None:
    fields: dict[str, Any] = {"datasets": [(str(store.path), "masks")], "models": [("gcn", 2)], "protocol": "given"}
    fields |= {"optimizers": ("kfac", "adam")}
    with pytest.raises(UserError, match=message):
        run_accuracy_bench(AccuracyOptions(config(), **(fields | options)))
