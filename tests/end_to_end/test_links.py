"""Link prediction from the configuration to scores of pairs, on either engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import dngd
from dngd import cli
from dngd.errors import UserError
from dngd.graph import GraphStore, split_links
from dngd.models.decoder import pair_logits
from dngd.optim import NaturalGradient
from dngd.train import TrainingLoop, link_evaluation, tables
from dngd.train.evaluate_run import evaluate_run
from dngd.train.predict import predict_run
from dngd.train.scoring import roc_auc
from dngd.train.tables import TableSpace
from tests.end_to_end.test_local_runs import config, curve, fit
from tests.end_to_end.test_ray_runs import run as run_command
from tests.helpers.ray_cluster import Cluster

pytestmark = pytest.mark.usefixtures("one_thread")

LINKS: dict[str, Any] = {"task": "link", "batch_size": 128, "dropout": 0.0, "epochs": 3, "fanout": (10, 10)}


@pytest.mark.parametrize(("model", "optimizer"), [("gcn", "kfac"), ("sage", "kfac"), ("gcn", "adam")])
def test_links_are_learnt(store: GraphStore, tmp_path: Path, model: str, optimizer: str) -> None:
    """Pairs within a class are linked more often: a classifier that knew the classes would have an AUC of about .85."""
    changes = {"epochs": 8} if model == "sage" else {}
    result = fit(config(store, tmp_path / "run", **(LINKS | changes), model=model, optimizer=optimizer))
    assert result.metric == "roc_auc"
    assert result.best_val_accuracy > 0.7
    assert result.test_accuracy > 0.7
    assert result.history[-1].train_loss < result.history[0].train_loss
    page = (tmp_path / "run" / "report.html").read_text()
    assert "ROC-AUC against steps" in page


def test_the_plan_counts_the_pairs(store: GraphStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both ends of each, in numbers and rows: they are drawn, and multiplied, however few the nodes are."""
    few, more = (
        dngd.Trainer(config(store, tmp_path / "run", **LINKS, negatives=negatives, num_samplers=1)).plan()
        for negatives in (100, 300)
    )
    pairs = 200 * few.batch_size
    assert more.activation_bytes - few.activation_bytes == pairs * 2 * (8 + 4 * few.layers[-1].d_out)
    assert more.sampler_bytes - few.sampler_bytes >= pairs * 2 * 8
    flags = ["--task", "link", "--batch-size", "128", "--num-layers", "1", "--fanout", "3", "--engine", "local"]
    with pytest.raises(SystemExit) as exit_info:
        cli.main(
            ["train", "--dataset", str(store.path), *flags, "--negatives", "999999999", "--run-dir", str(tmp_path)]
        )
    assert exit_info.value.code == 2
    said = capsys.readouterr().err
    assert "largest part: activations" in said
    assert "use a smaller --batch-size, --negatives or --fanout" in said
    assert list(tmp_path.iterdir()) == []


