"""A user's mistakes: one sentence with the value and the fix, exit code 2, nothing overwritten."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dngd
from dngd import cli
from dngd.config import TrainConfig
from dngd.config_text import parse_assignment, read_yaml
from dngd.errors import TrainingError
from dngd.graph import GraphStore
from dngd.train.evaluate_run import evaluate_run

BASE = ["--engine", "local", "--num-layers", "2", "--fanout", "5,5", "--hidden", "8", "--epochs", "1", "--quiet"]
BASE += ["--num-samplers", "0"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Return exit code and standard error of the command line."""
    with pytest.raises(SystemExit) as exit_info:
        cli.main(list(arguments))
    return int(exit_info.value.code or 0), capsys.readouterr().err


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the one sentence with which the command line refuses."""
    code, err = run(capsys, *arguments)
    assert code == 2, err
    assert err.startswith("dngd: ")
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--fanout", "10,10,5"], ["fanout=(10, 10, 5)", "num_layers=2", "one per layer"]),
        (["--fanout", "5,x"], ["'5,x'", "15,10,5"]),
        (["--fanout", "0,5"], ["fanout=(0, 5)", "-1"]),
        (["--batch-size", "5000"], ["5000", "training set of 300", "--batch-size 300 or less", "full"]),
        (["--batch-size", "200", "--num-workers", "2"], ["2 x 200", "--batch-size 150"]),
        (["--batch-size", "0"], ["batch_size=0"]),
        (["--batch-size", "full", "--num-workers", "301"], ["num_shards=301", "training nodes, 300", "at most 300"]),
        (["--semi", "two_means", "--batch-size", "1"], ["semi_share=0.5", "batch_size=1", "larger --batch-size"]),
        (["--semi", "pooled", "--set", "kfac.fisher=empirical"], ["semi=pooled", "kfac.fisher=monte_carlo"]),
        (["--semi", "pooled", "--set", "semi_share=1.5"], ["semi_share=1.5", "less than 1"]),
        (["--semi", "mean"], ["semi='mean'", "pooled"]),
        (["--semi-gamma", "0"], ["semi_gamma=0", "greater than 0"]),
        (["--damping", "1e300"], ["kfac.damping=1e+300", "less than or equal to 1e30"]),
        (["--semi", "two_means", "--set", "semi_weight=1e300"], ["semi_weight=", "less than or equal to 1e30"]),
        (["--set", "kfac.kl_clip=1", "--set", "kfac.kl_clip_power=1e308"], ["kfac.kl_clip_power=", "or equal to 16"]),
        (["--set", "kfac.kl_clip=1", "--set", "kfac.kl_clip_steps=1e-300"], ["kfac.kl_clip_steps=", "0.000001"]),
        (["--set", "kfac.kl_bound_steps=1e-300"], ["kfac.kl_bound_steps=", "0.000001"]),
        (["--set", "collective_timeout_seconds=1e30"], ["collective_timeout_seconds=", "less than or equal to 1e9"]),
        (["--fanout", "5,9999999999999999999999"], ["fanout=9999999999999999999999", "less than or equal to 1e12"]),
        (["--class-weights", "1,1,1,1,1e300"], ["class_weights=", "no number above 0, up to 1e+30"]),
        (["--batch-size", "many"], ["batch_size='many'", "full"]),
        (["--model", "gat"], ["model='gat'", "gcn", "sage"]),
        (["--optimizer", "lion"], ["optimizer='lion'", "kfac"]),
        (["--split", "random:0.5/0.6"], ["random:0.5/0.6"]),
        (["--split", "complete"], ["complete"]),
        (["--split", "nonsense"], ["nonsense", "random:"]),
        (["--set", "kfac.dampin=1"], ["kfac.dampin", "did you mean kfac.damping?"]),
        (["--set", "damping=0.1"], ["'damping' is unknown; did you mean kfac.damping?"]),
        (["--set", "dampin=0.1"], ["did you mean kfac.damping?"]),
        (["--set", "ray.resources_per_worker={CPU: 1, a: true}"], ["ray.resources_per_worker={'CPU'", "true or false"]),
        (["--loggers", "wandb, wandb"], ["loggers=wandb,wandb names one twice"]),
        (["--loggers", "wandb, x"], ["loggers='x'"]),
        (["--num-workers", "2", "--num-shards", "1"], ["at most 1 worker, or for a new run --num-shards 2 or more"]),
        (["--set", "epochs=15e-1"], ["epochs=1.5", "fractional part"]),
        (["--set", "epochs=1e400"], ["epochs=inf", "finite"]),
        (["--batch-size", "1e9x"], ["batch_size='1e9x'"]),
        (["--run-dir"], ["--run-dir", "(see dngd train --help)"]),
        (["--set", "hiden=1"], ["hiden", "did you mean hidden?"]),
        (["--set", "hidden"], ["hidden", "key=value"]),
        (["--set", "self=1"], ["'self' is unknown"]),
        (["--set", "seed=2020-99-99"], ["seed=2020-99-99", "month must be in 1..12", "quote"]),
        (["--set", "kfac={on: 3}"], ["key True", "quote"]),
        (["--set", "lr=.inf"], ["lr=inf", "finite"]),
        (["--set", "kfac.kl_bound=.inf"], ["kfac.kl_bound=inf", "finite"]),
        (["--hidden", "100000000000"], ["hidden=100000000000", "65536"]),
        (["--task", "link", "--set", "embedding=100000000000"], ["embedding=100000000000", "65536"]),
        (["--dataset", "~no-such-user/x"], ["~no-such-user/x", "whole path"]),
        (["--data-root", "~no-such-user/x"], ["~no-such-user/x", "whole path"]),
        (["--cache-dir", "~no-such-user/x"], ["~no-such-user/x", "whole path"]),
        (["--stage-dir", "~no-such-user/x"], ["~no-such-user/x", "whole path"]),
        (["--run-dir", "~no-such-user/x"], ["~no-such-user/x", "whole path"]),
        (["--config", "~no-such-user/x"], ["~no-such-user/x", "whole path"]),
        (["--damping", "0"], ["kfac.damping=0", "greater than 0"]),
        (["--lr", "-1"], ["lr=-1"]),
        (["--use-gpu"], ["--use-gpu", "no CUDA device"]),
        (["--num-workers", "3", "--num-shards", "2"], ["num_workers=3", "num_shards=2"]),
        (["--resume"], ["--resume needs --run-dir"]),
        (["--run-dir", "hdfs://bucket/run"], ["run_dir=hdfs://", "s3://"]),
        (["--config", "missing.yaml"], ["missing.yaml", "cannot be read"]),
        (["--set", "epochs=true"], ["epochs=True", "true or false", "passes over"]),
        (["--set", "kfac.damping=yes"], ["kfac.damping=True", "true or false"]),
        (["--set", "fanout=[true, 5]"], ["fanout=[True, 5]", "true or false"]),
        (["--set", "epochs=1:30"], ["epochs='1:30'", "valid integer"]),
        (["--set", "lr=1:30.5"], ["lr='1:30.5'", "valid number"]),
        (["--set", "fanout=5"], ["fanout=(5,)", "num_layers=2", "one per layer"]),
        (["--set", "class_weights=2"], ["class_weights has 1 entries", "5 classes"]),
        (["--set", "run_dir=4"], ["run_dir=4", "no text", "--set 'run_dir=\"4\"'"]),
        (["--set", "split=2020-01-01"], ["split=2020-01-01", "no text", "quotes"]),
        (["--set", "kfac=5"], ["kfac=5", "kfac.KEY=VALUE"]),
        (["--set", "kfac={damping: 1, damping: 2}"], ["kfac={damping: 1, damping: 2}", "'damping' twice"]),
        (["--task", "link", "--metric", "macro_f1"], ["metric=macro_f1", "task=link", "--metric roc_auc"]),
        (["--task", "link"], ["split=random:0.5/0.25/0.25 has no effect", "--link-split"]),
        (["--negatives", "3"], ["negatives=3 has no effect with task=node", "--task link"]),
        (["--link-split", "0.5/0.2/0.3"], ["link_split=0.5/0.2/0.3 has no effect", "--task link"]),
        (["--optimizer", "adam", "--damping", "0.1"], ["kfac.damping=0.1 has no effect", "--optimizer kfac"]),
        (["--set", "momentum=0.5"], ["momentum=0.5 has no effect with optimizer=kfac", "kfac.momentum"]),
        (["--semi-gamma", "2"], ["semi_gamma=2.0 has no effect without --semi"]),
        (["--semi", "pooled", "--set", "semi_temperature=0.2"], ["semi_temperature=0.2", "semi_labels=soft"]),
        (["--semi", "pooled", "--batch-size", "full", "--set", "semi_share=0.2"], ["semi_share=0.2", "all nodes"]),
        (["--optimizer", "adam", "--set", "lr_half_steps=5"], ["lr_half_steps=5.0", "lr_schedule=cosine"]),
        (["--set", "kfac.kl_bound=0.2", "--set", "kfac.kl_clip=0.1"], ["kfac.kl_clip=0.1", "kfac.kl_bound=0.2"]),
        (["--set", "kfac.kl_clip=0.1", "--set", "kfac.kl_bound_steps=3"], ["kfac.kl_bound_steps=3.0", "not in use"]),
        (
            ["--set", "kfac={kl_clip: 0.1, kl_clip_steps: null, kl_clip_power: 1.5}"],
            ["kfac.kl_clip_power=1.5 has no effect without", "kfac.kl_clip_steps"],
        ),
        (
            ["--set", "kfac.method=ekfac", "--set", "kfac.output_rank=8"],
            ["kfac.output_rank=8 has no effect with kfac.method=ekfac", "leave it out"],
        ),
        (["--address", "host:6379"], ["ray.address=host:6379 has no effect with engine=local", "--engine ray"]),
        (["--min-workers", "1"], ["ray.min_workers=1 has no effect", "--engine ray"]),
        (["--no-such-flag"], ["--no-such-flag"]),
        (["--epochs", "soon"], ["--epochs", "integer"]),
    ],
)
def test_wrong_flags(
    store: GraphStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    said: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    said_there = refused(
        capsys,
        "train",
        "--dataset",
        str(store.path),
        "--split",
        "random:0.5/0.25/0.25",
        "--batch-size",
        "50",
        *BASE,
        *flags,
    )
    for text in said:
        assert text in said_there
    assert not (tmp_path / "runs").exists(), "a run folder was made"


def test_every_number_of_a_configuration_has_a_largest_value() -> None:
    """Without one, it goes on to where 64 bits or a 32-bit float cannot hold it."""
    schema = TrainConfig.model_json_schema()
    missing = []

    def look(part: Any, name: str) -> None:
        if isinstance(part, list):
            for item in part:
                look(item, name)
        if isinstance(part, dict):
            bounded = {"maximum", "exclusiveMaximum"} & part.keys()
            if part.get("type") in ("integer", "number") and not bounded:
                missing.append(name)
            for key, item in part.items():
                if key != "default":
                    look(item, f"{name}.{key}")

    look(schema, "")
    # Its entries are checked with the loss that they belong to.
    assert all("class_weights" in name for name in missing), missing


@pytest.mark.parametrize(
    "changes",
    [
        {"damping": 1e30, "damping_g_ratio": 1e30},
        {"damping": 1e-150, "damping_g_ratio": 1e-150},
        {"damping": 1e-300, "damping_mode": "tikhonov"},
        {"damping": 1e30, "method": "ekfac"},
        {"kl_clip": 1e30, "kl_clip_steps": 1e-6, "kl_clip_power": 16},
        {"kl_bound": 1e30, "kl_bound_steps": 1e-6, "norm_constraint": 1e30, "change_threshold": 1e30},
    ],
)
def test_the_largest_and_smallest_values_end_in_no_traceback(
    store: GraphStore, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Most of them learn nothing, which a run says in a sentence, or in its numbers."""
    config = TrainConfig(
        dataset=str(store.path),
        split="random:0.5/0.25/0.25",
        run_dir=tmp_path / "run",
        engine="local",
        num_layers=2,
        hidden=8,
        fanout=(10**12, 10**12),
        batch_size=50,
        epochs=10**12,
        max_steps=4,
        warmup_steps=10**12,
        eval_rows=10**12,
        collective_timeout_seconds=1e9,
        kfac=changes,
    )
    with contextlib.suppress(TrainingError):
        assert dngd.Trainer(config, quiet=True).fit().steps == 4


