"""Ranks that share one GPU, and NCCL's collectives as far as one GPU can tell; run by `pytest -m gpu`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dngd.comm import ProcessGroupCommunicator, destroy_process_group, init_process_group
from dngd.comm.rounding import RoundedReduction
from tests.helpers.graphs import small_store
from tests.helpers.ranks import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here"),
]

WIRES: list[dict[str, Any]] = [
    {"strategy": "replicate"},
    {"strategy": "share_inverse", "inverse_delay": 3},
    {"strategy": "share_gradient"},
    {"strategy": "share_inverse", "factor_wire": "bfloat16"},
]


def test_ranks_that_share_a_gpu_train_alike(tmp_path: Path) -> None:
    """The same shards in one process and in two, on the CPU and on a GPU, give the same curve."""
    store = small_store(tmp_path / "store")
    fields: dict[str, Any] = {
        "dataset": str(store.path),
        "engine": "local",
        "num_workers": 2,
        "num_layers": 2,
        "fanout": [5, 5],
        "hidden": 32,
        "batch_size": 32,
        "num_samplers": 0,
        "epochs": 2,
        "dropout": 0.0,
    }
    configs = [
        fields | {"run_dir": str(tmp_path / f"run-{number}"), "kfac": {"inverse_update_period": 5, **wire}}
        for number, wire in enumerate(WIRES)
    ]
    on_cpu, on_gpu = ([{"config": config, "use_gpu": use_gpu} for config in configs] for use_gpu in (False, True))
    alone = run_ranks("tests.gpu.work:train", 1, on_cpu + on_gpu, limit_seconds=100)
    shared = run_ranks("tests.gpu.work:train", 2, on_gpu, limit_seconds=100)
    for wire, (on_cpu_alone,), (on_gpu_alone,), (first, second) in zip(WIRES, alone, alone[len(WIRES) :], shared):
        expected = on_cpu_alone["losses"]
        assert len(expected) == 2
        assert [at["device"] for at in (on_cpu_alone, on_gpu_alone, first, second)] == ["cpu", "cuda", "cuda", "cuda"]
        assert on_gpu_alone["losses"] == pytest.approx(expected, rel=5e-3), wire
        assert first["losses"] == pytest.approx(expected, rel=5e-3), wire
        assert second["losses"] == pytest.approx(first["losses"], rel=1e-6), wire
        assert first["sent"]["gradient"] > 0
        assert first["sent"]["factor"] > 0


@pytest.fixture
def nccl(tmp_path: Path) -> Iterator[ProcessGroupCommunicator]:
    if not dist.is_nccl_available():
        pytest.skip("this torch has no NCCL")
    torch.cuda.set_device(0)
    init_process_group(0, 1, f"file://{tmp_path}/rendezvous", backend="nccl", timeout_seconds=30)
    yield ProcessGroupCommunicator(timeout_seconds=30)
    destroy_process_group()


def test_every_collective_runs_on_nccl(nccl: ProcessGroupCommunicator) -> None:
    """A world of one: NCCL takes each call, type and layout that dngd gives it."""
    values = torch.randn(1000, device="cuda")
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8):
        flat = values.to(dtype)
        before = flat.clone()
        nccl.all_reduce(flat, "gradient").wait()
        nccl.broadcast(flat, 0, "preconditioned").wait()
        assert torch.equal(flat, before), dtype
        received, work = nccl.exchange(flat, "factor", group="factor")
        work.wait()
        assert torch.equal(received, before), dtype
        gathered, work = nccl.all_gather(flat, "factor", group="factor")
        work.wait()
        assert torch.equal(gathered, before), dtype
    assert nccl.gather_bytes(b"state") == [b"state"]
    assert nccl.broadcast_bytes(b"state") == b"state"
    nccl.barrier()
    reduction = RoundedReduction(values.clone(), torch.bfloat16, nccl, "factor", "factor")
    total, late = reduction.finish()
    assert torch.allclose(total + late + reduction.left, values, rtol=1e-6, atol=1e-6)
