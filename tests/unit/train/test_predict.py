"""Predictions in Parquet: the full forward pass' classes, the user's node ids, whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from torch import Tensor

import dngd
from dngd import cli
from dngd.errors import UserError
from dngd.graph import GraphStore
from dngd.graph.manifest import Provenance
from dngd.models import GNN
from dngd.train import predict
from dngd.train.evaluate_run import evaluate_run
from dngd.train.evaluation import ExactEvaluator
from dngd.train.new_file import new_file
from dngd.train.predict import predict_run
from tests.helpers.exact_evaluation import dense_forward, made_model

pytestmark = pytest.mark.usefixtures("one_thread")

N, FEATURES, CLASSES = 40, 5, 3
NAMES = ["cats", "dogs", "birds"]
IDS = [f"node-{v:03}" for v in range(N)][::-1]


def write_store(path: Path, **changes: Any) -> GraphStore:
    """Nodes 30 to 39 have no label; the others are training, validation and test nodes in turns."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.arange(N) % CLASSES
    labels[30:] = -1
    turn = torch.arange(N) % 4
    fields: dict[str, Any] = {
        "edge_index": torch.randint(0, N, (2, 150), generator=generator),
        "features": torch.randn(N, FEATURES, generator=generator),
        "labels": labels,
        "num_classes": CLASSES,
        "masks": {"train": (turn == 0) & (labels >= 0), "val": (turn == 1) & (labels >= 0), "test": turn == 2},
        "node_ids": IDS,
        "provenance": Provenance(options={"label_names": NAMES}),
    }
    fields["masks"]["test"] &= labels >= 0
    return GraphStore.write(path, **(fields | changes))


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> GraphStore:
    return write_store(tmp_path_factory.mktemp("predict") / "animals")


def write_run(
    folder: Path, dataset: str, model: GNN, said: dict[str, str] | None = None, digest: str | None = None, **fields: Any
) -> Path:
    """A run folder as training leaves it, as far as predictions need it. digest: of the graph trained on."""
    folder.mkdir()
    if digest is not None:
        checkpoint = folder / "checkpoints" / "step-00000012"
        checkpoint.mkdir(parents=True)
        (checkpoint / "state.json").write_text(json.dumps({"position": {"graph_digest": digest}}))
    kind = "gcn" if model.aggregation == "gcn" else "sage"
    settings: dict[str, Any] = {"dataset": dataset, "model": kind, "hidden": 8, "num_layers": 3, "eval_rows": 7}
    (folder / "config.yaml").write_text(dngd.TrainConfig(**(settings | fields)).to_yaml())
    data = safetensors.torch.save(model.state_dict(), {"step": "12"} | (said or {}))
    (folder / "model.safetensors").write_bytes(data)
    return folder


@pytest.fixture
def model() -> GNN:
    return made_model("sage", FEATURES, 8)


