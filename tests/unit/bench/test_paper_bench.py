"""dngd bench paper on a tiny graph: the training is the trainer's, validation alone chooses, a cut run goes on."""

from __future__ import annotations

import json
import multiprocessing
import time
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import dngd
from dngd import cli
from dngd.bench import PaperOptions, paper, paper_training, paper_work, run_paper_bench
from dngd.bench.paper_cache import Finished, training_key
from dngd.bench.paper_graph import PaperGraph
from dngd.bench.paper_recipes import ADAM, PAPER, ROWS, SGD, Recipe, Row
from dngd.bench.paper_sparse import ConstantMatrix
from dngd.bench.paper_training import Outcome, train
from dngd.bench.progress import BenchProgress
from dngd.comm import LocalCommunicator
from dngd.errors import TrainingError, UserError
from dngd.graph import GraphStore
from dngd.optim import KFACPreconditioner
from dngd.train import TrainingLoop, prepare_run_folder
from dngd.train.full_batch import outside
from dngd.train.progress import SilentReporter

SEMI = {"semi": 0.7, "gamma": 2.0}


@pytest.fixture
def graph(store: GraphStore) -> PaperGraph:
    return PaperGraph.make(store, store.split("masks"), "raw")


@pytest.mark.parametrize("recipe", [ADAM, replace(ADAM, **SEMI), replace(SGD, **SEMI, temperature=0.5)])
def test_a_training_is_that_of_dngd_train(store: GraphStore, graph: PaperGraph, tmp_path: Path, recipe: Recipe) -> None:
    """The same weights, steps and evaluations as of `--batch-size full`; without dropout, whose draws differ."""
    recipe = replace(recipe, dropout=0.0, epochs=8, weight_decay=1e-3)
    config = dngd.TrainConfig(
        dataset=str(store.path),
        engine="local",
        num_layers=2,
        hidden=16,
        dropout=0.0,
        batch_size="full",
        epochs=8,
        optimizer=recipe.optimizer,
        lr=recipe.lr,
        lr_schedule="constant",
        weight_decay=1e-3,
        semi="two_means" if recipe.semi else "none",
        semi_weight=recipe.semi or 1.0,
        semi_gamma=recipe.gamma,
        semi_labels="soft" if recipe.temperature else "argmax",
        run_dir=tmp_path / "run",
    )
    history = TrainingLoop(prepare_run_folder(config), LocalCommunicator(), SilentReporter()).run().history
    lowest = min(history, key=lambda record: record.val_loss)
    outcome = train(graph, recipe, 0)
    assert outcome.val_loss == pytest.approx(lowest.val_loss, rel=1e-3)
    assert outcome.epoch == lowest.epoch
    assert outcome.val_accuracy == pytest.approx(lowest.val_accuracy, abs=0.02)
    assert outcome.test_accuracy == pytest.approx(lowest.test_accuracy, abs=0.02)


@pytest.mark.parametrize(
    ("optimizer", "factors", "semi"),
    [("adam", "paper", 1.0), ("sgd", "paper", 0.0), ("adam", "dngd", 0.0), ("sgd", "dngd", 1.0)],
)
def test_every_combination_learns(graph: PaperGraph, optimizer: Any, factors: Any, semi: float) -> None:
    lr = 0.5 if (optimizer, factors) == ("sgd", "dngd") else 0.03
    recipe = Recipe(optimizer, lr, factors=factors, epochs=25, semi=semi, damping=0.03, num_layers=3, hidden=8)
    before = torch.random.get_rng_state()
    outcome = train(graph, recipe, 0)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert 0.35 < outcome.val_accuracy <= 1  # five classes
    assert train(graph, recipe, 0) == replace(
        outcome,
        seconds=pytest.approx(outcome.seconds, rel=1e3),
        step_seconds=pytest.approx(outcome.step_seconds, rel=1e3),
    )
    assert 0 < outcome.step_seconds < outcome.seconds
    assert train(graph, recipe, 1).val_loss != outcome.val_loss


def test_a_training_that_diverges_has_no_finite_loss(graph: PaperGraph) -> None:
    outcome = train(graph, replace(SGD, lr=1e30, epochs=5), 0)
    assert outcome.val_loss > 100 or outcome.epoch == 0