def test_a_flag_without_effect_may_stand_in_a_file(
    store: GraphStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One file serves a comparison of optimizers; and a flag that says what is usual asks for nothing."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("kfac: {damping: 0.1}\nmomentum: 0.5\nnegatives: 3\nray: {address: host:1}\n")
    command = ["train", "--config", "c.yaml", "--dataset", str(store.path), *BASE, "--batch-size", "50", "--dry-run"]
    for flags in (["--optimizer", "adam"], ["--negatives", "1", "--semi-gamma", "1", "--link-split", "0.8/0.1/0.1"]):
        code, err = run(capsys, *command, *flags)
        assert code == 0, err


def test_unknown_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str], store: GraphStore) -> None:
    shutil.copytree(store.path, tmp_path / "small")
    said = refused(capsys, "train", "--dataset", "smal", "--data-root", str(tmp_path), *BASE)
    assert "'smal'" in said
    assert str(tmp_path) in said, "where it was looked for"
    assert "products-mini" in said, "what exists"
    assert "small" in said


def test_dataset_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    assert "dataset is required" in refused(capsys, "train", *BASE)


def test_empty_split(tmp_path: Path, capsys: pytest.CaptureFixture[str], store: GraphStore) -> None:
    masks = {"train": np.ones(600, dtype=bool), "test": np.zeros(600, dtype=bool)}
    GraphStore.write(
        tmp_path / "store",
        name="unsplit",
        indptr=store.indptr,
        indices=store.indices,
        features=store.features,
        labels=store.labels,
        masks=masks,
    )
    said = refused(capsys, "train", "--dataset", str(tmp_path / "store"), *BASE)
    assert "unsplit" in said
    assert "random:" in said