@pytest.fixture
def run(graph: GraphStore, model: GNN, tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", str(graph.path), model)


def expected_shares(graph: GraphStore, model: GNN) -> Tensor:
    return dense_forward(graph, model).softmax(dim=1)


def test_what_is_written(
    graph: GraphStore, model: GNN, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "ROW_GROUP_ROWS", 15)
    out = tmp_path / "predictions.parquet"
    made = predict_run(run, out, probabilities=True)
    file = pq.ParquetFile(out)
    assert file.schema_arrow.names == ["node_id", "class", "class_name", "probability", "probabilities"]
    types = [str(kind) for kind in file.schema_arrow.types]
    assert types[:4] == ["string", "int64", "string", "float"]
    assert file.schema_arrow.field("probabilities").type.value_type == pa.float32()
    assert [file.metadata.row_group(k).num_rows for k in range(file.num_row_groups)] == [15, 15, 10]
    assert file.metadata.row_group(0).column(0).compression == "ZSTD"
    table = file.read()
    shares = expected_shares(graph, model)
    found = torch.tensor(table["probabilities"].to_pylist())
    assert torch.allclose(found.double(), shares, rtol=1e-5, atol=1e-6)
    classes = shares.argmax(dim=1)
    assert table["node_id"].to_pylist() == IDS
    assert table["class"].to_pylist() == classes.tolist()
    assert table["class_name"].to_pylist() == [NAMES[k] for k in classes.tolist()]
    assert table["probability"].to_pylist() == found.max(dim=1).values.tolist()
    said = {k.decode(): v.decode() for k, v in file.schema_arrow.metadata.items() if k.startswith(b"dngd.")}
    said.pop("dngd.version")
    assert said == {
        "dngd.run": "run",
        "dngd.step": "12",
        "dngd.model": "sage",
        "dngd.graph": graph.name,
        "dngd.graph_digest": graph.digest,
        "dngd.nodes": "all",
        "dngd.class_names": json.dumps(NAMES),
    }
    assert (made.rows, made.step, made.path) == (N, 12, str(out))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["predictions.parquet", "run"]


@pytest.mark.parametrize("name", ["p.csv", "p.TSV", "p.arrow"])
def test_parquet_is_not_written_under_the_name_of_another_kind(run: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"would hold Parquet; give a name that ends in \.parquet"):
        predict_run(run, tmp_path / name)
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("nodes", ["train", "val", "test", "unlabelled"])
def test_some_nodes(graph: GraphStore, model: GNN, run: Path, tmp_path: Path, nodes: str) -> None:
    """In the graph's order, with its ids; the same classes as among all."""
    predict_run(run, tmp_path / "some.parquet", nodes=nodes)
    table = pq.read_table(tmp_path / "some.parquet")
    assert table.column_names == ["node_id", "class", "class_name", "probability"]
    split = graph.split("masks")
    wanted = torch.arange(30, N) if nodes == "unlabelled" else getattr(split, nodes).sort().values
    assert wanted.numel() > 3
    assert table["node_id"].to_pylist() == [IDS[v] for v in wanted]
    assert table["class"].to_pylist() == expected_shares(graph, model)[wanted].argmax(dim=1).tolist()


@pytest.mark.parametrize("ids", [None, torch.arange(N) * 3 + 2**40])
def test_numbers_as_ids_and_no_class_names(model: GNN, tmp_path: Path, ids: Tensor | None) -> None:
    store = write_store(tmp_path / "store", node_ids=ids, provenance=Provenance(options={"label_names": ["one"]}))
    run = write_run(tmp_path / "run", str(store.path), model)
    predict_run(run, tmp_path / "out.parquet", nodes="test")
    table = pq.read_table(tmp_path / "out.parquet")
    nodes = store.split("masks").test.sort().values
    assert table.schema.field("node_id").type == pa.int64()
    assert table["node_id"].to_pylist() == (nodes if ids is None else ids[nodes]).tolist()
    assert table.column_names == ["node_id", "class", "probability"]


def test_another_graph(graph: GraphStore, model: GNN, run: Path, tmp_path: Path) -> None:
    """Its features are used; its names of classes only if it is the graph that was trained on, elsewhere."""
    generator = torch.Generator().manual_seed(6)
    other = write_store(tmp_path / "other", features=torch.randn(N, FEATURES, generator=generator))
    predict_run(run, tmp_path / "other.parquet", dataset=str(other.path))
    table = pq.read_table(tmp_path / "other.parquet")
    assert table["class"].to_pylist() == expected_shares(other, model).argmax(dim=1).tolist()
    assert "class_name" not in table.column_names
    moved = tmp_path / "moved"
    shutil.copytree(graph.path, moved)
    checkpoint = run / "checkpoints" / "step-00000012"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"position": {"graph_digest": graph.digest}}))
    for store, has_names in ((moved, True), (other.path, False)):
        predict_run(run, tmp_path / "again.parquet", dataset=str(store), overwrite=True)
        assert ("class_name" in pq.read_table(tmp_path / "again.parquet").column_names) == has_names


