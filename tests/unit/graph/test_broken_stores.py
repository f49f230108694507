"""A store is whole or it is not opened: altered bytes, interrupted writes, overwriting."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dngd.errors import UserError
from dngd.graph import FORMAT_VERSION, GraphStore, verify_store
from dngd.graph import writer as writer_module

ARROW = ("indptr.arrow", "indices.arrow", "edge_weight.arrow", "features.arrow", "labels.arrow", "splits.arrow")


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


def test_a_newer_format_says_to_upgrade(small: GraphStore) -> None:
    path = small.path / "manifest.json"
    body = json.loads(path.read_text())
    body["format_version"] = FORMAT_VERSION + 1
    path.write_text(json.dumps(body))
    with pytest.raises(UserError, match=rf"version {FORMAT_VERSION + 1} .* upgrade dngd"):
        GraphStore.open(small.path)


def test_not_a_store(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no manifest\.json"):
        GraphStore.open(tmp_path)
    with pytest.raises(UserError, match="not a folder"):
        GraphStore.open(tmp_path / "absent")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("stage", ["write_columns", "write_rows", "_sync_folder", "_rename"])
def test_an_error_while_writing_leaves_what_was_there(
    arrays: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, overwrite: bool
) -> None:
    target = tmp_path / "g"
    if overwrite:
        GraphStore.write(target, **arrays)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer_module, stage, full)
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


def test_a_killed_write_leaves_nothing_that_opens(tmp_path: Path) -> None:
    """Killed amid the features, and with all files written but not yet renamed."""
    code = f"""
        import os, signal
        import numpy as np
        from dngd.graph import GraphStore, writer
        for stage in ("write_rows", "_rename"):
            child = os.fork()
            if child == 0:
                setattr(writer, stage, lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL))
                GraphStore.write({str(tmp_path)!r} + "/g", edge_index=[[0], [1]], features=np.ones((2, 2)))
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, check=False)
    assert result.returncode == 0, result.stderr
    leftovers = list(tmp_path.iterdir())
    assert len(leftovers) == 2
    assert sum((path / "manifest.json").exists() for path in leftovers) == 1
    for path in (tmp_path / "g", *leftovers):
        with pytest.raises(UserError):
            GraphStore.open(path)
    writer_module.remove_unfinished(tmp_path / "g")
    assert list(tmp_path.iterdir()) == []


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