def write_npz(path: Path, **changes: object) -> Path:
    arrays: dict[str, object] = {
        "edge_index": np.array([[0, 1, 2, 1], [1, 0, 1, 2]], dtype=np.int32),
        "num_nodes": np.int64(4),
        "x": np.ones((4, 3), dtype=np.float32),
        "y": np.array([0, 1, 0, 1], dtype=np.int16),
    }
    np.savez(path, **(arrays | changes))
    return path


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"x": np.array([[0, 1, np.nan]] * 4, dtype=np.float32)}, ["NaN", "4"]),
        ({"y": np.array([0, 1, -2, 1], dtype=np.int16)}, ["-2"]),
        ({"edge_index": np.array([[0, 9], [1, 0]], dtype=np.int32)}, ["9"]),
        ({"x": np.ones((3, 3), dtype=np.float32)}, ["3", "4"]),
        ({"num_nodes": np.uint64(2**63)}, ["9223372036854775808", "from 1 to 3037000499"]),
        ({"y": np.full((4, 2), 2, dtype=np.uint8)}, ["values other than 0 and 1"]),
    ],
)
def test_bad_graphs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, object], said: list[str]
) -> None:
    path = write_npz(tmp_path / "bad.npz", **changes)
    for command in (
        ["data", "import", str(path), "--out", str(tmp_path / "store")],
        ["train", "--dataset", str(path), *BASE],
    ):
        sentence = refused(capsys, *command)
        for text in said:
            assert text in sentence
    assert not (tmp_path / "store").exists()