def test_a_graph_without_labels(model: GNN, run: Path, tmp_path: Path) -> None:
    store = write_store(tmp_path / "unlabelled", labels=None, masks=None, num_classes=None)
    made = predict_run(run, tmp_path / "out.parquet", dataset=str(store.path), nodes="unlabelled")
    assert made.rows == N


def test_evaluating_on_another_graph(graph: GraphStore, model: GNN, tmp_path: Path) -> None:
    """A run whose graph is named by a path that leads nowhere from here."""
    run = write_run(tmp_path / "run", "data/animals", model)
    with pytest.raises(UserError, match=r"the run's graph was not found.*data/animals.*--dataset"):
        evaluate_run(run)
    scores = evaluate_run(run, dataset=str(graph.path))
    expected = dense_forward(graph, model)
    for part in ("train", "val", "test"):
        nodes = getattr(graph.split("masks"), part)
        right = (expected[nodes].argmax(dim=1) == graph.labels[nodes]).double().mean()
        assert scores[part]["accuracy"] == float(right)
    assert scores["step"] == 12


def named(path: Path, labels: Tensor, names: Sequence[str | int]) -> GraphStore:
    options = {"label_names": list(names)} if names else {}
    return write_store(path, labels=labels, num_classes=None, provenance=Provenance(options=options))


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1", "roc_auc"])
@pytest.mark.parametrize("kept", [[0, 1, 2], [0, 2]])
def test_classes_of_another_graph_go_by_their_names(model: GNN, tmp_path: Path, metric: str, kept: list[int]) -> None:
    """Numbered in another order there, and perhaps not all of them; without names, by their numbers."""
    labels = torch.arange(N) % CLASSES
    labels = torch.where(torch.isin(labels, torch.tensor(kept)), labels, kept[0])
    order = sorted(kept, key=lambda k: NAMES[k])
    other_labels = torch.tensor([order.index(int(k)) for k in labels])
    graph = named(tmp_path / "graph", labels, NAMES)
    other = named(tmp_path / "other", other_labels, [NAMES[k] for k in order])
    assert other.label_names != graph.label_names
    run = write_run(tmp_path / "run", str(graph.path), model, {"label_names": json.dumps(NAMES)}, metric=metric)
    assert evaluate_run(run, dataset=str(other.path)) == evaluate_run(run)
    predict_run(run, tmp_path / "out.parquet", dataset=str(other.path))
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["class_name"].to_pylist() == [NAMES[k] for k in table["class"].to_pylist()]
    numbered = named(tmp_path / "numbered", labels.clamp_max(1), [])
    assert numbered.num_classes == 2 < model.layers[-1].linear.out_features
    expected = dense_forward(numbered, model)
    found = evaluate_run(run, dataset=str(numbered.path))
    if metric == "accuracy":
        nodes = numbered.split("masks").test
        assert found["test"]["accuracy"] == float((expected[nodes].argmax(1) == numbered.labels[nodes]).double().mean())
    with pytest.raises(TypeError, match="labels in memory"):
        pickle.dumps(numbered.with_classes(torch.arange(2), 3))


NUMBERS = [10, 20, 40]


@pytest.mark.parametrize("is_kept", [True, False])
def test_labels_that_were_numbers_are_given_as_they_were(model: GNN, tmp_path: Path, is_kept: bool) -> None:
    """Numbers with gaps are classes without: what is written is the user's number, not the class's."""
    options = Provenance(options={"label_names": NUMBERS})
    graph = write_store(tmp_path / "graph", provenance=options)
    said = {"label_names": json.dumps(NUMBERS)} if is_kept else None
    run = write_run(tmp_path / "run", str(graph.path), model, said)
    predict_run(run, tmp_path / "out.parquet", probabilities=True)
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.column_names == ["node_id", "class", "probability", "probabilities"]
    assert table.schema.field("class").type == pa.int64()
    places = expected_shares(graph, model).argmax(dim=1).tolist()
    assert table["class"].to_pylist() == [NUMBERS[k] for k in places]
    assert json.loads(table.schema.metadata[b"dngd.class_names"]) == NUMBERS
    found = table["probabilities"].to_pylist()
    assert [NUMBERS[max(range(CLASSES), key=row.__getitem__)] for row in found] == table["class"].to_pylist()


