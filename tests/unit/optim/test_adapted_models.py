"""Whole models of PyG, DGL and torch modules under KFACPreconditioner: they train, and what is left over is named."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import dgl
import pytest
import torch
import torch.nn.functional as F
from dgl.nn.pytorch import GraphConv, SAGEConv
from torch import Tensor, nn
from torch_geometric import nn as pyg

from dngd.optim import KFACPreconditioner

pytestmark = pytest.mark.usefixtures("one_thread")

N, D, CLASSES = 60, 8, 3


def task(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features, edges mostly within classes, relations, labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(N) % CLASSES
    x = torch.randn(N, D, generator=generator)
    x[:, :CLASSES] += F.one_hot(labels, CLASSES)
    source = torch.randint(N, (300,), generator=generator)
    step = CLASSES * torch.randint(1, N // CLASSES, (300,), generator=generator)
    step[::6] += 1
    edge_index = torch.stack([source, (source + step) % N])
    return x, edge_index, torch.randint(2, (300,), generator=generator), labels


class Net(nn.Module):
    """Two layers with what stands between them; `call` says how a convolution is called."""

    def __init__(self, first: nn.Module, second: nn.Module, between: nn.Module, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.first, self.between, self.second, self.call = first, between, second, call

    def forward(self, x: Tensor, edge_index: Tensor, relation: Tensor) -> Tensor:
        h = torch.relu(self.between(self.call(self.first, x, edge_index, relation)))
        return self.call(self.second, h, edge_index, relation)


def plainly(conv: Any, x: Tensor, edge_index: Tensor, relation: Tensor) -> Tensor:
    out: Tensor = conv(x, edge_index)
    return out


def by_relation(conv: Any, x: Tensor, edge_index: Tensor, relation: Tensor) -> Tensor:
    out: Tensor = conv(x, edge_index, relation)
    return out


def on_dgl(conv: Any, x: Tensor, edge_index: Tensor, relation: Tensor) -> Tensor:
    out: Tensor = conv(dgl.add_self_loop(dgl.graph((edge_index[0], edge_index[1]), num_nodes=N)), x)
    return out


class Looked(nn.Module):
    """Embeddings of node numbers, added to the features."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.net = nn.Embedding(N, D), nn.Linear(D, CLASSES)

    def forward(self, x: Tensor, edge_index: Tensor, relation: Tensor) -> Tensor:
        out: Tensor = self.net(x + self.table(torch.arange(N)))
        return out


H = 16
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, str], list[str]]] = {
    "gcn": (
        lambda: Net(pyg.GCNConv(D, H), pyg.GCNConv(H, CLASSES), pyg.BatchNorm(H), plainly),
        {"first": "GCNConv", "between.module": "normalization", "second": "GCNConv"},
        [],
    ),
    "gat": (
        lambda: Net(pyg.GATConv(D, H, heads=2), pyg.GATConv(2 * H, CLASSES), nn.LayerNorm(2 * H), plainly),
        {
            "first.bias": "bias",
            "first.lin": "linear",
            "between": "normalization",
            "second.bias": "bias",
            "second.lin": "linear",
        },
        ["first.att_src", "first.att_dst", "second.att_src", "second.att_dst"],
    ),
    "gin": (
        lambda: Net(
            pyg.GINConv(nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, H)), train_eps=True),
            pyg.GINConv(nn.Linear(H, CLASSES)),
            pyg.LayerNorm(H),
            plainly,
        ),
        {"first.nn.0": "linear", "first.nn.2": "linear", "second.nn": "linear"},
        ["first.eps", "between.weight", "between.bias"],
    ),
    "rgcn": (
        lambda: Net(
            pyg.RGCNConv(D, H, 2), pyg.FastRGCNConv(H, CLASSES, 2, num_bases=1), nn.BatchNorm1d(H), by_relation
        ),
        {"first": "RGCNConv", "between": "normalization", "second": "RGCNConv"},
        ["second.comp"],
    ),
    "rgcn blocks": (
        lambda: Net(pyg.RGCNConv(D, H, 2, num_blocks=2), pyg.RGCNConv(H, CLASSES, 2), nn.Identity(), by_relation),
        {"first.bias": "bias", "second": "RGCNConv"},
        ["first.weight", "first.root"],
    ),
    "sage": (
        lambda: Net(pyg.SAGEConv(D, H), pyg.SAGEConv(H, CLASSES, project=True), nn.Identity(), plainly),
        dict.fromkeys(("first.lin_l", "first.lin_r", "second.lin", "second.lin_l", "second.lin_r"), "linear"),
        [],
    ),
    "dgl": (
        lambda: Net(GraphConv(D, H, activation=F.elu), SAGEConv(H, CLASSES, "mean"), nn.LayerNorm(H), on_dgl),
        {
            "first": "GraphConv",
            "between": "normalization",
            "second.fc_neigh": "SAGEConv neighbours",
            "second.fc_self": "linear",
        },
        [],
    ),
    "embedding": (Looked, {"table": "embedding", "net": "linear"}, []),
}


