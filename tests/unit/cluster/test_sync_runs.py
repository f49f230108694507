"""cluster/sync_runs.py: what is copied, when, and what never is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.fs as pafs
import pytest

SCRIPT = Path(__file__).parents[3] / "cluster" / "sync_runs.py"


def tree(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def copy_changed(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import sync_runs

    return sync_runs.copy_changed


def test_rounds(copy_changed: object, tmp_path: Path) -> None:
    assert callable(copy_changed)
    source, target = tmp_path / "runs", tmp_path / "bucket"
    write(source / "one/metrics.jsonl", "1\n")
    write(source / "one/checkpoints/step-1/state", "first")
    write(source / "one/checkpoints/.step-2.partial/state", "unfinished")
    seen: dict[str, tuple[int, int]] = {}

    def copy() -> int:
        return int(copy_changed(source, pafs.LocalFileSystem(), str(target), seen))

    assert copy() == 2
    assert tree(target) == {"one/metrics.jsonl": "1\n", "one/checkpoints/step-1/state": "first"}
    assert copy() == 0, "what has not changed is not copied again"

    write(source / "one/metrics.jsonl", "1\n2\n")
    write(source / "one/checkpoints/step-3/state", "third")
    assert copy() == 2
    write(source / "one/checkpoints/step-5/state", "fifth")
    (source / "one/checkpoints/step-3/state").unlink()
    (source / "one/checkpoints/step-1/state").unlink()
    write(source / "two/config.yaml", "x")
    os.unlink(source / "two/config.yaml")
    assert copy() == 1
    assert tree(target) == {"one/metrics.jsonl": "1\n2\n", "one/checkpoints/step-5/state": "fifth"}

    (source / "one/metrics.jsonl").unlink()
    assert copy() == 0
    assert "one/metrics.jsonl" in tree(target), "only checkpoints are ever removed"


def test_the_script(tmp_path: Path) -> None:
    write(tmp_path / "runs/one/result.json", "{}")
    command = [sys.executable, str(SCRIPT), str(tmp_path / "runs"), f"file://{tmp_path}/bucket", "--once"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "copied 1 files" in done.stdout
    assert tree(tmp_path / "bucket") == {"one/result.json": "{}"}


def test_a_copy_outlives_its_source(copy_changed: object, tmp_path: Path) -> None:
    """A folder that is unmounted, moved or deleted takes no copy along; a checkpoint goes once a newer one is there."""
    assert callable(copy_changed)
    source, target = tmp_path / "runs", tmp_path / "bucket"
    for run in ("one", "two"):
        for step in (1, 2):
            write(source / f"{run}/checkpoints/step-0000000{step}/state", f"{run} {step}")
    seen: dict[str, tuple[int, int]] = {}

    def copy() -> int:
        return int(copy_changed(source, pafs.LocalFileSystem(), str(target), seen))

    assert copy() == 4
    whole = tree(target)
    source.rename(tmp_path / "elsewhere")
    assert copy() == 0
    assert tree(target) == whole

    (tmp_path / "elsewhere").rename(source)
    shutil.rmtree(source / "two")
    shutil.rmtree(source / "one/checkpoints/step-00000002")
    assert copy() == 0
    assert tree(target) == whole, "no newer one of the run is there"

    shutil.rmtree(source / "one/checkpoints/step-00000001")
    write(source / "one/checkpoints/step-00000012/state", "one 12")
    assert copy() == 1
    assert tree(target) == {
        "one/checkpoints/step-00000012/state": "one 12",
        "two/checkpoints/step-00000001/state": "two 1",
        "two/checkpoints/step-00000002/state": "two 2",
    }


def test_a_checkpoint_that_is_gone_from_the_bucket_stops_no_other(copy_changed: object, tmp_path: Path) -> None:
    assert callable(copy_changed)
    source, target = tmp_path / "runs", tmp_path / "bucket"
    for step in (1, 2, 3):
        write(source / f"one/checkpoints/step-{step}/state", str(step))
    seen: dict[str, tuple[int, int]] = {}
    copy_changed(source, pafs.LocalFileSystem(), str(target), seen)
    (target / "one/checkpoints/step-1/state").unlink()
    for step in (1, 2):
        (source / f"one/checkpoints/step-{step}/state").unlink()
    copy_changed(source, pafs.LocalFileSystem(), str(target), seen)
    assert tree(target) == {"one/checkpoints/step-3/state": "3"}
    assert list(seen) == ["one/checkpoints/step-3/state"]


def test_a_source_that_is_not_there(tmp_path: Path) -> None:
    """Refused for one round; else said, and waited for: it may not be mounted yet."""
    command = [sys.executable, str(SCRIPT), str(tmp_path / "runs"), f"file://{tmp_path}/bucket"]
    done = subprocess.run([*command, "--once"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert f"{tmp_path}/runs is no folder; give the one that holds the runs" in done.stderr
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*command, "--period", "0.2"], text=True, **streams) as waiting:
        try:
            assert waiting.stderr is not None
            assert waiting.stdout is not None
            assert f"not copied to file://{tmp_path}/bucket: {tmp_path}/runs is no folder" in waiting.stderr.readline()
            write(tmp_path / "runs/one/result.json", "{}")
            assert "copied 1 files" in waiting.stdout.readline()
        finally:
            waiting.kill()


@pytest.mark.parametrize(("flags", "code"), [([], 0), (["--once"], 2)])
def test_a_second_one_leaves_a_folder_to_the_first(tmp_path: Path, flags: list[str], code: int) -> None:
    write(tmp_path / "runs/one/result.json", "{}")
    (tmp_path / "link").symlink_to(tmp_path / "runs")
    command = [sys.executable, str(SCRIPT)]
    target = f"file://{tmp_path}/bucket"
    with subprocess.Popen([*command, str(tmp_path / "runs"), target], stdout=subprocess.PIPE, text=True) as first:
        try:
            assert first.stdout is not None
            assert "copied 1 files" in first.stdout.readline()
            second = [*command, str(tmp_path / "link"), target, *flags]
            done = subprocess.run(second, capture_output=True, text=True, timeout=60)
            assert (done.returncode, done.stdout) == (code, "")
            assert "is being copied by another sync_runs.py" in done.stderr
        finally:
            first.kill()
    done = subprocess.run([*second, "--once"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, "the lock goes with its process"
