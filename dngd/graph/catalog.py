"""From what a user calls a data set to an open store.

A name or path is looked for in a fixed order; whatever is not a store already is converted once into a
cache folder, under a key made of its content, so that a changed file is imported anew.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

from dngd.errors import UserError
from dngd.graph.arrow_files import file_sha256
from dngd.graph.cache import cache_folder, open_or_build
from dngd.graph.checked import open_checked
from dngd.graph.filesystems import is_remote
from dngd.graph.manifest import MANIFEST_NAME
from dngd.graph.npz import import_npz
from dngd.graph.planetoid import PARTS, find_planetoid, import_planetoid, planetoid_sha256
from dngd.graph.remote import open_copy
from dngd.graph.store import GraphStore
from dngd.graph.synth import BUILT_IN, write_synth
from dngd.graph.writer import Progress
from dngd.paths import expanded, printable

DATA_VARIABLE = "DNGD_DATA_ROOT"

_DOWNLOADABLE = ("citeseer", "cora", "pubmed")
_GENERATOR_VERSION = 1
_KEY_DIGITS = 16


def resolve_dataset(
    dataset: str | Path,
    data_root: str | Path | None = None,
    cache_dir: str | Path | None = None,
    wait_seconds: float = 600,
    *,
    stage_dir: str | Path | None = None,
    download: bool = False,
    progress: Progress | None = None,
) -> GraphStore:
    """Open the graph that `dataset` names.

    An s3:// or gs:// address is that of a store, see `GraphStore.open`. All else is looked for in this order: an
    existing path (a store folder, an .npz file, a folder of Planetoid files); DATA_ROOT/NAME.npz; the folder
    DATA_ROOT/NAME (the same two kinds); a built-in, generated graph; with download=True, a known public graph.

    data_root: default $DNGD_DATA_ROOT. cache_dir: where converted graphs are kept; default $DNGD_CACHE_DIR, else
    ~/.cache/dngd. wait_seconds: how long to wait for another process that copies or converts the same graph.
    stage_dir: a folder of this machine's own disk, where what is copied or converted is kept instead, and where a store
    folder, which may lie on a slower file system, is copied too.
    Raises UserError if nothing is found (saying where it was looked for and what exists), conversion fails, or a store
    is damaged as far as `open_checked` sees.
    """
    text = str(dataset)
    root = _data_root(data_root)
    cache = cache_folder(stage_dir or cache_dir)
    if not text.strip():
        raise UserError(f"dataset={text!r} is empty; give a name such as products-mini, or a path")
    if is_remote(text):
        return open_copy(text, cache, wait_seconds, progress=progress)
    candidates = [expanded(text)]
    if root is not None:
        # Not with_suffix: a name may hold a dot.
        candidates += [root / f"{text}.npz", root / text]
    for candidate in candidates:
        if _is_graph(candidate):
            if stage_dir is not None and (candidate / MANIFEST_NAME).is_file():
                return open_copy(candidate, cache, wait_seconds, progress=progress)
            return _open_path(candidate, cache, wait_seconds, progress)
    if text in BUILT_IN:
        return _open_built_in(text, cache, wait_seconds, progress)
    if download and text.lower() in _DOWNLOADABLE:
        return _open_download(text.lower(), cache, wait_seconds, progress)
    raise UserError(_not_found(text, root, candidates))


def graph_at(dataset: str) -> Path | None:
    """Return the path of a data set that is named by it; None for a name, and for an address."""
    if not dataset.strip() or is_remote(dataset):
        return None
    path = expanded(dataset)
    return path if _is_graph(path) else None


def available_datasets(data_root: str | Path | None = None) -> list[str]:
    """Return the names that `resolve_dataset` finds: those in data_root, then the built-in ones."""
    root = _data_root(data_root)
    names = set(BUILT_IN)
    if root is not None and root.is_dir():
        for entry in root.iterdir():
            if _is_graph(entry):
                names.add(entry.stem if entry.suffix == ".npz" else entry.name)
    return sorted(names)


def _data_root(data_root: str | Path | None) -> Path | None:
    chosen = data_root or os.environ.get(DATA_VARIABLE)
    return expanded(chosen) if chosen else None


def _is_graph(path: Path) -> bool:
    if path.is_file():
        return path.suffix == ".npz"
    return path.is_dir() and ((path / MANIFEST_NAME).is_file() or is_planetoid(path))


def is_planetoid(path: Path) -> bool:
    """Say whether a folder, or its raw/, holds Planetoid files."""
    return any(True for folder in (path, path / "raw") for _ in folder.glob("ind.*.graph"))


def _open_path(path: Path, cache: Path, wait_seconds: float, progress: Progress | None) -> GraphStore:
    if path.is_file():
        name = printable(path.stem)
        key = f"{name}-{file_sha256(path)[:_KEY_DIGITS]}"
        return open_or_build(
            key,
            lambda out: import_npz(path, out, name=name, overwrite=True, progress=progress),
            f"importing {path}",
            cache,
            wait_seconds,
            progress=progress,
        )
    if (path / MANIFEST_NAME).is_file():
        return open_checked(path, progress)
    raw, prefix = find_planetoid(path)
    missing = [part for part in PARTS if not (raw / f"ind.{prefix}.{part}").is_file()]
    if missing:
        raise UserError(f"{raw} lacks ind.{prefix}.{missing[0]}; fetch the Planetoid files again")
    return open_or_build(
        f"{prefix}-planetoid-{planetoid_sha256(raw, prefix)[:_KEY_DIGITS]}",
        lambda out: import_planetoid(path, out, overwrite=True, progress=progress),
        f"importing {path}",
        cache,
        wait_seconds,
        progress=progress,
    )


def _open_built_in(name: str, cache: Path, wait_seconds: float, progress: Progress | None) -> GraphStore:
    config = asdict(BUILT_IN[name])
    content = json.dumps([_GENERATOR_VERSION, config], sort_keys=True).encode()
    return open_or_build(
        f"{name}-{hashlib.sha256(content).hexdigest()[:_KEY_DIGITS]}",
        lambda out: write_synth(out, name=name, overwrite=True, progress=progress, **config),
        f"generating {name}",
        cache,
        wait_seconds,
        progress=progress,
    )


def _open_download(name: str, cache: Path, wait_seconds: float, progress: Progress | None) -> GraphStore:
    def build(out: Path) -> GraphStore:
        raw = cache / "downloads" / name / "raw"
        _download_planetoid(name, raw)
        return import_planetoid(raw, out, overwrite=True, progress=progress)

    return open_or_build(f"{name}-download", build, f"downloading {name}", cache, wait_seconds, progress=progress)


def _download_planetoid(name: str, raw: Path) -> None:
    """Fetch the originals from where torch_geometric fetches them; only files, its pickle loader is not run."""
    try:
        from torch_geometric.data import download_url
        from torch_geometric.datasets import Planetoid

        for part in PARTS:
            download_url(f"{Planetoid.url}/ind.{name}.{part}", str(raw), log=False)
    except (OSError, ImportError) as error:
        raise UserError(
            f"{name} could not be downloaded ({error}); fetch the ind.{name}.* files yourself and give their folder "
            "as the dataset"
        ) from error


def _not_found(text: str, root: Path | None, candidates: list[Path]) -> str:
    names = available_datasets(root)
    close = difflib.get_close_matches(text, names, n=1, cutoff=0.5)
    ordered = close + [name for name in names if name not in close]
    places = [str(candidate) for candidate in candidates] + ["the built-in graphs"]
    guess = f"did you mean {close[0]}? " if close else ""
    fix = f"give one of them, or the path of a store folder or .npz file, or set --data-root or {DATA_VARIABLE}"
    wrong = candidates[0]
    if wrong.exists() and not _is_graph(wrong):
        fix = (
            f"{wrong} exists but is no graph store, .npz file or Planetoid folder; {fix}, or make a store of it: "
            "dngd data import --help"
        )
    return f"dataset {text!r} was not found at {', '.join(places)}; {guess}what exists: {', '.join(ordered)}; {fix}"