def test_rows_that_sum_to_one(store: GraphStore, tmp_path: Path) -> None:
    """Â of features that sum to 1: each row sums to Â's row sum."""
    positive = GraphStore.write(
        tmp_path / "positive",
        name="positive",
        indptr=store.indptr,
        indices=store.indices,
        features=store.features.abs() + 0.1,
        labels=store.labels,
        num_classes=store.num_classes,
    )
    row, raw = (PaperGraph.make(positive, store.split("masks"), features) for features in ("row", "raw"))  # type: ignore[arg-type]
    sums = row.operator.times(torch.ones_like(row.first))[:, 0]
    assert torch.allclose(row.first.sum(dim=1), sums, atol=1e-5)
    assert bool((raw.first.sum(dim=1) > sums).all())
    assert torch.equal(row.labels[row.val], store.labels[store.split("masks").val])


def test_rows_of_norm_one(store: GraphStore) -> None:
    split = store.split("masks")
    graph = PaperGraph.make(store, split, "l2")
    order = torch.cat([split.train.sort().values, outside(split.train, store.num_nodes)])
    wanted = graph.operator.times(torch.nn.functional.normalize(store.features[order], dim=1))
    assert torch.allclose(graph.first, wanted, atol=1e-5)


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_a_constant_matrix_is_its_dense_product(share: float) -> None:
    """Compressed or not: values, gradients, and what K-FAC sees of a layer whose input it is."""
    torch.manual_seed(0)
    matrix = torch.randn(40, 12) * (torch.rand(40, 12) < share)
    x = torch.randn(12, 3, requires_grad=True)
    weights = torch.randn(40, 3)
    (wanted,) = torch.autograd.grad(((matrix @ x) * weights).sum(), x)
    swap = torch.eye(40)[torch.arange(39, -1, -1)]
    product = ConstantMatrix(swap, swap @ matrix)
    assert torch.allclose(product.times(x), matrix @ x, atol=1e-5)
    (found,) = torch.autograd.grad((product.times(x) * weights).sum(), x)
    assert torch.allclose(found, wanted, atol=1e-5)
    gradients = []
    for enters in (False, True):
        torch.manual_seed(1)
        linear = torch.nn.Linear(12, 3)
        if enters:
            product.enter(linear)
        preconditioner = KFACPreconditioner(linear, damping=300.0, damping_mode="mean", unit_scale=True)
        torch.nn.functional.cross_entropy(linear(matrix), torch.arange(40) % 3).backward()
        preconditioner.step(num_samples=40)
        assert linear.weight.grad is not None
        assert linear.bias.grad is not None
        gradients.append(torch.cat([linear.weight.grad, linear.bias.grad[:, None]], dim=1))
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-6)
    plain = torch.nn.Linear(12, 3)
    assert not torch.allclose(gradients[0], plain.weight.new_zeros(3, 13))


def test_weight_decay_of_the_first_layer_alone(graph: PaperGraph) -> None:
    recipe = replace(ADAM, weight_decay=0.5, epochs=5)
    outcomes = [train(graph, replace(recipe, decay=decay), 0).val_loss for decay in ("all", "first")]  # type: ignore[arg-type]
    assert outcomes[0] != outcomes[1]
    model = graph.model(recipe)
    shares = {
        decay: [
            group["weight_decay"]
            for group in paper_training.optimizer_of(replace(recipe, decay=decay), model).param_groups
        ]
        for decay in ("all", "first")
    }
    assert shares == {"all": [0.5, 0.5], "first": [0.5, 0.0]}


