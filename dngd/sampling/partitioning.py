"""Partitioning a graph by the method that suits it, and reordering it by what a user calls an order.

The methods themselves are `dngd.graph.ldg` and `dngd.sampling.metis`; writing is `dngd.graph.partition` and
`dngd.graph.reorder`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from dngd.errors import UserError
from dngd.graph.builder import Progress
from dngd.graph.partition import Partition, PartitionTask, run_ldg
from dngd.graph.reorder import order_by_degree, order_by_partition, reorder_store
from dngd.graph.store import GraphStore
from dngd.sampling.metis import run_metis, why_not_metis

Method = Literal["auto", "metis", "ldg"]
METHODS: tuple[Method, ...] = get_args(Method)
ORDER_FORMS = "original, degree or partition:PARTS (such as partition:8)"

_MAX_AUTO_EDGES = 1 << 28
"""Of METIS under `auto`: about a second a million edges was measured."""


def partition_nodes(
    store: GraphStore,
    parts: int,
    *,
    method: Method = "auto",
    balance: Tensor | None = None,
    slack: float = 0.05,
    passes: int = 10,
    seed: int = 0,
    progress: Progress | None = None,
) -> Partition:
    """Assign each node to one of `parts` parts with few edges between them.

    method: ldg streams the topology in blocks and suits graphs of any size; metis holds it several times over in
        memory; auto takes LDG, and METIS too where the graph is undirected and METIS can hold it, and keeps what cuts
        fewer edges. Partition.reason says which and why.
    balance: the training nodes, int64 node numbers, spread evenly besides all nodes; None: all nodes alone.
    slack: no part holds more than max(⌈n / parts⌉, ⌊(1 + slack) · n / parts⌋) of the n nodes, nor of the n nodes of
        `balance`; nodes are moved where METIS exceeds that.
    passes, seed: of LDG. progress: called with (stage, done, total).
    Raises UserError if an argument is out of range, or method="metis" cannot be used.
    """
    if method not in METHODS:
        raise UserError(f"method={method!r} is not known; give one of {', '.join(METHODS)}")
    task = PartitionTask.of(store, parts, balance, slack, seed)
    if method == "metis":
        return run_metis(task, progress)
    streamed = run_ldg(task, passes, progress)
    if method == "ldg":
        return streamed
    reason = _why_not_auto(task)
    if reason is None:
        try:
            return _better(run_metis(task, progress), streamed)
        except UserError as error:
            reason = str(error)
    return replace(streamed, reason=f"LDG: {reason}")


def _why_not_auto(task: PartitionTask) -> str | None:
    if task.parts == 1:
        return "one part needs no choice"
    if task.store.manifest.directed:
        return "the graph is directed, METIS knows no directions"
    if task.store.num_edges > _MAX_AUTO_EDGES:
        return f"METIS would take long for {task.store.num_edges:,} edges"
    return why_not_metis(task)


def _better(metis: Partition, ldg: Partition) -> Partition:
    both = f"METIS cuts {metis.info.edge_cut:.2%} of the edges, LDG {ldg.info.edge_cut:.2%}"
    return replace(metis if metis.info.edge_cut < ldg.info.edge_cut else ldg, reason=both)


@dataclass(frozen=True)
class Order:
    """A parsed order of nodes. parts: of kind partition."""

    kind: Literal["original", "degree", "partition"]
    parts: int | None = None


def parse_order(text: str) -> Order:
    """Parse original, degree or partition:PARTS. Raises UserError for anything else."""
    if text == "original":
        return Order("original")
    if text == "degree":
        return Order("degree")
    match = re.fullmatch(r"partition:([1-9][0-9]*)", text)
    if match is None:
        raise UserError(f"order {text!r} is not known; give {ORDER_FORMS}")
    return Order("partition", int(match[1]))


def reorder_by(
    store: GraphStore,
    order: str,
    out: str | Path,
    *,
    name: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> GraphStore:
    """Write the store with its nodes in another order to `out`; see `dngd.graph.reorder.reorder_store`.

    order: original (a plain copy), degree (by how many edges leave a node, most first) or partition:PARTS (part by
        part, inside a part by degree). The store's own partition in so many parts is taken if it has one; otherwise it
        is made by `partition_nodes`, balanced by the training nodes of the store's masks, and kept in the new store.
    Raises UserError for an unknown order.
    """
    parsed = parse_order(order)
    partition = None
    if parsed.kind == "original":
        permutation = torch.arange(store.num_nodes)
    elif parsed.parts is None:
        permutation = order_by_degree(store, progress)
    else:
        if parsed.parts in store.partitions:
            partition = Partition(store.partition(parsed.parts), store.partitions[parsed.parts])
        else:
            partition = partition_nodes(store, parsed.parts, balance=mask_training_nodes(store), progress=progress)
        permutation = order_by_partition(store, partition.assignment, progress)
    return reorder_store(
        store,
        permutation,
        out,
        order=order,
        name=name,
        partition=partition,
        overwrite=overwrite,
        progress=progress,
    )


def mask_training_nodes(store: GraphStore) -> Tensor | None:
    """Return the training nodes of the store's one split, int64; None where it has none, or several."""
    mask = store.split_masks.get("train")
    if mask is None or mask.ndim != 1 or not bool(mask.any()):
        return None
    return mask.nonzero()[:, 0]
