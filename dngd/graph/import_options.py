"""What every importer takes besides its source: one set of options, handed through to the store's builder."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

from dngd.errors import UserError
from dngd.graph.builder import Progress, StoreBuilder
from dngd.graph.canonical import Duplicates, FeatureType, SelfLoops, classes_met
from dngd.graph.filesystems import address_of, is_remote, shown_address

_NUM_SHOWN = 5


class ImportOptions(TypedDict, total=False):
    """Options of all importers. See `StoreBuilder`."""

    name: str | None
    """of the graph; default: what the source is called"""
    add_reverse: bool
    """add the reverse of each edge that is no self loop, before duplicates are treated"""
    self_loops: SelfLoops
    duplicates: Duplicates
    feature_dtype: FeatureType
    overwrite: bool
    """replace a store that is already there"""
    progress: Progress | None


def check_options(out: str | Path, options: ImportOptions, *, weighted: bool) -> None:
    """Raise UserError if a store cannot be put at `out`, or options do not go together; writes nothing."""
    if is_remote(out):
        raise UserError(
            f"{shown_address(address_of(out))} cannot be written to directly; give a local folder, then copy it there "
            "whole (aws s3 cp --recursive, gcloud storage cp -r): it opens from there"
        )
    StoreBuilder(out, num_nodes=1, weighted=weighted, **options)


def recorded(source_format: str, options: ImportOptions) -> dict[str, Any]:
    """Return the options that a store's provenance tells."""
    return {
        "format": source_format,
        "add_reverse": options.get("add_reverse", False),
        "self_loops": options.get("self_loops", "drop"),
        "duplicates": options.get("duplicates", "drop"),
    }


def warn_of_empty_classes(labels: npt.NDArray[Any], num_classes: int, what: str) -> None:
    """Warn of classes without a node, which a model has outputs for and default damping counts.

    labels: as `canonical_labels` returns them. what: whose they are.
    """
    if labels.ndim != 1:
        return
    empty = np.flatnonzero(~classes_met(labels, num_classes))
    if not len(empty):
        return
    shown = ", ".join(map(str, empty[:_NUM_SHOWN])) + (", …" if len(empty) > _NUM_SHOWN else "")
    warnings.warn(
        f"{len(empty)} of the {num_classes} classes of {what} have no node ({shown}); the model gets an output for "
        "each of them all the same: number the classes from 0 without gaps if they are not meant to be there",
        stacklevel=3,
    )


def check_training_nodes(masks: Mapping[str, Any] | None, labels: npt.NDArray[Any] | None, what: str) -> None:
    """Raise UserError if a graph brings a split by which nothing can be trained.

    masks: {part: bool (nodes,) or (splits, nodes)}. labels: [nodes] or [nodes, classes], below 0
    unlabelled; None: not known.
    """
    if not masks:
        return
    train = masks.get("train")
    chosen = np.zeros(0, dtype=np.bool_) if train is None else np.asarray(train, dtype=np.bool_)
    if not chosen.any():
        raise UserError(
            f"{what} gives a split without training nodes; mark some nodes as train, or leave the split out"
        )
    labelled = None if labels is None else (labels if labels.ndim == 1 else labels[:, 0]) >= 0
    if labelled is not None and not (chosen & labelled).any():
        raise UserError(
            f"{what} gives {int(chosen.sum())} training nodes but none of them has a label; label them, or leave the "
            "split out"
        )
