"""dngd.Trainer with a module, optimizer, loss, metric and callbacks of one's own."""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn import GAT, GCN, GIN, GATConv, GCNConv, GraphSAGE, SAGEConv, SGConv

import dngd
from dngd.comm import LocalCommunicator
from dngd.errors import UserError
from dngd.graph import GraphStore
from dngd.models import GNN, build_model
from dngd.models.activation import relu_dropout
from dngd.optim import NaturalGradient
from dngd.train.module_batches import ModuleBatchBuilder
from dngd.train.module_evaluation import ModuleEvaluator
from tests.end_to_end.test_local_runs import config
from tests.helpers.exact_evaluation import dense_forward
from tests.helpers.ray_cluster import Cluster
from tests.helpers.thread_world import run_threads

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


class Twin(nn.Module):
    """What dngd's GCN or GraphSAGE computes, written for GraphBatch; the same weights from the same random stream."""

    def __init__(self, kind: str, shape: dngd.GraphShape, hidden: int = 24) -> None:
        super().__init__()
        self.kind = kind
        made = build_model(
            kind,
            in_features=shape.num_features,
            hidden=hidden,
            out_features=shape.num_classes,
            num_layers=2,
            dropout=0.0,
        )
        self.linears = nn.ModuleList(layer.linear for layer in made.graph_layers())

    def forward(self, batch: dngd.GraphBatch) -> Tensor:
        hidden = batch.x
        for index, (linear, edges) in enumerate(zip(self.linears, batch.layers)):
            hidden = linear(self.rows(hidden, edges))
            if index + 1 < len(self.linears):
                hidden = relu_dropout(hidden, 0.5, self.training)
        return hidden

    def rows(self, hidden: Tensor, edges: dngd.LayerEdges) -> Tensor:
        if self.kind == "sage":
            return torch.cat([hidden[: edges.num_dst], edges.mean(hidden)], dim=1)
        (source, destination), coefficients = edges.gcn()
        out = hidden.new_zeros(edges.num_dst, hidden.shape[1])
        return out.index_add_(0, destination, hidden[source] * coefficients[:, None])


class LayerwiseTwin(Twin):
    def forward_layer(self, index: int, x: Tensor, edges: dngd.LayerEdges) -> Tensor:
        out: Tensor = self.linears[index](self.rows(x, edges))
        return out if index == 1 else relu_dropout(out, 0.5, self.training)


def trainer(store: GraphStore, run: Path, parts: dict[str, Any], **changes: Any) -> dngd.Trainer:
    return dngd.Trainer(config(store, run, **changes), quiet=True, **parts)


@pytest.mark.parametrize("changes", [{}, {"batch_size": "full", "fanout": None}, {"num_workers": 2, "batch_size": 20}])
@pytest.mark.parametrize("kind", ["gcn", "sage"])
def test_a_module_trains_as_the_built_in_model_does(
    store: GraphStore, tmp_path: Path, kind: str, changes: dict[str, Any]
) -> None:
    """Same samples, same weights, same dropout: the same losses, sampled and full batch, in one shard and in two."""
    fields = {"epochs": 2, "optimizer": "sgd", "lr": 0.1, **changes}
    built_in = trainer(store, tmp_path / "a", {}, model=kind, **fields).fit()
    own = trainer(store, tmp_path / "b", {"module": lambda shape: LayerwiseTwin(kind, shape)}, **fields).fit()
    for one, other in zip(built_in.history, own.history, strict=True):
        assert other.train_loss == pytest.approx(one.train_loss, rel=1e-4)
        assert other.val_loss == pytest.approx(one.val_loss, rel=1e-4)
        assert other.val_accuracy == pytest.approx(one.val_accuracy, abs=0.01)


def test_kfac_of_a_module_is_that_of_the_built_in_model(store: GraphStore, tmp_path: Path) -> None:
    fields = {"epochs": 2, "kfac": {"max_rows": None, "kl_clip": 0.03}, "model": "gcn", "dropout": 0.5}
    built_in = trainer(store, tmp_path / "a", {}, **fields).fit()
    own = trainer(store, tmp_path / "b", {"module": lambda shape: Twin("gcn", shape)}, **fields).fit()
    losses = [[record.train_loss for record in result.history] for result in (built_in, own)]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.parametrize("world", [1, 3])
