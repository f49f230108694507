"""Whole models of PyG over batches: what they compute there, on the whole graph, and what is refused."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_geometric.nn as pyg
from torch import Tensor, nn
from torch_geometric.utils import add_self_loops, degree

import dngd
from dngd.errors import UserError
from dngd.graph import GraphStore
from dngd.models.joined_layers import join_layers
from dngd.models.pyg_model import small_batch
from dngd.sampling.minibatch import BatchCoordinates, MiniBatch
from dngd.sampling.sampler import NeighborSampler
from dngd.train.module_batches import ModuleBatchBuilder

CPU = torch.device("cpu")
WIDTH, CLASSES, NODES = 6, 3, 80


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "weighted"])
def directed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> GraphStore:
    """A directed graph, its in-degrees from 0 on, with and without weights."""
    generator = torch.Generator().manual_seed(3)
    edges = torch.randint(NODES, (2, 300), generator=generator)
    edges[1] = edges[1] * 3 // 4
    weight = torch.rand(300, generator=generator) + 0.5 if request.param else None
    path = tmp_path_factory.mktemp("directed") / "graph"
    features = torch.randn(NODES, WIDTH, generator=generator)
    labels = torch.arange(NODES) % CLASSES
    kept: Any = "sum" if request.param else "drop"
    GraphStore.write(path, features=features, edge_index=edges, edge_weight=weight, labels=labels, duplicates=kept)
    return GraphStore.open(path)


def edges_of(store: GraphStore) -> Tensor:
    return torch.stack([store.indices, torch.repeat_interleave(torch.arange(store.num_nodes), store.indptr.diff())])


def batch_of(store: GraphStore, seeds: Tensor, fanouts: tuple[int, ...]) -> dngd.GraphBatch:
    """A sampled batch; -1: all neighbours."""
    sampler = NeighborSampler(store.indptr, store.indices, store.edge_weight, fanouts)
    builder = ModuleBatchBuilder(store, store.features.double(), CPU)
    drawn = MiniBatch(seeds, sampler.sample(seeds, 5), BatchCoordinates(0, 0, 0))
    graph = builder.batch(drawn).graph
    assert graph is not None
    return graph


class Skip(nn.Module):
    """Two convolutions with a norm, a residual and the rows of the first one in the output."""

    def __init__(self, conv: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(WIDTH, 4), nn.Linear(8, CLASSES)
        self.first, self.second = conv(), conv()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor | None = None) -> Tensor:
        x = self.embed(x)
        first = torch.tanh(self.norm(self.first(x, edge_index, edge_weight=edge_weight))) + x
        second = self.second(first, edge_index, edge_weight=edge_weight)
        out: Tensor = self.out(torch.cat([first, second], dim=1))
        return out


class Initial(nn.Module):
    """A convolution that takes the model's first rows, too."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.embed, self.conv, self.out = nn.Linear(WIDTH, 4), conv, nn.Linear(4, CLASSES)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        x = self.embed(x)
        out: Tensor = self.out(self.conv(torch.relu(self.conv(x, x, edge_index)), x, edge_index))
        return out