def test_the_mean_of_the_weights_is_evaluated(graph: PaperGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the steps' weights w_0, w_1, w_2: m ← r·m + (1 - r)·w with r = min(average, t/(t + 9)), t = 1, 2."""
    recipe = replace(SGD, lr=0.5, dropout=0.0, epochs=2)
    seen: dict[float, list[torch.Tensor]] = {}
    logits_of = PaperGraph.logits
    for average in (0.0, 0.12):
        seen[average] = []

        def logits(self: PaperGraph, model: Any, first: torch.Tensor, average: float = average) -> torch.Tensor:
            if not model.training:
                seen[average].append(model.graph_layers()[0].linear.weight.detach().clone())
            return logits_of(self, model, first)

        monkeypatch.setattr(PaperGraph, "logits", logits)
        train(graph, replace(recipe, average=average), 0)
    start, first, second = seen[0.0]
    mean = 0.1 * start + 0.9 * first
    assert torch.allclose(seen[0.12][1], mean, atol=1e-6)
    assert torch.allclose(seen[0.12][2], 0.12 * mean + 0.88 * second, atol=1e-6)
    assert not torch.allclose(second, mean, atol=1e-4)


def test_the_highest_accuracy_is_that_of_its_epoch(graph: PaperGraph) -> None:
    outcome = train(graph, replace(ADAM, epochs=30), 0)
    assert outcome.highest_val_accuracy >= outcome.val_accuracy
    assert 0.2 < outcome.test_accuracy_there <= 1


def scripted(row_test_accuracy: float) -> Any:
    """Recipes by learning rate: validation and test disagree on which is best."""
    known = {0.005: (0.6, 0.9), 0.01: (0.8, row_test_accuracy), 0.03: (0.7, 0.99)}

    def train_at(place: Any, recipe: Recipe, seed: int) -> Outcome:
        val, test = known[recipe.lr]
        return Outcome(1.0, val + seed / 100, test + seed / 100, 3, 1.0, val, test)

    return train_at


GRID = Row("rates", "table", lambda dataset, split, base: [replace(ADAM, lr=lr) for lr in (0.005, 0.01, 0.03)])
AGAIN = Row("again", "table", lambda dataset, split, base: [base] if base else [], "rates")


def options(tmp_path: Path | None = None, **changes: Any) -> PaperOptions:
    fields: dict[str, Any] = {
        "datasets": ["cora"],
        "splits": ["public"],
        "parts": ["table"],
        "num_seeds": 3,
        "grid_seeds": 2,
    }
    return PaperOptions(**(fields | {"folder": tmp_path} | changes))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, store: GraphStore) -> None:
    """The bench on two rows and a small graph."""
    monkeypatch.setattr(paper, "ROWS", (GRID, AGAIN))
    monkeypatch.setattr(paper_work, "open_graph", lambda *_: store)
    paper_work.graph_of.cache_clear()
    paper_work.graph_digest.cache_clear()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("test_accuracy", [0.5, 0.85])
def test_validation_chooses(monkeypatch: pytest.MonkeyPatch, test_accuracy: float) -> None:
    """Whatever the test accuracies are; the best of them is another recipe's."""
    monkeypatch.setattr(paper_work, "train_at", scripted(test_accuracy))
    (cell,) = run_paper_bench(options())["cells"]
    for row in cell["rows"]:
        assert row["recipe"]["lr"] == 0.01
        assert row["test_accuracy"]["mean"] == pytest.approx(100 * test_accuracy + 1)
        assert row["test_accuracy"]["std"] == pytest.approx(1)
        assert row["passes_the_paper"] == (test_accuracy == 0.85)
        assert [run["seed"] for run in row["runs"]] == [0, 1, 2]
    assert [g["val_accuracy"] for g in cell["rows"][0]["grid"]] == pytest.approx([60.5, 80.5, 70.5])
    assert cell["paper"]["mean"] == PAPER["cora", "public"][0]


@pytest.mark.usefixtures("small")
def test_a_cut_run_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    done: list[tuple[float, int]] = []
    script = scripted(0.9)

    def cut_after_four(place: Any, recipe: Recipe, seed: int) -> Outcome:
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append((recipe.lr, seed))
        return script(place, recipe, seed)  # type: ignore[no-any-return]

    monkeypatch.setattr(paper_work, "train_at", cut_after_four)
    with pytest.raises(KeyboardInterrupt):
        run_paper_bench(options(tmp_path))
    file = tmp_path / "trainings.jsonl"
    with file.open("a") as half:
        half.write('{"key": "ab", "outc')
    first = list(done)

    def counting(place: Any, recipe: Recipe, seed: int) -> Outcome:
        done.append((recipe.lr, seed))
        return script(place, recipe, seed)  # type: ignore[no-any-return]

    monkeypatch.setattr(paper_work, "train_at", counting)
    result = run_paper_bench(options(tmp_path))
    assert len(done) == len(set(done)) == 3 * 2 + 1
    assert done[:4] == first
    monkeypatch.setattr(paper_work, "train_at", None)
    assert run_paper_bench(options(tmp_path))["cells"] == result["cells"]