def weighted(store: GraphStore, path: Path, weight: float) -> GraphStore:
    """The graph with equal weights of all edges, but of one."""
    weights = np.full(store.num_edges, weight, dtype=np.float32)
    weights[7] /= 2
    arrays = {"features": store.features, "labels": store.labels, "indptr": store.indptr, "indices": store.indices}
    return GraphStore.write(path, name="heavy", edge_weight=weights, masks=store.split_masks, **arrays)


@pytest.mark.parametrize("model", ["gcn", "sage"])
def test_weights_whose_sums_are_infinite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], store: GraphStore, model: str
) -> None:
    """They would silence all messages: of equal weights, a mean is that without weights, however large they are."""
    flags = ["--batch-size", "50", "--model", model, *BASE, "--dropout", "0"]
    heavy = weighted(store, tmp_path / "heavy", 3e38)
    said = refused(capsys, "train", "--dataset", str(heavy.path), *flags, "--run-dir", str(tmp_path / "run"))
    source, node = int(store.indices[0]), int(store.indptr.diff().nonzero()[0])
    assert f"the edge from node {source} to node {node} of heavy has the weight 3e+38, and 32-bit" in said
    assert "divide all weights by one number" in said
    assert not (tmp_path / "run").exists()

    losses = []
    for weight in (1e12, 1e30):
        graph = weighted(store, tmp_path / f"{weight:g}", weight)
        run_dir = str(tmp_path / f"run-{weight:g}")
        assert run(capsys, "train", "--dataset", str(graph.path), *flags, "--run-dir", run_dir) == (0, "")
        losses.append(evaluate_run(Path(run_dir))["val"]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    for command in (["evaluate", run_dir], ["predict", run_dir, "--out", str(tmp_path / "p")]):
        assert "has the weight 3e+38" in refused(capsys, *command, "--dataset", str(heavy.path))


@pytest.mark.filterwarnings("error:Initializing zero-element tensors")
@pytest.mark.parametrize("model", ["gcn", "sage"])
def test_a_graph_without_features_is_not_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str
) -> None:
    path = write_npz(tmp_path / "bare.npz", x=np.ones((4, 0), dtype=np.float32))
    command = ["train", "--dataset", str(path), *BASE, "--split", "random:0.5/0.25/0.25", "--batch-size", "1"]
    command += ["--model", model, "--run-dir", str(tmp_path / "run")]
    for flags in ([], ["--dry-run"], ["--batch-size", "full"]):
        assert "graph bare has no features, and all" in refused(capsys, *command, *flags)
    assert not (tmp_path / "run").exists()


def test_broken_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], store: GraphStore) -> None:
    npz = write_npz(tmp_path / "cut.npz")
    npz.write_bytes(npz.read_bytes()[:-100])
    assert "cut.npz" in refused(capsys, "train", "--dataset", str(npz), *BASE)

    cut = tmp_path / "cut"
    shutil.copytree(store.path, cut)
    features = cut / "features.arrow"
    features.write_bytes(features.read_bytes()[:-64])
    assert "features.arrow" in refused(capsys, "train", "--dataset", str(cut), *BASE)

    altered = tmp_path / "altered"
    shutil.copytree(store.path, altered)
    data = bytearray((altered / "features.arrow").read_bytes())
    data[len(data) // 2] ^= 0xFF
    (altered / "features.arrow").write_bytes(data)
    assert "features.arrow" in refused(capsys, "data", "verify", str(altered))
    code, _ = run(capsys, "data", "verify", str(store.path))
    assert code == 0


def test_run_folder_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str], store: GraphStore) -> None:
    command = ["train", "--dataset", str(store.path), *BASE, "--batch-size", "50", "--run-dir", str(tmp_path / "run")]
    code, err = run(capsys, *command)
    assert code == 0, err
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert "--resume" in refused(capsys, *command)
    for change, said in (
        (["--hidden", "9"], "hidden=9 (the run has 8)"),
        (["--model", "sage"], "model='sage' (the run has 'gcn')"),
        (["--seed", "3"], "seed=3 (the run has 0)"),
    ):
        assert said in refused(capsys, *command, *change, "--resume")
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    assert "thesis" not in refused(capsys, *command[:-1], str(foreign))
    assert [p.name for p in foreign.iterdir()] == ["thesis.txt"]
    assert "is a file" in refused(capsys, *command[:-1], str(foreign / "thesis.txt"))
    assert "cannot be written" in refused(capsys, *command[:-1], "/proc/no-such-run")


