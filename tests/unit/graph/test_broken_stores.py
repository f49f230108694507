"""A store is whole or it is not opened: altered bytes, interrupted writes, full disks, overwriting."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dngd import cli
from dngd.errors import UserError
from dngd.graph import (
    FORMAT_VERSION,
    GraphStore,
    RowBlocks,
    StoreBuilder,
    builder,
    checked,
    edge_sort,
    open_checked,
    resolve_dataset,
    staging,
    verify_store,
)

ARROW = (
    "indptr.arrow",
    "indices.arrow",
    "edge_weight.arrow",
    "features.arrow",
    "labels.arrow",
    "splits.arrow",
    "node_ids.arrow",
)


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << (position % 8)
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("name", ARROW)
def test_a_flipped_byte_anywhere_is_found(small: GraphStore, name: str) -> None:
    path = small.path / name
    entry = small.manifest.files[name]
    size = path.stat().st_size
    original = path.read_bytes()
    end = entry.data_offset + entry.data_bytes
    for position in {*range(0, size, 29), size - 1, entry.data_offset, end - 1}:
        flip(path, position)
        if not entry.data_offset <= position < end:
            with pytest.raises(UserError, match=r"altered header or footer.*dngd data verify") as caught:
                GraphStore.open(small.path)
            assert name in str(caught.value)
        assert any(name in problem for problem in verify_store(small.path)), position
        path.write_bytes(original)
    assert small.verify() == []


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> GraphStore:
    """A store of every kind of column: weights, 16-bit features, several splits, string ids."""
    rng = np.random.default_rng(1)
    num_nodes = 40
    return GraphStore.write(
        tmp_path_factory.mktemp("rich") / "store",
        edge_index=rng.integers(0, num_nodes, (2, 200)),
        edge_weight=rng.random(200),
        duplicates="sum",
        features=rng.standard_normal((num_nodes, 5)),
        feature_dtype="bfloat16",
        labels=rng.integers(0, 3, num_nodes),
        masks={"train": rng.random((2, num_nodes)) < 0.5, "test": np.ones((2, num_nodes), dtype=bool)},
        node_ids=[f"node-{k * k}" for k in range(num_nodes)],
    )


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(file=st.sampled_from([*ARROW, "manifest.json"]), where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_of_any_file_is_found(rich: GraphStore, file: str, where: float, bit: int) -> None:
    path = rich.path / file
    original = path.read_bytes()
    at = int(where * len(original))
    entry = rich.manifest.files.get(file)
    in_values = entry is not None and entry.data_offset <= at < entry.data_offset + entry.data_bytes
    changed = bytearray(original)
    changed[at] ^= 1 << bit
    path.write_bytes(bytes(changed))
    try:
        # What verify finds names the file; of the manifest, its format version may be named instead.
        problems = verify_store(rich.path)
        assert any(file in problem or "format version" in problem for problem in problems)
        if not in_values:
            with pytest.raises(UserError):
                GraphStore.open(rich.path)
    finally:
        path.write_bytes(original)
    assert GraphStore.open(rich.path).node_ids[3].as_py() == "node-9"


def test_altered_strings_are_refused_before_they_are_read(rich: GraphStore, tmp_path: Path) -> None:
    """Offsets that lead outside the file, under a file that opens."""
    shutil.copytree(rich.path, tmp_path / "g")
    entry = rich.manifest.files["node_ids.arrow"]
    with (tmp_path / "g" / "node_ids.arrow").open("r+b") as file:
        file.seek(entry.data_offset + 4 * 7)
        file.write((2**31 - 1).to_bytes(4, "little"))
    store = GraphStore.open(tmp_path / "g")
    with pytest.raises(UserError, match=r"node_ids\.arrow holds broken strings.*dngd data verify"):
        _ = store.node_ids
    assert len([problem for problem in store.verify() if "node_ids.arrow" in problem]) == 2


def test_a_store_of_version_1_opens(arrays: dict[str, Any], tmp_path: Path) -> None:
    """Its manifest holds the fields of that version, of which none may be added or lost in reading."""
    small = GraphStore.write(tmp_path / "small", **{**arrays, "node_ids": None})
    manifest = small.manifest.model_copy(update={"format_version": 1})
    path = small.path / "manifest.json"
    path.write_text(manifest.to_text())
    assert list(json.loads(path.read_text())) == [
        *("format", "format_version", "name", "num_nodes", "num_edges", "num_features", "num_classes", "num_labelled"),
        *("directed", "edge_direction", "self_loops", "duplicates", "masks", "files", "provenance", "checksum"),
    ]
    again = GraphStore.open(small.path)
    assert again.manifest.format_version == 1
    assert again.node_ids is None
    assert again.verify() == []


def test_a_flipped_byte_in_the_manifest_is_found_at_open(small: GraphStore) -> None:
    path = small.path / "manifest.json"
    original = path.read_bytes()
    # Every newline too: white space is what JSON itself would ignore.
    newlines = [k for k, byte in enumerate(original) if byte in b"\n "][::11]
    for position in [*range(0, len(original), 13), *newlines]:
        changed = bytearray(original)
        changed[position] = ord("\t") if position in newlines else changed[position] ^ 1
        path.write_bytes(bytes(changed))
        with pytest.raises(UserError, match=r"manifest|format version"):
            GraphStore.open(small.path)
        assert verify_store(small.path)
    path.write_bytes(original)
    assert small.verify() == []


@pytest.mark.parametrize("name", [*ARROW, "manifest.json"])
@pytest.mark.parametrize("size", ["empty", "half", "one short", "one more", "gone"])
def test_truncated_and_missing_files_are_refused_at_open(small: GraphStore, name: str, size: str) -> None:
    path = small.path / name
    data = path.read_bytes()
    if size == "gone":
        path.unlink()
    else:
        path.write_bytes(
            {"empty": b"", "half": data[: len(data) // 2], "one short": data[:-1], "one more": data + b"\n"}[size]
        )
    with pytest.raises(UserError, match=name):
        GraphStore.open(small.path)
    assert any(name in problem for problem in verify_store(small.path))


def test_values_out_of_range_are_named_even_under_right_hashes(arrays: dict[str, Any], tmp_path: Path) -> None:
    """What a buggy writer would leave: consistent checksums over arrays that make no graph."""
    from dngd.graph.arrow_files import write_columns
    from dngd.graph.manifest import read_manifest

    store = GraphStore.write(tmp_path / "g", **arrays)
    indices = store.indices.numpy().copy()
    indices[5] = 99
    labels = np.full(store.num_nodes, 50)
    files = dict(store.manifest.files)
    files["indices.arrow"] = write_columns(store.path / "indices.arrow", {"indices": indices})
    files["labels.arrow"] = write_columns(store.path / "labels.arrow", {"labels": labels})
    manifest = read_manifest(store.path).model_copy(update={"files": files})
    (store.path / "manifest.json").write_text(manifest.to_text())
    problems = " ".join(verify_store(store.path))
    assert "to 99, not 0 to 29" in problems
    assert "to 50, not -1 to 3" in problems


@pytest.mark.parametrize(
    ("name", "place", "value", "said"),
    [
        ("indices.arrow", 5, 2**40, rf"has nodes 0 to {2**40}, not 0 to 29"),
        ("indices.arrow", 5, -5, r"has nodes -5 to 29, not 0 to 29"),
        ("indptr.arrow", 7, 2**40, r"falls at node 7"),
        ("indptr.arrow", 7, -1, r"falls at node 6"),
        ("labels.arrow", 3, 4, r"has labels -1 to 4, not -1 to 3"),
        ("labels.arrow", 3, -2, r"has labels -2 to 3, not -1 to 3"),
    ],
)
@pytest.mark.parametrize("block", [1 << 23, 7])
def test_values_that_lead_outside_are_refused_before_they_are_used(
    small: GraphStore,
    name: str,
    place: int,
    value: int,
    said: str,
    block: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By whoever uses them as places, whichever block they lie in; all of them point to dngd data verify."""
    monkeypatch.setattr(checked, "_BLOCK_VALUES", block)
    assert resolve_dataset(small.path).digest == small.digest
    with (small.path / name).open("r+b") as file:
        file.seek(small.manifest.files[name].data_offset + 8 * place)
        file.write(value.to_bytes(8, "little", signed=True))
    wanted = said.partition(" ")[0] if block == 7 else said
    with pytest.raises(UserError, match=rf"{name} is damaged: it {wanted}.*dngd data verify"):
        resolve_dataset(small.path)
    for command in (["info"], ["partition", "--parts", "2"]):
        with pytest.raises(SystemExit) as exit_info:
            cli.main(["data", command[0], str(small.path), *command[1:]])
        assert exit_info.value.code == 2
        assert "dngd data verify" in capsys.readouterr().err