def test_a_key_changes_with_all_that_matters() -> None:
    keys = {
        training_key("d", "public", ADAM, 0),
        training_key("e", "public", ADAM, 0),
        training_key("d", "complete", ADAM, 0),
        training_key("d", "public", replace(ADAM, lr=0.02), 0),
        training_key("d", "public", ADAM, 1),
    }
    assert len(keys) == 5
    assert training_key("d", "public", replace(SGD, lr=4), 0) == training_key("d", "public", replace(SGD, lr=4.0), 0)


def test_rows_have_names_of_their_own_and_bases_before_them() -> None:
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)
    for i, row in enumerate(ROWS):
        assert row.base is None or row.base in names[:i]
        for dataset, split in PAPER:
            grid = row.grid(dataset, split, ADAM if row.base else None)
            assert len(set(grid)) == len(grid) > 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"datasets": ["core"]}, "--datasets 'core' is not valid; use some of: cora"),
        ({"splits": []}, "--splits"),
        ({"parts": ["tabel"]}, "use some of: tuned, alike, wide, table, seconds"),
        ({"num_seeds": 1, "grid_seeds": 1}, "--num-seeds 1 is too small; give at least 2"),
        ({"grid_seeds": 4}, "--grid-seeds 4 is above --num-seeds 3"),
        ({"processes": 0}, "--processes 0"),
    ],
)
def test_refused_options(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        options(**changes)
    assert said in str(error.value)


def test_a_file_as_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be used as a folder"):
        Finished(tmp_path / "file")


@pytest.mark.usefixtures("small")
def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(paper, "TIMED", {"Adam": ADAM, "Adam + K-FAC": replace(ADAM, factors="dngd")})
    command = [
        "bench",
        "paper",
        "--quick",
        "--datasets",
        "cora",
        "--splits",
        "public",
        "--num-seeds",
        "2",
        "--grid-seeds",
        "1",
    ]
    command += ["--rounds", "1", "--processes", "1", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, "--json"])
    assert ended.value.code == 0
    result = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == result
    assert result["seconds"]["epochs"] == 5
    timed = result["seconds"]["datasets"]["cora"]["Adam + K-FAC"]
    assert timed["over_plain"] > 0
    assert timed["steps_over_plain"] > 0
    assert all(steps < whole for steps, whole in zip(timed["step_seconds"], timed["seconds"]))
    with pytest.raises(SystemExit):
        cli.main(command)
    shown = capsys.readouterr().out
    assert "the paper's best" in shown
    assert "82.84 ± 0.87" in shown
    assert "mean nothing" in shown


class StuckPool:
    """Trainings of which none ends, or of which one is killed."""

    def __init__(self, error: BaseException | None) -> None:
        self._error = error

    def submit(self, *_: Any) -> Future[Outcome]:
        future: Future[Outcome] = Future()
        if self._error is not None:
            future.set_exception(self._error)
        return future


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (None, "none of the trainings of {} masks at work ended within 0.1 s; use fewer --processes"),
        (BrokenProcessPool(), "a process that trains {} masks was killed (out of memory, perhaps)"),
    ],
)
def test_a_pool_that_does_not_come_back_is_told(store: GraphStore, error: BaseException | None, said: str) -> None:
    place = paper_work.Place(str(store.path), "masks", None, None)
    pool: Any = StuckPool(error)
    workforce = paper_work.Workforce(Finished(None), pool, BenchProgress(), limit_seconds=0.1)
    with pytest.raises(TrainingError) as raised:
        workforce.outcomes(place, ADAM, [0, 1])
    assert said.format(store.path) in str(raised.value)


def _fail_while_one_trains() -> None:
    with paper_work.worker_pool(2) as pool:
        assert pool is not None
        stuck = pool.submit(time.sleep, 300)
        while not stuck.running():
            time.sleep(0.01)
        raise TrainingError("another failed")


def test_an_error_does_not_wait_for_trainings_at_work() -> None:
    began = time.monotonic()
    with pytest.raises(TrainingError, match="another failed"):
        _fail_while_one_trains()
    assert time.monotonic() - began < 100
    assert not [child for child in multiprocessing.active_children() if child.name.startswith("SpawnProcess")]