@pytest.mark.parametrize(
    ("known", "here", "number"),
    [
        ([10, 20, 40], [20, 40], [1, 2]),
        ([10, 20, 40], ["10", "40"], [0, 2]),
        ([0, 2, 3], None, "has class '1' which the model"),
        ([1, 2, 3], None, "has class '0' which the model"),
        (None, [0, 2], [0, 2]),
        (None, [1, 3], "has class '3' which the model"),
    ],
)
def test_numbers_of_another_graph_are_those_that_the_model_learnt(
    model: GNN, tmp_path: Path, known: list[int] | None, here: list[Any] | None, number: list[int] | str
) -> None:
    """None: class numbers from 0. number: the model's class for each of the graph's, or what is refused."""
    own = named(tmp_path / "own", torch.arange(N) % CLASSES, known or [])
    other = named(tmp_path / "other", torch.arange(N) % 2, here or [])
    run = write_run(
        tmp_path / "run", str(own.path), model, None if known is None else {"label_names": json.dumps(known)}
    )
    if isinstance(number, str):
        with pytest.raises(UserError, match=number):
            evaluate_run(run, dataset=str(other.path))
        return
    nodes = other.split("masks").test
    labels = torch.tensor(number)[other.labels[nodes]]
    right = (dense_forward(other, model)[nodes].argmax(dim=1) == labels).double().mean()
    assert evaluate_run(run, dataset=str(other.path))["test"]["accuracy"] == float(right)


def test_classes_between_numbers_that_no_node_has_are_not_unknown(model: GNN, tmp_path: Path) -> None:
    """A store whose labels 10 and 40 are class numbers, as those of before have them, for a model of 10, 20 and 40."""
    own = named(tmp_path / "own", torch.arange(N) % CLASSES, [10, 20, 40])
    run = write_run(tmp_path / "run", str(own.path), model, {"label_names": "[10, 20, 40]"})
    places = torch.arange(N) % 2
    dense = named(tmp_path / "dense", places, [10, 40])
    gapped = named(tmp_path / "gapped", torch.tensor([10, 40])[places], [])
    assert gapped.num_classes == 41
    assert evaluate_run(run, dataset=str(gapped.path)) == evaluate_run(run, dataset=str(dense.path))
    predict_run(run, tmp_path / "out.parquet", dataset=str(gapped.path))
    other = named(tmp_path / "other", torch.tensor([10, 30])[places], [])
    with pytest.raises(UserError, match="has class '30' which the model"):
        evaluate_run(run, dataset=str(other.path))


def test_several_labels_are_named(model: GNN, tmp_path: Path) -> None:
    bits = torch.tensor([[0, 0, 1], [1, 1, 0], [1, 0, 1]])
    graph = named(tmp_path / "graph", bits[torch.arange(N) % 3], NAMES)
    said = {"labels": "several", "label_names": json.dumps(NAMES)}
    run = write_run(tmp_path / "run", str(graph.path), model, said)
    predict_run(run, tmp_path / "out.parquet")
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.column_names == ["node_id", "classes", "class_names"]
    found = dense_forward(graph, model) > 0
    assert table["classes"].to_pylist() == [row.nonzero()[:, 0].tolist() for row in found]
    assert table["class_names"].to_pylist() == [[NAMES[k] for k in row.nonzero()[:, 0].tolist()] for row in found]
    assert found.any()
    assert not found.all()
    # The same labels in columns of another order, and not all of them.
    order = [2, 0, 1]
    turned = named(tmp_path / "turned", graph.labels[:, order], [NAMES[k] for k in order])
    assert evaluate_run(run, dataset=str(turned.path)) == evaluate_run(run)
    fewer = named(tmp_path / "fewer", graph.labels[:, :2], NAMES[:2])
    with pytest.raises(UserError, match=r"does not tell label 'birds' of its nodes.* all of cats, dogs, birds, or no"):
        evaluate_run(run, dataset=str(fewer.path))
    # Without names, as before there were any.
    plain = named(tmp_path / "plain", graph.labels, [])
    old = write_run(tmp_path / "old", str(plain.path), model, {"labels": "several"})
    predict_run(old, tmp_path / "old.parquet")
    assert pq.read_table(tmp_path / "old.parquet").column_names == ["node_id", "classes"]