def test_both_ways_of_evaluating_agree(store: GraphStore, world: int) -> None:
    shape = dngd.GraphShape(store.num_features, store.num_classes)
    plain, layerwise = Twin("gcn", shape), LayerwiseTwin("gcn", shape)
    layerwise.load_state_dict(plain.state_dict())
    nodes = torch.arange(0, store.num_nodes, 3)

    def outputs(module: nn.Module, communicator: Any) -> dict[int, Tensor]:
        builder = ModuleBatchBuilder(store, store.features, CPU)
        made = ModuleEvaluator(store, builder, communicator, num_layers=2, rows=70, device=CPU, features=store.features)
        return {int(v): row for ids, rows in made.predictions(module, nodes) for v, row in zip(ids, rows)}

    found = {}
    for part in run_threads(world, lambda comm: outputs(layerwise, comm)):
        found |= part
    whole = outputs(plain, LocalCommunicator())
    assert sorted(found) == nodes.tolist() == sorted(whole)
    assert torch.allclose(torch.stack([found[v] for v in whole]), torch.stack(list(whole.values())), atol=1e-5)


def convolutions(kind: str, shape: dngd.GraphShape) -> list[nn.Module]:
    if kind == "gat":
        return [GATConv(shape.num_features, 8, heads=2), GATConv(16, shape.num_classes)]
    if kind == "gcn":
        return [GCNConv(shape.num_features, 16, normalize=False), GCNConv(16, shape.num_classes, normalize=False)]
    return [SAGEConv(shape.num_features, 16), SAGEConv(16, shape.num_classes)]


@pytest.mark.parametrize("kind", ["gcn", "sage", "gat"])
def test_layers_of_pyg(store: GraphStore, tmp_path: Path, kind: str) -> None:
    made = trainer(
        store, tmp_path / "run", {"module": lambda shape: dngd.PyGStack(convolutions(kind, shape))}, epochs=4
    )
    result = made.fit()
    majority = float(torch.bincount(store.labels).max()) / store.num_nodes
    assert result.best_val_accuracy > majority + 0.1
    assert made.evaluate()["test"]["accuracy"] == pytest.approx(result.test_accuracy)


def test_pygs_gcn_computes_dngds(store: GraphStore) -> None:
    """The whole graph's coefficients: a stack of GCNConv gives the logits of dngd's GCN with the same weights."""
    ours: GNN = build_model("gcn", in_features=16, hidden=16, out_features=5, num_layers=2, dropout=0.0)
    stack = dngd.PyGStack(convolutions("gcn", dngd.GraphShape(16, 5)), dropout=0.0).eval()
    for conv, layer in zip(stack.convs, ours.graph_layers()):
        conv.lin.weight.data.copy_(layer.linear.weight.data)
        conv.bias.data.copy_(layer.linear.bias.data.normal_())
    batch = ModuleBatchBuilder(store, store.features, CPU).whole(torch.arange(store.num_nodes), 2)
    assert torch.allclose(stack(batch), dense_forward(store, ours).float(), atol=1e-4)


def test_a_stack_and_a_batch_of_other_depths(store: GraphStore) -> None:
    """Not a hidden layer's rows for logits."""
    stack = dngd.PyGStack(convolutions("gcn", dngd.GraphShape(16, 5)))
    batch = ModuleBatchBuilder(store, store.features, CPU).whole(torch.arange(store.num_nodes), 1)
    with pytest.raises(dngd.UserError, match="1 layer graphs for 2 convolutions; sample with one fanout a convolution"):
        stack(batch)
    with pytest.raises(dngd.UserError, match=r"dropout=1.5 is out of range"):
        dngd.PyGStack(convolutions("gcn", dngd.GraphShape(16, 5)), dropout=1.5)


class Residual(nn.Module):
    """A person's own model of PyG: a norm, a skip connection, and what it knows of a run in a buffer."""

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.embed = nn.Linear(num_features, 16)
        self.convs = nn.ModuleList([GCNConv(16, 16, cached=True), SAGEConv(16, 16)])
        self.norm = nn.BatchNorm1d(16)
        self.out = nn.Linear(16, num_classes)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        x = torch.relu(self.embed(x))
        for conv in self.convs:
            x = x + F.dropout(torch.relu(self.norm(conv(x, edge_index))), 0.2, self.training)
        out: Tensor = self.out(x)
        return out


WHOLE_MODELS: dict[str, Any] = {
    "gcn": lambda shape: GCN(shape.num_features, 16, 2, shape.num_classes, dropout=0.2),
    "sage": lambda shape: GraphSAGE(shape.num_features, 16, 2, shape.num_classes, norm="batch_norm"),
    "gat": lambda shape: GAT(shape.num_features, 16, 2, shape.num_classes, heads=2, jk="cat"),
    "gin": lambda shape: GIN(shape.num_features, 16, 2, shape.num_classes, norm="batch_norm"),
    "own": lambda shape: Residual(shape.num_features, shape.num_classes),
}


