"""Runs with several labels a node, class weights, other metrics, early stopping."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from safetensors import safe_open

import dngd
from dngd import cli
from dngd.errors import UserError
from dngd.graph import GraphStore, TableColumns, import_tables
from dngd.graph.manifest import Provenance
from dngd.train.evaluate_run import evaluate_run
from dngd.train.export import export_run
from dngd.train.predict import predict_run
from dngd.train.scoring import average_precision
from dngd.train.trained_model import load_trained
from tests.end_to_end.test_local_runs import config, fit

pytestmark = pytest.mark.usefixtures("one_thread")

BITS = torch.tensor([[0, 0, 1], [0, 1, 0], [1, 1, 0], [1, 0, 1], [1, 1, 1]])


@pytest.fixture(scope="module")
def several(store: GraphStore, tmp_path_factory: pytest.TempPathFactory) -> GraphStore:
    """The graph of the tests, with three labels a node that its classes decide."""
    path = tmp_path_factory.mktemp("several") / "graph"
    return GraphStore.write(
        path,
        indptr=store.indptr,
        indices=store.indices,
        features=store.features,
        labels=BITS[store.labels],
        masks=store.split_masks,
    )


@pytest.mark.parametrize("optimizer", ["kfac", "adam"])
def test_several_labels_are_learnt(several: GraphStore, tmp_path: Path, optimizer: str) -> None:
    run = tmp_path / "run"
    result = fit(config(several, run, optimizer=optimizer, metric="average_precision", epochs=5))
    split = several.split("masks")
    shares = several.labels[split.val].float().mean(dim=0)
    assert result.best_val_accuracy > float(shares.mean()) + 0.15, "an order at random scores the share of positives"
    assert result.metric == "average_precision"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {line["metric"] for line in lines} == {"average_precision"}
    scores = evaluate_run(run)
    assert scores["test"]["average_precision"] == pytest.approx(result.test_accuracy, abs=1e-6)

    written = predict_run(run, tmp_path / "out.parquet", nodes="test", probabilities=True)
    assert written.columns == ("node_id", "classes", "probabilities")
    rows = pq.read_table(tmp_path / "out.parquet").to_pydict()
    given = torch.tensor(rows["probabilities"])
    actual = several.labels[rows["node_id"]]
    found = sum(average_precision(given[:, c], actual[:, c] > 0) for c in range(3)) / 3
    assert found == pytest.approx(result.test_accuracy, abs=1e-6)
    assert rows["classes"] == [[c for c in range(3) if p[c] > 0.5] for p in rows["probabilities"]]


def test_shards_of_several_labels_give_one_curve(several: GraphStore, tmp_path: Path) -> None:
    """The step's loss and Fisher do not depend on who computes which shard."""
    fields: dict[str, Any] = {"metric": "roc_auc", "epochs": 2, "batch_size": 20, "num_shards": 2}
    one = fit(config(several, tmp_path / "a", num_workers=1, **fields))
    two = fit(config(several, tmp_path / "b", num_workers=2, **fields))
    assert [r.train_loss for r in one.history] == [r.train_loss for r in two.history]


def test_class_weights_favour_their_class(store: GraphStore, tmp_path: Path) -> None:
    split = store.split("masks")

    def share_of_class_0(run: Path, **changes: Any) -> float:
        fit(config(store, run, epochs=3, dropout=0.0, **changes))
        predict_run(run, run / "out.parquet", nodes="test")
        return float((torch.tensor(pq.read_table(run / "out.parquet")["class"].to_pylist()) == 0).float().mean())

    plain = share_of_class_0(tmp_path / "plain")
    heavy = share_of_class_0(tmp_path / "heavy", class_weights=(50.0, 1.0, 1.0, 1.0, 1.0))
    assert heavy > plain + 0.1
    assert split.test.numel() > 0