class Stacked(nn.Module):
    """DNAConv's rows: those of all layers before."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv, self.out = nn.Linear(WIDTH, 4), pyg.DNAConv(4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        first = self.embed(x)[:, None]
        rows = torch.cat([first, self.conv(first, edge_index)[:, None]], dim=1)
        out: Tensor = self.out(self.conv(rows, edge_index))
        return out


MODELS: dict[str, Callable[[], nn.Module]] = {
    "gcn": lambda: pyg.GCN(WIDTH, 5, 2, CLASSES),
    "gcn of three layers": lambda: pyg.GCN(WIDTH, 5, 3, CLASSES),
    "gcn, all options": lambda: pyg.GCN(WIDTH, 5, 2, CLASSES, norm="batch_norm", jk="cat", improved=True, cached=True),
    "gcn without loops": lambda: pyg.GCN(WIDTH, 5, 2, CLASSES, add_self_loops=False),
    "gcn not normalised": lambda: pyg.GCN(WIDTH, 5, 2, CLASSES, normalize=False),
    "sage": lambda: pyg.GraphSAGE(WIDTH, 5, 2, CLASSES, dropout=0.5, norm="layer_norm", norm_kwargs={"mode": "node"}),
    "sage max": lambda: pyg.GraphSAGE(WIDTH, 5, 2, CLASSES, aggr="max", jk="max"),
    "gat": lambda: pyg.GAT(WIDTH, 6, 2, CLASSES, heads=2),
    "gatv2": lambda: pyg.GAT(WIDTH, 6, 2, CLASSES, v2=True, jk="lstm"),
    "gin": lambda: pyg.GIN(WIDTH, 5, 2, CLASSES, norm="batch_norm"),
    "pna": lambda: pyg.PNA(
        WIDTH, 5, 2, CLASSES, aggregators=["mean", "max"], scalers=["identity", "amplification"], deg=torch.ones(9)
    ),
    "edge": lambda: pyg.EdgeCNN(WIDTH, 5, 2, CLASSES),
    "sequential": lambda: pyg.Sequential(
        "x, edge_index",
        [
            (pyg.GCNConv(WIDTH, 5), "x, edge_index -> x"),
            nn.ReLU(),
            (pyg.SAGEConv(5, CLASSES), "x, edge_index -> x"),
        ],
    ),
    "one convolution": lambda: pyg.GCNConv(WIDTH, CLASSES),
    "skip of gcn": lambda: Skip(lambda: pyg.GCNConv(4, 4)),
    "skip of appnp": lambda: Skip(lambda: pyg.APPNP(1, 0.2, cached=True)),
    "skip of tag": lambda: Skip(lambda: pyg.TAGConv(4, 4, K=1)),
    "skip of lightgcn": lambda: Skip(lambda: pyg.LGConv()),
    "appnp": lambda: pyg.APPNP(2, 0.2),
    "gcn2": lambda: Initial(pyg.GCN2Conv(4, 0.1)),
    "fa": lambda: Initial(pyg.FAConv(4, dropout=0.5)),
    "dna": Stacked,
    "cluster": lambda: pyg.ClusterGCNConv(WIDTH, CLASSES),
}


def settled(model: nn.Module) -> nn.Module:
    """In float64, running means and all parameters, biases included, drawn anew."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.double().eval()


def on_whole_graph(model: nn.Module, store: GraphStore) -> Tensor:
    weights = {"edge_weight": store.edge_weight.double()} if store.edge_weight is not None else {}
    if not isinstance(model, (Skip, pyg.GCN, pyg.GCNConv, pyg.APPNP)):
        weights = {}
    with torch.no_grad():
        out: Tensor = model(store.features.double(), edges_of(store), **weights)
    return out


@pytest.mark.parametrize("kind", MODELS)
def test_whole_neighbourhoods_give_the_whole_graphs_outputs(directed: GraphStore, kind: str) -> None:
    """Seeds without in-edges and outer rows included; and a plain copy gives the same on the whole graph again."""
    model = settled(MODELS[kind]())
    seeds = torch.randperm(NODES, generator=torch.Generator().manual_seed(1))[:6]
    depth = 3 if kind == "gcn of three layers" else 2
    expected = on_whole_graph(copy.deepcopy(model), directed)
    before = {name: (conv.normalize, conv.cached) for name, conv in model.named_modules() if hasattr(conv, "cached")}
    wrapped = dngd.PyGModel(copy.deepcopy(model))
    for fanouts in ((-1, -1, -1)[:depth], (400, 300, 200)[:depth], (-1, -1, -1, -1)):
        batch = batch_of(directed, seeds, fanouts)
        if len(fanouts) == 2:
            assert batch.layers[0].num_dst < batch.layers[0].num_src, "there are outer rows"
        with torch.no_grad():
            out = wrapped(batch)
        assert out.shape == expected[seeds].shape
        assert torch.allclose(out, expected[seeds], atol=2e-5)  # the coefficients are float32
    plain = wrapped.plain()
    assert type(plain) is type(model)
    assert before == {n: (conv.normalize, conv.cached) for n, conv in plain.named_modules() if hasattr(conv, "cached")}
    assert not any(module._forward_pre_hooks for module in plain.modules())
    assert torch.equal(on_whole_graph(plain, directed), expected)
    assert torch.allclose(on_whole_graph(wrapped.model, directed), expected), "outside of a batch it normalises itself"
    with torch.no_grad():
        again = wrapped(batch_of(directed, seeds.flip(0), (-1, -1, -1)[:depth]))
    assert torch.allclose(again, expected[seeds.flip(0)], atol=2e-5), "plain() leaves the model as it is"


