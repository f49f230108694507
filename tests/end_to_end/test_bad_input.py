"""A user's mistakes: one sentence with the value and the fix, exit code 2, nothing overwritten."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from dngd import cli
from dngd.graph import GraphStore

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
        (["--batch-size", "many"], ["batch_size='many'", "full"]),
        (["--model", "gat"], ["model='gat'", "gcn", "sage"]),
        (["--optimizer", "lion"], ["optimizer='lion'", "kfac"]),
        (["--split", "random:0.5/0.6"], ["random:0.5/0.6"]),
        (["--split", "complete"], ["complete"]),
        (["--split", "nonsense"], ["nonsense", "random:"]),
        (["--set", "kfac.dampin=1"], ["kfac.dampin", "did you mean kfac.damping?"]),
        (["--set", "hiden=1"], ["hiden", "did you mean hidden?"]),
        (["--set", "hidden"], ["hidden", "key=value"]),
        (["--damping", "0"], ["kfac.damping=0", "greater than 0"]),
        (["--lr", "-1"], ["lr=-1"]),
        (["--use-gpu"], ["--use-gpu", "no CUDA device"]),
        (["--num-workers", "3", "--num-shards", "2"], ["num_workers=3", "num_shards=2"]),
        (["--resume"], ["--resume needs --run-dir"]),
        (["--run-dir", "hdfs://bucket/run"], ["run_dir=hdfs://", "s3://"]),
        (["--config", "missing.yaml"], ["missing.yaml", "cannot be read"]),
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


def test_resume_on_another_graph(tmp_path: Path, capsys: pytest.CaptureFixture[str], store: GraphStore) -> None:
    command = ["train", *BASE, "--batch-size", "50", "--run-dir", str(tmp_path / "run"), "--dataset"]
    code, err = run(capsys, *command, str(store.path))
    assert code == 0, err
    from tests.helpers.graphs import small_store

    other = small_store(tmp_path / "other", seed=1)
    assert "another graph" in refused(capsys, *command, str(other.path), "--resume")


def test_a_run_that_will_not_fit(
    capsys: pytest.CaptureFixture[str], store: GraphStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    wide = ["train", "--dataset", str(store.path), *BASE, "--batch-size", "50", "--set", "hidden=3000000"]
    assert "GiB" in refused(capsys, *wide)
    assert "GiB" in refused(capsys, *wide, "--dry-run")


def test_dry_run_starts_nothing(
    capsys: pytest.CaptureFixture[str], store: GraphStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["train", "--dataset", str(store.path), *BASE, "--batch-size", "50", "--dry-run"])
    assert exit_info.value.code == 0
    out = capsys.readouterr().out
    for text in ("curvature", "A dense 17", "wire: gradient", "samplers"):
        assert text in out
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