def test_label_rows_that_lead_outside_are_refused(tmp_path: Path) -> None:
    rows = np.array([[0, 1], [1, 1], [-1, -1]])
    store = GraphStore.write(tmp_path / "g", features=np.ones((3, 1)), labels=rows, edge_index=[[0, 1], [1, 2]])
    assert open_checked(store.path).digest == store.digest
    with (store.path / "labels.arrow").open("r+b") as file:
        file.seek(store.manifest.files["labels.arrow"].data_offset + 2)
        file.write(b"\x02")
    with pytest.raises(UserError, match=r"labels\.arrow is damaged: it has labels -1 to 2, not -1 to 1"):
        open_checked(store.path)


def test_a_newer_format_says_to_upgrade(small: GraphStore) -> None:
    path = small.path / "manifest.json"
    body = json.loads(path.read_text())
    body["format_version"] = FORMAT_VERSION + 1
    path.write_text(json.dumps(body))
    with pytest.raises(UserError, match=rf"version {FORMAT_VERSION + 1} .* upgrade dngd"):
        GraphStore.open(small.path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[" * 100_000, "is not valid JSON (it is nested too deeply); import"),
        (b'{"format": "dngd-graph", "name": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "is nested too deeply"),
        (b'{"format": "dngd-graph", "name": "\\ud800"}', "was altered after it was written"),
    ],
)
def test_a_damaged_manifest_is_named(small: GraphStore, content: bytes, said: str) -> None:
    (small.path / "manifest.json").write_bytes(content)
    with pytest.raises(UserError) as caught:
        GraphStore.open(small.path)
    assert said in str(caught.value)
    assert str(small.path / "manifest.json") in str(caught.value)
    assert verify_store(small.path) == [str(caught.value)]


def test_not_a_store(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no manifest\.json"):
        GraphStore.open(tmp_path)
    with pytest.raises(UserError, match="not a folder"):
        GraphStore.open(tmp_path / "absent")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("module", "stage"),
    [
        (builder, "write_columns"),
        (builder, "write_features"),
        (edge_sort, "ColumnWriter"),
        (staging, "_sync_folder"),
        (staging, "_rename"),
    ],
)
def test_an_error_while_writing_leaves_what_was_there(
    arrays: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: ModuleType,
    stage: str,
    overwrite: bool,
) -> None:
    target = tmp_path / "g"
    if overwrite:
        GraphStore.write(target, **arrays)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, stage, full)
    with pytest.raises(UserError, match="No space left on device"):
        GraphStore.write(target, **{**arrays, "name": "other"}, overwrite=overwrite)
    monkeypatch.undo()
    assert [entry.name for entry in tmp_path.iterdir()] == (["g"] if overwrite else [])
    if overwrite:
        assert GraphStore.open(target).name == "small"


