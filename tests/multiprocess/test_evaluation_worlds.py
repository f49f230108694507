"""Exact evaluation by real processes that share their tables, on one machine and on two pretended ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.exact_evaluation import awkward_store, dense_forward, made_model
from tests.helpers.ranks import run_ranks

WORLD = 2


@pytest.mark.slow
def test_processes_share_tables(tmp_path: Path) -> None:
    """In memory and in unnamed files; equal to the dense forward pass on every rank."""
    store = awkward_store(tmp_path / "store")
    folder = tmp_path / "spill"
    folder.mkdir()
    cases = [(memory, machines) for memory in (None, 0) for machines in (1, 2)]
    arguments = [
        {"store": str(store.path), "folder": str(folder), "memory_bytes": memory, "machines": machines}
        for memory, machines in cases
    ]
    expected = dense_forward(store, made_model("sage", store.num_features, 8))
    answers = run_ranks("tests.multiprocess.evaluation:logits", WORLD, arguments)
    for (memory, machines), ranks in zip(cases, answers, strict=True):
        assert len(ranks) == WORLD
        for answer in ranks:
            for logits in answer["logits"]:
                assert torch.allclose(torch.tensor(logits).double(), expected, rtol=1e-5, atol=1e-5)
            assert answer["tables"] == [[memory == 0, machines]] * len(answer["tables"])
            assert len(answer["tables"]) >= 4
            assert answer["left"] == []
