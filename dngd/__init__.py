"""dngd: distributed natural-gradient training of graph neural networks."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dngd.sampling.dgl_import import install_import_hook

if TYPE_CHECKING:
    from dngd.config import TrainConfig
    from dngd.errors import RunInterrupted, TrainingError, UserError
    from dngd.graph import GraphStore
    from dngd.launch import Trainer
    from dngd.models import GraphBatch, GraphShape, LayerEdges, PyGModel, PyGStack
    from dngd.sampling import NeighborLoader
    from dngd.train import Callback, RunResult, RunState

__version__ = "0.1.0"
__all__ = [
    "Callback",
    "GraphBatch",
    "GraphShape",
    "GraphStore",
    "LayerEdges",
    "NeighborLoader",
    "PyGModel",
    "PyGStack",
    "RunInterrupted",
    "RunResult",
    "RunState",
    "TrainConfig",
    "Trainer",
    "TrainingError",
    "UserError",
    "__version__",
]

_HOMES = {
    "Callback": "dngd.train",
    "GraphBatch": "dngd.models",
    "GraphShape": "dngd.models",
    "GraphStore": "dngd.graph",
    "LayerEdges": "dngd.models",
    "NeighborLoader": "dngd.sampling",
    "PyGModel": "dngd.models",
    "PyGStack": "dngd.models",
    "RunInterrupted": "dngd.errors",
    "RunResult": "dngd.train",
    "RunState": "dngd.train",
    "TrainConfig": "dngd.config",
    "Trainer": "dngd.launch",
    "TrainingError": "dngd.errors",
    "UserError": "dngd.errors",
}


# `import dgl` works after `import dngd`; DGL itself is not loaded by this.
install_import_hook()


def __getattr__(name: str) -> Any:
    # Lazy: `import dngd.optim` in a user's own loop should not load DGL.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in ("graph", "optim"):
        return importlib.import_module(f"dngd.{name}")
    raise AttributeError(f"module 'dngd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