def test_each_row_has_the_neighbours_that_were_drawn_for_it_first(directed: GraphStore) -> None:
    """In the order of PyG's loaders; a row that an output needs has its in-edges."""
    seeds = torch.arange(0, 60, 7)
    batch = batch_of(directed, seeds, (2, 4, 3))
    joined = join_layers(batch.layers)
    source, destination = joined.edges.edge_index
    hops = torch.repeat_interleave(torch.arange(4), torch.tensor(joined.nodes_per_hop))
    assert hops.numel() == batch.x.shape[0]
    assert joined.nodes_per_hop[0] == seeds.numel()
    assert destination.tolist() == sorted(destination.tolist())
    assert torch.bincount(hops[destination], minlength=3).tolist() == joined.edges_per_hop
    degrees = directed.in_degrees()[batch.nodes]
    fanouts = torch.tensor([3, 4, 2, 0])[hops]  # the outputs' side first
    assert torch.equal(torch.bincount(destination, minlength=hops.numel()), torch.minimum(degrees, fanouts))
    assert bool((hops[source] <= hops[destination] + 1).all())
    known = set(zip(*edges_of(directed).tolist()))
    assert set(zip(batch.nodes[source].tolist(), batch.nodes[destination].tolist())) <= known
    if directed.edge_weight is not None:
        weight_of = dict(zip(zip(*edges_of(directed).tolist()), directed.edge_weight.tolist()))
        drawn = zip(batch.nodes[source].tolist(), batch.nodes[destination].tolist())
        assert joined.edges.edge_weight is not None
        assert [weight_of[edge] for edge in drawn] == joined.edges.edge_weight.tolist()


@pytest.mark.parametrize("kind", ["gcn of three layers", "sage", "gat"])
def test_rows_that_no_output_needs_are_left_out_where_a_model_can(directed: GraphStore, kind: str) -> None:
    """PyG's own models trim: fewer rows in each layer, and the same outputs of a sample."""
    model = dngd.PyGModel(settled(MODELS[kind]()))
    batch = batch_of(directed, torch.arange(0, 60, 7), (2, 4, 3))
    seen: list[int] = []
    for conv in model.model.convs:  # type: ignore[union-attr]
        conv.register_forward_hook(lambda conv, inputs, out: seen.append(out.shape[0]))
    with torch.no_grad():
        trimmed = model(batch)
        model._takes -= {"num_sampled_nodes_per_hop"}
        assert torch.allclose(model(batch), trimmed, atol=1e-9)
    rows, layers = batch.x.shape[0], len(seen) // 2
    assert seen[layers:] == [rows] * layers
    assert seen[0] == rows
    assert seen[:layers] == sorted(seen[:layers], reverse=True)
    assert seen[1] < rows


def test_rows_stay_where_those_of_all_layers_meet(directed: GraphStore) -> None:
    """PyG's jumping knowledge fails on rows that were left out."""
    model = dngd.PyGModel(settled(MODELS["gcn, all options"]()))
    assert model(batch_of(directed, torch.arange(0, 60, 7), (2, 2))).shape == (9, CLASSES)
    deeper = dngd.PyGModel(settled(MODELS["gcn of three layers"]()))
    batch = batch_of(directed, torch.arange(0, 60, 7), (2, 2))
    out = deeper(batch)
    deeper._takes -= {"num_sampled_nodes_per_hop"}
    assert torch.allclose(out, deeper(batch)), "its last layer has neighbours, too"


