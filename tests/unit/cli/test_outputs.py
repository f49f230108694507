"""What commands write into files: never over a run's own files, into a graph's store, or over what is no file."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import dngd
from dngd import cli
from dngd.errors import UserError
from dngd.graph import GraphStore
from dngd.train.run_folder import check_output

pytestmark = pytest.mark.usefixtures("one_thread")

COMMANDS = {
    "predict": ("predict", "RUN", "--overwrite"),
    "safetensors": ("export", "RUN", "--overwrite"),
    "pyg": ("export", "RUN", "--format", "pyg", "--overwrite"),
    "report": ("report", "RUN"),
}


@pytest.fixture(scope="module")
def trained(store: GraphStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, a copy of it, and its graph."""
    folder = tmp_path_factory.mktemp("outputs")
    shutil.copytree(store.path, folder / "graph")
    config = dngd.TrainConfig(
        dataset=str(folder / "graph"),
        run_dir=folder / "run",
        engine="local",
        num_layers=2,
        fanout=(4, 4),
        hidden=8,
        batch_size=60,
    )
    dngd.Trainer(config.model_copy(update={"max_steps": 2}), quiet=True).fit()
    shutil.copytree(folder / "run", folder / "other")
    return folder


@pytest.fixture
def place(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a copy of that folder for a test to spoil."""
    shutil.copytree(trained, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return Path()


def ended(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Return exit code and standard error of the command line."""
    with pytest.raises(SystemExit) as exit_info:
        cli.main(list(arguments))
    return int(exit_info.value.code or 0), capsys.readouterr().err


def command(name: str, out: str) -> list[str]:
    return [{"RUN": "run"}.get(word, word) for word in COMMANDS[name]] + ["--out", out]


def content(folder: Path) -> dict[str, bytes | str]:
    """Return all files below a folder, and what is none of them."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        found[str(path)] = path.read_bytes() if path.is_file() and not path.is_symlink() else oct(path.lstat().st_mode)
    return found


RUNS_OWN = (
    *("config.yaml", "metrics.jsonl", "metrics.csv", "health.jsonl", "result.json", "model.safetensors", "report.html"),
    *("checkpoints/free", "checkpoints/step-00000002/model.safetensors", "ray", "mlflow.db", "wandb/x"),
    "events.out.tfevents.1.host",
)
TAKEN = ("fifo", "link-to-fifo", "link-to-model", "graph/labels.arrow", "other/result.json", "s3://bucket/new")


@pytest.mark.parametrize("name", COMMANDS)
def test_nothing_of_a_run_a_store_or_the_system_is_replaced(
    place: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    os.mkfifo("fifo")
    Path("link-to-fifo").symlink_to("fifo")
    Path("link-to-model").symlink_to("other/model.safetensors")
    Path("run/health.jsonl").write_bytes(b"")  # a report replaces an empty file
    before = content(place)
    for target in (*TAKEN, "run/health.jsonl", *(["run", "graph"] if name == "pyg" else ["graph/new"])):
        code, said = ended(capsys, *command(name, target))
        assert (code, said.count("\n")) == (2, 1), (target, said)
        assert f"--out {target} " in said, (target, said)
        assert said.rpartition("; ")[2].startswith("give "), (target, said)
        assert content(place) == before, target


@pytest.mark.parametrize("own", RUNS_OWN)
def test_a_runs_own_names_are_taken_in_each_run_folder(place: Path, own: str) -> None:
    """Whether the file is there or not, however the folder is named, and with the run under way or damaged."""
    Path("link-to-run").symlink_to("run")
    for traces in ("config.yaml", "model.safetensors"):  # of runs that are read, however little is left of them
        Path("run", traces).unlink()
        for run in ("run", "link-to-run", "other/../run"):
            with pytest.raises(UserError, match=f"--out {run}/{own} would take the place of"):
                check_output(Path(run, own), [Path("run")])
    for trace in ("result.json", "metrics.jsonl", None):  # of others, which are told by what they hold
        with pytest.raises(UserError, match=f"--out other/{own} would take the place of"):
            check_output(Path("other", own), [Path("run")])
        if trace is not None:
            Path("other", trace).unlink()
    check_output(Path("run/report.html"), [Path("run")], page="report.html")
    with pytest.raises(UserError, match=r"place of report\.html of the run"):
        check_output(Path("other/report.html"), [Path("run")], page="report.html")


@pytest.mark.parametrize("name", COMMANDS)
def test_other_names_are_free(place: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """In the run's folder too, below it, over an earlier file of the same kind, and through a link, which stays."""
    Path("here").symlink_to("elsewhere")
    Path("notes").mkdir()
    Path("notes/config.yaml").write_text("a: 1\n")  # of another program: no run
    Path("notes/manifest.json").write_text("{}")
    Path("notes/checkpoints").mkdir()
    Path("run/more").mkdir()
    for target in ["run/mine", "run/more/mine", "here", "notes/result.json", "notes/checkpoints/mine", "mine", "mine"]:
        code, said = ended(capsys, *command(name, target))
        assert code == 0, (target, said)
        assert Path(target).is_dir() == (name == "pyg")
    if name != "pyg":
        assert Path("here").is_symlink()
        assert Path("elsewhere").is_file()
    assert ended(capsys, "report", "run", "--out", "run/report.html")[0] == 0


def test_an_export_replaces_no_module_of_ones_own(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for taken in ("model.py", "model.safetensors"):
        Path(f"with-{taken}").mkdir()
        Path(f"with-{taken}", taken).write_text("mine")
        code, said = ended(capsys, *command("pyg", f"with-{taken}"))
        assert code == 2
        assert f"holds a {taken} that is no export" in said
        assert content(Path(f"with-{taken}")) == {f"with-{taken}/{taken}": b"mine"}


def test_predictions_do_not_replace_the_pairs_they_are_of(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("pairs.csv").write_text("src,dst\n0,1\n")
    Path("again.csv").symlink_to("pairs.csv")
    for target in ("pairs.csv", "again.csv"):
        code, said = ended(capsys, *command("predict", target), "--pairs", "pairs.csv")
        assert code == 2
        assert f"--out {target} is the table that --pairs names" in said
        assert Path("pairs.csv").read_text() == "src,dst\n0,1\n"


def test_a_prediction_in_the_run_folder_is_whole(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(capsys, *command("predict", "run/predictions.parquet"))[0] == 0
    assert pq.read_table("run/predictions.parquet").num_rows == 600