def test_a_run_that_is_there_is_named_before_a_dataset_that_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], store: GraphStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["train", "--dataset", str(store.path), *BASE, "--batch-size", "50", "--run-dir", "runs/a"]
    assert run(capsys, *command) == (0, "")
    (tmp_path / "c.yaml").write_text("run_dir: runs/a\nhidden: 8\n")
    for given in (["--run-dir", "runs/a"], ["--set", "run_dir=runs/a", "--quiet"], ["--config", "c.yaml"]):
        said = refused(capsys, "train", *given)
        assert "run folder runs/a already holds a run; go on with --resume" in said
        assert "--dataset" in said
    assert "dataset is required" in refused(capsys, "train", "--run-dir", "runs/b")
    assert "--resume needs --run-dir" in refused(capsys, "train", "--resume")
    others = (["evaluate"], ["predict", "--out", "p"], ["export", "--out", "e"])
    for words in (["train", "--resume", "--run-dir"], *others):
        said = refused(capsys, *words, "runs")
        assert ", but has the run a in it; give one of them" in said
        assert said.startswith("dngd: runs is no run")
    for flags, fix in ((["--resume"], "go on with one of them"), ([], f"such as {tmp_path / 'runs' / 'new'}")):
        said = refused(capsys, *command[:-1], "runs", *flags)
        assert ", but has the run a in it; " in said
        assert said.endswith(f"{fix}\n")