def test_classes_that_the_model_does_not_know_are_refused(model: GNN, tmp_path: Path) -> None:
    graph = write_store(tmp_path / "graph")
    other = named(tmp_path / "other", torch.arange(N) % 3, ["cats", "the dogs", "the birds"])
    run = write_run(tmp_path / "run", str(graph.path), model, {"label_names": json.dumps(NAMES)})
    with pytest.raises(UserError, match=r"has class 'the dogs' and 1 more which .* classes are cats, dogs, birds"):
        evaluate_run(run, dataset=str(other.path))


@pytest.mark.parametrize("split", ["random:0.5/0.25/0.25", "masks"])
def test_a_split_that_is_drawn_anew_elsewhere_is_told(
    graph: GraphStore, model: GNN, tmp_path: Path, split: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same nodes in another order: their places decide, not who they are."""
    turned = write_store(tmp_path / "turned", features=graph.features.flip(0), labels=graph.labels.flip(0), masks=None)
    if split == "masks":
        turned = write_store(tmp_path / "masked", features=graph.features + 1)
    run = write_run(tmp_path / "run", str(graph.path), model, digest=graph.digest, split=split)
    told: list[str] = []
    evaluate_run(run, tell=told.append)
    assert not told
    evaluate_run(run, dataset=str(turned.path), tell=told.append)
    with pytest.raises(SystemExit, match=r"^0$"):
        cli.main(["evaluate", str(run), "--dataset", str(turned.path), "--json"])
    printed = capsys.readouterr()
    assert set(json.loads(printed.out)) == {"step", "metric", "train", "val", "test"}
    assert ("is not the one that run" in printed.err) == bool(told) == (split != "masks")
    out = tmp_path / "out.parquet"
    predict_run(run, out, dataset=str(turned.path), nodes="test", overwrite=True, tell=told.append)
    predict_run(run, out, dataset=str(turned.path), nodes="all", overwrite=True, tell=told.append)
    assert len(told) == (0 if split == "masks" else 2)


def refusal(run: Path, out: Path, **options: Any) -> str:
    with pytest.raises(UserError) as info:
        predict_run(run, out, **options)
    return str(info.value)


def test_bad_input(graph: GraphStore, model: GNN, run: Path, tmp_path: Path) -> None:
    """One sentence with the fix, and nothing written."""
    out = tmp_path / "out.parquet"
    assert "no folder" in refusal(run, tmp_path / "none" / "out.parquet")
    assert "is a folder" in refusal(run, tmp_path)
    assert "all, train, val, test, unlabelled" in refusal(run, out, nodes="some")
    assert "no config.yaml" in refusal(tmp_path, out)
    everywhere = write_store(tmp_path / "labelled", labels=torch.arange(N) % CLASSES)
    assert "no unlabelled nodes" in refusal(run, out, nodes="unlabelled", dataset=str(everywhere.path))
    narrow = write_store(tmp_path / "narrow", features=torch.zeros(N, 2))
    assert "has 2 features a node" in refusal(run, out, dataset=str(narrow.path))
    assert "5" in refusal(run, out, dataset=str(narrow.path))
    many = write_store(tmp_path / "many", num_classes=9)
    assert "has 9 classes but the model" in refusal(run, out, dataset=str(many.path))
    nan = write_store(tmp_path / "store-nan")
    entry = nan.manifest.files["features.arrow"]
    with (nan.path / "features.arrow").open("r+b") as file:
        file.seek(entry.data_offset)
        file.write(b"\xff" * (4 * N * FEATURES))
    assert f"node {IDS[0]} of" in refusal(run, out, dataset=str(nan.path))
    assert not out.exists()
    out.write_text("kept")
    assert "--overwrite" in refusal(run, out)
    assert out.read_text() == "kept"
    (run / "model.safetensors").write_bytes(b"nothing")
    assert "is damaged, or no safetensors file" in refusal(run, out, overwrite=True)
    (run / "model.safetensors").unlink()
    assert "no model yet" in refusal(run, out, overwrite=True)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("named", [False, True], ids=["unnamed", "named"])
def test_a_failure_leaves_the_old_file(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool) -> None:
    """And nothing else, also where files must have names; then it is replaced."""
    if named:
        monkeypatch.delattr(os, "O_TMPFILE")
    out = tmp_path / "out.parquet"
    out.write_text("old")
    original = ExactEvaluator.predictions

    def broken(self: ExactEvaluator, *arguments: Any) -> Iterator[tuple[Tensor, Tensor]]:
        yield next(iter(original(self, *arguments)))
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ExactEvaluator, "predictions", broken)
        assert "No space left on device" in refusal(run, out, overwrite=True)
    assert out.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.parquet", "run"]
    predict_run(run, out, overwrite=True)
    assert pq.read_table(out).num_rows == N
    mask = os.umask(0)
    os.umask(mask)
    assert out.stat().st_mode & 0o777 == 0o666 & ~mask
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.parquet", "run"]


@pytest.mark.parametrize("lacks", ["nothing", "unnamed files", "late names", "links"])
def test_a_file_that_appears_meanwhile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacks: str) -> None:
    """On file systems that lack this or that; without it, the file gets its name on all of them."""
    if lacks == "unnamed files":
        monkeypatch.delattr(os, "O_TMPFILE")
    link = os.link

    def refuses(source: Any, target: Any, **options: Any) -> None:
        if lacks == "links" or (lacks == "late names" and options):
            raise OSError(errno.EPERM, "Operation not permitted")
        link(source, target, **options)

    monkeypatch.setattr(os, "link", refuses)
    path = tmp_path / "file"

    def two_writers() -> None:
        with new_file(path, overwrite=False) as file:
            file.write(b"late")
            path.write_bytes(b"first")

    with pytest.raises(FileExistsError):
        two_writers()
    assert path.read_bytes() == b"first"
    with new_file(tmp_path / "other", overwrite=False) as file:
        file.write(b"alone")
    assert (tmp_path / "other").read_bytes() == b"alone"
    assert sorted(tmp_path.iterdir()) == [path, tmp_path / "other"]


def test_groups_are_cut_and_joined() -> None:
    batches = [pa.record_batch({"x": list(range(a, b))}) for a, b in ((0, 3), (3, 4), (4, 15), (15, 16), (16, 16))]
    groups = [table["x"].to_pylist() for table in predict._groups(iter(batches), 4)]
    assert groups == [list(range(a, a + 4)) for a in (0, 4, 8, 12)]
    assert [table.num_rows for table in predict._groups(iter(batches), 10)] == [10, 6]


def test_the_command_line(run: Path, graph: GraphStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Standard output holds the JSON alone."""
    out = tmp_path / "out.parquet"
    arguments = ["predict", str(run), "--out", str(out), "--nodes", "val", "--json", "--probabilities"]
    with pytest.raises(SystemExit) as info:
        cli.main(arguments)
    assert info.value.code == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["rows"], said["graph"], said["nodes"]) == (pq.read_table(out).num_rows, graph.name, "val")
    for change, code in (([], 2), (["--overwrite", "--dataset", str(graph.path)], 0)):
        with pytest.raises(SystemExit) as info:
            cli.main(arguments + change)
        assert info.value.code == code
        assert ("exists" in capsys.readouterr().err) == (code == 2)
