"""METIS through DGL's core library: fewer cut edges than a stream gives on many graphs, for graphs that memory holds.

METIS runs in a process of its own. It prints, cannot be interrupted, and takes several times the topology's
memory: this way Ctrl-C ends it, its memory goes back to the system, and a process that the system kills for its
memory is an error to read instead of the end of the caller.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil

from dngd.errors import UserError
from dngd.graph.builder import Progress
from dngd.graph.partition import Partition, PartitionTask

_BYTES_AN_EDGE = 48
_BYTES_A_NODE = 250
"""Measured with the topology's own 8 an edge and node: 40 an edge and 100 to 270 a node, the more the smaller."""
_MIN_NODES_A_PART = 8
_TAIL_CHARACTERS = 1000
_STOP_SECONDS = 5.0
_PR_SET_PDEATHSIG = 1


def memory_needed(num_nodes: int, num_edges: int) -> int:
    """Return the bytes that METIS and the topology need to be in memory at once, rounded up from measurements."""
    return _BYTES_AN_EDGE * num_edges + _BYTES_A_NODE * num_nodes


def why_not_metis(task: PartitionTask) -> str | None:
    """Return why METIS cannot be used for this task here, in words; None if it can."""
    store = task.store
    if store.num_nodes < _MIN_NODES_A_PART * task.parts or not store.num_edges:
        return f"METIS needs edges, and {_MIN_NODES_A_PART} nodes a part: there are {store.num_nodes} for {task.parts}"
    needed, free = memory_needed(store.num_nodes, store.num_edges), psutil.virtual_memory().available
    if store.manifest.directed:
        needed += 2 * 8 * store.num_edges  # of the copy with both directions
    if needed > free:
        return f"METIS needs about {needed / 2**30:.1f} GiB of memory and {free / 2**30:.1f} GiB are free"
    return None


def run_metis(task: PartitionTask, progress: Progress | None = None) -> Partition:
    """Return METIS's partition of the task's graph, made to keep to the task's limits where it does not.

    METIS balances nodes and training nodes to 3 % where it can. A directed graph is taken without its directions.
    The result depends on the graph, the parts and the training nodes alone: METIS's own seed is fixed.
    Raises UserError if METIS cannot be used (see `why_not_metis`) or fails.
    """
    reason = why_not_metis(task)
    if reason is not None:
        raise UserError(f"{reason}; use --method ldg")
    if task.parts == 1:
        return task.finished(np.zeros(task.store.num_nodes, dtype=np.int32), "metis", {})
    if progress is not None:
        progress("METIS", 0, 0)
    with tempfile.TemporaryDirectory(prefix="dngd-metis-") as scratch:
        train, result = Path(scratch) / "train.npy", Path(scratch) / "part.npy"
        np.save(train, task.train)
        request = {
            "store": str(task.store.path),
            "digest": task.store.digest,
            "parts": task.parts,
            "train": str(train),
            "result": str(result),
            "directed": task.store.manifest.directed,
            "parent": os.getpid(),
        }
        _run_child(request)
        part = np.load(result, allow_pickle=False)
    assert part.dtype == np.int32, part.dtype
    assert part.shape == (task.store.num_nodes,), part.shape
    if progress is not None:
        progress("METIS", task.store.num_edges, task.store.num_edges)
    return task.finished(part, "metis", {})


def _run_child(request: dict[str, Any]) -> None:
    from dngd.sampling.process import child_environment

    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "dngd.sampling.metis", json.dumps(request)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=child_environment(),
            start_new_session=True,
        )
        try:
            code = child.wait()
        except BaseException:
            child.terminate()
            try:
                child.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            raise
        if code == 0:
            return
        log.seek(0)
        tail = log.read().decode(errors="replace")[-_TAIL_CHARACTERS:].strip()
    if code == -signal.SIGKILL:
        raise UserError("METIS was killed, perhaps because memory ran out; use --method ldg, or a larger machine")
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
    raise UserError(f"METIS {how}; use --method ldg instead. It said: {tail or 'nothing'}")


def _end_with(parent: int) -> None:
    """Have the kernel end this process when its parent ends, however it does: METIS would go on for minutes.

    Not where the C library has no prctl.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # it had ended before
        os._exit(1)


def _child(request: dict[str, Any]) -> None:
    """Partition the store that the request names; write the parts as int32 .npy."""
    import torch

    from dngd.graph.store import GraphStore
    from dngd.sampling.dgl_import import import_dgl

    dgl = import_dgl()
    # Not dgl.metis_partition_assignment: it first copies the graph, to add reverse edges that are there already.
    from dgl import backend, partition, utils

    store = GraphStore.reopen(request["store"], request["digest"])
    no_edge_ids = torch.empty(0, dtype=torch.int64)
    graph: Any = dgl.graph(("csc", (store.indptr, store.indices, no_edge_ids)), num_nodes=store.num_nodes)._graph
    if request["directed"]:
        graph = partition._CAPI_DGLMakeSymmetric_Hetero(graph)
    train = torch.from_numpy(np.load(request["train"], allow_pickle=False))
    weights = [torch.ones(store.num_nodes, dtype=torch.int64)]
    if bool(train.any()):
        weights.append(train.to(torch.int64))
    packed = backend.to_dgl_nd(torch.stack(weights, 1).reshape(-1))
    found = partition._CAPI_DGLMetisPartition_Hetero(graph, request["parts"], packed, "k-way", True)
    if len(found) != store.num_nodes:
        raise SystemExit("METIS found no partition")
    part: npt.NDArray[np.int32] = utils.toindex(found).tousertensor().to(torch.int32).numpy()
    np.save(request["result"], part)


if __name__ == "__main__":
    os.environ.setdefault("DGLBACKEND", "pytorch")
    asked = json.loads(sys.argv[1])
    _end_with(asked["parent"])
    _child(asked)
