"""Runs on a table of few entries: the curve of the dense table, in full batch, on links, over shards and resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import dngd
from dngd.comm import LocalCommunicator
from dngd.graph import GraphStore
from dngd.models import SparseRows
from dngd.sampling import sparse_features
from dngd.train import TrainingLoop, make_plan, prepare_run_folder
from dngd.train.placement import sparse_shares
from dngd.train.progress import SilentReporter
from dngd.train.run_folder import RunFolder, run_config
from tests.helpers.exact_evaluation import CLASSES, dense_forward, evaluator, made_model
from tests.unit.models.test_sparse_rows import few_entries

N, WIDTH = 300, 320


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> GraphStore:
    return words_store(tmp_path_factory.mktemp("words") / request.param, request.param)


def words_store(path: Path, dtype: Any = "float32", width: int = WIDTH) -> GraphStore:
    """Labels that words and neighbours tell; weighted edges; nodes without in-edges."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (N,), generator=generator)
    features = few_entries(N, width, seed=1, share=0.01).abs()
    features[torch.arange(N), labels * 7 + torch.randint(7, (N,), generator=generator)] = 1.0
    edge_index = torch.randint(N - 20, (2, 1500), generator=generator)
    order = torch.randperm(N, generator=generator)
    masks = {name: torch.zeros(N, dtype=torch.bool) for name in ("train", "val", "test")}
    for name, nodes in zip(masks, order.split([160, 70, 70])):
        masks[name][nodes] = True
    return GraphStore.write(
        path,
        name="words",
        edge_index=edge_index,
        edge_weight=torch.rand(edge_index.shape[1], generator=generator) + 0.1,
        features=features,
        feature_dtype=dtype,
        labels=labels,
        num_classes=CLASSES,
        masks=masks,
        duplicates="sum",
    )


def config(store: GraphStore, **changes: Any) -> dngd.TrainConfig:
    fields: dict[str, Any] = {
        "dataset": str(store.path),
        "engine": "local",
        "num_layers": 2,
        "fanout": (4, 4),
        "hidden": 16,
        "batch_size": 50,
        "epochs": 3,
        "num_samplers": 0,
    }
    return dngd.TrainConfig(**(fields | changes))


def run(config: dngd.TrainConfig, run_dir: Path, **more: Any) -> TrainingLoop:
    folder = prepare_run_folder(config.model_copy(update={"run_dir": run_dir}))
    made = TrainingLoop(folder, LocalCommunicator(), SilentReporter(), **more)
    made.run()
    return made


def curve(made: TrainingLoop) -> list[float]:
    return [value for r in made.history for value in (r.train_loss, r.val_loss, r.val_accuracy)]


def assert_alike(found: TrainingLoop, expected: TrainingLoop, store: GraphStore) -> None:
    """Of 16-bit features the dense sums are rounded to 16 bits, of entries they are not."""
    if store.features.dtype == torch.float32:
        assert curve(found) == pytest.approx(curve(expected), rel=2e-3)
    else:
        losses = [[r.train_loss for r in made.history] for made in (found, expected)]
        assert losses[0] == pytest.approx(losses[1], rel=0.03)


