"""Full verification of a store: every byte against the manifest, every value against its meaning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from dngd.errors import UserError
from dngd.graph import manifest as m
from dngd.graph.arrow_files import file_sha256

_BLOCK_VALUES = 1 << 23


def verify_store(path: str | Path, progress: Callable[[str, int, int], None] | None = None) -> list[str]:
    """Return every problem of the store at `path`, each one sentence; empty when it is sound.

    Reads every byte. progress: called with (file, bytes done, bytes in all). Never raises UserError: a store
    that does not open is a problem like another.
    """
    folder = Path(path).expanduser().absolute()
    try:
        manifest = m.read_manifest(folder)
    except UserError as error:
        return [str(error)]
    problems = _check_bytes(folder, manifest, progress)
    try:
        problems += _check_values(folder)
    except UserError as error:
        problems.append(str(error))
    return list(dict.fromkeys(problems))


def _check_bytes(folder: Path, manifest: m.Manifest, progress: Callable[[str, int, int], None] | None) -> list[str]:
    problems = []
    total = sum(entry.bytes for entry in manifest.files.values())
    done = 0
    for name, entry in manifest.files.items():

        def advance(num_bytes: int, name: str = name) -> None:
            nonlocal done
            done += num_bytes
            if progress is not None:
                progress(name, done, total)

        try:
            digest = file_sha256(folder / name, advance)
        except OSError as error:
            problems.append(f"{folder / name} cannot be read ({error.strerror}); import the graph again")
            continue
        if digest != entry.sha256:
            problems.append(
                f"{folder / name} was altered: its sha256 is {digest[:12]}…, the manifest says "
                f"{entry.sha256[:12]}…; import the graph again"
            )
    unknown = {entry.name for entry in folder.iterdir()} - {m.MANIFEST_NAME, *manifest.files}
    problems += [f"{folder / name} is no part of the store; remove it" for name in sorted(unknown)]
    return problems


def _check_values(folder: Path) -> list[str]:
    from dngd.graph.store import GraphStore

    store = GraphStore.open(folder)
    problems: list[str] = []

    def report(file: str, what: str) -> None:
        problems.append(f"{folder / file}: {what}; import the graph again")

    degrees = store.in_degrees()
    if bool((degrees < 0).any()):
        report(m.INDPTR, f"falls at node {int((degrees < 0).nonzero()[0])}")
    indices = store.indices
    if len(indices):
        if int(indices.min()) < 0 or int(indices.max()) >= store.num_nodes:
            report(
                m.INDICES,
                f"has nodes {int(indices.min())} to {int(indices.max())}, not 0 to {store.num_nodes - 1}",
            )
        starts = torch.zeros(len(indices), dtype=torch.bool)
        inner = store.indptr[:-1]
        starts[inner[(inner >= 0) & (inner < len(indices))]] = True
        if bool((~starts[1:] & (indices[1:] < indices[:-1])).any()):
            report(m.INDICES, "does not ascend within each node")
    labels = store.labels
    if int(labels.min()) < -1 or int(labels.max()) >= store.num_classes:
        report(
            m.LABELS,
            f"has labels from {int(labels.min())} to {int(labels.max())}, not -1 to {store.num_classes - 1}",
        )
    elif int((labels >= 0).sum()) != store.manifest.num_labelled:
        report(m.LABELS, f"has {int((labels >= 0).sum())} labelled nodes, not {store.manifest.num_labelled}")
    if store.edge_weight is not None and not bool(store.edge_weight.isfinite().all()):
        report(m.EDGE_WEIGHT, "has values that are not finite")
    rows = max(1, _BLOCK_VALUES // max(store.num_features, 1))
    bad = 0
    for start in range(0, store.num_nodes, rows):
        bad += int((~store.features[start : start + rows].isfinite()).sum())
    if bad:
        report(m.FEATURES, f"has {bad} values that are not finite")
    for name, mask in store.split_masks.items():
        if int(mask.view(torch.uint8).max()) > 1:
            report(m.SPLITS, f"has values above 1 in the {name} mask")
    return problems