def test_the_runs_in_a_folder_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Five at most; other folders and files are none."""
    for name in "gfedcba":
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.yaml").write_text("dataset: cora\n")
    (tmp_path / "runs" / "_data").mkdir()
    (tmp_path / "runs" / "_notes").touch()
    said = refused(capsys, "evaluate", str(tmp_path / "runs"))
    assert said.endswith(", but has the runs a, b, c, d, e and 2 more in it; give one of them\n")
    assert " does not exist; " in refused(capsys, "evaluate", str(tmp_path / "rnus"))


def test_a_resume_names_the_flags_that_are_in_its_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], store: GraphStore
) -> None:
    """Not the two dozen settings that follow from one of them, which nobody gave."""
    folder = tmp_path / "run"
    code, err = run(
        capsys, "train", "--dataset", str(store.path), *BASE, "--batch-size", "50", "--run-dir", str(folder)
    )
    assert code == 0, err
    begin, end = (
        "dngd: cannot resume with another ",
        "; use the run's own settings, or another --run-dir for a new run\n",
    )
    for flags, named, follow in (
        (["--optimizer", "adam"], ["optimizer='adam' (the run has 'kfac')"], ", which changes kfac.change_threshold, "),
        (["--task", "link"], ["task='link' (the run has 'node')"], ", which changes "),
        (["--model", "sage"], ["model='sage' (the run has 'gcn')"], ""),
        (
            ["--set", "kfac.update=momentum"],
            ["kfac.update='momentum' (the run has 'mean_gradient')"],
            ", which changes ",
        ),
        (
            ["--seed", "1", "--model", "sage", "--dropout", "0.1", "--lr", "1", "--warmup-steps", "2"],
            [
                "dropout=0.1 (the run has 0.5)",
                "lr=1.0 (the run has 0.3)",
                "model='sage' (the run has 'gcn')",
                "seed=1 (the run has 0)",
                "warmup_steps=2 (the run has 0)",
            ],
            "",
        ),
    ):
        said = refused(capsys, "train", "--run-dir", str(folder), "--resume", "--quiet", *flags)
        assert said.startswith(begin + ", ".join(named) + follow), said
        assert said.endswith(end)
        assert len(said) - len(begin + end) < 200 + 40 * len(named), said
        assert follow or said == begin + ", ".join(named) + end


def test_there_is_no_run_to_go_on_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("typo", "empty"):
        for flags in (["--run-dir", name, "--resume"], ["--set", f"run_dir={name}", "--resume", "--epochs", "3"]):
            said = refused(capsys, "train", *flags)
            assert f"there is no run at {name} to go on with; check --run-dir" in said
    assert list(tmp_path.rglob("*")) == [tmp_path / "empty"]


def test_resume_on_another_graph(tmp_path: Path, capsys: pytest.CaptureFixture[str], store: GraphStore) -> None:
    command = ["train", *BASE, "--batch-size", "50", "--run-dir", str(tmp_path / "run"), "--dataset"]
    code, err = run(capsys, *command, str(store.path))
    assert code == 0, err
    from tests.helpers.graphs import small_store

    other = small_store(tmp_path / "other", seed=1)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert "another graph" in refused(capsys, *command, str(other.path), "--resume", "--epochs", "9")
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def test_a_run_that_will_not_fit(
    capsys: pytest.CaptureFixture[str], store: GraphStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    wide = ["train", "--dataset", str(store.path), *BASE, "--batch-size", "50", "--hidden", "65536"]
    wide += ["--num-layers", "16", "--fanout", ",".join(["5"] * 16)]
    for flags in (wide, [*wide, "--dry-run"]):
        said = refused(capsys, *flags)
        assert "largest part: weights" in said
        assert "smaller --hidden" in said


def test_dry_run_starts_nothing(
    capsys: pytest.CaptureFixture[str], store: GraphStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["train", "--dataset", str(store.path), *BASE, "--batch-size", "50", "--dry-run"])
    assert exit_info.value.code == 0
    out = capsys.readouterr().out
    # 240 training nodes of 5 classes
    for text in ("curvature", "A dense 17", "wire ", "nothing: it is one process", "samplers", "kfac.damping "):
        assert text in out
    assert f"{0.1 / 240**0.5:.4g}" in out
    assert "wire: gradient" not in out
    on_ray = ["--dataset", str(store.path), *BASE, "--batch-size", "50", "--engine", "ray", "--num-workers", "2"]
    with pytest.raises(SystemExit):
        cli.main(["train", *on_ray, "--dry-run", "--json"])
    resolved = json.loads(capsys.readouterr().out)["resolved"]
    assert resolved["kfac.damping"] == pytest.approx(0.1 / 240**0.5)
    assert (resolved["seeds_per_step"], resolved["steps_per_epoch"], resolved["ray.min_workers"]) == (100, 3, 2)
    with pytest.raises(SystemExit):
        cli.main(["train", *on_ray, "--dry-run"])
    assert "wire: gradient" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["evaluate", "report"])
def test_not_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert str(tmp_path) in refused(capsys, command, str(tmp_path))


def test_help_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["--help"])
    assert exit_info.value.code == 0
    out = capsys.readouterr().out
    for command in ("train", "evaluate", "report", "doctor", "data"):
        assert command in out


BILLION_LAUGHS = "a0: &a0 {x: 1, y: 1}\n" + "\n".join(
    f"a{i}: &a{i} {{p: *a{i - 1}, q: *a{i - 1}}}" for i in range(1, 23)
)
"""Half a kilobyte that stands for 25 million values."""


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("on: 3", ["key True", "yes and no", "quote"]),
        ("1: 2", ["key 1,", "quote"]),
        ("kfac: {no: 1}", ["key False", "quote"]),
        ("seed: 2020-99-99", ["not YAML", "month must be in 1..12", "quote"]),
        ("seed: !!timestamp x", ["not YAML", "quote"]),
        ("seed: " + "[" * 5000 + "]" * 5000, ["nested too deeply"]),
        (BILLION_LAUGHS, ["c.yaml has aliases that stand for more than 10000 values; write out what is meant"]),
        ("kfac: &a {rank: *a}", ["c.yaml is nested in itself, by an alias that leads back; write out what is meant"]),
        ("seed: &n 0\nepochs: *n", ["epochs=0"]),
        ("x" * 200 + ": 1", ["configuration key 'xxx", "...' is unknown"]),
        ("epochs: [" + "1, " * 200 + "1]", ["epochs=[1, 1, 1", "1... is not valid"]),
        ("hidden: 0x" + "f" * 5000, ["hidden=(a number of thousands of digits) is not valid"]),
        ("self: 1", ["'self' is unknown"]),
        ("lr: .nan", ["lr=nan", "finite"]),
        ("epochs: 3\nseed: 1\nepochs: 4", ["c.yaml has the key 'epochs' twice, in lines 1 and 3; keep one"]),
        ("kfac:\n  rank: 4\n  'rank': 4", ["'rank' twice, in lines 2 and 3"]),
        ("dataset: karate", ["'dataset' twice, in lines 1 and 2"]),
        ("kfac.damping: 0.02", ["'kfac.damping' is unknown", "nested: kfac: {damping: 0.02}"]),
        ("epochs: on", ["epochs=True", "true or false"]),
        ("run_dir: 4", ["run_dir=4", "quotes"]),
        ("a: [1", ["not YAML: line 2, column 8: ", "mend it"]),
    ],
)
def test_wrong_configuration_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, said: list[str]
) -> None:
    (tmp_path / "c.yaml").write_text(f"{content}\ndataset: cora\n")
    told = refused(capsys, "train", "--config", str(tmp_path / "c.yaml"), "--dry-run")
    for text in said:
        assert text in told
    assert len(told) < 3000


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty; mend it there, or give another file"),
        (b"# later\n", "is empty;"),
        (b"- dataset: cora\n", "holds a list, not fields as in 'hidden: 64'; mend it"),
        (b"cora", "holds one text, not fields"),
        (b"3", "holds one value, not fields"),
        (b"\x89PNG\r\n\x1a\n", "is no text in UTF-8, as YAML is; mend it"),
        (b"\0\0\0", "is not YAML: "),
        (None, "cannot be read: Is a directory; give the path of a YAML file"),
    ],
)
def test_what_is_no_configuration_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, said: str
) -> None:
    path = tmp_path / "c.yaml"
    path.mkdir() if content is None else path.write_bytes(content)
    assert f"configuration file {path} {said}" in refused(capsys, "train", "--config", str(path), "--dry-run")


@pytest.mark.parametrize(
    ("written", "value"),
    [("010", 10), ("08", 8), ("0", 0), ("00", 0), ("1_000", 1000), ("0x10", 16), ("+7", 7)],
)
def test_numbers_are_read_as_flags_read_them(tmp_path: Path, written: str, value: int) -> None:
    assert TrainConfig(dataset="x", **parse_assignment(f"seed={written}")).seed == value
    (tmp_path / "c.yaml").write_text(f"dataset: x\nseed: {written}\n")
    assert TrainConfig.from_yaml(tmp_path / "c.yaml").seed == value


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("eval_memory_bytes=1e9", 10**9),
        ("epochs=1e2", 100),
        ("epochs=+1.5E+1", 15),
        ("batch_size=1e3", 1000),
        ("batch_size='1e3'", 1000),
        ("num_layers=1e0", 1),
        ("fanout=[1e1,5,5]", (10, 5, 5)),
        ("fanout=1e1,5,5", (10, 5, 5)),
        ("class_weights=[1e1, 2]", (10.0, 2.0)),
        ("lr=1e-3", 1e-3),
        ("dataset=1e3", "1e3"),
        ("split=1e3", "1e3"),
        ("run_dir=1e3", Path("1e3")),
        ("loggers=tensorboard, wandb", ("tensorboard", "wandb")),
    ],
)
def test_whole_numbers_may_be_written_with_an_exponent(tmp_path: Path, written: str, value: object) -> None:
    """As messages write them; in a field of texts the same is a text, as it was typed, and stays so in a run's file."""
    name = written.partition("=")[0]
    config = TrainConfig(**({"dataset": "x"} | parse_assignment(written)))
    found = getattr(config, name)
    assert found == value
    assert type(found) is type(value)
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    assert TrainConfig.from_yaml(tmp_path / "c.yaml") == config
    resources = parse_assignment("ray.resources_per_worker={memory: 8e9}")
    assert TrainConfig(dataset="x", **resources).ray.resources_per_worker == {"memory": 8e9}