def test_one_layer_of_a_sample_is_that_of_a_stack(directed: GraphStore) -> None:
    """The same unbiased coefficients."""
    conv = pyg.GCNConv(WIDTH, CLASSES).double()
    stack = dngd.PyGStack([pyg.GCNConv(WIDTH, CLASSES, normalize=False).double()])
    stack.convs[0].load_state_dict(conv.state_dict())
    batch = batch_of(directed, torch.arange(20), (2,))
    assert torch.allclose(dngd.PyGModel(conv)(batch), stack(batch))


def test_outer_rows_see_themselves(directed: GraphStore) -> None:
    """Not zeros, which a BatchNorm in training would take for rows."""
    conv = pyg.GCNConv(WIDTH, CLASSES).double()
    seen: list[Tensor] = []
    model = dngd.PyGModel(conv)
    conv.register_forward_hook(lambda conv, inputs, out: seen.append(out))
    batch = batch_of(directed, torch.arange(20), (2,))
    model(batch)
    outer = batch.layers[0].num_dst
    assert batch.x.shape[0] > outer
    assert torch.allclose(seen[0][outer:], conv.lin(batch.x[outer:]) + conv.bias)


def test_checkpointed_activations_see_the_batch_again(directed: GraphStore) -> None:
    """A backward pass, after forward is done, runs the convolution once more: its gradients are the same."""

    class Checkpointed(nn.Module):
        def __init__(self, again: bool) -> None:
            super().__init__()
            self.conv, self.again = pyg.GCNConv(WIDTH, CLASSES).double(), again

        def forward(self, x: Tensor, edge_index: Tensor) -> Any:
            if not self.again:
                return self.conv(x, edge_index)
            return torch.utils.checkpoint.checkpoint(self.conv, x, edge_index, use_reentrant=False)

    plainly, again = (dngd.PyGModel(Checkpointed(again)) for again in (False, True))
    again.load_state_dict(plainly.state_dict())
    batch = batch_of(directed, torch.arange(20), (2,))
    for model in (plainly, again):
        model(batch).square().sum().backward()
    for one, other in zip(plainly.parameters(), again.parameters()):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.allclose(one.grad, other.grad)


def test_copies_and_names(directed: GraphStore) -> None:
    """A copy is on its own, pickled or not; the state dict has the model's names, also inside of another module."""
    given = settled(pyg.GCN(WIDTH, 5, 2, CLASSES, norm="batch_norm"))
    names = list(given.state_dict())
    model = dngd.PyGModel(given)
    batch = batch_of(directed, torch.arange(20), (-1, -1))
    expected = model(batch)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        assert torch.equal(copied(batch), expected)
        assert list(copied.state_dict()) == names
        nn.init.zeros_(copied.model.convs[0].lin.weight)
        assert not torch.equal(copied(batch), expected)
        copied.load_state_dict(model.state_dict())
        assert torch.equal(copied(batch), expected)
    fresh = dngd.PyGModel(settled(pyg.GCN(WIDTH, 5, 2, CLASSES, norm="batch_norm")))
    assert len(pickle.dumps(model)) < len(pickle.dumps(fresh)) + 100, "without the last batch"
    outer = nn.Sequential(model)
    assert list(outer.state_dict()) == [f"0.{name}" for name in names]
    outer.load_state_dict({name: tensor + 1 for name, tensor in outer.state_dict().items()})
    assert torch.equal(model.state_dict()["convs.0.bias"], model.model.convs[0].bias)  # type: ignore
    assert not torch.equal(model(batch), expected)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict(model.state_dict() | {"more": torch.ones(1)})