CASES: dict[str, dict[str, Any]] = {
    "gcn": {},
    "sage, three layers": {"model": "sage", "num_layers": 3, "fanout": (4, 4, 4)},
    "adam": {"optimizer": "adam"},
    "a sampler process": {"num_samplers": 1},
    "three shards": {"num_workers": 3, "batch_size": 20},
    "full batch": {"batch_size": "full", "fanout": (-1, -1), "epochs": 5},
    "full batch of shards, semi-supervised": {
        "batch_size": "full",
        "fanout": (-1, -1),
        "num_workers": 2,
        "model": "sage",
        "semi": "two_means",
    },
    "semi-supervised": {"semi": "pooled"},
    "links": {"task": "link", "epochs": 2},
    "every row measured": {"kfac": {"max_rows": None}},
    "averaged": {"average_share": 0.5},
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_the_curve_is_that_of_the_dense_table(store: GraphStore, tmp_path: Path, changes: dict[str, Any]) -> None:
    made = [run(config(store, sparse_features=sparse, **changes), tmp_path / str(sparse)) for sparse in (False, True)]
    assert made[0].placed.sparse is None
    kept = made[1].placed.sparse
    assert isinstance(kept, SparseRows)
    assert torch.equal(kept.dense(), store.features.float())
    assert_alike(made[1], made[0], store)
    assert curve(made[1])[0] != curve(made[1])[-3]


def test_a_resumed_run_has_its_bitwise_curve(store: GraphStore, tmp_path: Path) -> None:
    for changes in ({}, {"batch_size": "full", "fanout": (-1, -1), "epochs": 6}):
        whole = run(config(store, **changes), tmp_path / f"whole-{len(changes)}")
        part = config(store, **changes).model_copy(update={"run_dir": tmp_path / f"part-{len(changes)}"})
        folder = prepare_run_folder(part.model_copy(update={"max_steps": 3}))
        TrainingLoop(folder, LocalCommunicator(), SilentReporter()).run()
        again = TrainingLoop(
            prepare_run_folder(part.model_copy(update={"resume": True})), LocalCommunicator(), SilentReporter()
        )
        again.run()
        assert curve(again)[-3:] == curve(whole)[-3:]
        for own, other in zip(again.model.parameters(), whole.model.parameters()):
            assert torch.equal(own, other)


def test_evaluation_predictions_and_result_of_a_run(
    store: GraphStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dngd import cli

    run_dir = tmp_path / "run"
    trainer = dngd.Trainer(config(store, run_dir=run_dir))
    result = trainer.fit()
    capsys.readouterr()
    assert trainer.evaluate()["test"]["accuracy"] == pytest.approx(result.test_accuracy)
    with pytest.raises(SystemExit) as ended:
        cli.main(["evaluate", str(run_dir), "--json"])
    assert ended.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert found["test"]["accuracy"] == pytest.approx(result.test_accuracy)
    written = json.loads((run_dir / "result.json").read_text())
    assert written["resolved"]["sparse_features"] is True


def test_a_run_from_before_goes_on_with_the_dense_table(store: GraphStore, tmp_path: Path) -> None:
    """Its curve would else be another by its rounding."""
    folder = tmp_path / "run"
    run(config(store, sparse_features=False, max_steps=3), folder)
    path = folder / "config.yaml"
    fields = yaml.safe_load(path.read_text())
    assert fields.pop("sparse_features") is False
    path.write_text(yaml.safe_dump(fields, sort_keys=False))
    assert run_config(RunFolder(folder)).sparse_features is False
    again = run(config(store, resume=True), folder)
    assert again.placed.sparse is None
    assert run_config(RunFolder(folder)).sparse_features is False
    assert run(config(store, resume=True, sparse_features=True, epochs=4), folder).placed.sparse is not None


@pytest.mark.parametrize("kind", ["gcn", "sage"])
@pytest.mark.parametrize("nodes", [None, torch.arange(1, N, 3)])
def test_exact_logits_are_those_of_the_dense_forward_pass(store: GraphStore, kind: str, nodes: Tensor | None) -> None:
    model = made_model(kind, WIDTH, 8)
    expected = dense_forward(store, model)
    own = evaluator(store, model, sparse=sparse_features.sparse_table(store.features), rows=64)
    for _ in range(2):
        parts = list(own.predictions(model, nodes))
        ids, logits = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
        assert ids.tolist() == (list(range(N)) if nodes is None else nodes.tolist())
        assert torch.allclose(logits.double(), expected[ids], rtol=1e-4, atol=1e-5)
    own.check(model, nodes)


def test_where_the_dense_table_is_worked_on(store: GraphStore) -> None:
    own = config(store)
    assert sparse_shares(own, store, None) is not None
    for changes in ({"sparse_features": False}, {"feature_placement": "disk"}):
        assert sparse_shares(config(store, **changes), store, None) is None
    assert sparse_shares(own.model_copy(update={"use_gpu": True}), store, None) is None
    assert sparse_shares(own, store, torch.nn.Linear(1, 1)) is None


def test_a_full_batch_whose_sums_are_full_stays_dense(
    store: GraphStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dngd.train import full_batch

    changes = {"batch_size": "full", "fanout": (-1, -1)}
    sparse = run(config(store, **changes), tmp_path / "sparse")
    batch = sparse.sources._full_batches([0]).batch(0, 0, 0)
    assert isinstance(batch.first_aggregation, SparseRows)
    monkeypatch.setattr(full_batch, "MOST_OF_ROWS", 0.0)
    dense = run(config(store, **changes), tmp_path / "dense")
    batch = dense.sources._full_batches([0]).batch(0, 0, 0)
    assert isinstance(batch.first_aggregation, Tensor)
    assert_alike(dense, sparse, store)


def test_the_plan_counts_entries(store: GraphStore) -> None:
    own, dense = (config(store, sparse_features=sparse, num_samplers=1) for sparse in (True, False))
    plans = [make_plan(c, store, store.split("masks")) for c in (own, dense)]
    assert plans[0].activation_bytes < plans[1].activation_bytes
    assert plans[0].evaluation_table_bytes < plans[1].evaluation_table_bytes
    assert plans[0].sampler_bytes < plans[1].sampler_bytes
    entries = sparse_features.sparse_table(store.features)
    assert plans[1].sparse_bytes == 0
    # Of the trainer, and a copy for its sampler; the share is told by the sources of edges.
    assert plans[0].sparse_bytes == pytest.approx(2 * 8 * entries.values.numel(), rel=0.15)


def test_a_few_nodes_are_predicted_without_reading_the_table(
    store: GraphStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dngd.train import placement

    trainer = dngd.Trainer(config(store, run_dir=tmp_path / "run", epochs=1))
    trainer.fit()
    many = trainer.predict()
    read = []
    plain = placement.sparse_table
    monkeypatch.setattr(placement, "sparse_table", lambda table: read.append(1) or plain(table))
    few = trainer.predict(nodes=torch.tensor([3, 200, 7]))
    assert not read
    assert torch.allclose(few.float(), many[torch.tensor([3, 200, 7])].float(), atol=1e-5)
    trainer.predict()
    assert read


def test_what_is_told(store: GraphStore, tmp_path: Path) -> None:
    class Listener(SilentReporter):
        def __init__(self) -> None:
            self.said: list[str] = []

        def message(self, text: str) -> None:
            self.said.append(text)

    for sparse in (True, False):
        listener = Listener()
        folder = prepare_run_folder(
            config(store, sparse_features=sparse, epochs=1).model_copy(update={"run_dir": tmp_path / str(sparse)})
        )
        TrainingLoop(folder, LocalCommunicator(), listener).run()
        told = [text for text in listener.said if "of the table is not zero" in text]
        assert len(told) == sparse