def test_the_old_store_comes_back_when_the_new_one_cannot_take_its_place(
    arrays: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "g"
    GraphStore.write(target, **arrays)
    rename = Path.rename

    def fail_for_the_new_one(self: Path, to: Path) -> Path:
        if to == target and not self.name.endswith("-old"):
            raise OSError(5, "Input/output error")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fail_for_the_new_one)
    with pytest.raises(UserError, match="Input/output error"):
        GraphStore.write(target, **{**arrays, "name": "other"}, overwrite=True)
    monkeypatch.undo()
    assert [entry.name for entry in tmp_path.iterdir()] == ["g"]
    assert GraphStore.open(target).name == "small"


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """Let no file of this process grow beyond a size: writing then fails as on a full disk (Python ignores SIGXFSZ)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def build(path: Path, overwrite: bool = False, name: str | None = None) -> GraphStore:
    """Build a store of about 200 kB, its edges sorted on the disk."""
    rng = np.random.default_rng(2)
    num_nodes = 500
    with StoreBuilder(path, num_nodes=num_nodes, overwrite=overwrite, name=name, memory_bytes=1 << 16) as builder:
        for _ in range(10):
            builder.add_edges(*rng.integers(0, num_nodes, (2, 800)))
        blocks = (np.ones((50, 30)) for _ in range(10))
        return builder.finish(features=RowBlocks(30, blocks), node_ids=np.arange(num_nodes) * 10**10)


@pytest.mark.parametrize("limit", [0, 300, 5_000, 30_000, 50_000])
def test_a_write_that_fails_at_any_size_leaves_nothing(tmp_path: Path, limit: int) -> None:
    with (
        file_size_limit(limit),
        pytest.raises(UserError, match=r"cannot be written \(File too large\); free some space"),
    ):
        build(tmp_path / "sub" / "g")
    assert list(tmp_path.iterdir()) == []


FULL_DISK = """
    import subprocess, sys
    from pathlib import Path
    from dngd.errors import UserError
    from dngd.graph import GraphStore
    from tests.unit.graph.test_broken_stores import build
    disk = Path(sys.argv[1])
    said = set()
    for kilobytes in range(12, 400, 30):
        subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", str(disk)], check=True)
        try:
            build(disk / "g")
        except UserError as error:
            said.add(str(error))
            assert list(disk.iterdir()) == [], kilobytes
            continue
        assert GraphStore.open(disk / "g").verify() == []
        assert len(said) == 1, said
        print(kilobytes, said.pop())
        break
"""


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """On a real file system that has room for more and more of the store."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(FULL_DISK))
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=12k none {disk} || exit 77; exec {sys.executable} {script} {disk}"
    result = subprocess.run(
        ["unshare", "--mount", "--map-root-user", "sh", "-c", mount],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
    )
    if result.returncode == 77 or "unshare failed" in result.stderr:
        pytest.skip("no file system can be mounted here")
    assert result.returncode == 0, result.stderr
    needed, said = result.stdout.split(maxsplit=1)
    assert int(needed) > 200
    assert "No space left on device" in said
    assert "free some space" in said


