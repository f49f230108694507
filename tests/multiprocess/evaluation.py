"""What the ranks of test_evaluation_worlds do."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

from dngd.comm import Communicator
from dngd.graph import GraphStore
from dngd.train import evaluation_plan, tables
from tests.helpers.exact_evaluation import evaluator, made_model


def logits(communicator: Communicator, argument: dict[str, Any]) -> dict[str, Any]:
    """Return the logits of all nodes, and for each table where it lay and how many copies the world had of it.

    argument: store and folder (paths), memory_bytes, machines (ranks are dealt out to so many pretended ones).
    """
    store, folder = GraphStore.open(argument["store"]), Path(argument["folder"])
    machine = f"{tables._boot_id()}-{communicator.rank % argument['machines']}"
    model = made_model("sage", store.num_features, 8)
    seen: list[list[Any]] = []
    shared = tables.TableSpace.shared

    def watched(self: tables.TableSpace, *rest: Any) -> tables.Table:
        table = shared(self, *rest)
        seen.append([table.is_file, len(set(table.leaders))])
        return table

    with (
        mock.patch.object(tables, "SHARED_FROM_BYTES", 0),
        mock.patch.object(tables, "_boot_id", return_value=machine),
        mock.patch.object(evaluation_plan, "_LEAST_BLOCK_ROWS", 1),
        mock.patch.object(tables.TableSpace, "shared", watched),
    ):
        made = evaluator(store, model, communicator, rows=7, folders=[folder], memory_bytes=argument["memory_bytes"])
        found = [made.logits(model).tolist() for _ in range(2)]
    return {"logits": found, "tables": seen, "left": os.listdir(folder)}