def build(name: str, **options: Any) -> tuple[nn.Module, KFACPreconditioner, list[str]]:
    """The model, its preconditioner, and the parameters that the warning named."""
    torch.manual_seed(1)
    model = MODELS[name][0]()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pre = KFACPreconditioner(model, **options)
    texts = [
        str(w.message) for w in caught if issubclass(w.category, UserWarning) and "plain gradient" in str(w.message)
    ]
    return model, pre, texts[0].split(": ", 1)[1].split(", ") if texts else []


@pytest.mark.parametrize("name", MODELS)
def test_layers_and_left_over_parameters(name: str) -> None:
    model, pre, named = build(name)
    _, kinds, left_over = MODELS[name]
    assert {layer.name: layer.kind for layer in pre.layers.values()} == kinds
    assert named == left_over
    covered = {id(p) for layer in pre.layers.values() for p in layer.parameters}
    assert [n for n, p in model.named_parameters() if id(p) not in covered] == left_over


EKFAC, MONTE_CARLO = {"method": "ekfac"}, {"fisher": "monte_carlo"}


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {}) for name in MODELS]
    + [(name, EKFAC) for name in ("gcn", "rgcn", "embedding")]
    + [(name, MONTE_CARLO) for name in ("gcn", "gat", "rgcn", "dgl", "embedding")],
    ids=str,
)
def test_models_train(name: str, options: dict[str, Any]) -> None:
    x, edge_index, relation, labels = task()
    model, pre, _ = build(name, factor_update_period=2, inverse_update_period=5, damping=1e-2, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        out = model(x, edge_index, relation)
        if options.get("fisher"):
            pre.observe(out)
        loss = F.cross_entropy(out, labels)
        loss.backward()
        pre.step(num_samples=N)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], losses
    for factors in pre.factors().values():
        assert float(factors.A.diagonal().sum()) > 0
        assert float(factors.G.diagonal().sum()) > 0


@pytest.mark.parametrize("options", [{}, MONTE_CARLO], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_layers_own_output_is_measured_whatever_hooks_make_of_it(name: str, options: dict[str, Any]) -> None:
    """One that stood there before was asked first, and its result taken for the layer's."""
    x, edge_index, relation, labels = task()

    def factors(is_first: bool, *, in_place: bool) -> Any:
        def doubled(module: nn.Module, inputs: Any, output: Any) -> Any:
            return (output.mul_(2.0) if in_place else 2.0 * output) if isinstance(output, Tensor) else None

        def add_hooks(model: nn.Module) -> None:
            for path, module in model.named_modules():
                if path and not isinstance(module, nn.Sequential | nn.Dropout | nn.Identity | nn.ReLU):
                    module.register_forward_hook(doubled)

        torch.manual_seed(1)
        model = MODELS[name][0]()
        if is_first:
            add_hooks(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pre = KFACPreconditioner(model, **options)
        if not is_first:
            add_hooks(model)
        out = model(x, edge_index, relation)
        if options:
            pre.observe(out)
        F.cross_entropy(out, labels).backward()
        pre.step(num_samples=N)
        return pre.factors()

    expected = factors(False, in_place=False)
    for is_first, in_place in ((True, False), (True, True)):
        found = factors(is_first, in_place=in_place)
        for layer, (a, g) in expected.items():
            assert torch.allclose(found[layer].A, a, rtol=1e-4, atol=1e-6)
            assert torch.allclose(found[layer].G, g, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_copies_are_not_measured(name: str) -> None:
    """A copied model runs, and its passes leave the preconditioner's sums alone; a closed one leaves no hook."""
    x, edge_index, relation, _ = task()
    model, pre, _ = build(name)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        twin(x, edge_index, relation).sum().backward()
    assert all(layer.pending is None for layer in pre.layers.values())
    pre.close()
    model(x, edge_index, relation).sum().backward()
    assert all(layer.pending is None for layer in pre.layers.values())


def test_a_convolution_that_is_the_whole_model() -> None:
    assert list(KFACPreconditioner(GraphConv(D, CLASSES)).layers) == [""]
    assert list(KFACPreconditioner(SAGEConv(D, CLASSES, "gcn")).layers) == ["fc_neigh"]
    with pytest.warns(UserWarning, match="att_src"):
        pre = KFACPreconditioner(pyg.GATConv(D, CLASSES))
    assert list(pre.layers) == ["bias", "lin"]
