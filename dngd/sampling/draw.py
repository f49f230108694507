"""What a sampler process does for one request: draw the layer graphs, take the first layer's rows, lay both out.

Batches travel in a shared slot where the request names one, and over the socket where it names none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dngd.allocator import keep_freed_memory
from dngd.graph.advice import read_randomly
from dngd.models.message_passing import Aggregation, Propagation
from dngd.models.sparse_rows import SparseRows
from dngd.sampling import wire
from dngd.sampling.hops import HopSampler
from dngd.sampling.minibatch import Drawn
from dngd.sampling.operators import FirstRows, LayerOperators, first_rows_of
from dngd.sampling.sampler import NeighborSampler
from dngd.sampling.slots import DTYPES, SlotPool, SlotWriter, dtype_name, spec_of
from dngd.sampling.sparse_features import SparseFirstRows, from_arrays
from dngd.sampling.topology import SharedTopology, open_shared

NO_SLOT = -1


class BatchDrawer:
    """Draws batches. first_rows: given where they are wanted. slots: of the trainer."""

    def __init__(
        self, sampler: NeighborSampler, first_rows: FirstRows | SparseFirstRows | None, slots: SlotWriter
    ) -> None:
        self._sampler = sampler
        self._first_rows = first_rows
        self._slots = slots

    @classmethod
    def from_setup(cls, setup: dict[str, Any], files: Mapping[int, int]) -> BatchDrawer:
        """Return the drawer that a setup message asks for (see setup_message); one thread from here on.

        files: this process's numbers of the trainer's open files, by the trainer's.
        """
        torch.set_num_threads(1)
        keep_freed_memory()
        graph, extra = open_shared(setup["graph"], files)
        sampler_type = HopSampler if setup["each_once"] else NeighborSampler
        sampler = sampler_type(graph.indptr, graph.indices, graph.edge_weight, setup["fanouts"])
        first_rows: FirstRows | SparseFirstRows | None
        if setup["sparse_width"] is None:
            first_rows = first_rows_of(graph, setup["aggregation"], extra.get("norm"), extra.get("on_host"))
        else:
            operators = LayerOperators(graph, setup["aggregation"], extra.get("norm"))
            first_rows = SparseFirstRows(operators, from_arrays(extra, setup["sparse_width"]))
        features: Tensor | None = getattr(graph, "features", None)
        if setup["random_reads"] and features is not None:
            read_randomly(features)
        return cls(sampler, first_rows, SlotWriter([files[fd] for fd in setup["slots"]]))

    def draw(
        self, seeds: Tensor, rng_seed: int, slot: int, excluded: Tensor | None = None
    ) -> tuple[dict[str, Any], list[Tensor]]:
        """Return the header and the arrays of an answer; arrays is empty where they were laid out in the slot."""
        drawn = self._sampler.draw(seeds, rng_seed, excluded)
        layers = drawn.layers
        sizes, arrays = wire.pack_layers(layers)
        if drawn.nodes is not None:
            arrays.append(drawn.nodes)
        first, sparse = self._first_rows, None
        if isinstance(first, SparseFirstRows):
            sparse, first = first.of(layers[0]), None
            arrays += [sparse.indptr, sparse.columns, sparse.values]
        operator = None if first is None else first.operator(layers[0])
        parts = _coefficients(operator)
        arrays += [part for part in parts.values() if part is not None]
        specs = [spec_of(array) for array in arrays]
        if first is not None:
            specs.append((dtype_name(first.dtype), first.shape(layers[0])))
        in_slot = slot != NO_SLOT
        places = self._slots.lay_out(slot, specs) if in_slot else [torch.empty(s, dtype=DTYPES[d]) for d, s in specs]
        for place, array in zip(places, arrays):
            place.copy_(array)
        if first is not None:
            first.of(layers[0], out=places[-1], operator=operator)
        header: dict[str, Any] = {"layers": sizes, "has_rows": first is not None, "has_nodes": drawn.nodes is not None}
        if sparse is not None:
            header["sparse_width"] = sparse.width
        if operator is not None:
            header["operator"] = {name: part is not None for name, part in parts.items()}
        return (header | {"slot": slot, "specs": specs}, []) if in_slot else (header, places)


def setup_message(
    graph: SharedTopology,
    fanouts: Sequence[int],
    aggregation: Aggregation | None,
    slots: SlotPool,
    *,
    random_reads: bool,
    each_once: bool,
    sparse_width: int | None = None,
) -> dict[str, Any]:
    """Return the first message to a sampler process, which has the graph's and the slots' files.

    sparse_width: of the feature table, where it is among the graph's files as entries.
    """
    return {
        "graph": graph.description,
        "fanouts": list(fanouts),
        "aggregation": aggregation,
        "slots": list(slots.fds),
        "random_reads": random_reads,
        "each_once": each_once,
        "sparse_width": sparse_width,
    }


def unpack_answer(header: dict[str, Any], arrays: Sequence[Tensor], slots: SlotPool) -> Drawn:
    """Return what an answer holds."""
    if "slot" in header:
        arrays = slots.read(header["slot"], [(dtype, shape) for dtype, shape in header["specs"]])
    remaining = iter(arrays)
    layers = wire.unpack_layers(header["layers"], remaining)
    nodes = next(remaining) if header["has_nodes"] else None
    if "sparse_width" in header:
        rows = SparseRows(next(remaining), next(remaining), next(remaining), header["sparse_width"])
        return Drawn(layers, rows, None, nodes)
    operator: Propagation | None = None
    if "operator" in header:
        parts = {name: next(remaining) if there else None for name, there in header["operator"].items()}
        first = layers[0]
        operator = Propagation(first.indptr, first.indices, **parts, destinations=first.dst_nodes)
    return Drawn(layers, next(remaining) if header["has_rows"] else None, operator, nodes)


def _coefficients(operator: Propagation | None) -> dict[str, Tensor | None]:
    """Return what an operator has beside its layer graph, by name."""
    if operator is None:
        return {}
    return {"edge_coefficients": operator.edge_coefficients, "self_coefficients": operator.self_coefficients}