KILLED = """
    import os, random, signal, sys, time
    from pathlib import Path
    from dngd.errors import UserError
    from dngd.graph import GraphStore
    from tests.unit.graph.test_broken_stores import build
    folder, elsewhere = Path(sys.argv[1]) / "folder", Path(sys.argv[1]) / "elsewhere"
    target = folder / "g"
    folder.mkdir()
    elsewhere.mkdir()
    build(elsewhere / "warm")
    seconds = 1.0
    for trial in range(3):
        started = time.monotonic()
        build(elsewhere / f"timed {trial}")
        seconds = min(seconds, time.monotonic() - started)
    random.seed(0)
    killed = 0
    for trial in range(16):
        overwrite = trial >= 8
        child = os.fork()
        if child == 0:
            build(target, overwrite=overwrite, name=f"trial {trial}")
            os._exit(0)
        time.sleep(random.random() * 1.2 * seconds)
        os.kill(child, signal.SIGKILL)
        killed += os.waitpid(child, 0)[1] != 0
        for entry in folder.iterdir():
            if entry != target:
                try:
                    GraphStore.open(entry)
                except UserError:
                    continue
                raise AssertionError(f"{entry} opens")
        if target.exists():
            assert GraphStore.open(target).verify() == [], trial
            if not overwrite:
                target.rename(elsewhere / str(trial))
        if trial == 7:
            build(target)
            assert [entry.name for entry in folder.iterdir()] == ["g"], list(folder.iterdir())
    assert killed >= 2, killed
    assert build(target, overwrite=True, name="last").name == "last"
    assert [entry.name for entry in folder.iterdir()] == ["g"], list(folder.iterdir())
"""


def test_a_write_killed_at_any_moment_leaves_nothing_that_opens_or_stays(tmp_path: Path) -> None:
    """First eight times where nothing is, then eight times over a store, which stays or is replaced."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
    )
    assert result.returncode == 0, result.stderr


def test_only_dead_writes_are_removed(tmp_path: Path) -> None:
    alive, dead = (tmp_path / f".g.tmp-1-{name}" for name in ("alive", "dead"))
    for folder in (alive, dead, tmp_path / ".other.tmp-1-dead"):
        folder.mkdir()
        (folder / "indices.arrow").write_text("half")
    lock = os.open(alive, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    build(tmp_path / "g")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".g.tmp-1-alive", ".other.tmp-1-dead", "g"]
    os.close(lock)
    build(tmp_path / "g", overwrite=True)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".other.tmp-1-dead", "g"]


def test_a_retired_store_is_kept_while_nothing_took_its_place(tmp_path: Path) -> None:
    """The process was killed between moving the old store away and moving the new one in."""
    build(tmp_path / "g").path.rename(tmp_path / ".g.tmp-1-dead-old")
    with pytest.raises(RuntimeError), StoreBuilder(tmp_path / "g", num_nodes=3):
        raise RuntimeError
    assert (tmp_path / ".g.tmp-1-dead-old" / "manifest.json").exists()
    build(tmp_path / "g")
    build(tmp_path / "g", overwrite=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["g"]


def test_overwriting_needs_to_be_asked_for_and_never_takes_other_files(arrays: dict[str, Any], tmp_path: Path) -> None:
    target = tmp_path / "g"
    GraphStore.write(target, **arrays)
    with pytest.raises(UserError, match="already exists"):
        GraphStore.write(target, **{**arrays, "name": "other"})
    assert GraphStore.open(target).name == "small"
    assert GraphStore.write(target, **{**arrays, "name": "other"}, overwrite=True).name == "other"
    (target / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds other files"):
        GraphStore.write(target, **arrays, overwrite=True)
    assert (target / "thesis.tex").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["g"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder_is_named(arrays: dict[str, Any], tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written"):
        GraphStore.write(tmp_path / "g", **arrays)


def test_a_parent_that_is_a_file_is_named(arrays: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        GraphStore.write(tmp_path / "file" / "g", **arrays)


def test_only_a_store_or_an_empty_folder_is_overwritten(tmp_path: Path) -> None:
    """Files that are called as a store's may be the user's own."""
    target = tmp_path / "g"
    target.mkdir()
    for name in ("labels.arrow", "features.arrow"):
        (target / name).write_text("mine")
    with pytest.raises(UserError, match="is not a graph store"):
        build(target, overwrite=True)
    assert (target / "labels.arrow").read_text() == "mine"
    shutil.rmtree(target)
    target.mkdir()
    build(target, overwrite=True)
    assert build(target, overwrite=True, name="again").name == "again"