class OtherEdges(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = pyg.GCNConv(WIDTH, CLASSES)

    def forward(self, x: Tensor, edge_index: Tensor) -> Any:
        return self.conv(x, add_self_loops(edge_index)[0])


class OtherWeights(OtherEdges):
    def forward(self, x: Tensor, edge_index: Tensor) -> Any:
        return self.conv(x, edge_index, 1 / degree(edge_index[1])[edge_index[1]])


class ThirdArgument(OtherEdges):
    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Any:
        return self.conv(x, edge_index)


class OwnForward(pyg.GCNConv):  # type: ignore[misc]
    def forward(self, x: Tensor, edge_index: Tensor) -> Any:
        return super().forward(x, edge_index)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (ThirdArgument, "ThirdArgument.forward wants batch beside rows and edges"),
        (lambda: pyg.SGConv(WIDTH, CLASSES, cached=True), "SGConv normalises by degrees of the whole graph.*use APPNP"),
        (lambda: nn.Sequential(pyg.ChebConv(WIDTH, CLASSES, K=2)), "ChebConv 0 normalises"),
        (lambda: pyg.ARMAConv(WIDTH, CLASSES), "ARMAConv normalises"),
        (lambda: pyg.SSGConv(WIDTH, CLASSES, 0.1), "SSGConv normalises"),
        (lambda: pyg.MixHopConv(WIDTH, CLASSES), "MixHopConv normalises"),
        (lambda: pyg.PDNConv(WIDTH, CLASSES, 2, 2), "PDNConv normalises"),
        (lambda: pyg.EGConv(WIDTH, 8), "EGConv normalises"),
        (lambda: pyg.LINKX(NODES, WIDTH, 5, CLASSES, 1), "LINKX normalises.*weights of single nodes"),
        (lambda: pyg.SAGEConv(WIDTH, CLASSES, flow="target_to_source"), "SAGEConv has flow=target_to_source"),
        (lambda: OwnForward(WIDTH, CLASSES), "OwnForward normalises.*its forward takes no edge_weight"),
        (lambda: dngd.PyGModel(pyg.GCN(WIDTH, 5, 2, CLASSES)).model, "GCNConv convs.0 is in a PyGModel already"),
    ],
)
def test_what_cannot_be_done_right_is_refused(make: Callable[[], nn.Module], words: str) -> None:
    with pytest.raises(UserError, match=words):
        dngd.PyGModel(make())


def test_what_does_not_normalise_by_the_sample_is_taken(directed: GraphStore) -> None:
    """And keeps no batch's edges for the next one."""
    dngd.PyGModel(OwnForward(WIDTH, CLASSES, normalize=False))
    conv = settled(pyg.EGConv(WIDTH, 8, aggregators=["mean"], cached=True))
    expected = on_whole_graph(copy.deepcopy(conv), directed)
    model = dngd.PyGModel(conv)
    for seeds in (torch.arange(20), torch.arange(50, 60)):
        assert torch.allclose(model(batch_of(directed, seeds, (-1,))), expected[seeds])
    assert model.plain().cached is True


@pytest.mark.parametrize("kind", [OtherEdges, OtherWeights])
def test_edges_of_unknown_degrees_are_refused(directed: GraphStore, kind: type[nn.Module]) -> None:
    with pytest.raises(UserError, match="GCNConv got other edges or edge weights than the batch's"):
        dngd.PyGModel(kind().double())(batch_of(directed, torch.arange(20), (-1,)))


class CopiedEdges(OtherEdges):
    def forward(self, x: Tensor, edge_index: Tensor) -> Any:
        return self.conv(x, edge_index.clone())


class WeightsOfOne(OtherEdges):
    def __init__(self, *, improved: bool = False) -> None:
        super().__init__()
        self.conv = pyg.GCNConv(WIDTH, CLASSES, improved=improved)

    def forward(self, x: Tensor, edge_index: Tensor) -> Any:
        return self.conv(x, edge_index, torch.ones(edge_index.shape[1], dtype=x.dtype))


@pytest.mark.parametrize("make", [CopiedEdges, WeightsOfOne, lambda: WeightsOfOne(improved=True)])
def test_copies_of_the_edges_and_weights_of_one_are_the_batchs(
    directed: GraphStore, make: Callable[[], nn.Module]
) -> None:
    model = make().double()
    expected = on_whole_graph(copy.deepcopy(model), directed)
    seeds = torch.arange(20)
    found = dngd.PyGModel(model)(batch_of(directed, seeds, (-1,)))
    assert torch.allclose(found, expected[seeds], atol=2e-5)  # the coefficients are float32