def whole_graph(store: GraphStore) -> tuple[Tensor, Tensor]:
    destinations = torch.repeat_interleave(torch.arange(store.num_nodes), store.indptr.diff())
    return store.features.float(), torch.stack([store.indices, destinations])


@pytest.mark.parametrize("kind", WHOLE_MODELS)
def test_a_model_of_pyg_as_it_is(store: GraphStore, tmp_path: Path, kind: str) -> None:
    """It learns, and what comes back is its own class, which gives on the whole graph what dngd predicts."""
    given = WHOLE_MODELS[kind](dngd.GraphShape(store.num_features, store.num_classes))
    before = copy.deepcopy(given.state_dict())
    with warnings.catch_warnings():
        if kind in ("gcn", "sage"):
            warnings.filterwarnings("error", message=".*(parameter|K-FAC|layer)")  # none is left over
        made = trainer(store, tmp_path / "run", {"module": given}, epochs=6)
        result = made.fit()
    majority = float(torch.bincount(store.labels).max()) / store.num_nodes
    assert result.best_val_accuracy > majority + 0.1
    assert made.evaluate()["test"]["accuracy"] == pytest.approx(result.test_accuracy)
    best = made.best_model()
    assert type(best) is type(given)
    assert not best.training
    normalised = [(conv.normalize, conv.cached) for conv in best.modules() if isinstance(conv, GCNConv)]
    assert normalised == [(True, kind == "own") for _ in normalised]
    with torch.no_grad():
        shares = best(*whole_graph(store)).softmax(dim=1)
    assert torch.allclose(shares, made.predict(), atol=1e-4)
    assert all(torch.equal(before[name], tensor) for name, tensor in given.state_dict().items())
    weights = safetensors.torch.load_file(made.export(tmp_path / "model.safetensors"))
    assert sorted(weights) == sorted(before)
    given.load_state_dict(weights)
    with torch.no_grad():
        assert torch.allclose(given.eval()(*whole_graph(store)).softmax(dim=1), shares, atol=1e-5)


def same_weights(kind: str, shape: dngd.GraphShape, num_layers: int) -> tuple[nn.Module, nn.Module]:
    """A model of PyG, and a stack of the same layers."""
    cls, conv, options = {"gcn": (GCN, GCNConv, {"normalize": False}), "sage": (GraphSAGE, SAGEConv, {})}[kind]
    widths = [shape.num_features, *[16] * (num_layers - 1), shape.num_classes]
    model = cls(widths[0], 16, num_layers, widths[-1])
    stack = dngd.PyGStack([conv(*pair, **options) for pair in itertools.pairwise(widths)], dropout=0.0)
    stack.load_state_dict({name: model.state_dict()[name] for name in stack.state_dict()})
    return model, stack


@pytest.mark.parametrize(
    "changes",
    [
        {"num_layers": 1, "fanout": (3,)},
        {"batch_size": "full", "fanout": None},
        {"num_layers": 3, "fanout": (-1, -1, -1)},
        {"num_workers": 2, "batch_size": 20, "fanout": (-1, 300)},
        {"batch_size": "full", "fanout": None, "semi": "two_means"},
    ],
)
@pytest.mark.parametrize("kind", ["gcn", "sage"])
def test_kfac_of_a_whole_model_is_that_of_its_layers(
    store: GraphStore, tmp_path: Path, kind: str, changes: dict[str, Any]
) -> None:
    """Where both see the same neighbours: the same curvature, of the same rows, and so the same curve."""
    fields = {"epochs": 3, "kfac": {"max_rows": None}, **changes}
    shape = dngd.GraphShape(store.num_features, store.num_classes)
    model, stack = same_weights(kind, shape, fields.get("num_layers", 2))
    whole, layers = (
        trainer(store, tmp_path / name, {"module": module}, **fields).fit()
        for name, module in (("a", model), ("b", stack))
    )
    for one, other in zip(whole.history, layers.history, strict=True):
        assert one.train_loss == pytest.approx(other.train_loss, rel=1e-3)
        assert one.val_loss == pytest.approx(other.val_loss, rel=1e-3)