def dense_scores(store: GraphStore, run: Path) -> dict[str, float]:
    """ROC-AUC of the held-out links, by a dense GCN over the training links' edges."""
    settings = dngd.TrainConfig.from_yaml(run / "config.yaml")
    split = split_links(store, settings.link_split, settings.seed)
    model = dngd.Trainer(settings).best_model()
    adjacency = torch.zeros(store.num_nodes, store.num_nodes)
    destinations = torch.repeat_interleave(torch.arange(store.num_nodes), split.graph.indptr.diff())
    adjacency[destinations, split.graph.indices] = 1
    whole = adjacency + torch.eye(store.num_nodes)
    norm = whole.sum(dim=1).rsqrt()
    whole = norm[:, None] * whole * norm
    h = store.features
    with torch.no_grad():
        for k, layer in enumerate(model.graph_layers()):  # type: ignore[operator]
            h = layer.linear(whole @ (h.relu() if k else h))
    found = {}
    for name in ("val", "test"):
        pairs = torch.cat([getattr(split, name), getattr(split, f"{name}_negatives")])
        found[name] = roc_auc(pair_logits(h, pairs)[:, 0], torch.arange(len(pairs)) < len(pairs) // 2)
    return found


def test_scores_are_exact_and_of_the_training_edges(
    store: GraphStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_evaluation, "PAIRS_AT_A_TIME", 100)
    run = tmp_path / "run"
    result = fit(config(store, run, **LINKS))
    dense = dense_scores(store, run)
    assert result.best_val_accuracy == pytest.approx(dense["val"], abs=1e-4)
    assert result.test_accuracy == pytest.approx(dense["test"], abs=1e-4)
    again = evaluate_run(run)
    assert again.keys() == {"step", "metric", "val", "test"}
    assert again["test"]["roc_auc"] == pytest.approx(result.test_accuracy, abs=1e-6)
    for metric in ("average_precision", "accuracy"):
        assert fit(config(store, tmp_path / metric, **(LINKS | {"epochs": 1}), metric=metric)).best_val_accuracy > 0.5


def test_resume_equals_never_having_stopped(store: GraphStore, tmp_path: Path) -> None:
    """Stopped in the middle of an epoch, with dropout; bitwise."""
    fields = LINKS | {"num_workers": 2, "epochs": 2, "dropout": 0.3, "kfac": {"inverse_delay": 3}}
    whole = fit(config(store, tmp_path / "whole", **fields))
    run = tmp_path / "parts"
    fit(config(store, run, **fields, max_steps=7))
    rest = fit(config(store, run, **fields, resume=True))
    assert whole.steps > 14
    assert curve(rest)[-1] == curve(whole)[-1]
    weights, expected = (load_file(path / "model.safetensors") for path in (run, tmp_path / "whole"))
    assert rest.best_val_accuracy == whole.best_val_accuracy
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    for change in ({"task": "node"}, {"link_split": "0.6/0.2/0.2"}, {"negatives": 2}, {"embedding": 5}):
        with pytest.raises(UserError, match=f"cannot resume with another .*({next(iter(change))}|embedding=None)"):
            fit(config(store, run, **(fields | {"resume": True} | change)))


def test_seeds_are_pairs(store: GraphStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """n of the Fisher and of the mean loss is the number of pairs, and an epoch has each link once."""
    seen = []
    original = NaturalGradient.step

    def recording(self: NaturalGradient, closure: None = None, **arguments: Any) -> None:
        seen.append(arguments["num_samples"])
        original(self, closure, **arguments)

    monkeypatch.setattr(NaturalGradient, "step", recording)
    fit(config(store, tmp_path / "run", **(LINKS | {"batch_size": 60, "num_shards": 4, "negatives": 2, "epochs": 1})))
    assert seen[:-1] == [4 * 60 * 3] * (len(seen) - 1)
    assert sum(seen) == 3 * len(split_links(store, "0.8/0.1/0.1", 0).train)


@pytest.fixture(scope="module")
def named(store: GraphStore, tmp_path_factory: pytest.TempPathFactory) -> tuple[GraphStore, Path]:
    """The graph with names of its nodes, and a run on it."""
    folder = tmp_path_factory.mktemp("named")
    graph = GraphStore.write(
        folder / "graph",
        indptr=store.indptr,
        indices=store.indices,
        features=store.features,
        node_ids=[f"n{k}" for k in range(store.num_nodes)],
    )
    fit(config(graph, folder / "run", **(LINKS | {"epochs": 1}), embedding=7))
    return graph, folder / "run"


def test_embeddings_and_pairs_are_predicted(named: tuple[GraphStore, Path], tmp_path: Path) -> None:
    """Without labels, with the nodes' names; a pair's probability is that of its embeddings."""
    graph, run = named
    written = predict_run(run, tmp_path / "z.parquet")
    assert (written.rows, written.columns) == (graph.num_nodes, ("node_id", "embedding"))
    table = pq.read_table(tmp_path / "z.parquet")
    z = torch.tensor(table["embedding"].to_pylist())
    assert z.shape == (graph.num_nodes, 7)
    assert table["node_id"].to_pylist() == [f"n{k}" for k in range(graph.num_nodes)]
    assert torch.allclose(dngd.Trainer(dngd.TrainConfig.from_yaml(run / "config.yaml")).predict(), z)

    pairs = np.random.default_rng(0).integers(0, graph.num_nodes, (50, 2))
    for suffix in ("csv", "parquet"):
        columns = {name: [f"n{node}" for node in pairs[:, k]] for k, name in enumerate(("src", "dst"))}
        given = pa.table(columns | {"note": [1] * 50})
        path = tmp_path / f"pairs.{suffix}"
        pyarrow.csv.write_csv(given, path) if suffix == "csv" else pq.write_table(given, path)
        with pytest.raises(SystemExit) as ended:
            cli.main(["predict", str(run), "--pairs", str(path), "--out", str(tmp_path / f"{suffix}.parquet")])
        assert not ended.value.code
        found = pq.read_table(tmp_path / f"{suffix}.parquet").to_pydict()
        assert (found["src"], found["dst"]) == (columns["src"], columns["dst"])
        expected = pair_logits(z, torch.from_numpy(pairs))[:, 0].sigmoid()
        assert torch.allclose(torch.tensor(found["probability"]), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        (
            {"src": ["n0", "x1"], "dst": ["n1", "n2"]},
            {},
            "node x1 in row 1 of .*pairs.parquet, column 'src', is not in",
        ),
        ({"src": ["n0"], "target": ["n1"]}, {}, r"has no column 'dst' \(it has: src, target\)"),
        ({"src": pa.array([], pa.string()), "dst": pa.array([], pa.string())}, {}, "has no rows"),
        ({"src": ["n0"], "dst": pa.array([None], pa.string())}, {}, "has no id in 1 rows"),
        (None, {"nodes": "val"}, "--nodes val is a part of labelled nodes, but run .* predicts links"),
        (None, {"probabilities": True}, "--probabilities are those of classes, but run .* predicts links"),
    ],
)
def test_what_cannot_be_predicted(
    named: tuple[GraphStore, Path], tmp_path: Path, table: Any, options: dict[str, Any], message: str
) -> None:
    if table is not None:
        pq.write_table(pa.table(table), tmp_path / "pairs.parquet")
        options = {"pairs": tmp_path / "pairs.parquet"}
    with pytest.raises(UserError, match=message):
        predict_run(named[1], tmp_path / "out.parquet", **options)
    assert not (tmp_path / "out.parquet").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": "full", "fanout": None}, "batch_size=full does not go with task=link"),
        ({"semi": "pooled"}, "semi=pooled does not go with task=link"),
        ({"class_weights": "balanced"}, "class_weights=balanced does not go with task=link"),
        ({"link_split": "0.5/0.5"}, "does not give three fractions"),
        ({"batch_size": 3000}, "larger than the training set of [0-9]+ links; use --batch-size [0-9]+ or less$"),
        ({"negatives": 0}, "negatives=0 is not valid"),
    ],
)
def test_what_links_do_not_allow(store: GraphStore, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        fit(config(store, tmp_path / "run", **(LINKS | changes)))
    assert not (tmp_path / "run").exists()


def test_a_graph_without_features_or_links_is_refused(tmp_path: Path) -> None:
    bare = GraphStore.write(tmp_path / "bare", features=None, num_nodes=9, edge_index=np.arange(18).reshape(2, 9) % 9)
    with pytest.raises(UserError, match="has no features, which embeddings are made of"):
        fit(config(bare, tmp_path / "run", **LINKS))
    lonely = GraphStore.write(tmp_path / "lonely", features=np.eye(9), edge_index=np.zeros((2, 0), dtype=np.int64))
    with pytest.raises(UserError, match="leaves no train link of graph lonely, which has 0"):
        fit(config(lonely, tmp_path / "run", **LINKS))


class Mean(nn.Module):
    """A module of one's own, evaluated on whole neighbourhoods."""

    def __init__(self, shape: dngd.GraphShape) -> None:
        super().__init__()
        self.linears = nn.ModuleList([nn.Linear(shape.num_features, 16), nn.Linear(16, shape.num_classes)])

    def forward(self, batch: dngd.GraphBatch) -> Tensor:
        h = batch.x
        for linear, edges in zip(self.linears, batch.layers):
            h = linear(torch.tanh(edges.mean(h) + h[: edges.num_dst]))
        return h


def test_a_module_loss_and_metric_of_ones_own(store: GraphStore, tmp_path: Path) -> None:
    def hinge(logits: Tensor, labels: Tensor) -> Tensor:
        return (1 - (2 * labels - 1) * logits).clamp_min(0)[:, 0]

    def share_right(logits: Tensor, labels: Tensor) -> float:
        return float(((logits > 0) == (labels > 0)).float().mean())

    fields = LINKS | {"epochs": 4, "embedding": 8}
    trainer = dngd.Trainer(
        config(store, tmp_path / "run", **fields), module=Mean, loss=hinge, metric=share_right, quiet=True
    )
    result = trainer.fit()
    assert result.metric == "share_right"
    assert result.best_val_accuracy > 0.6
    assert trainer.predict(torch.tensor([3, 1])).shape == (2, 8)
    assert trainer.evaluate()["test"]["share_right"] == pytest.approx(result.test_accuracy, abs=1e-6)


@pytest.mark.slow
def test_two_ray_workers_give_the_run_of_two_shards(cluster: Cluster, store: GraphStore, tmp_path: Path) -> None:
    flags = ["--task", "link", "--num-layers", "2", "--fanout", "5,5", "--hidden", "24", "--batch-size", "128"]
    common = ["train", "--dataset", str(store.path), *flags, "--epochs", "2", "--num-workers", "2"]
    common += ["--address", cluster.gcs_address]
    done = run_command(cluster, *common, "--run-dir", str(tmp_path / "ray"), "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert (found["world_size"], found["metric"]) == (2, "roc_auc")
    changes = {"engine": "local", "run_dir": tmp_path / "local"}
    local = fit(dngd.TrainConfig.from_yaml(tmp_path / "ray" / "config.yaml", changes))
    lines = [json.loads(line) for line in (tmp_path / "ray" / "metrics.jsonl").read_text().splitlines()]
    for line, record in zip(lines, local.history, strict=True):
        assert line["val_loss"] == pytest.approx(record.val_loss, rel=1e-3)


@pytest.mark.parametrize("room_for", [1, 2])
def test_embeddings_and_what_makes_them_share_one_bound_of_memory(
    store: GraphStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room_for: int
) -> None:
    """With room for one table the other lies in a file; scores are the same."""
    monkeypatch.setattr(tables, "SHARED_FROM_BYTES", 0)
    original, held, most, files = TableSpace._table, [0], [0], [0]

    def table(self: TableSpace, made: Any, *arguments: Any) -> Any:
        out, size = original(self, made, *arguments), 0 if made.is_file else made.size
        held[0] += size
        most[0] = max(most[0], held[0])
        files[0] += made.is_file
        release = out._release

        def released() -> None:
            held[0] -= size
            release()

        out._release = released
        return out

    monkeypatch.setattr(TableSpace, "_table", table)
    width = 16
    limit = room_for * store.num_nodes * width * 4
    changes = LINKS | {"epochs": 1, "hidden": width, "cache_dir": tmp_path / "cache"}
    bounded = fit(config(store, tmp_path / "bounded", **changes, eval_memory_bytes=limit))
    assert 0 < most[0] <= limit
    assert files[0] > 0
    monkeypatch.setattr(TableSpace, "_table", original)
    assert curve(bounded) == curve(fit(config(store, tmp_path / "free", **changes)))


def test_tables_that_fit_one_by_one_but_not_together_are_refused_before_a_step(
    store: GraphStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "SHARED_FROM_BYTES", 0)
    monkeypatch.setattr(tables, "_file_system", lambda path: "tmpfs")  # no disk that takes what goes beyond
    width = 16
    one = store.num_nodes * width * 4
    changes = LINKS | {"epochs": 1, "hidden": width, "cache_dir": tmp_path / "cache"}
    taken: list[int] = []
    train_step = TrainingLoop._train_step

    def step(self: TrainingLoop, *arguments: Any) -> bool:
        taken.append(self.step)
        return train_step(self, *arguments)

    monkeypatch.setattr(TrainingLoop, "_train_step", step)
    with pytest.raises(UserError, match="fit neither in the memory set aside for them nor on a disk"):
        fit(config(store, tmp_path / "small", **changes, eval_memory_bytes=2 * one - 1))
    assert taken == []
    fit(config(store, tmp_path / "enough", **changes, eval_memory_bytes=2 * one))
    assert taken
