"""Where a benchmark trains: the CPU, or a GPU that holds the features, as `dngd train` has it where they fit."""

from __future__ import annotations

import torch
from torch import Tensor

from dngd.errors import UserError
from dngd.graph import GraphStore
from dngd.train.placement import free_gpu_bytes, table_bytes


def features_on(device: torch.device, store: GraphStore) -> Tensor:
    """Return the feature table [N, F] there. Raises UserError if it takes more than half of a GPU's free memory."""
    if device.type == "cpu":
        return store.features
    size, free = table_bytes(store.features), free_gpu_bytes(device)
    if size > free // 2:
        raise UserError(
            f"the feature table takes {size / 2**30:.1f} GiB and the GPU has {free / 2**30:.1f} GiB free, of which it "
            "may use half; take a smaller graph, or leave --use-gpu out"
        )
    return store.features.to(device)


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done all that it was given: the clock is read after it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