def test_a_key_may_be_there_again_in_another_section_or_over_a_merged_one(tmp_path: Path) -> None:
    text = "kfac: &k {momentum: 0.5, rank: 4}\nmomentum: 0.1\ndataset: x\n"
    (tmp_path / "c.yaml").write_text(text)
    assert TrainConfig.from_yaml(tmp_path / "c.yaml").kfac.momentum == 0.5
    (tmp_path / "m.yaml").write_text("a: &a {rank: 4, method: ekfac}\nb: &b {<<: *a, rank: 5}\nc: {<<: *b, rank: 6}")
    assert read_yaml(tmp_path / "m.yaml")["c"] == {"rank": 6, "method": "ekfac"}


@pytest.mark.parametrize(
    "arguments",
    [
        ("data", "import", "~no-such-user/x", "--out", "new"),
        ("data", "import", "GRAPH", "--out", "~no-such-user/x"),
        ("data", "synth", "--out", "~no-such-user/x"),
        ("data", "info", "~no-such-user/x"),
        ("data", "verify", "~no-such-user/x"),
        ("evaluate", "~no-such-user/x"),
        ("report", "~no-such-user/x"),
        ("report", "GRAPH", "--out", "~no-such-user/x"),
        ("predict", "GRAPH", "--out", "~no-such-user/x"),
        ("export", "GRAPH", "--out", "~no-such-user/x"),
        ("bench", "comm", "--out", "~no-such-user/x"),
        ("bench", "accuracy", "--svg", "~no-such-user/x"),
        ("bench", "paper", "--out", "~no-such-user/x"),
    ],
    ids=" ".join,
)
def test_no_such_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "g.npz", edge_index=np.array([[0, 1], [1, 2]]), num_nodes=3, x=np.ones((3, 1)))
    told = refused(capsys, *(str(tmp_path / "g.npz") if word == "GRAPH" else word for word in arguments))
    assert "~no-such-user/x begins with ~no-such-user" in told
    assert [path.name for path in tmp_path.iterdir()] == ["g.npz"]