def test_patience_ends_a_run_that_resumes_to_the_same_end(store: GraphStore, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fields = config(store, run, epochs=40, optimizer="adam", lr=0.05, patience=3, metric="macro_f1")
    result = fit(fields)
    values = [record.val_accuracy for record in result.history]
    best = values.index(max(values))
    assert len(values) == best + 4 < 40
    assert result.best_val_accuracy == values[best]
    again = fit(dngd.TrainConfig(**(fields.model_dump() | {"resume": True})))
    assert (again.steps, again.best_val_accuracy) == (result.steps, result.best_val_accuracy)
    longer = fit(dngd.TrainConfig(**(fields.model_dump() | {"resume": True, "patience": 5})))
    assert longer.steps > result.steps


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_weights": "balanced"}, "class_weights=balanced is about one label a node"),
        ({"semi": "pooled", "batch_size": "full", "fanout": None}, "semi=pooled is about one label a node"),
    ],
)
def test_what_several_labels_do_not_allow(
    several: GraphStore, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        fit(config(several, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_bad_weights(store: GraphStore, tmp_path: Path) -> None:
    for changes, message in (
        ({"class_weights": (1.0, 2.0)}, "has 2 entries but small has 5 classes"),
        ({"class_weights": (1.0, -2.0)}, "no number above 0"),
        ({"class_weights": "2,x"}, "neither balanced nor a list"),
        ({"class_weights": "balanced", "kfac": {"fisher": "empirical"}}, "empirical Fisher cannot"),
    ):
        with pytest.raises(UserError, match=message):
            fit(config(store, tmp_path / "run", **changes))


def test_a_model_of_several_labels_is_not_used_on_single_ones(
    several: GraphStore, store: GraphStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(config(several, tmp_path / "run", epochs=1))
    with pytest.raises(SystemExit) as exit_:
        cli.main(["evaluate", str(tmp_path / "run"), "--dataset", str(store.path)])
    assert exit_.value.code == 2
    assert "has one label a node but the model" in capsys.readouterr().err


@pytest.mark.parametrize("is_several", [False, True])
def test_labels_of_tables_come_back_as_they_were_written(store: GraphStore, tmp_path: Path, is_several: bool) -> None:
    """Numbers with gaps, and several labels by the names of their columns."""
    numbers, names = torch.tensor([3, 7, 8, 40, 41]), ["red", "green", "blue"]
    split = [part for v in range(store.num_nodes) for part in store.split_masks if store.split_masks[part][v]]
    columns: dict[str, Any] = {
        "id": [f"n{v}" for v in range(store.num_nodes)],
        "features": list(store.features.numpy()),
    }
    if is_several:
        columns |= {name: BITS[store.labels][:, k].numpy() for k, name in enumerate(names)}
    else:
        columns["label"] = numbers[store.labels].numpy()
    pq.write_table(pa.table(columns | {"split": split}), tmp_path / "nodes.parquet")
    ends = [store.indices, torch.repeat_interleave(torch.arange(store.num_nodes), store.in_degrees())]
    pq.write_table(
        pa.table({name: [f"n{v}" for v in end.tolist()] for name, end in zip(("src", "dst"), ends)}),
        tmp_path / "edges.parquet",
    )
    made = import_tables(tmp_path, tmp_path / "store", columns=TableColumns(labels=names if is_several else ()))
    assert made.num_classes == (3 if is_several else 5)
    result = fit(config(made, tmp_path / "run", epochs=5))
    predict_run(tmp_path / "run", tmp_path / "out.parquet", nodes="test")
    rows = pq.read_table(tmp_path / "out.parquet").to_pydict()
    test = store.split("masks").test.sort().values
    if is_several:
        given = torch.tensor([[name in row for name in names] for row in rows["class_names"]])
        right = (given == (BITS[store.labels[test]] > 0)).double().mean()
    else:
        right = (torch.tensor(rows["class"]) == numbers[store.labels[test]]).double().mean()
        assert result.test_accuracy == pytest.approx(float(right))
    assert float(right) > 0.5


def test_a_run_keeps_the_names_of_its_classes(store: GraphStore, tmp_path: Path) -> None:
    names = [f"kind {k}" for k in range(store.num_classes)]
    named = GraphStore.write(
        tmp_path / "named",
        indptr=store.indptr,
        indices=store.indices,
        features=store.features,
        labels=store.labels,
        masks=store.split_masks,
        provenance=Provenance(options={"label_names": names}),
    )
    fit(config(named, tmp_path / "run", epochs=1))
    assert load_trained(tmp_path / "run").label_names == tuple(names)
    assert safetensors.torch.load_file(export_run(tmp_path / "run", tmp_path / "out.safetensors"))
    with safe_open(tmp_path / "out.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["label_names"]) == names
    fit(config(store, tmp_path / "plain", epochs=1))
    assert load_trained(tmp_path / "plain").label_names is None
