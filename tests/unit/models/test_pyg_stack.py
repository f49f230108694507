"""Stacks of PyG's convolutions over layer graphs: which of them are right there, and what becomes of the others."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_geometric.nn as pyg
from torch import Tensor, nn
from torch_geometric.utils import degree

import dngd
from dngd.errors import UserError
from dngd.graph import GraphStore
from dngd.models import pyg_stack
from dngd.models.pyg_model import small_batch
from dngd.train.parts import RunParts, make_module
from tests.helpers.mutants import assert_caught

WIDTH, CLASSES = 6, 3


class OwnGCN(pyg.GCNConv):
    """A class derived from PyG's."""


class Unweighted(pyg.GCNConv):
    """It passes no edge weights on."""

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:  # type: ignore[override]
        out: Tensor = super().forward(x, edge_index)
        return out


class Degrees(nn.Module):
    """It counts the edges that leave each row."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.conv = pyg.SAGEConv(a, b)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.conv(x / (1 + degree(edge_index[0], len(x)))[:, None], edge_index)


Make = Callable[[int, int], nn.Module]

TAKEN: dict[str, Make] = {
    "sage": pyg.SAGEConv,
    "sage, all options": lambda a, b: pyg.SAGEConv(a, b, normalize=True, project=True),
    "gat": pyg.GATConv,
    "gatv2": pyg.GATv2Conv,
    "gin": lambda a, b: pyg.GINConv(nn.Linear(a, b)),
    "graph": pyg.GraphConv,
    "pna": lambda a, b: pyg.PNAConv(a, b, aggregators=["mean"], scalers=["amplification"], deg=torch.ones(4).long()),
    "le": pyg.LEConv,
    "cluster": pyg.ClusterGCNConv,
    "transformer": pyg.TransformerConv,
    "gated": pyg.ResGatedGraphConv,
    "edge": lambda a, b: pyg.EdgeConv(nn.Linear(2 * a, b)),
    "supergat": pyg.SuperGATConv,
    "feast": pyg.FeaStConv,
    "gcn": lambda a, b: pyg.GCNConv(a, b, normalize=False),
    "own gcn": lambda a, b: OwnGCN(a, b, normalize=False),
    "tag": lambda a, b: pyg.TAGConv(a, b, K=1, normalize=False),
    "sequential": lambda a, b: pyg.Sequential("x, edge_index", [(pyg.SAGEConv(a, b), "x, edge_index -> x")]),
}

REFUSED: dict[str, tuple[Make, str]] = {
    "gcn": (pyg.GCNConv, "GCNConv normalises by the degrees.*; make it with normalize=False, and it gets"),
    "own gcn": (OwnGCN, "OwnGCN normalises by the degrees.*; make it with normalize=False, and it gets"),
    "unweighted gcn": (lambda a, b: Unweighted(a, b, normalize=False), "takes no edge_weight.*; let it take one"),
    "tag": (lambda a, b: pyg.TAGConv(a, b, K=1), r"TAGConv normalises by.*; give a model of forward\(x, edge_index\)"),
    "tag of two hops": (lambda a, b: pyg.TAGConv(a, b, K=2, normalize=False), "depends on nodes that have no edge"),
    "lg": (lambda a, b: pyg.LGConv(), "LGConv normalises by"),
    "inside": (
        lambda a, b: pyg.Sequential("x, edge_index", [(pyg.GCNConv(a, b), "x, edge_index -> x")]),
        "GCNConv module_0 normalises by",
    ),
    "sg": (pyg.SGConv, "SGConv normalises by degrees of the whole graph.*; use APPNP or GCNConv"),
    "ssg": (lambda a, b: pyg.SSGConv(a, b, alpha=0.1, K=2), "SSGConv normalises by degrees"),
    "cheb": (lambda a, b: pyg.ChebConv(a, b, K=3), "ChebConv normalises by degrees"),
    "arma": (pyg.ARMAConv, "ARMAConv normalises by degrees"),
    "gated": (lambda a, b: pyg.GatedGraphConv(WIDTH, 2), "layer 0 of the PyGStack, GatedGraphConv, depends on nodes"),
    "dir": (lambda a, b: pyg.DirGNNConv(pyg.SAGEConv(a, b)), "depends on nodes that have no edge"),
    "flow": (lambda a, b: pyg.SAGEConv(a, b, flow="target_to_source"), "flow='source_to_target'"),
}


def stack_of(make: Make) -> dngd.PyGStack:
    torch.manual_seed(0)
    return dngd.PyGStack([make(WIDTH, 5), make(5, CLASSES)], dropout=0.0)


@pytest.mark.parametrize("kind", TAKEN)
def test_what_is_right_is_taken_without_a_word(kind: str) -> None:
    stack = stack_of(TAKEN[kind])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stack.check(WIDTH)
    assert all(conv.training for conv in stack.convs)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_right_is_refused(kind: str) -> None:
    make, message = REFUSED[kind]
    with pytest.raises(UserError, match=message):
        stack_of(make).check(WIDTH)


def test_what_may_be_wrong_is_warned_of() -> None:
    with pytest.warns(
        UserWarning, match=r"layer 0 of the PyGStack, Degrees, gives other rows.*Predictions will depend"
    ):
        dngd.PyGStack([Degrees(WIDTH, CLASSES)]).check(WIDTH)
    with pytest.warns(UserWarning, match="could not be run on a small graph"):
        dngd.PyGStack([pyg.SAGEConv(WIDTH + 1, 5)]).check(WIDTH)


def law_a_gcn_has_the_whole_graphs_coefficients(kind: type[pyg.GCNConv]) -> None:
    batch, x, edge_index = small_batch(WIDTH, 2, weighted=False)
    stack = stack_of(lambda a, b: kind(a, b, normalize=False)).eval()
    convs = [pyg.GCNConv(WIDTH, 5), pyg.GCNConv(5, CLASSES)]
    for conv, given in zip(convs, stack.convs):
        conv.load_state_dict(given.state_dict())
    expected = convs[1](convs[0](x, edge_index).relu(), edge_index)[batch.seeds]
    assert torch.allclose(stack(batch), expected, atol=1e-5)


@pytest.mark.parametrize("kind", [pyg.GCNConv, OwnGCN])
def test_a_gcn_has_the_whole_graphs_coefficients(kind: type[pyg.GCNConv]) -> None:
    law_a_gcn_has_the_whole_graphs_coefficients(kind)
    assert_caught(lambda: law_a_gcn_has_the_whole_graphs_coefficients(kind), pyg_stack, "_is_gcn", lambda conv: False)


def test_a_run_checks_its_stack(store: GraphStore, tmp_path: Path) -> None:
    config = dngd.TrainConfig(dataset=str(store.path), engine="local", model="custom", run_dir=tmp_path / "run")
    shape = dngd.GraphShape(WIDTH, CLASSES)

    def made(make: Any) -> nn.Module:
        return make_module(config, RunParts(module=lambda shape: stack_of(make)), shape)

    stack_of(TAKEN["sage"])
    after = torch.random.get_rng_state()
    assert isinstance(made(TAKEN["sage"]), dngd.PyGStack)
    assert torch.equal(torch.random.get_rng_state(), after), "the check draws from the run's stream"
    with pytest.raises(UserError, match="GatedGraphConv, depends on nodes"):
        made(REFUSED["gated"][0])
