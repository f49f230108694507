"""From a name to a store: order of places, cache, concurrency, messages."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dngd.errors import UserError
from dngd.graph import GraphStore, available_datasets, catalog, resolve_dataset
from dngd.graph.lock import file_lock


def npz(path: Path, num_nodes: int = 6) -> Path:
    ring = np.arange(num_nodes)
    np.savez(path, edge_index=np.stack([ring, (ring + 1) % num_nodes]), num_nodes=num_nodes, x=np.ones((num_nodes, 2)))
    return path


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data root with ring.npz and the store folder; the cache beside it."""
    folder = tmp_path / "data"
    folder.mkdir()
    npz(folder / "ring.npz")
    GraphStore.write(folder / "folder", edge_index=[[0], [1]], features=np.ones((2, 1)))
    monkeypatch.setenv("DNGD_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("DNGD_DATA_ROOT", raising=False)
    return folder


def test_each_place_is_found(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_dataset("ring", root).num_nodes == 6
    assert resolve_dataset("folder", root).path == root / "folder"
    assert resolve_dataset(root / "ring.npz").name == "ring"
    assert resolve_dataset(str(root / "folder")).num_nodes == 2
    monkeypatch.setenv("DNGD_DATA_ROOT", str(root))
    assert resolve_dataset("ring").num_nodes == 6
    assert available_datasets() == ["folder", "products-mini", "ring"]


def test_a_path_goes_before_the_data_root(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    GraphStore.write(tmp_path / "ring", edge_index=[[0], [1]], features=np.ones((3, 1)))
    assert resolve_dataset("ring", root).num_nodes == 3


def test_conversion_happens_once_and_again_when_the_file_changes(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = resolve_dataset("ring", root)
    assert first.path.is_relative_to(tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(catalog, "import_npz", lambda *a, **k: pytest.fail("converted twice"))
        assert resolve_dataset("ring", root).path == first.path
    npz(root / "ring.npz", num_nodes=9)
    assert resolve_dataset("ring", root).num_nodes == 9


def test_a_file_whose_name_is_not_utf8(root: Path) -> None:
    store = resolve_dataset((root / "ring.npz").rename(root / "ring\udcff.npz"))
    assert store.name == "ring?"
    assert store.manifest.provenance.source == "ring?.npz"
    assert resolve_dataset(root / "ring\udcff.npz").path == store.path


@pytest.mark.parametrize("damage", ["truncate", "empty", "foreign", "value"])
def test_a_broken_cached_store_is_rebuilt(root: Path, damage: str) -> None:
    store = resolve_dataset("ring", root)
    if damage == "truncate":
        data = (store.path / "features.arrow").read_bytes()
        (store.path / "features.arrow").write_bytes(data[:-8])
    elif damage == "value":
        with (store.path / "indices.arrow").open("r+b") as file:
            file.seek(store.manifest.files["indices.arrow"].data_offset)
            file.write((2**40).to_bytes(8, "little"))
    else:
        shutil.rmtree(store.path)
        store.path.mkdir()
        if damage == "foreign":
            (store.path / "something").write_text("")
    (store.path.parent / f".{store.path.name}.tmp-1-dead").mkdir()
    again = resolve_dataset("ring", root)
    assert again.path == store.path
    assert again.verify() == []
    assert sorted(p.suffix for p in store.path.parent.iterdir()) == sorted([store.path.suffix, ".lock"])


def test_unknown_names_say_where_and_what(root: Path) -> None:
    with pytest.raises(UserError) as caught:
        resolve_dataset("rings", root)
    message = str(caught.value)
    for part in ("'rings'", str(root / "rings.npz"), "did you mean ring?", "ring, folder, products-mini"):
        assert part in message
    (root / "notes").mkdir()
    with pytest.raises(UserError, match="exists but is no graph store"):
        resolve_dataset(str(root / "notes"))
    with pytest.raises(UserError, match="is empty"):
        resolve_dataset("")
    with pytest.raises(UserError, match="was not found"):
        resolve_dataset("cora", root)


def test_the_cache_must_be_writable(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="DNGD_CACHE_DIR"):
        resolve_dataset("ring", root, cache_dir=tmp_path / "file")


CONVERT = """
    import os, sys, time
    from pathlib import Path
    from dngd.graph import catalog
    real = catalog.import_npz
    def slow(*args, **kwargs):
        with open({log!r}, "a") as log:
            log.write(f"{{os.getpid()}}\\n")
        time.sleep(1)
        return real(*args, **kwargs)
    catalog.import_npz = slow
    Path({ready!r} + str(os.getpid())).touch()
    while len(list(Path({ready!r}).parent.glob("ready*"))) < 2:
        time.sleep(.01)
    print(catalog.resolve_dataset("ring", {root!r}).features.sum().item())
"""


def test_two_processes_convert_once(root: Path, tmp_path: Path) -> None:
    code = textwrap.dedent(CONVERT).format(log=str(tmp_path / "log"), ready=str(tmp_path / "ready"), root=str(root))
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in processes:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert float(out) == 12
    assert len((tmp_path / "log").read_text().split()) == 1


def test_waiting_has_a_limit_and_names_the_holder(root: Path, tmp_path: Path) -> None:
    store = resolve_dataset("ring", root)
    shutil.rmtree(store.path)
    lock = store.path.with_name(store.path.name + ".lock")
    code = f"""
        import fcntl, os, pathlib, time
        with open({str(lock)!r}, "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.truncate()
            print(os.getpid(), file=file, flush=True)
            pathlib.Path({str(tmp_path / "held")!r}).touch()
            time.sleep(60)
    """
    holder = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])
    try:
        deadline = time.monotonic() + 30
        while not (tmp_path / "held").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        with pytest.raises(UserError, match=rf"waited 0\.3 s for process {holder.pid} .*importing .*ring\.npz"):
            resolve_dataset("ring", root, wait_seconds=0.3)
    finally:
        holder.kill()
        holder.wait()
    # Its death has released the lock.
    assert resolve_dataset("ring", root, wait_seconds=0.3).num_nodes == 6


def test_the_lock_excludes_within_a_process_too(tmp_path: Path) -> None:
    with (
        file_lock(tmp_path / "a.lock", purpose="one", wait_seconds=0),
        pytest.raises(UserError, match="to finish: two"),
        file_lock(tmp_path / "a.lock", purpose="two", wait_seconds=0),
    ):
        pass
    with file_lock(tmp_path / "a.lock", purpose="three", wait_seconds=0):
        pass


def test_download_fetches_files_only_and_imports_them(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    geometric = pytest.importorskip("torch_geometric.data")
    from tests.unit.graph.test_import import planetoid_folder

    source = planetoid_folder(tmp_path / "source")
    asked: list[str] = []

    def fetch(url: str, folder: str, log: bool) -> None:
        asked.append(url)
        part = url.rsplit("/ind.cora.")[1]
        Path(folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(source / f"ind.tiny.{part}", Path(folder) / f"ind.cora.{part}")

    monkeypatch.setattr(geometric, "download_url", fetch)
    store = resolve_dataset("cora", root, download=True)
    assert (store.name, store.num_nodes, len(asked)) == ("cora", 8, 8)
    resolve_dataset("cora", root, download=True)
    assert len(asked) == 8

    def offline(*args: Any, **kwargs: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(geometric, "download_url", offline)
    with pytest.raises(UserError, match="could not be downloaded"):
        resolve_dataset("pubmed", root, download=True)