def test_resuming_a_whole_model_is_bitwise(store: GraphStore, tmp_path: Path) -> None:
    """Its running means included; a run begun with another does not go on."""
    parts = {"module": WHOLE_MODELS["own"]}
    fields = {"num_workers": 2, "batch_size": 20}
    whole = trainer(store, tmp_path / "whole", parts, epochs=4, **fields).fit()
    trainer(store, tmp_path / "run", parts, epochs=4, max_steps=whole.steps // 2, **fields).fit()
    resumed = trainer(store, tmp_path / "run", parts, epochs=4, resume=True, **fields).fit()
    assert [record.val_loss for record in resumed.history] == [record.val_loss for record in whole.history]
    other = {"module": lambda shape: GAT(16, 16, 2, 5)}
    with pytest.raises(UserError, match=r"another model: convs\.0\.att_dst is nothing there and \[1, 1, 16\]"):
        trainer(store, tmp_path / "run", other, epochs=5, resume=True, **fields).fit()


def test_links_weights_and_narrow_features_of_a_whole_model(store: GraphStore, tmp_path: Path) -> None:
    """Link prediction on a graph with weights and features in 16 bits."""
    features, edges = whole_graph(store)
    weight = torch.rand(edges.shape[1], generator=torch.Generator().manual_seed(0)) + 0.5
    path = tmp_path / "graph"
    GraphStore.write(
        path,
        features=features,
        feature_dtype="float16",
        edge_index=edges,
        edge_weight=weight,
        labels=store.labels,
        duplicates="sum",
    )
    weighted = GraphStore.open(path)
    assert weighted.features.dtype == torch.float16
    made = trainer(weighted, tmp_path / "nodes", {"module": WHOLE_MODELS["gcn"]}, epochs=3, split="random:.5/.25/.25")
    made.fit()
    with torch.no_grad():
        shares = made.best_model()(*whole_graph(weighted), weighted.edge_weight).softmax(dim=1)
    assert torch.allclose(shares, made.predict(), atol=1e-3)
    links = {"task": "link", "batch_size": 128, "hidden": 16, "epochs": 8, "fanout": (10, 10)}
    made = trainer(weighted, tmp_path / "links", {"module": WHOLE_MODELS["gcn"]}, **links)
    result = made.fit()
    assert result.best_val_accuracy > 0.65, "ROC-AUC"
    assert made.predict().shape == (600, 16)


def test_optimizer_and_callbacks_get_the_whole_model_itself(store: GraphStore, tmp_path: Path) -> None:
    """Layers by their names, and a call on a whole graph, which normalises as PyG does."""

    class Watch(dngd.Callback):
        def on_evaluation(self, run: dngd.RunState, record: Any) -> None:
            found.append((type(run.model), run.model.eval()(*whole_graph(store)).softmax(dim=1).detach()))
            run.model.train()

    found: list[tuple[type, Tensor]] = []
    parts = {
        "module": WHOLE_MODELS["own"],
        "optimizer": lambda model: torch.optim.Adam(
            [{"params": model.convs.parameters()}, {"params": model.out.parameters(), "lr": 0.1}], lr=0.01
        ),
        "callbacks": [Watch()],
    }
    made = trainer(store, tmp_path / "run", parts, epochs=1)
    made.fit()
    [(kind, shares)] = found
    assert kind is Residual
    assert torch.allclose(shares, made.predict(), atol=1e-4)


class Wants(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 5)


class WantsSizes(Wants):
    def forward(self, x: Tensor, sizes: Tensor) -> Any:
        return self.linear(x)


class WantsMore(Wants):
    def forward(self, x: Tensor, edge_index: Tensor, positions: Tensor) -> Any:
        return self.linear(x)


class WantsAnything(Wants):
    def forward(self, *arguments: Any) -> Any:
        [batch] = arguments
        return self.linear(batch.x[: batch.seeds.numel()])


def test_modules_that_are_wrapped_and_those_that_are_not(store: GraphStore, tmp_path: Path) -> None:
    for module, words in (
        (WantsSizes(), r"WantsSizes.forward wants \(x, sizes\).*forward\(x, edge_index\)"),
        (WantsMore(), "WantsMore.forward wants positions beside rows and edges"),
        (GCN(16, 16, 3, 5), "an output of GCN depends on nodes 3 edges away, and num_layers=2.*use num_layers=3"),
        (SGConv(16, 5, K=2), "SGConv normalises by degrees of the whole graph"),
    ):
        with pytest.raises(UserError, match=words):
            trainer(store, tmp_path / "refused", {"module": module}).fit()
        assert not (tmp_path / "refused").exists()
    assert math.isfinite(trainer(store, tmp_path / "run", {"module": WantsAnything()}, epochs=1).fit().test_accuracy)
    given = dngd.PyGModel(GCN(16, 16, 2, 5))
    made = trainer(store, tmp_path / "given", {"module": given}, epochs=1)
    made.fit()
    assert isinstance(made.best_model(), dngd.PyGModel), "as it was given"


class OfDegrees(nn.Module):
    """Reads no features."""

    def __init__(self, shape: dngd.GraphShape) -> None:
        super().__init__()
        self.linear = nn.Linear(1, shape.num_classes)

    def forward(self, batch: dngd.GraphBatch) -> Tensor:
        edges = batch.layers[-1]
        return self.linear(edges.degrees[: edges.num_dst, None].float())


def test_a_module_that_reads_no_features_needs_none(tmp_path: Path) -> None:
    """The built-in models are refused such a graph."""
    edges = torch.arange(80).reshape(2, 40) % 40
    GraphStore.write(tmp_path / "bare", features=None, num_nodes=40, edge_index=edges, labels=torch.arange(40) % 2)
    settings = config(
        GraphStore.open(tmp_path / "bare"), tmp_path / "run", optimizer="adam", batch_size=5, split="random:.5/.25/.25"
    )
    result = dngd.Trainer(settings, module=OfDegrees, quiet=True).fit()
    assert math.isfinite(result.best_val_accuracy)


def test_resuming_a_module_is_bitwise(store: GraphStore, tmp_path: Path) -> None:
    parts = {"module": lambda shape: Twin("sage", shape)}
    whole = trainer(store, tmp_path / "whole", parts, epochs=3).fit()
    first = trainer(store, tmp_path / "parts", parts, epochs=3, max_steps=5, checkpoint={"period_steps": 5})
    first.fit()
    first.config = first.config.model_copy(update={"max_steps": None})
    resumed = first.resume()
    assert resumed.history[-1].val_loss == whole.history[-1].val_loss
    assert resumed.steps == whole.steps


class Averaged(torch.optim.Optimizer):
    """Gradient descent by the mean rate so far, with all that it knows in its groups, as schedule-free ones have it."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1, "k": 0, "weight_sum": 0.0, "began": False})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["k"] += 1
            group["weight_sum"] += group["lr"] / 3
            group["began"] = True
            group["total"] = group.get("total", torch.zeros(())) + 1
            for parameter in group["params"]:
                parameter.sub_(parameter.grad * (group["weight_sum"] / group["k"] + 0.01 * group["total"]))


def test_resuming_keeps_what_an_optimizer_counts_in_its_groups(store: GraphStore, tmp_path: Path) -> None:
    seen: dict[int, dict[str, Any]] = {}

    class Watch(dngd.Callback):
        def on_step(self, run: dngd.RunState) -> None:
            seen[run.step] = {k: v for k, v in run.optimizer.param_groups[0].items() if k != "params"}

    parts = {"optimizer": lambda module: Averaged(module.parameters()), "callbacks": [Watch()]}
    whole = trainer(store, tmp_path / "whole", parts, epochs=3).fit()
    expected = seen.pop(whole.steps)
    first = trainer(store, tmp_path / "parts", parts, epochs=3, max_steps=5, checkpoint={"period_steps": 5})
    first.fit()
    first.config = first.config.model_copy(update={"max_steps": None})
    resumed = first.resume()
    assert seen[resumed.steps] == expected
    assert type(expected["k"]) is type(seen[resumed.steps]["k"]) is int
    assert resumed.history[-1].val_loss == whole.history[-1].val_loss


def test_prediction_evaluation_and_the_best_module(store: GraphStore, tmp_path: Path) -> None:
    given = Twin("gcn", dngd.GraphShape(store.num_features, store.num_classes))
    before = {name: tensor.clone() for name, tensor in given.state_dict().items()}
    made = trainer(store, tmp_path / "run", {"module": given}, epochs=3)
    result = made.fit()
    assert all(torch.equal(before[name], tensor) for name, tensor in given.state_dict().items())
    split = store.split("masks")
    shares = made.predict(split.test)
    assert float((shares.argmax(dim=1) == store.labels[split.test]).float().mean()) == pytest.approx(
        result.test_accuracy
    )
    turned = split.test.flip(0)
    assert torch.allclose(made.predict(turned), shares.flip(0), atol=1e-6)
    best = made.best_model()
    assert isinstance(best, Twin)
    batch = ModuleBatchBuilder(store, store.features, CPU).whole(split.test, 2)
    assert torch.allclose(best(batch).softmax(dim=1), shares, atol=1e-5)


def test_a_built_in_model_predicts_too(store: GraphStore, tmp_path: Path) -> None:
    made = trainer(store, tmp_path / "run", {}, epochs=1)
    result = made.fit()
    shares = made.predict()
    test = store.split("masks").test
    right = (shares[test].argmax(dim=1) == store.labels[test]).float().mean()
    assert float(right) == pytest.approx(result.test_accuracy)
    assert isinstance(made.best_model(), GNN)


def focal(outputs: Tensor, labels: Tensor) -> Tensor:
    loss = F.cross_entropy(outputs, labels, reduction="none")
    return (1 - torch.exp(-loss)).square() * loss


def top_two(outputs: Tensor, labels: Tensor) -> float:
    return float((outputs.topk(2).indices == labels[:, None]).any(dim=1).float().mean())


class Recorder(dngd.Callback):
    def __init__(self, last: int | None = None) -> None:
        self.calls: list[Any] = []
        self.last = last

    def on_start(self, run: dngd.RunState) -> None:
        self.calls.append(("start", run.step))

    def on_step(self, run: dngd.RunState) -> None:
        assert math.isfinite(run.loss)
        self.calls.append(("step", run.step))

    def on_evaluation(self, run: dngd.RunState, record: Any) -> bool | None:
        self.calls.append(("evaluation", record.step))
        return len(run.history) == self.last

    def on_end(self, run: dngd.RunState, result: dngd.RunResult | None) -> None:
        self.calls.append(("end", None if result is None else result.steps))


def test_optimizer_loss_metric_and_callbacks(store: GraphStore, tmp_path: Path) -> None:
    recorder = Recorder(last=2)
    rates: list[float] = []

    class Rates(dngd.Callback):
        def on_step(self, run: dngd.RunState) -> None:
            rates.append(run.optimizer.param_groups[0]["lr"])

    parts = {
        "optimizer": lambda module: torch.optim.RMSprop(module.parameters(), lr=3e-3),
        "loss": focal,
        "metric": top_two,
        "callbacks": [recorder, Rates()],
    }
    result = trainer(store, tmp_path / "run", parts, epochs=9, lr_schedule="constant", warmup_steps=2).fit()
    assert result.metric == "top_two"
    assert len(result.history) == 2
    per_epoch = result.steps // 2
    steps = [("step", k) for k in range(1, per_epoch + 1)]
    assert recorder.calls[: per_epoch + 2] == [("start", 0), *steps, ("evaluation", per_epoch)]
    assert recorder.calls[-1] == ("end", result.steps)
    assert rates[0] == pytest.approx(1.5e-3)
    assert rates[-1] == pytest.approx(3e-3)
    made = dngd.Trainer(config(store, tmp_path / "run"), quiet=True, **parts)
    assert made.evaluate()["val"]["top_two"] == pytest.approx(result.best_val_accuracy)
    assert result.best_val_accuracy > result.history[0].val_accuracy - 1e-9


def test_a_callback_that_fails_is_left_out(store: GraphStore, tmp_path: Path) -> None:
    class Broken(dngd.Callback):
        def on_step(self, run: dngd.RunState) -> None:
            raise OSError("no network")

    told: list[str] = []

    class Listener:
        def step(self, record: Any) -> None: ...

        def evaluation(self, record: Any) -> None: ...

        def message(self, text: str) -> None:
            told.append(text)

    recorder = Recorder()
    made = dngd.Trainer(config(store, tmp_path / "run", epochs=1), callbacks=[Broken(), recorder], reporter=Listener())
    result = made.fit()
    assert [text for text in told if "Broken failed (OSError: no network)" in text] == [
        "callback Broken failed (OSError: no network); the run goes on without it"
    ]
    assert recorder.calls.count(("step", result.steps)) == 1
    with pytest.warns(UserWarning, match=r"callback Broken failed \(OSError: no network\); the run goes on without it"):
        dngd.Trainer(config(store, tmp_path / "quiet", epochs=1), callbacks=[Broken()], quiet=True).fit()


def test_what_is_no_callback_is_said_before_the_run(store: GraphStore, tmp_path: Path) -> None:
    class Misspelt(dngd.Callback):
        def on_evaluate(self, run: dngd.RunState, record: Any) -> None: ...

        def on_first_save(self) -> None: ...  # the program's own

    class NoCallback:
        def on_step(self, run: dngd.RunState) -> None: ...

    settings = config(store, tmp_path / "run", epochs=1)
    with pytest.warns(
        UserWarning, match=r"dngd does not call Misspelt.on_evaluate \(is it on_evaluation\?\); a callback"
    ) as told:
        dngd.Trainer(settings, callbacks=[Misspelt()], quiet=True)
    assert len(told) == 1
    assert told[0].filename == __file__
    for wrong, said in (
        ([Recorder], r"callback Recorder is a class; give one made of it, Recorder\(\)"),
        ([NoCallback()], "a callback is a NoCallback; derive its class from dngd.Callback"),
        (Recorder(), "callbacks is a Recorder; give a list"),
        (Recorder, "callbacks is a type; give a list"),
        (None, "callbacks is a NoneType; give a list"),
    ):
        with pytest.raises(UserError, match=said):
            dngd.Trainer(settings, callbacks=wrong, quiet=True)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("parts", "changes", "message"),
    [
        ({}, {"model": "custom"}, r"dngd\.Trainer\(config, module="),
        ({}, {"optimizer": "custom"}, r"dngd\.Trainer\(config, optimizer="),
        ({"module": lambda shape: 3}, {}, "returned a int; return a torch.nn.Module"),
        ({"module": lambda shape: nn.ReLU()}, {}, "no trainable parameter"),
        (
            {"module": lambda shape: dngd.PyGStack([SAGEConv(-1, 5)])},
            {"num_layers": 1, "fanout": (3,)},
            "no size before",
        ),
        ({"module": lambda shape: dngd.PyGStack([GCNConv(16, 5)])}, {}, "normalize=False"),
        ({"module": lambda shape: Twin("gcn", dngd.GraphShape(16, 4))}, {}, r"returned \[40, 4\] for 40 seeds"),
        ({"optimizer": lambda module: 3}, {}, "return a torch.optim.Optimizer"),
        ({"optimizer": NaturalGradient}, {}, "optimizer=kfac"),
        (
            {"optimizer": lambda module: torch.optim.Adam(module.parameters())},
            {"lr": 0.1},
            "leave lr and weight_decay out",
        ),
        ({"loss": focal}, {"kfac": {"fisher": "monte_carlo"}}, "kfac.fisher=empirical"),
        ({"loss": F.cross_entropy}, {"optimizer": "adam"}, "return one number a seed"),
    ],
)
def test_parts_that_do_not_fit(
    store: GraphStore, tmp_path: Path, parts: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        trainer(store, tmp_path / "run", parts, **changes).fit()


def test_another_module_does_not_resume(store: GraphStore, tmp_path: Path) -> None:
    trainer(store, tmp_path / "run", {"module": lambda shape: Twin("gcn", shape)}, epochs=1).fit()
    recorder = Recorder()
    parts = {"module": lambda shape: Twin("gcn", shape, hidden=8), "callbacks": [recorder]}
    other = trainer(store, tmp_path / "run", parts, epochs=2)
    with pytest.raises(UserError, match=r"linears\.0\.bias is \[24\] there and \[8\] in this model"):
        other.resume()
    assert recorder.calls == []
    with pytest.raises(UserError, match="another model"):
        other.predict()
    with pytest.raises(UserError, match="module of one's own"):
        dngd.Trainer(config(store, tmp_path / "run", model="gcn")).evaluate()


PROGRAM = """
import dataclasses, json, sys
import torch, dngd
from torch_geometric.nn import SAGEConv

class Names(dngd.Callback):
    def on_start(self, run):
        (run.run_dir / "names.txt").write_text(type(run.model).__name__)

class Normed(torch.nn.Module):  # with running means, and without forward_layer
    def __init__(self, shape):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(shape.num_features)
        self.stack = dngd.PyGStack([SAGEConv(shape.num_features, 16), SAGEConv(16, shape.num_classes)])

    def forward(self, batch):
        return self.stack(dataclasses.replace(batch, x=self.norm(batch.x)))

def error(outputs, labels):
    return -float((outputs.argmax(dim=1) != labels).float().mean())

fields = json.loads(sys.argv[1])
made = dngd.Trainer(dngd.TrainConfig(**fields), module=Normed, metric=error, callbacks=[Names()], quiet=True)
result = made.fit()
print(json.dumps({"losses": [r.train_loss for r in result.history], "test": made.evaluate()["test"]["error"],
                  "result": result.test_accuracy}))
"""


@pytest.mark.slow
def test_parts_reach_the_workers_of_ray(store: GraphStore, tmp_path: Path, cluster: Cluster) -> None:
    """Pickled from a program's own main module; the same curve as in one process, and one set of running means."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    found = {}
    for engine in ("ray", "local"):
        fields = config(store, tmp_path / engine, engine=engine, num_workers=2, batch_size=20, epochs=2)
        given = fields.model_dump(mode="json")
        given["ray"]["address"] = cluster.gcs_address
        done = subprocess.run(
            [sys.executable, str(program), json.dumps(given)],
            env=cluster.environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr
        found[engine] = json.loads(done.stdout.strip().splitlines()[-1])
        assert (tmp_path / engine / "names.txt").read_text() == "Normed"
    assert found["ray"]["losses"] == pytest.approx(found["local"]["losses"], rel=1e-4)
    for values in found.values():
        assert values["test"] == pytest.approx(values["result"], abs=1e-6)


class Recurrent(nn.Module):
    """One linear layer for both hops, under two names."""

    def __init__(self, shape: dngd.GraphShape) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(shape.num_features, 16), nn.Linear(16, shape.num_classes)
        hop = nn.Linear(16, 16)
        self.hops = nn.ModuleList([hop, hop])
        self.norm = nn.BatchNorm1d(16)
        self.register_buffer("turned", torch.arange(6.0).reshape(2, 3).T)

    def forward(self, batch: dngd.GraphBatch) -> Tensor:
        hidden = torch.relu(self.first(batch.x))
        for hop, edges in zip(self.hops, batch.layers):
            hidden = torch.relu(self.norm(hop(edges.mean(hidden) + hidden[: edges.num_dst])))
        out: Tensor = self.last(hidden)
        return out


@pytest.mark.parametrize("optimizer", ["kfac", "adam"])
def test_a_module_used_twice_is_saved_resumed_and_exported(store: GraphStore, tmp_path: Path, optimizer: str) -> None:
    """Its weight has two names; a buffer of it is no contiguous tensor, and another changes with each shard."""
    fields = {"optimizer": optimizer, "num_workers": 2, "epochs": 4}
    whole = trainer(store, tmp_path / "whole", {"module": Recurrent}, **fields).fit()
    trainer(store, tmp_path / "run", {"module": Recurrent}, max_steps=whole.steps // 2, **fields).fit()
    made = trainer(store, tmp_path / "run", {"module": Recurrent}, resume=True, **fields)
    result = made.fit()
    assert [record.val_loss for record in result.history] == [record.val_loss for record in whole.history]
    assert made.evaluate()["test"]["accuracy"] == pytest.approx(result.test_accuracy)
    best = made.best_model()
    assert best.hops[0] is best.hops[1]
    assert torch.equal(best.turned, torch.arange(6.0).reshape(2, 3).T)
    weights = safetensors.torch.load_file(made.export(tmp_path / "model.safetensors"))
    assert torch.equal(weights["hops.1.weight"], best.hops[1].weight)


def test_a_state_that_no_checkpoint_can_hold_is_refused_at_once(store: GraphStore, tmp_path: Path) -> None:
    class Sparse(Recurrent):
        def __init__(self, shape: dngd.GraphShape) -> None:
            super().__init__(shape)
            self.register_buffer("adjacency", torch.eye(3).to_sparse())

    class Extra(Recurrent):
        def get_extra_state(self) -> dict[str, int]:
            return {"a": 1}

    for module, words in ((Sparse, "adjacency in the module's .* layout torch.sparse_coo"), (Extra, "is dict")):
        with pytest.raises(UserError, match=words):
            trainer(store, tmp_path / "run", {"module": module}).fit()


def test_a_class_in_place_of_a_module_is_told_what_is_wanted(store: GraphStore, tmp_path: Path) -> None:
    class Net(torch.nn.Module):
        def __init__(self, width: int, classes: int) -> None:
            super().__init__()

    with pytest.raises(dngd.UserError, match=r"module=Net is called with the graph's shape alone.*lambda shape: Net\("):
        dngd.Trainer(config(store, tmp_path / "run"), module=Net, quiet=True).fit()


def test_a_data_object_in_place_of_a_dataset_is_told_what_is_wanted(tmp_path: Path) -> None:
    from torch_geometric.data import Data

    data = Data(x=torch.ones(3, 2), edge_index=torch.tensor([[0, 1], [1, 2]]), y=torch.tensor([0, 1, 0]))
    with pytest.raises(dngd.UserError, match=r"dataset is a Data object.*dngd\.graph\.import_pyg"):
        dngd.TrainConfig(dataset=data)
    assert dngd.graph.import_pyg(data, tmp_path / "my.store").num_nodes == 3
