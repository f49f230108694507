"""A run on the CPU leaves CUDA alone; a worker that shares a GPU counts on its share."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from dngd.config import TrainConfig
from dngd.train.run import _gpus_with_random_state


@pytest.mark.parametrize(
    ("use_gpu", "available", "initialised", "gpus"),
    [
        (False, True, False, 0),
        (False, False, False, 0),
        (False, True, True, 2),
        (True, True, False, 2),
        (True, False, False, 0),
    ],
)
def test_random_states_are_kept_of_gpus_in_use(
    monkeypatch: pytest.MonkeyPatch, use_gpu: bool, available: bool, initialised: bool, gpus: int
) -> None:
    """The driver's library may see two GPUs that CUDA cannot use: torch counts them all the same."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialised)
    found: Sequence[int] = _gpus_with_random_state(TrainConfig(dataset="x", use_gpu=use_gpu))
    assert len(found) == gpus


@pytest.mark.parametrize(
    ("engine", "gpus", "share"), [("ray", 0.25, 0.25), ("ray", 1.0, 1.0), ("ray", 2.0, 1.0), ("local", 0.25, 1.0)]
)
def test_a_workers_share_of_its_gpu(engine: str, gpus: float, share: float) -> None:
    config = TrainConfig(dataset="x", engine=engine, use_gpu=True, ray={"gpus_per_worker": gpus})
    assert config.gpu_share == share