class Global(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm = pyg.SAGEConv(WIDTH, CLASSES), norm

    def forward(self, x: Tensor, edge_index: Tensor) -> Any:
        return self.norm(self.conv(x, edge_index))


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind not in ("gcn of three layers", "one convolution")])
def test_a_model_must_not_reach_beyond_the_sample(kind: str) -> None:
    """Whatever its layers are: as deep as the samples it passes, without a warning, and is as it was."""
    model = dngd.PyGModel(MODELS[kind]())
    model.train()
    before = copy.deepcopy(model.state_dict())
    depth = 1 if kind == "cluster" else 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.check(WIDTH, depth)
        model.check(WIDTH, depth + 1)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    if depth == 2:
        with pytest.raises(UserError, match="depends on nodes 2 edges away, and num_layers=1 samples no further"):
            model.check(WIDTH, 1)


def test_nodes_of_the_whole_batch_are_warned_of() -> None:
    with pytest.raises(UserError, match="nodes 17 or more edges away"):
        dngd.PyGModel(pyg.APPNP(40, 0.1)).check(WIDTH, 1)
    for norm in (pyg.GraphNorm(CLASSES), pyg.PairNorm(), nn.BatchNorm1d(CLASSES, track_running_stats=False)):
        with pytest.warns(UserWarning, match="depends on all nodes that it is run with"):
            dngd.PyGModel(Global(norm)).check(WIDTH, 1)


class CountsDegrees(nn.Module):
    """GCN as tutorials write it: degrees of the edges that it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        source, target = edge_index
        degree = torch.bincount(target, minlength=x.shape[0]).clamp_min(1).float()
        weight = (degree[source] * degree[target]).rsqrt()
        return self.lin(x + torch.zeros_like(x).index_add(0, target, x[source] * weight[:, None]))


class OutEdges(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = pyg.SAGEConv(WIDTH, 2)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        out: Tensor = self.conv(x, edge_index.flip(0))
        return out


class HidesDepth(nn.Module):
    """Two convolutions, of which a NaN far away is not to be seen."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([pyg.SAGEConv(WIDTH, WIDTH), pyg.SAGEConv(WIDTH, 2)])

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        x = self.convs[0](x.nan_to_num(), edge_index).relu()
        out: Tensor = self.convs[1](x, edge_index)
        return out


@pytest.mark.parametrize("model", [CountsDegrees, OutEdges, HidesDepth])
def test_what_no_batch_has_is_warned_of(model: type[nn.Module]) -> None:
    """Its outputs differ from those on the whole graph, of which a batch has the seeds' in-neighbourhoods."""
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=f"{model.__name__} gives other outputs on the in-neighbourhoods") as caught:
        dngd.PyGModel(model()).check(WIDTH, 1)
    assert len(caught) == 1


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("kind", ["GCN", "GraphSAGE", "GAT", "GIN", "PNA"])
def test_ordinary_models_are_not_warned_of(kind: str, depth: int) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"aggregators": ["mean", "max"], "scalers": ["identity"], "deg": torch.ones(4).long()}
    made = getattr(pyg, kind)(WIDTH, 8, depth, 2, **(options if kind == "PNA" else {}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for num_layers in (depth, depth + 1):
            model = dngd.PyGModel(made)
            model.check(WIDTH, num_layers)
            made = model.plain()


def test_a_data_object_is_asked_of_a_batch_with_the_fix() -> None:
    batch, _, _ = small_batch(WIDTH, 1, weighted=False)
    with pytest.raises(AttributeError, match=r"forward\(x, edge_index\)"):
        _ = batch.edge_index
    assert not hasattr(batch, "edge_index")
    assert copy.deepcopy(batch).x.shape == batch.x.shape


class ReadsIds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 2)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        out: Tensor = self.embed(x[:, 0].long() + 100)
        return out


def test_a_model_that_cannot_be_judged_is_said() -> None:
    with pytest.warns(UserWarning, match="ReadsIds could not be run on a small graph of random rows \\(IndexError"):
        dngd.PyGModel(ReadsIds()).check(WIDTH, 1)