def test_a_run_whose_cache_folder_is_gone_for_good(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its model came here with it, say, and the folder's place cannot be written here."""
    ring = np.arange(60)
    masks = {f"{name}_mask": ring % 3 == turn for turn, name in enumerate(("train", "val", "test"))}
    links = np.stack([ring, (ring + 1) % 60])
    np.savez(tmp_path / "g.npz", edge_index=links, num_nodes=60, x=np.eye(60, 4), y=ring % 2, **masks)
    folder, cache = tmp_path / "run", tmp_path / "cache"
    flags = ["--cache-dir", str(cache), "--batch-size", "20", "--run-dir", str(folder)]
    assert run(capsys, "train", "--dataset", str(tmp_path / "g.npz"), *BASE, *flags)[0] == 0
    shutil.rmtree(cache)
    cache.touch()
    out = tmp_path / "predictions.parquet"
    for command in (["evaluate", str(folder)], ["predict", str(folder), "--out", str(out)]):
        told = refused(capsys, *command)
        assert "choose another folder by" in told
        assert "--cache-dir" in told
        assert run(capsys, *command, "--cache-dir", str(tmp_path / "other"))[0] == 0
    assert out.exists()
    assert len(list((tmp_path / "other").iterdir())) == 2


def test_a_tilde_that_the_shell_left_is_the_home_folder(
    tmp_path: Path, store: GraphStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    for arguments in (
        ["train", "--dataset", str(store.path), *BASE, "--batch-size", "50", "--run-dir", "~/run"],
        ["data", "synth", "--nodes", "200", "--edges", "800", "--classes", "3", "--out=~/synth"],
        ["data", "import", "~/g.npz", "--out=~/imported"],
        ["data", "import", "~/g.npz", "--out=~/ordered", "--order", "degree"],
        ["data", "partition", "~/synth", "--parts", "2", "--method", "ldg", "--reorder", "--out=~/parts"],
        ["report", "~/run", "--out=~/page.html"],
        ["predict", "~/run", "--out=~/predictions.parquet"],
    ):
        np.savez(home / "g.npz", edge_index=np.array([[0, 1], [1, 2]]), num_nodes=3, x=np.ones((3, 1)))
        assert run(capsys, *arguments)[0] == 0, arguments
        assert list(here.iterdir()) == [], arguments
    made = {"run", "synth", "imported", "ordered", "parts", "page.html", "predictions.parquet"}
    assert {path.name for path in home.iterdir()} == {"g.npz", *made}
    (home / "notes.html").write_text("mine")
    assert "is no dngd report" in refused(capsys, "report", "~/run", "--out=~/notes.html")
    assert (home / "notes.html").read_text() == "mine"


def test_names_are_printed_as_they_are(
    tmp_path: Path, store: GraphStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not as rich's markup: [/x] would end the command, [red] and :x: would be eaten."""
    monkeypatch.setenv("COLUMNS", "300")

    def shown(*arguments: str) -> str:
        with pytest.raises(SystemExit) as exit_info:
            cli.main(list(arguments))
        told = capsys.readouterr()
        assert exit_info.value.code == 0, told.err
        return told.out + told.err

    np.savez(tmp_path / "g.npz", edge_index=np.array([[0, 1], [1, 2]]), num_nodes=3, x=np.ones((3, 1)))
    name = "[/x] [red] :x:"
    graph = str(tmp_path / "[red]" / "graph[")
    assert name in shown("data", "import", str(tmp_path / "g.npz"), "--out", graph, "--name", name)
    assert name in shown("data", "info", graph)
    assert f"{graph}: every" in shown("data", "verify", graph)
    folder = str(tmp_path / "[red][" / "x]")
    (tmp_path / "link [").symlink_to(store.path)
    loud = [word for word in BASE if word != "--quiet"]
    flags = [*loud, "--batch-size", "50", "--run-dir", folder]
    told = shown("train", "--dataset", str(tmp_path / "link ["), *flags)
    assert f"run folder  {folder}\n" in told
    assert f"reading {tmp_path / 'link ['}\n" in told
    assert f"{folder}:modelofstep" in "".join(shown("evaluate", folder).split()), "a title may be broken"
    page = str(tmp_path / "[red][") + "/page :x:.html"
    assert f"{page}\n" in shown("report", folder, "--out", page)
    assert f"{page}.parquet: 600 nodes" in shown("predict", folder, "--out", f"{page}.parquet")
