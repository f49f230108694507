"""Full verification of a store: every byte against the manifest, every value against its meaning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from dngd.errors import UserError
from dngd.graph import manifest as m
from dngd.graph.arrow_files import file_sha256
from dngd.graph.filesystems import address_of, is_remote, shown_address
from dngd.graph.node_ids import first_repeated
from dngd.graph.store import GraphStore
from dngd.paths import expanded

_BLOCK_VALUES = 1 << 23


def verify_store(path: str | Path, progress: Callable[[str, int, int], None] | None = None) -> list[str]:
    """Return every problem of the store at `path`, each one sentence; empty when it is sound.

    Reads every byte. progress: called with (file, bytes done, bytes in all). Never raises UserError: a store
    that does not open is a problem like another, and so is an address.
    """
    if is_remote(path):
        shown = shown_address(address_of(path))
        return [
            f"{shown} is an address, and what is verified is a folder; whatever opens an address, such as dngd data "
            "info, copies the store once and checks every byte on the way: give a folder that it was copied to"
        ]
    folder = expanded(path).absolute()
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
            problems.append(f"{folder / name} cannot be read ({error.strerror}); {_fix(folder, name)}")
            continue
        if digest != entry.sha256:
            problems.append(
                f"{folder / name} was altered: its sha256 is {digest[:12]}…, the manifest says "
                f"{entry.sha256[:12]}…; {_fix(folder, name)}"
            )
    unknown = {entry.name for entry in folder.iterdir()} - {m.MANIFEST_NAME, *manifest.files}
    # What a killed write of a partition left does no harm, and the next such write removes it.
    foreign = sorted(name for name in unknown if not m.is_partition_file(name))
    problems += [f"{folder / name} is no part of the store; remove it" for name in foreign]
    return problems


def _fix(folder: Path, name: str) -> str:
    form = m.PARTITION_FORM.fullmatch(name)
    return m.REPARTITION.format(path=folder, parts=form[1]) if form else "import the graph again"


def _check_values(folder: Path) -> list[str]:
    store = GraphStore.open(folder)
    problems: list[str] = []

    def report(file: str, what: str) -> None:
        problems.append(f"{folder / file}: {what}; {_fix(folder, file)}")

    degrees = store.in_degrees()
    if bool((degrees < 0).any()):
        report(m.INDPTR, f"falls at node {int((degrees < 0).nonzero()[0])}")
    _check_indices(store, report)
    labels = store.labels
    if store.is_multilabel:
        _check_label_rows(store, report)
    elif int(labels.min()) < -1 or int(labels.max()) >= store.num_classes:
        report(
            m.LABELS,
            f"has labels from {int(labels.min())} to {int(labels.max())}, not -1 to {store.num_classes - 1}",
        )
    elif int((labels >= 0).sum()) != store.manifest.num_labelled:
        report(m.LABELS, f"has {int((labels >= 0).sum())} labelled nodes, not {store.manifest.num_labelled}")
    if store.edge_weight is not None and _num_not_finite(store.edge_weight):
        report(m.EDGE_WEIGHT, "has values that are not finite")
    bad = _num_not_finite(store.features)
    if bad:
        report(m.FEATURES, f"has {bad} values that are not finite")
    for name, mask in store.split_masks.items():
        if int(mask.view(torch.uint8).max()) > 1:
            report(m.SPLITS, f"has values above 1 in the {name} mask")
    repeated = None if store.node_ids is None else first_repeated(store.node_ids)
    if repeated is not None:
        report(m.NODE_IDS, f"has one id for the nodes {repeated[0]} and {repeated[1]}")
    for parts in store.partitions:
        try:
            _check_partition(store, parts, report)
        except UserError as error:
            problems.append(str(error))
    return problems


def _check_label_rows(store: GraphStore, report: Callable[[str, str], None]) -> None:
    rows = store.labels
    if int(rows.min()) < -1 or int(rows.max()) > 1:
        report(m.LABELS, f"has labels from {int(rows.min())} to {int(rows.max())}, not 0, 1, or -1")
    elif not torch.equal((rows >= 0).all(dim=1), (rows >= 0).any(dim=1)):
        report(m.LABELS, "has rows that are partly -1")
    elif int(store.labelled.sum()) != store.manifest.num_labelled:
        report(m.LABELS, f"has {int(store.labelled.sum())} labelled nodes, not {store.manifest.num_labelled}")


def _check_partition(store: GraphStore, parts: int, report: Callable[[str, str], None]) -> None:
    part = store.partition(parts)
    if int(part.min()) < 0 or int(part.max()) >= parts:
        report(m.partition_file(parts), f"has parts {int(part.min())} to {int(part.max())}, not 0 to {parts - 1}")
    elif part.bincount(minlength=parts).tolist() != store.partitions[parts].nodes:
        report(m.partition_file(parts), "has other numbers of nodes in its parts than the manifest says")


def _check_indices(store: GraphStore, report: Callable[[str, str], None]) -> None:
    """Report sources that are no nodes, and sources that do not ascend within their destination's."""
    inner = store.indptr[:-1]
    least, largest, falls = store.num_nodes, -1, False
    for start in range(0, store.num_edges, _BLOCK_VALUES):
        stop = min(start + _BLOCK_VALUES, store.num_edges)
        part = store.indices[start:stop]
        least, largest = min(least, int(part.min())), max(largest, int(part.max()))
        # One entry more than the block, so that no neighbouring two are left out.
        pairs = store.indices[start : stop + 1]
        first, last = torch.searchsorted(inner, torch.tensor([start, start + len(pairs)])).tolist()
        begins = torch.zeros(len(pairs), dtype=torch.bool)
        # Pointers that do not ascend are reported elsewhere, but must not lead outside.
        begins[inner[first:last].clamp(start, start + len(pairs) - 1) - start] = True
        falls = falls or bool((~begins[1:] & (pairs[1:] < pairs[:-1])).any())
    if store.num_edges and (least < 0 or largest >= store.num_nodes):
        report(m.INDICES, f"has nodes {least} to {largest}, not 0 to {store.num_nodes - 1}")
    if falls:
        report(m.INDICES, "does not ascend within each node")


def _num_not_finite(table: torch.Tensor) -> int:
    rows = max(1, _BLOCK_VALUES // max(table[0].numel(), 1)) if len(table) else 1
    return sum(int((~table[start : start + rows].isfinite()).sum()) for start in range(0, len(table), rows))
