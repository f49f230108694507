"""Buffers and gradients of modules and optimizers of one's own, on real processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dngd.comm import LocalCommunicator
from dngd.graph import GraphStore
from tests.helpers.ranks import run_ranks
from tests.multiprocess.buffers import TYPES, fit

WORK = "tests.multiprocess.buffers:work"


def test_every_rank_gets_rank_0s_buffers_of_any_type() -> None:
    """Expanded ones too, in the memory that they have; sparse ones are left as they are."""
    found = run_ranks(WORK, 2, [{"do": "share"}, *({"do": "reduce", "dtype": t} for t in ("bfloat16", "float16"))])
    for rank, values in enumerate(found[0]):
        assert values[: len(TYPES)] == [[1.0] * 3] * len(TYPES)
        repeated, part, empty, sparse = values[len(TYPES) :]
        assert repeated == [[1.0] * 2] * 3
        assert part == [[[1.0]] * 5] * 2
        assert empty == []
        assert sparse == [[rank + 1.0, 0.0], [0.0, rank + 1.0]]
    for ranks in found[1:]:
        assert ranks[0] == ranks[1]
        assert ranks[0] == [pytest.approx(1.0, rel=1e-2), 6.0, 514.0]


def scenario(store: GraphStore, folder: Path, *, forgets: bool) -> dict[str, Any]:
    folder.mkdir(parents=True)
    fields = {"dataset": str(store.path), "engine": "local", "batch_size": 30, "num_layers": 2, "fanout": [5, 5]}
    fields |= {"epochs": 2, "num_shards": 2, "num_samplers": 0, "model": "custom", "optimizer": "custom"}
    return {"do": "fit", "fields": fields | {"run_dir": str(folder)}, "forgets": forgets}


def test_a_module_and_an_optimizer_of_ones_own_are_the_same_run(store: GraphStore, tmp_path: Path) -> None:
    """With a sparse buffer, and with gradients that are None after each step."""
    alone = [fit(LocalCommunicator(), scenario(store, tmp_path / f"alone{f}", forgets=f)) for f in (False, True)]
    assert alone[0] == alone[1]
    pairs = run_ranks(WORK, 2, [scenario(store, tmp_path / f"pair{f}", forgets=f) for f in (False, True)])
    assert pairs[0] == pairs[1]
    for one, other in pairs:
        assert one == other, "ranks drifted apart"
        np.testing.assert_allclose(one, alone[0], rtol=1e-4)
